import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score
from tabular import FORMATS, write

from peertune.data import digits
from peertune.data.digits import public_digits
from peertune.data.measures import scorers
from peertune.data.scores import METRICS, OF_VALUES, same
from peertune.data.tasks import TASKS, glue, text
from peertune.errors import DataError
from peertune.types import Task

# The columns on the hub, and the names of the classes by number.
GLUE = {
    "cola": (("sentence",), ("unacceptable", "acceptable"), "matthews_correlation"),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy"),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "accuracy"),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment"), "accuracy"),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy"),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment"), "accuracy"),
    "sst2": (("sentence",), ("negative", "positive"), "accuracy"),
    "stsb": (("sentence1", "sentence2"), (), "pearson"),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment"), "accuracy"),
}


def folder(
    tmp_path: Path, labels: Sequence[Any], validation: Sequence[Any] | None = None, suffix: str = "jsonl"
) -> str:
    for name, values in {"train": labels, "validation": labels if validation is None else validation}.items():
        write(tmp_path / f"{name}.{suffix}", {"text": [f"row {n}" for n in range(len(values))], "label": values})
    return str(tmp_path)


def read(path: str, **settings: Any) -> Task:
    return text(["text"], "label", path=path, **settings)


def test_sst2_is_read_from_a_folder(glue_path: Path) -> None:
    task = glue("sst2", path=str(glue_path / "sst2"))
    assert (task.name, task.inputs, task.classes) == ("glue/sst2", ("sentence",), ("negative", "positive"))
    assert np.bincount(task.train.labels).tolist() == [26_530, 33_470]
    assert (len(task.train), len(task.validation)) == (60_000, 872)
    assert task.train.labels.dtype == np.int64
    assert all(isinstance(sentence, str) for sentence in task.validation.columns["sentence"])


def test_mnli_has_pairs(glue_path: Path) -> None:
    task = glue("mnli", path=str(glue_path / "mnli"))
    assert task.inputs == ("premise", "hypothesis")
    assert len(task.validation) == 7_703
    assert set(task.validation.columns) >= {"premise", "hypothesis", "label"}


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("config", GLUE)
def test_each_glue_task_has_its_own_columns_classes_and_metric(config: str, suffix: str, tmp_path: Path) -> None:
    inputs, classes, metric = GLUE[config]
    labels = list[float](range(len(classes))) or [0.0, 2.5]
    columns = {name: [f"{name} {row}, and more" for row in labels] for name in inputs} | {
        "label": labels,
        "idx": labels,
    }
    write(tmp_path / f"train.{suffix}", columns)
    write(tmp_path / f"{'validation_matched' if config == 'mnli' else 'validation'}.{suffix}", columns)
    task = glue(config, path=str(tmp_path))
    assert (task.inputs, task.classes, task.metric) == (inputs, classes, metric)
    assert task.train.labels.tolist() == task.validation.labels.tolist() == labels
    assert task.train.labels.dtype == (np.int64 if classes else np.float64)
    assert task.train.columns[inputs[0]][0] == f"{inputs[0]} {labels[0]}, and more"
    assert "idx" in task.train.columns


