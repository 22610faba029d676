"""One round: local steps, exchange, mix. Every engine runs this and nothing else; only `exchange` differs."""

import ctypes
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from scipy.sparse import csr_array
from torch import Tensor

from peertune import metrics
from peertune.adapters.stacked import StackedModel
from peertune.topology import Fault, Graph, clients_down
from peertune.training import Optim, Trained, reset_moments, train_local
from peertune.types import (
    ALONE,
    Algorithm,
    Batch,
    Evaluation,
    Group,
    Phase,
    RoundRecord,
    State,
    Tensors,
    by_site,
    select,
)


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
    clients: Sequence[int]  # [K], whose state it is: all of the graph's, a process's share of them, or a peer
    rounds: int
    local_steps: int
    evaluate_every: int
    clients_per_pass: int
    faults: Sequence[Fault] = ()
    group: Group = ALONE  # the processes that share the clients

    @property
    def alone(self) -> bool:
        """Whether this is a client without the others, a peer: it takes two to disagree."""
        return self.group.size == 1 == len(self.clients) < self.graph.clients

    @property
    def device(self) -> torch.device:
        """Where the base and the stack are."""
        return next(iter(self.state.adapters.values())).device


def run_rounds(job: Job, exchange: Callable[[Sequence[int], Tensors, int], Heard]) -> Iterator[RoundRecord]:
    """Run the rounds that are left for the job's clients and yield a record after each, with the state that it left.

    `exchange` is told which of them take part. Those that are down by the job's faults keep what they have.
    """
    state = job.state.clone()
    while state.round < job.rounds:
        down = clients_down(job.faults, state.round)
        if down.isdisjoint(job.clients):
            state, record = run_round(job, state, job.clients, partial(exchange, job.clients))
            yield record
            continue
        places = [place for place, client in enumerate(job.clients) if client not in down]
        up, rows = [job.clients[place] for place in places], torch.tensor(places, dtype=torch.int64, device=job.device)
        part, record = run_round(job, state.take(rows), up, partial(exchange, up))
        state.put(rows, part)
        state = replace(state, round=part.round)
        yield replace(record, state=state)


def run_round(job: Job, state: State, clients: Sequence[int], exchange: Exchange) -> tuple[State, RoundRecord]:
    """Run one round for the K `clients` of `state`, **in place**, evaluate where it is due, and say what was done.

    Mixing goes from site to site, so that beside the stack only one site's new factors are held. The neighbourhoods'
    cross terms are measured in evaluated rounds only: on a dense graph of many clients they cost more than mixing.
    """
    due = (state.round + 1) % job.evaluate_every == 0 or state.round + 1 == job.rounds
    algorithm = job.algorithm
    started = time.perf_counter()
    phases = algorithm.phases(state.signals, state.round, state.clients)
    phase = _common(job, phases, state.round)
    loss, grad_norm = _train(job, state, clients, phases)
    trained = time.perf_counter()
    payload = select(state.adapters, phase.send)
    heard, weights, senders, failed = exchange(payload | state.signals, state.round)
    exchanged = time.perf_counter()
    before = metrics.before_mixing(payload, job.group)
    cross_terms = None
    if due:
        cross_terms = metrics.neighbourhood_cross_terms({name: heard[name] for name in payload}, weights)
    measured = time.perf_counter()
    for own in by_site(state.adapters):
        mixed = algorithm.mix(own, {name: heard[name] for name in own if name in heard}, weights, phase)
        for name, x in own.items():
            if mixed[name] is not x:
                x.copy_(mixed[name])
    signals = state.signals
    if algorithm.agreement is not None:
        signals = algorithm.agreement.step(signals, {name: heard[name] for name in signals}, weights, state.round)
    done = time.perf_counter()
    neighbours = metrics.neighbours(weights) if payload else [0] * len(loss)
    diagnostics = {} if job.alone else metrics.diagnostics(before, state.adapters, job.group)
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


def _common(job: Job, phases: list[Phase], round: int) -> Phase:
    """Return the phase that most clients of all processes are in; of several, the first client's."""
    if job.algorithm.agreement is None:
        return job.algorithm.phase(round)
    counts: Counter[Phase] = Counter()
    told = [[sorted(phase.train), sorted(phase.send), count] for phase, count in Counter(phases).items()]
    for train, send, count in chain(*job.group.gather(told)):
        counts[Phase(round, frozenset(train), frozenset(send))] += count
    return counts.most_common(1)[0][0]


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


DENSE_UP_TO = 64
"""Adapters heard up to which a dense mixing matrix is faster than a sparse one."""


def as_weights(matrix: csr_array, device: torch.device) -> Tensor:
    """Return rows of a mixing matrix `[R, H]` as mixers take them: dense where few are heard, sparse elsewhere."""
    if matrix.shape[1] <= DENSE_UP_TO:
        return torch.from_numpy(matrix.toarray()).to(device)
    places = torch.stack([torch.from_numpy(x).long() for x in matrix.tocoo().coords])
    weights = torch.sparse_coo_tensor(places, torch.from_numpy(matrix.data), matrix.shape, check_invariants=False)
    return weights.coalesce().to(device)


def _give_back_memory() -> None:
    """Have glibc return what it holds free: micro-batches of many sizes fragment it, by a gigabyte in 200 steps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
