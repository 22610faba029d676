"""What hostile clients send and hold, beside honest ones that play the same rounds."""

from collections.abc import Callable

import pytest
import torch
from playing import begun, played, played_alone, played_and_sent
from torch import Tensor

from peertune.errors import RecipeError
from peertune.method import Algorithm, Message, Mixer, Phase, standing
from peertune.methods.attacks import ATTACKS, Attack, Planned, attacked
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.modifiers import mix_moments
from peertune.methods.push_sum import pushed
from peertune.methods.robust import clipped, krum, trimmed_mean
from peertune.methods.smaller import half, int8, shared_mask
from peertune.types import State, Tensors, kind, select, take

CLIENTS, LIAR = 5, 1
RING = torch.eye(5, dtype=torch.float64) / 3 + sum(torch.eye(5, dtype=torch.float64).roll(s, 0) / 3 for s in (1, -1))
LIES = ["gauge", "noise", "scale", "sign_flip"]


def adapters(dtype: torch.dtype = torch.float64) -> Tensors:
    draw = torch.Generator().manual_seed(3)
    shapes = {"q.A": (3, 8), "q.B": (6, 3), "v.A": (3, 8), "v.B": (5, 3), "out.head": (2, 4)}
    return {name: torch.randn(CLIENTS, *x, generator=draw, dtype=dtype) for name, x in shapes.items()}


def hostile(algorithm: Algorithm, name: str, *clients: int, first: int = 0, last: float = 1e9) -> Algorithm:
    return attacked(algorithm, [Planned(ATTACKS[name](), clients or (LIAR,), first, last)])


def said(attack: Attack, sent: str = "A B head", round: int = 0, *liars: int) -> Tensors:
    """What these clients, or the one, say that they have."""
    kinds = frozenset(sent.split())
    at = standing(range(CLIENTS), torch.full((CLIENTS,), round))
    assert attack.pretend is not None
    return attack.pretend(adapters(), torch.tensor(liars or (LIAR,)), {}, at, Phase(kinds, kinds))


def own(name: str) -> Tensor:
    return adapters()[name][LIAR : LIAR + 1]


def product(tensors: Tensors, site: str = "q") -> Tensor:
    return tensors[f"{site}.B"] @ tensors[f"{site}.A"]


def test_a_flipped_sign_is_that_of_the_product_and_of_the_head() -> None:
    lie = said(ATTACKS["sign_flip"]())
    assert torch.equal(product({"q.A": own("q.A")} | lie), -product(adapters())[LIAR : LIAR + 1])
    assert torch.equal(lie["out.head"], -own("out.head"))
    assert lie.keys() == {"q.B", "v.B", "out.head"}
    assert torch.equal(said(ATTACKS["sign_flip"](factor=3.0))["q.B"], -3 * own("q.B"))
    assert torch.equal(said(ATTACKS["scale"]())["q.B"], 10 * own("q.B"))


def test_where_one_factor_travels_its_sign_is_flipped() -> None:
    for sent in ("A", "B"):
        lie = said(ATTACKS["sign_flip"](), f"{sent} head")
        assert {kind(name) for name in lie} == {sent, "head"}
        assert torch.equal(lie[f"q.{sent}"], -own(f"q.{sent}"))


@pytest.mark.parametrize("condition", [1.0, 50.0])
def test_a_gauge_leaves_products_as_they_are_and_factors_are_far_away(condition: float) -> None:
    lie = said(ATTACKS["gauge"](condition=condition))
    for site in "qv":
        torch.testing.assert_close(product(lie, site)[0], product(adapters(), site)[LIAR], rtol=0, atol=1e-12)
        for of in "AB":
            name = f"{site}.{of}"
            assert (lie[name] - own(name)).norm() > own(name).norm() / 2
            if condition == 1:
                torch.testing.assert_close(lie[name].norm(), own(name).norm())
    both, apart = said(ATTACKS["gauge"](), "A B", 7, 1, 3), said(ATTACKS["gauge"](), "A B", 2, 3)
    assert torch.equal(both["q.A"][1:], apart["q.A"]), "M stays, whoever else attacks"
    assert not said(ATTACKS["gauge"](), "B head")


