"""Each client's best adapter so far."""

from dataclasses import replace
from math import nan

import pytest
import torch

from peertune import build, load_recipe, simulate
from peertune.rounds import best
from peertune.rounds.job import Job
from peertune.rounds.record import Evaluation, RoundRecord
from peertune.types import State, only

SMALL = [
    "clients=4",
    "model.dtype=float64",
    "partition={name: iid}",
    "graph={name: ring}",
    "training={learning_rate: 2e-2, local_steps: 1, per_device_train_batch_size: 2}",
    "rounds=5",
    "evaluate={every: 1, rows: 20, load_best: true}",
    "faults=[{down: 3, rounds: [0, 4]}, {down: 2, rounds: [1, 1]}]",
]


def kept(job: Job) -> list[tuple[RoundRecord, State]]:
    return [(record, record.state.clone()) for record in simulate(job) if record.state is not None]


def test_a_clients_best_adapter_is_the_first_of_those_that_scored_highest_and_is_resumed_to_the_same_bits() -> None:
    job = build(load_recipe("digits-demo", SMALL)).job
    made = kept(job)
    stacks, rounds = best.kept(made[-1][1])
    found = only(stacks)
    for client in range(3):
        scores = {
            record.round: record.evaluation.clients[record.clients.index(client)]
            for record, _ in made
            if record.evaluation is not None and client in record.clients
        }
        first = max(scores, key=lambda t: (scores[t], -t))
        assert rounds[client] == first
        for name, x in found.items():
            assert torch.equal(x[client], made[first][1].adapters[name][client])
    assert len(set(rounds)) > 2, "or the last round would do"
    assert rounds[3] == -1, "a client that was never evaluated has its last adapter"
    assert all(torch.equal(x[3], made[-1][1].adapters[name][3]) for name, x in found.items())
    said = made[-1][0].evaluation
    assert said is not None
    assert said.best_rounds == rounds[:3]

    again = kept(replace(job, state=made[1][1]))[-1][1]
    for name, x in made[-1][1].memory.items():
        assert torch.equal(x.nan_to_num(), again.memory[name].nan_to_num()), name


@pytest.mark.parametrize(
    ("metric", "scores", "rounds"),
    [
        ("accuracy", [(0.5, nan), (0.5, nan), (0.4, 0.1), (0.6, nan)], [3, 2]),
        ("perplexity", [(9.0, 8.0), (nan, 8.0), (3.0, 9.0), (4.0, 7.0)], [2, 3]),
    ],
)
def test_the_lowest_perplexity_is_the_best_the_first_of_equals_stays_and_what_is_no_number_is_none(
    metric: str, scores: list[tuple[float, float]], rounds: list[int]
) -> None:
    adapters = {"q.A": torch.zeros(2, 1, 1)}
    state = State(adapters, {}, torch.zeros(2, dtype=torch.int64), best.begun({"q.A": torch.zeros(2, 1, 1)}))
    for t, own in enumerate(scores):
        adapters["q.A"][:] = t
        told = best.keep(state, [4, 7], Evaluation(metric, list(own), None, 1, []), t)
    assert told == rounds
    assert only(best.kept(state)[0])["q.A"].flatten().tolist() == rounds


def test_who_is_hostile_has_no_score_and_so_no_best_adapter() -> None:
    adapters = {"q.A": torch.zeros(3, 1, 1)}
    state = State(adapters, {}, torch.zeros(3, dtype=torch.int64), best.begun({"q.A": torch.zeros(3, 1, 1)}))
    for t, scores in enumerate([[0.5, 0.5], [0.4, 0.6]]):
        adapters["q.A"][:] = t
        told = best.keep(state, [2, 5, 8], Evaluation("accuracy", scores, None, 1, [], judged=[2, 8]), t)
    assert told == [0, 1]
    stacks, rounds = best.kept(state)
    assert only(stacks)["q.A"].flatten().tolist() == [0, 1, 1]
    assert rounds == [0, -1, 1]


def test_without_it_nothing_is_kept() -> None:
    state = State({"q.A": torch.ones(2, 1, 1)}, {}, torch.zeros(2, dtype=torch.int64))
    assert best.keep(state, [0, 1], Evaluation("accuracy", [1.0, 1.0], None, 1, []), 0) == []
    stacks, rounds = best.kept(state)
    assert (only(stacks), rounds) == (state.adapters, [])
