"""What may be mixed: payloads that would spoil a receiver are refused, and those of honest clients are not."""

from collections.abc import Callable

import pytest
import torch
from playing import BOTH, at_step
from torch import Tensor

from peertune.methods.adaptive import adaptive
from peertune.rounds import bounds
from peertune.rounds.bounds import FAR, NEAR, SHARE, Bound, Refusal
from peertune.types import Tensors, stacked

CLIENTS, RANK, SIZE = 5, 4, 32
BOUND = Bound({"q": (5.0, 2.0), "out.weight": (3.0, 1.0), "out.bias": (3.0, 1.0)})
LIAR = 2


def refused(bound: Bound, own: Tensors, heard: Tensors, receivers: Tensor, senders: Tensor) -> list[Refusal]:
    return bounds.refused(bound, stacked(own), stacked(heard), receivers, senders)


def apart(bound: Bound, own: Tensors, heard: Tensors, receivers: Tensor, senders: Tensor) -> list[Refusal]:
    return bounds.apart(bound, stacked(own), stacked(heard), receivers, senders)


def largest(bound: Bound, own: Tensors, heard: Tensors, receivers: Tensor, senders: Tensor) -> dict[str, float]:
    return bounds.largest(bound, stacked(own), stacked(heard), receivers, senders)


def honest(scale: float = 0.1) -> Tensors:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(CLIENTS, *shape, generator=draw)

    return {
        "q.A": normal(RANK, SIZE) / (3 * SIZE) ** 0.5,
        "q.B": scale * normal(SIZE, RANK),
        "out.weight.head": normal(3, SIZE),
        "out.bias.head": 0.01 * normal(3),
    }


def everybody() -> tuple[Tensor, Tensor]:
    pairs = torch.tensor([(i, j) for i in range(CLIENTS) for j in range(CLIENTS) if i != j])
    return pairs[:, 0], pairs[:, 1]


def by_whom(own: Tensors, heard: Tensors, bound: Bound = BOUND) -> set[tuple[int, int]]:
    return {(found.receiver, found.sender) for found in refused(bound, own, heard, *everybody())}


def of_the_liar() -> set[tuple[int, int]]:
    return {(i, LIAR) for i in range(CLIENTS) if i != LIAR}


def gauge(x: Tensors) -> None:
    """Other coordinates of the same product, with condition 1e8."""
    M = torch.diag(torch.tensor([1e4, 1e-4, 1.0, 1.0], dtype=torch.float64))
    x["q.B"][LIAR] = x["q.B"][LIAR] @ M
    x["q.A"][LIAR] = M.inverse() @ x["q.A"][LIAR]


