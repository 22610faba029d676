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

The weight of what is old is AEDFL's (arXiv 2312.10935) up to its form, which is ours; a = 0 mixes as if nothing were.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from heapq import heapify, heappop, heappush
from math import sqrt
from statistics import fmean, median_low
from typing import NamedTuple

import torch

from peertune.method import Phase
from peertune.randomness import Draw, uniforms
from peertune.rounds import best, bounds, metrics
from peertune.rounds.clock import NS, Span
from peertune.rounds.record import RoundRecord, Watch
from peertune.rounds.round import Begun, Heard, Job, Refuse, end, is_due, tell, turn_of
from peertune.rounds.shares import as_weights
from peertune.rounds.turns import Came, Turn, train
from peertune.topology import delay_s
from peertune.topology.pushes import rows, sends_to, share
from peertune.types import State, Tensors, payload_bytes, select

Edge = tuple[int, int]


class _Post(NamedTuple):
    """What a client sent after a training."""

    sender: int
    version: int  # the sender's own round
    degree: int  # to how many it was sent
    began: int  # when its training began
    tensors: Tensors  # [1, …], as they are read


class _Done(NamedTuple):
    """A training that is computed and has not ended: what its client holds when it does, `[1, …]`."""

    state: State
    loss: float
    grad_norm: float


@dataclass
class _Since:
    """What has happened since the last record."""

    records: list[RoundRecord] = field(default_factory=list)  # of those who ended a training at one time
    phases: list[tuple[int, Phase]] = field(default_factory=list)  # of each training, with its client
    spans: list[Span] = field(default_factory=list)
    moved: Tensors = field(default_factory=dict)  # by how much mixing moved the sum of all adapters, [1, …]


def run_asynchronous(job: Job) -> Iterator[RoundRecord]:
    """Run what is left of a job, and yield a record, with the state, after every n trainings.

    The state has in `under_way` what is computed and what is sent: resuming from it gives the same bits.
    """
    course = _Course(replace(job, state=job.state.clone()))
    while course.state.round < job.rounds:
        yield course.next_record()


