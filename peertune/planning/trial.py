"""What a run would take, by trying a little of it: time, memory and traffic."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, combinations, islice

import torch

from peertune.assembly.build import CLIENTS_PER_PASS, build
from peertune.assembly.registry import build_algorithm, build_graph
from peertune.errors import RecipeError
from peertune.method import standing
from peertune.recipe import Recipe
from peertune.rounds.job import Job
from peertune.rounds.training import train_local
from peertune.topology import active_edges
from peertune.types import kind, payload_bytes

STEPS = 3
"""Local steps that are tried; the first warms up."""
ROWS = 200
"""Validation rows that are tried."""


@dataclass(frozen=True)
class Trial:
    """What was measured with one base, task and batch size."""

    start_s: float  # to load everything
    step_s: float  # a local step, for each client
    evaluation_s: float  # one client's
    memory_bytes: int  # the most that was held while training some clients
    client_bytes: int  # what each client takes beyond that
    sent_bytes: Mapping[str, int]  # what a client sends to a neighbour, by the kinds that its phase sends: "A B"


@dataclass(frozen=True)
class Estimate:
    """What one run would take."""

    seconds: float
    memory_bytes: int
    sent_bytes: int  # by all clients together, in the whole run


def trial(recipe: Recipe) -> Trial:
    """Build the recipe and try a few steps and an evaluation. Its memory is this process's: use a fresh one."""
    started = time.perf_counter()
    rows = min(ROWS, recipe.evaluate.rows or ROWS)
    run = build(recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"rows": rows})}))
    job = run.job
    if job.ranks:
        raise RecipeError("lora.ranks: what clients of several ranks take is not foretold; try it with lora.r")
    loaded = time.perf_counter()
    clients = range(job.clients_per_pass)
    part = job.state.take(slice(0, len(clients))).clone()
    phase, at = job.algorithm.phase(0), standing(clients, part.rounds)
    taken = []
    for batches in islice(job.steps(clients, [0] * len(clients), 0, [b""] * len(clients)), STEPS):
        begun = time.perf_counter()
        train_local(job.model, part, [batches], phase, job.optim, at, job.algorithm.local)
        taken.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    one = part.take(slice(0, 1)).stacks
    seen = job.evaluate(one, job.clients[:1])  # the client and the average of one
    own = recipe.evaluate.on == "own"  # then on rows of its own, and no average
    evaluated = (time.perf_counter() - begun) / (1 if own else 2)
    if job.judge_own is not None:  # what it has, and what it hears, before mixing
        begun = time.perf_counter()
        job.judge_own(one, job.clients[:1])
        evaluated += 2 * (time.perf_counter() - begun)
    whole = seen.rows if own else min(recipe.evaluate.rows or sys.maxsize, sum(run.validation))
    return Trial(
        start_s=loaded - started,
        step_s=min(taken[1:] or taken) / len(clients),
        evaluation_s=evaluated * whole / seen.rows,
        memory_bytes=_peak_bytes(job.device),
        client_bytes=sum(map(payload_bytes, (job.state.adapters, job.state.moments, job.state.memory))),
        sent_bytes=_sent_bytes(job),
    )


def _sent_bytes(job: Job) -> dict[str, int]:
    """Return how large a client's message is, by the kinds that its phase sends."""
    kinds, found = sorted(set(map(kind, job.state.adapters))), {"": 0}
    edgewise = job.algorithm.message.edgewise
    for some in chain.from_iterable(combinations(kinds, size) for size in range(1, len(kinds) + 1)):
        sent = job.sent(frozenset(some))
        size = payload_bytes(sent) if edgewise is None else edgewise.packed_bytes(sent, job.state.memory)
        found[" ".join(some)] = size
    return found


def estimate(recipe: Recipe, measured: Trial) -> Estimate:
    """Say what a run takes that has the same base, task, batches and clients as the one that was tried.

    Traffic is exact, up to edges that fail; memory and time are of this machine, and leave out mixing and what is
    measured of it, which is little but for `decaf` and for dense graphs of hundreds of clients.
    """
    graph = build_graph(recipe)
    algorithm = build_algorithm(recipe, graph)
    sent, kinds = 0, {kind for some in measured.sent_bytes for kind in some.split()}
    evaluations, judged = -(-recipe.rounds // recipe.evaluate.every), 0
    for t in range(recipe.rounds):
        some = algorithm.phase(t).send & kinds
        messages = (1 if graph.directed else 2) * len(active_edges(graph, t)) if some else 0
        sent += messages * measured.sent_bytes[" ".join(sorted(some))]
        if recipe.evaluate.ensemble and ((t + 1) % recipe.evaluate.every == 0 or t + 1 == recipe.rounds):
            judged += recipe.clients + (messages if some < kinds else 0)
    steps = recipe.rounds * recipe.training.local_steps
    clients_per_pass = min(recipe.clients, recipe.training.clients_per_pass or CLIENTS_PER_PASS)
    return Estimate(
        seconds=measured.start_s
        + steps * recipe.clients * measured.step_s
        + (evaluations * (recipe.clients + 1) + judged) * measured.evaluation_s,
        memory_bytes=measured.memory_bytes + (recipe.clients - clients_per_pass) * measured.client_bytes,
        sent_bytes=sent,
    )


def cost_key(recipe: Recipe) -> str:
    """Return what a trial depends on: runs with the same key need only one."""
    values = recipe.model_dump(mode="json", exclude={"graph", "partition", "rounds", "seed", "checkpoint", "report_to"})
    method = recipe.algorithm
    values["algorithm"] = method.name, method.settings.get("switch_every") == "adaptive"  # what trains and travels
    values["evaluate"] = [
        values["evaluate"][key] for key in ("rows", "fold", "on", "held_out", "set_aside", "ensemble", "mixing")
    ]
    if recipe.evaluate.on != "common":
        values["partition"] = recipe.partition.model_dump(mode="json")  # how many rows a client holds out
    for free in (
        "learning_rate",
        "loraplus_lr_ratio",
        "local_steps",
        "weight_decay",
        "max_grad_norm",
        "lr_scheduler_type",
        "lr_scheduler_span",
        "warmup_steps",
    ):
        del values["training"][free]
    return str(values)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
