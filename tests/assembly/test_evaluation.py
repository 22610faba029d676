"""Clients' own models on the common validation set, and on rows that each holds out for itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from peertune import build, load_recipe, simulate
from peertune.assembly.build import Built
from peertune.assembly.encoding import evaluated_rows
from peertune.assembly.registry import build_parts, hold_out
from peertune.data.partition import fold
from peertune.data.scores import accuracy, calibration_error, log_loss
from peertune.data.tasks import TASKS
from peertune.errors import RecipeError
from peertune.recipe import Recipe
from peertune.report.tables import summarise
from peertune.rounds.job import Heard, Refuse
from peertune.rounds.mixing import exchanged
from peertune.rounds.record import SCORES_OF_CLIENTS, Evaluation
from peertune.rounds.round import run_rounds
from peertune.types import Batch, Group, Stack, Tensors, kind, only, stacked, take

SMALL = (
    "clients=5",
    "rounds=2",
    "graph={name: ring}",
    "partition={name: writers}",
    "training={learning_rate: 5e-3, local_steps: 3, per_device_train_batch_size: 8}",
    "evaluate.every=2",
)
BOTH = ("evaluate.on=both", "evaluate.rows=30")
SEVERAL = "task.metric=[accuracy, macro_f1, {name: f1, of: 8}]"


def recipe(*more: str) -> Recipe:
    return load_recipe("digits-demo", [*SMALL, *more])


def last(*more: str) -> tuple[Evaluation, dict[str, torch.Tensor], Recipe]:
    asked = recipe(*more)
    *_, record = simulate(build(asked).job)
    assert record.evaluation is not None
    assert record.state is not None
    return record.evaluation, record.state.adapters, asked


@pytest.mark.parametrize(("share", "counts"), [(0.2, [1, 2, 20]), (0.9, [1, 9, 90]), (0.01, [1, 1, 1])])
def test_clients_hold_out_a_share_of_their_rows_and_train_on_the_others(share: float, counts: Sequence[int]) -> None:
    rows = {client: np.arange(100, 100 + size) for client, size in enumerate((2, 10, 100))}
    asked = recipe("evaluate.on=both", f"evaluate.held_out={share}")
    train, held_out = hold_out(asked, rows, 200)
    assert [len(held_out[client]) for client in rows] == list(counts)
    for client, own in rows.items():
        assert np.array_equal(np.sort(np.concatenate([train[client], held_out[client]])), own)
        alone = hold_out(asked, {client: own}, 200)
        assert np.array_equal(alone[1][client], held_out[client]), "a peer draws what the simulator does"
    assert hold_out(recipe(), rows, 200) == (rows, {})
    other = hold_out(recipe("seed=1", "evaluate.on=own", f"evaluate.held_out={share}"), rows, 200)[1]
    assert not np.array_equal(other[2], held_out[2])


def test_a_row_is_in_the_same_fold_in_every_run_and_one_set_aside_is_nobodys() -> None:
    folds = [fold(f"{k}/5", 103) for k in range(1, 6)]
    assert np.array_equal(np.sort(np.concatenate(folds)), np.arange(103))
    assert {len(part) for part in folds} == {20, 21}
    assert not np.array_equal(folds[0], np.arange(0, 103, 5)), "rows next to each other are often alike"

    rows = {0: np.arange(40), 1: np.arange(40, 103)}
    asked = recipe("evaluate={on: own, held_out: 2/5, set_aside: 5/5}", "seed=0")
    train, held_out = hold_out(asked, rows, 103)
    for client, own in rows.items():
        assert np.array_equal(held_out[client], np.intersect1d(own, folds[1]))
        assert np.array_equal(train[client], np.setdiff1d(own, np.concatenate([folds[1], folds[4]])))
    again = hold_out(recipe("evaluate={on: both, held_out: 2/5}", "seed=1"), {1: rows[1]}, 103)
    assert np.array_equal(again[1][1], held_out[1]), "whatever the seed, and at a peer"
    assert np.array_equal(again[0][1], np.setdiff1d(rows[1], folds[1]))


def test_a_fold_of_the_validation_set_is_all_that_is_used_of_it() -> None:
    runs = [build(recipe(f"evaluate.fold={k}/3")) for k in (1, 2, 3)]
    counts = [run.validation for run in runs]
    assert [run.evaluated for run in runs] == counts
    assert [sum(each) for each in counts] == [60, 60, 60]
    assert [sum(label) for label in zip(*counts, strict=True)] == build(recipe()).validation
    few = build(recipe("evaluate={fold: 1/3, rows: 10}"))
    assert (sum(few.validation), sum(few.evaluated)) == (60, 10)


def test_each_client_is_judged_on_its_own_rows_and_on_the_common_ones() -> None:
    both, adapters, asked = last(*BOTH)
    own, same, _ = last("evaluate.on=own")
    for name, x in adapters.items():
        assert torch.equal(x, same[name])
    alone = Evaluation(both.metric, both.own, None, own.rows, [], both.own)
    assert own == replace(alone, own_constant=both.own_constant, confusion=own.confusion)
    assert np.sum(own.confusion) == own.rows
    assert len(both.clients) == len(both.own) == 5
    assert both.rows == 30
    assert both.average is not None
    # one client by itself, its rows as the validation set
    parts = build_parts(asked)
    assert own.rows == sum(map(len, parts.held_out.values()))
    for client, rows in parts.held_out.items():
        adapter = {name: x[client : client + 1] for name, x in adapters.items()}
        alone = build(asked, [client]).job.evaluate(stacked(adapter), [client])
        counts = np.bincount(parts.task.train.labels[rows])
        assert alone.own_constant == [both.own_constant[client]] == [counts.max() / len(rows)]
        assert (alone.own, alone.clients) == ([both.own[client]], [both.clients[client]])
        assert both.own[client] * len(rows) == pytest.approx(round(both.own[client] * len(rows)))


def test_own_rows_tell_apart_what_common_ones_do_not() -> None:
    """Each client knows two of the classes alone: its own model is good at these and at nothing else."""
    one_class = "partition={name: disjoint_labels}"
    evaluation, _, _ = last(one_class, *BOTH, "algorithm.name=local", "rounds=6")
    assert min(evaluation.own) > 0.9
    assert max(evaluation.clients) < 0.5


def test_rows_held_out_are_counted_and_their_mean_is_a_measure() -> None:
    run = build(recipe("evaluate.on=own"))
    task = TASKS["digits"]()
    assert sum(run.evaluated) + sum(sum(row) for row in run.held) == len(task.train)
    (record,) = [each for each in simulate(run.job) if each.evaluation]
    evaluation = record.evaluation
    assert evaluation is not None
    line = {
        "round": 1,
        "evaluation": vars(evaluation),
        "diagnostics": {},
        "clients": [0],
        "bytes_sent": [0],
        "seconds": {},
    }
    row = summarise([line])
    assert run.facts["evaluated"] == {"rows": sum(run.evaluated), "labels": []}, "no class is common to all rows"
    assert row["own"] == row["mean"] == pytest.approx(np.mean(evaluation.own))
    assert "average" not in row


class Found(NamedTuple):
    of_classes: NDArray[np.float64]  # [N, C]
    labels: NDArray[np.int64]  # [N]


def probabilities(run: Built, single: Tensors) -> Found:
    """What a single adapter's model says of the evaluated rows, all in one batch."""
    task, rows = TASKS["digits"](), evaluated_rows(run.resolved, np.arange(180))
    labels = task.validation.labels[rows]
    images = torch.tensor(np.asarray(task.validation.columns["pixel_values"])[rows])
    places = torch.zeros(len(rows), dtype=torch.int64)
    batch = Batch({"pixel_values": images}, torch.tensor(labels), places, torch.ones(len(rows)), places)
    return Found(run.job.model(single, batch, training=False).detach().double().softmax(-1).numpy(), labels)


