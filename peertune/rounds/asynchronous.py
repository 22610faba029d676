"""Clients that wait for nobody: each trains, sends, mixes what has come, and trains on.

Time is virtual (`peertune.rounds.clock`), in whole nanoseconds. What happens at one time goes by kind, then by client:
training ends and is sent, messages arrive, those who have trained mix, the clients are evaluated, training begins. With
equal speeds and no latency that is the synchronous round, to the bit.

- **Edges** are drawn by the sender's own round. A message carries how many the sender sends to, its degree d.
- **A mailbox** holds of each neighbour the newest message that has not been mixed. Mixing empties it.
- **Weights** are Metropolis' of these degrees, times `(1 + s)^-a`: `W_ij = (1 + s_ij)^-a / (1 + max(d_i, d_j))`. The
  rest of 1 is the receiver's own. d_i counts what the mailbox holds where that is more. On a directed graph each
  message counts as much as the receiver's own adapter. s counts the trainings that the receiver has ended since the
  sender began the one that made the message, but for the one after which it mixes. So a client that is slow is not
  silenced: to it all others are new. Rows sum to 1, columns don't, and the clients' mean moves: records say how far.
- **Pairs.** With `Pushing.pairwise` nothing is pushed. A client that has ended a training averages what it holds with
  one neighbour, drawn from the edges of its own round; both take the mean. What a client was training meanwhile is
  added as a change, `held += trained - started from`. This keeps the clients' mean (AD-PSGD, arXiv 1710.06952).
- **A record** is made whenever the clients have ended n more trainings, n being their number. So a run of R rounds
  takes as many local steps as R synchronous rounds, whoever makes them.

What a client trains is decided when it begins, and needed when it ends. So nothing is computed until an event needs a
result; then all who have begun are trained in one pass.

Several processes may share the clients. Who ends when, and who sends to whom, are pure functions, so each goes through
all events without being told. It trains and holds its own clients alone; messages go to the receivers' processes. When
an event needs a result of anybody's, all train those of theirs who have begun: they do so at the same time.

The weight of what is old is AEDFL's (arXiv 2312.10935) up to its form, which is ours; a = 0 mixes as if nothing were.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from heapq import heapify, heappop, heappush
from itertools import chain
from math import sqrt
from statistics import fmean, median_low

import torch

from peertune.method import Phase
from peertune.methods.shares import as_weights
from peertune.randomness import Draw, uniforms
from peertune.rounds import best, bounds, metrics
from peertune.rounds.clock import NS, Span
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.mixing import tell
from peertune.rounds.record import RoundRecord, Watch
from peertune.rounds.round import Begun, commonest, end, is_due, turn_of
from peertune.rounds.turns import Came, Turn, train
from peertune.rounds.under_way import Done, Sent, UnderWay
from peertune.topology import delay_s
from peertune.topology.pushes import To, rows, sends_to, share
from peertune.types import Group, Stack, State, Tensors, only, payload_bytes, select, stacked, take

Edge = tuple[int, int]

Carry = Callable[[Tensors, Mapping[int, Sequence[int]]], tuple[Sequence[int], Tensors]]
"""`carry(payload, to)` brings what clients send to the processes whose clients get it: all in which engines differ.

