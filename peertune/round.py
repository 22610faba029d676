"""One round: local steps, exchange, mix. Every engine runs this and nothing else; only `exchange` differs."""

import ctypes
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from peertune import metrics
from peertune.adapters.stacked import StackedModel
from peertune.topology import Fault, Graph
from peertune.training import Optim, Trained, reset_moments, train_local
from peertune.types import Algorithm, Batch, Evaluation, Phase, RoundRecord, State, Tensors, select


class Heard(NamedTuple):
    """What an exchange brought the K receivers."""

    tensors: Tensors  # [H, …], of the receivers themselves among them
    weights: Tensor  # [K, H], what each receiver takes of each that was heard
    clients: Sequence[int]  # [H], who was heard
    failed: list[tuple[int, int]]  # edges, i < j, that were active and over which nothing came, of the receivers'


Exchange = Callable[[Tensors, int], Heard]
"""`exchange(payload [K, …], round)`: the only thing in which engines differ."""


@dataclass(frozen=True)
class Job:
    """All that an engine needs to run a recipe; made by `build`."""

    model: StackedModel
    graph: Graph
    algorithm: Algorithm
    optim: Optim
    steps: Callable[[Sequence[int], int], Iterator[list[Batch]]]  # (clients, round) → micro-batches of each local step
    evaluate: Callable[[Tensors], Evaluation]
    state: State  # where the run starts
    clients: Sequence[int]  # [K], whose state it is: all of the graph's, or a peer
    rounds: int
    local_steps: int
    evaluate_every: int
    clients_per_pass: int
    faults: Sequence[Fault] = ()

    @property
    def device(self) -> torch.device:
        """Where the base and the stack are."""
        return next(iter(self.state.adapters.values())).device


def run_round(job: Job, state: State, clients: Sequence[int], exchange: Exchange) -> tuple[State, RoundRecord]:
    """Run one round for the K `clients` of `state`, **in place**, evaluate where it is due, and say what was done.

    Mixing goes from site to site, so that beside the stack only one site's new factors are held. The neighbourhoods'
    cross terms are measured in evaluated rounds only: on a dense graph of many clients they cost more than mixing.
    """
    due = (state.round + 1) % job.evaluate_every == 0 or state.round + 1 == job.rounds
    algorithm = job.algorithm
    started = time.perf_counter()
    phases = algorithm.phases(state.signals, state.round, state.clients)
    phase, _ = Counter(phases).most_common(1)[0]
    loss, grad_norm = _train(job, state, clients, phases)
    trained = time.perf_counter()
    payload = select(state.adapters, phase.send)
    heard, weights, senders, failed = exchange(payload | state.signals, state.round)
    exchanged = time.perf_counter()
    before = metrics.before_mixing(payload)
    cross_terms = None
    if due:
        cross_terms = metrics.neighbourhood_cross_terms({name: heard[name] for name in payload}, weights)
    measured = time.perf_counter()
    for own in _by_site(state.adapters):
        mixed = algorithm.mix(own, {name: heard[name] for name in own if name in heard}, weights, phase)
        for name, x in own.items():
            if mixed[name] is not x:
                x.copy_(mixed[name])
    signals = state.signals
    if algorithm.agreement is not None:
        signals = algorithm.agreement.step(signals, {name: heard[name] for name in signals}, weights, state.round)
    done = time.perf_counter()
    neighbours = metrics.neighbours(weights) if payload else [0] * len(loss)
    alone = len(clients) == 1 < job.graph.clients  # a peer: it takes two to disagree
    diagnostics = {} if alone else metrics.diagnostics(before, state.adapters)
    ended = time.perf_counter()
    seconds = {
        "train": trained - started,
        "exchange": exchanged - trained,
        "mix": done - measured,
        "metrics": ended - done + measured - exchanged,
    }
    evaluation = None
    if due:
        evaluation = job.evaluate(state.adapters)
        seconds["evaluate"] = time.perf_counter() - ended
    state = replace(state, round=state.round + 1, signals=signals)
    return state, RoundRecord(
        round=state.round - 1,
        train=sorted(phase.train),
        send=sorted(phase.send),
        clients=list(clients),
        loss=loss.tolist(),
        grad_norm=grad_norm.tolist(),
        bytes_sent=metrics.bytes_sent(payload | signals, neighbours),
        neighbours=neighbours,
        edges=metrics.edges(weights, clients, senders) if payload else [],
        failed_edges=failed if payload else [],
        out_of_phase=[client for client, own in zip(clients, phases, strict=True) if own != phase],
        neighbourhood_cross_term=cross_terms,
        diagnostics=diagnostics,
        seconds=seconds,
        evaluation=evaluation,
        state=state,
    )


def _train(job: Job, state: State, clients: Sequence[int], phases: list[Phase]) -> Trained:
    """Do the local steps of the K clients in place, a few at a time of those that are in one phase."""
    before = (
        job.algorithm.phases(state.signals, state.round - 1, len(clients)) if state.round else [None] * len(clients)
    )
    alike: dict[tuple[Phase, Phase | None], list[int]] = {}
    for row, pair in enumerate(zip(phases, before, strict=True)):
        alike.setdefault(pair, []).append(row)
    result = Trained(*torch.zeros(2, len(clients), dtype=torch.float64, device=job.device))
    for (phase, last), members in alike.items():
        for start in range(0, len(members), job.clients_per_pass):
            chunk = members[start : start + job.clients_per_pass]
            neighbouring = len(chunk) == chunk[-1] - chunk[0] + 1
            places = slice(chunk[0], chunk[-1] + 1) if neighbouring else torch.tensor(chunk, device=job.device)
            part = state.take(places)
            reset_moments(part.moments, job.optim.reset, phase, last)
            steps = job.steps([clients[row] for row in chunk], phase.round)
            trained = train_local(job.model, part, steps, phase, job.optim, phase.round * job.local_steps)
            if isinstance(places, Tensor):
                state.put(places, part)
            result.loss[places], result.grad_norm[places] = trained
            _give_back_memory()
    return result


def _give_back_memory() -> None:
    """Have glibc return what it holds free: micro-batches of many sizes fragment it, by a gigabyte in 200 steps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _by_site(adapters: Tensors) -> list[Tensors]:
    """Return the tensors that a mixer must see together: A and B of a site, each part of a head."""
    sites: dict[str, Tensors] = {}
    for name, x in adapters.items():
        sites.setdefault(name.rpartition(".")[0], {})[name] = x
    return list(sites.values())