class _Course:
    """The course of an asynchronous run: what the clients hold, when each ends its training, and what is on its way."""

    def __init__(self, job: Job) -> None:
        assert job.clock is not None, "clients that wait for nobody have times"
        assert job.pushing is not None, "and a way to mix"
        self.job, self.clock, self.pushing, self.state = job, job.clock, job.pushing, job.state
        self.sends_to = lru_cache(maxsize=256)(partial(sends_to, job.graph, job.faults))
        self.ended = [self._ended(client, int(rounds)) for client, rounds in enumerate(self.state.rounds)]
        self.ends = [(self._end(client), client) for client in job.clients]
        heapify(self.ends)
        self.common_ns = median_low([self._ended(client, 1)[0] for client in job.clients])  # a round of common time
        self.done: dict[int, _Done] = {}
        self.mail: list[dict[int, list[tuple[int, _Post]]]] = [{} for _ in job.clients]  # sender → what comes when
        self.started: dict[int, Tensors] = {}  # what those are training from who have met somebody since, [1, …]
        self.seconds = 0.0  # of training that no record has yet
        self._unpack(self.state.under_way)

    def next_record(self) -> RoundRecord:
        """Let things happen until the clients have ended n more trainings than at the last record."""
        t, since, now = self.state.round, _Since(), 0
        while self.state.round == t:
            now = self._next_event(since)
        watch = Watch(0.0)
        diagnostics = metrics.diagnostics(metrics.Before({}, {}), self.state.adapters)
        diagnostics["mean_drift"] = (
            sqrt(sum(float(x.square().sum()) for x in since.moved.values())) / self.state.clients
        )
        watch.lap("metrics")
        evaluation = None
        if is_due(self.job, t):
            evaluation = self.job.evaluate(self.state.adapters, self.job.clients)
            kept = best.keep(self.state, evaluation, t)
            evaluation = replace(evaluation, best_rounds=kept)
            watch.lap("evaluate")
        state = replace(self.state, under_way=self._packed())
        record = _together(t, since, watch.seconds)
        return replace(record, diagnostics=diagnostics, evaluation=evaluation, time_s=now / NS, state=state)

    def _next_event(self, since: _Since) -> int:
        """Let those who end a training next send it, mix, and begin another one; return when that is."""
        now, ending = self.ends[0][0], list[int]()
        while self.ends and self.ends[0][0] == now:
            ending.append(heappop(self.ends)[1])
        came, part = self._trained(ending)
        turn, before = self._turn(part, ending), _sums(part.adapters)
        begun = Begun(turn, ending, self.state.round, Counter(turn.phases).most_common(1)[0][0])
        exchange = self._keep if self.pushing.pairwise else self._exchange
        part, record = end(self.job, begun, came, partial(exchange, ending, now), common=False)
        for name, x in _sums(part.adapters).items():
            since.moved[name] = since.moved.get(name, 0) + x - before[name]
        since.spans += [Span(client, self._began(client) / NS, now / NS, now / NS, -1) for client in ending]
        self.state.put(torch.tensor(ending, device=self.job.device), part)
        if self.pushing.pairwise:
            edges, failed = self._meet(ending, turn.phases)
            record = replace(record, edges=edges, failed_edges=failed)
        since.records.append(record)
        since.phases += zip(ending, turn.phases, strict=True)
        for client in ending:
            self.ended[client].append(now)
            heappush(self.ends, (self._end(client), client))
        return now

    def _trained(self, clients: Sequence[int]) -> tuple[Came, State]:
        """Return what the local steps of these clients came to, and what they hold after them."""
        if not self.done.keys() >= {*clients}:
            self._train([client for client in self.job.clients if client not in self.done])
        done = [self.done.pop(client) for client in clients]
        seconds, self.seconds = self.seconds, 0.0
        loss, norm = torch.tensor([(one.loss, one.grad_norm) for one in done], dtype=torch.float64).T
        state = State.of([one.state for one in done])
        for row, client in enumerate(clients):
            for name, x in self.started.pop(client, {}).items():
                own, held = (part.adapters[name][k : k + 1] for part, k in ((state, row), (self.state, client)))
                own.sub_(x).add_(held)
        return Came(loss, norm, seconds), state

    def _train(self, clients: list[int]) -> None:
        """Do the local steps of these clients in one pass, on copies of what they hold."""
        held = replace(self.state, memory=best.beside(self.state.memory), under_way={})
        part = held.take(torch.tensor(clients, device=self.job.device))
        for row, client in enumerate(clients):
            for name, x in self.started.get(client, {}).items():
                part.adapters[name][row : row + 1] = x
        turn = self._turn(part, clients)
        (came,) = train([turn])
        if isinstance(came, Exception):
            raise came
        self.seconds += came.seconds
        for row, client in enumerate(clients):
            one = turn.state.take(slice(row, row + 1))
            self.done[client] = _Done(one, float(came.loss[row]), float(came.grad_norm[row]))

    def _turn(self, state: State, clients: Sequence[int]) -> Turn:
        """Return what these clients train, in the phases of their own rounds or of common time."""
        common = torch.tensor([self._began(client) // self.common_ns for client in clients])
        return turn_of(self.job, state, clients, common if self.pushing.common_phases else None)

    def _exchange(self, clients: Sequence[int], now: int, payload: Tensors, t: int, refuse: Refuse) -> Heard:
        """Send what these clients have trained, and open their mailboxes."""
        posts: dict[tuple[int, int], _Post] = {}
        failed, arrives = list[tuple[int, int]](), self.clock.arrives(now, payload_bytes(payload))
        for row, client in enumerate(clients):
            version = len(self.ended[client])
            to, lost = self.sends_to(version)[client] if payload else ([], [])
            tensors = self.job.read({name: x[row : row + 1].clone() for name, x in payload.items()}, version)
            post = posts[client, -version] = _Post(client, version, len(to), self._began(client), tensors)
            failed += [metrics.as_edge(client, other, self.job.graph.directed) for other in lost]
            for receiver in to:
                if receiver not in lost:
                    coming = self.mail[receiver].setdefault(client, [])
                    coming.append((arrives, post))
                    del coming[: max(0, _here(coming, now) - 1)]  # a mailbox holds the newest alone
        own = [*posts.values()]
        opened = [self._open(client, now) for client in clients]
        posts |= {(post.sender, -post.version): post for each in opened for post in each}
        order = sorted(posts)  # by sender, the newest first, which is its own where it is a receiver
        place = {key: at for at, key in enumerate(order)}
        tensors = {name: torch.cat([posts[key].tensors[name] for key in order]) for name in payload}
        among = [sender for sender, _ in order]
        takes = {  # receiver, place among the heard → share
            (row, place[other.sender, -other.version]): self._share(post, other, len(heard), now)
            for row, (post, heard) in enumerate(zip(own, opened, strict=True))
            for other in heard
        }
        pairs = torch.tensor([*takes], dtype=torch.int64, device=self.job.device).view(-1, 2)
        if takes and (refused := refuse(tensors, pairs[:, 0], pairs[:, 1])):
            tell(self.job, t, refused, clients, among, "it is left out")
            failed += [metrics.as_edge(among[j], clients[i], self.job.graph.directed) for i, j, _ in refused]
            for i, j, _ in refused:
                del takes[i, j]
        weights = rows(clients, among, takes, directed=self.job.graph.directed)
        sent = [post.degree for post in own]
        return Heard(tensors, as_weights(weights, self.job.device), among, sorted({*failed}), sent=sent)

    def _keep(self, clients: Sequence[int], now: int, payload: Tensors, t: int, refuse: Refuse) -> Heard:
        """Have these clients keep what they have trained; what goes both ways where they meet counts as theirs."""
        weights = torch.eye(len(clients), dtype=torch.float64, device=self.job.device)
        return Heard(
            payload, weights, clients, [], sent=[2 * (self._partner(client) is not None) for client in clients]
        )

    def _partner(self, client: int) -> tuple[int, bool] | None:
        """Return whom a client meets after the training that it ends now, and whether that fails; None for nobody."""
        version = len(self.ended[client])
        to, lost = self.sends_to(version)[client]
        if not to:
            return None
        other = to[int(uniforms(self.job.graph.seed, Draw.PARTNER, client, version) * len(to))]
        return other, other in lost

    def _meet(self, clients: Sequence[int], phases: Sequence[Phase]) -> tuple[list[Edge], list[Edge]]:
        """Have each of these clients average with whom it meets, one after the other; return edges, and failed ones."""
        adapters, job = self.state.adapters, self.job
        edges, failed = list[Edge](), list[Edge]()
        for client, phase in zip(clients, phases, strict=True):
            if not phase.send or (partner := self._partner(client)) is None:
                continue
            other, fails = partner
            edge = metrics.as_edge(client, other)
            rows = torch.tensor(edge, device=job.device)
            both, ways = {name: x[rows] for name, x in adapters.items()}, torch.arange(2, device=job.device)
            found = (
                [] if job.bound is None else bounds.refused(job.bound, both, select(both, phase.send), ways, 1 - ways)
            )
            tell(job, self.state.round, found, edge, edge, "they don't meet")
            if fails or found:
                failed.append(edge)
                continue
            if other not in clients:  # it is in a training
                self.started.setdefault(other, {name: x[other : other + 1].clone() for name, x in adapters.items()})
            for name, x in select(both, phase.send).items():
                adapters[name][rows] = x.mean(0, keepdim=True).expand_as(x)
            edges.append(edge)
        return sorted(edges), sorted(failed)

    def _open(self, receiver: int, now: int) -> list[_Post]:
        """Return the newest message of each neighbour that has come, by sender, and empty the mailbox of what has."""
        found = []
        for _, coming in sorted(self.mail[receiver].items()):
            if here := _here(coming, now):
                found.append(coming[here - 1][1])
                del coming[:here]
        return found

    def _share(self, own: _Post, other: _Post, heard: int, now: int) -> float:
        """Return how much a receiver takes of one of the messages that it has `heard` now."""
        ended = self.ended[own.sender]
        staleness = bisect_left(ended, now) - bisect_right(ended, other.began)
        exponent, directed = self.pushing.staleness_exponent, self.job.graph.directed
        return share(own.degree, heard, other.degree, staleness, exponent, directed=directed)

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

    def _packed(self) -> Tensors:
        """Return as tensors what is computed and what is sent; see `_unpack`."""
        coming = [
            (k, at, post) for k, mail in enumerate(self.mail) for _, each in sorted(mail.items()) for at, post in each
        ]
        posts = {(post.sender, post.version): post for _, _, post in coming}
        place = {key: at for at, key in enumerate(posts)}
        messages = [(receiver, place[post.sender, post.version], at) for receiver, at, post in coming]
        found = {
            "messages": torch.tensor(messages, dtype=torch.int64).view(-1, 3),
            "posts": torch.tensor([post[:4] for post in posts.values()], dtype=torch.int64).view(-1, 4),
            "done": torch.tensor([*self.done], dtype=torch.int64),
            "started": torch.tensor([*self.started], dtype=torch.int64),
        }
        if self.started:
            parts = [*self.started.values()]
            found |= {f"started/{name}": torch.cat([part[name] for part in parts]) for name in parts[0]}
        if posts:
            names = next(iter(posts.values())).tensors
            found |= {f"post/{name}": torch.cat([post.tensors[name] for post in posts.values()]) for name in names}
        if self.done:
            done = State.of([one.state for one in self.done.values()])
            measured = [(one.loss, one.grad_norm) for one in self.done.values()]
            found |= {"measured": torch.tensor(measured, dtype=torch.float64)}
            for part in ("adapters", "moments", "memory"):
                found |= {f"{part}/{name}": x for name, x in getattr(done, part).items()}
        return found

    def _unpack(self, found: Tensors) -> None:
        """Take up what was computed and sent before the run was stopped."""
        if not found:
            return
        held = {of: getattr(self.state, of) for of in ("adapters", "moments", "memory")}
        parts = {  # in the order in which the state has them: norms then add up to the same bits
            of: {name: found[f"{of}/{name}"] for name in names if f"{of}/{name}" in found}
            for of, names in (held | {"post": self.state.adapters}).items()
        }
        posts = [
            _Post(sender, version, degree, began, {name: x[row : row + 1] for name, x in parts["post"].items()})
            for row, (sender, version, degree, began) in enumerate(found["posts"].tolist())
        ]
        for receiver, row, at in found["messages"].tolist():
            self.mail[receiver].setdefault(posts[row].sender, []).append((at, posts[row]))
        started = {name: found[f"started/{name}"] for name in self.state.adapters if f"started/{name}" in found}
        for row, client in enumerate(found["started"].tolist() if "started" in found else []):
            self.started[client] = {name: x[row : row + 1].clone() for name, x in started.items()}
        for row, client in enumerate(found["done"].tolist()):
            own = (
                {name: x[row : row + 1] for name, x in parts[of].items()} for of in ("adapters", "moments", "memory")
            )
            adapters, moments, memory = own
            state = State(adapters, moments, self.state.rounds[client : client + 1].clone(), memory)
            self.done[client] = _Done(state, *found["measured"][row].tolist())


def _here(coming: Sequence[tuple[int, _Post]], now: int) -> int:
    """Return how many of some messages have come."""
    return bisect_right(coming, now, key=lambda message: message[0])


def _sums(tensors: Tensors) -> Tensors:
    return {name: x.sum(0, dtype=torch.float64) for name, x in tensors.items()}


def _together(t: int, since: _Since, seconds: Mapping[str, float]) -> RoundRecord:
    """Put together what happened between two records: of a client that ended several trainings the mean or the sum."""
    records, phase = since.records, Counter(phase for _, phase in since.phases).most_common(1)[0][0]
    by_client: dict[int, list[int]] = {}
    clients = [client for record in records for client in record.clients]
    for place, client in enumerate(clients):
        by_client.setdefault(client, []).append(place)

    def each(of: str, put: Callable[[list[float]], float]) -> list[float]:
        values = [value for record in records for value in getattr(record, of)]
        return [put([values[place] for place in by_client[client]]) for client in sorted(by_client)]

    def pairs(of: str) -> list[tuple[int, int]]:
        return sorted({pair for record in records for pair in getattr(record, of)})

    spent: Counter[str] = Counter(seconds)
    for record in records:
        spent.update(record.seconds)
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
        seconds=dict(spent),
        spans=since.spans,
    )
