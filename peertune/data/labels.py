"""Labels: from what a column holds to the numbers of classes, or the targets of a regression."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peertune.data.scores import METRICS, OF_LANGUAGE, OF_VALUES
from peertune.data.sources import Columns
from peertune.errors import DataError, unknown
from peertune.types import Split


def number_labels(
    where: str,
    splits: dict[str, Columns],
    inputs: tuple[str, ...],
    label: str,
    classes: tuple[str, ...] | None,
    metric: str,
) -> tuple[tuple[str, ...], list[Split]]:
    """Check the columns of each split, number their labels, and return the names of the classes, and the splits.

    `classes`, where known, is by number; otherwise `train`, the first split, tells. They are empty for a regression.

    Raises DataError for a column that is missing or malformed, a label without a number, and a metric that does not
    suit.
    """
    suited = {name: METRICS[name] for name in METRICS if name not in OF_LANGUAGE}
    if metric not in suited:
        raise DataError(unknown(f"{where}: metric", metric, suited))
    for split, columns in splits.items():
        _check(f"{where}: {split}", columns, inputs, label)
    labels: list[NDArray[Any]]
    if metric in OF_VALUES:
        classes = ()
        labels = [_targets(f"{where}: {split}", columns[label]) for split, columns in splits.items()]
    else:
        if classes is None:
            classes, numbers = _learn_classes(where, next(iter(splits.values()))[label])
        else:
            numbers = {str(number): number for number in range(len(classes))}
            numbers |= {named: number for number, named in enumerate(classes)}
        if metric == "f1" and len(classes) != 2:
            raise DataError(f"{where}: metric f1 is for two classes and there are {len(classes)}, choose accuracy")
        labels = [_number(f"{where}: {split}", columns[label], numbers) for split, columns in splits.items()]
    return classes, [Split(columns, found) for columns, found in zip(splits.values(), labels, strict=True)]


def _check(where: str, columns: Columns, inputs: tuple[str, ...], label: str) -> None:
    if not any(columns.values()):
        raise DataError(f"{where}: no rows, give at least one")
    for column in (*inputs, label):
        if column not in columns:
            raise DataError(unknown(f"{where}: column", column, columns))
    for column in inputs:
        for row, value in enumerate(columns[column]):
            if not isinstance(value, str):
                raise DataError(f"{where}: row {row}: {column} is {value!r}, it must be text")
    for row, value in enumerate(columns[label]):
        if value is None or value == "" or value != value:
            raise DataError(f"{where}: row {row}: {label} is missing, leave out rows without one")
        if not isinstance(value, str | int | float):
            raise DataError(f"{where}: row {row}: {label} is {value!r}, it must be a number or a name")


def _learn_classes(where: str, labels: list[Any]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the names of the classes by number, and the number of each label as text."""
    values = set(labels)
    if any(isinstance(value, float) for value in values):
        raise DataError(f"{where}: the labels are fractions, choose metric pearson or spearman for a regression")
    if all(type(value) is int for value in values):
        if values != set(range(len(values))):
            shown = ", ".join(map(str, sorted(values)[:5])) + (", …" if len(values) > 5 else "")
            raise DataError(
                f"{where}: the labels are {shown}: number the classes from 0 without a gap, "
                "and leave out rows without a label (often -1)"
            )
        classes = tuple(map(str, sorted(values)))
    else:
        classes = tuple(sorted(map(str, values)))
    if len(classes) < 2:
        raise DataError(f"{where}: all rows of train have the label {classes[0]}, give at least two classes")
    return classes, {named: number for number, named in enumerate(classes)}


def _number(where: str, labels: list[Any], numbers: dict[str, int]) -> NDArray[np.int64]:
    """Return the class numbers `[N]`."""
    for row, label in enumerate(labels):
        if str(label) == "-1" and "-1" not in numbers:
            raise DataError(f"{where}: row {row}: label -1 marks a row without a label, leave it out")
        if str(label) not in numbers:
            raise DataError(unknown(f"{where}: row {row}: label", label, numbers))
    return np.array([numbers[str(label)] for label in labels], np.int64)


def _targets(where: str, labels: list[Any]) -> NDArray[np.float64]:
    """Return the targets `[N]` of a regression."""
    for row, label in enumerate(labels):
        try:
            finite = math.isfinite(float(label))
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise DataError(f"{where}: row {row}: label is {label!r}, a regression's must be a finite number")
    return np.array(labels).astype(np.float64)
