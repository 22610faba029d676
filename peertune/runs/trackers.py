"""Experiment trackers that users have already: TensorBoard, Weights & Biases, MLflow, Trackio.

The tracking is Accelerate's; the names of what is logged are those of Hugging Face's Trainer, `train/loss` and
`eval/accuracy`, each by the number of local steps that a client has done.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from peertune.errors import RecipeError
from peertune.recipe import Recipe, Tracker, flat
from peertune.rounds.record import RoundRecord

log = logging.getLogger(__name__)

PROJECT = "peertune"
"""What a tracker files the runs under."""


def check(names: Sequence[str]) -> None:
    """Raise RecipeError where a tracker's package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise RecipeError(f"report_to: {name} is not installed; pip install {name}, or take it out")


@contextmanager
def reporting(folder: Path, recipe: Recipe) -> Iterator[Callable[[RoundRecord], None]]:
    """Open the recipe's trackers for a run and yield what logs a record; close them at the end.

    A tracker that fails is left out of the rest of the run with a warning: training goes on.
    """
    if not recipe.report_to:
        yield lambda record: None
        return
    open_trackers: dict[str, Any] = {}

    def each(names: Sequence[str], call: Callable[[str], None]) -> None:
        for name in names:
            try:
                with redirect_stdout(sys.stderr):  # where a tracker may talk; standard output is for results
                    call(name)
            except Exception as error:  # whatever a server, a token or a package may have against us
                reason = " ".join(str(error).split()) or type(error).__name__
                log.warning("report_to: %s failed and is left out from here on (%s)", name, reason)
                open_trackers.pop(name, None)

    def start(name: str) -> None:
        tracker = _tracker(name, folder)
        tracker.start()
        if name == "tensorboard":  # whose own way of keeping settings makes a second run
            tracker.log({f"recipe/{key}": str(value) for key, value in flat(recipe.model_dump(mode="json")).items()})
        else:
            tracker.store_init_configuration(flat(recipe.model_dump(mode="json")))
        open_trackers[name] = tracker

    def write(record: RoundRecord) -> None:
        steps = (record.round + 1) * recipe.training.local_steps
        found = values(record)
        each(list(open_trackers), lambda name: open_trackers[name].log(found, step=steps))

    each(recipe.report_to, start)
    try:
        yield write
    finally:
        each(list(open_trackers), lambda name: open_trackers[name].finish())


def values(record: RoundRecord) -> dict[str, float]:
    """Return what is logged of a round: means over the clients, and its diagnostics."""
    found = {
        "train/round": record.round,
        **({"train/loss": fmean(record.loss)} if record.loss else {}),
        **({"train/grad_norm": fmean(record.grad_norm)} if record.grad_norm else {}),
        "train/bytes_sent": sum(record.bytes_sent),
        "train/edges": len(record.edges),
        **{f"train/{name}": value for name, value in record.diagnostics.items()},
        **({"train/epsilon": max(record.epsilon)} if record.epsilon else {}),
        **({} if record.time_s is None else {"train/virtual_seconds": record.time_s}),
    }
    for evaluation in [] if record.evaluation is None else [record.evaluation, *record.evaluation.also]:
        scores = {
            "": fmean(evaluation.clients),
            "_min": min(evaluation.clients),
            "_max": max(evaluation.clients),
            "_own": fmean(evaluation.own) if evaluation.own else None,
            "_average": evaluation.average,  # of the averaged adapter
            "_constant": evaluation.constant,  # of the best answer that is the same for all rows
            "_own_constant": fmean(evaluation.own_constant) if evaluation.own_constant else None,
        }
        found |= {f"eval/{evaluation.metric}{what}": score for what, score in scores.items() if score is not None}
    return found


def _tracker(name: str, folder: Path) -> Any:
    from accelerate.state import PartialState
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

    PartialState()  # Accelerate's trackers ask it which process they are in
    made: Mapping[str, Callable[[], Any]] = {
        "tensorboard": lambda: TensorBoardTracker("tensorboard", logging_dir=folder),
        "wandb": lambda: WandBTracker(PROJECT, name=folder.name, dir=str(folder)),
        "mlflow": lambda: MLflowTracker(PROJECT, run_name=folder.name),
        "trackio": lambda: TrackioTracker(PROJECT, name=folder.name),
    }
    assert made.keys() == set(get_args(Tracker))
    return made[name]()
