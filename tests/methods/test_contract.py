"""What every method promises with every modifier, and with pairs of them, over rounds as an engine makes them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle, permutations, product

import pytest
import torch
from playing import begun, played, played_alone, played_and_sent
from torch import Tensor

from peertune.method import Algorithm, Local, Message, Mixer, Schedule
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.modifiers import MODIFIERS
from peertune.methods.push_sum import pushed
from peertune.methods.robust import RULES
from peertune.types import State, Tensors, kind, take

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

CLIENTS = 5
SETTINGS = {"tad_lora": {"switch_every": 2}, "rac_lora": {"links": 2, "link_rounds": 2}}
PLAIN: dict[str, Algorithm] = {name: make(**SETTINGS.get(name, {})) for name, make in ALGORITHMS.items()}
PLAIN["tad_lora, adaptive"] = ALGORITHMS["tad_lora"](switch_every="adaptive", window_rounds=4, clients=CLIENTS, seed=1)
LINEAR = PLAIN.keys() - {"decaf", "lora_fair"}  # plain averages
FIELDS = {Schedule: "schedule", Local: "local", Message: "message", Mixer: "mixer"}
ROBUST = tuple(RULES)
SMALLER = ("choco", "int4", "int8", "shared_mask")
MOVING = {*ROBUST} - {"gt_pd"}  # the clients' mean
FEW_SHOW = (*ROBUST, *SMALLER)  # a few methods show what they do to all
CHANGING = [name for name in MODIFIERS if name not in ("divided", "zero_padded")]  # of ranks that differ: test_ranks.py
ALONE = [(), *((name,) for name in CHANGING if name not in FEW_SHOW)]
ROUNDING = {"choco", "half", "int4", "int8"}
NOT = {*permutations(("fedspeed", "dfed_admm"), 2), *permutations(ROUNDING, 2), *product(["shared_mask"], ROUNDING)}
NOT.add(("choco", "shared_mask"))
PAIRS: list[tuple[str, ...]] = [(name,) for name in 3 * FEW_SHOW]
PAIRS += [pair for pair in permutations([name for name in CHANGING if name not in ROBUST], 2) if pair not in NOT]
PAIRS += [*product(["fedspeed", "half"], ROBUST), *product(ROBUST, ["int8"])]


def changed(algorithm: Algorithm, names: tuple[str, ...]) -> Algorithm:
    """Return a method with these modifiers, by their defaults."""
    for name in names:
        change, (first, *_) = MODIFIERS[name], MODIFIERS[name].__annotations__.values()
        if "rounds" in change.__annotations__:
            change = partial(change, rounds=20)
        if first is Algorithm:
            algorithm = change(algorithm)
        else:
            algorithm = algorithm._replace(**{FIELDS[first]: change(getattr(algorithm, FIELDS[first]))})
    return algorithm


def fits(name: str, names: tuple[str, ...]) -> bool:
    """Return whether a method has what these modifiers need of mixing."""
    needs, mixer = changed(PLAIN[name], names).needs, PLAIN[name].mixer
    return (mixer.keeps_basis or "kept basis" not in needs) and (mixer.by_entry or "mixing by entry" not in needs)


# Every method with every modifier, and every pair of modifiers, in both orders, on one method after the other.
ROWS = [row for row in [*product(PLAIN, ALONE), *zip(cycle(PLAIN), PAIRS)] if fits(*row)]  # as many as there are pairs
METHODS = {" + ".join((name, *names)): changed(PLAIN[name], names) for name, names in ROWS}
METHODS["rolora, pushed"] = pushed(PLAIN["rolora"], CLIENTS)
FEW = {*PLAIN, *(f"tad_lora + {name}" for name in CHANGING)}  # of which each part is in the quick tests


def metropolis(n: int, edges: Sequence[tuple[int, int]]) -> Tensor:
    """Metropolis-Hastings weights of a graph, the slow and obvious way."""
    linked = torch.zeros(n, n, dtype=torch.float64)
    for i, j in edges:
        linked[i, j] = linked[j, i] = 1
    degree = linked.sum(1)
    weights = linked / (1 + torch.maximum(degree[:, None], degree))
    return weights + torch.diag(1 - weights.sum(1))


class Case:
    """A round of some clients on some graph."""

    def __init__(self, n: int, r: int, edges: Sequence[tuple[int, int]], round: int) -> None:
        draw = torch.Generator().manual_seed(10 * n + r)
        shapes = {
            "layers.0.query.A": (n, r, 5),
            "layers.0.query.B": (n, 4, r),
            "layers.1.value.A": (n, r, 3),
            "layers.1.value.B": (n, 9, r),
            "classifier.weight.head": (n, 2, 4),
            "classifier.bias.head": (n, 2),
        }
        self.adapters = {name: torch.randn(x, generator=draw, dtype=torch.float64) for name, x in shapes.items()}
        self.weights = metropolis(n, edges)  # [n, n], symmetric, doubly stochastic
        self.round = round


CASES = {
    "some hear some": Case(5, 2, [(0, 1), (0, 2), (1, 2), (2, 3)], round=3),  # and the last hears nobody
    "most hear most": Case(4, 3, [(0, 1), (0, 2), (0, 3), (1, 2), (2, 3)], round=4),
    "one": Case(1, 1, [], round=0),
}
"""The first is for every method, the others are for a few."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A method in a round; what it begins with and comes to is computed once, and no test may change it."""

    method: Algorithm
    case: Case

    @cached_property
    def before(self) -> State:
        return start(self.method, self.case, self.case.adapters)

    @cached_property
    def after(self) -> State:
        """What a round without local steps leaves."""
        return played(self.method, self.before, self.case.weights)


