"""One round: local steps, exchange, mix. Every engine runs this and nothing else; only `exchange` differs.

Where what is read is not exactly what a sender has, such as adapters in half precision, a client mixes differences,
`x_i + (m_i - Q(x_i))`: m_i is what the mixer makes of Q(x_i), its own adapter as others read it, and of what it heard.
For gossip this is `x_i + Σ_j W_ij (Q(x_j) - Q(x_i))`: with symmetric W the clients' mean stays what it was, up to
rounding, and a client that hears nobody keeps its adapter. Rounded others beside an exact own would move the mean.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from peertune.adapters.stacked import StackedModel
from peertune.allowance import Lines
from peertune.errors import DivergedError, tried
from peertune.method import Algorithm, At, Phase, nothing, standing
from peertune.rounds import best, bounds, deadline, metrics
from peertune.rounds.bounds import Bound, Refusal
from peertune.rounds.clock import Clock, Pushing, Span, lockstep
from peertune.rounds.record import Evaluation, RoundRecord, Watch
from peertune.rounds.shares import as_weights, entries, giving_back, without_site
from peertune.rounds.training import Optim
from peertune.rounds.turns import Came, Steps, Turn, train
from peertune.topology import Fault, Graph, clients_down, delay_s, drop_edges, messages_sent, planned_weights
from peertune.types import ALONE, Group, State, Tensors, by_site, select


class Heard(NamedTuple):
    """What an exchange brought the K receivers."""

    tensors: Tensors  # [H, …], as they are read; of the receivers themselves among them
    weights: Tensor  # [K, H], what each receiver takes of each that was heard
    clients: Sequence[int]  # [H], who was heard
    failed: list[tuple[int, int]]  # edges, as records have them, that were active and over which nothing came
    vacant: Sequence[tuple[int, int]] = ()  # and those at whose other end there is nobody
    sent: Sequence[int] | None = None  # [K], to how many each sends, where that is not as many as it hears


Refuse = Callable[[Tensors, Tensor, Tensor], list[Refusal]]
"""`refuse(heard [H, …], receivers [E], senders [E])`: which of these pairs can't be mixed, by the receivers' state."""
Exchange = Callable[[Tensors, int, Refuse], Heard]
"""`exchange(payload [K, …], round, refuse)`: the only thing in which engines differ. `refuse` takes what was read.

What an end refuses counts at neither.
"""


class Pausing(NamedTuple):
    """How often the state within a round is kept, and by whom."""

    every: int  # local steps, counted from the run's start
    keep: Callable[[State], object]  # is told the state of all of a job's clients

    def after(self, round: int, local_steps: int) -> range:
        """Return after how many steps within this round."""
        return range(-round * local_steps % self.every or self.every, local_steps, self.every)


@dataclass(frozen=True)
class Job:
    """All that an engine needs to run a recipe; made by `build`."""

    model: StackedModel
    graph: Graph
    algorithm: Algorithm
    optim: Optim
    steps: Steps
    evaluate: Callable[[Tensors, Sequence[int]], Evaluation]  # of adapters [K, …] and whose they are
    state: State  # where the run starts
    clients: Sequence[int]  # [K], whose state it is: all of the graph's, a process's share of them, or a peer
    rounds: int
    local_steps: int
    evaluate_every: int
    clients_per_pass: int
    bound: Bound | None = None  # what may be mixed; None: everything
    # of the clients of some adapters [K, …], each with those it heard in a round: by metric, scores [K]
    ensembles: "Callable[[Tensors, Heard, Sequence[int]], list[list[float]]] | None" = None
    # of some adapters [K, …] and whose they are: each one's score on its client's own rows [K]; None: nobody asks
    judge_own: "Callable[[Tensors, Sequence[int]], list[float]] | None" = None
    most_loss: float = inf  # training to a mean loss above it counts as diverged
    clock: Clock | None = None  # how long things take in virtual time; None: nothing has a time
    pushing: Pushing | None = None  # how clients mix that wait for nobody; None: they go by rounds
    pausing: Pausing | None = None  # None: what is kept is kept between rounds
    faults: Sequence[Fault] = ()
    group: Group = ALONE  # the processes that share the clients
    lines: Lines = field(default_factory=Lines, compare=False)  # what is logged of clients

    @property
    def alone(self) -> bool:
        """Whether this is a client without the others, a peer: it takes two to disagree."""
        return self.group.size == 1 == len(self.clients) < self.graph.clients

    def sent(self, kinds: frozenset[str]) -> Tensors:
        """Return what its first client sends at the start, `[1, …]`, in a phase that trains and sends these kinds."""
        one = self.state.take(slice(0, 1))
        at = standing(self.clients[:1], one.rounds)
        return self.algorithm.message.send(one.adapters, one.known, at, Phase(kinds, kinds))[0]

    def read(self, tensors: Tensors, round: int) -> Tensors:
        """Return what was sent in a round as mixers get it, `[H, …]` both."""
        read = self.algorithm.message.read
        return tensors if read is None else read(self.state.adapters, tensors, round)

    @property
    def sites(self) -> int:
        """How many there are, parts of a head among them."""
        return len(by_site(self.state.adapters))

    def reached(self, clients: Sequence[int], rounds: Sequence[int]) -> Tensor | None:
        """Return the number of sites that each local step of these clients reaches until the deadline, `[K, S]`."""
        return deadline.reached(self.clock, clients, rounds, self.local_steps, self.sites)

    @property
    def device(self) -> torch.device:
        """Where the base and the stack are."""
        return next(iter(self.state.adapters.values())).device


CLOCK = "clock.now"
"""What each client's memory holds of virtual time: the nanosecond in which its next round begins, `[K]`."""

