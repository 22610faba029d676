"""From a recipe to a job that an engine runs."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, TaskType
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from peertune.adapters.matching import match_names
from peertune.adapters.peft_format import find_sites
from peertune.adapters.stacked import Forward, attach, frozen_norms, init_adapters
from peertune.assembly.evaluation import build_evaluation, evaluated_rows
from peertune.assembly.registry import (
    beyond_defaults,
    build_algorithm,
    build_faults,
    build_graph,
    build_partition,
    build_task,
    describe_graph,
    label_counts,
    resolved_parts,
)
from peertune.data.batches import Encoded, encode_images, encode_text, training_steps
from peertune.data.completions import encode_completions, encode_words
from peertune.data.images import Images, prompts
from peertune.errors import DataError, ModelError, RecipeError
from peertune.memory import map_tensors_alone
from peertune.models.load import Base, Purpose, load_base, load_processor, pick_device, pick_dtype
from peertune.recipe import Recipe
from peertune.rounds.bounds import Bound
from peertune.rounds.round import Job
from peertune.rounds.training import Optim, adamw, learning_rate, sgd
from peertune.runs import trackers
from peertune.topology import Neighbourhood, digest
from peertune.types import ALONE, Algorithm, Group, Split, State, Task

log = logging.getLogger(__name__)

TOKENS_PER_PASS = {"cpu": 1536, "cuda": 65536}
"""Tokens that go through the base together where the recipe leaves it open: enough to fill the device, few enough to
fit."""
LANGUAGE_TOKENS_PER_PASS = {"cpu": 1536, "cuda": 8192}
"""The same for language models, which are larger, and have logits for each token of a completion."""
LOGITS_BYTES = 2**33
"""What a language model's logits and their gradients may take: 12 bytes a label and word in training, 10 in evaluation,
which has twice the tokens."""
EVALUATION_FACTOR = 2
"""How many times more tokens go through together in evaluation, which keeps nothing for a backward pass."""
COLUMNS = 128
"""Clients whose rows share a pass, times the rank: a vector meets the factors of all of them (see `Site`)."""
CLIENTS_PER_PASS = 16
"""Clients that train at a time where the recipe leaves it open: gradients are held for these."""
PEER_KEEPS = {"every": 1, "keep": 6}
"""How a peer keeps checkpoints where the recipe leaves it open: it may have to fall back on one."""


@dataclass(frozen=True)
class Run:
    """A job with what its run directory says of it."""

    job: Job
    resolved: Recipe  # every default and everything automatic written out
    lora: LoraConfig  # what PEFT needs to load an adapter
    head: Mapping[str, Tensor]  # what travels with each adapter: the head, and what else the checkpoint lacks
    asked: Mapping[str, Any]  # what the task asks of the base: its form, metric, words and templates
    labels: tuple[str, ...]  # names of the classes, by number
    held: list[list[int]]  # for each client, how many rows of each class it holds
    validation: list[int]  # how many rows of each class validate
    evaluated: list[int]  # and how many of each of these are evaluated
    long: Mapping[str, int]  # for each split, how many rows were longer than `max_length`
    left_out: Mapping[str, int]  # and how many were left out since they lack a cell

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What follows from the recipe: the graph's rho and T*, who holds what, numbers of parameters."""
        adapters = self.job.state.adapters
        return {
            "task": dict(self.asked),
            "graph": describe_graph(self.job.graph),
            "partition": {"labels": list(self.labels) or ["rows"], "rows": self.held},
            "validation": {"rows": sum(self.validation), "labels": self.validation if self.labels else []},
            "evaluated": {"rows": sum(self.evaluated), "labels": self.evaluated if self.labels else []},
            "long_rows": dict(self.long),
            "missing_cells": dict(self.left_out),
            "parameters": {
                "base": self.job.model.base.num_parameters(),  # type: ignore[operator]  # knows of 4 bits, too
                "adapter": sum(x[0].numel() for x in adapters.values()),
            },
        }


