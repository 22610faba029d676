"""One round: local steps, exchange, mix. Every engine runs this and nothing else; only `exchange` differs."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from peertune.errors import DivergedError, tried
from peertune.method import Phase, nothing, standing
from peertune.methods.private import STEPS, spent
from peertune.methods.shares import entries
from peertune.rounds import best, deadline, metrics
from peertune.rounds.clock import Span, lockstep
from peertune.rounds.job import CLOCK, Exchange, ExchangeOf, Heard, Job
from peertune.rounds.mixing import arrived, finite, mix, mixable, places_among, refusing
from peertune.rounds.record import RoundRecord, Watch
from peertune.rounds.slices import chosen
from peertune.rounds.turns import Came, Turn, train
from peertune.topology import clients_down, delay_s
from peertune.types import Group, Stack, State, in_order, only, select, stacked


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
    trained = iter(train([turn for one in begun if isinstance(one, Begun) for turn in one.turns]))
    for (job, exchange), one in zip(runs, begun, strict=True):
        came = [] if isinstance(one, Exception) else [*islice(trained, len(one.turns))]
        yield tried(partial(_end_of, job, one, came, exchange))


def run_round(job: Job, state: State, clients: Sequence[int], t: int, exchange: Exchange) -> tuple[State, RoundRecord]:
    """Run round t for the K `clients` of `state`, **in place**, evaluate where it is due, and say what was done.

    It trains, exchanges, mixes, and measures what was sent and what came of it. The neighbourhoods' cross terms are
    measured in evaluated rounds only: on a dense graph of many clients they cost more than mixing.

    Raises DivergedError, before anything is sent, where training diverged; `state` then is of no more use.
    """
    begun = _begin(job, state, clients, t)
    return end(job, begun, train(begun.turns), exchange)


class Begun(NamedTuple):
    """A round whose local steps are to be done."""

    state: State
    turns: Sequence[Turn]  # of each cohort of it
    clients: Sequence[int]  # [K], who take part
    t: int
    phase: Phase  # in which most of them are
    rows: Tensor | None = None  # of these among the job's clients; None: all

    @classmethod
    def of(cls, turn: Turn, clients: Sequence[int], t: int, phase: Phase) -> "Begun":
        """Return the round of clients who are one cohort."""
        return cls(turn.state, [turn], clients, t, phase)


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
    cohorts = []
    for own, cohort in state.parts:
        here = torch.isin(rows.cpu(), own).nonzero()[:, 0]
        to = torch.searchsorted(own, rows.cpu()[here])
        within = {
            name: x.new_zeros((cohort.clients, *x.shape[1:])).index_copy(0, to.to(x.device), x)
            for _, took in (part.take(here).parts if len(here) else ())
            for name, x in took.within.items()
        }
        cohorts.append((own, replace(cohort, step=part.step, within=within)))
    return State.together(cohorts)


def _end_of(job: Job, begun: Begun | Exception, came: Sequence[Came | Exception], exchange: ExchangeOf) -> RoundRecord:
    """Return the record of a job's round whose local steps are done, with the state of all its clients."""
    if isinstance(begun, Exception):
        raise begun
    part, record = end(job, begun, came, partial(exchange, begun.clients))
    earliest = 0
    if job.clock is not None and clients_down(job.faults, begun.t):  # asked in all processes, whoever is down where
        earliest = min(job.group.gather(min(part.remembered(CLOCK).tolist(), default=2**62)))
    if begun.rows is None:
        return record
    job.state.put(begun.rows, part)
    if job.clock is not None:  # who was down joins in where the first of the others has ended the round
        job.state.remember({CLOCK: job.state.remembered(CLOCK).clamp(min=earliest)})
    return replace(record, state=job.state.at(begun.t + 1))


def _begin(job: Job, state: State, clients: Sequence[int], t: int) -> Begun:
    """Say what the K `clients` of `state` are to train in round t."""
    turns = [turn_of(job, part, [clients[row] for row in rows.tolist()]) for rows, part in state.parts]
    if job.pausing is not None:
        pauses, keep = job.pausing.after(t, job.local_steps), _keeping(state, job.pausing.keep)
        turns = [turn._replace(pauses=pauses, keep=partial(keep, n)) for n, turn in enumerate(turns)]
    return Begun(state, turns, clients, t, _common(job, [phase for turn in turns for phase in turn.phases], t))