ExchangeOf = Callable[[Sequence[int], Tensors, int, Refuse], Heard]
"""`exchange(clients, payload, round, refuse)`: an exchange that is told which of a job's clients take part."""


def run_rounds(job: Job, exchange: ExchangeOf) -> Iterator[RoundRecord]:
    """Run the rounds that are left for the job's clients and yield a record after each, with the state that it left.

    Those that are down by the job's faults keep what they have.
    """
    job = replace(job, state=job.state.clone())
    while job.state.round < job.rounds:
        (record,) = next_rounds([(job, exchange)])
        if isinstance(record, Exception):
            raise record
        assert record.state is not None
        job = replace(job, state=record.state)
        yield record


def next_rounds(runs: Sequence[tuple[Job, ExchangeOf]]) -> Iterator[RoundRecord | Exception]:
    """Run one round of each of these jobs, from its state, **in place**, and yield what it came to, in their order.

    Local steps are done together (`peertune.rounds.turns`), all else is done by each job for itself. Why one can't go
    on is yielded in the place of its record; it costs the others nothing.
    """
    begun = [tried(partial(_begin_of, job)) for job, _ in runs]
    trained = iter(train([one.turn for one in begun if isinstance(one, Begun)]))
    for (job, exchange), one in zip(runs, begun, strict=True):
        came = one if isinstance(one, Exception) else next(trained)
        yield tried(partial(_end_of, job, one, came, exchange))


def run_round(job: Job, state: State, clients: Sequence[int], t: int, exchange: Exchange) -> tuple[State, RoundRecord]:
    """Run round t for the K `clients` of `state`, **in place**, evaluate where it is due, and say what was done.

    It trains, exchanges, mixes, and measures what was sent and what came of it. The neighbourhoods' cross terms are
    measured in evaluated rounds only: on a dense graph of many clients they cost more than mixing.

    Raises DivergedError, before anything is sent, where training diverged; `state` then is of no more use.
    """
    begun = _begin(job, state, clients, t)
    (came,) = train([begun.turn])
    return end(job, begun, came, exchange)


class Begun(NamedTuple):
    """A round whose local steps are to be done."""

    turn: Turn
    clients: Sequence[int]  # [K], who take part
    t: int
    phase: Phase  # in which most of them are
    rows: Tensor | None = None  # of these among the job's clients; None: all