`to` has by sender who gets it, in all processes alike; both ascend. `payload` has a row for each sender that is of this
process. Returned are the senders that are of this process or send to it, and a row for each, `[H, …]`.
"""


@dataclass
class _Since:
    """What has happened since the last record."""

    moved: Tensors  # by how much mixing moved the sum of these clients' adapters, […] in float64
    records: list[RoundRecord] = field(default_factory=list)  # of those who ended a training at one time
    phases: list[tuple[int, Phase]] = field(default_factory=list)  # of each training, with its client
    spans: list[Span] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)  # that no record of these has


def run_asynchronous(job: Job, carry: Carry) -> Iterator[RoundRecord]:
    """Run what is left of a job, and yield a record, with the state, after every n trainings.

    The state has in `under_way` what is computed and what is sent: resuming from it gives the same bits. Of a job that
    is dealt among processes each yields its clients' part of a record.
    """
    course = _Course(replace(job, state=job.state.clone()), carry)
    while course.round < job.rounds:
        yield course.next_record()


class _Course:
    """The course of an asynchronous run: what the clients hold, when each ends its training, and what is on its way."""

    def __init__(self, job: Job, carry: Carry) -> None:
        assert job.clock is not None, "clients that wait for nobody have times"
        assert job.pushing is not None, "and a way to mix"
        self.job, self.clock, self.pushing, self.carry = job, job.clock, job.pushing, carry
        self.state = replace(job.state, under_way={})
        self.rows = {client: row for row, client in enumerate(job.clients)}
        self.kinds = job.algorithm.phase(0).send  # by all clients, at all times
        self.sends_to = lru_cache(maxsize=256)(partial(sends_to, job.graph, job.faults))
        names = chain(self.state.adapters, self.state.moments, self.state.memory)
        self.under_way = UnderWay.of(job.state.under_way, names)
        told = job.group.gather([self.state.rounds.tolist(), [*self.under_way.done]])
        made, computed = ([int(value) for value in chain(*part)] for part in zip(*told, strict=True))
        self.computed = {*computed}  # whose training is, in whatever process
        self.ended = [self._ended(client, rounds) for client, rounds in enumerate(made)]
        self.trainings = sum(made)
        self.ends = [(self._end(client), client) for client in range(len(made))]
        heapify(self.ends)
        self.common_ns = median_low([self._ended(client, 1)[0] for _, client in self.ends])  # a round of common time
        self.seconds = 0.0  # of training that no record has yet

    @property
    def round(self) -> int:
        """The next record's."""
        return self.trainings // len(self.ended)

    def next_record(self) -> RoundRecord:
        """Let things happen until the clients have ended n more trainings than at the last record."""
        job, group, adapters, t, now = self.job, self.job.group, self.state.adapters, self.round, 0
        since = _Since({name: x.new_zeros(x.shape[1:], dtype=torch.float64) for name, x in adapters.items()})
        while self.round == t:
            now = self._next_event(since)
        watch = Watch(0.0)
        diagnostics = metrics.diagnostics(metrics.Before({}, {}), self.state.stacks, group)
        moved = sum(float(group.add(x).square().sum()) for x in since.moved.values())
        diagnostics["mean_drift"] = sqrt(moved) / len(self.ended)
        watch.lap("metrics")
        evaluation = None
        if is_due(job, t):
            evaluation = job.evaluate(self.state.stacks, job.clients)
            kept = best.keep(self.state, job.clients, evaluation, t)
            evaluation = replace(evaluation, best_rounds=kept)
            watch.lap("evaluate")
        since.seconds.update(watch.seconds)
        state = replace(self.state, under_way=self.under_way.packed(torch.tensor([len(own) for own in self.ended])))
        record = _together(t, since, group)
        return replace(record, diagnostics=diagnostics, evaluation=evaluation, time_s=now / NS, state=state)

    def _next_event(self, since: _Since) -> int:
        """Let those who end a training next send it, mix, and begin another one; return when that is."""
        now, ending = self.ends[0][0], list[int]()
        while self.ends and self.ends[0][0] == now:
            ending.append(heappop(self.ends)[1])
        if not self.computed >= {*ending}:
            self._train([client for client in self.job.clients if client not in self.under_way.done])
            self.computed = {*range(len(self.ended))}
        own = [client for client in ending if client in self.rows]
        if own:
            since.records.append(self._end_of(own, ending, now, since))
        elif not self.pushing.pairwise:
            watch = Watch(0.0)
            self._send(ending, now, take(select(self.state.adapters, self.kinds), slice(0, 0)))
            watch.lap("exchange")
            since.seconds.update(watch.seconds)
        if self.pushing.pairwise:
            edges, failed = self._meet(ending)
            if own:
                since.records[-1] = replace(since.records[-1], edges=edges, failed_edges=failed)
        for client in ending:
            self.ended[client].append(now)
            heappush(self.ends, (self._end(client), client))
        self.computed.difference_update(ending)
        self.trainings += len(ending)
        return now

    def _end_of(self, own: Sequence[int], ending: Sequence[int], now: int, since: _Since) -> RoundRecord:
        """Do what clients of this process do at the end of a training, `own` among those who end one `now`."""
        came, part = self._trained(own)
        turn, before = self._turn(part, own), _sums(part.adapters)
        begun = Begun.of(turn, own, self.round, Counter(turn.phases).most_common(1)[0][0])
        exchange = partial(self._keep, own) if self.pushing.pairwise else partial(self._exchange, own, ending, now)
        part, record = end(self.job, begun, [came], exchange, common=False)
        for name, x in _sums(part.adapters).items():
            since.moved[name] = since.moved[name] + x - before[name]
        since.spans += [Span(client, self._began(client) / NS, now / NS, now / NS, -1) for client in own]
        since.phases += zip(own, turn.phases, strict=True)
        self.state.put(self._places(own), part)
        return record

    def _trained(self, clients: Sequence[int]) -> tuple[Came, State]:
        """Return what the local steps of these clients came to, and what they hold after them."""
        done = [self.under_way.done.pop(client) for client in clients]
        seconds, self.seconds = self.seconds, 0.0
        loss, norm = torch.tensor([(one.loss, one.grad_norm) for one in done], dtype=torch.float64).T
        state = State.of([one.state for one in done])
        for row, client in enumerate(clients):
            place = self.rows[client]
            for name, x in self.under_way.started.pop(client, {}).items():
                own, held = state.adapters[name][row : row + 1], self.state.adapters[name][place : place + 1]
                own.sub_(x).add_(held)
        return Came(loss, norm, seconds), state

    def _train(self, clients: list[int]) -> None:
        """Do the local steps of these clients in one pass, on copies of what they hold."""
        if not clients:
            return
        part = replace(self.state, memory=best.beside(self.state.memory)).take(self._places(clients))
        for row, client in enumerate(clients):
            for name, x in self.under_way.started.get(client, {}).items():
                part.adapters[name][row : row + 1] = x
        turn = self._turn(part, clients)
        (came,) = train([turn])
        if isinstance(came, Exception):
            raise came
        self.seconds += came.seconds
        for row, client in enumerate(clients):
            one = turn.state.take(slice(row, row + 1))
            self.under_way.done[client] = Done(one, float(came.loss[row]), float(came.grad_norm[row]))

    def _turn(self, state: State, clients: Sequence[int]) -> Turn:
        """Return what these clients train, in the phases of their own rounds or of common time."""
        common = torch.tensor([self._began(client) // self.common_ns for client in clients])
        return turn_of(self.job, state, clients, common if self.pushing.common_phases else None)

    def _send(self, ending: Sequence[int], now: int, payload: Tensors) -> tuple[list[Sent], list[Edge]]:
        """Send what these clients have trained; return what this process's own sent, and whom that doesn't reach."""
        to = {client: self._to(client) if payload else To([], []) for client in ending}
        reached = {client: [other for other in near if other not in lost] for client, (near, lost) in to.items()}
        senders, came = self.carry(payload, reached)
        own, failed, arrives = list[Sent](), list[Edge](), self.clock.arrives(now, payload_bytes(payload))
        for row, client in enumerate(senders):
            version = len(self.ended[client])
            tensors = self.job.read({name: x[row : row + 1].clone() for name, x in came.items()}, version)
            sent = Sent(client, version, len(to[client].receivers), self._began(client), tensors)
            if client in self.rows:
                own.append(sent)
                failed += [metrics.as_edge(client, other, self.job.graph.directed) for other in to[client].lost]
            for receiver in reached[client]:
                if receiver in self.rows:
                    self.under_way.send(receiver, sent, now, arrives)
        return own, failed

    def _exchange(
        self, clients: Sequence[int], ending: Sequence[int], now: int, sent: Sequence[Stack], t: int, refuse: Refuse
    ) -> Heard:
        """Send what all who end have trained, and open the mailboxes of these clients among them."""
        payload = only(sent)
        own, failed = self._send(ending, now, payload)
        opened = [self.under_way.open(client, now) for client in clients]
        posts = {(sent.sender, -sent.version): sent for sent in chain(own, *opened)}
        order = sorted(posts)  # by sender, the newest first, which is its own where it is a receiver
        place = {key: at for at, key in enumerate(order)}
        came = stacked({name: torch.cat([posts[key].tensors[name] for key in order]) for name in payload})
        among = [sender for sender, _ in order]
        takes = {  # receiver, place among the heard → share
            (row, place[other.sender, -other.version]): self._share(mine, other, len(heard), now)
            for row, (mine, heard) in enumerate(zip(own, opened, strict=True))
            for other in heard
        }
        pairs = torch.tensor([*takes], dtype=torch.int64, device=self.job.device).view(-1, 2)
        if takes and (refused := refuse(came, pairs[:, 0], pairs[:, 1])):
            tell(self.job, t, refused, clients, among, "it is left out")
            failed += [metrics.as_edge(among[j], clients[i], self.job.graph.directed) for i, j, _ in refused]
            for i, j, _ in refused:
                del takes[i, j]
        weights = rows(clients, among, takes, directed=self.job.graph.directed)
        degrees = [mine.degree for mine in own]
        return Heard(came, as_weights(weights, self.job.device), among, sorted({*failed}), sent=degrees)

    def _keep(self, clients: Sequence[int], payload: Sequence[Stack], t: int, refuse: Refuse) -> Heard:
        """Have these clients keep what they have trained; what goes both ways where they meet counts as theirs."""
        weights = torch.eye(len(clients), dtype=torch.float64, device=self.job.device)
        return Heard(
            payload, weights, clients, [], sent=[2 * (self._partner(client) is not None) for client in clients]
        )

    def _partner(self, client: int) -> tuple[int, bool] | None:
        """Return whom a client meets after the training that it ends now, and whether that fails; None for nobody."""
        to, lost = self._to(client)
        if not to:
            return None
        other = to[int(uniforms(self.job.graph.seed, Draw.PARTNER, client, len(self.ended[client])) * len(to))]
        return other, other in lost

    def _meet(self, ending: Sequence[int]) -> tuple[list[Edge], list[Edge]]:
        """Have each of these clients average with whom it meets, one after the other.

        Two of different processes do so in both. Returned are the edges of this process's own, and those that failed.
        """
        adapters, job = self.state.adapters, self.job
        edges, failed = list[Edge](), list[Edge]()
        for client in ending if self.kinds else ():
            if (partner := self._partner(client)) is None:
                continue
            other, fails = partner
            edge = metrics.as_edge(client, other)
            own = [end for end in edge if end in self.rows]
            if not own:
                continue
            places = self._places(own)
            _, both = self.carry(take(adapters, places), {end: [sum(edge) - end] for end in edge})
            ways, sent = torch.arange(2, device=job.device), select(both, self.kinds)
            found = [] if job.bound is None else bounds.refused(job.bound, stacked(both), stacked(sent), ways, 1 - ways)
            if client in own:
                tell(job, self.round, found, edge, edge, "they don't meet")
                (failed if fails or found else edges).append(edge)
            if fails or found:
                continue
            if other in own and other not in ending:  # it is in a training
                row = self.rows[other]
                self.under_way.started.setdefault(
                    other, {name: x[row : row + 1].clone() for name, x in adapters.items()}
                )
            for name, x in sent.items():
                adapters[name][places] = x.mean(0, keepdim=True).expand(len(own), *x.shape[1:])
        return sorted(edges), sorted(failed)

    def _share(self, own: Sent, other: Sent, heard: int, now: int) -> float:
        """Return how much a receiver takes of one of the messages that it has `heard` now."""
        ended = self.ended[own.sender]
        staleness = bisect_left(ended, now) - bisect_right(ended, other.began)
        exponent, directed = self.pushing.staleness_exponent, self.job.graph.directed
        return share(own.degree, heard, other.degree, staleness, exponent, directed=directed)

    def _places(self, clients: Sequence[int]) -> torch.Tensor:
        """Return the rows of clients of this process."""
        return torch.tensor([self.rows[client] for client in clients], device=self.job.device)

    def _to(self, client: int) -> To:
        """Return to whom a client sends what it trains now."""
        return self.sends_to(len(self.ended[client]))[client]

    def _began(self, client: int) -> int:
        return self.ended[client][-1] if self.ended[client] else 0

    def _end(self, client: int) -> int:
        """Return when a client ends the training that it is in."""
        return self._trained_at(client, self._began(client), len(self.ended[client]))

    def _ended(self, client: int, rounds: int) -> list[int]:
        """Return when a client ends its first so many trainings: a function of its own times alone."""
        found = list[int]()
        for own in range(rounds):
            found.append(self._trained_at(client, found[-1] if found else 0, own))
        return found

    def _trained_at(self, client: int, began: int, round: int) -> int:
        steps = range(round * self.job.local_steps, (round + 1) * self.job.local_steps)
        return self.clock.trained(client, began, steps, delay_s(self.job.faults, client, round))


def _sums(tensors: Tensors) -> Tensors:
    return {name: x.sum(0, dtype=torch.float64) for name, x in tensors.items()}


def _together(t: int, since: _Since, group: Group) -> RoundRecord:
    """Put together what happened between two records: of a client that ended several trainings the mean or the sum."""
    records = since.records
    phase = commonest([own for _, own in sorted(since.phases, key=lambda one: one[0])], group)
    by_client: dict[int, list[int]] = {}
    clients = [client for record in records for client in record.clients]
    for place, client in enumerate(clients):
        by_client.setdefault(client, []).append(place)

    def each(of: str, put: Callable[[list[float]], float]) -> list[float]:
        values = [value for record in records for value in getattr(record, of)]
        return [put([values[place] for place in by_client[client]]) for client in sorted(by_client)]

    def pairs(of: str) -> list[tuple[int, int]]:
        return sorted({pair for record in records for pair in getattr(record, of)})

    for record in records:
        since.seconds.update(record.seconds)
    return RoundRecord(
        round=t,
        train=sorted(phase.train),
        send=sorted(phase.send),
        clients=sorted(by_client),
        loss=each("loss", fmean),
        grad_norm=each("grad_norm", fmean),
        bytes_sent=[int(x) for x in each("bytes_sent", sum)],
        neighbours=[int(x) for x in each("neighbours", sum)],
        edges=pairs("edges"),
        failed_edges=pairs("failed_edges"),
        not_mixed=pairs("not_mixed"),
        out_of_phase=sorted({client for client, own in since.phases if own != phase}),
        neighbourhood_cross_term=None,
        diagnostics={},
        seconds=dict(since.seconds),
        spans=sorted(since.spans),
    )
