"""Several processes and the simulator: one recipe, the same adapters and records."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SPOILT, spoilt, together

from peertune.assembly.build import build
from peertune.engines.distributed import _carry, _merged, share
from peertune.engines.simulator import simulate
from peertune.errors import RunError
from peertune.methods.catalogue import ALGORITHMS
from peertune.recipe import load_recipe
from peertune.rounds.record import RoundRecord
from peertune.types import Group, by_client

SMALL = (
    "model.dtype=float64",
    "clients=5",
    "lora={r: 3, lora_alpha: 6, lora_dropout: 0.2, target_modules: [q_proj, v_proj]}",
    "partition={name: iid}",
    "graph={name: complete, activation: 0.5}",
    "training={learning_rate: 5e-3, local_steps: 1, per_device_train_batch_size: 3}",
    "rounds=4",
    "evaluate={every: 3, rows: 10}",
)
DOWN = "{down: 4, rounds: [0, 1]}, {down: 3, rounds: [1, 1]}, {down: 0, rounds: [2, 2]}"
FAULTS = f"[{{edge: [0, 1], rounds: [1, 2]}}, {DOWN}]"
UNEVEN = "mode: asynchronous, step_s: {name: lognormal, median_s: 1, sigma: 0.7}"
RECIPES = {method: [*SMALL, f"algorithm={{name: {method}}}", "rounds=2"] for method in ALGORITHMS}
ADAPTIVE = "algorithm={name: tad_lora, switch_every: adaptive, window_rounds: 4}"
RECIPES |= {
    "adaptive": [*SMALL, ADAPTIVE, "rounds=9"],
    "half": [*SMALL, ADAPTIVE, "modifiers=[{name: half}]"],
    "int8": [*SMALL, ADAPTIVE, "modifiers=[{name: int8, block: 7}]"],
    "choco": [*SMALL, "graph={name: ring}", "modifiers=[{name: choco, share: 0.2}]"],
    "masked": [
        *SMALL,
        "graph={name: matching, probability: 0.6}",
        "modifiers=[{name: shared_mask}]",
        "algorithm.switch_every=2",
        f"faults={FAULTS}",
    ],
    "always": [*SMALL, "graph.activation=1.0"],
    "clipped": [*SMALL, "modifiers=[{name: clipped}]", "graph.activation=1.0", f"faults={FAULTS}"],
    # with three processes the last one holds no honest client
    "hostile": [
        *SMALL,
        "attacks=[{name: gauge, clients: [4, 1]}, {name: label_flip, clients: [4]}, {name: backdoor, clients: [1]}]",
        "modifiers=[{name: krum}, {name: half}]",
        "graph.activation=1.0",
        "training={learning_rate: 0.1, optim: sgd, local_steps: 1, per_device_train_batch_size: 3}",
        "evaluate={every: 2, rows: 10, on: both, ensemble: true, mixing: true, load_best: true}",
        f"faults={FAULTS}",
    ],
    "changing": [
        *SMALL,
        "clients=8",
        "graph={name: exponential}",
        "evaluate={every: 3, rows: 10, on: both, ensemble: true, mixing: true}",
        "task.metric=[accuracy, macro_f1]",
    ],
    "moments": [
        *SMALL,
        "modifiers=[{name: mix_moments}, {name: fedspeed}]",
        "evaluate={every: 1, on: own, load_best: true}",
    ],
    "ring": [
        *SMALL,
        "graph={name: ring, activation: 0.7, weights: rows, row_counts: [5, 1, 30, 2, 9]}",
        f"faults={FAULTS}",
        "time={step_s: [1, 1, 2, 1, 5], latency_s: 0.5, bandwidth_bytes_s: 1000}",
        "training.reset_optimizer=phase",
        "algorithm.switch_every=2",
    ],
    # with an interval given: to estimate rho of such a graph takes each process longer than all its rounds
    "pairs": [*SMALL, "graph={name: matching, probability: 0.6}", "algorithm.switch_every=2", "head=frozen"],
    "epidemic": [
        *SMALL,
        "graph={name: epidemic, fan_out: 2, activation: 0.8}",
        f"faults={FAULTS}",
        "algorithm.switch_every=2",
    ],
    "push": [
        *SMALL,
        "graph={name: epidemic, fan_out: 3, weights: push_sum, activation: 0.8}",
        f"faults={FAULTS}",
        "algorithm.switch_every=2",
    ],
    "deadline": [
        *SMALL,
        "time={step_s: [1, 2.4, 9, 1, 50], deadline_s: 9, latency_s: 0.5}",
        "training={learning_rate: 5e-3, local_steps: 4, per_device_train_batch_size: 2}",
    ],
    "many": [*SMALL, "clients=70", "graph={name: ring}", "rounds=2", "training.per_device_train_batch_size=1"],
    "nobody waits": [
        *SMALL,
        "algorithm={name: dec_lora}",
        f"time={{{UNEVEN}, latency_s: 1.3, staleness_exponent: 0.5}}",
        "faults=[{edge: [1, 2], rounds: [0, 3]}, {slow: 0, rounds: [1, 1], delay_s: 4}]",
        "rounds=6",
        "evaluate={every: 2, rows: 10, on: both, load_best: true}",
    ],
    "own phases": [
        *SMALL,
        "graph={name: epidemic, fan_out: 2, weights: row}",
        "algorithm={name: tad_lora, switch_every: 1}",
        f"time={{{UNEVEN}, bandwidth_bytes_s: 50000, down: [{{client: 3, from_s: 2, to_s: 9}}]}}",
        "faults=[{edge: [0, 4], rounds: [0, 99]}]",
        "training.reset_optimizer=phase",
        "rounds=6",
    ],
    "common phases": [
        *SMALL,
        "algorithm={name: tad_lora, switch_every: 1}",
        f"time={{{UNEVEN}, phases: common}}",
        "modifiers=[{name: fedspeed}]",
        "graph={name: ring}",
        "rounds=6",
    ],
    "two that meet": [
        *SMALL,
        "algorithm={name: adf_lora, switch_every: 1}",
        f"time={{{UNEVEN}, mixing: pairwise}}",
        "faults=[{edge: [1, 2], rounds: [0, 3]}]",
        "rounds=6",
    ],
    "several ranks": [
        *SMALL,
        "lora.ranks=[2, 2, 6, 4, 6]",
        f"faults={FAULTS}",
        ADAPTIVE,
        "modifiers=[{name: int8}]",
        "time.step_s=[1, 1, 2, 1, 5]",
        "evaluate={every: 1, rows: 10, on: both, load_best: true}",
        "head=trained",
    ],
    "ranks by rows": [
        *SMALL,
        "lora.ranks=[2, 2, 2, 2, 6]",
        "graph={name: ring, activation: 0.7, weights: rows, row_counts: [5, 1, 30, 2, 9]}",
        "algorithm={name: decaf}",
        "modifiers=[{name: half}]",
    ],
    "nothing sent": [*SMALL, "algorithm={name: local}", f"time={{{UNEVEN}}}", "clients=3"],
    **{name: [*SMALL, "graph.activation=1.0", "rounds=2"] for name in SPOILT},
    "far pushed": [*SMALL, "time={mode: asynchronous, step_s: [1, 2, 1.5, 1, 1], latency_s: 0.1}"],
    "far met": [*SMALL, "time={mode: asynchronous, step_s: [1, 2, 1.5, 1, 1], mixing: pairwise}"],
    **{f"faults {name}": [*SMALL, f"algorithm={{name: {name}}}", f"faults={FAULTS}"] for name in ("decaf", "adf_lora")},
}


def as_json(record: RoundRecord) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(replace(record, state=None))))
    del values["state"]
    return values


def assert_close(ours: Any, theirs: Any, where: str) -> None:
    """Hold what JSON can hold against each other, numbers up to rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_close(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_close(*pair, f"{where}[{number}]")
    else:
        assert ours == (pytest.approx(theirs, rel=1e-9, abs=1e-12) if isinstance(theirs, float) else theirs), where


@pytest.fixture(scope="module")
def simulated() -> dict[str, list[RoundRecord]]:
    jobs = {name: build(load_recipe("digits-demo", recipe)).job for name, recipe in RECIPES.items()}
    jobs |= {name: spoilt(jobs[name], value) for name, value in SPOILT.items()}
    records = {name: list(simulate(job)) for name, job in jobs.items()}
    assert records["far"][0].failed_edges == [(0, 4), (1, 4), (2, 4), (3, 4)]
    judged = records["changing"][-1].evaluation
    assert judged is not None
    assert len(judged.heard_ensemble) == len(judged.nll) == len(judged.own_trained) == len(judged.own_heard) == 8
    assert records["apart"][0].not_mixed == [(0, 4), (1, 4), (2, 4), (3, 4)]
    return records


FEW = (
    "decaf",
    "adaptive",
    "choco",
    "changing",
    "push",
    "apart",
    "several ranks",
    "nobody waits",
    "own phases",
    "two that meet",
)
"""Recipes that send, deal, count and gather in each way there is: what the number of processes can matter to."""


@pytest.mark.parametrize(
    ("ranks", "names"), [(1, ("adaptive", "push")), (2, FEW), (3, tuple(RECIPES))], ids=["1", "2", "3"]
)
def test_processes_end_with_the_simulators_adapters_and_records(
    simulated: dict[str, list[RoundRecord]], ranks: int, names: Sequence[str], tmp_path: Path
) -> None:
    played = together(tmp_path / "out", ranks, {name: RECIPES[name] for name in names})
    for name in names:
        records = simulated[name]
        state = records[-1].state
        assert state is not None
        for own, theirs in zip(played[name].adapters, by_client(state.stacks), strict=True):
            assert own.keys() == theirs.keys()
            for tensor, x in theirs.items():
                torch.testing.assert_close(own[tensor], x, rtol=0, atol=1e-12)
        for told in played[name].records:
            assert told == played[name].records[0]
        for record, ours in zip(records, played[name].records[0], strict=True):
            expected = as_json(record)
            assert ours["seconds"].keys() == expected["seconds"].keys()
            assert_close(ours, expected | {"seconds": ours["seconds"]}, f"{name}, round {record.round}")


def test_a_round_on_a_directed_graph_says_who_heard_whom_and_counts_what_each_sent(
    simulated: dict[str, list[RoundRecord]],
) -> None:
    down, each = [{4}, {3, 4}, {0}, set[int]()], {True: 0}
    for record in simulated["epidemic"]:
        off = down[record.round]
        assert record.clients == [client for client in range(5) if client not in off]
        assert record.neighbours == [sum(j == client for _, j in record.edges) for client in record.clients]
        lost = [edge for edge in record.failed_edges if off.isdisjoint(edge)]
        assert {frozenset(edge) for edge in lost} <= ({frozenset((0, 1))} if record.round in (1, 2) else set())
        sent = [sum(i == client for i, _ in [*record.edges, *lost]) for client in record.clients]
        size = max(record.bytes_sent) // max(sent)
        assert record.bytes_sent == [size * count for count in sent]
        each[sent == record.neighbours] = each.get(sent == record.neighbours, 0) + 1
        both = [edge for edge in record.failed_edges if not off.isdisjoint(edge)]
        assert bool(both) == bool(off)
    assert each[False] > 1, "who sends to many need not hear many"
    assert any((j, i) not in record.edges for record in simulated["epidemic"] for i, j in record.edges)


def test_the_mean_over_all_rows_is_kept_where_edges_fail(simulated: dict[str, list[RoundRecord]]) -> None:
    kept, _, _, last = simulated["ring"]
    for record in (kept, last):
        assert record.edges
        assert record.diagnostics["mean_drift"] < 1e-12
        assert 0 < record.diagnostics["contraction_B"] < 1


def test_mass_is_kept_where_clients_are_down_and_messages_are_lost(simulated: dict[str, list[RoundRecord]]) -> None:
    state = simulated["push"][-1].state
    assert state is not None
    for kind in ("A", "B", "head"):
        own, late = state.memory[f"push.{kind}.weight"], state.memory[f"push.{kind}.late"]
        assert float(own.sum() + late.sum()) == pytest.approx(5, abs=1e-12)
    assert {(0, 1), (1, 0)} & set(simulated["push"][1].failed_edges), "something was under way"


def test_a_stage_takes_as_long_as_in_its_slowest_process(simulated: dict[str, list[RoundRecord]]) -> None:
    class Slower(Group):
        """Another process, which takes twice as long to train and half as long to mix."""

        def gather(self, value: Any) -> list[Any]:
            slow = {stage: s * {"train": 2.0, "mix": 0.5}.get(stage, 1.0) for stage, s in value["seconds"].items()}
            return [value, value | {"seconds": slow}]

    own = simulated["ring"][0]
    assert min(own.seconds.values()) > 0
    assert _merged(own, Slower()).seconds == own.seconds | {"train": 2 * own.seconds["train"]}


def test_what_is_sent_within_processes_goes_nowhere() -> None:
    payload = {"x.A": torch.ones(2, 1, 1)}
    senders, came = _carry([0, 0, 0, 1, 1], Some(0, 2), payload, {0: [1, 2], 2: [], 4: [3]})
    assert senders == [0, 2]
    assert came is payload, "no other process was asked for anything"


class Some(Group):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_clients_are_dealt_evenly_to_neighbouring_processes() -> None:
    assert [list(share(7, Some(rank, 3))) for rank in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [list(share(3, Some(rank, 3))) for rank in range(3)] == [[0], [1], [2]]
    with pytest.raises(RunError, match="clients: 7, for 8 processes; start 7 at most"):
        share(7, Some(0, 8))