def _begin_of(job: Job) -> Begun:
    """Return the next round of a job, for those of its clients that are up."""
    state, t = job.state, job.state.round
    down = clients_down(job.faults, t)
    if down.isdisjoint(job.clients):
        return _begin(job, state, job.clients, t)
    places = [place for place, client in enumerate(job.clients) if client not in down]
    rows = torch.tensor(places, dtype=torch.int64, device=job.device)
    if (pausing := job.pausing) is not None:
        job = replace(job, pausing=pausing._replace(keep=lambda part: pausing.keep(_whole(state, rows, part))))
    return _begin(job, state.take(rows), [job.clients[place] for place in places], t)._replace(rows=rows)


def _whole(state: State, rows: Tensor, part: State) -> State:
    """Return the state within a round of all clients, of whom only these `rows` take part; the others' is zeros."""
    state.put(rows, part)
    within = {
        name: x.new_zeros((state.clients, *x.shape[1:])).index_copy(0, rows, x) for name, x in part.within.items()
    }
    return replace(state, step=part.step, within=within)


def _end_of(job: Job, begun: Begun | Exception, came: Came | Exception, exchange: ExchangeOf) -> RoundRecord:
    """Return the record of a job's round whose local steps are done, with the state of all its clients."""
    if isinstance(begun, Exception):
        raise begun
    part, record = end(job, begun, came, partial(exchange, begun.clients))
    earliest = 0
    if job.clock is not None and clients_down(job.faults, begun.t):  # asked in all processes, whoever is down where
        earliest = min(job.group.gather(min(part.memory[CLOCK].tolist(), default=2**62)))
    if begun.rows is None:
        return record
    job.state.put(begun.rows, part)
    if job.clock is not None:  # who was down joins in where the first of the others has ended the round
        job.state.remember({CLOCK: job.state.memory[CLOCK].clamp(min=earliest)})
    return replace(record, state=job.state.at(begun.t + 1))


def _begin(job: Job, state: State, clients: Sequence[int], t: int) -> Begun:
    """Say what the K `clients` of `state` are to train in round t."""
    turn = turn_of(job, state, clients)
    if job.pausing is not None:
        turn = turn._replace(pauses=job.pausing.after(t, job.local_steps), keep=job.pausing.keep)
    return Begun(turn, clients, t, _common(job, turn.phases, t))


def turn_of(job: Job, state: State, clients: Sequence[int], phase_rounds: Tensor | None = None) -> Turn:
    """Return what the K `clients` of `state` are to train, in the phases of their own rounds or of these `[K]`."""
    at, schedule = standing(clients, state.rounds, job.local_steps), job.algorithm.schedule
    of = at.round if phase_rounds is None else phase_rounds
    phases, before = (schedule.phases(state.known, at._replace(round=of - back)) for back in (0, 1))
    local, per_pass = job.algorithm.local, job.clients_per_pass
    reached = job.reached(clients, at.round.tolist())
    return Turn(job.model, job.optim, local, job.steps, state, at, phases, before, per_pass, reached=reached)


