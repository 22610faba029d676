"""Where rows come from: columns read from a local folder or from the Hugging Face hub.

A folder holds one file for each split, named after it: `train.parquet`, `validation.csv`, `train.jsonl` (or `.json`)
with one object a line. Files are read straight into memory: nothing is cached, and no script of a data set ever runs.
"""

import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peertune.errors import DataError, unknown

Columns = dict[str, list[Any]]
Reader = Callable[[Sequence[str]], Columns]
"""Takes names of splits and returns the columns of the first that is there."""


def named_source(task: str, path: str | None, id: str | None) -> str:
    """Return what a task with rows of its own is called, such as `text/reviews`, by its folder or its id on the hub.

    Raises DataError where not just one of them is given.
    """
    if (path is None) == (id is None):
        raise DataError(f"task {task}: give either path (a folder) or id (a data set of the hub)")
    return f"{task}/{id or Path(path or '').name}"


def open_source(
    where: str, path: str | None, hub_id: str, config: str | None, revision: str | None, label: str
) -> tuple[Reader, tuple[str, ...] | None]:
    """Return what reads a split, from the folder or else from the hub, and the hub's own names of the classes."""
    if path is not None:
        return partial(_from_folder, where, Path(path).expanduser(), label), None
    splits = load_from_hub(where, hub_id, config, revision)
    names = next((getattr(split.features.get(label), "names", None) for split in splits.values()), None)
    return partial(_from_hub, where, splits), None if names is None else tuple(names)


def load_from_hub(where: str, hub_id: str, config: str | None, revision: str | None) -> dict[str, Any]:
    """Return the splits of a data set of the hub, by name. Raises DataError where it can't be had."""
    import datasets
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    disable_progress_bars()
    try:
        return dict(datasets.load_dataset(hub_id, config, revision=revision))
    except ConnectionError:
        reason = "not in the local cache and the hub can't be reached; give task.path=FOLDER"
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"the hub's {hub_id} can't be loaded ({first_line(error)})"
    raise DataError(f"{where}: {reason}")


def image_columns(where: str, split: Any, image: str) -> tuple[Columns, Sequence[Any]]:
    """Return the plain columns of a hub's split, and its images as `bytes` and `path`, read when they are asked for.

    Raises DataError where the column `image` is none of images.
    """
    import datasets

    if image not in split.features:
        raise DataError(unknown(f"{where}: column", image, split.features))
    if not isinstance(split.features[image], datasets.Image):
        raise DataError(f"{where}: column {image} holds no images, say in image which does")
    plain = [name for name, kind in split.features.items() if isinstance(kind, datasets.Value | datasets.ClassLabel)]
    return {name: split[name][:] for name in plain}, split.cast_column(image, datasets.Image(decode=False))[image]


def _from_hub(where: str, splits: dict[str, Any], names: Sequence[str]) -> Columns:
    for name in names:
        if name in splits:
            columns: Columns = splits[name].to_dict()
            return columns
    raise DataError(unknown(f"{where}: split", names[0], splits))


def _from_folder(where: str, folder: Path, label: str, names: Sequence[str]) -> Columns:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "is not there"
        raise DataError(f"{where}: {folder} {what}, give the folder that holds train.parquet, .csv or .jsonl")
    files = [folder / (name + suffix) for name in names for suffix in _FORMATS]
    for file in files:
        if file.is_file():
            try:
                columns = _FORMATS[file.suffix](file)
            except (OSError, ValueError, csv.Error) as error:
                raise DataError(f"{where}: {file} can't be read ({first_line(error)})") from error
            # A CSV file has only text, so labels that all read as numbers are numbers.
            if file.suffix == ".csv" and label in columns:
                columns[label] = _parse_numbers(columns[label])
            return columns
    raise DataError(f"{where}: {folder} holds none of {', '.join(file.name for file in files)}")


def _read_parquet(file: Path) -> Columns:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as parquet:
        columns: Columns = parquet.read().to_pydict()
    return columns


def _read_csv(file: Path) -> Columns:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header = next(reader, [])
        rows = []
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(row)} fields and the header {len(header)}")
            if row:
                rows.append(row)
    return {name: [row[column] for row in rows] for column, name in enumerate(header)}


def _read_json_lines(file: Path) -> Columns:
    with file.open(encoding="utf-8-sig") as lines:
        rows = []
        for number, line in enumerate(lines, 1):
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            if row:
                rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


_FORMATS: dict[str, Callable[[Path], Columns]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
}


def _parse_numbers(values: list[str]) -> list[Any]:
    for parse in (int, float):
        try:
            return [parse(value) for value in values]
        except ValueError:
            pass
    return values


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