def build(
    recipe: Recipe,
    clients: Sequence[int] | None = None,
    own_data: bool = False,
    *,
    known: Neighbourhood | None = None,
    group: Group = ALONE,
    planned: bool = False,
) -> Run:
    """Make everything that a run needs, in the order in which mistakes are cheapest to find.

    For these `clients`: all, a process's share of them in a `group`, or one, a peer. With `own_data` all rows of the
    task are its own, and not dealt out by the recipe's partition. Where a peer's neighbourhood in the graph is `known`,
    the graph is not made. A `planned` run has a base without weights: all of it is on the meta device, and the device
    that it is for need not be there.
    """
    trackers.check(recipe.report_to)
    task = build_task(recipe)
    graph = build_graph(recipe, known)
    faults = build_faults(recipe)
    clients = range(recipe.clients) if clients is None else clients
    peer = group.size == 1 and len(clients) < recipe.clients
    if own_data:
        parts = {client: np.arange(len(task.train)) for client in clients}
    else:
        dealt = build_partition(recipe, task)
        parts = {client: dealt[client] for client in clients}
    algorithm = build_algorithm(recipe, graph)
    purpose = _purpose(task)
    if recipe.head == "trained" and purpose in _HEADLESS:
        raise RecipeError(f"head: {_HEADLESS[purpose]} has no head to train; use head=frozen")
    device = pick_device(recipe.device, planned=planned)
    dtype = pick_dtype(recipe.model.dtype, device)
    base = load_base(
        recipe.model.name,
        revision=recipe.model.revision,
        purpose=purpose,
        classes=task.classes,
        dtype=dtype,
        device=device,
        seed=recipe.seed,
        quantization=recipe.model.quantization,
        planned=planned,
    )
    lora = _lora_config(recipe, base, purpose)
    model = attach(
        base.model,
        find_sites(
            base.model, recipe.lora.target_modules, (base.output_name,) if base.output_name else base.head_roots
        ),
        r=recipe.lora.r,
        lora_alpha=recipe.lora.lora_alpha,
        lora_dropout=recipe.lora.lora_dropout,
        head_names=_head_layers(base) if recipe.head == "trained" else (),
        base_dropout=recipe.model.dropout,
        output_name=base.output_name,
        checkpointing=recipe.training.gradient_checkpointing,
        forward=_matching(task, base) if purpose == "match" else None,
    )
    if recipe.training.gradient_checkpointing:
        map_tensors_alone()  # who computes twice to save memory has no use for a heap with holes
    optim = build_optim(recipe)
    adapters = init_adapters(model, len(clients), recipe.seed)
    signals = algorithm.agreement.init(clients, 0) if algorithm.agreement else {}
    signals = {name: x.to(base.model.device) for name, x in signals.items()}
    state = State(adapters, optim.optimizer.init(adapters), 0, signals)
    max_length = _max_length(recipe, base)
    own = np.sort(np.concatenate(list(parts.values())))
    train, validation = _encode(recipe, task, base, max_length, own)
    long = {"train": sum(group.gather(len(train.long))), "validation": len(validation.long)}
    _tell_long(recipe, long, {"train": sum(group.gather(len(own))), "validation": len(validation)}, max_length)
    parts = {client: _without_long(recipe, train, part) for client, part in parts.items()}
    held_out = _without_long(recipe, validation, np.arange(len(validation)))
    if empty := [client for client, part in parts.items() if not len(part)]:
        raise DataError(
            f"training.long_rows: client {empty[0]} has no row of up to {max_length} tokens; "
            "raise training.max_length, or use training.long_rows=cut"
        )
    if not len(held_out):
        raise DataError("training.long_rows: no row to validate on is short enough; raise training.max_length")
    evaluated = evaluated_rows(recipe, held_out)
    together = clients_together(recipe)
    tokens = _tokens_per_pass(recipe, base, device)
    clients_per_pass = min(
        len(clients) if peer else recipe.clients, recipe.training.clients_per_pass or CLIENTS_PER_PASS
    )
    bound = None
    if recipe.network.bound and not planned:
        bound = Bound(frozen_norms(model), algorithm.agreement and algorithm.agreement.sound)
    job = Job(
        model=model,
        graph=graph,
        algorithm=algorithm,
        optim=optim,
        steps=training_steps(
            train,
            parts,
            rows_per_step=recipe.training.per_device_train_batch_size,
            local_steps=recipe.training.local_steps,
            tokens=tokens,
            clients_together=together,
            packed=model.packs,
            seed=recipe.seed,
        ),
        evaluate=build_evaluation(
            recipe,
            task,
            base,
            model,
            validation,
            evaluated,
            max_length=max_length,
            tokens=EVALUATION_FACTOR * tokens,
            together=together,
            average=not peer,
            group=group,
        ),
        state=state,
        clients=clients,
        rounds=recipe.rounds,
        local_steps=recipe.training.local_steps,
        evaluate_every=recipe.evaluate.every,
        clients_per_pass=clients_per_pass,
        bound=bound,
        faults=faults,
        group=group,
    )
    if peer:
        left_open = {key: value for key, value in PEER_KEEPS.items() if key not in recipe.checkpoint.model_fields_set}
        recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update=left_open)})
    return Run(
        job,
        _resolve(recipe, algorithm, base.revision, dtype, device, tokens, clients_per_pass),
        lora,
        base.head,
        {"form": task.form, "metric": task.metric, "of": task.of, "words": task.words, "templates": task.templates},
        task.classes,
        held=list(chain(*group.gather(label_counts(task, task.train, list(parts.values()))))),
        validation=label_counts(task, task.validation, [held_out])[0],
        evaluated=label_counts(task, task.validation, [evaluated])[0],
        long=long,
        left_out={"train": task.train.left_out, "validation": task.validation.left_out},
    )


