"""What local steps follow and what becomes of the trained pair, against slow and obvious twins."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import BOTH, Quadratic, at_step, begun, every_kind
from torch import Tensor

from peertune.errors import RecipeError
from peertune.method import standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.locals import by_steps, turned_back
from peertune.rounds.training import adamw
from peertune.types import Tensors

some = settings(max_examples=15, derandomize=True)
seeds = st.integers(0, 2**31)
A_ROUND, B_ROUND = 1, 2
either_round = pytest.mark.parametrize("round", [A_ROUND, B_ROUND], ids=["A round", "B round"])
Strength = float | Literal["hard"]


def pairs(seed: int, K: int = 2, r: int = 3, d_in: int = 8, d_out: int = 6) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "site.A": torch.randn(K, r, d_in, generator=generator, dtype=torch.float64),
        "site.B": torch.randn(K, d_out, r, generator=generator, dtype=torch.float64),
    }


def turned(start: Tensors, trained: Tensors, strength: Strength, round: int) -> Tensors:
    """Return the trained pairs after the round's last step."""
    K = len(start["site.A"])
    at = standing(range(K), torch.full((K,), round))
    moved, memory = turned_back(strength).end(start, trained, {}, at, BOTH)
    assert not memory
    return moved


def rotation(seed: int, r: int) -> Tensor:
    skew = torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found: Tensor = torch.linalg.matrix_exp(skew - skew.T)
    return found


@either_round
@some
@given(seeds, st.integers(1, 4), st.floats(0, 1) | st.just("hard"))
def test_a_turn_keeps_the_product_and_the_lengths(round: int, seed: int, r: int, strength: Strength) -> None:
    start, trained = pairs(seed, r=r), pairs(seed + 1, r=r)
    after = turned(start, trained, strength, round)
    torch.testing.assert_close(
        after["site.B"] @ after["site.A"], trained["site.B"] @ trained["site.A"], rtol=1e-10, atol=1e-10
    )
    R = torch.linalg.lstsq(trained["site.A"].mT, after["site.A"].mT).solution.mT
    torch.testing.assert_close(R @ R.mT, torch.eye(r, dtype=torch.float64).expand(2, -1, -1), rtol=0, atol=1e-9)
    if strength != "hard":
        torch.testing.assert_close(torch.linalg.det(R), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(("round", "name"), [(A_ROUND, "site.A"), (B_ROUND, "site.B")])
@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0, "hard"])
@some
@given(seeds, st.integers(2, 4))
def test_odd_rounds_bring_a_nearer_to_the_rounds_start_and_even_ones_b(
    round: int, name: str, strength: Strength, seed: int, r: int
) -> None:
    start, trained = pairs(seed, r=r), pairs(seed + 1, r=r)
    after = turned(start, trained, strength, round)
    apart = [(x[name] - start[name]).flatten(1).norm(dim=1) for x in (after, trained)]
    assert (apart[0] < apart[1]).all()


@either_round
@some
@given(seeds, st.integers(2, 4))
def test_a_whole_turn_undoes_a_rotation_and_a_hard_one_a_reflection(round: int, seed: int, r: int) -> None:
    start = pairs(seed, K=1, r=r)
    turn = rotation(seed, r)
    reflected = torch.cat([-turn[:, :1], turn[:, 1:]], 1)
    cases: list[tuple[Strength, Tensor]] = [(1.0, turn), ("hard", turn), ("hard", reflected)]
    for strength, R in cases:
        other = {"site.A": R.T @ start["site.A"], "site.B": start["site.B"] @ R}
        for name, x in turned(start, other, strength, round).items():
            torch.testing.assert_close(x, start[name], rtol=0, atol=1e-4)


@either_round
def test_each_client_is_turned_by_its_own_round_and_start(round: int) -> None:
    start, trained = pairs(0, K=4), pairs(1, K=4)
    at = standing(range(4), torch.tensor([0, 1, 2, round]))
    after, _ = turned_back(0.5).end(start, trained, {}, at, BOTH)
    for k, t in enumerate(at.round.tolist()):
        one, other = ({name: x[k : k + 1] for name, x in of.items()} for of in (start, trained))
        for name, x in turned(one, other, 0.5, t).items():
            torch.testing.assert_close(after[name][k : k + 1], x, rtol=1e-12, atol=1e-12)


