"""Rules for mixing among clients that may lie, held against one client and one number at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from playing import BOTH, begun, played
from torch import Tensor

from peertune.errors import RecipeError
from peertune.method import At, Mixer, standing
from peertune.methods import robust
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.mixers import corrected, gossip, products
from peertune.methods.modifiers import MODIFIERS
from peertune.methods.shares import keeping
from peertune.types import Tensors

N, R, GAMMA = 7, 2, 1.05
SHAPES = {"q.A": (R, 5), "q.B": (4, R), "v.A": (R, 3), "v.B": (6, R), "out.weight.head": (2, 4)}
WEIGHING: dict[str, Callable[[Mixer], Mixer]] = {
    "balance": lambda mixer: robust.balance(mixer, gamma=GAMMA, rounds=10),
    "clipped": robust.clipped,
    "cs_plus": robust.cs_plus,
    "gt_pd": lambda mixer: robust.gt_pd(mixer, radius=0.4, trusted=0.7, untrusted_edges=0.3, seed=3),
    "krum": robust.krum,
}
ALL: dict[str, Callable[[Mixer], Mixer]] = WEIGHING | {"median": robust.median, "trimmed_mean": robust.trimmed_mean}
METHODS = {"factors": gossip, "products": products}


def drawn(seed: int, clients: int = N) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(clients, *x, generator=draw, dtype=torch.float64) for name, x in SHAPES.items()}


def ring_and_more() -> Tensor:
    """Weights of a graph in which clients have three, four or six neighbours, symmetric and doubly stochastic."""
    linked = torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        for step in (1, 2):
            linked[i, (i + step) % N] = linked[(i + step) % N, i] = 1
    linked[0, 1:] = linked[1:, 0] = 1
    linked[3, 5] = linked[5, 3] = 0
    degree = linked.sum(1)
    weights = linked / (1 + torch.maximum(degree[:, None], degree))
    return weights + torch.diag(1 - weights.sum(1))


def at(clients: int = N, round: int = 4) -> At:
    return standing(range(clients), torch.full((clients,), round))._replace(heard=torch.arange(clients))


def weighed(mixer: Mixer, adapters: Tensors, weights: Tensor, memory: Tensors | None = None) -> tuple[Tensor, Tensors]:
    """Return the weights by which a rule has clients mix, and what it remembers."""
    where = at(len(weights))
    known = mixer.init(adapters, where) if memory is None else memory
    used, changed = mixer.weigh(adapters, adapters, weights, known, where, BOTH)
    assert isinstance(used, Tensor)
    return used, known | changed


def compared(adapters: Tensors, client: int, which: str) -> dict[str, Tensor]:
    """Return one client's adapter as vectors by what is compared."""
    own = {name: x[client] for name, x in adapters.items()}
    made = {"BA": torch.cat([(own[f"{site}.B"] @ own[f"{site}.A"]).flatten() for site in "qv"])}
    made["head"] = own["out.weight.head"].flatten()
    for factor in "AB" if which == "factors" else "":
        made[factor] = torch.cat([own[f"{site}.{factor}"].flatten() for site in "qv"])
    return made


def apart(adapters: Tensors, i: int, j: int, which: str) -> dict[str, float]:
    """Return how far two clients' adapters are apart, from matrices that are formed."""
    one, other = compared(adapters, i, which), compared(adapters, j, which)
    found = {kind: float((other[kind] - one[kind]).norm()) for kind in one}
    if which == "factors":
        differ = {name: x[j] - x[i] for name, x in adapters.items()}
        cross = [(differ[f"{site}.B"] @ differ[f"{site}.A"]).flatten() for site in "qv"]
        found["cross"] = float(torch.cat(cross).norm())
    return found


