import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from speaking import CHAT, make_tokenizer, save

from peertune import cache
from peertune.assembly.build import build
from peertune.assembly.kept import kept
from peertune.data.batches import Encoded, encode_text
from peertune.data.completions import encode_completions
from peertune.recipe import Recipe, load_recipe
from peertune.types import Split

SPLIT = Split({"text": ["a b", "c", "dé\ud800"], "other": [1, None, 2.5]}, np.array([0, 1, 1]))
PAIRS = Split({"prompt": ["2+2=", "", "x"], "completion": [" 4", "five", "y"]}, np.zeros(3))
ROWS = np.array([0, 1])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


def never() -> NoReturn:
    raise AssertionError("tokenises again")


def assert_same(one: Encoded, other: Encoded) -> None:
    for name, x in vars(one).items():
        there = getattr(other, name)
        if isinstance(x, dict):
            assert x.keys() == there.keys()
        for a, b in zip(*([*y.values()] if isinstance(y, dict) else [y] for y in (x, there)), strict=True):
            assert type(a) is type(b), name
            same = torch.equal if isinstance(a, torch.Tensor) else np.array_equal
            assert same(a, b), name
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None), name


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("of", ["texts", "completions"])
def test_rows_are_tokenised_once_and_then_are_the_same_in_every_field(rows: Any, of: str) -> None:
    tokenizer = make_tokenizer()
    split = SPLIT if of == "texts" else PAIRS

    def encode() -> Encoded:
        if of == "texts":
            text = Split({"text": ["a b", "c", "dé"]}, split.labels)
            return encode_text(tokenizer, text, ["text"], 2, rows)
        return encode_completions(tokenizer, split, ("prompt", "completion"), 4, rows)

    first = kept(encode, tokenizer, split, rows, max_length=4)
    assert_same(first, encode())
    assert_same(kept(never, make_tokenizer(), split, rows, max_length=4), first)
    assert first.long, "some rows are cut"


CHANGES: dict[str, Callable[[], tuple[Any, Split, Any, int]]] = {
    "a text": lambda: (make_tokenizer(), replace(SPLIT, columns={**SPLIT.columns, "text": ["a b", "C", "d"]}), ROWS, 4),
    "a label": lambda: (make_tokenizer(), replace(SPLIT, labels=np.array([0, 0, 1])), ROWS, 4),
    "another column": lambda: (make_tokenizer(), replace(SPLIT, columns={"text": SPLIT.columns["text"]}), ROWS, 4),
    "the rows": lambda: (make_tokenizer(), SPLIT, np.array([0, 2]), 4),
    "all rows": lambda: (make_tokenizer(), SPLIT, None, 4),
    "a setting": lambda: (make_tokenizer(), SPLIT, ROWS, 5),
    "the chat template": lambda: (make_tokenizer(CHAT), SPLIT, ROWS, 4),
    "a token": lambda: (with_a_token(), SPLIT, ROWS, 4),
    "the side that is cut": lambda: (cut_at_the_left(), SPLIT, ROWS, 4),
}


def with_a_token() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["a b"])
    return tokenizer


def cut_at_the_left() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = "left"
    return tokenizer


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_tokenised_anew(what: str) -> None:
    made = encode_text(make_tokenizer(), Split({"text": ["a", "b", "c"]}, SPLIT.labels), ["text"], 4, ROWS)
    kept(lambda: made, make_tokenizer(), SPLIT, ROWS, max_length=4)
    kept(never, make_tokenizer(), replace(SPLIT, columns={**SPLIT.columns}), ROWS, max_length=4)
    tokenizer, split, rows, length = CHANGES[what]()
    with pytest.raises(AssertionError, match="tokenises again"):
        kept(never, tokenizer, split, rows, max_length=length)


def test_what_was_done_with_a_tokenizer_before_makes_no_other_entry() -> None:
    tokenizer, text = make_tokenizer(), Split({"text": ["a", "b", "c"]}, SPLIT.labels)
    made = kept(lambda: encode_text(tokenizer, text, ["text"], 4, ROWS), tokenizer, text, ROWS)
    tokenizer(["a", "b"], truncation=True, max_length=1, padding="max_length")
    assert_same(kept(never, tokenizer, text, ROWS), made)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    place = tmp_path_factory.mktemp("recipe")
    rows = [json.dumps({"prompt": f"{n} is", "completion": f" {n + 1}"}) + "\n" for n in range(12)]
    (place / "train.jsonl").write_text("".join(rows))
    (place / "validation.jsonl").write_text("".join(rows[3:]))
    return load_recipe(
        {
            "model": {"name": str(save(place / "llama")), "dtype": "float32"},
            "lora": {"target_modules": "all-linear"},
            "task": {"name": "instructions", "path": str(place)},
            "clients": 2,
            "algorithm": {"name": "dec_lora"},
            "rounds": 1,
        }
    )


def test_a_run_keeps_its_tokens_and_a_peer_only_where_it_is_asked_to(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "peertune")
    for clients, keep, entries, tokenised in (
        ([0], None, 0, 2),
        (None, False, 0, 2),
        (None, None, 2, 2),
        (None, None, 2, 0),
        ([0], None, 2, 2),
        ([0], True, 3, 1),  # validation is the same for all
        ([0], True, 3, 0),
    ):
        caplog.clear()
        build(recipe.model_copy(update={"keep_tokens": keep}), clients)
        assert len(cache.entries()) == entries
        assert caplog.text.count("tokenising") == tokenised


def test_damaged_tokens_are_made_anew_and_kept_again(
    recipe: Recipe, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "peertune")
    build(recipe)
    for entry in cache.entries():
        entry.file.write_bytes(entry.file.read_bytes()[:-4])
    caplog.clear()
    build(recipe)
    assert (caplog.text.count("is damaged, and made anew"), caplog.text.count("tokenising")) == (2, 2)
    caplog.clear()
    build(recipe)
    assert "tokenising" not in caplog.text