def end(
    job: Job, begun: Begun, came: Came | Exception, exchange: Exchange, *, common: bool = True
) -> tuple[State, RoundRecord]:
    """Do what is left of a round after its local steps, **in place**.

    Where it is no `common` round of the job's clients, nothing is measured of all of them, and nothing evaluated.
    """
    if isinstance(came, Exception):
        raise came
    turn, clients, t, phase, _ = begun
    if bool((came.loss > job.most_loss).any()):
        raise DivergedError(f"training: the loss is {float(came.loss.max()):.3g} in round {t}")
    due = common and is_due(job, t)
    state, at, message, watch = turn.state, turn.at, job.algorithm.message, Watch(came.seconds)
    payload, changed = message.send(state.adapters, state.known, at, phase)
    state.remember(changed)
    heard = exchange(payload, t, _refusing(job, state))
    sites = _sites_sent(job, heard.clients, t)
    if sites is not None:
        heard = _arrived(job, heard, clients, sites)
    watch.lap("exchange")
    at = at._replace(heard=torch.tensor(heard.clients, dtype=torch.int64))
    neighbours = metrics.neighbour_counts(heard.weights) if payload else [0] * len(clients)
    messages = neighbours if heard.sent is None else heard.sent
    sent_bytes = metrics.bytes_sent(payload, messages)
    sites_sent = [] if sites is None else sites[_places(heard.clients, clients)].tolist()
    if sites is not None:
        each = deadline.bytes_sent(payload, state.adapters, sites_sent)
        sent_bytes = [size * count for size, count in zip(each, messages, strict=True)]
    if message.edgewise is not None:
        sent_bytes = message.edgewise.bytes_sent(payload, state.known, heard.weights, at)
    if message.settle is not None:
        state.remember(message.settle(state.known, heard.tensors, heard.weights, at, phase))
    weights, unmixed = _mixable(job, state, clients, t, heard)
    sizes = [size / max(1, count) for size, count in zip(sent_bytes, messages, strict=True)]
    spans = _timed(job, state, clients, t, heard, sizes) if common else []
    watch.lap("mix")
    sent, pushed = select(heard.tensors, phase.send), job.graph.weights == "push_sum"
    measurable = due and message.whole and sites is None
    cross_terms = metrics.neighbourhood_cross_terms(sent, weights, pushed) if measurable else None
    rows = None if job.graph.rows is None else torch.from_numpy(job.graph.rows[list(clients)]).to(job.device)
    before = (
        None if job.alone or not common else metrics.before_mixing(select(state.adapters, phase.send), job.group, rows)
    )
    watch.lap("metrics")
    mixed = heard._replace(weights=weights)
    together = _together(job, state, clients, mixed, watch) if due else []
    own_trained, own_heard = _on_own_rows(job, state, clients, mixed, watch) if due else ([], [])
    _mix(job, state, heard.tensors, weights, at, phase, sites)
    state = replace(state, rounds=state.rounds + 1, step=0)
    watch.lap("mix")
    diagnostics = {} if before is None else metrics.diagnostics(before, state.adapters, job.group, rows)
    watch.lap("metrics")
    evaluation = None
    if due:
        evaluation = job.evaluate(state.adapters, clients).with_heard(together)
        kept = best.keep(state, evaluation, t)
        evaluation = replace(evaluation, own_trained=own_trained, own_heard=own_heard, best_rounds=kept)
        watch.lap("evaluate")
    return state, RoundRecord(
        round=t,
        train=sorted(phase.train),
        send=sorted(phase.send),
        clients=list(clients),
        loss=came.loss.tolist(),
        grad_norm=came.grad_norm.tolist(),
        bytes_sent=sent_bytes,
        neighbours=neighbours,
        edges=metrics.edges(heard.weights, clients, heard.clients, job.graph.directed) if payload else [],
        failed_edges=heard.failed if payload else [],
        vacant_edges=list(heard.vacant) if payload else [],
        not_mixed=unmixed,
        out_of_phase=[client for client, own in zip(clients, turn.phases, strict=True) if own != phase],
        neighbourhood_cross_term=cross_terms,
        diagnostics=diagnostics,
        seconds=watch.seconds,
        evaluation=evaluation,
        time_s=max((span.ended_s for span in spans), default=0.0) if common and job.clock else None,
        spans=[*spans],
        sites_sent=sites_sent,
        state=state,
    )


def _timed(job: Job, state: State, clients: Sequence[int], t: int, heard: Heard, sizes: Sequence[float]) -> list[Span]:
    """Move the clients' clocks to the end of round t, and return what each did; [] where nothing has a time.

    A message of client k has `sizes[k]` bytes.
    """
    if job.clock is None:
        return []
    begun = dict(zip(clients, state.memory[CLOCK].tolist(), strict=True))
    steps = range(t * job.local_steps, (t + 1) * job.local_steps)
    own = [
        [client, job.clock.trained(client, begun[client], steps, delay_s(job.faults, client, t)), size]
        for client, size in zip(clients, sizes, strict=True)
    ]
    sent = {client: (end, size) for client, end, size in chain(*job.group.gather(own))}
    receivers, places, _ = (x.tolist() for x in entries(heard.weights))
    pairs = ((clients[receiver], heard.clients[place]) for receiver, place in zip(receivers, places, strict=True))
    came = [(i, j, job.clock.arrives(*sent[j])) for i, j in pairs if i != j] if heard.tensors else []
    ends = lockstep(begun, {client: sent[client][0] for client in clients}, came)
    now = [ends[client][0] for client in clients]
    state.remember({CLOCK: torch.tensor(now, dtype=torch.int64, device=job.device)})
    return [ends[client][1] for client in clients]


