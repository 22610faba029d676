"""Several runs as one stack, each held against itself alone: the slow, obvious twin."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from peertune.assembly.build import Built, build, build_stack
from peertune.engines.simulator import simulate, simulate_together
from peertune.errors import DivergedError
from peertune.method import At, Gradient, Local, Memory, Phase
from peertune.recipe import Recipe, load_recipe
from peertune.rounds.record import RoundRecord
from peertune.rounds.round import _begin_of
from peertune.rounds.turns import _alike
from peertune.types import State, Tensors

SMALL = [
    "model.dtype=float64",
    "clients=4",
    "rounds=3",
    "training={local_steps: 2, per_device_train_batch_size: 3, learning_rate: 1e-2}",
    "evaluate={every: 2, rows: 8}",
    "graph={name: complete, activation: 0.6}",
    "lora.lora_dropout=0.2",
    "partition={name: iid}",
]


def recipes(*each: Sequence[str]) -> dict[str, Recipe]:
    return {str(place): load_recipe("digits-demo", [*SMALL, *words]) for place, words in enumerate(each)}


def kept(record: RoundRecord) -> RoundRecord:
    return replace(record, state=record.state and record.state.clone())


def run(built: Built) -> list[RoundRecord]:
    return [kept(record) for record in simulate(built.job)]


def alone(recipe: Recipe) -> list[RoundRecord]:
    return run(build(recipe))


def stacked(built: dict[str, Built]) -> dict[str, list[RoundRecord | Exception]]:
    """What each run comes to, round after round, until it ends or can't go on."""
    jobs = {name: replace(one.job, state=one.job.state.clone()) for name, one in built.items()}
    found: dict[str, list[RoundRecord | Exception]] = {name: [] for name in built}
    while jobs:
        for name, came in list(simulate_together(jobs)):
            found[name].append(kept(came) if isinstance(came, RoundRecord) else came)
            if isinstance(came, Exception) or came.state is None or came.state.round == jobs[name].rounds:
                del jobs[name]
            else:
                jobs[name] = replace(jobs[name], state=came.state)
    return found


def made(asked: dict[str, Recipe]) -> dict[str, Built]:
    built = build_stack(asked)
    assert not [one for one in built.values() if isinstance(one, Exception)]
    return {name: one for name, one in built.items() if isinstance(one, Built)}


MEASURED = ("loss", "grad_norm", "neighbourhood_cross_term", "diagnostics")


def assert_same(one: Any, other: Any, tolerance: float) -> None:
    """Hold two records against each other, but for seconds."""
    for key, x in vars(replace(one, seconds={}, state=None, evaluation=None)).items():
        if key in MEASURED and x is not None:
            assert vars(other)[key] == pytest.approx(x, abs=tolerance, rel=tolerance), key
        elif key not in ("seconds", "state", "evaluation"):
            assert vars(other)[key] == x, key
    assert (one.evaluation is None) == (other.evaluation is None)
    if one.evaluation is not None:
        assert other.evaluation.clients == pytest.approx(one.evaluation.clients)
        assert other.evaluation.average == pytest.approx(one.evaluation.average)
    assert_same_state(one.state, other.state, tolerance)


def assert_same_state(one: State, other: State, tolerance: float) -> None:
    for of in ("adapters", "moments", "memory"):
        ours, theirs = vars(one)[of], vars(other)[of]
        assert list(ours) == list(theirs)
        for name, x in ours.items():
            torch.testing.assert_close(theirs[name], x, rtol=tolerance, atol=tolerance, msg=name)
    assert torch.equal(one.rounds, other.rounds)


