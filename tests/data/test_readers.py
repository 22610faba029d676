import csv
import json
from pathlib import Path

import pytest

from peertune.data.tasks import text
from peertune.errors import DataError

ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


def read(folder: Path, suffix: str, content: str, field: str | None = None) -> list[str]:
    for split in ("train", "validation"):
        (folder / f"{split}.{suffix}").write_text(content, encoding="utf-8")
    return list(text(["text"], "label", path=str(folder), field=field).train.columns["text"])


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("document", "field"),
    [
        (ROWS, None),
        ({"version": 2, "data": ROWS}, "data"),
        ({"data": {"text": ["a", "b"], "label": [0, 1]}}, "data"),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_read_where_datasets_reads_it(
    document: object, field: str | None, suffix: str, indent: int | None, tmp_path: Path
) -> None:
    assert read(tmp_path, suffix, "\ufeff" + json.dumps(document, indent=indent), field) == ["a", "b"]


def test_json_lines_may_begin_with_a_byte_order_mark_and_hold_separators_of_lines(tmp_path: Path) -> None:
    lines = '\ufeff{"text": "a\u2028b", "label": 0}\r\n\r\n{"label": 1, "text": "b"}\r\n'
    assert read(tmp_path, "jsonl", lines) == ["a\u2028b", "b"]


def test_csv_fields_may_hold_commas_line_breaks_and_what_looks_like_nothing(tmp_path: Path) -> None:
    content = '\ufefftext,label\n"one, two\nthree",0\nNA,1\n007,1\n\n'
    assert read(tmp_path, "csv", content) == ["one, two\nthree", "NA", "007"]


def test_a_field_of_csv_may_be_as_long_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = csv.field_size_limit(131_072)
    try:
        assert read(tmp_path, "csv", f"text,label\n{'x' * 200_000},0\ny,1\n") == ["x" * 200_000, "y"]
    finally:
        csv.field_size_limit(max(before, csv.field_size_limit()))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.csv", "text,label\na,0,1\n", "line 2 has 3 fields and the header 2"),
        ("train.csv", 'text,label\n"a\nb",0\nc,0,1\n', "line 4 has 3 fields and the header 2"),
        ("train.csv", 'text,label\na,0\n"b" c,1\n', "line 3: ',' expected after '\"'"),
        ("train.csv", "text,label,label\na,0,1\n", "'label' stands twice; give each column a name of its own"),
        ("train.json", "[1, 2]\n", "row 0 is not a JSON object"),
        ("train.jsonl", '{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        ("train.jsonl", '{"text": "a", "text": "b"}\n', "'text' stands twice"),
        ("train.jsonl", '{"text": "a"}\n{oops\n', "line 2: Expecting property name enclosed in double quotes at char"),
        ("train.jsonl", "{oops\n", "line 1: Expecting property name"),
        (
            "train.json",
            '{\n"version": 2, "data": []\n}',
            "one object of version, data; say which holds the rows, as in t",
        ),
        ("train.parquet", "not parquet at all", "Parquet magic bytes not found"),
    ],
)
def test_a_file_that_can_not_be_read_is_named(name: str, content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        text(["text"], "label", path=str(tmp_path), validation_split=0.5)
    assert f"{name} can't be read (" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_holds_the_rows_is_found_or_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"unknown name 'text', choose from data; task.field=data reads the rows in data$"
    ):
        read(tmp_path, "json", json.dumps({"data": ROWS}))
    with pytest.raises(DataError, match=r"field: unknown name 'date', did you mean data\?"):
        read(tmp_path, "json", json.dumps({"data": ROWS}), "date")
    with pytest.raises(DataError, match="field is for a file that is one object, and it is an array; leave it out"):
        read(tmp_path, "json", json.dumps(ROWS), "data")
    with pytest.raises(DataError, match="its columns differ in length"):
        read(tmp_path, "json", json.dumps({"data": {"text": ["a"], "label": []}}), "data")
    with pytest.raises(DataError, match="its rows are no array"):
        read(tmp_path, "json", json.dumps({"data": 5}), "data")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").unlink()
    with pytest.raises(DataError, match="field is for what a JSON file holds; leave it out"):
        read(tmp_path, "csv", "text,label\na,0\n", "data")


def test_one_split_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,0\n")
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(DataError, match=r"holds train.csv and train.jsonl; leave one of them there$"):
        text(["text"], "label", path=str(tmp_path), validation_split=0.5)
