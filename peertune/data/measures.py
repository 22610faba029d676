"""Measures: what a recipe's task is scored by, held against what its predictions are."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from peertune.data.scores import ANSWERS, METRICS, OF_CLASSES, OF_ONE_CLASS, OF_TOKENS, OF_VALUES, constant, f1
from peertune.errors import DataError, unknown
from peertune.types import Measure, Task

Metric = str | dict[str, str | int]
"""A metric in a recipe: a name, or `{name: f1, of: fraud}` with the class that it is of."""
Metrics = Metric | list[Metric]
"""One, or several of the same predictions, of which the first is what is judged by."""
Score = Callable[[NDArray[Any], NDArray[Any]], float]

_OF = {"classes": OF_CLASSES, "values": OF_VALUES, "tokens": OF_TOKENS, "texts that are generated": ANSWERS.keys()}
"""What is predicted → the metrics of it."""


def read_metrics(where: str, metrics: Metrics, fitting: Collection[str]) -> list[Measure]:
    """Return what a recipe names, in its order, a class of each as it stands there.

    Raises DataError for what is not among those `fitting` the task, what is of no class, and what one pass can't bring.
    """
    listed = metrics if isinstance(metrics, list) else [metrics]
    if not listed:
        raise DataError(f"{where}: metric is an empty list; choose from {', '.join(sorted(fitting))}")
    found = [_read(where, metric, fitting) for metric in listed]
    predicted, same = next((what, names) for what, names in _OF.items() if found[0].metric in names)
    for other in (measure.metric for measure in found if measure.metric not in same):
        raise DataError(
            f"{where}: metric {other} is not of {predicted}, as {found[0].metric} is: no pass predicts both; "
            f"beside {found[0].metric} choose from {', '.join(sorted({*same} & {*fitting}))}"
        )
    return _different(where, found)


def _different(where: str, measures: list[Measure]) -> list[Measure]:
    for place, measure in enumerate(measures):
        if measure in measures[:place]:
            raise DataError(f"{where}: metric {measure} stands twice; give it once")
    return measures


def _read(where: str, metric: Metric, fitting: Collection[str]) -> Measure:
    if isinstance(metric, str):
        name, of = metric, None
    elif metric.keys() == {"name", "of"}:
        name, of = str(metric["name"]), str(metric["of"])
    else:
        raise DataError(f"{where}: metric is {metric}; give a name, or name and of, as in {{name: f1, of: CLASS}}")
    choices = ", ".join(sorted(fitting))
    if name in METRICS and name not in fitting:
        raise DataError(f"{where}: metric {name} does not fit; choose from {choices}")
    if name not in METRICS:
        said = unknown(f"{where}: metric", name, fitting)
        raise DataError(f"{said} Those that fit are {choices}" if "did you mean" in said else said)
    if of is not None and name not in OF_ONE_CLASS:
        raise DataError(f"{where}: metric {name} is of no one class; leave out of, or choose f1")
    return Measure(name, of)


def with_classes(where: str, measures: Sequence[Measure], classes: Sequence[str]) -> list[Measure]:
    """Return measures each with its class: the one that is asked for, or 1 of 0 and 1, as in scikit-learn.

    Raises DataError where classes have names and none is asked for, for one that there isn't, and for what stands twice
    then.
    """
    return _different(where, [_with_class(where, measure, classes) for measure in measures])


def _with_class(where: str, measure: Measure, classes: Sequence[str]) -> Measure:
    name, of = measure
    if name not in OF_ONE_CLASS:
        return measure
    if of is None and tuple(classes) != ("0", "1"):
        raise DataError(
            f"{where}: metric {name} is of one class; say of which of {', '.join(classes[:10])}, as in "
            f"task.metric={{name: {name}, of: {classes[-1]}}}, or choose macro_f1"
        )
    if of is not None and of not in classes:
        raise DataError(unknown(f"{where}: metric {name}: of", of, classes))
    return Measure(name, of or "1")


def judged(measures: Sequence[Measure]) -> dict[str, Any]:
    """Return what a `Task` is told of its measures."""
    (metric, of), *also = measures
    return {"metric": metric, "of": of, "also": tuple(also)}


def scorers(task: Task) -> list[Score]:
    """Return what scores predictions of labels, both `[N]`, by each of the task's measures."""
    return [METRICS[metric] if of is None else partial(f1, of=task.classes.index(of)) for metric, of in task.measures]


def constants(task: Task, truths: Sequence[Any] | NDArray[Any]) -> list[float]:
    """Return what the best answer that is the same for all rows scores by each of the task's measures."""
    return [constant(metric, truths, None if of is None else task.classes.index(of)) for metric, of in task.measures]