def test_probabilities_are_judged_each_by_itself_and_together() -> None:
    evaluation, adapters, asked = last(*BOTH, "evaluate.ensemble=true", "partition={name: disjoint_labels}", "rounds=4")
    run = build(asked)
    found = [probabilities(run, take(adapters, slice(client, client + 1))) for client in range(5)]
    labels = found[0].labels
    each = np.stack([one.of_classes for one in found])  # [K, N, C]
    own = each[:, np.arange(len(labels)), labels]
    assert evaluation.nll == pytest.approx((-np.log(own)).mean(1), rel=1e-5)
    assert evaluation.ensemble == accuracy(each.mean(0).argmax(-1), labels)
    surest = each.max(-1).argmax(0)
    assert evaluation.route == accuracy(each[surest, np.arange(len(labels))].argmax(-1), labels)
    assert evaluation.ece == pytest.approx([calibration_error(one, labels) for one in each], abs=1e-5)
    assert len({round(x, 6) for x in evaluation.ece}) > 1
    alone = build(asked, [1]).job.evaluate(stacked({name: x[1:2] for name, x in adapters.items()}), [1])
    assert (alone.ensemble, alone.route) == (None, None)
    assert alone.nll == pytest.approx(evaluation.nll[1:2])


ENSEMBLE = (*BOTH, "evaluate={ensemble: true, every: 1}", "partition={name: disjoint_labels}", "training.local_steps=9")