def test_the_first_round_and_a_pair_that_did_not_move_stay_bit_for_bit() -> None:
    start, trained = pairs(0), pairs(1)
    for name, x in turned(start, trained, 0.5, 0).items():
        assert torch.equal(x, trained[name])
    for name, x in turned(start, start, "hard", A_ROUND).items():
        assert torch.equal(x, start[name])


@either_round
def test_strength_zero_turns_nothing(round: int) -> None:
    trained = pairs(1)
    for name, x in turned(pairs(0), trained, 0.0, round).items():
        torch.testing.assert_close(x, trained[name], rtol=1e-12, atol=1e-12)


def test_where_b_vanishes_a_b_round_turns_nothing() -> None:
    start, trained = pairs(0), pairs(1)
    start["site.B"].zero_()
    for name, x in turned(start, trained, 0.5, B_ROUND).items():
        torch.testing.assert_close(x, trained[name], rtol=0, atol=1e-12)


def test_half_of_a_half_turn_has_no_direction_and_turns_nothing() -> None:
    start = pairs(0, K=1, r=2)
    other = {name: -x for name, x in start.items()}
    for name, x in turned(start, other, 0.5, A_ROUND).items():
        torch.testing.assert_close(x, other[name], rtol=0, atol=1e-6)


def test_factors_train_in_turn_by_local_step_and_heads_in_each() -> None:
    local = by_steps()
    adapters = pairs(0) | {"out.head": torch.ones(2, 3, dtype=torch.float64)}
    gradient = Quadratic(
        {name: torch.zeros_like(x) for name, x in adapters.items()}, torch.ones(2, dtype=torch.float64)
    )
    for step in range(8):
        grads, memory = local.gradients(gradient, adapters, {}, {}, at_step(2, step), BOTH)
        assert grads.keys() == {"site.B" if step % 2 else "site.A", "out.head"}
        assert not memory
        for name, x in grads.items():
            assert torch.equal(x, adapters[name])
    assert ALGORITHMS["la_lora"]().phase(3) == BOTH


LINKS, LINK_ROUNDS, STEPS, OUT, IN, WIDE = 2, 3, 4, 4, 5, 4


class Fitted:
    """The gradient of `‖W0 + B A - target‖² / 2` for K clients, each with a target of its own."""

    def __init__(self, base: Tensor, targets: Tensor) -> None:
        self.base, self.targets = base, targets

    def __call__(self, adapters: Tensors) -> Tensors:
        A, B = adapters["q.A"], adapters["q.B"]
        return {"q.B": (self.base + B @ A - self.targets) @ A.mT}

    def clipped(self, adapters: Tensors, max_norm: float) -> Tensors:
        raise NotImplementedError


def descended(gradient: Fitted, B: Tensor, A: Tensor, moments: Tensors) -> Tensor:
    """Return B after a round's local steps of plain AdamW."""
    params = {"q.B": B.clone()}
    for _ in range(STEPS):
        adamw().update(params, gradient({"q.A": A} | params), moments, every_kind(0.05))
    return params["q.B"]


