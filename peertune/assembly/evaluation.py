"""Evaluation: how good the clients' own models are, by the metrics of the task."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from peertune.assembly.encoding import EncodedTask
from peertune.assembly.loading import Loaded, clients_together
from peertune.assembly.ranks import ranks_of
from peertune.assembly.registry import hostile
from peertune.data.batches import Encoded, validation_batches
from peertune.data.completions import completions, encode_choices, encode_prompts
from peertune.data.measures import constants, scorers
from peertune.data.scores import ANSWERS, calibration_error, confusion, log_loss, same
from peertune.errors import RecipeError
from peertune.methods.shares import entries
from peertune.models.generation import Decoding, cached_tokens, generate, pads_left
from peertune.recipe import Recipe
from peertune.rounds.job import Heard
from peertune.rounds.record import MOST_CLASSES, Evaluation
from peertune.rounds.slices import average
from peertune.rounds.training import Read, evaluate, hits, predictions, probabilities, row_losses
from peertune.types import ALONE, Group, Measure, Split, Stack, Task, Tensors, among, by_client, take

log = logging.getLogger(__name__)

EVALUATION_FACTOR = 2
"""How many times more tokens go through together in evaluation, which keeps nothing for a backward pass."""

Predict = Callable[[list[Tensors]], NDArray[Any]]
"""`predict(singles)` returns what the metrics compare with the labels, `[len(singles), rows]`, for single adapters
`[1, …]`; or `[len(singles), rows, metrics]` where each of the metrics reads something else."""


class _Judged(NamedTuple):
    """What a model's predictions come to."""

    scores: list[float]  # by metric
    top_share: float  # of the rows for which the most frequent class is predicted; 0 of values and texts
    confusion: NDArray[np.int64]  # [C, C], rows by class and prediction; [0, 0] where they are not counted


class _Judge(NamedTuple):
    predict: Predict
    judge: Callable[[NDArray[Any]], list[_Judged]]  # of what was predicted
    constants: list[float]  # by metric, what the best answer that is the same for all rows scores


def build_evaluation(
    recipe: Recipe, task: Task, loaded: Loaded, encoded: EncodedTask, group: Group = ALONE, *, peer: bool = False
) -> Callable[[Sequence[Stack], Sequence[int]], Evaluation]:
    """Return what evaluates the adapters of these clients, and, but at a peer, the average of all of the group.

    Each client's own model is judged on the validation set, on rows that it holds out, or on both. Hostile clients are
    left out, in the average, too; a hostile peer judges its own. Raises RecipeError where the metric can't be had of
    this task or this base.
    """
    on = recipe.evaluate.on
    if recipe.evaluate.temperature and task.metric not in ANSWERS:
        raise RecipeError(
            f"evaluate.temperature: nothing is generated for the metric {task.metric}; leave it out, "
            f"or choose {' or '.join(sorted(ANSWERS))}"
        )
    if recipe.evaluate.ensemble and (not task.classes or task.form not in ("classify", "match")):
        raise RecipeError(
            "evaluate.ensemble: needs probabilities of classes, and this task has none; leave it out, or choose a task "
            "that tells classes apart"
        )
    judge = partial(_judge, recipe, task, loaded, encoded)
    own = {client: judge(task.train, encoded.train, rows) for client, rows in encoded.held_out.items()}
    held_out = sum(group.gather(sum(map(len, encoded.held_out.values()))))
    cuts, enemies = sorted({*ranks_of(recipe)}), [] if peer else hostile(recipe)
    common = None if on == "own" else judge(task.validation, encoded.validation, encoded.evaluated)

    beside = None
    if recipe.evaluate.ensemble and common is not None:
        by_class, beside = common.judge, _beside(task, group, loaded, encoded, peer)
        common = common._replace(
            predict=_probabilities(loaded, encoded), judge=lambda shares: by_class(shares.argmax(-1))
        )

    fooled = _fooled(task, loaded, encoded)

    def run(adapters: Sequence[Stack], clients: Sequence[int]) -> Evaluation:
        adapters, clients = among(adapters, clients, enemies)
        found = judged_of(adapters, clients)
        return replace(found, judged=[*clients] if enemies else [], backdoor=fooled(by_client(adapters)))

    def judged_of(adapters: Sequence[Stack], clients: Sequence[int]) -> Evaluation:
        singles = by_client(adapters)
        its = [own[client] for client in clients if own]
        alone = [found for one, single in zip(its, singles, strict=False) for found in one.judge(one.predict([single]))]
        levels = [one.constants for one in its]
        if common is None:
            return _told(task, alone, held_out, alone, levels, {})
        if not peer:
            mean = {name: x[None] for name, x in average(adapters, group, cuts).items()}
            if group.rank == group.size - 1:  # once, by the one with the fewest clients
                singles.append(mean)
        rows = len(encoded.evaluated)
        found = common.predict(singles) if singles else np.zeros((0, rows, len(task.classes)))
        certainty, more = ({}, {}) if beside is None else beside(found[: len(clients)])
        judged = common.judge(found)
        together, rest = judged[: len(clients)], judged[len(clients) :]
        more |= {"constant": common.constants} | ({"average": rest[0].scores} if rest else {})
        top = [one.top_share for one in together] if task.classes else []
        return replace(_told(task, together, rows, alone, levels, more), top_share=top, **certainty)

    return run


