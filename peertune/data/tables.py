"""Tables: the rows of a split as their source holds them, and one rule for cells that are missing.

A cell is missing where it is null or NaN, text without anything but white space, or an empty list, in whatever format
it is stored. The rule holds for every column that a task reads, and for the column that a partition goes by.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peertune.errors import DataError, unknown
from peertune.types import Split

log = logging.getLogger(__name__)

Columns = dict[str, list[Any]]
MissingCells = Literal["refuse", "drop", "empty"]
"""What is done with rows that lack a cell: `empty` takes a missing text for an empty one."""


@dataclass(frozen=True)
class Table:
    """N rows of a source. What the source numbers itself is here by its names."""

    columns: Columns
    numbers: NDArray[np.int64]  # [N], what the source calls each row
    unit: str = "row"  # what it counts
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a column: its names in their own order
    left_out: int = 0  # rows of the source that are not here, since they lack a cell

    def __len__(self) -> int:
        return len(self.numbers)

    def called(self, row: int) -> str:
        """Return what the source calls a row, such as `line 7`."""
        return f"{self.unit} {self.numbers[row]}"

    def take(self, rows: NDArray[np.int64]) -> "Table":
        """Return these rows, in this order."""
        columns = {name: [values[row] for row in rows.tolist()] for name, values in self.columns.items()}
        return replace(self, columns=columns, numbers=self.numbers[rows])

    def with_columns(self, columns: Columns) -> "Table":
        """Return the same rows with these columns beside the others, or in their place."""
        return replace(self, columns=self.columns | columns)

    def named(self, column: str, names: Sequence[str]) -> "Table":
        """Put these names for the numbers in a column, and nothing for -1, which marks what has none."""

        def name(value: Any) -> Any:
            number = whole(value)
            if number == -1:
                return None
            return names[number] if number is not None and 0 <= number < len(names) else value

        named = self.with_columns({column: [name(value) for value in self.columns[column]]})
        return replace(named, classes={**self.classes, column: tuple(names)})

    def split(self, labels: NDArray[Any]) -> Split:
        """Return the rows as a task has them, with their labels `[N]`."""
        return Split(self.columns, labels, self.numbers, self.unit, self.left_out)


def made(
    columns: Columns,
    numbers: Sequence[int] | None = None,
    unit: str = "row",
    classes: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """Return a table of columns in which `classes` says what the numbers in some of them stand for.

    Without `numbers` rows count from 0.
    """
    size = len(next(iter(columns.values()), ()))
    table = Table(columns, np.arange(size) if numbers is None else np.array(numbers, np.int64), unit)
    for column, names in (classes or {}).items():
        table = table.named(column, names)
    return table


def whole(value: Any) -> int | None:
    """Return the whole number that a value is or is written as, such as 3, `"3"`, and 3.0, which gaps make of 3.

    None for anything else: `"03"` and `"1_0"` are names.
    """
    if isinstance(value, str):
        digits = value.removeprefix("-").removesuffix(".0")
        plain = digits.isascii() and digits.isdecimal() and (digits == "0" or digits[0] != "0")
        return int(float(value)) if plain and len(digits) <= 15 else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if type(value) is int else None


def missing(value: Any) -> bool:
    """Whether a cell has nothing in it."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (isinstance(value, float) and value != value) or (isinstance(value, list) and not value)


def need_columns(where: str, table: Table, names: Sequence[str]) -> None:
    """Raise DataError for a table without rows, or without one of these columns."""
    if not len(table):
        raise DataError(f"{where}: no rows, give at least one")
    for name in names:
        if name not in table.columns:
            raise DataError(unknown(f"{where}: column", name, table.columns) + nested(table))


def nested(table: Table) -> str:
    """Return the way out where a single row holds a list of objects, as of a JSON file that is one object."""
    for name, values in table.columns.items():
        if len(values) == 1 and isinstance(values[0], list) and values[0] and isinstance(values[0][0], dict):
            return f"; task.field={name} reads the rows in {name}"
    return ""


def without_missing(
    where: str,
    tables: Mapping[str, Table],
    inputs: Sequence[str],
    learnt: Sequence[str],
    rule: MissingCells,
) -> dict[str, Table]:
    """Apply the rule to the rows of all splits that lack a cell of these columns.

    `inputs` are columns of text; a cell of one that is `learnt` is never taken for empty.

    Raises DataError, which counts them all, by the rule, and where a column is not there or no row is left.
    """
    for split, table in tables.items():
        need_columns(f"{where}: {split}", table, (*inputs, *learnt))
    if rule == "empty":
        tables = {
            split: table.with_columns({name: ["" if missing(x) else x for x in table.columns[name]] for name in inputs})
            for split, table in tables.items()
        }
    sought = list(dict.fromkeys(learnt if rule == "empty" else (*inputs, *learnt)))
    whole_rows, told, lacking = {}, [], set[str]()
    for split, table in tables.items():
        gaps = {name: np.array([missing(value) for value in table.columns[name]]) for name in sought}
        found = {name: rows for name, rows in gaps.items() if rows.any()}
        whole_rows[split] = np.flatnonzero(~np.any(list(gaps.values()), axis=0)) if found else np.arange(len(table))
        lacking |= found.keys()
        said = [
            f"no {name} in {rows.sum():,} of {len(table):,} rows "
            f"({'first ' if rows.sum() > 1 else ''}{table.called(int(rows.argmax()))})"
            for name, rows in found.items()
        ]
        told += [f"{split}: {', '.join(said)}"] if said else []
    if told and rule != "drop":
        empty = "" if lacking & set(learnt) else ", missing_cells=empty takes what is missing for empty text"
        raise DataError(f"{where}: {'; '.join(told)}; missing_cells=drop leaves these rows out{empty}")
    for split, rows in whole_rows.items():
        if not len(rows):
            raise DataError(f"{where}: {split}: each row lacks {' or '.join(sought)}; give at least one whole row")
    if told:
        log.warning("%s: %s; these rows are left out (missing_cells)", where, "; ".join(told))
    return {
        split: replace(table.take(rows), left_out=table.left_out + len(table) - len(rows))
        if len(rows := whole_rows[split]) < len(table)
        else table
        for split, table in tables.items()
    }
