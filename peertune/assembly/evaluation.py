"""Evaluation: how good the clients' own models are, by the metric of the task."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from peertune.assembly.encoding import EncodedTask
from peertune.assembly.loading import Loaded, clients_together
from peertune.data.batches import Encoded, validation_batches
from peertune.data.completions import completions, encode_choices, encode_prompts
from peertune.data.scores import JUDGES, calibration_error, log_loss, scorer
from peertune.errors import RecipeError
from peertune.models.generation import Decoding, cached_tokens, generate, pads_left
from peertune.recipe import Recipe
from peertune.rounds.metrics import entries
from peertune.rounds.record import Evaluation
from peertune.rounds.round import Heard
from peertune.rounds.training import Read, evaluate, hits, predictions, probabilities, row_losses
from peertune.types import ALONE, Group, Split, Task, Tensors, take

log = logging.getLogger(__name__)

EVALUATION_FACTOR = 2
"""How many times more tokens go through together in evaluation, which keeps nothing for a backward pass."""

Predict = Callable[[list[Tensors]], NDArray[Any]]
"""`predict(singles)` returns what the metric compares with the labels, `[len(singles), rows]`, for single adapters
`[1, …]`."""
Judged = tuple[float, float]
"""A score, and the share of the rows for which the most frequent class is predicted."""


class _Judge(NamedTuple):
    predict: Predict
    judge: Callable[[NDArray[Any]], list[Judged]]  # of what was predicted


def build_evaluation(
    recipe: Recipe, task: Task, loaded: Loaded, encoded: EncodedTask, group: Group = ALONE, *, peer: bool = False
) -> Callable[[Tensors, Sequence[int]], Evaluation]:
    """Return what evaluates a stack `[K, …]` of these clients, and, but at a peer, the average of all of the group.

    Each client's own model is judged on the validation set, on rows that it holds out, or on both. Raises RecipeError
    where the metric can't be had of this task or this base.
    """
    on = recipe.evaluate.on
    if recipe.evaluate.temperature and task.metric not in JUDGES:
        raise RecipeError(
            f"evaluate.temperature: nothing is generated for the metric {task.metric}; leave it out, "
            f"or choose {' or '.join(sorted(JUDGES))}"
        )
    if recipe.evaluate.ensemble and (not task.classes or task.form not in ("classify", "match")):
        raise RecipeError(
            "evaluate.ensemble: needs probabilities of classes, and this task has none; leave it out, or choose a task "
            "that tells classes apart"
        )
    judge = partial(_judge, recipe, task, loaded, encoded)
    own = {client: judge(task.train, encoded.train, rows) for client, rows in encoded.held_out.items()}
    held_out = sum(group.gather(sum(map(len, encoded.held_out.values()))))
    common = None if on == "own" else judge(task.validation, encoded.validation, encoded.evaluated)

    beside = None
    if recipe.evaluate.ensemble and common is not None:
        by_class, beside = common.judge, _beside(task, group, loaded, encoded, peer)
        common = _Judge(_probabilities(loaded, encoded), lambda shares: by_class(shares.argmax(-1)))

    def run(adapters: Tensors, clients: Sequence[int]) -> Evaluation:
        singles = [take(adapters, slice(place, place + 1)) for place in range(len(clients))]
        pairs = [(own[client], single) for client, single in zip(clients, singles, strict=True) if own]
        scores = [score for its, single in pairs for score, _ in its.judge(its.predict([single]))]
        if common is None:
            return Evaluation(task.measured, scores, None, held_out, [], scores)
        if not peer:
            mean = {name: group.mean(x)[None] for name, x in adapters.items()}
            if group.rank == group.size - 1:  # once, by the one with the fewest clients
                singles.append(mean)
        rows = len(encoded.evaluated)
        found = common.predict(singles) if singles else np.zeros((0, rows, len(task.classes)))
        more = {} if beside is None else beside(found[: len(clients)])
        judged = common.judge(found)
        together, rest = judged[: len(clients)], judged[len(clients) :]
        average = rest[0][0] if rest else None
        top = [share for _, share in together] if task.classes else []
        return Evaluation(task.measured, [score for score, _ in together], average, rows, top, scores, **more)

    return run


Ensembles = Callable[[Tensors, Heard, Sequence[int]], list[float]]
"""`ensembles(own [K, …], came, clients [K])` returns the score of each client's ensemble with those that it heard."""


