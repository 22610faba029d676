"""From a recipe to a job that an engine runs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peertune.adapters.peft_format import LoraConfig
from peertune.adapters.stacked import frozen_norms, init_adapters
from peertune.assembly.encoding import EncodedTask, encode, encode_splits, row_weights
from peertune.assembly.evaluation import build_ensembles, build_evaluation
from peertune.assembly.loading import Loaded, begun_with, clients_together, load, of_run
from peertune.assembly.privacy import drawings, owned, private_of
from peertune.assembly.registry import (
    Parts,
    beyond_defaults,
    build_parts,
    build_task,
    describe_graph,
    from_outside,
    hostile,
    label_counts,
    resolved_choices,
)
from peertune.data.batches import TrainingSteps
from peertune.errors import RecipeError, tried
from peertune.identity.secret import of_simulations
from peertune.method import standing
from peertune.methods.private import Private, privately, spent
from peertune.models import weights
from peertune.privacy.draws import keyed, of_client
from peertune.recipe import Recipe
from peertune.rounds import best
from peertune.rounds.bounds import Bound
from peertune.rounds.clock import Pushing
from peertune.rounds.job import CLOCK, Job
from peertune.rounds.slices import of_rank
from peertune.rounds.training import Optim, Rates, adamw, learning_rate, sgd
from peertune.topology import Neighbourhood, digest
from peertune.types import ALONE, Group, Stack, State, Tensors, kind

CLIENTS_PER_PASS = 16
"""Clients that train at a time where the recipe leaves it open: gradients are held for these."""
PEER_KEEPS = {"every": 1, "keep": 6}
"""How a peer keeps checkpoints where the recipe leaves it open: it may have to fall back on one."""


@dataclass(frozen=True)
class Built:
    """A job with what its run directory says of it."""

    job: Job
    resolved: Recipe  # every default and everything automatic written out
    lora: LoraConfig  # what PEFT needs to load an adapter
    head: Mapping[str, Tensor]  # what travels with each adapter: the head, and what else the checkpoint lacks
    weights: Mapping[str, str]  # the digests of what the checkpoint brought
    asked: Mapping[str, Any]  # what the task asks of the base: its form, metric, words and templates
    labels: tuple[str, ...]  # names of the classes, by number
    held: list[list[int]]  # for each client, how many rows of each class it holds; where they are private, in all
    validation: list[int]  # how many rows of each class validate
    evaluated: list[int]  # and how many of each of these are evaluated
    tests: list[int]  # how many rows of each class are kept for `peertune score`; empty where there are none
    long: Mapping[str, int]  # for each split, how many rows were longer than `max_length`
    left_out: Mapping[str, int]  # and how many were left out since they lack a cell; neither of private rows
    private: Mapping[str, Any]  # what each client's local steps are held to; {} where rows aren't private

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What follows from the recipe: the graph's rho and T*, who holds what, numbers of parameters."""
        job = self.job
        sizes = [sum(x[0].numel() for x in tensors.values()) for _, tensors in job.state.stacks]
        plugins = from_outside(self.resolved)
        enemies = hostile(self.resolved)
        return ({"plugins": plugins} if plugins else {}) | {
            **({"hostile": enemies} if enemies else {}),
            "task": dict(self.asked),
            "graph": describe_graph(self.job.graph),
            "partition": {"labels": list(self.labels) or ["rows"], "rows": self.held},
            "validation": {"rows": sum(self.validation), "labels": self.validation if self.labels else []},
            "evaluated": {
                "rows": sum(self.evaluated),
                # of rows that each client has for itself, no class is the commonest of all
                "labels": self.evaluated if self.labels and self.resolved.evaluate.on != "own" else [],
            },
            **({"ranks": {"clients": [*job.ranks], "scaling": self.resolved.lora.scaling}} if job.ranks else {}),
            **({"test": {"rows": sum(self.tests), "labels": self.tests if self.labels else []}} if self.tests else {}),
            **({"privacy": dict(self.private)} if self.private else {}),
            "long_rows": dict(self.long),
            "missing_cells": dict(self.left_out),
            "parameters": {
                "base": self.job.model.base.num_parameters(),  # type: ignore[operator]  # knows of 4 bits, too
                "adapter": max(sizes),  # of the highest rank
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
    secret: Callable[[], bytes] = of_simulations,
) -> Built:
    """Make everything that a run needs, in the order in which mistakes are cheapest to find.

    For these `clients`: all, a process's share of them in a `group`, or one, a peer. With `own_data` all rows of the
    task are its own, and not dealt out by the recipe's partition. Where a peer's neighbourhood in the graph is `known`,
    the graph is not made. A `planned` run has a base without weights: all of it is on the meta device, and the device
    that it is for need not be there. `secret` returns that of a peer, or of a simulation, from which those of its
    clients follow; it is asked for where the recipe's local steps are private.
    """
    parts = build_parts(recipe, clients, own_data, known=known, group=group)
    loaded = load(recipe, parts.task, planned=planned)
    private = own_data or (clients is not None and group.size == 1)
    return _put_together(recipe, parts, loaded, encode(recipe, parts, loaded.base, private=private), secret)


def build_stack(recipes: Mapping[str, Recipe]) -> dict[str, Built | Exception]:
    """Make several runs over one base and one set of rows, by name; or return why one can't be made.

    The recipes differ in no key by which the base, the task's rows or the shape of adapters do (`peertune.sweeps`).
    Raises what `build` raises where it is so for all, and ModelError where a layer that is drawn from the seed can't
    be each run's own.
    """
    (first, *_) = recipes.values()
    task = build_task(first)
    chosen = {name: tried(partial(build_parts, recipe, task=task)) for name, recipe in recipes.items()}
    rows = [chain(one.rows.values(), one.held_out.values()) for one in chosen.values() if isinstance(one, Parts)]
    several = len({recipe.seed for recipe in recipes.values()}) > 1
    loaded = load(first, task, by_run=several)
    splits = encode_splits(first, task, loaded.base, chain(*rows)) if rows else None

    def made(name: str) -> Built:
        recipe, parts = recipes[name], chosen[name]
        if isinstance(parts, Exception):
            raise parts
        own = of_run(loaded, recipe) if several else loaded
        shared = None if parts.twins else splits  # rows that an attack has changed are a run's own
        return _put_together(recipe, parts, own, encode(recipe, parts, own.base, shared), of_simulations)

    return {name: tried(partial(made, name)) for name in recipes}


def _put_together(
    recipe: Recipe, parts: Parts, loaded: Loaded, encoded: EncodedTask, secret: Callable[[], bytes]
) -> Built:
    """Put together what an engine runs, and what is said of it; what is withheld of private rows is left out here."""
    resolved, task = _resolve(recipe, parts, loaded), parts.task
    held = label_counts(task, task.train, list(encoded.held.values()))
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    if recipe.privacy is not None:
        held = [[sum(counts)] for counts in held]
        del splits["train"]
    job = _job(resolved, parts, loaded, encoded, _secrets(parts, secret) if recipe.privacy else {})
    return Built(
        job,
        resolved,
        loaded.lora,
        loaded.base.head,
        loaded.base.weights,
        {"form": task.form, "metric": task.metric, "of": task.of, "words": task.words, "templates": task.templates},
        task.classes,
        held=list(chain(*parts.group.gather(held))),
        validation=label_counts(task, task.validation, [encoded.validating])[0],
        evaluated=_evaluated(recipe, parts, encoded),
        tests=[] if task.test is None else label_counts(task, task.test, [np.arange(len(task.test))])[0],
        long={use: count for use, count in encoded.long.items() if use in splits},
        left_out={use: split.left_out for use, split in splits.items() if split is not None},
        private=_told_private(job.private, job.rounds, parts.group),
    )


def _told_private(private: Private | None, rounds: int, group: Group) -> dict[str, Any]:
    """Return what is said of all clients' private steps in so many rounds; epsilon is that at their end."""
    if private is None:
        return {}
    steps = rounds * private.per_round
    own = [
        {
            "client": client,
            **allowed._asdict(),
            "epsilon": spent(private, [client], [allowed.of(steps)])[0],
        }
        for client, allowed in sorted(private.allowances.items())
    ]
    told = {"unit": private.unit, "delta": private.delta, "per_round": private.per_round}
    return told | {"clients": [*chain(*group.gather(own))]}


def _secrets(parts: Parts, secret: Callable[[], bytes]) -> dict[int, bytes]:
    """Return the secret of each client here. Raises RecipeError where processes of a run would not have the same."""
    found = secret()
    if len({*parts.group.gather(keyed(found, "compared").hex())}) > 1:
        raise RecipeError("privacy: the processes have different secrets; give all one file in PEERTUNE_SECRET")
    return {client: found if parts.peer else of_client(found, client) for client in parts.clients}


def _evaluated(recipe: Recipe, parts: Parts, encoded: EncodedTask) -> list[int]:
    """Return how many rows of each class the clients' scores are of."""
    if recipe.evaluate.on != "own":
        return label_counts(parts.task, parts.task.validation, [encoded.evaluated])[0]
    held_out = label_counts(parts.task, parts.task.train, list(encoded.held_out.values()))
    return [sum(counts) for counts in zip(*chain(*parts.group.gather(held_out)), strict=True)]


def _job(recipe: Recipe, parts: Parts, loaded: Loaded, encoded: EncodedTask, secrets: Mapping[int, bytes]) -> Job:
    """Put together what an engine runs, of a recipe that is resolved."""
    private = None if loaded.planned else private_of(recipe, encoded.held)  # a plan has no rows to keep private
    own = owned(recipe, encoded, loaded.base.weights, secrets) if private else {}
    if private is not None:
        private = private._replace(marks={client: keyed(one.secret, "mark", one.told) for client, one in own.items()})
        parts = parts._replace(algorithm=privately(parts.algorithm, private, own))
    optim = build_optim(recipe)
    state = _start(recipe, parts, loaded, optim)  # first, since the base may get another head
    model, algorithm, training = loaded.model, parts.algorithm, recipe.training
    bound = None
    if recipe.network.bound and not loaded.planned:
        bound = Bound(frozen_norms(model), algorithm.message.sound)
    twins = chain(*encoded.twins.values())
    steps = TrainingSteps(
        encoded.train,
        encoded.held,
        rows_per_step=training.per_device_train_batch_size,
        local_steps=training.local_steps,
        tokens=loaded.tokens,
        clients_together=clients_together(recipe),
        packed=loaded.packed,
        seed=recipe.seed,
        row_weights=row_weights(recipe, parts.task, [*encoded.held.values(), *(x.rows for x in twins)]),
        twins=encoded.twins,
        drawings=drawings(private, own) if private and private.unit == "record" else {},
    )
    return Job(
        model=model,
        graph=parts.graph,
        algorithm=algorithm,
        optim=optim,
        steps=steps,
        evaluate=build_evaluation(recipe, parts.task, loaded, encoded, parts.group, peer=parts.peer),
        judge_own=_judge_own(recipe, parts, loaded, encoded) if recipe.evaluate.mixing else None,
        ensembles=build_ensembles(recipe, parts.task, loaded, encoded, peer=parts.peer),
        state=state,
        clients=parts.clients,
        rounds=recipe.rounds,
        local_steps=training.local_steps,
        evaluate_every=recipe.evaluate.every,
        clients_per_pass=training.clients_per_pass or CLIENTS_PER_PASS,
        bound=bound,
        private=private,
        clock=parts.clock,
        pushing=_pushing(recipe),
        ranks=parts.ranks if len(set(parts.ranks)) > 1 else (),
        faults=parts.faults,
        group=parts.group,
    )


def _pushing(recipe: Recipe) -> Pushing | None:
    """Return how clients mix that wait for nobody, or None where they go by rounds."""
    time = recipe.time
    if time.mode == "rounds":
        return None
    return Pushing(time.staleness_exponent, time.phases == "common", time.mixing == "pairwise")


def _judge_own(
    recipe: Recipe, parts: Parts, loaded: Loaded, encoded: EncodedTask
) -> Callable[[Sequence[Stack], Sequence[int]], list[float]]:
    """Return what scores clients' adapters on the rows that their clients hold out: as evaluation on these alone."""
    alone = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"on": "own", "ensemble": False})})
    judge = build_evaluation(alone, parts.task, loaded, encoded, parts.group, peer=parts.peer)
    return lambda adapters, clients: judge(adapters, clients).own


