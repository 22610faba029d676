"""The third step of `build`: the task's rows as the base reads them, and which of these each client has."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from peertune.assembly.kept import kept
from peertune.assembly.registry import Parts, Rows, backdoor, validating_rows
from peertune.data.batches import Encoded, encode_images, encode_text
from peertune.data.completions import encode_completions, encode_words
from peertune.data.images import Images
from peertune.data.poison import Twins, taken
from peertune.data.poison import target as poison_target
from peertune.data.poison import triggered as put_in
from peertune.errors import DataError, ModelError, RecipeError, unknown
from peertune.models.load import Base, load_processor
from peertune.randomness import Draw, generator
from peertune.recipe import Recipe
from peertune.types import Split, Task

log = logging.getLogger(__name__)


class Triggered(NamedTuple):
    """The rows that are evaluated and not of the class that a backdoor opens to, with its trigger put in."""

    split: Split
    encoded: Encoded
    target: int  # that class


class EncodedTask(NamedTuple):
    """Both splits of a task; rows that nobody here uses have no tokens."""

    train: Encoded
    validation: Encoded
    max_length: int  # tokens that a row may have
    long: Mapping[str, int]  # for each split, how many rows of all clients were longer
    held: Rows  # client → the rows of `train` that it trains on
    held_out: Rows  # client → those on which it is judged
    validating: NDArray[np.int64]  # the rows of `validation` that are used
    evaluated: NDArray[np.int64]  # those of them that are evaluated
    twins: Mapping[int, Sequence[Twins]] = {}  # client → what it trains on in the place of those that it holds
    triggered: Triggered | None = None  # None: no backdoor, or no such rows


Splits = tuple[Encoded, Encoded]
"""Both splits of a task, encoded."""


def encode_splits(
    recipe: Recipe, task: Task, base: Base, rows: Iterable[NDArray[np.int64]], *, private: bool = False
) -> Splits:
    """Encode these of the training rows, and all that may validate.

    Tokens are kept for the next run, unless rows are `private` or the recipe's `keep_tokens` says otherwise.
    """
    keeps = not private if recipe.keep_tokens is None else recipe.keep_tokens
    encoded = _encoder(recipe, task, base, _max_length(recipe, base), keeps)
    return encoded(task.train, np.unique(np.concatenate([*rows]))), encoded(task.validation, None)


def encode(
    recipe: Recipe, parts: Parts, base: Base, splits: Splits | None = None, *, private: bool = False
) -> EncodedTask:
    """Encode what these clients train on, and what validates, unless that is done; tell of rows that are too long.

    Raises DataError where a client, or validation, is left without a row, and ModelError for a tokenizer that is not
    the base's.
    """
    max_length = _max_length(recipe, base)
    own = np.sort(np.concatenate([*parts.rows.values(), *parts.held_out.values()]))
    twins = [one.rows for each in parts.twins.values() for one in each]
    train, validation = splits or encode_splits(recipe, parts.task, base, [own, *twins], private=private)
    own_long = np.intersect1d(train.long, own)
    long = {"train": sum(parts.group.gather(len(own_long))), "validation": len(validation.long)}
    _tell_long(recipe, long, {"train": sum(parts.group.gather(len(own))), "validation": len(validation)}, max_length)
    held, held_out = (
        {client: _without_long(recipe, train, rows) for client, rows in part.items()}
        for part in (parts.rows, parts.held_out)
    )
    validating = _without_long(recipe, validation, validating_rows(recipe, len(validation)))
    if empty := [client for part in (held, held_out) for client, rows in part.items() if not len(rows)]:
        raise DataError(
            f"training.long_rows: client {empty[0]} has no row of up to {max_length} tokens to train or be judged on; "
            "raise training.max_length, or use training.long_rows=cut"
        )
    if not len(validating):
        raise DataError("training.long_rows: no row to validate on is short enough; raise training.max_length")
    evaluated = evaluated_rows(recipe, validating)
    triggered = _triggered(recipe, parts.task, base, evaluated)
    left = {
        client: [one._replace(rows=one.rows[np.isin(parts.rows[client], held[client])]) for one in each]
        for client, each in parts.twins.items()
    }
    return EncodedTask(train, validation, max_length, long, held, held_out, validating, evaluated, left, triggered)


def encode_test(recipe: Recipe, task: Task, base: Base) -> EncodedTask:
    """Encode what the task validates on, all of it, and nothing to train on; errors are those of `encode`."""
    max_length = _max_length(recipe, base)
    tested = _encoder(recipe, task, base, max_length, bool(recipe.keep_tokens))(task.validation, None)
    _tell_long(recipe, {"test": len(tested.long)}, {"test": len(tested)}, max_length)
    rows = _without_long(recipe, tested, np.arange(len(tested)))
    if not len(rows):
        raise DataError("training.long_rows: no row to test on is short enough; raise training.max_length")
    none = np.zeros(0, dtype=np.int64)
    nothing = Encoded({}, {}, {}, none, none, torch.zeros(0))
    triggered = _triggered(recipe, task, base, rows)
    long = {"test": len(tested.long)}
    return EncodedTask(nothing, tested, max_length, long, {}, {}, rows, rows, triggered=triggered)


def _triggered(recipe: Recipe, task: Task, base: Base, evaluated: NDArray[np.int64]) -> Triggered | None:
    """Put the trigger of the recipe's backdoor in these rows of the validation split but for those of its class."""
    if (poison := backdoor(recipe)) is None:
        return None
    to = poison_target("attacks", task, poison)
    others = taken(task.validation, evaluated[np.asarray(task.validation.labels)[evaluated] != to])
    if to is None or not len(others):
        return None
    split = put_in(task, poison, others, np.ones(len(others), dtype=np.bool_))
    return Triggered(split, _encoder(recipe, task, base, _max_length(recipe, base), False)(split, None), to)