def build_ensembles(recipe: Recipe, task: Task, loaded: Loaded, encoded: EncodedTask) -> Ensembles | None:
    """Return what judges each client's ensemble with those whom it mixes, None where the recipe doesn't ask for it.

    It is what a client can compute of what a round brought it: the mean, each counting alike, of the probabilities by
    its own adapter and by those that it heard, all as they were sent, after local steps and before mixing. So it stands
    beside the score of the client's own model, which is made of the same adapters by mixing. Where a phase sends some
    kinds only, the others of an adapter that was heard are the receiver's own.
    """
    if not recipe.evaluate.ensemble:
        return None
    predict = _probabilities(loaded, encoded)
    score, labels = scorer(task), np.asarray(task.validation.labels)[encoded.evaluated]

    def judge(own: Tensors, came: Heard, clients: Sequence[int]) -> list[float]:
        if not clients:
            return []
        told = {name: came.tensors[name] for name in own if name in came.tensors}
        at = {client: place for place, client in enumerate(came.clients)}
        near = [{at[client]} for client in clients]
        for receiver, sender in zip(*(x.tolist() for x in entries(came.weights)[:2]), strict=True):
            near[receiver] |= {sender} if told else set()
        whole = told.keys() == own.keys()  # then an adapter that was heard is the same for all receivers
        members = [[(0 if whole else k, place) for place in sorted(places)] for k, places in enumerate(near)]
        singles = {
            (k, place): take(own, slice(k, k + 1)) | take(told, slice(place, place + 1))
            for k, place in dict.fromkeys(chain(*members))
        }
        shares = dict(zip(singles, predict(list(singles.values())), strict=True))
        return [score(np.mean([shares[one] for one in each], axis=0).argmax(-1), labels) for each in members]

    return judge


def _probabilities(loaded: Loaded, encoded: EncodedTask) -> Predict:
    """Return what predicts the probabilities of the evaluated rows' classes, `[len(singles), rows, classes]`."""
    return _read(loaded, encoded.validation, encoded.evaluated, probabilities)


def _beside(
    task: Task, group: Group, loaded: Loaded, encoded: EncodedTask, alone: bool
) -> Callable[[NDArray[Any]], dict[str, Any]]:
    """Return what judges the clients' probabilities of the evaluated rows: each client's, and all together."""
    score, labels = scorer(task), np.asarray(task.validation.labels)[encoded.evaluated]

    def judge(found: NDArray[Any]) -> dict[str, Any]:
        each: dict[str, Any] = {
            "nll": [log_loss(own, labels) for own in found],
            "ece": [calibration_error(own, labels) for own in found],
        }
        if alone:
            return each
        held = torch.from_numpy(found).to(loaded.base.model.device)
        mean = group.mean(held).argmax(-1).cpu().numpy()
        # of this process the surest client's answer to each row, then of all processes
        sure, said = held.max(-1) if len(held) else (held.new_zeros(1, len(labels)),) * 2
        first = sure.argmax(0, keepdim=True)
        sure, said = (group.concat(x.double().gather(0, first)) for x in (sure, said))
        routed = said.gather(0, sure.argmax(0, keepdim=True))[0].long().cpu().numpy()
        return each | {"ensemble": score(mean, labels), "route": score(routed, labels)}

    return judge


def _judge(
    recipe: Recipe,
    task: Task,
    loaded: Loaded,
    encodings: EncodedTask,
    split: Split,
    encoded: Encoded,
    rows: NDArray[np.int64],
) -> _Judge:
    """Return what predicts these rows of a split, and judges what was predicted."""
    labels = np.asarray(split.labels)[rows]
    if task.metric in JUDGES:
        predict = _judged(recipe, task, loaded, encodings.max_length, split, encoded, rows)
        labels = np.ones(len(rows))
    elif task.form == "choose":
        predict = _chosen(task, loaded, encodings.max_length, split, rows)
    else:
        readers = {"perplexity": row_losses, "token_accuracy": hits}
        predict = _read(loaded, encoded, rows, readers.get(task.metric, predictions))
        labels = encoded.targets[rows] if task.form == "complete" else labels
    score = scorer(task)

    def judge(found: NDArray[Any]) -> list[Judged]:
        return [
            (score(own, labels), float(np.bincount(own).max() / len(rows)) if task.classes else 0.0) for own in found
        ]

    return _Judge(predict, judge)


def _read(loaded: Loaded, encoded: Encoded, rows: NDArray[np.int64], read: Read) -> Predict:
    """Return what reads each row's logits."""
    model, tokens = loaded.model, EVALUATION_FACTOR * loaded.tokens

    def predict(singles: list[Tensors]) -> NDArray[Any]:
        return evaluate(model, singles, validation_batches(encoded, rows, tokens, model.packs), len(rows), read)

    return predict


def _chosen(task: Task, loaded: Loaded, max_length: int, split: Split, rows: NDArray[np.int64]) -> Predict:
    """Return what finds the likeliest word after each row's prompt."""
    choices = encode_choices(loaded.base.tokenizer, split.take(rows, task.inputs), task.words, max_length)
    losses = _read(loaded, choices, np.arange(len(choices)), row_losses)
    return lambda singles: losses(singles).reshape(len(singles), len(rows), -1).argmin(-1)


def _judged(
    recipe: Recipe,
    task: Task,
    loaded: Loaded,
    max_length: int,
    split: Split,
    encoded: Encoded,
    rows: NDArray[np.int64],
) -> Predict:
    """Return what says of each row whether the text that is generated is right."""
    base, together = loaded.base, clients_together(recipe)
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
    prompts, long = encode_prompts(base.tokenizer, split.take(rows, split.columns.keys()), task.inputs, room)
    if long:
        log.warning(
            f"{len(long):,} of {len(rows):,} prompts have more than {room} tokens and lose their beginning "
            "(evaluate.max_new_tokens)"
        )
    right, ends = completions(base.tokenizer, encoded, rows.tolist())
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