def test_a_gauge_s_condition_is_what_its_name_says() -> None:
    lie = said(ATTACKS["gauge"](condition=100.0))
    M = torch.linalg.lstsq(own("q.B")[0], lie["q.B"][0]).solution
    assert torch.linalg.cond(M).item() == pytest.approx(100)
    assert torch.linalg.det(M).abs().item() == pytest.approx(1)


def test_averages_with_an_adapter_in_other_coordinates_are_not_what_both_agree_on() -> None:
    lie = said(ATTACKS["gauge"]())
    mean = {name: (own(name) + lie[name]) / 2 for name in lie}
    honest = product(adapters())[LIAR]
    assert (product(mean)[0] - honest).norm() > honest.norm() / 3


def test_noise_is_in_proportion_to_what_it_is_added_to_and_drawn_by_client_and_round() -> None:
    large = {"q.A": torch.ones(CLIENTS, 50, 60), "q.B": torch.zeros(CLIENTS, 70, 50)}
    at = standing(range(CLIENTS), torch.tensor([4, 4, 4, 4, 9]))
    phase = ALGORITHMS["dec_lora"]().phase(0)

    def lie(*liars: int, **settings: float) -> Tensors:
        pretend = ATTACKS["noise"](**settings).pretend
        assert pretend is not None
        return pretend(large, torch.tensor(liars), {}, at, phase)

    added = lie(1, 3, scale=2.0)["q.A"] - large["q.A"][:2]
    assert added.flatten(1).norm(dim=1) / large["q.A"][0].norm() == pytest.approx(torch.tensor([2.0, 2.0]), rel=0.05)
    assert torch.equal(lie(3)["q.A"], lie(1, 3)["q.A"][1:])
    assert not torch.equal(lie(1)["q.A"], lie(3)["q.A"])
    assert not torch.equal(lie(3)["q.A"], lie(4)["q.A"])
    assert not torch.equal(lie(3)["q.A"], lie(3, seed=1)["q.A"])
    assert not lie(1)["q.B"].any()


METHODS: dict[str, Callable[[], Algorithm]] = {
    **{name: make for name, make in ALGORITHMS.items() if name not in ("adf_lora", "local", "tad_lora")},
    "adaptive": lambda: ALGORITHMS["tad_lora"](switch_every="adaptive", window_rounds=4, clients=CLIENTS, seed=1),
    "half": lambda: _sending(ALGORITHMS["decaf"](), half),
    "int8": lambda: _sending(ALGORITHMS["dec_lora"](), int8),
    "shared_mask": lambda: _sending(ALGORITHMS["dec_lora"](), shared_mask),
    "mix_moments": lambda: mix_moments(ALGORITHMS["dec_lora"]()),
    "clipped": lambda: _mixing(ALGORITHMS["dec_lora"](), clipped),
    "krum": lambda: _mixing(ALGORITHMS["tad_lora"](switch_every=2), krum),
    "trimmed_mean": lambda: _mixing(ALGORITHMS["dec_lora"](), trimmed_mean),
    "push_sum": lambda: pushed(ALGORITHMS["dec_lora"](), CLIENTS),
}


def _sending(algorithm: Algorithm, change: Callable[[Message], Message]) -> Algorithm:
    return algorithm._replace(message=change(algorithm.message))


def _mixing(algorithm: Algorithm, change: Callable[[Mixer], Mixer]) -> Algorithm:
    return algorithm._replace(mixer=change(algorithm.mixer))


def parts(state: State, client: int) -> Tensors:
    """All that a client holds and remembers."""
    return take(state.adapters | state.known, slice(client, client + 1))