def start(method: Algorithm, case: Case, adapters: Tensors) -> State:
    """Return the state before the case's round, with the memory of rounds in which all heard all."""
    state = begun(method, adapters)
    for _ in range(case.round if state.memory else 0):
        state = played(method, state, torch.full((len(case.weights),) * 2, 1 / len(case.weights), dtype=torch.float64))
    return replace(state, adapters={name: x.clone() for name, x in adapters.items()}).at(case.round)


quick = {True: (), False: (pytest.mark.thorough,)}
TRIALS = {
    f"{name}, {which}": pytest.param(Trial(method, case), id=f"{name}, {which}", marks=quick[name in FEW])
    for name, method in METHODS.items()
    for which, case in CASES.items()
    if (name in FEW or case is CASES["some hear some"]) and not (name.startswith("rac_lora") and which == "one")
}
every_method = pytest.mark.parametrize(
    "method", [pytest.param(method, id=name, marks=quick[name in FEW]) for name, method in METHODS.items()]
)
every_trial = pytest.mark.parametrize("trial", TRIALS.values())
every_linear_trial = pytest.mark.parametrize(
    "trial",
    [
        each
        for name, each in TRIALS.items()
        if name.partition(", ")[0].partition(" + ")[0] in LINEAR and MOVING.isdisjoint(re.split(r" \+ |, ", name))
    ],
)


def parts(state: State) -> Tensors:
    """Return all that a round leaves."""
    return state.adapters | state.known


def assert_close(left: Tensors, right: Tensors, tolerance: float = 1e-9) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


@every_trial
def test_a_receiver_with_its_closed_neighbourhood_gets_what_the_full_matrix_gives_it(trial: Trial) -> None:
    weights = trial.case.weights
    together, sent = played_and_sent(trial.method, trial.before, weights, steps=2)
    for client in range(len(weights)):
        alone = played_alone(trial.method, trial.before, weights, client, sent, steps=2)
        assert_close(parts(alone), take(parts(together), slice(client, client + 1)))


@every_trial
def test_relabelling_the_clients_commutes_with_a_round(trial: Trial) -> None:
    weights = trial.case.weights
    new = torch.randperm(len(weights), generator=torch.Generator().manual_seed(1))
    relabelled = played(trial.method, trial.before.take(new), weights[new][:, new])
    assert_close(relabelled.adapters, take(trial.after.adapters, new))


