"""What mixers make of clients whose ranks differ, against slow and obvious twins that form every product."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import BOTH
from torch import Tensor
from torch.nn.functional import pad

from peertune.errors import RecipeError
from peertune.method import At, Local, Memory, Mixer, Phase, standing
from peertune.methods import mixers
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.mixers import corrected, gossip, products
from peertune.methods.modifiers import divided, nested, zero_padded
from peertune.types import Tensors, take

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
some = settings(max_examples=15, derandomize=True)
seeds = st.integers(0, 2**31)
ranks_of_clients = st.lists(st.integers(1, 5), min_size=2, max_size=6)


def clients_of(seed: int, ranks: Sequence[int], d_in: int, d_out: int) -> Tensors:
    """Return pairs of these ranks, with zeros up to the largest."""
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(len(ranks), max(ranks), d_in, generator=draw, dtype=torch.float64)
    B = torch.randn(len(ranks), d_out, max(ranks), generator=draw, dtype=torch.float64)
    for i, r in enumerate(ranks):
        A[i, r:], B[i, :, r:] = 0, 0
    return {"site.A": A, "site.B": B}


def weights_of(seed: int, n: int) -> Tensor:
    """Rows that sum to 1, with zeros, a client's own among them where it hears two others; the last hears nobody."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, n, generator=draw, dtype=torch.float64).add(0.1)
    weights *= torch.rand(n, n, generator=draw) < 0.7
    weights.diagonal()[(weights != 0).sum(1) < 2] = 0.5
    weights[-1] = torch.eye(n)[-1]
    return weights / weights.sum(1, keepdim=True)


def received(
    mixer: Mixer, ranks: Sequence[int], pairs: Tensors, weights: Tensor, those: Sequence[int], near: Sequence[int]
) -> Tensors:
    """Return what clients of one rank get, who hear those that are near."""
    (r,), most = {ranks[i] for i in those}, max(ranks[j] for j in near)
    own = {"site.A": pairs["site.A"][those, :r], "site.B": pairs["site.B"][those, :, :r]}
    heard = {"site.A": pairs["site.A"][near, :most], "site.B": pairs["site.B"][near, :, :most]}
    at = standing(those, torch.zeros(len(those), dtype=torch.int64))
    at = at._replace(heard=torch.tensor(near), ranks=torch.tensor(ranks)[near])
    rows = weights.to_dense()[those][:, near]
    if weights.layout != torch.strided:
        rows = rows.to_sparse(layout=weights.layout)
    new, memory = mixer.receive(own, heard, rows, {}, at, BOTH)
    assert not memory
    assert all(new[name].shape == x.shape and new[name].dtype == x.dtype for name, x in own.items())
    return new


def mixed(mixer: Mixer, ranks: Sequence[int], pairs: Tensors, weights: Tensor) -> list[Tensors]:
    """Return what each client gets of all: a call for each rank."""
    everybody, found = range(len(ranks)), dict[int, Tensors]()
    for r in set(ranks):
        those = [i for i in everybody if ranks[i] == r]
        new = received(mixer, ranks, pairs, weights, those, everybody)
        found |= {i: take(new, slice(place, place + 1)) for place, i in enumerate(those)}
    return [found[i] for i in everybody]


def product(pair: Tensors) -> Tensor:
    return pair["site.B"].double() @ pair["site.A"].double()