def _keeping(state: State, keep: Callable[[State], object]) -> Callable[[int, State], object]:
    """Return what is told each cohort's state within a round, by its number, and has all of them kept together."""
    told: dict[int, State] = {}

    def hear(number: int, part: State) -> None:
        told[number] = part
        if len(told) == len(state.parts):
            keep(State.together([(rows, told[n]) for n, (rows, _) in enumerate(state.parts)]))
            told.clear()

    return hear


def turn_of(job: Job, state: State, clients: Sequence[int], phase_rounds: Tensor | None = None) -> Turn:
    """Return what the K `clients` of `state` are to train, in the phases of their own rounds or of these `[K]`."""
    at, schedule = standing(clients, state.rounds, job.local_steps), job.algorithm.schedule
    of = at.round if phase_rounds is None else phase_rounds
    phases, before = (schedule.phases(state.known, at._replace(round=of - back)) for back in (0, 1))
    local, per_pass = job.algorithm.local, job.clients_per_pass
    reached = job.reached(clients, at.round.tolist())
    salted = job.private is not None
    return Turn(
        job.model, job.optim, local, job.steps, state, at, phases, before, per_pass, reached=reached, salted=salted
    )


def end(
    job: Job, begun: Begun, came: Sequence[Came | Exception], exchange: Exchange, *, common: bool = True
) -> tuple[State, RoundRecord]:
    """Do what is left of a round after its local steps, **in place**.

    Where it is no `common` round of the job's clients, nothing is measured of all of them, and nothing evaluated.
    """
    state, turns, clients, t, phase, _ = begun
    trained = _trained(job, begun, came)
    due = common and is_due(job, t)
    at, message, watch = standing(clients, state.rounds, job.local_steps), job.algorithm.message, Watch(trained.seconds)
    payload, honest = list[Stack](), list[Stack]()
    for (members, part), turn in zip(state.parts, turns, strict=True):
        if message.honest is not None:
            liars, own = message.honest(part.adapters, part.known, turn.at, phase)
            honest += [Stack(members[liars], own)] if own else []
        sent, changed = message.send(part.adapters, part.known, turn.at, phase)
        part.remember(changed)
        payload += [Stack(members, sent)] if sent else []
    heard = finite(job, arrived(job, exchange(payload, t, refusing(job, state)), clients, t))
    watch.lap("exchange")
    at = at._replace(heard=torch.tensor(heard.clients, dtype=torch.int64))
    neighbours = metrics.neighbour_counts(heard.weights) if payload else [0] * len(clients)
    messages = neighbours if heard.sent is None else heard.sent
    sent_bytes = metrics.bytes_sent(payload, messages)
    sites_sent = [] if heard.sites is None else heard.sites[places_among(heard.clients, clients)].tolist()
    if heard.sites is not None:
        sent_bytes = deadline.bytes_sent(only(payload), state.adapters, sites_sent, messages)
    if message.edgewise is not None:
        sent_bytes = message.edgewise.bytes_sent(only(payload), state.known, heard.weights, at)
    if message.settle is not None:
        state.remember(message.settle(state.known, heard.tensors, heard.weights, at, phase))
    weights, unmixed = mixable(job, state, clients, t, heard)
    sizes = [size / max(1, count) for size, count in zip(sent_bytes, messages, strict=True)]
    spans = _timed(job, state, clients, t, heard, sizes) if common else []
    watch.lap("mix")
    measurable = due and message.whole and heard.sites is None and not job.ranks
    pushed = job.graph.weights == "push_sum"
    cross_terms = None
    if measurable:
        cross_terms = metrics.neighbourhood_cross_terms(select(heard.tensors, phase.send), weights, pushed)
    rows = None if job.graph.rows is None else torch.from_numpy(job.graph.rows[list(clients)]).to(job.device)
    before = None
    if common and not job.alone:
        before = metrics.before_mixing(chosen(state.stacks, phase.send), job.group, rows, job.cuts)
    watch.lap("metrics")
    _tell_spent(job, begun)
    mixed = heard._replace(weights=weights)
    together = _together(job, state, clients, mixed, watch) if due else []
    own_trained, own_heard = _on_own_rows(job, state, clients, mixed, watch) if due else ([], [])
    taken = mix(job, state, mixed, at, phase, honest)
    state = state.after()
    watch.lap("mix")
    diagnostics = {} if before is None else metrics.diagnostics(before, state.stacks, job.group, rows, job.cuts)
    if before is not None and due and job.ranks:
        diagnostics |= metrics.high_ranks(state.stacks, job.cuts, job.group)
    watch.lap("metrics")
    evaluation = None
    if due:
        evaluation = job.evaluate(state.stacks, clients).with_heard(together)
        kept = best.keep(state, clients, evaluation, t)
        evaluation = replace(evaluation, own_trained=own_trained, own_heard=own_heard, best_rounds=kept)
        watch.lap("evaluate")
    return state, RoundRecord(
        round=t,
        train=sorted(phase.train),
        send=sorted(phase.send),
        clients=list(clients),
        loss=[] if job.private else trained.loss.tolist(),
        grad_norm=[] if job.private and job.private.unit == "client" else trained.grad_norm.tolist(),
        bytes_sent=sent_bytes,
        neighbours=neighbours,
        edges=metrics.edges(heard.weights, clients, heard.clients, job.graph.directed) if payload else [],
        failed_edges=heard.failed if payload else [],
        vacant_edges=list(heard.vacant) if payload else [],
        not_mixed=unmixed,
        taken=taken,
        out_of_phase=sorted(
            client
            for turn in turns
            for client, own in zip(turn.at.clients.tolist(), turn.phases, strict=True)
            if own != phase
        ),
        neighbourhood_cross_term=cross_terms,
        diagnostics=diagnostics,
        seconds=watch.seconds,
        evaluation=evaluation,
        epsilon=spent(job.private, clients, state.remembered(STEPS).tolist())
        if job.private and (due or len(clients) == 1)
        else [],
        time_s=max((span.ended_s for span in spans), default=0.0) if common and job.clock else None,
        spans=[*spans],
        sites_sent=sites_sent,
        state=state,
    )


