"""Which rows train, validate and test."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from peertune.data.digits import digits
from peertune.data.images import images
from peertune.data.language import instructions, label_words
from peertune.data.tasks import glue, text
from peertune.errors import DataError
from peertune.types import Split, Task


def folder(place: Path, **splits: int) -> str:
    """Write a split of so many rows for each name."""
    for split, rows in splits.items():
        lines = [
            {"sentence": f"{split} {row}", "label": row % 2, "prompt": "a", "completion": "b"} for row in range(rows)
        ]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(place)


def reviews(path: str, **more: Any) -> Task:
    return text(inputs=["sentence"], label="label", path=path, **more)


def rows(split: Split | None) -> list[Any]:
    assert split is not None
    assert len(split.labels) == len(split)
    return list(split.columns["sentence"])


def test_a_share_of_the_training_rows_validates_the_same_in_every_run(tmp_path: Path) -> None:
    task = reviews(folder(tmp_path, train=40), validation_split=0.1)
    trained, validated = rows(task.train), rows(task.validation)
    assert (len(trained), len(validated)) == (36, 4)
    assert {*trained, *validated} == {f"train {row}" for row in range(40)}
    assert rows(reviews(str(tmp_path), validation_split=0.1).validation) == validated
    assert task.validation.called(0) == f"line {int(validated[0].split()[1]) + 1}"
    parts = [rows(reviews(str(tmp_path), validation_split=f"{k}/4").validation) for k in range(1, 5)]
    assert sorted(chain(*parts)) == sorted({*trained, *validated})


def test_all_tasks_deal_rows_and_keep_some_for_the_test(tmp_path: Path) -> None:
    path = folder(tmp_path, train=20, validation=5, dev=4)
    for task in (
        reviews(path, validation_split=0.25, test="validation"),
        glue("cola", path=path, validation_split=0.25, test="validation"),
        instructions(path=path, validation_split=0.25, test="validation"),
        label_words("{sentence}", "label", ["no", "yes"], path=path, validation_split=0.25, test="validation"),
    ):
        assert task.test is not None
        assert (len(task.train), len(task.validation), len(task.test)) == (15, 5, 5)
        assert rows(task.test) == [f"validation {row}" for row in range(5)]
    assert rows(reviews(path, test="dev").test) == [f"dev {row}" for row in range(4)]
    whole, some = digits(), digits(validation_split="1/5", test="validation")
    assert some.test is not None
    assert np.array_equal(some.test.columns["pixel_values"], whole.validation.columns["pixel_values"])
    assert len(some.train) + len(some.validation) == len(whole.train)
    assert some.validation.columns["pixel_values"].shape == (len(some.validation), 1, 8, 8)  # type: ignore[union-attr]


def test_images_are_dealt_before_shots_are_drawn(tmp_path: Path) -> None:
    for split, count in {"train": 6, "held": 2}.items():
        for shade, name in enumerate(("dark", "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for row in range(count):
                colour = (100 * shade + row, 0, 10 * (split == "held"))
                PIL.Image.new("RGB", (2, 2), colour).save(tmp_path / split / name / f"{row}.png")
    task = images(path=str(tmp_path), validation_split="1/3", test="held", shots=2, seed=0)
    assert task.test is not None
    assert (len(task.train), len(task.validation), len(task.test)) == (4, 4, 4)
    colours = [
        {image.getpixel((0, 0)) for image in split.columns["pixel_values"]}
        for split in (task.train, task.validation, task.test)
    ]
    assert sum(map(len, colours)) == len(set.union(*colours)) == 12
    assert {blue for _, _, blue in colours[2]} == {10}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "no split validation to validate on, but dev, train; name another, or have rows of train"),
        ({"validation_split": 0.1, "validation": "dev"}, "validation=dev and validation_split say both"),
        ({"validation_split": 0.1, "test": "train"}, "test is train, whose rows train; give test a split of its own"),
        ({"validation": "dev", "test": "dev"}, "test is dev, whose rows validate"),
        ({"validation": "train"}, "train and validation are both train; hold some rows out"),
        ({"validation_split": 0.1, "test": "tset"}, "holds none of tset.parquet"),
        ({"validation_split": 0.01}, "validation_split: 0.01 of 10 rows is 0; give a share with rows on both sides"),
        ({"validation_split": 1.0}, "validation_split: 1 of 10 rows is 10"),
        ({"validation_split": "6/5"}, "validation_split: '6/5' is no fold; give k/n"),
        ({"validation_split": "a/5"}, "validation_split: 'a/5' is no fold; give k/n"),
    ],
)
def test_what_is_ambiguous_or_leaves_no_rows_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        reviews(folder(tmp_path, train=10, dev=4), **settings)


def test_rows_are_not_dealt_where_there_are_some_to_validate_on(tmp_path: Path) -> None:
    path = folder(tmp_path, train=10, validation=4)
    with pytest.raises(
        DataError, match="there is validation to validate on; leave validation_split out, or give test=validation"
    ):
        reviews(path, validation_split=0.1)
    with pytest.raises(DataError, match="task digits: validation_split takes rows of train"):
        digits(validation_split=0.1)
    with pytest.raises(DataError, match="task digits: test: unknown name 'dev'"):
        digits(test="dev")