def _fooled(task: Task, loaded: Loaded, encoded: EncodedTask) -> Callable[[list[Tensors]], list[float]]:
    """Return what says in how many of the rows with a backdoor's trigger each adapter `[1, …]` answers its class."""
    if encoded.triggered is None:
        return lambda singles: []
    split, rows, target = encoded.triggered
    places = np.arange(len(split))
    if task.form == "choose":
        predict = _chosen(task, loaded, encoded.max_length, split, places)
    else:
        predict = _read(loaded, rows, places, predictions)
    return lambda singles: (predict(singles) == target).mean(1).tolist() if singles else []


def _told(
    task: Task,
    clients: Sequence[_Judged],
    rows: int,
    own: Sequence[_Judged],
    own_constant: Sequence[Sequence[float]],
    by_metric: Mapping[str, Sequence[Any]],
) -> Evaluation:
    """Lay out what was judged: an evaluation by the first metric, which holds those by the others."""

    def by(place: int, measure: Measure) -> Evaluation:
        given: dict[str, Any] = {"average": None, **{name: scores[place] for name, scores in by_metric.items()}}
        return Evaluation(
            str(measure),
            [one.scores[place] for one in clients],
            rows=rows,
            top_share=[],
            own=[one.scores[place] for one in own],
            own_constant=[scores[place] for scores in own_constant],
            **given,
        )

    first, *also = (by(place, measure) for place, measure in enumerate(task.measures))
    counted = len(task.classes) if len(task.classes) <= MOST_CLASSES else 0
    counts = sum((one.confusion for one in clients), np.zeros((counted, counted), np.int64))
    return replace(first, confusion=counts.tolist(), also=also)


Ensembles = Callable[[Tensors, Heard, Sequence[int]], list[list[float]]]
"""`ensembles(own [K, …], came, clients [K])` returns, by metric, the score of each honest client's ensemble with those
that it heard."""


def build_ensembles(
    recipe: Recipe, task: Task, loaded: Loaded, encoded: EncodedTask, *, peer: bool = False
) -> Ensembles | None:
    """Return what judges each client's ensemble with those whom it mixes, None where the recipe doesn't ask for it.

    It is what a client can compute of what a round brought it: the mean, each counting alike, of the probabilities by
    its own adapter and by those that it heard, all as they were sent, after local steps and before mixing. So it stands
    beside the score of the client's own model, which is made of the same adapters by mixing. Where a phase sends some
    kinds only, the others of an adapter that was heard are the receiver's own.
    """
    if not recipe.evaluate.ensemble:
        return None
    predict, enemies = _probabilities(loaded, encoded), [] if peer else hostile(recipe)
    scores, labels = scorers(task), np.asarray(task.validation.labels)[encoded.evaluated]

    def judge(own: Tensors, came: Heard, clients: Sequence[int]) -> list[list[float]]:
        honest = [row for row, client in enumerate(clients) if client not in enemies]
        if not honest:
            return [[] for _ in scores]
        told = {name: came.tensors[name] for name in own if name in came.tensors}
        at = {client: place for place, client in enumerate(came.clients)}
        near = [{at[client]} for client in clients]
        for receiver, sender in zip(*(x.tolist() for x in entries(came.weights)[:2]), strict=True):
            near[receiver] |= {sender} if told else set()
        whole = told.keys() == own.keys()  # then an adapter that was heard is the same for all receivers
        members = [[(0 if whole else k, place) for place in sorted(near[k])] for k in honest]
        singles = {
            (k, place): take(own, slice(k, k + 1)) | take(told, slice(place, place + 1))
            for k, place in dict.fromkeys(chain(*members))
        }
        shares = dict(zip(singles, predict(list(singles.values())), strict=True))
        said = [np.mean([shares[one] for one in each], axis=0).argmax(-1) for each in members]
        return [[score(answers, labels) for answers in said] for score in scores]

    return judge