def assert_close(left: Tensors, right: Tensors, tolerance: float = 1e-12) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_a_liar_stays_honest_inside_and_all_others_mix_its_lie(method: str) -> None:
    honest = METHODS[method]()
    lying = hostile(honest, "sign_flip")
    before = begun(honest, adapters())
    there, told = played_and_sent(honest, before, RING, steps=2)
    here, sent = played_and_sent(lying, before, RING, steps=2)
    assert_close(parts(here, LIAR), parts(there, LIAR))
    lies = {name for name in sent if not torch.equal(sent[name], told[name])}
    assert lies
    assert all(torch.equal(sent[name][k], told[name][k]) for name in lies for k in range(CLIENTS) if k != LIAR)
    for client in range(CLIENTS):
        if client != LIAR:  # whose method is the honest one
            alone = played_alone(honest, before, RING, client, sent, steps=2)
            assert_close(parts(here, client), take(alone.adapters | alone.known, slice(0, 1)))
    assert all(torch.equal(x[3], there.adapters[name][3]) for name, x in here.adapters.items()), "who hears no lie"
    assert any(not torch.equal(x[2], there.adapters[name][2]) for name, x in here.adapters.items())


@pytest.mark.parametrize("method", ["adaptive", "decaf", "half", "int8", "push_sum", "rolora"])
@pytest.mark.parametrize("attack", ["noise", "sign_flip"])
def test_two_liars_hear_each_other_s_lies_and_a_peer_comes_to_what_the_simulator_does(method: str, attack: str) -> None:
    algorithm = hostile(METHODS[method](), attack, 1, 2)
    state = begun(algorithm, adapters())
    for _ in range(2):
        after, sent = played_and_sent(algorithm, state, RING, steps=1)
        for client in range(CLIENTS):
            alone = played_alone(algorithm, state, RING, client, sent, steps=1)
            assert_close(parts(after, client), parts(alone, 0))
        state = after
    honest = METHODS[method]()
    one = played_alone(honest, state, RING, 1, played_and_sent(honest, state, RING)[1])
    other = played_alone(algorithm, state, RING, 1, played_and_sent(algorithm, state, RING)[1])
    assert any(not torch.equal(x, other.adapters[name]) for name, x in one.adapters.items()), "it is lied to"


@pytest.mark.parametrize("attack", [*LIES, "free_rider"])
def test_an_attack_acts_in_its_rounds_and_in_no_others(attack: str) -> None:
    honest = ALGORITHMS["dec_lora"]()
    lying = hostile(honest, attack, first=1, last=2)
    state = begun(honest, adapters())
    for t in range(4):
        there, told = played_and_sent(honest, state, RING, steps=1)
        here, sent = played_and_sent(lying, state, RING, steps=1)
        same = all(torch.equal(sent[name], told[name]) for name in sent)
        assert same == (t not in (1, 2))
        if same:
            assert_close(here.adapters | here.known, there.adapters | there.known, 0)
        state = here


def test_a_free_rider_sends_and_holds_what_was_mixed() -> None:
    lying = hostile(ALGORITHMS["dec_lora"](), "free_rider", 1, 4)
    before = begun(lying, adapters())
    after, sent = played_and_sent(lying, before, RING, steps=2)
    untrained = played(ALGORITHMS["dec_lora"](), before, torch.eye(CLIENTS, dtype=torch.float64))
    for name, x in before.adapters.items():
        assert torch.equal(sent[name][[1, 4]], x[[1, 4]])
        assert not torch.equal(sent[name][0], x[0])
        torch.testing.assert_close(after.adapters[name][1], (RING[1] @ sent[name].flatten(1)).view(x.shape[1:]))
    assert_close(untrained.adapters, before.adapters, 0)


def test_two_attacks_of_one_client_on_two_things_go_together() -> None:
    plan = [Planned(ATTACKS["free_rider"](), (LIAR,)), Planned(ATTACKS["sign_flip"](), (LIAR,))]
    both = attacked(ALGORITHMS["dec_lora"](), plan)
    before = begun(both, adapters())
    _, sent = played_and_sent(both, before, RING, steps=2)
    assert torch.equal(sent["q.B"][LIAR], -before.adapters["q.B"][LIAR])
    assert torch.equal(sent["q.A"][LIAR], before.adapters["q.A"][LIAR])


