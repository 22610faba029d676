"""Evaluation: how good the clients' own models are, by the metric of the task."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peertune.assembly.encoding import EncodedTask
from peertune.assembly.loading import Loaded, clients_together
from peertune.assembly.registry import Parts
from peertune.data.batches import Encoded, validation_batches
from peertune.data.completions import completions, encode_choices, encode_prompts
from peertune.data.scores import JUDGES, scorer
from peertune.errors import RecipeError
from peertune.models.generation import Decoding, cached_tokens, generate, pads_left
from peertune.recipe import Recipe
from peertune.rounds.record import Evaluation
from peertune.rounds.training import Read, evaluate, hits, predictions, row_losses
from peertune.types import Task, Tensors, take

log = logging.getLogger(__name__)

EVALUATION_FACTOR = 2
"""How many times more tokens go through together in evaluation, which keeps nothing for a backward pass."""


def build_evaluation(
    recipe: Recipe, parts: Parts, loaded: Loaded, encoded: EncodedTask
) -> Callable[[Tensors], Evaluation]:
    """Return what evaluates a stack `[K, …]`, and, but at a peer, the average of all clients of the group.

    Raises RecipeError where the metric can't be had of this task or this base.
    """
    task, group, rows, average = parts.task, parts.group, encoded.evaluated, not parts.peer
    if recipe.evaluate.temperature and task.metric not in JUDGES:
        raise RecipeError(
            f"evaluate.temperature: nothing is generated for the metric {task.metric}; leave it out, "
            f"or choose {' or '.join(sorted(JUDGES))}"
        )
    labels = np.asarray(task.validation.labels)[rows]
    if task.metric in JUDGES:
        predict = _judged(recipe, task, loaded, encoded)
        labels = np.ones(len(rows))
    elif task.form == "choose":
        predict = _chosen(task, loaded, encoded)
    else:
        readers = {"perplexity": row_losses, "token_accuracy": hits}
        predict = _read(loaded, encoded.validation, rows, readers.get(task.metric, predictions))
        labels = encoded.validation.targets[rows] if task.form == "complete" else labels
    score = scorer(task)

    def run(adapters: Tensors) -> Evaluation:
        clients = len(next(iter(adapters.values())))
        singles = [take(adapters, slice(client, client + 1)) for client in range(clients)]
        if average:
            mean = {name: group.mean(x)[None] for name, x in adapters.items()}
            if group.rank == group.size - 1:  # once, by the one with the fewest clients
                singles.append(mean)
        predicted = predict(singles) if singles else np.empty((0, len(rows)))
        scores = [score(own, labels) for own in predicted]
        top = [float(np.bincount(own).max() / len(rows)) for own in predicted[:clients] if task.classes]
        return Evaluation(task.measured, scores[:clients], next(iter(scores[clients:]), None), len(rows), top)

    return run


Predict = Callable[[list[Tensors]], NDArray[Any]]
"""`predict(singles)` returns what the metric compares with the labels, `[len(singles), rows]`."""


def _read(loaded: Loaded, encoded: Encoded, rows: NDArray[np.int64], read: Read) -> Predict:
    """Return what reads each row's logits."""
    model, tokens = loaded.model, EVALUATION_FACTOR * loaded.tokens

    def predict(singles: list[Tensors]) -> NDArray[Any]:
        return evaluate(model, singles, validation_batches(encoded, rows, tokens, model.packs), len(rows), read)

    return predict


def _chosen(task: Task, loaded: Loaded, encoded: EncodedTask) -> Predict:
    """Return what finds the likeliest word after each row's prompt."""
    rows = encoded.evaluated
    split = task.validation.take(rows, task.inputs)
    choices = encode_choices(loaded.base.tokenizer, split, task.words, encoded.max_length)
    losses = _read(loaded, choices, np.arange(len(choices)), row_losses)
    return lambda singles: losses(singles).reshape(len(singles), len(rows), -1).argmin(-1)


def _judged(recipe: Recipe, task: Task, loaded: Loaded, encoded: EncodedTask) -> Predict:
    """Return what says of each row whether the text that is generated is right."""
    base, rows, max_length, together = loaded.base, encoded.evaluated, encoded.max_length, clients_together(recipe)
    settings = recipe.evaluate
    positions = base.positions
    room = max_length if positions is None else min(max_length, positions - settings.max_new_tokens)
    if room < 1:
        raise RecipeError(
            f"evaluate.max_new_tokens: {settings.max_new_tokens} leaves no room for a prompt: "
            f"the base takes {positions} tokens"
        )
    if not loaded.planned and not pads_left(base.model, base.tokenizer.pad_token_id):
        raise RecipeError(
            f"task.metric: {task.metric} generates, and {type(base.model).__name__} can't from padded rows"
        )
    split = task.validation.take(rows, task.validation.columns.keys())
    prompts, long = encode_prompts(base.tokenizer, split, task.inputs, room)
    if long:
        log.warning(
            f"{len(long):,} of {len(rows):,} prompts have more than {room} tokens and lose their beginning "
            "(evaluate.max_new_tokens)"
        )
    right, ends = completions(base.tokenizer, encoded.validation, rows.tolist())
    decoding = Decoding(
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        sorted(ends.union(base.stop)),
        base.tokenizer.pad_token_id,
        recipe.seed,
    )
    judge, tokens = JUDGES[task.metric], cached_tokens(base.model)

    def predict(singles: list[Tensors]) -> NDArray[Any]:
        made = generate(loaded.model, singles, prompts, decoding, together=together, tokens=tokens)
        said = [base.tokenizer.batch_decode(texts, skip_special_tokens=True) for texts in made]
        return np.array([[judge(*pair) for pair in zip(texts, right, strict=True)] for texts in said])

    return predict
