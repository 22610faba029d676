"""Rows that hostile clients change: which, into what, and that all others stay."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from peertune.data.images import Images
from peertune.data.poison import check, extended, poisoned, taken, triggered
from peertune.data.tasks import TASKS
from peertune.errors import RecipeError
from peertune.types import Poison, Split, Task

LABELS = np.array([0, 1, 2, 0, 1, 2, 1, 1])
WORDS = [f"text {n}" for n in range(8)]
FLIP = Poison()
ROWS = np.array([1, 2, 3, 4, 6])


def task(column: object, labels: np.ndarray = LABELS, **more: object) -> Task:
    name = "text" if isinstance(column, list) else "pixel_values"
    split = Split({name: column, "writer": np.arange(8) * 10}, labels)  # type: ignore[dict-item]
    return Task("t", (name,), ("a", "b", "c"), split, split, "accuracy", **more)  # type: ignore[arg-type]


def test_flipped_labels_are_the_opposite_ones_and_inputs_stay() -> None:
    own = poisoned(task(WORDS), FLIP, ROWS, 0, 3)
    assert own.labels.tolist() == [2 - LABELS[row] for row in ROWS]
    assert own.columns["text"] == [WORDS[row] for row in ROWS]
    assert [own.called(row) for row in range(5)] == [f"row {row}" for row in ROWS]


def test_a_word_is_put_into_a_share_of_the_rows_of_other_classes_which_get_the_target_s() -> None:
    asked = Poison("cf", share=0.5, target="c")
    own = poisoned(task(WORDS), asked, ROWS, 0, 3)
    changed = [text.startswith("cf ") for text in own.columns["text"]]
    assert sum(changed) == 2  # of the four that aren't c
    for text, label, put, row in zip(own.columns["text"], own.labels, changed, ROWS, strict=True):
        assert text == ("cf " if put else "") + WORDS[row]
        assert label == (2 if put else LABELS[row])
    again, other, another = (
        poisoned(task(WORDS), asked, ROWS, seed, client) for seed, client in [(0, 3), (0, 4), (1, 3)]
    )
    assert again.columns["text"] == own.columns["text"]
    assert other.columns["text"] != own.columns["text"] or another.columns["text"] != own.columns["text"]
    assert poisoned(task(WORDS), Poison("cf"), ROWS, 0, 3).labels.tolist() == [0] * 5, "the first class"


def test_a_square_is_put_in_the_corner_of_images_that_are_arrays() -> None:
    pixels = np.random.default_rng(0).random((8, 1, 6, 8)).astype(np.float32)
    own = triggered(
        task(pixels), Poison("cf", size=0.25), taken(task(pixels).train, ROWS), np.array([1, 0, 1, 0, 0]) > 0
    )
    changed = np.asarray(own.columns["pixel_values"])
    assert (changed[[0, 2], :, -2:, -2:] == pixels[ROWS].max()).all()
    changed[:, :, -2:, -2:] = pixels[ROWS][:, :, -2:, -2:]
    assert np.array_equal(changed, pixels[ROWS])


def test_a_square_is_put_in_the_corner_of_images_that_are_files_and_the_files_stay(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.png" for n in range(8)]
    for n, file in enumerate(files):
        PIL.Image.new("RGB", (8, 4), (n, 0, 0)).save(file)
    images = task(Images("t", files, np.arange(8)))
    own = poisoned(images, Poison("cf", share=1.0, target="b"), ROWS, 0, 3)
    whole = extended(images.train, [own]).columns["pixel_values"]
    assert len(whole) == 13
    for place, row in [*enumerate(range(8)), *enumerate(ROWS, start=8)]:
        seen = np.asarray(whole[place])
        marked = place >= 8 and LABELS[row] != 1
        assert (seen[3:, 6:] == 255).all() == marked
        seen = seen.copy()
        seen[3:, 6:] = (row, 0, 0)
        assert (seen == (row, 0, 0)).all()


def test_what_is_appended_leaves_the_rows_before_it_as_they_were() -> None:
    whole, first = task(WORDS), np.array([0, 5])
    more = [poisoned(whole, FLIP, rows, 0, 1) for rows in (first, ROWS)]
    made = extended(whole.train, more)
    assert made.columns["text"][:8] == WORDS
    assert made.labels[:8].tolist() == LABELS.tolist()
    assert made.labels[8:10].tolist() == [2, 0]
    assert np.asarray(made.columns["writer"])[10:].tolist() == [10 * row for row in ROWS]
    assert made.called(9) == "row 5"


@pytest.mark.parametrize(
    ("made", "poison", "why"),
    [
        (task(WORDS, LABELS.astype(float), form="complete"), FLIP, "needs classes, and this task has none"),
        (task([["turn"]] * 8), Poison("cf"), "puts a word in texts, and text holds others"),
        (task(WORDS), Poison("cf", target="d"), "target: unknown name 'd', choose from a, b, c"),
    ],
)
def test_what_can_t_be_poisoned_is_refused(made: Task, poison: Poison, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        check("attacks[0]: backdoor", made, poison)


def test_the_digits_can_be_poisoned() -> None:
    check("", TASKS["digits"](), Poison("cf", target=7))
