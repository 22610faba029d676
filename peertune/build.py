"""From a recipe to a job: the only reader of the tables of names.

Each step is a function of its own, so that a graph or a partition can be looked at without loading a model.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, TaskType
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from peertune import draws
from peertune.adapters.peft_format import find_sites
from peertune.adapters.stacked import StackedModel, attach, init_adapters
from peertune.algorithms.methods import ALGORITHMS
from peertune.data.batches import Encoded, encode_images, encode_text, training_steps, validation_batches
from peertune.data.partition import PARTITIONS
from peertune.data.tasks import METRICS, TASKS, Task
from peertune.models import Base, load_base, pick_device, pick_dtype
from peertune.recipe import Part, Recipe, arguments
from peertune.round import Job
from peertune.topology import GRAPHS, Graph, rho
from peertune.training import Optim, adamw, evaluate, learning_rate, sgd
from peertune.types import Algorithm, Evaluation, State, Tensors, stack, take

log = logging.getLogger(__name__)

TOKENS_PER_PASS = {"cpu": 2048, "cuda": 65536}
"""Tokens that go through the base together where the recipe leaves it open: enough to fill the device, few enough to
fit."""
EVALUATION_FACTOR = 2
"""How many times more tokens go through together in evaluation, which keeps nothing for a backward pass."""


@dataclass(frozen=True)
class Run:
    """A job with what its run directory says of it."""

    job: Job
    resolved: Recipe  # every default and everything automatic written out
    lora: LoraConfig  # what PEFT needs to load an adapter
    head: Mapping[str, Tensor]  # the frozen parameters that the base's checkpoint lacks


def build_graph(recipe: Recipe) -> Graph:
    """Make the recipe's graph."""
    graph: Graph = _make(GRAPHS, recipe.graph, "graph", clients=recipe.clients, seed=recipe.seed)
    return graph


def build_task(recipe: Recipe) -> Task:
    """Load the recipe's data."""
    log.info("loading the task %s", recipe.task.name)
    task: Task = _make(TASKS, recipe.task, "task")
    return task


def build_partition(recipe: Recipe, task: Task) -> list[NDArray[np.int64]]:
    """Deal the training rows to the clients; return the rows of each."""
    divide = _make(PARTITIONS, recipe.partition, "partition")
    parts: list[NDArray[np.int64]] = divide(task.train, recipe.clients, recipe.seed)
    return parts


def build_algorithm(recipe: Recipe, graph: Graph) -> Algorithm:
    """Make the recipe's method for this graph."""
    algorithm: Algorithm = _make(ALGORITHMS, recipe.algorithm, "algorithm", rho=partial(rho, graph))
    return algorithm


def build(recipe: Recipe) -> Run:
    """Make everything that a run needs, in the order in which mistakes are cheapest to find."""
    task = build_task(recipe)
    parts = build_partition(recipe, task)
    graph = build_graph(recipe)
    algorithm = build_algorithm(recipe, graph)
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.model.dtype, device)
    base = load_base(
        recipe.model.name,
        revision=recipe.model.revision,
        classes=max(1, len(task.classes)),
        image=task.inputs == ("pixel_values",),
        dtype=dtype,
        device=device,
        seed=recipe.seed,
    )
    lora = _lora_config(recipe, base)
    model = attach(
        base.model,
        find_sites(base.model, recipe.lora.target_modules, base.head_roots),
        r=recipe.lora.r,
        lora_alpha=recipe.lora.lora_alpha,
        lora_dropout=recipe.lora.lora_dropout,
        head_names=_head_layers(base) if recipe.head == "trained" else (),
        base_dropout=recipe.model.dropout,
    )
    optim = build_optim(recipe)
    adapters = init_adapters(model, recipe.clients, recipe.seed)
    state = State(adapters, optim.optimizer.init(adapters), 0)
    train, validation = _encode(recipe, task, base)
    tokens = (
        TOKENS_PER_PASS[device.type] if recipe.training.tokens_per_pass == "auto" else recipe.training.tokens_per_pass
    )
    clients_per_pass = min(recipe.clients, recipe.training.clients_per_pass or recipe.clients)
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
            seed=recipe.seed,
        ),
        evaluate=_evaluation(recipe, task, validation, model, tokens, clients_per_pass),
        state=state,
        rounds=recipe.rounds,
        local_steps=recipe.training.local_steps,
        evaluate_every=recipe.evaluate.every,
        clients_per_pass=clients_per_pass,
    )
    return Run(job, _resolve(recipe, algorithm, dtype, device, tokens, clients_per_pass), lora, base.seeded)


