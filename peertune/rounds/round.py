"""One round: local steps, exchange, mix. Every engine runs this and nothing else; only `exchange` differs."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from peertune.adapters.stacked import StackedModel
from peertune.allowance import Lines
from peertune.errors import DivergedError
from peertune.memory import give_back_free
from peertune.rounds import bounds, metrics
from peertune.rounds.bounds import Bound, Refusal
from peertune.rounds.record import Evaluation, RoundRecord
from peertune.rounds.training import Optim, Trained, reset_moments, train_local
from peertune.topology import Fault, Graph, clients_down, drop_edges, planned_weights
from peertune.types import ALONE, Algorithm, Batch, Group, Phase, State, Tensors, by_site, select


class Heard(NamedTuple):
    """What an exchange brought the K receivers."""

    tensors: Tensors  # [H, …], of the receivers themselves among them
    weights: Tensor  # [K, H], what each receiver takes of each that was heard
    clients: Sequence[int]  # [H], who was heard
    failed: list[tuple[int, int]]  # edges, i < j, that were active and over which nothing came, of the receivers'
    vacant: Sequence[tuple[int, int]] = ()  # and those at whose other end there is nobody


Refuse = Callable[[Tensors, Tensor, Tensor], list[Refusal]]
"""`refuse(heard [H, …], receivers [E], senders [E])`: which of these pairs can't be mixed, by the receivers' state."""
Exchange = Callable[[Tensors, int, Refuse], Heard]
"""`exchange(payload [K, …], round, refuse)`: the only thing in which engines differ.

What an end refuses counts at neither.
"""


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
    bound: Bound | None = None  # what may be mixed; None: everything
    most_loss: float = inf  # training to a mean loss above it counts as diverged
    faults: Sequence[Fault] = ()
    group: Group = ALONE  # the processes that share the clients
    lines: Lines = field(default_factory=Lines, compare=False)  # what is logged of clients

    @property
    def alone(self) -> bool:
        """Whether this is a client without the others, a peer: it takes two to disagree."""
        return self.group.size == 1 == len(self.clients) < self.graph.clients

    @property
    def device(self) -> torch.device:
        """Where the base and the stack are."""
        return next(iter(self.state.adapters.values())).device


def run_rounds(job: Job, exchange: Callable[[Sequence[int], Tensors, int, Refuse], Heard]) -> Iterator[RoundRecord]:
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

    It trains, exchanges, mixes, and measures what was sent and what came of it. The neighbourhoods' cross terms are
    measured in evaluated rounds only: on a dense graph of many clients they cost more than mixing.

    Raises DivergedError, before anything is sent, where training diverged; `state` then is of no more use.
    """
    due = (state.round + 1) % job.evaluate_every == 0 or state.round + 1 == job.rounds
    watch = _Watch()
    phases = job.algorithm.phases(state.signals, state.round, state.clients)
    phase = _common(job, phases, state.round)
    trained = _train(job, state, clients, phases)
    watch.lap("train")
    payload = select(state.adapters, phase.send)
    came = exchange(payload | state.signals, state.round, _refusing(job, state))
    watch.lap("exchange")
    weights, unmixed = _mixable(job, state, clients, came)
    watch.lap("mix")
    cross_terms = metrics.neighbourhood_cross_terms(select(came.tensors, phase.send), weights) if due else None
    before = None if job.alone else metrics.before_mixing(payload, job.group)
    watch.lap("metrics")
    state = _mix(job, state, came.tensors, weights, phase)
    watch.lap("mix")
    neighbours = metrics.neighbours(came.weights) if payload else [0] * state.clients
    diagnostics = {} if before is None else metrics.diagnostics(before, state.adapters, job.group)
    watch.lap("metrics")
    evaluation = None
    if due:
        evaluation = job.evaluate(state.adapters)
        watch.lap("evaluate")
    return state, RoundRecord(
        round=state.round - 1,
        train=sorted(phase.train),
        send=sorted(phase.send),
        clients=list(clients),
        loss=trained.loss.tolist(),
        grad_norm=trained.grad_norm.tolist(),
        bytes_sent=metrics.bytes_sent(payload | state.signals, neighbours),
        neighbours=neighbours,
        edges=metrics.edges(came.weights, clients, came.clients) if payload else [],
        failed_edges=came.failed if payload else [],
        vacant_edges=list(came.vacant) if payload else [],
        not_mixed=unmixed,
        out_of_phase=[client for client, own in zip(clients, phases, strict=True) if own != phase],
        neighbourhood_cross_term=cross_terms,
        diagnostics=diagnostics,
        seconds=watch.seconds,
        evaluation=evaluation,
        state=state,
    )