@every_trial
def test_a_client_that_hears_nobody_keeps_its_adapters_bit_for_bit_and_remembers(trial: Trial) -> None:
    before = trial.before
    after = played(trial.method, before, torch.eye(len(trial.case.weights), dtype=torch.float64))
    for name, x in trial.case.adapters.items():
        assert torch.equal(after.adapters[name], x)
    assert after.memory.keys() == before.memory.keys()
    for name, x in after.memory.items():
        assert (x.shape, x.dtype) == (before.memory[name].shape, before.memory[name].dtype)
        assert not x.is_floating_point() or x.isfinite().all()


@every_trial
def test_kinds_that_are_not_sent_stay_bit_for_bit(trial: Trial) -> None:
    sent = trial.method.phase(trial.case.round).send
    after = trial.after.adapters
    assert list(after) == list(trial.case.adapters)
    for name, x in trial.case.adapters.items():
        if kind(name) not in sent:
            assert torch.equal(after[name], x)


@every_trial
def test_dense_and_sparse_weights_agree(trial: Trial) -> None:
    weights = trial.case.weights
    everywhere = torch.ones_like(weights).nonzero().T
    stored_zeros = torch.sparse_coo_tensor(
        everywhere, weights.flatten(), weights.shape, check_invariants=True, is_coalesced=True
    )
    for sparse in (weights.to_sparse(), weights.to_sparse_csr(), stored_zeros):
        assert_close(parts(played(trial.method, trial.before, sparse)), parts(trial.after))


@every_linear_trial
def test_plain_averages_keep_the_mean_over_clients(trial: Trial) -> None:
    for key, x in trial.case.adapters.items():
        torch.testing.assert_close(trial.after.adapters[key].mean(0), x.mean(0), rtol=1e-12, atol=1e-12)


@every_trial
def test_a_round_changes_nothing_that_it_is_given(trial: Trial) -> None:
    before, weights = start(trial.method, trial.case, trial.case.adapters), trial.case.weights.clone()
    held = before.clone()
    played(trial.method, before, weights)
    assert_close(parts(before), parts(held), 0)
    assert torch.equal(trial.case.weights, weights)


@every_trial
def test_float32_adapters_stay_float32_under_float64_weights(trial: Trial) -> None:
    single = start(trial.method, trial.case, {name: x.float() for name, x in trial.case.adapters.items()})
    after = played(trial.method, single, trial.case.weights).adapters
    assert {x.dtype for x in after.values()} == {torch.float32}
    assert all(after[name].shape == x.shape for name, x in trial.case.adapters.items())


@every_trial
def test_stop_and_resume_is_no_stop(trial: Trial) -> None:
    state = whole = trial.before
    for _ in range(2):
        whole = played(trial.method, whole, trial.case.weights, steps=2)
        stored = [{name: x.clone() for name, x in of.items()} for of in (state.adapters, state.moments, state.memory)]
        resumed = State(stored[0], stored[1], state.rounds.clone(), stored[2])
        state = played(trial.method, resumed, trial.case.weights, steps=2)
    assert_close(parts(state), parts(whole), 0)


@every_method
def test_what_is_remembered_and_sent_has_clients_first_and_an_owner(method: Algorithm) -> None:
    adapters = {"q.A": torch.ones(CLIENTS, 2, 3), "q.B": torch.ones(CLIENTS, 3, 2)}
    state = begun(method, adapters)
    assert all(len(x) == CLIENTS for x in state.memory.values())
    assert all("." in name and kind(name) not in {"A", "B", "head"} for name in state.memory)
    one, other = begun(method, take(adapters, slice(0, 1)), clients=[3]), take(state.memory, slice(3, 4))
    assert_close(one.memory, other, 0)


@every_method
def test_phases_name_known_kinds_and_the_round(method: Algorithm) -> None:
    for t in range(20):
        phase = method.phase(t)
        assert phase.train | phase.send <= {"A", "B", "head"}
        assert phase.train


@every_method
def test_b_trains_first(method: Algorithm) -> None:
    assert "B" in method.phase(0).train
