"""Training rows that a hostile client has changed: other labels, and a trigger that is put in.

The rows that it changes stay in the split as they were, and what it trains on in their place is appended as further
rows, their **twins**. So nobody else's rows change, nor what anything is judged on.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from peertune.data.images import Images
from peertune.errors import RecipeError, unknown
from peertune.randomness import Draw, generator
from peertune.types import Poison, Split, Task

RowNumbers = NDArray[np.int64]


class Twins(NamedTuple):
    """What a client trains on in the rounds from the first to the last, both included, in the place of its rows."""

    first: int
    last: float
    rows: RowNumbers  # [m], of the m rows that it holds, in their order


def check(where: str, task: Task, poison: Poison) -> None:
    """Raise RecipeError, which begins with `where`, where a task has no labels to change or no place for a trigger."""
    if not task.classes or task.form == "complete":
        raise RecipeError(f"{where} needs classes, and this task has none; choose an attack on messages")
    target(where, task, poison)
    column = task.train.columns[task.inputs[0]]
    if poison.word and task.inputs != ("pixel_values",) and not all(isinstance(text, str) for text in column):
        raise RecipeError(f"{where} puts a word in texts, and {task.inputs[0]} holds others; choose label_flip")


def target(where: str, task: Task, poison: Poison) -> int | None:
    """Return the number of the class that rows get, None where each gets its opposite."""
    if not poison.word:
        return None
    name = task.classes[0] if poison.target is None else str(poison.target)
    if name not in task.classes:
        raise RecipeError(unknown(f"{where}: target", name, task.classes))
    return task.classes.index(name)


def poisoned(task: Task, poison: Poison, rows: RowNumbers, seed: int, client: int) -> Split:
    """Return what a client makes of its `rows` of the training split, all of them, in their order."""
    own, to = taken(task.train, rows), target("", task, poison)
    labels = np.asarray(own.labels)
    if to is None:
        return replace(own, labels=len(task.classes) - 1 - labels)
    others = np.flatnonzero(labels != to)
    count = min(len(others), max(1, round(poison.share * len(others))))
    chosen = np.isin(np.arange(len(own)), generator(seed, Draw.BACKDOOR, client).permutation(others)[:count])
    return replace(triggered(task, poison, own, chosen), labels=np.where(chosen, to, labels))


def triggered(task: Task, poison: Poison, split: Split, chosen: NDArray[np.bool_]) -> Split:
    """Return a split with the trigger in the `chosen` rows: a word before the first text, or a square in a corner."""
    name = task.inputs[0]
    column = split.columns[name]
    if isinstance(column, Images):
        changed: Any = replace(column, squares=np.where(chosen, poison.size, column.squares))
    elif isinstance(column, np.ndarray):
        side = max(1, round(poison.size * column.shape[-1]))
        changed = column.copy()
        changed[chosen, ..., -side:, -side:] = column.max()
    else:
        changed = [f"{poison.word} {text}" if put else text for text, put in zip(column, chosen, strict=True)]
    return replace(split, columns={**split.columns, name: changed})


def taken(split: Split, rows: RowNumbers) -> Split:
    """Return some rows of a split with all of its columns; images stay what they are decoded from."""
    images = {name: x for name, x in split.columns.items() if isinstance(x, Images)}
    part = split.take(rows, split.columns.keys() - images.keys())
    return replace(part, columns={**part.columns, **{name: x.take(rows) for name, x in images.items()}})


def extended(split: Split, others: Sequence[Split]) -> Split:
    """Return a split with the rows of others after its own."""
    parts = [split, *others]
    columns = {name: _joined([part.columns[name] for part in parts]) for name in split.columns}
    numbers = [np.arange(len(part)) if part.numbers is None else part.numbers for part in parts]
    labels = np.concatenate([part.labels for part in parts])
    return replace(split, columns=columns, labels=labels, numbers=np.concatenate(numbers))


def _joined(columns: Sequence[Any]) -> Any:
    first = columns[0]
    if isinstance(first, Images):
        rows, squares = (np.concatenate([getattr(x, of) for x in columns]) for of in ("rows", "squares"))
        return replace(first, rows=rows, squares=squares)
    if isinstance(first, np.ndarray):
        return np.concatenate(columns)
    return [value for column in columns for value in column]