def _start(recipe: Recipe, parts: Parts, loaded: Loaded, optim: Optim) -> State:
    """Return the state in which the clients begin: of a cohort for each rank, lowest first."""
    if not parts.ranks:
        return _cohort(recipe, parts, loaded, optim, parts.clients)
    own = torch.tensor([parts.ranks[client] for client in parts.clients])
    return State.together(
        [
            (rows, _cohort(recipe, parts, loaded, optim, [parts.clients[row] for row in rows.tolist()], rank))
            for rank in own.unique().tolist()
            for rows in [(own == rank).nonzero()[:, 0]]
        ]
    )


def _cohort(
    recipe: Recipe, parts: Parts, loaded: Loaded, optim: Optim, clients: Sequence[int], rank: int | None = None
) -> State:
    """Return the state in which clients of one rank begin, where ranks differ of this one."""
    gaussian = recipe.lora.init_lora_weights == "gaussian"
    adapters = init_adapters(loaded.model, len(clients), recipe.seed, gaussian=gaussian, r=rank)
    if recipe.lora.init is not None:
        adapters |= begun_with(recipe, parts.task, loaded, adapters)
    rounds = torch.zeros(len(clients), dtype=torch.int64)
    memory = parts.algorithm.init(adapters, standing(clients, rounds))
    memory |= best.begun(adapters) if recipe.evaluate.load_best else {}
    memory |= {CLOCK: torch.zeros_like(rounds)} if parts.clock is not None and _pushing(recipe) is None else {}
    memory = {name: x.to(loaded.base.model.device) for name, x in memory.items()}
    return State(adapters, optim.optimizer.init(adapters), rounds, memory)