def truncated(matrix: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = U[..., :r] * S[..., None, :r] @ Vh[..., :r, :]
    return best


Twin = Callable[[Sequence[int], Tensor, Tensor, int], Tensor]


def truncation(ranks: Sequence[int], X: Tensor, weights: Tensor, i: int) -> Tensor:
    return truncated(torch.einsum("j,jab->ab", weights[i], X), ranks[i])


def differences(step: float) -> Twin:
    def twin(ranks: Sequence[int], X: Tensor, weights: Tensor, i: int) -> Tensor:
        moved = X[i].clone()
        for j, r in enumerate(ranks):
            low = min(r, ranks[i])
            moved += (1 if r == ranks[i] else step) * weights[i, j] * (truncated(X[j], low) - truncated(X[i], low))
        return truncated(moved, ranks[i])

    return twin


MIXERS: dict[str, tuple[Mixer, Twin]] = {
    "common_rank": (products(), differences(0.3)),
    "common_rank, step 1": (products(step=1.0), differences(1.0)),
    "truncate": (products("truncate"), truncation),
}
every_mixer = pytest.mark.parametrize(("mixer", "twin"), MIXERS.values(), ids=MIXERS)


@every_mixer
@some
@given(seeds, ranks_of_clients, st.integers(3, 12), st.integers(3, 12))
def test_products_of_unequal_ranks_are_what_whole_svds_make_of_them(
    mixer: Mixer, twin: Twin, seed: int, ranks: list[int], d_in: int, d_out: int
) -> None:
    ranks = [min(r, d_in, d_out) for r in ranks]
    heard, weights = clients_of(seed, ranks, d_in, d_out), weights_of(seed, len(ranks))
    X = product(heard)
    stored_zeros = torch.sparse_coo_tensor(
        torch.ones_like(weights).nonzero().T, weights.flatten(), weights.shape, is_coalesced=True, check_invariants=True
    )
    for form in (weights, weights.to_sparse(), weights.to_sparse_csr(), stored_zeros):
        for i, pair in enumerate(mixed(mixer, ranks, heard, form)):
            expected = twin(ranks, X, weights, i)
            torch.testing.assert_close(product(pair)[0], expected, rtol=1e-8, atol=1e-8)


@every_mixer
def test_float32_adapters_show_no_rounding_but_the_last(mixer: Mixer, twin: Twin) -> None:
    ranks, d = [4, 8, 16, 4, 8, 16], 200
    heard = {name: x.float() for name, x in clients_of(0, ranks, d, d // 2).items()}
    weights = weights_of(1, len(ranks))
    for i, pair in enumerate(mixed(mixer, ranks, heard, weights)):
        expected = twin(ranks, product(heard), weights, i)
        assert (product(pair)[0] - expected).norm() < 3e-7 * expected.norm()


@every_mixer
@some
@given(seeds, ranks_of_clients)
def test_a_receiver_gets_alone_what_it_gets_among_others(mixer: Mixer, twin: Twin, seed: int, ranks: list[int]) -> None:
    heard, weights = clients_of(seed, ranks, 40, 9), weights_of(seed, len(ranks))
    for i, expected in enumerate(mixed(mixer, ranks, heard, weights)):
        near = sorted({i, *weights[i].nonzero()[:, 0].tolist()})
        for who in (range(len(ranks)), near):
            for name, x in received(mixer, ranks, heard, weights, [i], who).items():
                torch.testing.assert_close(x, expected[name], rtol=1e-7, atol=1e-7)


@every_mixer
def test_a_receiver_that_heard_only_itself_keeps_its_pair_bit_for_bit(mixer: Mixer, twin: Twin) -> None:
    ranks = [2, 3, 3]
    heard = clients_of(0, ranks, 8, 6)
    pairs = mixed(mixer, ranks, heard, torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).double())
    assert torch.equal(pairs[2]["site.A"][0], heard["site.A"][2])
    assert torch.equal(pairs[2]["site.B"][0], heard["site.B"][2])
    assert not torch.equal(pairs[1]["site.B"][0], heard["site.B"][1])


@every_mixer
def test_products_of_nothing_yet_stay_nothing_and_every_direction_alive(mixer: Mixer, twin: Twin) -> None:
    ranks = [1, 2, 4]
    heard = clients_of(0, ranks, 8, 6)
    heard["site.B"].zero_()
    for pair, r in zip(mixed(mixer, ranks, heard, torch.full((3, 3), 1 / 3).double()), ranks, strict=True):
        assert not pair["site.B"].any()
        torch.testing.assert_close(3 * (pair["site.A"] @ pair["site.A"].mT)[0], torch.eye(r, dtype=torch.float64))


@every_mixer
def test_a_rank_above_a_sites_width_is_mixed_all_the_same(mixer: Mixer, twin: Twin) -> None:
    ranks = [2, 5, 5]
    heard, weights = clients_of(0, ranks, 9, 3), torch.full((3, 3), 1 / 3, dtype=torch.float64)
    for i, pair in enumerate(mixed(mixer, ranks, heard, weights)):
        torch.testing.assert_close(product(pair)[0], twin(ranks, product(heard), weights, i), rtol=1e-8, atol=1e-8)


@some
@given(seeds, st.integers(1, 4))
def test_equal_ranks_are_averaged_as_ever(seed: int, r: int) -> None:
    heard, weights = clients_of(seed, [r] * 4, 12, 9), weights_of(seed, 4)
    at = standing(range(4), torch.zeros(4, dtype=torch.int64))._replace(heard=torch.arange(4))
    plain, _ = products("truncate").receive(heard, heard, weights, {}, at, BOTH)
    same, _ = products(step=0.1).receive(heard, heard, weights, {}, at, BOTH)
    told, _ = products(step=0.1).receive(heard, heard, weights, {}, at._replace(ranks=torch.tensor([r] * 4)), BOTH)
    for name, x in plain.items():
        assert torch.equal(same[name], x)
        torch.testing.assert_close(told[name], x, rtol=1e-7, atol=1e-7)


@some
@given(seeds, st.sampled_from([0.1, 0.3, 1.0]))
def test_the_mean_of_products_stays_where_truncations_take_nothing_away(seed: int, step: float) -> None:
    ranks, n = [2, 3, 3, 5], 4
    heard = clients_of(seed, [2] * n, 12, 9)  # of rank 2, in one space of two dimensions, in factors of other ranks
    heard["site.A"][1:] = heard["site.A"][:1]
    padded = clients_of(seed, ranks, 12, 9)
    padded["site.A"][:, :2], padded["site.B"][..., :2], padded["site.B"][..., 2:] = *heard.values(), 0
    draw = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / n
    weights = (draw + draw.T) / 2
    weights += torch.diag(1 - weights.sum(1))
    after = torch.cat([product(pair) for pair in mixed(products(step=step), ranks, padded, weights)])
    torch.testing.assert_close(after.mean(0), product(padded).mean(0), rtol=1e-9, atol=1e-9)
    assert (after - after.mean(0)).norm() < (product(padded) - product(padded).mean(0)).norm()


def test_what_only_high_ranks_know_stays_and_fades_with_averages() -> None:
    ranks, weights = [2, 2, 4, 4], torch.full((4, 4), 0.25, dtype=torch.float64)
    common = clients_of(0, [4], 12, 9)
    left = {}
    for unequal in ("common_rank", "truncate"):
        U, S, Vh = torch.linalg.svd(product(common)[0])
        heard = clients_of(0, ranks, 12, 9)
        heard["site.A"][:], heard["site.B"][:] = Vh[:4], U[:, :4] * S[:4]
        heard["site.A"][:2, 2:], heard["site.B"][:2, :, 2:] = 0, 0
        for _ in range(20):
            for i, pair in enumerate(mixed(products(unequal), ranks, heard, weights)):
                heard["site.A"][i, : ranks[i]], heard["site.B"][i, :, : ranks[i]] = pair["site.A"], pair["site.B"]
        beyond = torch.linalg.svdvals(product(heard)[3])[2:].norm()
        left[unequal] = float(beyond / S[2:].norm())
    assert left["common_rank"] > 0.999
    assert left["truncate"] < 1e-3


def test_zeros_beyond_the_largest_rank_that_is_heard_change_nothing() -> None:
    ranks, weights = [2, 3, 3], torch.full((3, 3), 1 / 3, dtype=torch.float64)
    heard = clients_of(0, ranks, 8, 6)
    wider = {"site.A": pad(heard["site.A"], (0, 0, 0, 2)), "site.B": pad(heard["site.B"], (0, 2))}
    own = {"site.A": heard["site.A"][:1, :2], "site.B": heard["site.B"][:1, :, :2]}
    at = standing([0], torch.zeros(1, dtype=torch.int64))._replace(heard=torch.arange(3), ranks=torch.tensor(ranks))
    one, same = (products().receive(own, told, weights[:1], {}, at, BOTH)[0] for told in (heard, wider))
    assert all(torch.equal(same[name], x) for name, x in one.items())


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [2, 3, 3, 3, 2, 3, 3]
    heard, weights = clients_of(0, ranks, 6, 5), weights_of(0, 7)
    whole = mixed(products(), ranks, heard, weights)
    monkeypatch.setattr(mixers, "_CHUNK_FLOATS", 2 * 7 * (3 * 6 + 5 * 3))
    for few, pair in zip(mixed(products(), ranks, heard, weights), whole, strict=True):
        for name, x in pair.items():
            torch.testing.assert_close(few[name], x, rtol=1e-12, atol=1e-12)


# zero_padded


@some
@given(seeds, ranks_of_clients, st.sampled_from(["graph", "norms"]))
def test_zero_padded_factors_are_averaged_with_their_zeros(seed: int, ranks: list[int], by: str) -> None:
    heard, weights = clients_of(seed, ranks, 7, 6), weights_of(seed, len(ranks))
    mixer = zero_padded(gossip(), weights=by)  # type: ignore[arg-type]
    for form in (weights, weights.to_sparse(), weights.to_sparse_csr()):
        for i, pair in enumerate(mixed(mixer, ranks, heard, form)):
            row = weights[i]
            if by == "norms":
                row = row * product(heard).flatten(1).norm(dim=1)
                row = row / row.sum()
            r = ranks[i]
            expected = {name: torch.einsum("j,jab->ab", row, x) for name, x in heard.items()}
            torch.testing.assert_close(pair["site.A"][0], expected["site.A"][:r], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(pair["site.B"][0], expected["site.B"][:, :r], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("by", ["graph", "norms"])
def test_zero_padded_keeps_what_hears_nobody_and_what_has_ranks_alike(by: str) -> None:
    for base in (gossip(), corrected(0.1)):
        mixer = zero_padded(base, weights=by)  # type: ignore[arg-type]
        heard = clients_of(0, [2, 3, 3], 7, 6)
        weights = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
        alone = mixed(mixer, [2, 3, 3], heard, weights)[2]
        assert all(torch.equal(alone[name][0], x[2]) for name, x in heard.items())
        at = standing(range(3), torch.zeros(3, dtype=torch.int64))._replace(heard=torch.arange(3))
        same, plain = (one.receive(heard, heard, weights, {}, at, BOTH)[0] for one in (mixer, base))
        assert all(torch.equal(same[name], x) for name, x in plain.items())


def test_norms_of_nothing_yet_leave_the_graphs_weights() -> None:
    heard, weights = clients_of(0, [2, 3, 3], 7, 6), weights_of(0, 3)
    heard["site.B"].zero_()
    by_graph, by_norms = (
        mixed(zero_padded(gossip(), weights=by), [2, 3, 3], heard, weights) for by in ("graph", "norms")
    )
    for one, other in zip(by_graph, by_norms, strict=True):
        assert all(torch.equal(other[name], x) for name, x in one.items())


def test_zero_padded_mixes_one_factor_and_leaves_heads_and_the_other() -> None:
    heard = clients_of(0, [2, 3], 7, 6)
    at = standing([0], torch.zeros(1, dtype=torch.int64))._replace(heard=torch.arange(2), ranks=torch.tensor([2, 3]))
    own = {"site.A": heard["site.A"][:1, :2], "site.B": heard["site.B"][:1, :, :2], "out.head": torch.ones(1, 4)}
    told = {"site.B": heard["site.B"], "out.head": torch.tensor([[1.0], [3.0]]).expand(2, 4)}
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    phase = Phase(frozenset("B"), frozenset({"B", "head"}))
    new, _ = zero_padded(gossip()).receive(own, told, half, {}, at, phase)
    assert new["site.A"] is own["site.A"]
    torch.testing.assert_close(new["site.B"][0], heard["site.B"][:, :, :2].mean(0))
    assert new["out.head"].tolist() == [[2.0] * 4]


def test_what_is_padded_is_received_as_of_equal_ranks() -> None:
    seen = []

    def receive(own: Tensors, heard: Tensors, shares: Tensor, memory: Memory, at: At, phase: Phase) -> Any:
        seen.append((at.ranks, heard["site.A"].shape, heard["site.B"].shape))
        return own, {}

    heard = clients_of(0, [2, 3], 7, 6)
    mixed(zero_padded(gossip()._replace(receive=receive)), [2, 3], heard, torch.eye(2))
    assert seen == [(None, (2, 2, 7), (2, 6, 2)), (None, (2, 3, 7), (2, 6, 3))]


def test_products_are_not_padded() -> None:
    with pytest.raises(RecipeError, match=r"^modifiers: zero_padded: .* choose another than decaf$"):
        zero_padded(ALGORITHMS["decaf"]().mixer)
    assert zero_padded(gossip(), weights="norms").needs == {"both factors", "ranks that differ"}


# nested, divided


def test_a_prefix_trains_as_an_adapter_of_that_rank_would_and_nothing_beyond() -> None:
    clients, r, d = 6, 5, 4
    draw = torch.Generator().manual_seed(0)
    adapters = {
        "q.A": torch.randn(clients, r, d, generator=draw, dtype=torch.float64),
        "q.B": torch.randn(clients, 3, r, generator=draw, dtype=torch.float64),
        "out.head": torch.randn(clients, 2, generator=draw, dtype=torch.float64),
    }
    wanted = torch.randn(clients, 3, d, generator=draw, dtype=torch.float64)

    def gradient(of: Tensors, weights: Tensor | None = None) -> Tensors:
        """Of half the squared distance of B A from what is wanted, and of the head from 0."""
        apart = of["q.B"] @ of["q.A"] - wanted
        return {"q.A": of["q.B"].mT @ apart, "q.B": apart @ of["q.A"].mT, "out.head": of["out.head"]}

    local, lengths = nested(Local(), seed=3), set()
    for step in range(20):
        at = standing(range(clients), torch.full((clients,), step))
        found, _ = local.gradients(gradient, adapters, {}, {}, at, BOTH)  # type: ignore[arg-type]
        again, _ = local.gradients(gradient, adapters, {}, {}, at, BOTH)  # type: ignore[arg-type]
        for client in range(clients):
            p = int((found["q.A"][client] != 0).any(1).sum())
            lengths.add(p)
            cut = {"q.A": adapters["q.A"][client, :p], "q.B": adapters["q.B"][client, :, :p]}
            apart = cut["q.B"] @ cut["q.A"] - wanted[client]
            torch.testing.assert_close(found["q.A"][client, :p], cut["q.B"].mT @ apart)
            torch.testing.assert_close(found["q.B"][client, :, :p], apart @ cut["q.A"].mT)
            assert not found["q.A"][client, p:].any()
            assert not found["q.B"][client, :, p:].any()
        assert torch.equal(found["out.head"], adapters["out.head"])
        assert all(torch.equal(x, again[name]) for name, x in found.items()), "a step draws the same each time"
    assert lengths == {1, 2, 3, 4, 5}


def test_divided_is_of_slices_alone() -> None:
    assert divided(gossip()).lacking == "all"
    for whole in (ALGORITHMS["decaf"]().mixer, zero_padded(gossip())):
        with pytest.raises(RecipeError, match=r"^modifiers: divided: is for methods that mix rank slices"):
            divided(whole)


def test_what_a_receiver_does_not_mix_need_not_be_what_can_be_decomposed() -> None:
    ranks, weights = [1, 2, 3], torch.eye(3, dtype=torch.float64)
    weights[0, :2] = 0.5
    pairs = clients_of(0, ranks, 6, 5)
    far = {name: x.clone() for name, x in pairs.items()}
    for x in far.values():
        x[2] *= 1e200  # whose product overflows
    expected, found = (received(products(), ranks, those, weights, [0], range(3)) for those in (pairs, far))
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-9)
