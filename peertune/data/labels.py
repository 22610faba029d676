"""Labels: from what a column holds to the numbers of classes, or the targets of a regression.

What has a name is text, in whatever format it is stored: `01` is not `1`. Numbers are class numbers where the classes
have no names, and else only in a column of a data set that says itself what its numbers stand for (see `tables`).
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from peertune.data.measures import with_classes
from peertune.data.scores import OF_VALUES
from peertune.data.tables import MissingCells, Table, whole, without_missing
from peertune.errors import DataError, unknown
from peertune.types import Measure, Split

Classes = list[str] | dict[int | str, str]
"""Names of classes by number, or by what the data call them, such as `{0: cat, 1: dog}`."""


class Labelled(NamedTuple):
    """What `number_labels` makes of tables."""

    classes: tuple[str, ...]  # names by number; empty for a regression
    splits: list[Split]
    measures: list[Measure]  # each with the class that it is of, where it is of one


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def number_labels(
    where: str,
    tables: Mapping[str, Table],
    inputs: tuple[str, ...],
    label: str,
    classes: Classes | None,
    measures: list[Measure],
    missing_cells: MissingCells,
    others: tuple[str, ...] = (),
) -> Labelled:
    """Check the columns of each split, number their labels, and find the classes that the measures are of.

    The names are those of `classes`, or else the source's own, or else what `train`, the first split, has; they are
    empty for a regression. `inputs` are columns of text; cells of `others` must be there, too.

    Raises DataError for a column or cell that is missing or malformed, a label without a number, and a measure that
    does not suit.
    """
    valued = measures[0].metric in OF_VALUES
    if label in inputs:
        raise DataError(told_already(where, label))
    named = None if classes is None else _names(where, classes, valued)
    tables = without_missing(where, tables, inputs, (*others, label), missing_cells)
    for split, table in tables.items():
        need_text(f"{where}: {split}", table, inputs)
    if valued:
        targets = [_targets(f"{where}: {split}", table, label) for split, table in tables.items()]
        return Labelled((), [table.split(x) for table, x in zip(tables.values(), targets, strict=True)], measures)
    texts = {split: _texts(f"{where}: {split}", table, label) for split, table in tables.items()}
    first = next(iter(tables))
    if named is None:
        named = tables[first].classes.get(label) or _learn_classes(where, texts[first])
    if named == tuple(map(str, range(len(named)))):  # numbers, which are the same as 3 and as 3.0
        texts = {split: [text if whole(text) is None else str(whole(text)) for text in texts[split]] for split in texts}
    measures = with_classes(where, measures, named)
    numbers = {name: number for number, name in enumerate(named)}
    if isinstance(classes, dict):
        numbers = {str(called): numbers[name] for called, name in classes.items()}
    splits = []
    for split, table in tables.items():
        for row, text in enumerate(texts[split]):
            if text not in numbers:
                place = f"{where}: {split}: {table.called(row)}: {label}"
                raise DataError(_unknown_label(place, text, numbers, isinstance(classes, list)))
        splits.append(table.split(np.array([numbers[text] for text in texts[split]], np.int64)))
    return Labelled(named, splits, measures)


def told_already(where: str, label: str) -> str:
    """Say that a model would be given what it is to learn."""
    return f"{where}: {label} is what is learnt, and stands in what a model is given; leave it out there"


def need_text(where: str, table: Table, columns: tuple[str, ...]) -> None:
    """Raise DataError for a cell of these columns that is no text."""
    for column in columns:
        for row, value in enumerate(table.columns[column]):
            if not isinstance(value, str):
                raise DataError(f"{where}: {table.called(row)}: {column} is {value!r:.80}, it must be text")


def _names(where: str, classes: Classes, valued: bool) -> tuple[str, ...]:
    named = tuple(classes.values() if isinstance(classes, dict) else classes)
    if len(named) < 2 or len(set(named)) < len(named) or valued:
        raise DataError(
            f"{where}: classes is {list(named)}; give two or more different names, and none for a regression"
        )
    return named


def _unknown_label(where: str, text: str, numbers: Mapping[str, int], listed: bool) -> str:
    """Say that a label is no class, and what to do where the classes are `listed` and the data number them."""
    if text == "-1":
        return f"{where} is -1, which marks a row without one; leave it out, or write nothing there"
    said = unknown(where, text, numbers)
    if "did you mean" in said:
        said += f" The classes are {', '.join(list(numbers)[:10])}" + (", …" if len(numbers) > 10 else "")
    if listed and whole(text) is not None and any(whole(name) is None for name in numbers):
        said += f"; name what the data number by task.classes={{{text}: NAME, …}}"
    return said


def _texts(where: str, table: Table, label: str) -> list[str]:
    """Return the labels as text; a whole number has the same as 3 and as 3.0."""
    for row, value in enumerate(table.columns[label]):
        if not isinstance(value, str | int | float):
            raise DataError(f"{where}: {table.called(row)}: {label} is {value!r:.80}, it must be a number or a name")
    return [
        str(whole(value)) if isinstance(value, float) and value.is_integer() else str(value)
        for value in table.columns[label]
    ]


def _learn_classes(where: str, texts: list[str]) -> tuple[str, ...]:
    """Return the names of the classes by number: numbers stand for themselves, names are sorted."""
    values = set(texts)
    numbers = [whole(value) for value in values]
    if None not in numbers:
        found = sorted(number for number in numbers if number is not None)
        if found != list(range(len(found))):
            shown = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
            raise DataError(
                f"{where}: the labels are {shown}: number the classes from 0 without a gap, name them all in classes, "
                "or leave out rows without a label (often -1)"
            )
        classes = tuple(map(str, found))
    elif all(_NUMBER.fullmatch(value) for value in values) and not all(float(value).is_integer() for value in values):
        raise DataError(
            f"{where}: the labels are fractions, choose metric pearson or spearman for a regression, "
            "or name them in classes"
        )
    else:
        classes = tuple(sorted(values))
    if len(classes) < 2:
        raise DataError(f"{where}: all rows of train have the label {classes[0]}, give at least two classes")
    return classes


def _targets(where: str, table: Table, label: str) -> NDArray[np.float64]:
    """Return the targets `[N]` of a regression."""
    targets = np.zeros(len(table))
    for row, value in enumerate(table.columns[label]):
        number = (isinstance(value, str) and _NUMBER.fullmatch(value.strip())) or isinstance(value, int | float)
        targets[row] = float(value) if number and not isinstance(value, bool) else np.nan
        if not np.isfinite(targets[row]):
            raise DataError(
                f"{where}: {table.called(row)}: {label} is {value!r:.80}, a regression's must be a finite number"
            )
    return targets