def agreed(run: Built) -> dict[str, str]:
    """Return what must be the same at all peers of a run: name → value, or digest of what is long.

    What has its default is left out, so that two versions, of which one lacks a setting, agree where it changes
    nothing. The base's weights count as they are in bfloat16, so that peers may hold them in different precision.
    """
    recipe, job = run.resolved, run.job

    def short(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 200 else f"{text[:150]}… {sha256(text.encode()).hexdigest()[:16]}"

    graph = beyond_defaults("graph", recipe.graph)
    lora = recipe.lora.model_dump(exclude={"lora_dropout", "init"}, exclude_defaults=True)
    if "row_counts" in graph:  # as many as clients
        graph["row_counts"] = short(graph["row_counts"])
    long = ("rank_pattern", "alpha_pattern", "ranks")  # the order of their keys counts
    lora |= {key: short(lora[key]) for key in long if key in lora}
    return {
        "adapters": _shapes(_of_all(job)),
        "algorithm": json.dumps(beyond_defaults("algorithm", recipe.algorithm), sort_keys=True),
        "base": weights.digest(job.model.base.state_dict()),
        "clients": str(recipe.clients),
        "edges": digest(job.graph),
        "graph": json.dumps(graph, sort_keys=True),
        "labels": short(run.labels),
        "lora": json.dumps(lora, sort_keys=True),
        "rounds": str(recipe.rounds),
        "seed": str(recipe.seed),
        "task": short({part: run.asked[part] for part in ("form", "words", "templates", "of") if run.asked[part]}),
    } | _unusual(run)


def _unusual(run: Built) -> dict[str, str]:
    """Return what peers must agree on where it isn't as in every run: bound, modifiers, other code, what travels."""
    recipe, job = run.resolved, run.job
    found = {} if recipe.network.bound else {"bound": "off"}
    if job.pushing is not None:
        found["time"] = f"asynchronous, staleness_exponent {job.pushing.staleness_exponent:g}"
    begun = job.model.taken  # a layer without it is the same for either sign of its vectors
    if recipe.lora.init is not None:
        begun = {name: x[0] for name, x in job.state.adapters.items()}
    if begun:
        start = sha256()
        for name, x in sorted(begun.items()):
            start.update(name.encode() + x.float().cpu().contiguous().numpy().data)
        found["start"] = start.hexdigest()[:16]
    if recipe.modifiers:
        changed = [beyond_defaults("modifiers", choice) for choice in recipe.modifiers]
        found["modifiers"] = json.dumps(changed, sort_keys=True)
    if plugins := from_outside(recipe, "algorithm", "graph", "modifiers"):
        found["plugins"] = json.dumps(plugins, sort_keys=True)
    lowest = job.ranks.index(min(job.ranks)) if job.ranks else -1
    if (sent := _shapes(job.sent(frozenset(map(kind, job.state.adapters)), lowest))) != _shapes(_of_all(job)):
        found["message"] = sent
    return found


def _of_all(job: Job) -> Tensors:
    """Return adapters `[K, …]` of the shapes that all peers know alike: where ranks differ, of the lowest."""
    return of_rank(job.state.adapters, min(job.ranks)) if job.ranks else job.state.adapters


def _shapes(tensors: Tensors) -> str:
    """Return a digest of names, shapes of one client and types."""
    described = {name: [*x.shape[1:], str(x.dtype)] for name, x in tensors.items()}
    return sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def build_optim(recipe: Recipe) -> Optim:
    """Make the recipe's optimiser and schedule."""
    t = recipe.training
    if t.optim == "adamw":
        optimizer = adamw(t.adam_beta1, t.adam_beta2, t.adam_epsilon, t.weight_decay)
    else:
        optimizer = sgd(t.momentum, t.weight_decay)
    within = t.lr_scheduler_span == "round"
    span = t.local_steps if within else recipe.rounds * t.local_steps
    least = t.lr_scheduler_kwargs.min_lr or (t.lr_scheduler_kwargs.min_lr_rate or 0.0) * t.learning_rate
    rate = learning_rate(t.lr_scheduler_type, t.learning_rate, t.warmup(span), span, least)

    def rates(step: int) -> Rates:
        now = rate(step % span if within else step)
        return {"A": now, "B": now * t.loraplus_lr_ratio, "head": now}

    return Optim(optimizer, rates, t.max_grad_norm, t.reset_optimizer, t.label_smoothing_factor)


def _resolve(recipe: Recipe, parts: Parts, loaded: Loaded) -> Recipe:
    """Write out all defaults, and what everything automatic came to."""
    revision, keeps = recipe.model.revision or loaded.base.revision, PEER_KEEPS if parts.peer else {}
    left_open = {key: value for key, value in keeps.items() if key not in recipe.checkpoint.model_fields_set}
    here, asked = len(parts.clients) if parts.peer else recipe.clients, recipe.training.clients_per_pass
    training: dict[str, float] = {
        "tokens_per_pass": loaded.tokens,
        "clients_per_pass": min(here, asked or CLIENTS_PER_PASS),
    }
    if recipe.privacy and recipe.privacy.unit == "record":
        training |= {"max_grad_norm": 0.0}  # rows' gradients are cut, and nothing after the noise
    lora = {"ranks": [*parts.ranks]} if parts.ranks else {}  # as they were dealt
    return recipe.model_copy(
        update={
            **resolved_choices(recipe, parts.algorithm),
            "model": recipe.model.model_copy(
                update={"dtype": str(loaded.dtype).removeprefix("torch."), "revision": revision}
            ),
            "lora": recipe.lora.model_copy(update=lora),
            "training": recipe.training.model_copy(update=training),
            "checkpoint": recipe.checkpoint.model_copy(update=left_open),
            "device": str(loaded.device),
        }
    )