def test_a_chain_is_what_merging_each_link_into_the_weights_comes_to() -> None:
    """Twin: a link is `ffa_lora` of its own ranks over weights that differ by client, with an optimiser of its own."""
    draw = torch.Generator().manual_seed(0)
    K, each = 3, WIDE // LINKS
    targets = torch.randn(K, OUT, IN, generator=draw, dtype=torch.float64)
    A = torch.randn(1, WIDE, IN, generator=draw, dtype=torch.float64).expand(K, -1, -1)
    W = torch.full((K, K), 1 / K, dtype=torch.float64) + torch.eye(K, dtype=torch.float64)
    W = W / W.sum(1)
    method = ALGORITHMS["rac_lora"](links=LINKS, link_rounds=LINK_ROUNDS)
    adapters = {"q.A": A.clone(), "q.B": torch.zeros(K, OUT, WIDE, dtype=torch.float64)}
    state = begun(method, adapters)
    state.moments.update({name: x.clone() for name, x in adamw().init(adapters).items()})
    base, mixed = torch.zeros(K, OUT, IN, dtype=torch.float64), list[Tensor]()
    gradient = Fitted(base, targets)
    for t in range(LINKS * LINK_ROUNDS):
        link, at = t // LINK_ROUNDS, standing(range(K), torch.full((K,), t), STEPS)
        ranks = slice(link * each, (link + 1) * each)
        if t % LINK_ROUNDS == 0:
            mixed.append(torch.zeros(K, OUT, each, dtype=torch.float64))
            moments = {name: x.clone() for name, x in adamw().init({"q.B": mixed[-1]}).items()}
        # the twin: earlier links lie in the weights; all B are mixed, each as a matrix of its own
        earlier = sum((B @ A[:, k * each : (k + 1) * each] for k, B in enumerate(mixed[:-1])), torch.zeros_like(base))
        mixed[-1] = descended(Fitted(base + earlier, targets), mixed[-1], A[:, ranks], moments)
        products = sum((B @ A[:, k * each : (k + 1) * each] for k, B in enumerate(mixed)), torch.zeros_like(base))
        mixed = [torch.einsum("ij,jor->ior", W, B) for B in mixed]
        # the method
        start, phase = {"q.B": state.adapters["q.B"].clone()}, method.phase(t)
        for _ in range(STEPS):
            grads, _ = method.local.gradients(gradient, state.adapters, start, state.known, at, phase)
            adamw().update(state.adapters, grads, state.moments, every_kind(0.05))
        moved, changed = method.local.end(start, state.adapters, state.known, at, phase)
        state.adapters.update(moved)
        state.remember(changed)
        found = state.adapters["q.B"] @ A
        torch.testing.assert_close(found, products, rtol=1e-12, atol=1e-12)
        new, _ = method.mixer.receive(state.adapters, state.adapters, W, {}, at, phase)
        torch.testing.assert_close(new["q.B"] @ A, torch.einsum("ij,jod->iod", W, found), rtol=1e-12, atol=1e-12)
        state.adapters["q.B"] = new["q.B"]
        torch.testing.assert_close(new["q.B"], torch.cat([*mixed, torch.zeros(K, OUT, WIDE - each * len(mixed))], 2))
    assert float((state.adapters["q.B"][..., :each]).abs().max()) > 0.1 < float(state.adapters["q.B"].abs().max())


@pytest.mark.parametrize(
    ("settings_", "line"),
    [({"links": 0}, "algorithm.links: 0 is out of range"), ({"link_rounds": 0}, "algorithm.link_rounds: 0 is out")],
)
def test_a_chain_without_links_is_refused(settings_: dict[str, int], line: str) -> None:
    with pytest.raises(RecipeError, match=line):
        ALGORITHMS["rac_lora"](**settings_)


def test_a_chain_of_more_links_than_ranks_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"algorithm\.links: 4 links of rank 3; give at most 3, or more ranks"):
        begun(ALGORITHMS["rac_lora"](links=4), pairs(0))


@either_round
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, "hard"])
@pytest.mark.parametrize("what", ["zero", "rows alike", "falls", "huge", "tiny", "opposite"])
def test_a_turn_towards_what_is_singular_or_huge_keeps_the_product_and_the_lengths(
    round: int, strength: Strength, what: str
) -> None:
    start, trained = pairs(0), pairs(1)
    for name, x in start.items():
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        made = {
            "zero": 0 * x,
            "rows alike": x[:, :1].expand_as(x),
            "falls": (left * 10.0 ** -torch.arange(0.0, 300.0, 100.0).double()) @ right,
            "huge": 1e150 * x,
            "tiny": 1e-300 * x,
            "opposite": -trained[name],
        }
        start[name] = made[what].clone()
    after = turned(start, trained, strength, round)
    for name, x in after.items():
        torch.testing.assert_close(torch.linalg.matrix_norm(x), torch.linalg.matrix_norm(trained[name]))
    torch.testing.assert_close(after["site.B"] @ after["site.A"], trained["site.B"] @ trained["site.A"])
