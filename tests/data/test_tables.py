import json
import logging
import re
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tabular import FORMATS, called, write_splits

from peertune.data.language import instructions, label_words
from peertune.data.tables import made, whole
from peertune.data.tasks import text
from peertune.errors import DataError

GAPS: dict[str, list[Any]] = {
    "text": ["a", None, "", " \t", "e", "f", "g"],
    "label": ["x", "y", "x", "y", None, "x", "y"],
}
"""Rows 1 to 3 have no text, and row 4 no label."""


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_that_lack_a_cell_are_counted_together_and_refused(suffix: str, tmp_path: Path) -> None:
    path = write_splits(tmp_path, suffix, GAPS, validation={"text": ["a", ""], "label": ["x", "y"]})
    with pytest.raises(DataError) as caught:
        text(["text"], "label", path=path)
    assert str(caught.value) == (
        f"task text/{tmp_path.name}: train: no text in 3 of 7 rows (first {called(suffix, 1)}), "
        f"no label in 1 of 7 rows ({called(suffix, 4)}); validation: no text in 1 of 2 rows ({called(suffix, 1)}); "
        "missing_cells=drop leaves these rows out"
    )


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_that_lack_a_cell_are_left_out_where_that_is_asked_for_and_told(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_splits(tmp_path, suffix, GAPS)
    with caplog.at_level(logging.WARNING):
        task = text(["text"], "label", path=path, missing_cells="drop")
    assert list(task.train.columns["text"]) == ["a", "f", "g"]
    assert task.train.labels.tolist() == [0, 0, 1]
    assert (task.train.left_out, task.validation.left_out) == (4, 4)
    assert [task.train.called(row) for row in range(3)] == [called(suffix, row) for row in (0, 5, 6)]
    assert "train: no text in 3 of 7 rows" in caplog.text
    assert "these rows are left out (missing_cells)" in caplog.text
    write_splits(tmp_path, suffix, {"text": ["", "b"], "label": ["x", None]})
    with pytest.raises(DataError, match="train: each row lacks text or label; give at least one whole row"):
        text(["text"], "label", path=path, missing_cells="drop")


@pytest.mark.parametrize("suffix", FORMATS)
def test_missing_text_is_empty_where_that_is_asked_for_and_a_label_never_is(suffix: str, tmp_path: Path) -> None:
    path = write_splits(tmp_path, suffix, {"text": GAPS["text"], "label": list("xyxyxyx")})
    with pytest.raises(DataError, match=r"these rows out, missing_cells=empty takes what is missing for empty text$"):
        text(["text"], "label", path=path)
    task = text(["text"], "label", path=path, missing_cells="empty")
    assert list(task.train.columns["text"]) == ["a", "", "", "", "e", "f", "g"]
    write_splits(tmp_path, suffix, GAPS)
    with pytest.raises(DataError, match=r"no label in 1 of 7 rows \(.*; missing_cells=drop leaves these rows out$"):
        text(["text"], "label", path=path, missing_cells="empty")


@pytest.mark.parametrize("suffix", FORMATS)
def test_nan_is_nothing_in_every_format(suffix: str, tmp_path: Path) -> None:
    path = write_splits(tmp_path, suffix, {"text": list("abc"), "label": [1.0, nan, 0.0]})
    with pytest.raises(DataError, match=rf"train: no label in 1 of 3 rows \({called(suffix, 1)}\)"):
        text(["text"], "label", path=path)
    task = text(["text"], "label", path=path, missing_cells="drop")
    assert (task.classes, task.train.labels.tolist()) == (("0", "1"), [1, 0])


def test_a_row_of_json_without_a_key_lacks_that_cell(tmp_path: Path) -> None:
    lines = [{"text": "a", "label": 0}, {}, {"text": "b", "label": 1}, {"label": 1}]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(DataError, match=r"no text in 2 of 4 rows \(first line 2\), no label in 1 of 4 rows \(line 2\)"):
        text(["text"], "label", path=str(tmp_path))


def test_the_line_of_a_row_is_where_it_begins(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text('text,label\n"a\n\nb",0\n\n"c\nd",\ne,1\n')
    with pytest.raises(DataError, match=r"train: no label in 1 of 3 rows \(line 6\)"):
        text(["text"], "label", path=str(tmp_path))


def test_one_rule_holds_for_what_a_language_model_is_given(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "instruction": ["add", "sum", "say"],
        "input": ["1 2", None, ""],
        "output": ["3", "4", None],
    }
    path = write_splits(tmp_path, "parquet", columns)
    words: dict[str, Any] = {"path": path, "prompt": "{instruction}\n{input}\n", "completion": "{output}"}
    said = "no input in 2 of 3 rows (first row 1), no output in 1 of 3 rows (row 2)"
    with pytest.raises(DataError, match=re.escape(said)):
        instructions(**words)
    kept = instructions(**words, missing_cells="drop").train
    assert (kept.columns["prompt"], kept.left_out) == (["add\n1 2\n"], 2)
    with pytest.raises(DataError, match=r"train: no completion in 1 of 3 rows \(row 2\)"):
        instructions(**words, missing_cells="empty")
    task = instructions(**{**words, "completion": "{output}."}, missing_cells="empty")
    assert task.train.columns["prompt"] == ["add\n1 2\n", "sum\n\n", "say\n\n"]
    chosen: dict[str, Any] = {"path": path, "prompt": "{input}", "label": "output", "words": ["a", "b"]}
    with pytest.raises(DataError, match=re.escape(said)):
        label_words(**chosen)


def test_a_table_keeps_what_its_source_calls_each_row() -> None:
    table = made({"x": [3, 0, -1, 7, None]}, [2, 4, 5, 9, 10], "line", {"x": ["a", "b", "c", "d"]})
    assert table.columns["x"] == ["d", "a", None, 7, None]
    some = table.take(np.array([3, 0]))
    assert ([some.called(row) for row in (0, 1)], some.columns) == (["line 9", "line 2"], {"x": [7, "d"]})
    split = some.split(np.array([5, 6]))
    assert [split.called(row) for row in (0, 1)] == ["line 9", "line 2"]
    last = split.take(np.array([1]), ["x"])
    assert (last.called(0), last.columns, last.labels.tolist()) == ("line 2", {"x": ["d"]}, [6])


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *((value, 3) for value in (3, 3.0, "3", "3.0")),
        *((value, -1) for value in (-1, "-1")),
        *((value, None) for value in (True, 3.5, nan, None, "", "03", "3.00", "+3", " 3", "3_0", "٣", "3e0", "-", [3])),
    ],
)
def test_whole_numbers_are_known_however_they_are_stored(value: Any, number: int | None) -> None:
    assert whole(value) == number