@pytest.mark.parametrize(
    ("method", "sent"),
    [("dec_lora", {"A", "B", "head"}), ("fedsa_lora", {"A"}), ("rolora", {"B", "head"}), ("local", set())],
)
def test_a_client_and_those_it_heard_are_judged_together_as_they_were_sent(method: str, sent: set[str]) -> None:
    run = build(recipe(*ENSEMBLE, f"algorithm={{name: {method}}}", "faults=[{edge: [0, 1], rounds: [0, 9]}]"))
    before: list[Tensors] = []

    def exchange(clients: Sequence[int], told: Sequence[Stack], t: int, refuse: Refuse) -> Heard:
        payload = only(told)
        assert set(map(kind, payload)) == sent
        before.append({name: x.clone() for name, x in payload.items()})
        return exchanged(run.job, clients, clients, stacked(payload), t, refuse)

    record = next(run_rounds(run.job, exchange))
    assert record.evaluation is not None
    assert record.state is not None
    scores = []
    for client in range(5):
        near = sorted({client, *(i + j - client for i, j in record.edges if client in (i, j))})
        assert len(near) == (1 if method == "local" else 2 if client < 2 else 3)
        own = take(record.state.adapters, slice(client, client + 1))  # as before mixing, of kinds that weren't sent
        found = [probabilities(run, own | take(before[0], slice(other, other + 1))) for other in near]
        mean = np.mean([one.of_classes for one in found], axis=0)
        scores.append(accuracy(mean.argmax(-1), found[0].labels))
    assert record.evaluation.heard_ensemble == scores
    assert (scores == record.evaluation.clients) == (method == "local")
    line = {"round": 0, "evaluation": vars(record.evaluation), "diagnostics": {}, "clients": [0], "bytes_sent": [0]}
    assert summarise([line | {"seconds": {}}])["heard_ensemble"] == pytest.approx(np.mean(scores))


MIXING = ("evaluate={on: own, held_out: 0.4, mixing: true, every: 1}", "training.local_steps=9")