def _probabilities(loaded: Loaded, encoded: EncodedTask) -> Predict:
    """Return what predicts the probabilities of the evaluated rows' classes, `[len(singles), rows, classes]`."""
    return _read(loaded, encoded.validation, encoded.evaluated, probabilities)


def _beside(
    task: Task, group: Group, loaded: Loaded, encoded: EncodedTask, alone: bool
) -> Callable[[NDArray[Any]], tuple[dict[str, Any], dict[str, list[float]]]]:
    """Return what judges the clients' probabilities of the evaluated rows: each client's; all together, by metric."""
    scores, labels = scorers(task), np.asarray(task.validation.labels)[encoded.evaluated]

    def judge(found: NDArray[Any]) -> tuple[dict[str, Any], dict[str, list[float]]]:
        each = {
            "nll": [log_loss(own, labels) for own in found],
            "ece": [calibration_error(own, labels) for own in found],
        }
        if alone:
            return each, {}
        held = torch.from_numpy(found).to(loaded.base.model.device)
        mean = group.mean(held).argmax(-1).cpu().numpy()
        # of this process the surest client's answer to each row, then of all processes
        sure, said = held.max(-1) if len(held) else (held.new_zeros(1, len(labels)),) * 2
        first = sure.argmax(0, keepdim=True)
        sure, said = (group.concat(x.double().gather(0, first)) for x in (sure, said))
        routed = said.gather(0, sure.argmax(0, keepdim=True))[0].long().cpu().numpy()
        together = {"ensemble": mean, "route": routed}
        return each, {name: [score(said, labels) for score in scores] for name, said in together.items()}

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
    truths: Sequence[Any] | NDArray[Any] = labels
    if task.metric in ANSWERS:
        predict, truths = _generated(recipe, task, loaded, encodings.max_length, split, encoded, rows)
        labels = np.ones(len(rows))
    elif task.form == "choose":
        predict = _chosen(task, loaded, encodings.max_length, split, rows)
    elif task.form == "complete":
        reads = [_READS[measure.metric] for measure in task.measures]
        predict = _read(
            loaded, encoded, rows, lambda *given: torch.stack([read(*given).double() for read in reads], -1)
        )
        labels, truths = encoded.targets[rows], encoded.said(rows)
    else:
        predict = _read(loaded, encoded, rows, predictions)
    scores, classes = scorers(task), len(task.classes)
    counted = classes if classes <= MOST_CLASSES else 0

    def judge_one(own: NDArray[Any]) -> _Judged:
        by_metric = own.T if own.ndim > 1 else [own] * len(scores)
        return _Judged(
            [score(said, labels) for score, said in zip(scores, by_metric, strict=True)],
            float(np.bincount(own).max() / len(rows)) if classes else 0.0,
            confusion(own, labels, counted) if counted else np.zeros((0, 0), np.int64),
        )

    return _Judge(predict, lambda found: [judge_one(own) for own in found], constants(task, truths))


_READS: dict[str, Read] = {"perplexity": row_losses, "token_accuracy": hits}
"""Metric of tokens → what it reads of each row's logits."""


def _read(loaded: Loaded, encoded: Encoded, rows: NDArray[np.int64], read: Read) -> Predict:
    """Return what reads each row's logits."""
    model, tokens = loaded.model, EVALUATION_FACTOR * loaded.tokens

    def predict(singles: list[Tensors]) -> NDArray[Any]:
        return evaluate(model, singles, validation_batches(encoded, rows, tokens, loaded.packed), len(rows), read)

    return predict


def _chosen(task: Task, loaded: Loaded, max_length: int, split: Split, rows: NDArray[np.int64]) -> Predict:
    """Return what finds the likeliest word after each row's prompt."""
    choices = encode_choices(loaded.base.tokenizer, split.take(rows, task.inputs), task.words, max_length)
    losses = _read(loaded, choices, np.arange(len(choices)), row_losses)
    return lambda singles: losses(singles).reshape(len(singles), len(rows), -1).argmin(-1)


def _generated(
    recipe: Recipe,
    task: Task,
    loaded: Loaded,
    max_length: int,
    split: Split,
    encoded: Encoded,
    rows: NDArray[np.int64],
) -> tuple[Predict, list[str]]:
    """Return what says of each row, by metric, whether the text that is generated is right; and the rows' own texts."""
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
    tokens = cached_tokens(base.model)

    def predict(singles: list[Tensors]) -> NDArray[Any]:
        made = generate(loaded.model, singles, prompts, decoding, together=together, tokens=tokens)
        said = [base.tokenizer.batch_decode(texts, skip_special_tokens=True) for texts in made]
        return np.array(
            [
                [[same(measure.metric, *pair) for measure in task.measures] for pair in zip(texts, right, strict=True)]
                for texts in said
            ]
        )

    return predict, right
