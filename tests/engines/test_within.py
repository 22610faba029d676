"""Checkpoints within a round: a run that goes on from any of them ends in the same bits."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from playing import kept

from peertune.assembly.build import Built, build, build_stack
from peertune.engines.simulator import simulate, simulate_together
from peertune.errors import RecipeError
from peertune.recipe import load_recipe
from peertune.rounds.job import Job, Pausing
from peertune.rounds.record import RoundRecord
from peertune.runs import checkpoints
from peertune.types import State

STEPS, EVERY, ROUNDS = 5, 2, 3
SMALL = [
    "clients=4",
    f"rounds={ROUNDS}",
    "lora={r: 2, lora_alpha: 4, lora_dropout: 0.2, target_modules: [q_proj]}",
    "graph={name: complete, activation: 0.6}",
    "evaluate={every: 2, rows: 8}",
    "partition={name: iid}",
]


def training(**more: Any) -> str:
    settings = {"local_steps": STEPS, "per_device_train_batch_size": 2, "clients_per_pass": 3, **more}
    return f"training={{{', '.join(f'{key}: {value}' for key, value in settings.items())}}}"


CASES = {
    "clients of one phase in two passes": ["algorithm.name=dec_lora", training()],
    "factors in turn by step": ["algorithm.name=la_lora", training(learning_rate=1e-2)],
    "what the round began with": ["algorithm.name=fedrot_lora", training(), "head=trained"],
    "a dual, and mixed moments": [
        "algorithm.name=dec_lora",
        "modifiers=[{name: mix_moments}, {name: fedspeed}]",
        training(),
    ],
    "a dual for SGD, whose moments start afresh": [
        "algorithm={name: adf_lora, switch_every: 1}",
        "modifiers=[{name: dfed_admm}]",
        training(optim="sgd", momentum=0.9, reset_optimizer="round"),
    ],
    "public copies": ["algorithm.name=dec_lora", "modifiers=[{name: choco}]", "graph={name: ring}", training()],
    "phases that clients agree on": [
        "algorithm={name: tad_lora, switch_every: adaptive, window_rounds: 4}",
        training(reset_optimizer="phase"),
        "evaluate={every: 2, rows: 8, load_best: true}",
    ],
    "a client that is down, times, and a rate that falls": [
        "algorithm.name=dec_lora",
        "modifiers=[{name: fedspeed}]",
        "faults=[{rounds: [1, 1], down: 1}]",
        "time={step_s: 0.5, latency_s: 0.1}",
        training(lr_scheduler_type="linear", clients_per_pass=2),
    ],
    "a deadline": [
        "algorithm.name=dec_lora",
        "time={step_s: [1, 2.7, 9, 50], deadline_s: 6}",
        training(clients_per_pass=2),
    ],
}


def made(words: Sequence[str]) -> Built:
    return build(load_recipe("digits-demo", [*SMALL, *words]))


def paused(job: Job, every: int) -> tuple[list[RoundRecord], list[State]]:
    """The records of a run, and its states within rounds."""
    states = list[State]()
    return kept(replace(job, pausing=Pausing(every, lambda state: states.append(state.clone())))), states


def told(record: RoundRecord) -> dict[str, Any]:
    return asdict(replace(record, seconds={}, state=None))


def assert_same_bits(ours: Sequence[RoundRecord], theirs: Sequence[RoundRecord]) -> None:
    assert [told(record) for record in ours] == [told(record) for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.state is not None
        assert other.state is not None
        assert (one.state.step, one.state.within) == (0, {})
        assert torch.equal(one.state.rounds, other.state.rounds)
        for of in ("adapters", "moments", "memory"):
            own, others = vars(one.state)[of], vars(other.state)[of]
            assert list(own) == list(others)
            assert all(x.numpy().tobytes() == others[name].numpy().tobytes() for name, x in own.items())


def again(state: State, job: Job, folder: Path) -> Job:
    """The same from a state that was kept on disk."""
    checkpoints.save_within(folder, state, job.clients)
    (place,) = (folder / "checkpoints").iterdir()
    assert place.name == f"within-{state.round:06d}-{state.step:06d}"
    assert checkpoints.load(folder, job.state) is None, "who asks for whole rounds gets none"
    loaded = checkpoints.load(folder, job.state, within=True)
    assert loaded is not None
    return replace(job, state=loaded)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_goes_on_within_a_round_ends_in_the_same_bits(case: str, tmp_path: Path) -> None:
    job = made(CASES[case]).job
    whole = kept(job)
    records, states = paused(job, EVERY)
    assert_same_bits(records, whole)
    assert [(state.round, state.step) for state in states] == [(0, 2), (0, 4), (1, 1), (1, 3), (2, 2), (2, 4)]
    for state in states[list(CASES).index(case) % 2 :: 2]:  # these, or those between them
        rest = kept(again(state, job, tmp_path))
        assert_same_bits(rest, whole[state.round :])
        assert rest[0].seconds["train"] > float(state.within["seconds"].max()) > 0, "what was made before counts"


def test_steps_are_counted_over_the_rounds_and_may_be_more_than_one_has() -> None:
    def points(every: int) -> list[tuple[int, int]]:
        return [(t, step) for t in range(4) for step in Pausing(every, bool).after(t, STEPS)]

    for every in range(1, 3 * STEPS):
        assert points(every) == [divmod(at, STEPS) for at in range(every, 4 * STEPS, every) if at % STEPS]


def test_runs_of_a_stack_keep_what_is_within_a_round_and_go_on_from_steps_of_their_own(tmp_path: Path) -> None:
    words = ["model.dtype=float64", "modifiers=[{name: fedspeed}]", training(clients_per_pass=2)]
    asked = {
        name: load_recipe("digits-demo", [*SMALL, *words, "algorithm.name=dec_lora", f"seed={seed}"])
        for seed, name in enumerate("abc")
    }
    built = {name: one for name, one in build_stack(asked).items() if isinstance(one, Built)}
    assert built.keys() == asked.keys()
    alone = {name: paused(build(recipe).job, EVERY) for name, recipe in asked.items()}
    states: dict[str, list[State]] = {name: [] for name in built}

    def pausing(name: str, every: int) -> Pausing:
        return Pausing(every, lambda state: states[name].append(state.clone()))

    jobs = {
        "a": replace(built["a"].job, pausing=pausing("a", EVERY)),
        "b": replace(again(alone["b"][1][1], built["b"].job, tmp_path), pausing=pausing("b", 3)),
        "c": built["c"].job,
    }
    jobs = {name: replace(job, state=job.state.clone()) for name, job in jobs.items()}
    for t in range(ROUNDS):
        for name, record in list(simulate_together(jobs)):
            assert isinstance(record, RoundRecord)
            assert record.state is not None
            expected = alone[name][0][t]
            assert expected.state is not None
            assert record.loss == pytest.approx(expected.loss, rel=1e-12)
            assert record.evaluation == expected.evaluation
            for key, x in expected.state.adapters.items():
                torch.testing.assert_close(record.state.adapters[key], x, rtol=1e-10, atol=1e-12)
            jobs[name] = replace(jobs[name], state=record.state)
    assert [(state.round, state.step) for state in states["a"]] == [(0, 2), (0, 4), (1, 1), (1, 3), (2, 2), (2, 4)]
    assert [(state.round, state.step) for state in states["b"]] == [(1, 1), (1, 4), (2, 2)]
    assert states["c"] == []
    rest = kept(replace(build(asked["a"]).job, state=states["a"][2]))
    for record, expected in zip(rest, alone["a"][0][1:], strict=True):
        assert record.loss == pytest.approx(expected.loss, rel=1e-12)


def test_a_number_that_is_not_finite_is_found_before_it_is_kept() -> None:
    job = made(["algorithm.name=dec_lora", training(learning_rate=1e300)]).job
    states = list[State]()
    with pytest.raises(Exception, match="no longer finite after round 0"):
        list(simulate(replace(job, pausing=Pausing(EVERY, states.append))))
    assert states == []


def test_clients_that_wait_for_nobody_have_no_step_in_common() -> None:
    asynchronous = "time={mode: asynchronous, step_s: 1}"
    with pytest.raises(RecipeError, match=r"^checkpoint\.steps: clients that wait for nobody have no step in common"):
        made([asynchronous, "algorithm.name=dec_lora", "checkpoint.steps=2"])