def twin(rule: str, which: str, adapters: Tensors, weights: Tensor) -> Tensor:
    """Return the same weights, by loops over clients, from vectors that are formed."""
    vectors = [compared(adapters, client, which) for client in range(N)]
    kinds = list(apart(adapters, 0, 1, which))
    used = torch.zeros_like(weights)
    for i in range(N):
        near = [j for j in range(N) if j != i and weights[i, j] > 0]
        d = {kind: {j: apart(adapters, i, j, which)[kind] for j in near} for kind in kinds}
        kept = dict.fromkeys(near, 1.0)
        if rule == "krum":
            all_ = sorted([*near, i])

            between = {(a, b): apart(adapters, a, b, which) for a in all_ for b in all_}
            middles = {
                kind: sorted(between[a, b][kind] for a in all_ for b in all_ if a < b)[
                    (len(all_) * (len(all_) - 1) // 2 - 1) // 2
                ]
                for kind in kinds
            }
            scores = {
                a: sum(
                    sorted(sum((between[a, b][kind] / middles[kind]) ** 2 for kind in kinds) for b in all_ if b != a)[
                        : len(all_) - 3
                    ]
                )
                for a in all_
            }
            tied = [a for a in all_ if scores[a] <= min(scores.values()) * (1 + 1e-9)]
            best = min(
                tied, key=lambda a: sum((between[a, b][kind] / middles[kind]) ** 2 for kind in kinds for b in all_)
            )
            if len(all_) < 4:
                used[i] = weights[i]
                continue
            used[i, i] += weights[i, i]
            used[i, best] += 1 - weights[i, i]
            continue
        for kind in kinds:
            order = sorted(near, key=lambda j: -d[kind][j])
            if rule == "clipped":
                far, close = order[:1], order[1:]
                radius = (
                    sum(float(weights[i, j]) * d[kind][j] ** 2 for j in close) / sum(float(weights[i, j]) for j in far)
                ) ** 0.5
            elif rule == "cs_plus":
                radius = d[kind][order[1]]
            else:
                break
            kept = {j: min(kept[j], radius / d[kind][j]) for j in near}
        if rule == "balance":
            reach = GAMMA * torch.exp(torch.tensor(-4 / 10)).item()
            asked = {kind: (d[kind], float(x.norm())) for kind, x in vectors[i].items() if which == "products"}
            if which == "factors":
                together = ["A", "B", "head"]
                length = sum(float(vectors[i][kind].norm()) ** 2 for kind in together) ** 0.5
                asked = {"x": ({j: sum(d[kind][j] ** 2 for kind in together) ** 0.5 for j in near}, length)}
            kept = {j: float(all(of[j] <= reach * size for of, size in asked.values())) for j in near}
        for j in near:
            used[i, j] = weights[i, j] * min(kept[j], 1.0)
        used[i, i] = 1 - used[i].sum()
    return used


@pytest.mark.parametrize("which", METHODS)
def test_distances_are_those_of_what_is_formed(which: str) -> None:
    adapters = drawn(1)
    i, j = torch.tensor([0, 3, 3, 6]), torch.tensor([1, 0, 3, 2])
    found = robust.distances(adapters, i, j, factors=which == "factors")
    lengths = robust.sizes(adapters, factors=which == "factors")
    for pair, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True)):
        far, sizes = apart(adapters, a, b, which), compared(adapters, a, which)
        assert found.keys() == far.keys() == lengths.keys()
        for kind, d in found.items():
            assert float(d[pair]) == pytest.approx(far[kind], rel=1e-12)
            size = float(sizes["BA" if kind == "cross" else kind].norm())
            assert float(lengths[kind][a]) == pytest.approx(size, rel=1e-12)