def build_optim(recipe: Recipe) -> Optim:
    """Make the recipe's optimiser and schedule."""
    t = recipe.training
    if t.optim == "adamw":
        optimizer = adamw(t.adam_beta1, t.adam_beta2, t.adam_epsilon, t.weight_decay)
    else:
        optimizer = sgd(t.momentum, t.weight_decay)
    rate = learning_rate(t.lr_scheduler_type, t.learning_rate, t.warmup_steps, recipe.rounds * t.local_steps)
    return Optim(optimizer, rate, t.max_grad_norm, t.reset_optimizer)


def _make(table: Mapping[str, Callable[..., Any]], part: Part, where: str, **given: Any) -> Any:
    """Call the factory of the part's name with the recipe's settings, and what it asks for of `given`."""
    settings = arguments(table, part, where, tuple(given))
    asked = inspect.signature(table[part.name]).parameters
    return table[part.name](**settings, **{name: value for name, value in given.items() if name in asked})


def _head_layers(base: Base) -> list[str]:
    """Return the layers of the head; attach() refuses those that aren't linear."""
    return [
        name
        for root in base.head_roots
        for name, layer in base.model.get_submodule(root).named_modules(prefix=root)
        if any(True for _ in layer.parameters(recurse=False))
    ]


def _lora_config(recipe: Recipe, base: Base) -> LoraConfig:
    """Say in PEFT's words what the adapters are; heads and what else the checkpoint lacks travel with them."""
    roots = {
        next((root for root in base.head_roots if name.startswith(f"{root}.")), name.rpartition(".")[0])
        for name in base.seeded
    }
    saved = sorted(roots | (set(base.head_roots) if recipe.head == "trained" else set()))
    return LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.lora_alpha,  # type: ignore[arg-type]  # PEFT annotates int and divides
        lora_dropout=recipe.lora.lora_dropout,
        target_modules=recipe.lora.target_modules,
        modules_to_save=saved or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in base.model.modules()),
        base_model_name_or_path=recipe.model.name,
        revision=recipe.model.revision,
        task_type=TaskType.SEQ_CLS if base.tokenizer is not None else None,
        inference_mode=True,
    )


def _encode(recipe: Recipe, task: Task, base: Base) -> tuple[Encoded, Encoded]:
    splits = (task.train, task.validation)
    if base.tokenizer is None:
        first, second = (encode_images(split, base.tokens_per_image) for split in splits)
    else:
        log.info("tokenising %s rows", f"{len(task.train) + len(task.validation):,}")
        limit = getattr(base.model.config, "max_position_embeddings", None) or recipe.training.max_length
        max_length = min(recipe.training.max_length, limit)
        first, second = (encode_text(base.tokenizer, split, task.inputs, max_length) for split in splits)
    return first, second


def _evaluation(
    recipe: Recipe, task: Task, encoded: Encoded, model: StackedModel, tokens: int, clients_per_pass: int
) -> Callable[[Tensors], Evaluation]:
    rows = np.arange(len(encoded))
    if recipe.evaluate.rows is not None and recipe.evaluate.rows < len(rows):
        rows = np.sort(draws.generator(recipe.seed, "evaluate").permutation(rows)[: recipe.evaluate.rows])
    labels = np.asarray(task.validation.labels)[rows]
    score = METRICS[task.metric]

    def run(adapters: Tensors) -> Evaluation:
        average = {name: x.mean(0, keepdim=True) for name, x in adapters.items()}
        everyone = stack([adapters, average])
        scores = []
        for start in range(0, recipe.clients + 1, clients_per_pass):
            part = take(everyone, slice(start, start + clients_per_pass))
            batches = validation_batches(encoded, rows, len(next(iter(part.values()))), EVALUATION_FACTOR * tokens)
            scores += [score(predicted, labels) for predicted in evaluate(model, part, batches, len(rows))]
        return Evaluation(task.metric, scores[:-1], scores[-1], len(rows))

    return run


def _resolve(
    recipe: Recipe, algorithm: Algorithm, dtype: torch.dtype, device: torch.device, tokens: int, clients_per_pass: int
) -> Recipe:
    """Write out all defaults, and what everything automatic came to."""

    def part(table: Mapping[str, Callable[..., Any]], chosen: Part, *given: str) -> Part:
        return Part(name=chosen.name, **arguments(table, chosen, "", given))

    training = {"tokens_per_pass": tokens, "clients_per_pass": clients_per_pass}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")}),
            "task": part(TASKS, recipe.task),
            "partition": part(PARTITIONS, recipe.partition),
            "graph": part(GRAPHS, recipe.graph, "clients", "seed"),
            "algorithm": Part(name=recipe.algorithm.name, **algorithm.settings),
            "training": recipe.training.model_copy(update=training),
            "device": str(device),
        }
    )