LIES: dict[str, Callable[[Tensors], object]] = {
    "a huge A beside B = 0": lambda x: (x["q.A"][LIAR].mul_(1e30), x["q.B"][LIAR].zero_()),
    "a huge B beside A = 0": lambda x: (x["q.B"][LIAR].mul_(1e30), x["q.A"][LIAR].zero_()),
    "both, a thousand times": lambda x: (x["q.A"][LIAR].mul_(1e3), x["q.B"][LIAR].mul_(1e3)),
    "other coordinates": gauge,
    "values of 1e300": lambda x: x["q.A"][LIAR].fill_(1e300),
    "one value of 1e300": lambda x: x["q.B"][LIAR, 0, :1].fill_(1e300),
    "a value that is no number": lambda x: x["q.B"][LIAR, 0, :1].fill_(torch.nan),
    "infinity": lambda x: x["q.A"][LIAR, 0, :1].fill_(torch.inf),
    "a huge head": lambda x: x["out.weight.head"][LIAR].mul_(1e30),
    "a huge bias": lambda x: x["out.bias.head"][LIAR].fill_(1e6),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_would_spoil_a_receiver_is_refused_by_all_and_nothing_else_is(lie: str) -> None:
    own = {name: x.double() for name, x in honest().items()}
    heard = {name: x.clone() for name, x in own.items()}
    LIES[lie](heard)
    assert by_whom(own, heard) == of_the_liar()
    assert by_whom(own, own) == set()


@pytest.mark.parametrize("of", ["A", "B"])
def test_one_factor_by_itself_is_held_against_the_receivers_two(of: str) -> None:
    own = honest()
    heard = {f"q.{of}": own[f"q.{of}"].clone()}
    heard[f"q.{of}"][LIAR] *= 1e30  # whose square is none in float32
    assert by_whom(own, heard) == of_the_liar()
    assert by_whom(own, {f"q.{of}": own[f"q.{of}"]}) == set()


def test_at_the_start_where_every_product_is_zero_a_huge_factor_is_seen() -> None:
    own = honest(scale=0)
    for of in ("A", "B"):
        heard = {name: x.clone() for name, x in own.items()}
        heard[f"q.{of}"][LIAR] = 1e5
        assert by_whom(own, heard) == of_the_liar()
    assert by_whom(own, honest()) == set(), "one that begins late takes what the others have learnt"


def test_factors_within_their_own_bounds_are_refused_for_their_product_with_the_receivers() -> None:
    own = honest()
    own["q.A"] *= 50
    own["q.B"] *= 50  # of receivers, who have the right to large ones
    aligned = {name: x.clone() for name, x in own.items()}
    aligned["q.A"] *= FAR / 2
    aligned["q.B"] *= FAR / 2
    found = refused(BOUND, own, aligned, torch.tensor([0]), torch.tensor([0]))
    assert [one.why.split(" is ")[0] for one in found] == ["q: B_j A_j"]


def test_products_are_those_of_the_factors_themselves() -> None:
    own = honest(scale=10)
    heard = {name: 300 * x.flip(0) for name, x in own.items() if name == "q.A"}
    (found,) = refused(BOUND, own, heard, torch.tensor([1]), torch.tensor([0]))
    product, mixed = (
        2.0 * torch.linalg.matrix_norm(own["q.B"][1].double() @ x)
        for x in (own["q.A"][1].double(), heard["q.A"][0].double())
    )
    assert found.why == f"q: B_i A_j is {mixed:.3g}, and {FAR * product:.3g} is the most that is mixed here"


def test_what_is_just_as_much_as_the_bound_passes_and_what_is_more_does_not() -> None:
    own = {"q.A": torch.zeros(1, RANK, SIZE), "q.B": torch.zeros(1, SIZE, RANK)}
    own["q.A"][0, 0, 0] = own["q.B"][0, 0, 0] = 4.0
    for times, most in ((FAR, []), (FAR + 0.1, ["q.A is 400, and 400 is the most that is mixed here"])):
        heard = {"q.A": times * own["q.A"]}
        assert [one.why for one in refused(BOUND, own, heard, *torch.zeros(2, 1, dtype=torch.int64))] == most


@pytest.mark.parametrize(
    ("lie", "worst"),
    [
        (lambda x: x["q.B"][LIAR, 0, :1].fill_(torch.nan), "q.B is nan"),
        (lambda x: x["q.A"][LIAR, 0, :1].fill_(torch.inf), "q.A is inf"),
        (lambda x: (x["q.A"][LIAR].mul_(1e3), x["out.bias.head"][LIAR].fill_(900)), "q.A is 1.1"),  # ten, five times
        (lambda x: (x["q.A"][LIAR].mul_(1e3), x["out.bias.head"][LIAR].fill_(1e4)), "out.bias.head is 1.73e+04"),
    ],
)
def test_of_all_that_is_too_much_the_worst_is_told(lie: Callable[[Tensors], object], worst: str) -> None:
    own, heard = honest(), honest()
    lie(heard)
    assert {one.why[: len(worst)] for one in refused(BOUND, own, heard, *everybody())} == {worst}


def test_the_largest_are_told_by_kind_and_for_products_in_times_of_the_receivers_own_or_the_floor() -> None:
    own = {name: 0.01 * x.double() for name, x in honest().items()}
    norms = {name: torch.linalg.vector_norm(x.flatten(1), dim=1).tolist() for name, x in own.items()}
    A, B = own["q.A"], own["q.B"]
    mine, into, out_of, theirs = (float((B[i] @ A[j]).norm()) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)))
    low = Bound({"q": (1e-9, 2.0), "out.weight": (1e-9, 1.0), "out.bias": (10.0, 1.0)})
    pair = (torch.tensor([0]), torch.tensor([1]))
    one = largest(low, own, own, *pair)
    assert one == pytest.approx(
        {
            "A": norms["q.A"][1] / (RANK / 3) ** 0.5,
            "B": norms["q.B"][1] / norms["q.B"][0],
            "products": max(into, out_of, theirs) / mine,
            "head": max(norms["out.weight.head"][1] / norms["out.weight.head"][0], norms["out.bias.head"][1] / 10),
        }
    )
    other = largest(low, own, own, pair[1], pair[0])
    both = largest(low, own, own, torch.cat(pair), torch.cat(pair[::-1]))
    assert both == pytest.approx({of: max(times, other[of]) for of, times in one.items()})
    high = Bound({**BOUND.layers, "q": (1e3, 2.0)})
    assert largest(high, own, {"q.B": B}, *pair) == pytest.approx(
        {"B": norms["q.B"][1] / (3**0.5 * SHARE * 1e3 / 2), "products": 2 * out_of / (SHARE * 1e3)}
    )
    assert largest(low, own, own, *torch.zeros(2, 0, dtype=torch.int64)) == {}


