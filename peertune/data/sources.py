"""Where rows come from: tables read from a local folder or from the Hugging Face hub.

A folder holds one file for each split, named after it: `train.parquet`, `validation.csv`, `train.jsonl` or
`train.json`. Files are read straight into memory: nothing is cached, and no script of a data set ever runs.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peertune.data.readers import NAN, SUFFIXES, read_file
from peertune.data.splits import Splits
from peertune.data.tables import Columns, Table, made
from peertune.errors import DataError, unknown


@dataclass(frozen=True)
class Source:
    """Where a task's rows are: in the folder `path`, or on the hub."""

    path: str | None
    hub_id: str | None
    config: str | None = None
    revision: str | None = None
    field: str | None = None  # what in a folder's JSON files holds the rows

    def named(self, task: str, splits: Splits) -> str:
        """Return what a task with rows of its own is called, such as `text/reviews`, by its folder or its hub's id.

        Raises DataError where not just one of them is given, or what belongs to the other, and for splits that can't
        be.
        """
        if (self.path is None) == (self.hub_id is None):
            raise DataError(f"task {task}: give either path (a folder) or id (a data set of the hub)")
        named = f"{task}/{self.hub_id or Path(self.path or '').name}"
        if self.path is not None and (self.config or self.revision):
            raise DataError(f"task {named}: config and revision are of the hub; leave them out with path")
        if self.hub_id is not None and self.field is not None:
            raise DataError(f"task {named}: field is of a folder's JSON files; leave it out with id")
        splits.check(f"task {named}")
        return named

    def read(self, where: str, splits: Splits) -> dict[str, Table]:
        """Return the splits that are wanted of the source, by name, the one to train on first."""
        if self.path is not None:
            folder = Path(self.path).expanduser()
            there: Collection[str] = {file.stem for file in folder.glob("*") if file.suffix in SUFFIXES}
            read = partial(_from_folder, where, folder, self.field)
        else:
            there = found = load_from_hub(where, self.hub_id or "", self.config, self.revision)
            read = partial(_from_hub, where, found)
        return {names[0]: read(names) for names in splits.wanted(where, there)}


def need_folder(where: str, folder: Path, what: str) -> None:
    """Raise DataError where there is no folder, which is to hold `what`."""
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.is_file() else "is not there"
        raise DataError(f"{where}: {folder} {found}, give the folder that holds {what}")


def load_from_hub(where: str, hub_id: str, config: str | None, revision: str | None) -> dict[str, Any]:
    """Return the splits of a data set of the hub, by name. Raises DataError where it can't be had.

    What CSV files hold is text, as in a folder's, where `datasets` would make 1 of `01`.
    """
    import datasets
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    disable_progress_bars()
    try:
        found = dict(datasets.load_dataset(hub_id, config, revision=revision))
        if any(split.info.builder_name == "csv" for split in found.values()):
            kinds = {name: kind for split in found.values() for name, kind in split.features.items()}
            text = {n: datasets.Value("string") if isinstance(k, datasets.Value) else k for n, k in kinds.items()}
            asked: dict[str, Any] = {"features": datasets.Features(text), "keep_default_na": False, "na_values": NAN}
            found = dict(datasets.load_dataset(hub_id, config, revision=revision, **asked))
        return found
    except ConnectionError:
        reason = "not in the local cache and the hub can't be reached; give task.path=FOLDER"
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"the hub's {hub_id} can't be loaded ({first_line(error)})"
    raise DataError(f"{where}: {reason}")


def image_columns(where: str, split: Any, image: str) -> tuple[Table, Sequence[Any]]:
    """Return the plain columns of a hub's split, and its images as `bytes` and `path`, read when they are asked for.

    Of the images themselves the table says which are there. Raises DataError where the column `image` is none of
    images.
    """
    import datasets
    import pyarrow.compute as pc

    if image not in split.features:
        raise DataError(unknown(f"{where}: column", image, split.features))
    if not isinstance(split.features[image], datasets.Image):
        raise DataError(f"{where}: column {image} holds no images, say in image which does")
    plain = [name for name, kind in split.features.items() if isinstance(kind, datasets.Value | datasets.ClassLabel)]
    stored = split.with_format("arrow").select_columns([image])[:][image]
    lacking = [pc.is_null(pc.struct_field(stored, part)).to_pylist() for part in ("bytes", "path")]
    there: Columns = {image: [None if all(gaps) else True for gaps in zip(*lacking, strict=True)]}
    table = made({name: split[name][:] for name in plain} | there, classes=_class_names(split))
    return table, split.cast_column(image, datasets.Image(decode=False))[image]


def _class_names(split: Any) -> dict[str, list[str]]:
    import datasets

    return {name: kind.names for name, kind in split.features.items() if isinstance(kind, datasets.ClassLabel)}


def _from_hub(where: str, splits: Mapping[str, Any], names: Sequence[str]) -> Table:
    for name in names:
        if name in splits:
            return made(splits[name].to_dict(), classes=_class_names(splits[name]))
    raise DataError(unknown(f"{where}: split", names[0], splits))


def _from_folder(where: str, folder: Path, field: str | None, names: Sequence[str]) -> Table:
    need_folder(where, folder, "train.parquet, .csv or .jsonl")
    files = [folder / (name + suffix) for name in names for suffix in SUFFIXES]
    there = [file for file in files if file.is_file()]
    if not there:
        raise DataError(f"{where}: {folder} holds none of {', '.join(file.name for file in files)}")
    if len(there) > 1:
        raise DataError(f"{where}: {folder} holds {' and '.join(file.name for file in there)}; leave one of them there")
    try:
        return read_file(there[0], field)
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {there[0]} can't be read ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
