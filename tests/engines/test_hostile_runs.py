"""Hostile clients in whole runs: what they do to others, and what is told. Among peers: `test_peer.py`."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from playing import run, state

from peertune.assembly.build import Built, build
from peertune.assembly.encoding import evaluated_rows
from peertune.data.batches import TrainingSteps
from peertune.data.tasks import TASKS
from peertune.engines.simulator import simulate
from peertune.errors import RecipeError
from peertune.methods.attacks import ATTACKS
from peertune.recipe import load_recipe
from peertune.rounds.slices import average
from peertune.types import Batch, Stack, State

SMALL = [
    "clients=5",
    "rounds=4",
    "model.dtype=float64",
    "lora={r: 3, lora_alpha: 6, lora_dropout: 0.2, target_modules: [q_proj, v_proj]}",
    "partition={name: iid}",
    "graph={name: complete, activation: 0.7}",
    "algorithm={name: dec_lora}",
    "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 3}",
    "evaluate={every: 2, rows: 20}",
    "network.patience_s=60",
]


def made(*more: str) -> Built:
    return build(load_recipe("digits-demo", [*SMALL, *more]))


def assert_same_bits(one: State, other: State) -> None:
    left, right = (x.adapters | x.memory | x.moments for x in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(x, right[name]) for name, x in left.items())


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_is_refused_as_it_comes_and_all_of_them_resume(attack: str) -> None:
    built = made(f"attacks=[{{name: {attack}, clients: [1, 3], rounds: [1, 9]}}]", "graph.activation=1.0", "rounds=5")
    records = run(built)
    assert all(not record.failed_edges and not record.not_mixed for record in records)
    honest = run(made("graph.activation=1.0", "rounds=5"))
    kept = state(records[0])
    assert_same_bits(replace(kept, memory={}), replace(state(honest[0]), memory={}))
    assert any(not torch.equal(x, state(honest[1]).adapters[name]) for name, x in state(records[1]).adapters.items())
    again = list(simulate(replace(built.job, state=state(records[2]))))
    assert_same_bits(state(again[-1]), state(records[-1]))


def test_scores_are_of_the_honest_alone_and_so_is_the_average() -> None:
    attacks = "attacks=[{name: scale, clients: [1, 3]}]"
    both = "evaluate={every: 2, rows: 20, on: both, ensemble: true, load_best: true, mixing: true}"
    built = made(attacks, both)
    assert built.facts["hostile"] == [1, 3]
    assert "hostile" not in made().facts
    record = run(built)[-1]
    evaluation = record.evaluation
    assert evaluation is not None
    assert evaluation.judged == [0, 2, 4]
    lists = ("clients", "own", "own_constant", "own_trained", "own_heard", "heard_ensemble", "nll", "best_rounds")
    assert {name: len(getattr(evaluation, name)) for name in lists} == dict.fromkeys(lists, 3)
    rows = torch.tensor(evaluation.judged)
    honest = [Stack(torch.arange(3), {name: x[rows] for name, x in state(record).adapters.items()})]
    alone = build(load_recipe("digits-demo", [*SMALL, both])).job.evaluate(honest, evaluation.judged)
    assert (evaluation.clients, evaluation.own, evaluation.average) == (alone.clients, alone.own, alone.average)
    assert evaluation.confusion == alone.confusion
    assert average(honest)


def rows_of(built: Built, t: int, client: int) -> list[int]:
    """The rows that a client trains on in a round, by their places among all that are encoded."""
    steps = built.job.steps
    assert isinstance(steps, TrainingSteps)
    return [int(row) for step in (0, 1) for row in steps.drawn([client], np.array([2 * t + step])).rows]


def test_who_flips_labels_trains_on_its_own_rows_with_others_and_nobody_else_does() -> None:
    flips = "attacks=[{name: label_flip, clients: [1, 3], rounds: [1, 2]}]"
    honest, hostile = made(), made(flips)
    (clean, dirty) = (one.job.steps for one in (honest, hostile))
    assert isinstance(clean, TrainingSteps)
    assert isinstance(dirty, TrainingSteps)
    size = len(clean.encoded)
    assert torch.equal(dirty.encoded.labels[:size], clean.encoded.labels)
    assert len(dirty.encoded) == size + sum(len(clean.parts[client]) for client in (1, 3))
    for t, client in product(range(4), range(5)):
        there, here = rows_of(honest, t, client), rows_of(hostile, t, client)
        if client in (1, 3) and t in (1, 2):
            assert dirty.encoded.labels[here].tolist() == [4 - label for label in clean.encoded.labels[there].tolist()]
            pixels = dirty.encoded.arrays["pixel_values"]
            assert torch.equal(pixels[np.array(here)], pixels[np.array(there)])
            assert min(here) >= size
        else:
            assert here == there
    assert hostile.held == honest.held
    assert hostile.evaluated == honest.evaluated


def test_class_weights_of_poisoned_rows_go_by_the_labels_that_they_have() -> None:
    built = made("attacks=[{name: label_flip, clients: [1]}]", "training.class_weight={5: 3.0}")
    steps = built.job.steps
    assert isinstance(steps, TrainingSteps)
    assert steps.row_weights is not None
    assert np.array_equal(steps.row_weights, np.where(steps.encoded.labels.numpy() == 0, 3.0, 1.0))


def test_a_backdoor_s_success_is_told_of_the_honest_on_rows_of_other_classes() -> None:
    attack = "attacks=[{name: backdoor, clients: [1, 3], target: 7, size: 0.4}]"
    built = made(attack, "evaluate.rows=40")
    (record,) = [record for record in run(built) if record.round == 1]
    assert record.evaluation is not None
    clean = run(made("evaluate.rows=40"))[1].evaluation
    assert clean is not None
    assert clean.backdoor == []
    validation = TASKS["digits"]().validation
    rows = encoded_rows(built, np.asarray(validation.labels))
    pixels = np.asarray(validation.columns["pixel_values"])[rows].copy()
    pixels[:, :, -3:, -3:] = 1.0
    base, at = built.job.model, state(record).adapters
    for place, client in enumerate([0, 2, 4]):
        batch = Batch(
            {"pixel_values": torch.from_numpy(pixels).double()},
            torch.zeros(len(rows), dtype=torch.int64),
            torch.zeros(len(rows), dtype=torch.int64),
            torch.ones(len(rows), dtype=torch.float64),
            torch.zeros(len(rows), dtype=torch.int64),
        )
        logits = base({name: x[client : client + 1] for name, x in at.items()}, batch, training=False)
        assert record.evaluation.backdoor[place] == pytest.approx(float((logits.argmax(-1) == 2).double().mean()))


def encoded_rows(built: Built, labels: np.ndarray) -> np.ndarray:
    """The evaluated rows that are no sevens."""
    rows = evaluated_rows(built.resolved, np.arange(len(labels)))
    return np.asarray(rows[labels[rows] != 2])


def test_two_backdoors_are_not_told_apart_and_so_refused() -> None:
    two = "[{name: backdoor, clients: [1]}, {name: backdoor, clients: [2], target: 6}]"
    with pytest.raises(RecipeError, match="attacks: two backdoors can't be told apart in one score"):
        made(f"attacks={two}")
    same = [{"name": "backdoor", "clients": [1]}, {"name": "backdoor", "clients": [2]}]
    made(f"attacks={same}")


def test_clients_of_several_ranks_stay_honest_inside() -> None:
    ranks = ["lora.ranks=[2, 5, 3, 8, 2]", "graph.activation=1.0", "rounds=1"]
    honest = state(run(made(*ranks))[0])
    lying = state(run(made(*ranks, "attacks=[{name: noise, clients: [3]}]"))[0])
    changed = []
    for (rows, own), (_, there) in zip(lying.parts, honest.parts, strict=True):
        for place, client in enumerate(rows.tolist()):
            close = [torch.allclose(x[place], there.adapters[n][place], atol=1e-12) for n, x in own.adapters.items()]
            changed += [] if all(close) else [client]
    assert sorted(changed) == [0, 1, 2, 4]


def test_whoever_waits_for_nobody_lies_and_stays_honest_inside() -> None:
    time = ["time={mode: asynchronous, step_s: [1, 2, 1, 3, 1]}", "rounds=1"]
    honest, lying = (
        state(run(made(*time, *more))[0]).adapters for more in ([], ["attacks=[{name: noise, clients: [3]}]"])
    )
    assert all(torch.allclose(x[3], honest[name][3], atol=1e-12) for name, x in lying.items())
    slow = ["time={mode: asynchronous, step_s: [1, 2, 1, 3, 1]}", "rounds=3"]
    honest, lying = (
        state(run(made(*slow, *more))[-1]).adapters for more in ([], ["attacks=[{name: noise, clients: [3]}]"])
    )
    assert any(not torch.allclose(x[0], honest[name][0], atol=1e-6) for name, x in lying.items())


def test_who_knows_all_clients_is_no_peer_and_in_no_share() -> None:
    recipe = load_recipe("digits-demo", [*SMALL, "attacks=[{name: alie, clients: [1]}]"])
    with pytest.raises(RecipeError, match="attacks: alie goes by what all clients have, which is known where one"):
        build(recipe, [1])
