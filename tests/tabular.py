"""Files of rows, as other programs write them."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

FORMATS = ("csv", "jsonl", "json", "parquet")


def write(file: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns by the file's suffix: JSON as one array, and a cell that is None as nothing in CSV."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    match file.suffix:
        case ".parquet":
            parquet.write_table(pa.table({name: list(values) for name, values in columns.items()}), file)
        case ".csv":
            with file.open("w", encoding="utf-8", newline="") as lines:
                csv.writer(lines).writerows([list(columns), *(list(row.values()) for row in rows)])
        case ".json":
            file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        case _:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_splits(folder: Path, suffix: str, columns: Mapping[str, Sequence[Any]], **other: Mapping[str, Any]) -> str:
    """Write the same columns for `train` and `validation`, or others for one of them, and return the folder."""
    for split in ("train", "validation"):
        write(folder / f"{split}.{suffix}", other.get(split, columns))
    return str(folder)


def called(suffix: str, row: int) -> str:
    """What a message calls the row of a file that `write` wrote, by its place from 0."""
    return {"csv": f"line {row + 2}", "jsonl": f"line {row + 1}"}.get(suffix, f"row {row}")