def agreed(run: Run) -> dict[str, str]:
    """Return what must be the same at all peers of a run: name → value, or digest of what is long.

    What has its default is left out, so that two versions, of which one lacks a setting, agree where it changes
    nothing. The base's weights count as they are in bfloat16, so that peers may hold them in different precision.
    """
    recipe, job = run.resolved, run.job
    base = sha256()
    for name, x in sorted(job.model.base.state_dict().items()):
        base.update(f"{name} {list(x.shape)}".encode())
        rounded = x.to(torch.bfloat16) if x.is_floating_point() else x
        base.update(rounded.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data if x.numel() else b"")
    adapters = {name: [*x.shape[1:], str(x.dtype)] for name, x in job.state.adapters.items()}

    def short(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 200 else f"{text[:150]}… {sha256(text.encode()).hexdigest()[:16]}"

    return {
        "adapters": sha256(json.dumps(adapters, sort_keys=True).encode()).hexdigest()[:16],
        "algorithm": json.dumps(beyond_defaults("algorithm", recipe.algorithm), sort_keys=True),
        "base": base.hexdigest()[:16],
        "clients": str(recipe.clients),
        "edges": digest(job.graph),
        "graph": json.dumps(beyond_defaults("graph", recipe.graph), sort_keys=True),
        "labels": short(run.labels),
        "lora": json.dumps(recipe.lora.model_dump(exclude={"lora_dropout"}, exclude_defaults=True), sort_keys=True),
        "rounds": str(recipe.rounds),
        "seed": str(recipe.seed),
        "task": short({part: run.asked[part] for part in ("form", "words", "templates", "of") if run.asked[part]}),
    } | ({} if recipe.network.bound else {"bound": "off"})


def build_optim(recipe: Recipe) -> Optim:
    """Make the recipe's optimiser and schedule."""
    t = recipe.training
    if t.optim == "adamw":
        optimizer = adamw(t.adam_beta1, t.adam_beta2, t.adam_epsilon, t.weight_decay)
    else:
        optimizer = sgd(t.momentum, t.weight_decay)
    rate = learning_rate(t.lr_scheduler_type, t.learning_rate, t.warmup_steps, recipe.rounds * t.local_steps)
    return Optim(optimizer, rate, t.max_grad_norm, t.reset_optimizer)


def clients_together(recipe: Recipe) -> int:
    """Return how many clients' rows may share a pass."""
    return max(1, COLUMNS // recipe.lora.r)


def _tokens_per_pass(recipe: Recipe, base: Base, device: torch.device) -> int:
    """Return about how many tokens go through the base together: by the recipe, or what the device has room for."""
    if recipe.training.tokens_per_pass != "auto":
        return recipe.training.tokens_per_pass
    if base.output_name is None:
        return TOKENS_PER_PASS[device.type]
    words: int = base.model.get_output_embeddings().out_features
    return max(1, min(LANGUAGE_TOKENS_PER_PASS[device.type], LOGITS_BYTES // (24 * words)))


def _head_layers(base: Base) -> list[str]:
    """Return the layers of the head; attach() refuses those that aren't linear."""
    return [
        name
        for root in base.head_roots
        for name, layer in base.model.get_submodule(root).named_modules(prefix=root)
        if any(True for _ in layer.parameters(recurse=False))
    ]


_HEADLESS = {"language": "a language model", "match": "a task with templates"}


def _purpose(task: Task) -> Purpose:
    """Return what the task needs a base for."""
    match task.form:
        case "match":
            return "match"
        case "complete" | "choose":
            return "language"
        case _:
            return "image" if task.inputs == ("pixel_values",) else "text"


def _matching(task: Task, base: Base) -> Forward:
    """Return what matches images with the names of the classes. Raises DataError where these are too long."""
    tokens = base.tokenizer(prompts(task), padding=True, return_tensors="pt")
    config: Any = base.model.config
    longest, most = tokens["input_ids"].shape[1], config.text_config.max_position_embeddings
    if longest > most:
        raise DataError(
            f"task.templates: {longest} tokens with the longest name, and the base takes {most}; shorten them"
        )
    return match_names(tokens["input_ids"], tokens["attention_mask"], len(task.templates))


def _lora_config(recipe: Recipe, base: Base, purpose: Purpose) -> LoraConfig:
    """Say in PEFT's words what the adapters are; heads and what else the checkpoint lacks travel with them."""
    return LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.lora_alpha,  # type: ignore[arg-type]  # PEFT annotates int and divides
        lora_dropout=recipe.lora.lora_dropout,
        target_modules=recipe.lora.target_modules,
        modules_to_save=list(base.head_roots) or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in base.model.modules()),
        base_model_name_or_path=recipe.model.name,
        revision=recipe.model.revision or base.revision,
        task_type={"language": TaskType.CAUSAL_LM, "text": TaskType.SEQ_CLS}.get(purpose),
        inference_mode=True,
    )


def _encode(recipe: Recipe, task: Task, base: Base, max_length: int, own: NDArray[np.int64]) -> tuple[Encoded, Encoded]:
    """Encode the `own` rows of the training split, and the validation split."""
    images, process = task.inputs == ("pixel_values",), None
    if isinstance(task.train.columns.get("pixel_values"), Images):
        process = load_processor(recipe.model.name, revision=recipe.model.revision, config=base.model.config)

    def encode(split: Split, rows: NDArray[np.int64] | None = None) -> Encoded:
        match task.form:
            case "complete":
                return encode_completions(base.tokenizer, split, task.inputs, max_length, rows)
            case "choose":
                return encode_words(base.tokenizer, split, task.words, max_length, rows)
        if images:
            return encode_images(split, base.tokens_per_image, process)
        return encode_text(base.tokenizer, split, task.inputs, max_length, rows)

    if not images:
        log.info("tokenising %s rows", f"{len(own) + len(task.validation):,}")
    splits = encode(task.train, own), encode(task.validation)
    for encoded in () if images else splits:
        _check_tokens(recipe, base, encoded)
    return splits


def _tell_long(recipe: Recipe, long: Mapping[str, int], rows: Mapping[str, int], max_length: int) -> None:
    """Warn of rows that are too long, of so many of each split."""
    done = "cut" if recipe.training.long_rows == "cut" else "left out"
    for name, count in long.items():
        if count:
            log.warning(
                "%s of %s rows of %s have more than %d tokens and are %s (training.max_length, training.long_rows)",
                f"{count:,}",
                f"{rows[name]:,}",
                name,
                max_length,
                done,
            )


def _check_tokens(recipe: Recipe, base: Base, encoded: Encoded) -> None:
    """Raise ModelError where the tokenizer makes tokens that the base does not know."""
    highest = int(encoded.tokens["input_ids"].max())
    if highest >= base.model.config.get_text_config().vocab_size:
        raise ModelError(
            f"model.name: {recipe.model.name}: its tokenizer makes tokens that it has no embedding for, such as "
            f"{base.tokenizer.convert_ids_to_tokens(highest)!r}; give a base with its own tokenizer"
        )


def _max_length(recipe: Recipe, base: Base) -> int:
    """Return how many tokens a row may have: by the recipe, and by what the base can take."""
    if base.tokenizer is None:
        return recipe.training.max_length
    asked = recipe.training.max_length
    return int(min(asked, asked if base.positions is None else base.positions, base.tokenizer.model_max_length))


def _without_long(recipe: Recipe, encoded: Encoded, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows if recipe.training.long_rows == "cut" else np.setdiff1d(rows, encoded.long)


def _resolve(
    recipe: Recipe,
    algorithm: Algorithm,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    clients_per_pass: int,
) -> Recipe:
    """Write out all defaults, and what everything automatic came to."""
    training = {"tokens_per_pass": tokens, "clients_per_pass": clients_per_pass}
    return recipe.model_copy(
        update={
            **resolved_parts(recipe, algorithm),
            "model": recipe.model.model_copy(
                update={"dtype": str(dtype).removeprefix("torch."), "revision": recipe.model.revision or revision}
            ),
            "training": recipe.training.model_copy(update=training),
            "device": str(device),
        }
    )
