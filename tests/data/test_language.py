import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from peertune.data.language import instructions, label_words
from peertune.data.partition import PARTITIONS
from peertune.errors import DataError

Rows = list[dict[str, Any]]
PAIRS: Rows = [{"prompt": "one", "completion": " two"}, {"prompt": "two", "completion": " three"}]
TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def folder(tmp_path: Path, rows: Rows, validation: Rows | None = None) -> str:
    for name, own in (("train", rows), ("validation", rows if validation is None else validation)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("rows", "inputs"),
    [
        (PAIRS, ("prompt", "completion")),
        ([{"messages": TURNS}], ("messages",)),
        ([{"text": "one two"}, {"text": "three", "label": 1}], ("text",)),
        ([{"messages": TURNS, "text": "x", "prompt": "y", "completion": "z"}], ("messages",)),
    ],
)
def test_the_form_of_the_rows_is_told_by_their_columns(tmp_path: Path, rows: Rows, inputs: tuple[str, ...]) -> None:
    task = instructions(folder(tmp_path, rows))
    assert (task.form, task.inputs, task.classes) == ("complete", inputs, ())
    assert len(task.train) == len(task.validation) == len(rows)
    assert [task.train.columns[name][0] for name in inputs] == [rows[0][name] for name in inputs]


def test_columns_are_put_in_words(tmp_path: Path) -> None:
    path = folder(tmp_path, [{"question": "1+1 {x}", "answer": 2}])
    task = instructions(path, prompt="Q: {question}\n{", completion=" {answer}")
    assert task.inputs == ("prompt", "completion")
    assert [task.train.columns[name] for name in task.inputs] == [["Q: 1+1 {x}\n{"], [" 2"]]
    chat = instructions(path, prompt="{question}", completion="{answer}", chat=True)
    said = [{"role": "user", "content": "1+1 {x}"}, {"role": "assistant", "content": "2"}]
    assert (chat.inputs, chat.train.columns["messages"]) == (("messages",), [said])


def test_content_is_text_in_parts_or_nothing_beside_tool_calls(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "1+1?"}]
    first = {"role": "user", "content": parts, "name": None}
    rows = [
        [first, {"role": "assistant", "content": None, "tool_calls": [call]}],
        [first, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}, TURNS[1]],
    ]
    task = instructions(folder(tmp_path, [{"messages": messages} for messages in rows]))
    asked = {"role": "user", "content": "what is 1+1?"}
    assert task.train.columns["messages"] == [[asked, *messages[1:]] for messages in rows]


def test_what_a_data_set_numbers_is_put_in_words_by_its_names(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "mood": datasets.ClassLabel(names=["bad", "good"])})
    made = datasets.Dataset.from_dict({"text": ["no", "yes"], "mood": [0, 1]}, features)
    for split in ("train", "validation"):
        made.to_parquet(tmp_path / f"{split}.parquet")
    task = instructions(str(tmp_path), prompt="{text}", completion="{mood}")
    assert task.train.columns["completion"] == ["bad", "good"]
    words = label_words("{text}", "mood", ["awful", "fine"], str(tmp_path))
    assert (words.classes, words.train.labels.tolist()) == (("bad", "good"), [0, 1])
    with pytest.raises(DataError, match="unknown name 'bad', choose from x, y"):
        label_words("{text}", "mood", ["awful", "fine"], str(tmp_path), classes=["x", "y"])


def test_rows_can_be_dealt_by_a_column_and_not_by_classes_that_they_lack(tmp_path: Path) -> None:
    rows = [row | {"who": f"party {number % 2}"} for number, row in enumerate(PAIRS * 2)]
    task = instructions(folder(tmp_path, rows))
    assert [part.tolist() for part in PARTITIONS["column"](by="who")(task.train, 2, 0)] == [[0, 2], [1, 3]]
    with pytest.raises(DataError, match="it goes by class and the rows have none, choose iid, quantity_skew or column"):
        PARTITIONS["dirichlet"]()(task.train, 2, 0)


def test_a_party_may_lack_a_class(tmp_path: Path) -> None:
    rows = [{"a": "x", "verdict": 1}, {"a": "y", "verdict": 1}]
    assert label_words("{a}", "verdict", ["no", "yes"], folder(tmp_path, rows)).classes == ("0", "1")
    named = [{"a": "x", "verdict": "good"}]
    task = label_words("{a}", "verdict", ["no", "yes"], folder(tmp_path, named), classes=["bad", "good"])
    assert (task.classes, task.train.labels.tolist()) == (("bad", "good"), [1])


def test_both_splits_must_have_one_form(tmp_path: Path) -> None:
    path = folder(tmp_path, [{"messages": TURNS}], PAIRS[:1])
    with pytest.raises(DataError, match="train has the columns messages, and validation prompt, completion; give both"):
        instructions(path)


