import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from tabular import FORMATS, called, write_splits

from peertune.data.language import label_words
from peertune.data.tables import missing
from peertune.data.tasks import glue, text
from peertune.errors import DataError
from peertune.types import Task


def task_of(folder: Path, suffix: str, labels: Sequence[Any], **settings: Any) -> Task:
    columns = {"text": [f"row {row}" for row in range(len(labels))], "label": labels}
    return text(["text"], "label", path=write_splits(folder, suffix, columns), **settings)


def counts(task: Task) -> list[int]:
    return [int((task.train.labels == number).sum()) for number in range(len(task.classes))]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["01"] * 5 + ["02"] * 3, ["01", "02", "03"]),
        (["1.10"] * 5 + ["1.2"] * 3, ["1.10", "1.2", "1.1"]),
        (["1_0"] * 5 + ["10"] * 3, ["1_0", "10", "1"]),
    ],
)
def test_what_is_named_is_text(suffix: str, labels: list[str], classes: list[str], tmp_path: Path) -> None:
    task = task_of(tmp_path, suffix, labels, classes=classes)
    assert task.classes == tuple(classes)
    assert counts(task) == [5, 3, 0]


@pytest.mark.parametrize("suffix", FORMATS)
def test_texts_that_are_no_numbers_are_names_without_being_named(suffix: str, tmp_path: Path) -> None:
    assert task_of(tmp_path, suffix, ["01", "02", "01", "10"]).classes == ("01", "02", "10")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        ([2, 0, 1], ["1", "2", "3"], "label: unknown name '0', choose from 1, 2, 3"),
        (["dog", 1, 0], ["cat", "dog"], "label: unknown name '1', choose from cat, dog; name what the data number by"),
    ],
)
def test_a_number_is_no_class_where_classes_have_names(
    suffix: str, labels: list[Any], classes: list[str], said: str, tmp_path: Path
) -> None:
    labels = list(map(str, labels)) if suffix == "parquet" else labels  # whose columns have one type
    with pytest.raises(DataError, match=f"^task text/{tmp_path.name}: train: {called(suffix, 1)}: {said}"):
        task_of(tmp_path, suffix, labels, classes=classes)


@pytest.mark.parametrize("suffix", FORMATS)
def test_numbers_are_named_by_what_the_data_call_them(suffix: str, tmp_path: Path) -> None:
    task = task_of(tmp_path, suffix, [7, 3, 7], classes={7: "spam", 3: "ham", 5: "eggs"})
    assert (task.classes, task.train.labels.tolist()) == (("spam", "ham", "eggs"), [0, 1, 0])
    with pytest.raises(DataError, match=r"unknown name '7', choose from 1, 3$"):
        task_of(tmp_path, suffix, [7, 3, 7], classes={1: "spam", 3: "ham"})


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", [int, float, str])
def test_numbers_are_in_their_own_order_however_they_are_stored(suffix: str, kind: type, tmp_path: Path) -> None:
    task = task_of(tmp_path, suffix, [kind(number) for number in (10, *range(11))])
    assert task.classes == tuple(map(str, range(11)))
    assert task.train.labels.tolist() == [10, *range(11)]


@pytest.mark.parametrize("how", ["hub", "parquet"])
def test_a_data_set_that_numbers_its_classes_is_read_by_its_own_numbers(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2", "3"])}
    )
    labels = [0, 1, 1, 2, 2, 2, -1]
    made = datasets.Dataset.from_dict({"text": list("abcdefg"), "label": labels}, features)
    if how == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": made, "validation": made})
    else:
        for split in ("train", "validation"):
            made.to_parquet(tmp_path / f"{split}.parquet")
    where: dict[str, Any] = {"id": "some/data"} if how == "hub" else {"path": str(tmp_path)}
    with pytest.raises(DataError, match=r"train: no label in 1 of 7 rows \(row 6\)"):
        text(["text"], "label", **where)
    task = text(["text"], "label", **where, missing_cells="drop")
    assert (task.classes, counts(task)) == (("1", "2", "3"), [1, 2, 3])
    assert task.train.columns["label"] == ["1", "2", "2", "3", "3", "3"]
    other = text(["text"], "label", **where, missing_cells="drop", classes=["3", "2", "1", "0"])
    assert counts(other) == [3, 2, 1, 0], "by name, where the recipe has an order of its own"


def test_a_model_is_not_given_what_it_is_to_learn(tmp_path: Path) -> None:
    folder = write_splits(tmp_path, "csv", {"text": ["a", "b"], "label": ["x", "y"]})
    with pytest.raises(DataError, match="label is what is learnt, and stands in what a model is given"):
        text(["text", "label"], "label", path=folder)
    with pytest.raises(DataError, match="label is what is learnt, and stands in what a model is given"):
        label_words("{text} is {label}:", "label", ["a", "b"], path=folder)


def test_what_a_csv_file_holds_is_text_when_it_is_read_by_its_id_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    labels, gaps = ["01", "02", "01", "1"], [None, "NaN", 1, 2.5]
    columns: dict[str, list[Any]] = {"text": ["a", "b", "NA", "d"], "label": labels, "gap": gaps}
    folder = write_splits(tmp_path / "data", "csv", columns)
    task = text(["text"], "label", id=folder, classes=["1", "02", "01"])
    assert task.train.labels.tolist() == [2, 1, 2, 0]
    assert list(map(missing, task.train.columns["gap"])) == [True, True, False, False]
    read = text(["text"], "label", path=folder, classes=["1", "02", "01"]).train.columns
    assert [task.train.columns[name] for name in ("text", "label")] == [read[name] for name in ("text", "label")]


@pytest.mark.parametrize("labels", [[0, 1, 1], ["equivalent", "not_equivalent", "1"], [0.0, 1.0, 1.0]])
@pytest.mark.parametrize("suffix", FORMATS)
def test_glue_has_numbers_and_names(suffix: str, labels: list[Any], tmp_path: Path) -> None:
    columns = {"sentence1": list("abc"), "sentence2": list("def"), "label": labels}
    task = glue("mrpc", path=write_splits(tmp_path, suffix, columns))
    assert task.train.labels.tolist() == ([1, 0, 1] if isinstance(labels[0], str) else [0, 1, 1])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("label", ["1_0", "٣", "1,5", "inf", "0x1", True])
def test_a_target_that_is_not_written_as_a_number_is_refused(suffix: str, label: Any, tmp_path: Path) -> None:
    labels = ["2.5", label, "-1e3"]
    if suffix == "parquet":
        labels = list(map(str, labels))
    said = rf"{called(suffix, 1)}: label is '?{re.escape(str(label))}'?, a regression's must be a finite number$"
    with pytest.raises(DataError, match=said):
        task_of(tmp_path, suffix, labels, metric="pearson")
    labels[1] = " +.5"
    assert task_of(tmp_path, suffix, labels, metric="pearson").train.labels.tolist() == [2.5, 0.5, -1000]


def test_fractions_are_named_or_learnt_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the labels are fractions, choose metric pearson .*, or name them"):
        task_of(tmp_path, "csv", ["1.5", "2.0"])
    assert task_of(tmp_path, "csv", ["1.5", "2.0"], classes=["2.0", "1.5"]).train.labels.tolist() == [1, 0]
