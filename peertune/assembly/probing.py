"""How well a linear probe on the frozen base's features tells the clients apart: the shift of what they hold."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peertune.adapters.stacked import Forward, init_adapters
from peertune.assembly.encoding import encode_rows
from peertune.assembly.evaluation import EVALUATION_FACTOR
from peertune.assembly.loading import load
from peertune.assembly.registry import build_partition, hold_out
from peertune.data.batches import validation_batches
from peertune.data.skew import FOLDS, tell_apart
from peertune.errors import DataError
from peertune.models.heads import backbone
from peertune.randomness import Draw, generator
from peertune.recipe import Recipe
from peertune.rounds.training import evaluate
from peertune.types import Batch, Task

MOST_ROWS = 2000
"""Rows that a probe looks at: a seeded draw of them, where the clients hold more."""


class Probed(NamedTuple):
    """The rows that a probe looks at, N of them."""

    rows: NDArray[np.int64]  # [N], of the training split, ascending
    owners: NDArray[np.int64]  # [N], the client that trains on each
    labels: NDArray[np.int64] | None  # [N], their classes; None where there are none
    clients: int  # all of them
    left_out: list[int]  # clients with too few of the rows that were drawn


def probed_rows(recipe: Recipe, task: Task) -> Probed:
    """Draw the rows that a probe looks at from those that clients train on; no base is needed yet.

    Raises DataError where fewer than two clients have enough.
    """
    trained, _ = hold_out(recipe, dict(enumerate(build_partition(recipe, task))), len(task.train))
    rows, owners = np.concatenate([*trained.values()]), np.repeat([*trained], [*map(len, trained.values())])
    drawn = generator(recipe.seed, Draw.PROBED).permutation(len(rows))[:MOST_ROWS]
    drawn = drawn[rows[drawn].argsort()]
    rows, owners = rows[drawn], owners[drawn]
    left_out = np.flatnonzero(np.bincount(owners, minlength=recipe.clients) < FOLDS)
    if (enough := recipe.clients - len(left_out)) < 2:
        raise DataError(
            f"probe: it tells clients apart, and {enough} of {recipe.clients} have {FOLDS} or more of the "
            f"{len(rows):,} rows that it looks at; take a partition with two that do, or leave it out"
        )
    kept = ~np.isin(owners, left_out)
    rows, owners = rows[kept], owners[kept]
    labels = np.asarray(task.train.labels)[rows] if task.classes else None
    return Probed(rows, owners, labels, recipe.clients, left_out.tolist())


def read_features(
    recipe: Recipe, task: Task, rows: NDArray[np.int64], each: Callable[[int], object] = lambda done: None
) -> NDArray[np.float32]:
    """Return the means of the base's last hidden states over the tokens, or patches, of these rows, `[N, d]`.

    `rows [N]` are of the training split, ascending. The base is the recipe's before any training, without the clients'
    adapters. `each` is told how many rows are done. Raises what loading the base raises.
    """
    loaded = load(recipe, task)
    encoded = encode_rows(recipe, task, loaded.base, rows)
    # A language model's labels are tokens; here they are nobody's concern.
    encoded = replace(encoded, labels=torch.zeros(len(encoded)), token_labels=False)
    whole = loaded.base.model
    reader = whole.vision_model if task.form == "match" else whole.get_submodule(backbone(whole))
    model = replace(loaded.model, forward=_means(reader), reading=None)

    def batches() -> Iterator[tuple[Batch, NDArray[np.int64]]]:
        done = 0
        for batch, places in validation_batches(encoded, rows, EVALUATION_FACTOR * loaded.tokens, loaded.packed):
            yield batch, places
            done += len(places)
            each(done)

    single = init_adapters(loaded.model, 1, recipe.seed)
    features: NDArray[np.float32] = evaluate(model, [single], batches(), len(rows), lambda means, _: means)[0]
    return features


def _means(reader: nn.Module) -> Forward:
    """Return what makes of a batch the means of the last hidden states over what is no padding, `[b, d]`."""

    def means(_: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        hidden: Tensor = reader(**inputs).last_hidden_state.float()
        if hidden.dim() == 4:  # of a convolutional base, [b, d, height, width]
            return hidden.flatten(2).mean(2)
        mask = inputs.get("attention_mask")
        if mask is None:
            return hidden.mean(1)
        mask = mask[..., None].to(hidden)
        return (hidden * mask).sum(1) / mask.sum(1)

    return means


def describe_shift(
    probed: Probed, features: NDArray[np.float32], each: Callable[[int], object] = lambda done: None
) -> dict[str, Any]:
    """Return how well features `[N, d]` tell the clients apart: the fields of `Told`, with None for who is left out.

    `each` is told how many of the `FOLDS` fits are done.
    """
    told = tell_apart(features, probed.owners, probed.labels, each)
    by_client = dict(zip(np.unique(probed.owners).tolist(), told.clients, strict=True))
    clients = [by_client.get(client) for client in range(probed.clients)]
    return {**told._asdict(), "clients": clients, "rows": len(probed.rows), "left_out": probed.left_out}
