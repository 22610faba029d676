"""Tasks: what is learnt, and from which rows.

A task comes from the Hugging Face hub, from a local folder or, for `digits`, with this package (see `sources`).
`TASKS` names the factories; a factory's signature is its schema in a recipe.
"""

from collections.abc import Callable
from typing import NamedTuple

from peertune.data.digits import digits
from peertune.data.images import images
from peertune.data.labels import Classes, number_labels
from peertune.data.language import instructions, label_words
from peertune.data.measures import Metrics, judged, read_metrics
from peertune.data.scores import OF_CLASSES, OF_ONE_CLASS, OF_VALUES
from peertune.data.sources import Source
from peertune.data.splits import Splits
from peertune.data.tables import MissingCells
from peertune.errors import DataError, unknown
from peertune.types import Measure, Task


class _Glue(NamedTuple):
    inputs: tuple[str, ...]
    classes: tuple[str, ...]
    metric: str
    validation: tuple[str, ...] = ("validation",)


_GLUE = {
    "cola": _Glue(("sentence",), ("unacceptable", "acceptable"), "matthews_correlation"),
    "sst2": _Glue(("sentence",), ("negative", "positive"), "accuracy"),
    "mrpc": _Glue(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "accuracy"),
    "qqp": _Glue(("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy"),
    "stsb": _Glue(("sentence1", "sentence2"), (), "pearson"),
    "mnli": _Glue(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        ("validation", "validation_matched"),
    ),
    "qnli": _Glue(("question", "sentence"), ("entailment", "not_entailment"), "accuracy"),
    "rte": _Glue(("sentence1", "sentence2"), ("entailment", "not_entailment"), "accuracy"),
    "wnli": _Glue(("sentence1", "sentence2"), ("not_entailment", "entailment"), "accuracy"),
}


def glue(
    config: str,
    path: str | None = None,
    revision: str | None = None,
    metric: Metrics | None = None,
    field: str | None = None,
    validation_split: float | str | None = None,
    test: str | None = None,
    *,
    missing_cells: MissingCells = "refuse",
) -> Task:
    """One of the nine tasks of GLUE (Wang et al., ICLR 2019), with its own columns, class numbers and main metric.

    `config` is the hub's name of the task, such as `sst2`; `path` a folder to read in place of the hub's `nyu-mll/glue`
    at `revision`, where `field` says what in JSON files holds the rows. MNLI validates on its matched rows. Where GLUE
    has two metrics, `metric` is accuracy, or Pearson's correlation, unless another is named, or several. F1 is of class
    1. `validation_split` and `test` are as for `text`; since the hub's test rows have no labels, many test on GLUE's
    validation rows, by `test: validation` beside a `validation_split`.

    Raises DataError for an unknown config, a metric that does not suit it, and data that are missing or malformed.
    """
    if config not in _GLUE:
        raise DataError(unknown("task glue: config", config, _GLUE))
    known = _GLUE[config]
    where = f"task glue/{config}"
    fitting = OF_CLASSES if known.classes else OF_VALUES
    measures = read_metrics(where, known.metric if metric is None else metric, fitting)
    if len(known.classes) == 2:
        measures = [
            m if m.of or m.metric not in OF_ONE_CLASS else Measure(m.metric, known.classes[1]) for m in measures
        ]
    if path is not None and revision is not None:
        raise DataError(f"{where}: revision is of the hub; leave it out with path")
    if path is None and field is not None:
        raise DataError(f"{where}: field is of a folder's JSON files; give path, or leave it out")
    splits = Splits("train", known.validation, validation_split, test)
    splits.check(where)
    tables = Source(path, "nyu-mll/glue", config, revision, field).read(where, splits)
    tables = {  # rows that are not the hub's have the benchmark's numbers all the same
        split: table.named("label", known.classes) if known.classes and "label" in table.columns else table
        for split, table in tables.items()
    }
    found = number_labels(where, tables, known.inputs, "label", None, measures, missing_cells)
    dealt = splits.dealt(where, found.splits)
    return Task(f"glue/{config}", known.inputs, found.classes, **judged(found.measures), **dealt)


def text(
    inputs: list[str],
    label: str,
    path: str | None = None,
    id: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    validation: str = "validation",
    metric: Metrics = "accuracy",
    classes: Classes | None = None,
    field: str | None = None,
    validation_split: float | str | None = None,
    test: str | None = None,
    *,
    missing_cells: MissingCells = "refuse",
) -> Task:
    """Classify or score any sentences or pairs of sentences.

    `inputs` names one or two columns of text, `label` the column to learn, `validation` the split to validate on; the
    data are in the folder `path`, where `field` says what in JSON files holds the rows, or are the hub's `id` (with its
    `config`, at `revision`). Labels are numbers from 0, or names, which are numbered in sorted order unless the data
    set numbers them itself, or `classes` does: a list of names by number, or by what the data call them, such as
    `{0: ham, 1: spam}`. Give it where parties train on rows of their own, of which one may lack a class. With the
    metric `pearson` or `spearman` labels are the targets of a regression. `f1` is of one class: `{name: f1, of: spam}`,
    or class 1 where the classes are 0 and 1. Of several metrics the first is what is judged by.

    Where the data come without rows to validate on, `validation_split` takes some of `train`, a share such as .1 or a
    fold such as `1/10`, the same rows in every run. `test` names a split that is kept for the end.

    Raises DataError where the arguments, a file, a column or a label is wrong.
    """
    source = Source(path, id, config, revision, field)
    splits = Splits("train", (validation,), validation_split, test)
    name = source.named("text", splits)
    where = f"task {name}"
    if not 1 <= len(inputs) <= 2:
        raise DataError(f"task text: inputs names {len(inputs)} columns, give one or two")
    measures = read_metrics(where, metric, OF_CLASSES | OF_VALUES)
    tables = source.read(where, splits)
    found = number_labels(where, tables, tuple(inputs), label, classes, measures, missing_cells)
    dealt = splits.dealt(where, found.splits)
    return Task(name, tuple(inputs), found.classes, **judged(found.measures), **dealt)


TASKS: dict[str, Callable[..., Task]] = {
    "digits": digits,
    "glue": glue,
    "images": images,
    "instructions": instructions,
    "label_words": label_words,
    "text": text,
}


_HUB_SETTINGS = {
    "glue": ("revision",),
    "images": ("id", "config", "revision", "image", "label"),
    **dict.fromkeys(("instructions", "label_words", "text"), ("id", "config", "revision")),
}


def hub_settings(task: str) -> tuple[str, ...]:
    """Return the settings of a task that say something only where its rows are the hub's."""
    return _HUB_SETTINGS.get(task, ())