@pytest.mark.parametrize(
    ("method", "sent"), [("dec_lora", {"A", "B", "head"}), ("fedsa_lora", {"A"}), ("local", set())]
)
def test_a_client_judges_on_its_own_rows_what_it_trained_what_it_mixed_and_the_mean_of_what_it_heard(
    method: str, sent: set[str]
) -> None:
    down = "faults=[{edge: [0, 1], rounds: [0, 9]}, {edge: [0, 4], rounds: [0, 9]}]"  # client 0 hears nobody
    run = build(recipe(*BOTH, *MIXING, f"algorithm={{name: {method}}}", down))
    before: list[Tensors] = []

    def exchange(clients: Sequence[int], told: Sequence[Stack], t: int, refuse: Refuse) -> Heard:
        payload = only(told)
        before.append({name: x.clone() for name, x in payload.items()})
        return exchanged(run.job, clients, clients, stacked(payload), t, refuse)

    record = next(run_rounds(run.job, exchange))
    state, found = record.state, record.evaluation
    assert state is not None
    assert found is not None
    assert set(map(kind, before[0])) == sent
    trained = {name: before[0].get(name, x) for name, x in state.adapters.items()}
    heard = {name: x.clone() for name, x in trained.items()}
    for client in range(5):
        near = [i + j - client for i, j in record.edges if client in (i, j)]
        assert bool(near) == (bool(client) and method != "local")
        for name in before[0] if near else ():
            heard[name][client] = before[0][name][near].mean(0)
    assert found.own_trained == run.job.evaluate(stacked(trained), range(5)).own
    assert found.own == run.job.evaluate(state.stacks, range(5)).own
    assert found.own_heard == run.job.evaluate(stacked(heard), range(5)).own
    assert (found.own_heard == found.own_trained) == (method == "local")
    line = {"round": 0, "evaluation": vars(found), "diagnostics": {}, "clients": [0], "bytes_sent": [0], "seconds": {}}
    row = summarise([line])
    assert row["own_heard"] == pytest.approx(np.mean(found.own_heard))
    assert row[row["best_of_own"]] == max(row["own"], row["own_trained"], row["own_heard"])
    assert "best_of_own" not in summarise([line | {"evaluation": vars(found) | {"own_heard": []}}])


def test_who_is_asked_for_probabilities_or_several_metrics_goes_through_the_base_once() -> None:
    passes = []
    for setting in ("evaluate.ensemble=false", "evaluate.ensemble=true", SEVERAL):
        job = build(recipe(*BOTH, setting)).job
        rows: list[int] = []
        job.model.base.register_forward_pre_hook(
            lambda _, given, named, rows=rows: rows.append(len(named["pixel_values"])), with_kwargs=True
        )
        job.evaluate(job.state.stacks, job.clients)
        passes.append(sum(rows))
    assert passes[0] == passes[1] == passes[2] > 6 * 30  # five clients and their average, and each client's own rows


def test_several_metrics_are_what_each_is_by_itself() -> None:
    start = build(recipe()).job.state.adapters
    noise = torch.Generator().manual_seed(0)
    adapters = {name: x + 0.1 * torch.randn(x.shape, generator=noise) for name, x in start.items()}

    def judged(metric: str) -> Evaluation:
        job = build(recipe(*BOTH, metric, "evaluate.ensemble=true", "partition={name: disjoint_labels}")).job
        return job.evaluate(stacked(adapters), job.clients)

    several = judged(SEVERAL)
    metrics = ("accuracy", "macro_f1", "{name: f1, of: 8}")
    assert [one.metric for one in (several, *several.also)] == ["accuracy", "macro_f1", "f1 of 8"]
    for one, metric in zip((several, *several.also), metrics, strict=True):
        alone = judged(f"task.metric={metric}")
        assert len({*alone.clients}) > 2
        for name in ("clients", "average", "own", "constant", "own_constant", "ensemble", "route", "rows"):
            assert getattr(one, name) == getattr(alone, name), (metric, name)
        assert alone.confusion == several.confusion
    counts = np.array(several.confusion)  # of five clients on the same thirty rows
    assert counts.sum() == 5 * 30
    assert counts.trace() / counts.sum() == pytest.approx(np.mean(several.clients))
    assert several.constant == counts.sum(1).max() / counts.sum()


def test_classes_are_counted_up_to_a_number_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peertune.assembly.evaluation.MOST_CLASSES", 4)
    job = build(recipe(*BOTH)).job
    assert job.evaluate(job.state.stacks, job.clients).confusion == []


