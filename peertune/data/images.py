"""Tasks of images, from a folder or from the hub, and how images become what a base takes.

Images stay as they are stored until a batch asks for them: all that is held of one is where it lies. When a task is
loaded each is opened as far as its header, so that what is no image is told before anything is trained.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from torch import Tensor

from peertune.data.labels import Classes, number_labels
from peertune.data.measures import Metrics, judged, read_metrics
from peertune.data.scores import OF_CLASSES, OF_VALUES
from peertune.data.sources import Source, first_line, image_columns, load_from_hub, need_folder
from peertune.data.splits import Splits
from peertune.data.tables import MissingCells, Table
from peertune.errors import DataError, unknown
from peertune.randomness import Draw, generator
from peertune.types import Task

log = logging.getLogger(__name__)

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What images may be stored as; Pillow would run a program on some others (EPS)."""
KEPT_BYTES = 2**30
"""How much of what images become is kept for the next time, of each split."""


def images(
    path: str | None = None,
    id: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    image: str = "image",
    label: str = "label",
    train: str = "train",
    validation: str = "validation",
    shots: int | None = None,
    classes: Classes | None = None,
    templates: list[str] | None = None,
    metric: Metrics = "accuracy",
    validation_split: float | str | None = None,
    test: str | None = None,
    *,
    seed: int,
    missing_cells: MissingCells = "refuse",
) -> Task:
    """Tell classes of images apart, by a head over the base, or with `templates` by the names of the classes.

    The folder `path` holds one folder for each split, `train` and `validation`, with one for each class, and images of
    any format and size in these. Or they are in the columns `image` and `label` of the hub's `id` (with its `config`,
    at `revision`).

    `classes` names the classes: a list by number, or by what the data call them, such as `{1: pink primrose}`. Give it
    where parties train on rows of their own, of which one may lack a class, and where the data have numbers for names.
    `templates` are sentences such as `a photo of a {}, a type of flower`, for a base that holds images against texts
    (CLIP): `{}` stands for the name, with spaces for `_`. `shots` keeps so many training rows of each class, drawn from
    `seed`, and all of a class that has fewer, as few-shot learning commonly counts. `validation_split` and `test` are
    as for `text`; shots are drawn of the rows that then train.

    Raises DataError where the arguments, a folder, a column, a label or an image is wrong.
    """
    splits = Splits(train, (validation,), validation_split, test)
    name = Source(path, id, config, revision).named("images", splits)
    where = f"task {name}"
    measures = read_metrics(where, metric, OF_CLASSES | OF_VALUES)
    if measures[0].metric in OF_VALUES and not (classes is None and templates is None and shots is None):
        raise DataError(f"{where}: metric {measures[0]} is of values; leave out classes, templates and shots")
    if shots is not None and shots < 1:
        raise DataError(f"{where}: shots is {shots}, give at least 1")
    for template in templates or ():
        if "{}" not in template:
            raise DataError(f"{where}: template {template!r} has no {{}} where the name of a class goes")
    if templates == []:
        raise DataError(f"{where}: templates is empty; give one or more, such as 'a photo of a {{}}'")
    if path is not None and (image, label) != ("image", "label"):
        raise DataError(f"{where}: image and label are columns of the hub; leave them out with path")
    if path is not None:
        source = _open_folder(where, Path(path).expanduser(), splits)
    else:
        source = _open_hub(where, load_from_hub(where, id or "", config, revision), splits, image)
    others = () if path is not None else (image,)
    found = number_labels(where, source.tables, (), label, classes, measures, missing_cells, others)
    names = found.classes
    if classes is None and templates and all(name.isdecimal() for name in names):
        raise DataError(f"{where}: the classes have numbers for names, which no text matches; name them in classes")
    made: dict[str, Any] = {}
    for use, labelled in splits.dealt(where, found.splits).items():
        if labelled is None:
            continue
        few = shots is not None and use == "train"
        rows = _few(where, labelled.labels, names, shots or 0, seed) if few else np.arange(len(labelled))
        chosen, split = (
            labelled.take(rows, [column for column in labelled.columns if column != image]),
            splits.origin(use),
        )
        pixels = Images(f"{where}: {split}", source.images[split], np.asarray(chosen.numbers))
        pixels.check()
        made[use] = replace(chosen, columns={**chosen.columns, "pixel_values": pixels})
    return Task(
        name,
        ("pixel_values",),
        names,
        form="classify" if templates is None else "match",
        templates=tuple(templates or ()),
        **judged(found.measures),
        **made,
    )


def prompts(task: Task) -> list[str]:
    """Return what an image is held against: each class's name in every template, class by class."""
    return [template.replace("{}", name.replace("_", " ")) for name in task.classes for template in task.templates]