def exchanged(
    job: Job, clients: Sequence[int], among: Sequence[int], tensors: Tensors, round: int, refuse: Refuse
) -> Heard:
    """Return what an exchange brought the K `clients`: `tensors [H, …]` of those `among` whom all are whom they hear.

    The tensors are what was sent. An edge that one end refuses is dropped from the mixing matrix like one that is
    planned to fail, at both ends.
    """
    tensors, graph = job.read(tensors, round), job.graph
    matrix, failed = planned_weights(graph, job.faults, round)
    ours, theirs = (np.asarray(numbers, dtype=np.int64) for numbers in (clients, among))
    rows = matrix if len(ours) == graph.clients else matrix[ours]
    taken = rows.tocoo()
    receivers, senders = taken.row, np.searchsorted(theirs, taken.col)
    others = (ours[receivers] != taken.col) & (taken.data != 0)
    places = (torch.from_numpy(x[others]).long().to(job.device) for x in (receivers, senders))
    found = refuse(tensors, *places) if tensors else []
    tell(job, round, found, clients, among, "the edge is dropped")
    pairs = {metrics.as_edge(among[sender], clients[receiver], graph.directed) for receiver, sender, _ in found}
    told = chain(*job.group.gather(sorted(pairs)))
    if lost := sorted({(i, j) for i, j in told}):
        matrix, failed = drop_edges(graph, matrix, lost), sorted({*failed, *lost})
        rows = matrix[ours]
    if len(theirs) < graph.clients:
        rows = rows[:, theirs]
    if job.group.size > 1:
        failed = [edge for edge in failed if not set(edge).isdisjoint(job.clients)]
    sent = messages_sent(graph, job.faults, round)[ours].tolist() if graph.directed else None
    return Heard(tensors, as_weights(rows, job.device), among, failed, sent=sent)