def test_glue_takes_its_second_metric(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", {"sentence1": "ab", "sentence2": "cd", "label": [0, 1]})
    write(tmp_path / "validation.csv", {"sentence1": "ab", "sentence2": "cd", "label": ["equivalent", 0]})
    task = glue("mrpc", path=str(tmp_path), metric="f1")
    assert (task.metric, task.of, str(task.measures[0])) == ("f1", "equivalent", "f1 of equivalent")
    assert task.validation.labels.tolist() == [1, 0]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_names_are_numbered_in_sorted_order(suffix: str, tmp_path: Path) -> None:
    task = read(folder(tmp_path, ["spam", "ham", "eggs"], ["ham", "spam"], suffix))
    assert task.classes == ("eggs", "ham", "spam")
    assert task.train.labels.tolist() == [2, 1, 0]
    assert task.validation.labels.tolist() == [1, 2]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_numbers_stay_as_they_are(suffix: str, tmp_path: Path) -> None:
    task = read(folder(tmp_path, [2, 0, 1, 10, *range(3, 10)], [10, 1], suffix))
    assert task.classes == tuple(map(str, range(11)))
    assert task.train.labels.tolist() == [2, 0, 1, 10, *range(3, 10)]
    assert task.validation.labels.tolist() == [10, 1]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_regression_has_targets_and_no_classes(suffix: str, tmp_path: Path) -> None:
    task = read(folder(tmp_path, [0.5, 4.0, 2.25], suffix=suffix), metric="spearman")
    assert task.classes == ()
    assert task.train.labels.dtype == np.float64
    assert task.train.labels.tolist() == [0.5, 4.0, 2.25]


def test_another_split_may_validate(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", {"text": "ab", "label": [0, 1]})
    write(tmp_path / "dev.parquet", {"text": "abc", "label": [0, 1, 1]})
    assert len(read(str(tmp_path), validation="dev").validation) == 3


def test_digits_are_images_that_the_public_digits_share_nothing_with() -> None:
    task, public = TASKS["digits"](), public_digits()
    assert task.inputs == ("pixel_values",)
    assert task.classes == ("5", "6", "7", "8", "9")
    parts = [np.asarray(split.columns["pixel_values"]) for split in (task.train, task.validation, public)]
    for images, split in zip(parts, (task.train, task.validation, public), strict=True):
        assert images.shape == (len(split), 1, 8, 8)
        assert images.dtype == np.float32
        assert images.min() == -1
        assert images.max() == 1
        assert set(split.labels) == set(range(5))
        assert split.labels.dtype == np.int64
    assert [len(part) for part in parts] == [716, 180, 901]
    distinct = {image.tobytes() for part in parts for image in part}
    assert len(distinct) == sum(len(part) for part in parts)
    shares = np.bincount(task.validation.labels) / (
        np.bincount(task.train.labels) + np.bincount(task.validation.labels)
    )
    assert shares == pytest.approx(0.2, abs=0.01)


def test_the_digits_are_those_of_scikit_learn_which_draws_for_validation(tmp_path: Path) -> None:
    digits.write(tmp_path / "digits.npz")
    with np.load(tmp_path / "digits.npz") as written, np.load(Path(digits.__file__).with_name("digits.npz")) as kept:
        assert set(written) == set(kept) == {"levels", "labels", "parts"}
        assert all(np.array_equal(written[name], kept[name]) for name in kept)


def test_writers_begin_where_the_sequence_of_labels_begins_anew() -> None:
    with np.load(Path(digits.__file__).with_name("digits.npz")) as kept:
        labels, parts = kept["labels"].tolist(), kept["parts"]
    # Forms have the labels of the first, but for one that differs and some that are missing. So one walks along the
    # first, over and over, and skips what does not show: as few labels as let the next five agree.
    form, place, begins = labels[:130] * 15, 0, []
    for row in range(len(labels)):
        skipped = [k for k in range(8) if form[place + k : place + k + 5] == labels[row : row + 5]]
        before, place = place, place + (skipped[0] if skipped and form[place] != labels[row] else 0) + 1
        if not row or (before - 1) // 130 < (place - 1) // 130:
            begins.append(row)
    assert len(begins) == 14
    task = TASKS["digits"]()
    for part, split in (("train", task.train), ("validation", task.validation)):
        rows = np.flatnonzero(parts == part)
        assert list(split.columns["writer"]) == [sum(row >= begin for begin in begins) - 1 for row in rows]
    per_writer = np.bincount(np.asarray(task.train.columns["writer"]))
    assert (len(per_writer), per_writer.min(), per_writer.max()) == (14, 47, 55)


def test_writers_that_are_held_out_have_all_their_digits_in_the_validation_set() -> None:
    usual, task = TASKS["digits"](), TASKS["digits"](held_out_writers=[12, 3])
    train, validation = (np.asarray(split.columns["writer"]) for split in (task.train, task.validation))
    assert set(validation) == {3, 12}
    assert set(train) == set(range(14)) - {3, 12}
    everything = np.concatenate(
        [np.asarray(split.columns["pixel_values"]) for split in (usual.train, usual.validation)]
    )
    parts = np.concatenate([np.asarray(split.columns["pixel_values"]) for split in (task.train, task.validation)])
    assert sorted(image.tobytes() for image in parts) == sorted(image.tobytes() for image in everything)
    writers = np.concatenate([np.asarray(split.columns["writer"]) for split in (usual.train, usual.validation)])
    labels = np.concatenate([usual.train.labels, usual.validation.labels])
    assert np.bincount(task.validation.labels).tolist() == np.bincount(labels[np.isin(writers, [3, 12])]).tolist()


@pytest.mark.parametrize("writers", [[], [14], [-1], [3, 3], list(range(14))])
def test_writers_that_can_not_be_held_out_are_refused(writers: list[int]) -> None:
    with pytest.raises(
        DataError, match=r"^task digits: held_out_writers is .*; name some of 0 to 13, each once, and not"
    ):
        TASKS["digits"](held_out_writers=writers)


def test_metrics_of_a_small_example() -> None:
    predictions, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    assert METRICS["accuracy"](predictions, labels) == pytest.approx(3 / 5)
    assert METRICS["f1"](predictions, labels) == pytest.approx(2 / 3)
    assert METRICS["macro_f1"](predictions, labels) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert METRICS["macro_f1"](predictions, labels) == f1_score(labels, predictions, average="macro")
    assert METRICS["matthews_correlation"](predictions, labels) == pytest.approx(1 / 6)
    assert METRICS["balanced_accuracy"](predictions, labels) == pytest.approx((2 / 3 + 1 / 2) / 2)
    several, said = np.array([0, 0, 0, 2, 2, 4]), np.array([0, 0, 4, 2, 0, 2])
    assert METRICS["balanced_accuracy"](said, several) == pytest.approx(balanced_accuracy_score(several, said))
    assert METRICS["pearson"](predictions, labels) == pytest.approx(1 / 6)
    assert METRICS["spearman"](np.array([1.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(1)


@pytest.mark.parametrize("metric", ["f1", "matthews_correlation", *sorted(OF_VALUES)])
def test_predictions_that_are_all_alike_score_nothing(metric: str) -> None:
    value = 0 if metric in {"f1", "matthews_correlation"} else 0.1
    assert METRICS[metric](np.full(7, value), np.array([0, 1, 0, 1, 0, 1, 1])) == 0
    assert METRICS[metric](np.full(7, value), np.zeros(7, np.int64)) == 0


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("labels", "metric", "of", "score"),
    [
        (["fraud", "legit"], {"name": "f1", "of": "fraud"}, "fraud", 0.0),
        (["fraud", "legit"], {"name": "f1", "of": "legit"}, "legit", 6 / 7),
        ([0, 1], "f1", "1", 6 / 7),
        ([0, 1], {"name": "f1", "of": 0}, "0", 0.0),
        (["a", "b", "c"], {"name": "f1", "of": "b"}, "b", 6 / 7),
        (["fraud", "legit"], "macro_f1", None, 3 / 7),
    ],
)
def test_f1_is_of_a_class_that_is_named(
    labels: list[Any], metric: Any, of: str | None, score: float, suffix: str, tmp_path: Path
) -> None:
    task = read(folder(tmp_path, labels, [labels[0], labels[1], labels[1], labels[1]], suffix), metric=metric)
    assert task.of == of
    assert str(task.measures[0]) == ("macro_f1" if of is None else f"f1 of {of}")
    answers = np.full(4, 1)  # never the first class
    assert scorers(task)[0](answers, task.validation.labels) == pytest.approx(score)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_predictions_that_are_not_finite_score_nothing(metric: str) -> None:
    assert METRICS[metric](np.array([np.nan, 1, 2]), np.array([0.0, 1, 2])) == 0


@pytest.mark.parametrize(
    ("train", "validation", "settings", "message"),
    [
        ([0, 1, -1], None, {}, "the labels are -1, 0, 1: number the classes from 0 without a gap, .* label"),
        ([1, 2], None, {}, "the labels are 1, 2: number the classes from 0 without a gap"),
        ([0, 1], [0, -1], {}, "validation: line 2: label is -1, which marks a row without one; leave it out"),
        ([0, 1], [0, 2], {}, "validation: line 2: label: unknown name '2', choose from 0, 1$"),
        (
            ["no", "yes"],
            ["no", "yess"],
            {},
            "line 2: label: unknown name 'yess', did you mean yes. The classes are no, yes$",
        ),
        (
            [0, None],
            None,
            {},
            "train: no label in 1 of 2 rows .line 2.; validation: .*=drop leaves these rows out$",
        ),
        ([0, [1]], None, {}, r"train: line 2: label is \[1\], it must be a number or a name"),
        ([0, 1], [], {}, "validation: no rows, give at least one"),
        ([], None, {}, "train: no rows, give at least one"),
        ([1.5, 2.5], None, {}, "the labels are fractions, choose metric pearson or spearman"),
        ([0, 0], None, {}, "all rows of train have the label 0, give at least two classes"),
        (
            [0, 1, 2],
            None,
            {"metric": "f1"},
            "f1 is of one class; say of which of 0, 1, 2, as in .* or choose macro_f1",
        ),
        (["no", "yes"], None, {"metric": "f1"}, "say of which of no, yes, as in task.metric={name: f1, of: yes}, or"),
        (
            ["no", "yes"],
            None,
            {"metric": {"name": "f1", "of": "yess"}},
            "f1: of: unknown name 'yess', did you mean ye",
        ),
        (
            [0, 1],
            None,
            {"metric": {"name": "f1"}},
            "metric is .*; give a name, or name and of, as in .name: f1",
        ),
        ([0, 1], None, {"metric": {"name": "accuracy", "of": 1}}, "metric accuracy is of no one class; leave out of"),
        (["a", 1], None, {"metric": "pearson"}, "train: line 1: label is 'a', a regression's must be a finite number"),
        ([0, 1], None, {"metric": "acuracy"}, "metric: unknown name 'acuracy', did you mean accuracy?"),
        ([0, 1], None, {"validation": "dev"}, "holds none of dev.parquet, dev.csv, dev.jsonl, dev.json$"),
    ],
)
def test_wrong_data_are_refused_in_one_line(
    train: Sequence[Any],
    validation: Sequence[Any] | None,
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=f"^task text/{tmp_path.name}: .*{message}") as caught:
        read(folder(tmp_path, train, validation), **settings)
    assert "\n" not in str(caught.value)


def test_a_class_out_of_range_of_glue_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", {"sentence": "abc", "label": [0, 1, 2]})
    write(tmp_path / "validation.csv", {"sentence": "abc", "label": [0, 1, 1]})
    with pytest.raises(
        DataError, match=r"^task glue/sst2: train: line 4: label: unknown name '2', choose from negative, positive$"
    ):
        glue("sst2", path=str(tmp_path))


def test_a_missing_folder_file_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^task glue/sst2: .*/nowhere is not there, give the folder that holds train"):
        glue("sst2", path=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"holds none of train.parquet, train.csv, train.jsonl, train.json$"):
        glue("sst2", path=str(tmp_path))
    path = folder(tmp_path, [0, 1])
    with pytest.raises(DataError, match=r"train: column: unknown name 'txet', did you mean text\?"):
        text(["txet"], "label", path=path)
    with pytest.raises(DataError, match=r"train: column: unknown name 'gold', choose from label, text$"):
        text(["text"], "gold", path=path)
    with pytest.raises(DataError, match=r"train: line 1: label is 0, it must be text$"):
        text(["label"], "text", path=path)


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(DataError, match=r"^task glue: config: unknown name 'sst', did you mean sst2\?"):
        glue("sst")
    with pytest.raises(
        DataError, match=r"^task glue/sst2: metric pearson does not fit; choose from accuracy, balanced_"
    ):
        glue("sst2", metric="pearson")
    with pytest.raises(DataError, match=r"^task glue/stsb: metric f1 does not fit; choose from pearson, spearman$"):
        glue("stsb", metric="f1")
    with pytest.raises(DataError, match=r"^task text: give either path \(a folder\) or id"):
        text(["text"], "label")
    with pytest.raises(DataError, match=r"^task text: give either path \(a folder\) or id"):
        text(["text"], "label", path="here", id="there")
    with pytest.raises(DataError, match=r"^task text: inputs names 3 columns, give one or two"):
        text(["a", "b", "c"], "label", path="here")


def test_an_unreachable_hub_is_said_at_once() -> None:
    start_s = time.monotonic()
    message = "not in the local cache and the hub can't be reached; give task.path=FOLDER$"
    with pytest.raises(DataError, match=f"^task glue/wnli: {message}"):
        glue("wnli", revision="no-such-revision")
    with pytest.raises(DataError, match=f"^task text/peertune/nothing-of-this-name: {message}"):
        text(["text"], "label", id="peertune/nothing-of-this-name")
    assert time.monotonic() - start_s < 15  # what tries again takes longer


def test_a_data_set_of_the_hub_brings_its_own_numbering(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    split = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": split, "test": split})
    task = text(["text"], "label", id="some/data", validation="test")
    assert task.classes == ("yes", "no")
    assert task.train.labels.tolist() == [0, 1]
    with pytest.raises(
        DataError,
        match=r"^task text/some/data: there is no split validation to validate on, but test, train; name another, or",
    ):
        text(["text"], "label", id="some/data")


def test_classes_that_are_named_need_not_all_be_in_a_partys_rows(tmp_path: Path) -> None:
    task = read(folder(tmp_path, ["ham", "ham"], ["spam"]), classes=["eggs", "ham", "spam"])
    assert task.classes == ("eggs", "ham", "spam")
    assert (task.train.labels.tolist(), task.validation.labels.tolist()) == ([1, 1], [2])
    with pytest.raises(DataError, match="did you mean spam"):
        read(folder(tmp_path, ["spma"], ["spam"]), classes=["eggs", "ham", "spam"])


@pytest.mark.parametrize("classes", [["ham"], ["ham", "ham"], []])
def test_classes_that_cannot_be_are_refused(classes: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give two or more different names"):
        read(folder(tmp_path, ["ham", "spam"]), classes=classes)


@pytest.mark.parametrize(
    ("generated", "reference", "right"),
    [
        ("so it is 1,234.50", "#### 1234.5", True),
        ("the answer-7", "7", True),
        ("x = -7", "-7", True),
        ("10-7", "-7", False),
        ("[1,2,3]", "123", False),
        ("[1,2,3]", "3", True),
        ("nothing", "3", False),
    ],
)
def test_the_last_number_is_read_as_people_write_it(generated: str, reference: str, right: bool) -> None:
    assert same("last_number", generated, reference) is right
