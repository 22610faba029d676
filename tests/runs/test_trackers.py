from dataclasses import replace
from pathlib import Path

import pytest

from peertune.assembly.build import build
from peertune.assembly.registry import check_choices
from peertune.errors import RecipeError
from peertune.recipe import Choice, Recipe, load_recipe
from peertune.rounds.record import Evaluation, RoundRecord
from peertune.runs import trackers

RECORD = RoundRecord(
    round=2,
    train=["B"],
    send=["A", "B"],
    clients=[0, 1],
    loss=[0.5, 1.5],
    grad_norm=[1.0, 2.0],
    bytes_sent=[10, 20],
    neighbours=[1, 1],
    edges=[(0, 1)],
    failed_edges=[],
    out_of_phase=[],
    neighbourhood_cross_term=[0.0, 0.0],
    diagnostics={"cross_term": 0.25},
    seconds={},
    evaluation=Evaluation(
        "accuracy",
        [0.25, 0.75],
        0.625,
        8,
        [0.5, 1.0],
        constant=0.375,
        also=[Evaluation("macro_f1", [0.5, 1.0], None, 8, [], own=[0.25, 0.75], own_constant=[0.25, 0.5])],
    ),
)


def recipe(*trackers: str) -> Recipe:
    return load_recipe("digits-demo", [f"report_to=[{', '.join(trackers)}]", "training.local_steps=7"])


def test_what_is_logged_has_the_trainers_names() -> None:
    found = trackers.values(RECORD)
    assert found == {
        "train/round": 2,
        "train/loss": 1.0,
        "train/grad_norm": 1.5,
        "train/bytes_sent": 30,
        "train/edges": 1,
        "train/cross_term": 0.25,
        "eval/accuracy": 0.5,
        "eval/accuracy_min": 0.25,
        "eval/accuracy_max": 0.75,
        "eval/accuracy_average": 0.625,
        "eval/accuracy_constant": 0.375,
        "eval/macro_f1": 0.75,
        "eval/macro_f1_min": 0.5,
        "eval/macro_f1_max": 1.0,
        "eval/macro_f1_own": 0.5,
        "eval/macro_f1_own_constant": 0.375,
    }
    assert not [name for name in trackers.values(replace(RECORD, evaluation=None)) if name.startswith("eval/")]


def test_tensorboard_gets_every_round_by_local_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with trackers.reporting(tmp_path, recipe("tensorboard")) as report:
        for t in range(3):
            report(replace(RECORD, round=t, loss=[t, t]))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(trackers.values(RECORD)) <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(7, 0.0), (14, 1.0), (21, 2.0)]
    assert "recipe/training.local_steps/text_summary" in events.Tags()["tensors"]


def test_nothing_is_opened_where_nothing_is_asked_for(tmp_path: Path) -> None:
    with trackers.reporting(tmp_path, recipe()) as report:
        report(RECORD)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with trackers.reporting(tmp_path / "file", recipe("tensorboard")) as report:
        report(RECORD)
    (message,) = caplog.messages
    assert message.startswith("report_to: tensorboard failed and is left out from here on (")


def test_a_tracker_that_is_not_installed_is_named_before_the_run() -> None:
    trackers.check(["tensorboard"])
    with pytest.raises(RecipeError, match="report_to: wandb is not installed; pip install wandb, or take it out"):
        trackers.check(["wandb"])
    for early in (build, check_choices):
        with pytest.raises(RecipeError, match="report_to: wandb is not installed"):
            early(recipe("wandb").model_copy(update={"task": Choice(name="text", path="not/there")}))