def tell(
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


def _mixable(
    job: Job, state: State, clients: Sequence[int], t: int, came: Heard
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the weights of what is mixed, and the pairs (receiver, sender) that counted and are left out.

    Their weight returns to the receiver's own adapter, at this end only.
    """
    weights = came.weights
    if job.bound is None or not came.tensors:
        return weights, []
    receivers, places, _ = entries(weights)
    ours, theirs = (torch.tensor(numbers, device=weights.device) for numbers in (clients, came.clients))
    others = ours[receivers] != theirs[places]
    found = bounds.apart(job.bound, state.adapters, came.tensors, receivers[others], places[others])
    if not found:
        return weights, []
    tell(job, t, found, clients, came.clients, "the edge counts, and this end mixes nothing of it")
    rows, columns = (torch.tensor(x, device=weights.device) for x in zip(*(pair[:2] for pair in found), strict=True))
    fails = torch.isin(receivers * len(theirs) + places, rows * len(theirs) + columns)
    pairs = sorted((clients[receiver], came.clients[sender]) for receiver, sender, _ in found)
    return giving_back(weights, torch.searchsorted(theirs, ours), fails), pairs


def _sites_sent(job: Job, clients: Sequence[int], t: int) -> Tensor | None:
    """Return how many of the last sites each of these clients sends in round t, `[H]`; None without a deadline."""
    reached = job.reached(clients, [t] * len(clients))
    if reached is None or job.clock is None:
        return None
    return deadline.sent(job.clock, reached, job.sites).to(job.device)


def _places(among: Sequence[int], clients: Sequence[int]) -> Tensor:
    """Return where these clients are among some, who are sorted."""
    return torch.searchsorted(torch.tensor(among, dtype=torch.int64), torch.tensor(clients, dtype=torch.int64))


def _arrived(job: Job, heard: Heard, clients: Sequence[int], sites: Tensor) -> Heard:
    """Return what was heard without those edges over which nothing came, since one end had reached no site."""
    own = _places(heard.clients, clients).to(job.device)
    weights = without_site(heard.weights, own, sites, 1)
    pairs = [metrics.edges(x, clients, heard.clients, job.graph.directed) for x in (heard.weights, weights)]
    return heard._replace(weights=weights, failed=sorted({*heard.failed, *pairs[0]} - {*pairs[1]}))


def _together(job: Job, state: State, clients: Sequence[int], mixed: Heard, watch: Watch) -> list[list[float]]:
    """Return by metric the score of each client's ensemble with those that it mixes, where such are judged."""
    if job.ensembles is None:
        return []
    scores = job.ensembles(state.adapters, mixed, clients)
    watch.lap("evaluate")
    return scores


def _on_own_rows(
    job: Job, state: State, clients: Sequence[int], mixed: Heard, watch: Watch
) -> tuple[list[float], list[float]]:
    """Return the scores on its own rows of what each client trained, and of the mean of what others sent it."""
    if job.judge_own is None:
        return [], []
    heard = metrics.heard_mean(state.adapters, mixed.tensors, mixed.weights, clients, mixed.clients)
    scores = job.judge_own(state.adapters, clients), job.judge_own(heard, clients)
    watch.lap("evaluate")
    return scores


def _mix(
    job: Job, state: State, heard: Tensors, weights: Tensor, at: At, phase: Phase, sites: Tensor | None = None
) -> None:
    """Mix what was heard into the adapters, **in place**; of each who was heard so many of the last `sites [H]`.

    It goes from site to site, so that beside the stack only one site's new factors are held.
    """
    mixer, message = job.algorithm.mixer, job.algorithm.message
    used, changed = mixer.weigh(state.adapters, heard, weights, state.known, at, phase)
    state.remember(changed)
    assert at.heard is not None, "an exchange says who was heard"
    places = torch.searchsorted(at.heard, at.clients).to(job.device)  # of the receivers among them
    beside = {name: x for name, x in heard.items() if name not in state.adapters}
    known = state.known
    groups = by_site(state.adapters)
    for left, own in zip(range(len(groups), 0, -1), groups, strict=True):
        came = {name: heard[name] for name in own if name in heard}
        if not came:
            continue
        names = tuple(f"{name}." for name in own)  # after their owner's, those of what travels beside these adapters
        told = came | {name: x for name, x in beside.items() if name.partition(".")[2].startswith(names)}
        as_read = own if message.exact else own | {name: x[places] for name, x in came.items()}
        share = used if isinstance(used, Tensor) else used[next(iter(own)).rpartition(".")[0]]
        if sites is not None:
            share = without_site(share, places, sites, left)
        mixed, changed = mixer.receive(as_read, told, share, known, at, phase)
        state.remember(changed)
        known |= changed
        for name, x in own.items():
            if mixed[name] is as_read[name]:
                continue
            if message.exact:
                x.copy_(mixed[name])
            else:
                x.add_(mixed[name].sub(as_read[name]))


def is_due(job: Job, t: int) -> bool:
    """Return whether there is an evaluation after round t."""
    return (t + 1) % job.evaluate_every == 0 or t + 1 == job.rounds


def _common(job: Job, phases: Sequence[Phase], t: int) -> Phase:
    """Return the phase that most clients of all processes are in; of several, the first client's."""
    if job.algorithm.schedule.init is nothing:
        return job.algorithm.phase(t)
    return commonest(phases, job.group)


def commonest(phases: Sequence[Phase], group: Group) -> Phase:
    """Return the commonest of what clients of all processes are in, by client; of several, the first client's."""
    told = [[sorted(phase.train), sorted(phase.send), count] for phase, count in Counter(phases).items()]
    counts: Counter[Phase] = Counter()
    for trained, sent, count in chain(*group.gather(told)):
        counts[Phase(frozenset(trained), frozenset(sent))] += count
    return counts.most_common(1)[0][0]
