"""Clients' own models on the common validation set, and on rows that each holds out for itself."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from peertune import build, load_recipe, simulate
from peertune.assembly.encoding import evaluated_rows
from peertune.assembly.registry import build_parts, hold_out
from peertune.data.scores import accuracy, calibration_error, log_loss
from peertune.data.tasks import TASKS
from peertune.errors import RecipeError
from peertune.recipe import Recipe
from peertune.report.tables import summarise
from peertune.rounds.record import Evaluation
from peertune.types import Batch

SMALL = (
    "clients=5",
    "rounds=2",
    "graph={name: ring}",
    "partition={name: writers}",
    "training={learning_rate: 5e-3, local_steps: 3, per_device_train_batch_size: 8}",
    "evaluate.every=2",
)
BOTH = ("evaluate.on=both", "evaluate.rows=30")


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
    train, held_out = hold_out(asked, rows)
    assert [len(held_out[client]) for client in rows] == list(counts)
    for client, own in rows.items():
        assert np.array_equal(np.sort(np.concatenate([train[client], held_out[client]])), own)
        alone = hold_out(asked, {client: own})
        assert np.array_equal(alone[1][client], held_out[client]), "a peer draws what the simulator does"
    assert hold_out(recipe(), rows) == (rows, {})
    other = hold_out(recipe("seed=1", "evaluate.on=own", f"evaluate.held_out={share}"), rows)[1]
    assert not np.array_equal(other[2], held_out[2])


def test_each_client_is_judged_on_its_own_rows_and_on_the_common_ones() -> None:
    both, adapters, asked = last(*BOTH)
    own, same, _ = last("evaluate.on=own")
    for name, x in adapters.items():
        assert torch.equal(x, same[name])
    assert own == Evaluation(both.metric, both.own, None, own.rows, [], both.own)
    assert len(both.clients) == len(both.own) == 5
    assert both.rows == 30
    assert both.average is not None
    # one client by itself, its rows as the validation set
    parts = build_parts(asked)
    assert own.rows == sum(map(len, parts.held_out.values()))
    for client, rows in parts.held_out.items():
        adapter = {name: x[client : client + 1] for name, x in adapters.items()}
        alone = build(asked, [client]).job.evaluate(adapter, [client])
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


def test_probabilities_are_judged_each_by_itself_and_together() -> None:
    evaluation, adapters, asked = last(*BOTH, "evaluate.ensemble=true", "partition={name: disjoint_labels}", "rounds=4")
    run = build(asked)
    task, rows = TASKS["digits"](), evaluated_rows(asked, np.arange(180))
    labels, model = task.validation.labels[rows], run.job.model
    images = torch.tensor(np.asarray(task.validation.columns["pixel_values"])[rows])
    found = []
    for client in range(5):
        single = {name: x[client : client + 1] for name, x in adapters.items()}
        places = torch.zeros(len(rows), dtype=torch.int64)
        batch = Batch({"pixel_values": images}, torch.tensor(labels), places, torch.ones(len(rows)), places)
        found.append(model(single, batch, training=False).detach().double().softmax(-1).numpy())
    each = np.stack(found)  # [K, N, C]
    own = each[:, np.arange(len(rows)), labels]
    assert evaluation.nll == pytest.approx((-np.log(own)).mean(1), rel=1e-5)
    assert evaluation.ensemble == accuracy(each.mean(0).argmax(-1), labels)
    surest = each.max(-1).argmax(0)
    assert evaluation.route == accuracy(each[surest, np.arange(len(rows))].argmax(-1), labels)
    assert evaluation.ece == pytest.approx([calibration_error(one, labels) for one in each], abs=1e-5)
    assert len({round(x, 6) for x in evaluation.ece}) > 1
    alone = build(asked, [1]).job.evaluate({name: x[1:2] for name, x in adapters.items()}, [1])
    assert (alone.ensemble, alone.route) == (None, None)
    assert alone.nll == pytest.approx(evaluation.nll[1:2])


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
            ["evaluate.held_out=0.3"],
            r"^digits-demo: evaluate\.held_out: with evaluate\.on=common nobody holds out rows",
        ),
        (["evaluate.on=all"], "evaluate.on: input should be 'common', 'own' or 'both'"),
        (
            ["evaluate.on=own", "clients=716", "partition={name: iid}"],
            r"^evaluate\.on: client 0 has one row and can hold out none; use evaluate\.on=common, or fewer clients$",
        ),
    ],
)
def test_what_can_not_be_held_out_is_refused(settings: list[str], line: str) -> None:
    with pytest.raises(RecipeError, match=line):
        build_parts(recipe(*settings))