@pytest.mark.parametrize(
    ("labels", "of"),
    [([0, 1, 1], "1"), ([False, True, True], "1"), (["false", "TRUE", "True"], "1"), (["no", "yes", "yes"], "no")],
)
def test_labels_get_their_words(tmp_path: Path, labels: list[Any], of: str) -> None:
    rows = [{"a": f"{number}", "verdict": label} for number, label in enumerate(labels)]
    task = label_words("{a}?", "verdict", [" No", " Yes"], folder(tmp_path, rows), metric={"name": "f1", "of": of})
    assert (task.form, task.words, len(task.classes)) == ("choose", (" No", " Yes"), 2)
    assert str(task.measures[0]) == f"f1 of {of}"
    assert task.train.labels.tolist() == [0, 1, 1]
    assert task.train.columns["prompt"] == ["0?", "1?", "2?"]


def conversation(*roles: str, content: str | None = "x") -> Rows:
    return [{"messages": [{"role": role, "content": content} for role in roles]}]


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (
            PAIRS,
            {"metric": "accuracy"},
            "metric accuracy does not fit; choose from exact_match, last_number, perplexity, token_accuracy",
        ),
        (PAIRS, {"prompt": "{prompt}"}, "give both prompt and completion, or neither"),
        (PAIRS, {"prompt": "{promt}", "completion": "x"}, "train: '{promt}': column: unknown name 'promt'"),
        ([{"a": 1}], {}, "train: has no messages, no prompt and completion, no text, but a; say what is learnt"),
        ([], {}, "train: no rows, give at least one"),
        ([{"text": "x"}], {"chat": True}, "chat is for prompts and completions, and the columns are text"),
        ([{"text": "x"}, {"text": " "}], {}, "train: no text in 1 of 2 rows (line 2); validation: no text"),
        ([{"text": 5}], {}, "train: line 1: text is 5, it must be text"),
        ([{"prompt": "x", "completion": ""}], {"missing_cells": "empty"}, "train: no completion in 1 of 1 rows"),
        (conversation("user"), {}, "line 1: its last message must be the assistant's, after one of another role"),
        (conversation("assistant"), {}, "line 1: its last message must be the assistant's"),
        (conversation("user", "assistant", content=" "), {}, "line 1: the assistant's message is empty"),
        ([{"messages": ["hello", "you"]}], {}, "line 1: 'hello' is no message, give its role and content"),
        ([{"messages": None}], {}, "train: no messages in 1 of 1 rows (line 1)"),
        ([{"q": ["x"], "a": "y"}], {"prompt": "{q}", "completion": "{a}"}, "line 1: q is ['x'], which is no text"),
        ([{"text": "x"}], {"validation": "train"}, "train and validation are both train; hold some rows out"),
        ([{"text": "x"}], {"revision": "main"}, "config and revision are of the hub; leave them out with path"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[1]]}],
            {},
            "line 1: {'type': 'image'} is no part of text, and other parts can't be learnt",
        ),
        (
            conversation("user", "assistant", content=None),
            {},
            "line 1: {'role': 'user', 'content': None} is no message",
        ),
        ([{"messages": 5}], {}, "line 1: its last message"),
        ([{"text": "x"}], {"metric": "exact_match"}, "exact_match needs prompts to go on from, and the rows are plain"),
        ([{"q": "x", "a": None}], {"prompt": "{q}", "completion": "{a}"}, "train: no a in 1 of 1 rows (line 1)"),
    ],
)
def test_what_is_wrong_with_instructions_is_said(
    tmp_path: Path, rows: Rows, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError) as error:
        instructions(folder(tmp_path, rows), **settings)
    assert said in str(error.value)
    assert str(error.value).startswith("task instructions/")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"words": ["yes"]}, "words is ['yes']; give two or more"),
        ({"words": ["yes", "yes"]}, "give two or more different ones"),
        ({"words": ["yes", " "]}, "none of them empty"),
        ({"words": ["a", "b", "c"], "label": "name"}, "there are 2 classes (one, two) and 3 words"),
        ({"prompt": "q"}, "'q' takes nothing from the rows; put a column's name in braces"),
        ({"label": "lable"}, "train: column: unknown name 'lable', did you mean label?"),
        ({"prompt": "{b}"}, "'{b}': column: unknown name 'b'"),
        ({"metric": "pearson"}, "metric pearson does not fit; choose from accuracy, balanced_accuracy, f1"),
        ({"metric": ["f1", "perplexity"]}, "metric perplexity does not fit; choose from accuracy, balanced"),
        ({"metric": "f2"}, "metric: unknown name 'f2'"),
        ({"path": None}, "give either path (a folder) or id"),
    ],
)
def test_what_is_wrong_with_label_words_is_said(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    rows = [{"a": "x", "label": 0, "name": "one"}, {"a": "y", "label": 1, "name": "two"}]
    fine = {"prompt": "{a}", "label": "label", "words": ["no", "yes"], "path": folder(tmp_path, rows)}
    assert label_words(**fine).words == ("no", "yes")  # type: ignore[arg-type]
    with pytest.raises(DataError) as error:
        label_words(**fine | settings)
    assert said in str(error.value)