class First(Group):
    """A process of two; the other has a client that is up, and judges the average."""

    size = 2

    def add(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_process_whose_clients_are_all_down_has_nothing_to_add() -> None:
    job = build(recipe(*BOTH, "evaluate.ensemble=true"), [0, 1], group=First()).job
    nobody = take(job.state.adapters, slice(0, 0))
    found = job.evaluate(stacked(nobody), [])
    assert [getattr(found, name) for name in SCORES_OF_CLIENTS] == [[]] * len(SCORES_OF_CLIENTS)
    assert found.average is None
    assert job.ensembles is not None
    assert job.ensembles(nobody, Heard([], torch.zeros(0, 0), [], []), []) == [[]]


def test_a_temperature_is_refused_where_nothing_is_generated() -> None:
    with pytest.raises(RecipeError, match=r"^evaluate\.temperature: nothing is generated for the metric accuracy; "):
        build(recipe("evaluate.temperature=0.5"))


def test_calibration_errors_of_small_examples() -> None:
    sure = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.65, 0.35]])
    labels = np.array([0, 1, 1, 0])
    # two rows said with .95, of which one is right; two with .65, of which both are
    assert calibration_error(sure, labels) == pytest.approx((2 * abs(0.95 - 0.5) + 2 * abs(0.65 - 1)) / 4)
    assert calibration_error(np.eye(2)[labels], labels) == 0
    assert log_loss(sure, labels) == pytest.approx(-np.log([0.95, 0.05, 0.65, 0.65]).mean())
    assert np.isfinite(log_loss(np.eye(2)[1 - labels], labels))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            ["evaluate={on: own, ensemble: true}"],
            "evaluate.ensemble: is of rows that all have, and evaluate",
        ),
        (
            ["evaluate.mixing=true"],
            "evaluate.mixing: is of rows that clients hold out, and evaluate.on=common has none",
        ),
        (
            ["evaluate.held_out=0.3"],
            r"^digits-demo: evaluate\.held_out: with evaluate\.on=common nobody holds out rows",
        ),
        (["evaluate.on=all"], "evaluate.on: input should be 'common', 'own' or 'both'"),
        (
            ["evaluate.on=own", "clients=716", "partition={name: iid}"],
            r"^evaluate\.on: client 0 has one row and can hold out none; use evaluate\.on=common, or fewer clients$",
        ),
        (
            ["evaluate={on: own, held_out: 6/5}"],
            r"evaluate\.held_out: input should be a fold k/n, k from 1 to n.*'6/5'$",
        ),
        (["evaluate={on: own, held_out: 1.5}"], r"evaluate\.held_out: input should be a share above 0 and below 1"),
        (["evaluate.fold=1/1"], r"evaluate\.fold: input should be a fold k/n"),
        (
            ["evaluate={on: own, fold: 1/2}"],
            r"evaluate\.fold: is of the validation set, and evaluate\.on=own takes none",
        ),
        (
            ["evaluate={on: own, set_aside: 1/5}"],
            r"evaluate\.set_aside: 1/5 .* and evaluate\.held_out is 0\.2; give such",
        ),
        (["evaluate={on: own, held_out: 1/5, set_aside: 1/5}"], r"evaluate\.set_aside: .*held_out is 1/5; give such"),
        (["evaluate={on: own, held_out: 1/5, set_aside: 2/4}"], r"evaluate\.set_aside: .*held_out is 1/5; give such"),
        (["evaluate.set_aside=1/5"], r"evaluate\.set_aside: "),
        (
            ["evaluate={on: own, held_out: 1/300}"],
            r"^evaluate\.held_out: client \d has \d rows in fold 1/300 and \d+ to train on; use fewer folds",
        ),
    ],
)
def test_what_can_not_be_held_out_is_refused(settings: list[str], line: str) -> None:
    with pytest.raises(RecipeError, match=line):
        build_parts(recipe(*settings))