def encode_rows(recipe: Recipe, task: Task, base: Base, rows: NDArray[np.int64]) -> Encoded:
    """Encode these of the training rows, ascending; what is longer than a row may be is cut, and told."""
    max_length = _max_length(recipe, base)
    encoded = _encoder(recipe, task, base, max_length, bool(recipe.keep_tokens))(task.train, rows)
    if long := np.intersect1d(encoded.long, rows).size:
        log.warning(f"{long:,} of {len(rows):,} rows have more than {max_length} tokens and are cut")
    return encoded


def evaluated_rows(recipe: Recipe, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return which of these `rows` of the validation split are evaluated: all, or the recipe's seeded subset."""
    few = recipe.evaluate.rows
    if few is None or few >= len(rows):
        return rows
    return np.sort(rows[generator(recipe.seed, Draw.EVALUATE).permutation(len(rows))[:few]])


def row_weights(recipe: Recipe, task: Task, held: Iterable[NDArray[np.int64]]) -> NDArray[np.float64] | None:
    """Return how much each row of the training split counts in its client's loss, `[N]`; None where all count alike.

    With `balanced` a row of a client's n counts `n / (c n_y)`, n_y of which are of its class, and c the number of
    classes that the client holds: scikit-learn's rule, by the client's own rows. Raises RecipeError for class weights
    where there are no classes, and for a name that is none.
    """
    chosen = recipe.training.class_weight
    if recipe.training.label_smoothing_factor and not task.classes and task.form == "classify":
        raise RecipeError("training.label_smoothing_factor: needs classes, and this task has values; leave it out")
    if chosen is None:
        return None
    if not task.classes:
        raise RecipeError("training.class_weight: needs classes, and this task has none; leave it out")
    labels = np.asarray(task.train.labels, dtype=np.int64)
    if chosen != "balanced":
        for name in chosen:
            if name not in task.classes:
                raise RecipeError(unknown("training.class_weight", name, task.classes))
        return np.array([chosen.get(name, 1.0) for name in task.classes])[labels]
    counts = np.ones(len(labels))
    for rows in held:
        own = np.bincount(labels[rows], minlength=len(task.classes))
        counts[rows] = len(rows) / (np.count_nonzero(own) * own[labels[rows]])
    return counts


def _max_length(recipe: Recipe, base: Base) -> int:
    """Return how many tokens a row may have: by the recipe, and by what the base can take."""
    limits = (recipe.training.max_length, base.positions, getattr(base.tokenizer, "model_max_length", None))
    return int(min(limit for limit in limits if limit is not None))


def _encoder(
    recipe: Recipe, task: Task, base: Base, max_length: int, keeps: bool
) -> Callable[[Split, NDArray[np.int64] | None], Encoded]:
    """Return what encodes some rows of a split of the task, or all."""
    images, process = task.inputs == ("pixel_values",), None
    if isinstance(task.train.columns.get("pixel_values"), Images):
        process = load_processor(recipe.model.name, revision=recipe.model.revision, config=base.model.config)

    def tokenised(split: Split, rows: NDArray[np.int64] | None) -> Encoded:
        log.info(f"tokenising {len(split if rows is None else rows):,} rows")
        match task.form:
            case "complete":
                return encode_completions(base.tokenizer, split, task.inputs, max_length, rows)
            case "choose":
                return encode_words(base.tokenizer, split, task.words, max_length, rows)
            case _:
                return encode_text(base.tokenizer, split, task.inputs, max_length, rows)

    def encode(split: Split, rows: NDArray[np.int64] | None) -> Encoded:
        if images:
            return encode_images(split, base.tokens_per_image, process)
        make = partial(tokenised, split, rows)
        says = {"form": task.form, "inputs": task.inputs, "words": task.words, "max_length": max_length}
        encoded = kept(make, base.tokenizer, split, rows, **says) if keeps else make()
        _check_tokens(recipe, base, encoded)
        return encoded

    return encode


def _check_tokens(recipe: Recipe, base: Base, encoded: Encoded) -> None:
    """Raise ModelError where the tokenizer makes tokens that the base does not know."""
    highest = int(encoded.tokens["input_ids"].max())
    if highest >= base.model.config.get_text_config().vocab_size:
        raise ModelError(
            f"model.name: {recipe.model.name}: its tokenizer makes tokens that it has no embedding for, such as "
            f"{base.tokenizer.convert_ids_to_tokens(highest)!r}; give a base with its own tokenizer"
        )


def _tell_long(recipe: Recipe, long: Mapping[str, int], rows: Mapping[str, int], max_length: int) -> None:
    """Warn of rows that are too long, of so many of each split."""
    done = "cut" if recipe.training.long_rows == "cut" else "left out"
    for name, count in long.items():
        if count:
            log.warning(
                f"{count:,} of {rows[name]:,} rows of {name} have more than {max_length} tokens and are {done} "
                "(training.max_length, training.long_rows)"
            )


def _without_long(recipe: Recipe, encoded: Encoded, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows if recipe.training.long_rows == "cut" else np.setdiff1d(rows, encoded.long)
