"""The handwritten digits that come with scikit-learn, which takes longer to import than they take to train on.

`digits.npz` beside this file has its 1,797 images of 8 × 8 grey levels. This made it:

    python -m peertune.data.digits peertune/data/digits.npz
"""

import sys
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np

from peertune.data.measures import Metrics, judged, read_metrics, with_classes
from peertune.data.scores import OF_CLASSES
from peertune.data.splits import Splits
from peertune.errors import DataError, unknown
from peertune.types import Split, Task

_FILE = Path(__file__).with_name("digits.npz")
_FIRST = 5  # of those that clients hold; the digits below are for the base
_FORMS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
# where each form that one hand filled in begins: all have the labels of the first, but for one and for some that lack
_WRITERS = frozenset(range(len(_FORMS)))


def digits(
    held_out_writers: list[int] | None = None,
    validation_split: float | str | None = None,
    test: str | None = None,
    metric: Metrics = "accuracy",
) -> Task:
    """Tell the handwritten digits 5 to 9 apart: 896 images of 8 x 8 grey levels that come with scikit-learn.

    `pixel_values` is float32 `[N, 1, 8, 8]` in [-1, 1], `writer` says on which of fourteen forms the row stood,
    from 0, each filled in by one hand, and class 0 is the digit 5. The source counts thirteen people, so two forms may
    be of one. A fifth of each class, always the same rows, is for validation; or, where `held_out_writers` names some,
    all of their rows, and all others are for training. With `validation_split`, as of `text`, these rows are
    for testing, which `test: validation` says. `metric` is one of classes, or several.

    Raises DataError for writers that there aren't, or if none is left, for another split, and for a metric that does
    not fit.
    """
    splits = Splits("train", ("validation",), validation_split, test)
    splits.check("task digits")
    wanted = splits.wanted("task digits", ("train", "validation"))
    if test not in (None, "validation"):
        raise DataError(unknown("task digits: test", str(test), ("validation",)))
    names = tuple("56789")
    measures = with_classes("task digits", read_metrics("task digits", metric, OF_CLASSES), names)
    if held_out_writers is None:
        train, validation = (_split([part], _FIRST, _WRITERS) for part in ("train", "validation"))
    else:
        out, others = _WRITERS & set(held_out_writers), _WRITERS - set(held_out_writers)
        if len(out) < len(held_out_writers) or not out or not others:
            raise DataError(
                f"task digits: held_out_writers is {held_out_writers}; name some of 0 to {len(_FORMS) - 1}, each once, "
                "and not all"
            )
        train, validation = (_split(["train", "validation"], _FIRST, writers) for writers in (others, out))
    dealt = splits.dealt("task digits", [{"train": train, "validation": validation}[name] for name, *_ in wanted])
    return Task("digits", ("pixel_values",), names, **judged(measures), **dealt)


def public_digits() -> Split:
    """Return the handwritten digits 0 to 4, as `digits` has the others.

    No client ever holds them: they are what a small base model can be trained on before it is adapted.
    """
    return _split(["public"], 0, _WRITERS)


def _split(some: Sequence[str], first: int, by: Set[int]) -> Split:
    """Return the rows in some parts, whose classes are counted from a first digit, by some of the writers."""
    with np.load(_FILE, allow_pickle=False) as kept:
        levels, labels, parts = kept["levels"], kept["labels"], kept["parts"]  # [N, 64] of 0 … 16, [N], [N]
    writers = np.searchsorted(_FORMS, np.arange(len(levels)), side="right") - 1
    rows = np.isin(parts, some) & np.isin(writers, sorted(by))
    pixels = (levels[rows] / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8)
    return Split({"pixel_values": pixels, "writer": writers[rows]}, labels[rows].astype(np.int64) - first)


def write(file: Path) -> None:
    """Write the digits as scikit-learn has them, and which of those of the clients it draws for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    levels, labels = load_digits(return_X_y=True)
    own = np.flatnonzero(labels >= _FIRST)
    _, validation = train_test_split(own, test_size=0.2, stratify=labels[own], random_state=0)
    parts = np.full(len(labels), "validation")
    parts[own], parts[validation], parts[labels < _FIRST] = "train", "validation", "public"
    np.savez_compressed(file, levels=levels.astype(np.uint8), labels=labels.astype(np.uint8), parts=parts)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m peertune.data.digits FILE")
    write(Path(sys.argv[1]))