class _Watch:
    """Adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as this stage's."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def exchanged(
    job: Job, clients: Sequence[int], among: Sequence[int], tensors: Tensors, round: int, refuse: Refuse
) -> Heard:
    """Return what an exchange brought the K `clients`: `tensors [H, …]` of those `among` whom all are whom they hear.

    An edge that one end refuses is dropped from the mixing matrix like one that is planned to fail, at both ends.
    """
    matrix, failed = planned_weights(job.graph, job.faults, round)
    ours, theirs = np.asarray(clients), np.asarray(among)
    rows = matrix if len(ours) == job.graph.clients else matrix[ours]
    entries = rows.tocoo()
    receivers, senders = entries.row, np.searchsorted(theirs, entries.col)
    others = (ours[receivers] != entries.col) & (entries.data != 0)
    places = (torch.from_numpy(x[others]).long().to(job.device) for x in (receivers, senders))
    found = refuse(tensors, *places) if tensors else []
    _tell(job, round, found, clients, among, "the edge is dropped")
    pairs = [(clients[refusal.receiver], among[refusal.sender]) for refusal in found]
    told = chain(*job.group.gather(sorted({(min(pair), max(pair)) for pair in pairs})))
    if lost := sorted({(i, j) for i, j in told}):
        matrix, failed = drop_edges(matrix, lost), sorted({*failed, *lost})
        rows = matrix[ours]
    if len(theirs) < job.graph.clients:
        rows = rows[:, theirs]
    if job.group.size > 1:
        failed = [edge for edge in failed if not set(edge).isdisjoint(clients)]
    return Heard(tensors, as_weights(rows, job.device), among, failed)


def _tell(
    job: Job, round: int, refusals: Sequence[Refusal], clients: Sequence[int], among: Sequence[int], so: str
) -> None:
    """Say what was refused of whom."""
    for receiver, sender, why in refusals:
        to = job.lines.name(clients[receiver])
        job.lines.say(among[sender], f"round {round}: what it sent {to} isn't mixed: {why}; {so}")


def _refusing(job: Job, state: State) -> Refuse:
    """Return what refuses to mix, by the state that the receivers have."""
    if job.bound is None:
        return lambda heard, receivers, senders: []
    return partial(bounds.refused, job.bound, state.adapters)


def _mixable(job: Job, state: State, clients: Sequence[int], came: Heard) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the weights of what is mixed, and the pairs (receiver, sender) that counted and are left out.

    Their weight returns to the receiver's own adapter, at this end only.
    """
    weights = came.weights
    if job.bound is None or not came.tensors:
        return weights, []
    receivers, places, _ = metrics.entries(weights)
    ours, theirs = (torch.tensor(numbers, device=weights.device) for numbers in (clients, came.clients))
    others = ours[receivers] != theirs[places]
    found = bounds.apart(job.bound, state.adapters, came.tensors, receivers[others], places[others])
    if not found:
        return weights, []
    _tell(job, state.round, found, clients, came.clients, "the edge counts, and this end mixes nothing of it")
    dense = weights.to_dense().clone()
    rows, columns = (torch.tensor(x, device=weights.device) for x in zip(*(pair[:2] for pair in found), strict=True))
    own = torch.searchsorted(theirs, ours[rows])
    dense.index_put_((rows, own), dense[rows, columns], accumulate=True)
    dense[rows, columns] = 0
    pairs = sorted((clients[receiver], came.clients[sender]) for receiver, sender, _ in found)
    return (dense.to_sparse() if weights.is_sparse else dense), pairs


def _mix(job: Job, state: State, heard: Tensors, weights: Tensor, phase: Phase) -> State:
    """Mix what was heard into the adapters, **in place**, and return the state of the next round.

    It goes from site to site, so that beside the stack only one site's new factors are held.
    """
    for own in by_site(state.adapters):
        mixed = job.algorithm.mix(own, {name: heard[name] for name in own if name in heard}, weights, phase)
        for name, x in own.items():
            if mixed[name] is not x:
                x.copy_(mixed[name])
    signals, agreement = state.signals, job.algorithm.agreement
    if agreement is not None:
        signals = agreement.step(signals, {name: heard[name] for name in signals}, weights, state.round)
    return replace(state, round=state.round + 1, signals=signals)


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
            give_back_free()
    if bool((result.loss > job.most_loss).any()):
        raise DivergedError(f"training: the loss is {float(result.loss.max()):.3g} in round {state.round}")
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