def measured(own: Tensors, heard: Tensors, i: int, j: int) -> dict[str, tuple[float, float]]:
    """What is bounded of a pair, products formed, and what the receiver has of it."""
    norms = {name: (float(x[j].norm()), float(own[name][i].norm())) for name, x in heard.items()}
    mine, theirs = ({name: x[k] for name, x in of.items()} for of, k in ((own, i), (heard, j)))
    for names, left, right in (("ij", mine, theirs), ("ji", theirs, mine), ("jj", theirs, theirs)):
        if "q.B" in left and "q.A" in right:
            norms[names] = (float((left["q.B"] @ right["q.A"]).norm()), float((mine["q.B"] @ mine["q.A"]).norm()))
    return norms


@pytest.mark.parametrize("sent", [("q.A", "q.B"), ("q.A",), ("q.B",), ("q.A", "q.B", "out.weight.head")])
def test_what_passes_is_what_does_where_every_product_is_formed(sent: tuple[str, ...]) -> None:
    pairs = [(i, j) for i in range(CLIENTS) for j in range(CLIENTS) if i != j]
    draw, seen = torch.Generator().manual_seed(0), [0, 0]

    def scaled(least: float, most: float, *shape: int) -> Tensor:
        times = 10 ** (least + (most - least) * torch.rand(CLIENTS, 1, 1, generator=draw).double())
        return times * torch.randn(CLIENTS, *shape, generator=draw).double()

    for rank in [1, 2] * 6:
        shapes = {"out.weight.head": (2, 3), "q.A": (rank, 3), "q.B": (4, rank)}
        base, scaling = float(scaled(-1, 2, 1, 1)[0].abs()), float(scaled(-1, 1, 1, 1)[0].abs())
        own = {name: scaled(-2, 2, *shape) for name, shape in shapes.items()}
        heard = {name: scaled(-2, 3, *shapes[name]) for name in sent}
        floors = {"q.A": (rank / 3) ** 0.5, "q.B": 3**0.5 * SHARE * base / scaling, "out.weight.head": base}
        all_of = {pair: measured(own, heard, *pair) for pair in pairs}
        least = {
            pair: {what: max(mine, floors.get(what, SHARE * base / scaling)) for what, (_, mine) in of.items()}
            for pair, of in all_of.items()
        }
        bound = Bound({"out.weight": (base, 1.0), "q": (base, scaling)})
        far = {pair for pair, of in all_of.items() if any(x > FAR * least[pair][what] for what, (x, _) in of.items())}
        assert by_whom(own, heard, bound) == far
        near = set()
        for i, j in pairs:
            for what, (value, mine) in all_of[i, j].items():
                median = sorted([mine, *(of[what][0] for (to, _), of in all_of.items() if to == i)])[(CLIENTS - 1) // 2]
                near |= {(i, j)} if value > NEAR * max(least[i, j][what], median) else set()
        assert {one[:2] for one in apart(bound, own, heard, *everybody())} == near
        seen = [seen[0] + len(far), seen[1] + len(near)]
    assert 0 < min(seen) <= max(seen) < 12 * len(pairs)


@pytest.mark.parametrize(("voices", "out"), [(5, {4}), (4, {2, 3})])
def test_what_the_others_have_is_the_lower_median(voices: int, out: set[int]) -> None:
    own, heard = honest(), honest()
    for client, times in enumerate((1, 1, 40, 40, 2000)):
        heard["q.A"][client] = times * own["q.A"][0]
    senders = torch.arange(1, voices)
    found = apart(BOUND, own, heard, torch.zeros_like(senders), senders)
    assert {one.sender for one in found} == out


def test_what_the_others_do_not_have_is_left_out_and_what_they_have_is_not() -> None:
    own, heard = honest(), honest()
    heard["q.A"][LIAR] *= 2 * NEAR
    assert by_whom(own, heard) == set()
    found = apart(BOUND, own, heard, *everybody())
    assert {(one.receiver, one.sender) for one in found} == of_the_liar()
    heard["q.A"] = 2 * NEAR * honest()["q.A"]  # of everybody: who has far less is the one that is behind
    assert apart(BOUND, own, heard, *everybody()) == []


def test_of_two_voices_neither_is_the_one_to_go_by() -> None:
    own, heard = honest(), honest()
    heard["q.A"][LIAR] *= 2 * NEAR
    assert apart(BOUND, own, heard, torch.tensor([0, 1]), torch.tensor([LIAR, 0])) == []
    found = apart(BOUND, own, heard, torch.tensor([0, 0, 1]), torch.tensor([LIAR, 1, 0]))
    assert [(one.receiver, one.sender) for one in found] == [(0, LIAR)]


@pytest.mark.parametrize(
    ("signal", "value", "refuses"),
    [
        ("adaptive.probe", 1e30, True),
        ("adaptive.probe", torch.nan, True),
        ("adaptive.reports", -1e30, True),
        ("adaptive.reports", torch.inf, True),
        ("adaptive.reports", torch.nan, True),
        ("adaptive.reports", -1.0, False),
    ],
)
def test_signals_that_no_honest_client_holds_are_refused(signal: str, value: float, refuses: bool) -> None:
    schedule, message, _ = adaptive(8, first=5, clients=CLIENTS, seed=0)
    memory = schedule.init({}, at_step(CLIENTS))
    signals, _ = message.send({}, memory, at_step(CLIENTS), BOTH)
    lying = {name: x.clone() for name, x in signals.items()}
    lying[signal][LIAR].view(-1)[3] = value
    bound = Bound(BOUND.layers, message.sound)
    assert by_whom(honest(), honest() | signals, bound) == set()
    assert by_whom(honest(), honest() | lying, bound) == (of_the_liar() if refuses else set())
    heard = honest() | lying
    heard["q.A"][1] *= 1e30  # another's
    found = refused(bound, honest(), heard, *everybody())
    assert {(one.sender, one.why.partition(" is ")[0]) for one in found} == {
        (1, "q.A"),
        *([(LIAR, "what travels beside the adapters")] if refuses else []),
    }
    assert len(found) == len({one[:2] for one in found}) == (8 if refuses else 4)


def test_a_process_whose_clients_are_all_down_refuses_nobody() -> None:
    nobody = {name: x[:0] for name, x in honest().items()}
    pairs = torch.zeros(2, 0, dtype=torch.int64)
    assert not refused(BOUND, nobody, nobody, *pairs)
    assert not apart(BOUND, nobody, nobody, *pairs)