def _trained(job: Job, begun: Begun, came: Sequence[Came | Exception]) -> Came:
    """Return what the local steps of all clients came to. Raises what came in the place of it, or DivergedError."""
    parts = list[Came]()
    for part in came:
        if isinstance(part, Exception):
            raise part
        parts.append(part)
    members = [rows for rows, _ in begun.state.parts]
    loss = in_order(zip(members, (part.loss for part in parts), strict=True))
    grad_norm = in_order(zip(members, (part.grad_norm for part in parts), strict=True))
    if job.private is None and bool((loss > job.most_loss).any()):  # else neighbours would see what rows come to
        raise DivergedError(f"training: the loss is {float(loss.max()):.3g} in round {begun.t}")
    return Came(loss, grad_norm, sum(part.seconds for part in parts))


def _tell_spent(job: Job, begun: Begun) -> None:
    """Log who has trained for the last time, before the last round, since its privacy's budget has no room for more."""
    if job.private is None or begun.t + 1 == job.rounds:
        return
    for turn in begun.turns:
        for client, phase, steps in zip(
            turn.at.clients.tolist(), turn.phases, turn.state.memory[STEPS].tolist(), strict=True
        ):
            if phase.train and not job.private.allowances[client].has_room(steps + job.private.per_round):
                job.lines.say(client, f"its privacy budget is spent after round {begun.t}: it only mixes from here on")


def _timed(job: Job, state: State, clients: Sequence[int], t: int, heard: Heard, sizes: Sequence[float]) -> list[Span]:
    """Move the clients' clocks to the end of round t, and return what each did; [] where nothing has a time.

    A message of client k has `sizes[k]` bytes.
    """
    if job.clock is None:
        return []
    begun = dict(zip(clients, state.remembered(CLOCK).tolist(), strict=True))
    steps = range(t * job.local_steps, (t + 1) * job.local_steps)
    own = [
        [client, job.clock.trained(client, begun[client], steps, delay_s(job.faults, client, t)), size]
        for client, size in zip(clients, sizes, strict=True)
    ]
    sent = {client: (end, size) for client, end, size in chain(*job.group.gather(own))}
    receivers, places, _ = (x.tolist() for x in entries(heard.weights))
    pairs = ((clients[receiver], heard.clients[place]) for receiver, place in zip(receivers, places, strict=True))
    came = [(i, j, job.clock.arrives(*sent[j])) for i, j in pairs if i != j] if heard.stacks else []
    ends = lockstep(begun, {client: sent[client][0] for client in clients}, came)
    now = [ends[client][0] for client in clients]
    state.remember({CLOCK: torch.tensor(now, dtype=torch.int64, device=job.device)})
    return [ends[client][1] for client in clients]


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
    scores = job.judge_own(state.stacks, clients), job.judge_own(stacked(heard), clients)
    watch.lap("evaluate")
    return scores


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
