"""Files of rows: Parquet, CSV and JSON, each read straight into memory as a table.

Nothing is guessed from what fields look like: text stays text. Rows of text files go by their lines, as editors count
them; others by their place, from 0, as `datasets` counts them.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from peertune.data.tables import Columns, Table, made
from peertune.errors import unknown


def read_file(file: Path, field: str | None = None) -> Table:
    """Read a file by its suffix, one of `SUFFIXES`; `field` says what in a JSON object holds the rows.

    Raises OSError for a file that can't be read, and ValueError, in one line, for one that is not what it is called.
    """
    if field is not None and file.suffix not in (".json", ".jsonl"):
        raise ValueError("field is for what a JSON file holds; leave it out")
    match file.suffix:
        case ".parquet":
            return _read_parquet(file)
        case ".csv":
            return _read_csv(file)
        case _:
            return _read_json(file, field)


SUFFIXES = (".parquet", ".csv", ".jsonl", ".json")


def _read_parquet(file: Path) -> Table:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as parquet:
        table = parquet.read()
    _need_different(table.column_names)
    return made(table.to_pydict(), classes=_class_names(table.schema))


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return what the numbers in the columns of a Parquet file stand for, where `datasets` says so in its metadata."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    try:
        features = dict(written["info"]["features"])
    except (KeyError, TypeError, ValueError):  # nothing of the kind
        return {}
    found = {}
    for field in schema:
        kind = features.get(field.name)
        if not isinstance(kind, dict) or kind.get("_type") != "ClassLabel":
            continue
        if str(field.type) == "int64":  # else the column was changed since
            found[field.name] = list(kind["names"])
    return found


def _read_csv(file: Path) -> Table:
    # A field is no larger than its file; where the limit of a process is lower, it would end there.
    csv.field_size_limit(max(csv.field_size_limit(), file.stat().st_size))
    rows: list[list[str | None]] = []
    numbers, begun = [], 1
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            _need_different(header)
            begun = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(f"line {begun} has {len(row)} fields and the header {len(header)}")
                if row:
                    rows.append([None if field in NAN else field for field in row])
                    numbers.append(begun)
                begun = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"line {begun}: {error}") from error
    return made({name: [row[place] for row in rows] for place, name in enumerate(header)}, numbers, "line")


NAN = ["nan", "NaN"]
"""How a CSV file has NaN."""


def _read_json(file: Path, field: str | None) -> Table:
    text = file.read_text(encoding="utf-8-sig")
    if field is not None or text.lstrip()[:1] == "[":
        return _of_document(_parsed(text), field)
    rows: list[dict[str, Any]] = []
    numbers = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at what JSON may hold
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except json.JSONDecodeError as error:
            if not rows:
                with suppress(json.JSONDecodeError):  # unless it is one object over many lines
                    return _of_document(_parsed(text), None)
            raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        rows.append(row)
        numbers.append(number)
    return made(_columns(rows), numbers, "line")


def _of_document(document: Any, field: str | None) -> Table:
    """Return the rows of a file that is one array, or one object that holds them in `field`."""
    if isinstance(document, dict):
        if field is None:
            raise ValueError(
                f"it is one object of {', '.join(document)}; say which holds the rows, as in task.field=data, "
                "or write one object a line"
            )
        if field not in document:
            raise ValueError(unknown("field", field, document))
        document = document[field]
    elif field is not None:
        raise ValueError("field is for a file that is one object, and it is an array; leave it out")
    if isinstance(document, dict) and all(isinstance(values, list) for values in document.values()):
        if len({len(values) for values in document.values()}) > 1:
            raise ValueError("its columns differ in length")
        return made(document)
    if not isinstance(document, list):
        raise ValueError("its rows are no array")
    for number, row in enumerate(document):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not a JSON object")
    return made(_columns(document))


def _columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _need_different([name for name, _ in pairs])
    return dict(pairs)


_parsed: Callable[[str], Any] = partial(json.loads, object_pairs_hook=_object)


def _need_different(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice; give each column a name of its own")