def test_distances_are_the_same_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, every = drawn(1), torch.arange(N)
    whole = robust.distances(adapters, every, every.flip(0))
    monkeypatch.setattr(robust, "_CHUNK_FLOATS", 20)
    for kind, d in robust.distances(adapters, every, every.flip(0)).items():
        torch.testing.assert_close(d, whole[kind], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("which", METHODS)
@pytest.mark.parametrize("rule", ["balance", "clipped", "cs_plus", "krum"])
def test_weights_are_those_of_loops(rule: str, which: str, sparse: bool) -> None:
    adapters, weights = drawn(5), ring_and_more()
    for name in adapters:
        adapters[name] += 0.5
    used, _ = weighed(WEIGHING[rule](METHODS[which]()), adapters, weights.to_sparse() if sparse else weights)
    assert used.is_sparse == sparse
    found = used.to_dense()
    torch.testing.assert_close(found, twin(rule, which, adapters, weights), rtol=1e-10, atol=1e-12)
    assert float((found - weights).abs().max()) > 0.005  # it did something


def test_clipping_is_a_weight() -> None:
    adapters, weights = drawn(5), ring_and_more()
    mixer = robust.clipped(gossip())
    used, memory = weighed(mixer, adapters, weights)
    kinds = {kind: memory[f"clipped.{kind}.radius"] for kind in ("A", "B", "BA", "cross", "head")}
    for name, x in adapters.items():
        mixed = x.clone()
        for i in range(N):
            for j in range(N):
                d = robust.distances(adapters, torch.tensor([i]), torch.tensor([j]))
                share = min([1.0, *(float(kinds[kind][i] / d[kind]) for kind in kinds if d[kind] > 0)])
                mixed[i] += weights[i, j] * share * (x[j] - x[i])
        found, _ = mixer.receive(adapters, adapters, used, memory, at(), BOTH)
        torch.testing.assert_close(found[name], mixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rule", "middle"), [("median", None), ("trimmed_mean", 1)])
def test_entry_by_entry(rule: str, middle: int | None) -> None:
    adapters, weights = drawn(5), ring_and_more()
    mixed, _ = ALL[rule](gossip()).receive(adapters, adapters, weights, {}, at(), BOTH)
    for name, x in adapters.items():
        for i in range(N):
            heard = x[weights[i] > 0]
            if middle is None:
                lower, upper = heard.median(0).values, -(-heard).median(0).values
                expected = (lower + upper) / 2
            else:
                expected = (heard.sum(0) - heard.amax(0) - heard.amin(0)) / (len(heard) - 2)
            torch.testing.assert_close(mixed[name][i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("size", [10.0, 1e3, 1e6])
def test_one_that_lies_moves_honest_clients_by_as_much_as_the_honest_differ(rule: str, size: float) -> None:
    adapters, weights = drawn(8), ring_and_more()
    spread = max(float((x[1:] - x[1:].mean(0)).abs().max()) for x in adapters.values())
    for x in adapters.values():
        x[0] *= size
    after, plain = (played(method, begun(method, adapters), weights).adapters for method in (changed(rule), changed()))
    honest = slice(1, None)
    for name, x in adapters.items():
        assert float((after[name][honest] - x[honest]).abs().max()) < 6 * spread
    assert max(float((plain[name][honest] - x[honest]).abs().max()) for name, x in adapters.items()) > size / 30


def changed(*rules: str, method: str = "dec_lora") -> Any:
    """Return a method with such rules."""
    algorithm = ALGORITHMS[method]()
    for rule in rules:
        algorithm = algorithm._replace(mixer=ALL[rule](algorithm.mixer))
    return algorithm


def turned(adapters: Tensors, client: int, seed: int = 0) -> Tensors:
    """Return adapters of which one client's is the same in other coordinates, which a rotation leads to."""
    draw = torch.Generator().manual_seed(seed)
    adapters = {name: x.clone() for name, x in adapters.items()}
    for site in "qv":
        Q, _ = torch.linalg.qr(torch.randn(R, R, generator=draw, dtype=torch.float64))
        adapters[f"{site}.A"][client] = Q.T @ adapters[f"{site}.A"][client]
        adapters[f"{site}.B"][client] = adapters[f"{site}.B"][client] @ Q
    return adapters


def off(adapters: Tensors, like: Tensors) -> float:
    """Return how far the products of clients but the first are from others', relative to these."""
    made = [torch.cat([(x[f"{site}.B"] @ x[f"{site}.A"])[1:].flatten(1) for site in "qv"], 1) for x in (adapters, like)]
    return float((made[0] - made[1]).norm() / made[1].norm())


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        *((rule, 0.03) for rule in ("balance", "clipped", "cs_plus", "krum", "median", "trimmed_mean")),
        ("gt_pd", 0.12),  # coordinates are not as far off as a sign that is turned: it clips
    ],
)
def test_the_same_adapter_in_other_coordinates_ruins_plain_averages_and_few_rules(rule: str, most: float) -> None:
    """All clients but the first nearly agree; it has their product, too, in other coordinates."""
    common = {
        name: x.expand(N, *x.shape[1:]) + 0.01 * y
        for (name, x), y in zip(drawn(3, 1).items(), drawn(4).values(), strict=True)
    }
    attacked, weights = turned(common, 0), ring_and_more()
    far = apart(attacked, 1, 0, "factors")
    assert far["BA"] < 0.15 < 1 < far["A"]
    plain = played(changed(), begun(changed(), attacked), weights).adapters
    ruled = played(changed(rule), begun(changed(rule), attacked), weights).adapters
    assert off(plain, common) > 0.15
    assert off(ruled, common) < most
    by_product = played(changed(method="decaf"), begun(changed(method="decaf"), attacked), weights).adapters
    assert off(by_product, common) < 0.02


@pytest.mark.parametrize("rule", WEIGHING)
def test_rules_for_products_do_not_see_coordinates(rule: str) -> None:
    adapters, weights = drawn(5), ring_and_more()
    mixer = WEIGHING[rule](products())
    for client in range(N):
        used, _ = weighed(mixer, turned(adapters, client, seed=client), weights)
        torch.testing.assert_close(used, weighed(mixer, adapters, weights)[0], rtol=1e-9, atol=1e-9)


def test_gt_pd_keeps_the_mean_and_both_ends_of_an_edge_agree() -> None:
    adapters, weights = drawn(5), ring_and_more()
    rule = WEIGHING["gt_pd"](gossip())
    seen = set()
    for t in range(20):
        used, _ = rule.weigh(adapters, adapters, weights, {}, at(round=t), BOTH)
        assert isinstance(used, Tensor)
        torch.testing.assert_close(used, used.T, rtol=0, atol=1e-15)
        torch.testing.assert_close(used.sum(0), torch.ones(N, dtype=torch.float64), rtol=1e-14, atol=1e-14)
        seen.add(tuple((used[2] > 0).tolist()))
    assert len(seen) > 3  # edges are dropped in some rounds and not in others
    alone = {name: x[2:3] for name, x in adapters.items()}
    where = standing([2], torch.tensor([19]))._replace(heard=torch.arange(N))
    own, _ = rule.weigh(alone, adapters, weights[2:3], {}, where, BOTH)
    assert isinstance(own, Tensor)
    assert isinstance(used, Tensor)
    torch.testing.assert_close(own, used[2:3], rtol=1e-14, atol=1e-14)


PAIR = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
TRIPLE = torch.full((3, 3), 1 / 3, dtype=torch.float64)


@pytest.mark.parametrize("weights", [PAIR, TRIPLE], ids=["one", "two"])
@pytest.mark.parametrize("rule", ["clipped", "cs_plus", "krum", "gt_pd", "balance"])
def test_of_one_or_two_neighbours(rule: str, weights: Tensor) -> None:
    """What docs/security.md says of clients with few neighbours."""
    adapters = drawn(6, len(weights))
    used, _ = weighed(WEIGHING[rule](gossip()), adapters, weights)
    alone, plain = torch.eye(len(weights), dtype=torch.float64), weights
    if rule == "krum":
        assert torch.equal(used, plain)
    elif len(weights) == 2 and rule in ("clipped", "cs_plus"):
        assert torch.equal(used, alone)
    else:
        assert not torch.equal(used, plain)


def test_clipped_goes_by_the_last_radius_where_it_has_too_few_neighbours() -> None:
    adapters, mixer = drawn(6, 3), robust.clipped(gossip())
    _, memory = weighed(mixer, adapters, TRIPLE)
    one = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64)
    used, after = weighed(mixer, adapters, one, memory)
    assert 0 < used[0, 1] <= 0.5
    assert all(torch.equal(after[name][2], x[2]) for name, x in memory.items())


def test_where_all_agree_nothing_changes() -> None:
    adapters = {name: x[:1].expand(N, *x.shape[1:]).clone() for name, x in drawn(5).items()}
    for name in ("q.B", "v.B"):
        adapters[name].zero_()  # as at the start: no rule may divide by a zero product
    for rule in ALL:
        after = played(changed(rule), begun(changed(rule), adapters), ring_and_more()).adapters
        for name, x in adapters.items():
            torch.testing.assert_close(after[name], x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("rule", WEIGHING)
def test_rounding_decides_nothing(rule: str) -> None:
    """Clients that agree on A, up to rounding, and differ in B: weights are as if they agreed on A to the bit."""
    adapters, weights = drawn(5), ring_and_more()
    for name in ("q.A", "v.A"):
        adapters[name] = adapters[name][:1].expand(N, -1, -1).clone()
    rounded = {name: x * (1 + 1e-9 * drawn(6)[name]) if name.endswith("A") else x for name, x in adapters.items()}
    used, other = (weighed(WEIGHING[rule](gossip()), each, weights)[0] for each in (adapters, rounded))
    torch.testing.assert_close(used, other, rtol=1e-6, atol=1e-6)


def test_keeping_all_changes_no_bit() -> None:
    weights = ring_and_more()
    shares = torch.ones(int((weights != 0).sum()), dtype=torch.float64)
    for form in (weights, weights.to_sparse()):
        assert torch.equal(keeping(form, torch.arange(N), shares).to_dense(), weights)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: robust.clipped(gossip(), hostile=0), "modifiers: clipped: hostile is 0; give 1 or more"),
        (lambda: robust.gt_pd(gossip(), radius=0.0), "modifiers: gt_pd: radius is 0.0; give a number above 0"),
        (lambda: robust.gt_pd(gossip(), trusted=1.5), "modifiers: gt_pd: trusted is 1.5; give a number from 0 to 1"),
        (
            lambda: robust.gt_pd(gossip(), untrusted_edges=-1.0),
            "untrusted_edges is -1.0; give a number from 0 to 1",
        ),
        (lambda: robust.balance(gossip(), gamma=0.0, rounds=1), "modifiers: balance: gamma is 0.0"),
        (lambda: robust.balance(gossip(), kappa=-1.0, rounds=1), "modifiers: balance: kappa is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Callable[[], Mixer], line: str) -> None:
    with pytest.raises(RecipeError, match=line):
        make()


def test_entry_by_entry_is_for_methods_that_mix_so() -> None:
    for mixer in (products(), corrected(1e-4)):
        assert not mixer.by_entry
        assert "mixing by entry" in robust.median(mixer).needs
    assert set(ALL) <= set(MODIFIERS)