@dataclass(frozen=True)
class Images(Sequence[Any]):
    """N images that are decoded when asked for: `images[row]` is upright and in RGB.

    Raises DataError, in one line that names the image, for one that can't be decoded.
    """

    where: str  # the task and the split
    sources: Sequence[Any]  # of each a path, or the hub's `bytes` and `path`
    rows: NDArray[np.int64]  # [N], which of the sources
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # [N] or none: see `__getitem__`

    def __post_init__(self) -> None:
        if len(self.squares) < len(self.rows):
            object.__setattr__(self, "squares", np.zeros(len(self.rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        """Return an image; where it has a square, one of so large a share of its sides is white at the lower right."""
        with self._opened(row) as image:
            found = PIL.ImageOps.exif_transpose(image).convert("RGB")
        if (share := float(self.squares[row])) > 0:
            sides = [max(1, round(share * side)) for side in found.size]
            found.paste((255, 255, 255), (found.width - sides[0], found.height - sides[1], *found.size))
        return found

    def take(self, rows: NDArray[np.int64]) -> "Images":
        """Return some of the images."""
        return replace(self, rows=self.rows[rows], squares=self.squares[rows])

    def check(self) -> None:
        """Open each as far as its header."""
        for row in range(len(self)):
            with self._opened(row):
                pass

    @contextmanager
    def _opened(self, row: int) -> Iterator[PIL.Image.Image]:
        number = int(self.rows[row])
        source = self.sources[number]
        if not isinstance(source, Path):
            source = BytesIO(source["bytes"]) if source and source["bytes"] else source and source["path"]
        named = source if isinstance(source, Path) else f"row {number}"
        if source is None:
            raise DataError(f"{self.where}: {named} has no image, leave it out")
        try:
            with PIL.Image.open(source, formats=FORMATS) as image:
                if image.mode == "F" or image.mode.startswith("I"):  # would be cut off at 255
                    raise ValueError(f"its pixels are of mode {image.mode}; save it with 8 bits a channel")
                yield image
        except PIL.UnidentifiedImageError:
            raise DataError(
                f"{self.where}: {named} is no image; take it away, or save it as JPEG, PNG, WebP, GIF, TIFF or BMP"
            ) from None
        except Exception as error:  # on a damaged file, parsers raise whatever they stumble over
            reason = getattr(error, "strerror", None) or first_line(error)
            raise DataError(f"{self.where}: {named} can't be read ({reason})") from error


@dataclass(frozen=True)
class Pixels:
    """What images become for a base: `pixels[rows]` is `[b, C, H, W]`, computed then and there.

    Of the images that come first as much as `KEPT_BYTES` is kept. Others never take their place: all come round alike
    often, and what went would soon be wanted again.
    """

    images: Images
    process: Callable[[Any], Tensor]  # image → [C, H, W]
    kept: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, rows: NDArray[np.int64]) -> Tensor:
        with ThreadPoolExecutor() as pool:  # decoding runs beside Python
            return torch.stack(list(pool.map(self._one, rows.tolist())))

    def _one(self, row: int) -> Tensor:
        if row in self.kept:
            return self.kept[row]
        pixels = self.process(self.images[row])
        if pixels.nbytes * (len(self.kept) + 1) <= KEPT_BYTES:
            self.kept[row] = pixels
        return pixels


class _Source(NamedTuple):
    """Where a task comes from, by split."""

    tables: dict[str, Table]  # of the hub, the column of images says only which are there
    images: dict[str, Sequence[Any]]  # of each a path, or the hub's `bytes` and `path`


def _open_folder(where: str, folder: Path, splits: Splits) -> _Source:
    need_folder(where, folder, "a folder for each split")
    images: dict[str, Sequence[Any]] = {}
    for split, *_ in splits.wanted(where, _folders(folder)):
        if not (folder / split).is_dir():
            raise DataError(unknown(f"{where}: {folder}: split", split, _folders(folder)))
        names = _folders(folder / split)
        if not names:
            raise DataError(f"{where}: {folder / split} holds no folders; put each class's images in one of its name")
        files = [sorted((folder / split / name).iterdir()) for name in names]
        images[split] = [file for inner in files for file in inner if not file.name.startswith(".")]
    names = _folders(folder / splits.train)
    classes = tuple(sorted(names, key=int) if all(map(str.isdecimal, names)) else names)
    tables = {
        split: Table({"label": [file.parent.name for file in files]}, np.arange(len(files)), classes={"label": classes})
        for split, files in images.items()
    }
    return _Source(tables, images)


def _folders(folder: Path) -> list[str]:
    return sorted(inner.name for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith("."))


def _open_hub(where: str, found: Mapping[str, Any], splits: Splits, image: str) -> _Source:
    tables, images = {}, {}
    for split, *_ in splits.wanted(where, found):
        if split not in found:
            raise DataError(unknown(f"{where}: split", split, found))
        tables[split], images[split] = image_columns(f"{where}: {split}", found[split], image)
    return _Source(tables, images)


def _few(where: str, labels: NDArray[Any], names: Sequence[str], shots: int, seed: int) -> NDArray[np.int64]:
    """Return `shots` rows of each class, drawn from the seed and the class, and all of a class that has fewer."""
    by_class = [np.flatnonzero(labels == number) for number in range(len(names))]
    scarce = sum(len(rows) < shots for rows in by_class)
    if scarce:
        log.info("%s: %d of %d classes have fewer rows than %d shots", where, scarce, len(names), shots)
    drawn = [generator(seed, Draw.SHOTS, number).permutation(rows)[:shots] for number, rows in enumerate(by_class)]
    return np.sort(np.concatenate(drawn))