SEEDS: list[list[str]] = [["seed=0"], ["seed=1"], ["seed=5"]]
SGD = "optim: sgd, momentum: 0.9, weight_decay: 0.1, reset_optimizer: phase"
CASES: dict[str, list[list[str]]] = {
    "phases that clients agree on, heads drawn from the seed and frozen": [
        [*seed, "algorithm={name: tad_lora, switch_every: adaptive, window_rounds: 4}", "head=frozen"]
        for seed in SEEDS[:2]
    ],
    "a modifier with a dual": [
        [*seed, "algorithm.name=dec_lora", "modifiers=[{name: fedspeed}]"] for seed in SEEDS[:2]
    ],
    "push-sum, and SGD at different rates": [
        [
            *seed,
            "algorithm.name=dec_lora",
            "graph={name: epidemic, fan_out: 2, weights: push_sum}",
            f"training={{local_steps: 2, per_device_train_batch_size: 3, learning_rate: {rate}, {SGD}}}",
        ]
        for seed, rate in zip(SEEDS, ("1e-2", "3e-2", "1e-1"), strict=True)
    ],
    "factors in turn by step, with rates that fall": [
        [
            f"training={{local_steps: 3, per_device_train_batch_size: 3, learning_rate: {rate}, "
            f"lr_scheduler_type: {kind}, loraplus_lr_ratio: 2, weight_decay: 0.1}}",
            "algorithm.name=la_lora",
        ]
        for rate, kind in (("1e-2", "linear"), ("2e-2", "constant"))
    ],
    "deadlines, by times that are drawn, and none": [
        [*seed, "algorithm.name=dec_lora", f"time={{step_s: {{name: lognormal, median_s: 1, sigma: 1}}{limit}}}"]
        for seed, limit in zip(SEEDS, (", deadline_s: 1.5", ", deadline_s: 2, late: drop", ""), strict=True)
    ],
    "attacks on rows and on messages, and none": [
        [f"attacks=[{attacks}]", "rounds=4", "partition={name: dirichlet, alpha: 1}"]
        for attacks in (
            "{name: label_flip, clients: [1, 2]}",
            "",
            "{name: sign_flip, clients: [0]}",
            "{name: label_flip, clients: [3], rounds: [1, 2]}, {name: backdoor, target: 5, clients: [0]}",
        )
    ],
    "methods, graphs, partitions and numbers of rounds that differ, and a client that is down": [
        ["algorithm.name=decaf", "graph.name=ring", "rounds=3"],
        ["algorithm.name=fedrot_lora", "seed=2", "faults=[{rounds: [1, 2], down: 2}]"],
        ["algorithm.name=local", "partition={name: dirichlet}", "rounds=2"],
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_a_stack_equals_the_run_alone(case: str) -> None:
    asked = recipes(*CASES[case])
    built = made(asked)
    found = stacked(built)
    for name, recipe in asked.items():
        single = build(recipe)
        assert built[name].resolved == single.resolved
        assert built[name].head.keys() == single.head.keys()
        assert all(torch.equal(built[name].head[key], x) for key, x in single.head.items())
        assert len(found[name]) == recipe.rounds
        for ours, theirs in zip(found[name], run(single), strict=True):
            assert_same(theirs, ours, 1e-12)


def test_in_float32_a_stack_equals_its_runs_up_to_rounding_and_they_share_the_seconds() -> None:
    asked = recipes(*([*seed, "model.dtype=float32"] for seed in SEEDS[:2]))
    found = stacked(made(asked))
    for name, recipe in asked.items():
        for ours, theirs in zip(found[name], alone(recipe), strict=True):
            assert_same(theirs, ours, 2e-4)
    (first, *_), (second, *_) = found.values()
    assert isinstance(first, RoundRecord)
    assert isinstance(second, RoundRecord)
    assert first.seconds["train"] == pytest.approx(second.seconds["train"])


def test_a_run_that_diverges_leaves_the_stack_and_the_others_go_on_from_whatever_round_they_are_in() -> None:
    asked = recipes(["seed=0"], ["training={local_steps: 2, per_device_train_batch_size: 3, learning_rate: 1e300}"])
    asked["ahead"] = load_recipe("digits-demo", [*SMALL, "seed=2"])
    built, expected = made(asked), {name: alone(asked[name]) for name in ("0", "ahead")}
    ahead = expected["ahead"][1].state
    assert ahead is not None
    built["ahead"] = replace(built["ahead"], job=replace(built["ahead"].job, state=ahead))
    found = stacked(built)
    (error,) = found["1"]
    assert isinstance(error, DivergedError)
    with pytest.raises(DivergedError) as caught:
        alone(asked["1"])
    assert str(error) == str(caught.value)
    for name, since in (("0", 0), ("ahead", 2)):
        for ours, theirs in zip(found[name], expected[name][since:], strict=True):
            assert_same(theirs, ours, 1e-12)


def local_of(factor: float) -> Local:
    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        return {name: factor * x for name, x in gradient(adapters).items()}, {}

    return Local(gradients)


@pytest.mark.parametrize(("factors", "passes"), [((2.0, 2.0), 1), ((2.0, 3.0), 2)])
def test_locals_that_do_the_same_train_together_and_others_apart(factors: tuple[float, float], passes: int) -> None:
    asked = recipes(*SEEDS[:2])

    def with_local(one: Built, factor: float) -> Built:
        method = one.job.algorithm._replace(local=local_of(factor))
        return replace(one, job=replace(one.job, algorithm=method))

    built = {name: with_local(one, factor) for (name, one), factor in zip(made(asked).items(), factors, strict=True)}
    turns = [turn for one in built.values() for turn in _begin_of(one.job).turns]
    assert len(_alike(dict(enumerate(turns)))) == passes
    found = stacked(built)
    for (name, recipe), factor in zip(asked.items(), factors, strict=True):
        for ours, theirs in zip(found[name], run(with_local(build(recipe), factor)), strict=True):
            assert_same(theirs, ours, 1e-12)