def test_without_attacks_a_method_is_what_it_was() -> None:
    honest = ALGORITHMS["dec_lora"]()
    assert attacked(honest, []) is honest


def test_lies_keep_their_type() -> None:
    for attack in LIES:
        lying = hostile(ALGORITHMS["dec_lora"](), attack)
        state = begun(lying, adapters(torch.float32))
        _, sent = played_and_sent(lying, state, RING)
        assert {x.dtype for x in select(sent, "AB").values()} == {torch.float32}


def knowing(name: str, **settings: object) -> Attack:
    """An attack of clients 1 and 3, who know what all have."""
    given = {"hostile": [1, 3]} | ({"slowest": lambda: SLOWEST.numpy()} if name == "spectral" else {})
    return ATTACKS[name](**given, **settings)


SLOWEST = torch.linalg.qr(torch.stack([torch.ones(5), torch.arange(5.0)], 1).double())[0][:, 1]
HONEST = [0, 2, 4]


def test_who_knows_the_others_sends_what_lies_beside_their_mean() -> None:
    lie = said(knowing("alie", z=2.0), "A B", 0, 1, 3)
    for name, x in lie.items():
        honest = adapters()[name][HONEST]
        mean = honest.sum(0) / 3
        expected = mean - 2 * ((honest - mean) ** 2).mean(0).sqrt()
        torch.testing.assert_close(x, expected.expand(2, *expected.shape))
    assert lie.keys() == {"q.A", "q.B", "v.A", "v.B"}


def test_who_knows_the_others_takes_back_what_they_learnt() -> None:
    plan = [Planned(knowing("ipm", epsilon=0.5), (1, 3))]
    for name in ("dec_lora", "rolora"):
        algorithm = attacked(ALGORITHMS[name](), plan)
        state = begun(algorithm, adapters())
        for _ in range(3):
            after, sent = played_and_sent(algorithm, state, RING, steps=2)
            for key, x in sent.items():
                start = state.adapters[key][HONEST].mean(0)
                torch.testing.assert_close(x[1], start - 0.5 * (x[HONEST].mean(0) - start))
                assert torch.equal(x[1], x[3])
            state = after


def test_who_knows_the_others_draws_its_side_of_the_graph_apart() -> None:
    lie = said(knowing("spectral", scale=3.0), "A B", 0, 1, 3)
    for name, x in lie.items():
        along = sum(u * own for u, own in zip(SLOWEST, adapters()[name], strict=True))
        sides = [float(torch.sign(SLOWEST[k])) for k in (1, 3)]
        assert sides[0] == -sides[1]
        for row, side in zip(x, sides, strict=True):
            torch.testing.assert_close(row, adapters()[name][HONEST].mean(0) + 3 * side * along)


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("sign_flip", {"factor": 0.0}, "sign_flip: factor is 0.0, give a number above 0"),
        ("scale", {"factor": 1.0}, "scale: factor is 1.0, give another number above 0 than 1"),
        ("noise", {"scale": -1.0}, "noise: scale is -1.0, give a number above 0"),
        ("gauge", {"condition": 0.5}, "gauge: condition is 0.5, give a number from 1 on"),
        ("alie", {"hostile": [], "z": 0.0}, "alie: z is 0.0, give another number than 0"),
        ("ipm", {"hostile": [], "epsilon": 0.0}, "ipm: epsilon is 0.0, give a number above 0"),
        ("spectral", {"hostile": [], "slowest": list, "scale": 0.0}, "spectral: scale is 0.0, give a number above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, settings: dict[str, float], why: str) -> None:
    with pytest.raises(RecipeError, match=f"attacks: {why}"):
        ATTACKS[name](**settings)
