"""All edges of one end: their states, the payloads of its rounds and its deadlines, under the lock of the node.

`edge` says what is to be done, and here the clock is read and calls are cancelled. A payload stays at hand for another
round, and a verdict for many, so that a call that broke can be made again, by a peer that was started again too.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from peertune.identity.incarnation import Incarnation
from peertune.types import Tensors
from peertune.wire.codec import Layout, decode
from peertune.wire.edge import Action, Cancel, Edge, Step
from peertune.wire.framing import Outgoing
from peertune.wire.node import PROBE_S, Node
from peertune.wire.peer_pb2 import Verdict

KEPT_ROUNDS = 64  # whose outcomes are remembered
MARGIN_S = 2.0  # how much longer to wait for one that waits than it does itself, beside what its training then takes
SETTLE_S = 5.0  # how much longer a peer asks for a verdict that it should not go on without

_PART_BYTES = 2**30  # that are marked at a time: OpenSSL takes less than 2 GiB

PayloadCheck = Callable[[int, Tensors], str]
"""`check(client, tensors [1, …])`: why this isn't to be mixed; "" where it is."""

P = ParamSpec("P")


@dataclass(frozen=True)
class Own:
    """What this end sends in a round, and what it takes for it."""

    data: Outgoing
    like: Layout  # of what was sent, and of what comes from all but some
    check: PayloadCheck
    others: Mapping[int, Layout]  # of what comes from these
    packed: Mapping[int, Outgoing] = field(default_factory=dict)  # what these are sent in the data's place

    def sent(self, client: int) -> Outgoing:
        """What a client is sent."""
        return self.packed.get(client, self.data)

    def layout(self, client: int) -> Layout:
        """What a client must send."""
        return self.others.get(client, self.like)


@dataclass
class Meeting:
    """An edge in one round, and how long this end waits for the other."""

    edge: Edge = Edge()  # noqa: RUF009  # which can't be changed
    content: tuple[Incarnation, bytes] | None = None  # which start of the other end sent what first, as its mark
    began: float = 0.0  # when this end came to it, on the monotonic clock
    until: float = 0.0  # when this end gives up
    latest: float = 0.0  # to which that may be put off


class Meetings:
    """This end's edges by (round, client), `held`, and what they have in common; all of it under `node.changed`."""

    def __init__(self, node: Node, patience_s: float) -> None:
        self.node, self.patience_s = node, patience_s
        self.held: dict[tuple[int, int], Meeting] = {}
        self.own: dict[int, Own] = {}  # by round
        self.waiting: Counter[tuple[int, int]] = Counter()  # calls that wait for this end to be ready
        self.deadlines: dict[Any, float] = {}  # of calls that wait for the other end
        self.stopped_waiting = self.stopped = self._watching = False
        self._stopped_waiting_at = 0.0
        self._margin_s = MARGIN_S
        self._secret = AESGCM(AESGCM.generate_key(128))

    def do(
        self, meeting: Meeting, event: Callable[Concatenate[Edge, P], Step], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Action, ...]:
        """Bring an event to an edge; cancel what it says, and return what else is to be done."""
        with self.node.changed:
            edge, actions = event(meeting.edge, *args, **kwargs)
            if edge is not meeting.edge:
                meeting.edge = edge
                self.node.changed.notify_all()
            for action in actions:
                if isinstance(action, Cancel):
                    action.stream.cancel()
            return tuple(action for action in actions if not isinstance(action, Cancel))

    def begin(self, round: int, own: Own, clients: Sequence[int], trained_s: float) -> dict[int, Meeting]:
        """Have this end's payload of a round ready, which took so long to train; return the meetings with these."""
        self.keep_watch()
        now = time.monotonic()
        with self.node.changed:
            self._margin_s = MARGIN_S + 2 * trained_s  # one that waits in the round before has yet to train
            self.own = {t: kept for t, kept in self.own.items() if t >= round - 1} | {round: own}
            self.held = {key: kept for key, kept in self.held.items() if key[0] > round - KEPT_ROUNDS}
            meetings = {client: self.held.setdefault((round, client), Meeting()) for client in clients}
            for meeting in meetings.values():
                meeting.began, meeting.until, meeting.latest = now, now + self.patience_s, now + 2 * self.patience_s
            self.node.changed.notify_all()
        return meetings

    def taken(self, meeting: Meeting) -> tuple[bool, Tensors]:
        """Return whether an edge counts, and what it brought, which is kept for nobody else."""
        edge = meeting.edge
        meeting.edge = edge._replace(brought=None)
        return edge.verdict == Verdict.COUNTED, edge.brought

    def remember(self, round: int, counted: Collection[int], failed: Collection[int]) -> None:
        """Take up what became of an earlier round's edges, so that those who missed a verdict can still have it."""
        with self.node.changed:
            for verdict, clients in ((Verdict.COUNTED, counted), (Verdict.PASSED, failed)):
                self.held |= {(round, client): Meeting(Edge(verdict)) for client in clients}

    def of(self, round: int) -> list[Edge]:
        """Return the edges of a round."""
        with self.node.changed:
            return [meeting.edge for (t, _), meeting in self.held.items() if t == round]

    def unheard(self) -> set[tuple[int, int]]:
        """Return of which edges, of this round and the last, the caller may not have the verdict."""
        with self.node.changed:
            return {key for key, kept in self.held.items() if kept.edge.unheard and key[0] >= self.node.round - 1}

    def is_at(self, client: int, round: int) -> None:
        """Note that a client is in this round: it has left those before, with the verdicts of this end or without."""
        with self.node.changed:
            for (t, other), meeting in self.held.items():
                if other == client and t < round and meeting.edge.unheard:
                    self.do(meeting, Edge.heard)

    def look_at(
        self, client: int, meeting: Meeting, own: Own, speaks: Incarnation, received: memoryview
    ) -> tuple[Tensors, str]:
        """Return what came whole from a start of the other end, and why that isn't to be mixed; "" where it is.

        Raises WireError where it can't be read, CloneError where the same start has sent something else.
        """
        tensors = decode(received, own.layout(client))
        self._check_content(client, meeting, speaks, received)
        self.node.count_bytes(client, own.sent(client).total_bytes, len(received))
        return tensors, own.check(client, tensors)

    def _check_content(self, client: int, meeting: Meeting, speaks: Incarnation, received: memoryview) -> None:
        """Raise CloneError where one start of the other end has sent something else for this round."""
        if not speaks.number:
            return
        content = speaks, self._mark(received)
        with self.node.changed:
            if meeting.content is None or meeting.content[0] != speaks:
                meeting.content = content
            same = meeting.content == content
        if not same:
            said = f"start {speaks.number} sends two contents in one round"
            self.node.refuse_clone(client, f"two processes with its key: {said}")

    def _mark(self, received: memoryview) -> bytes:
        """Return what two contents share with odds of 2⁻¹⁰⁰, whoever chose them: a GMAC by a secret that never leaves.

        It takes a sixth of SHA-256's time, which was a fifth of a swap's.
        """
        parts = range(0, len(received), _PART_BYTES)
        tags = (self._secret.encrypt(at.to_bytes(12), b"", received[at : at + _PART_BYTES]) for at in parts)
        return b"".join(tags)

    # ---- time

    def last(self, client: int, meeting: Meeting) -> float:
        """Return when this end gives up, on the monotonic clock: soon, for as long as the other is given up."""
        if meeting.edge.pledged:  # what the other end decided must be known, if it can be
            return (self._stopped_waiting_at if self.stopped_waiting else meeting.latest) + SETTLE_S
        if self.stopped_waiting:
            return self._stopped_waiting_at
        return min(meeting.until, meeting.began + PROBE_S) if self.node.known(client).given_up else meeting.until

    def over(self, client: int, meeting: Meeting) -> bool:
        """Whether nothing more is to be tried."""
        edge = meeting.edge
        return edge.verdict is not None or edge.final or time.monotonic() >= self.last(client, meeting)

    def left_s(self) -> float:
        """Return how long this end will still wait for somebody in its round."""
        with self.node.changed:
            open_now = (m for (t, _), m in self.held.items() if t == self.node.round and m.edge.verdict is None)
            return max(0.0, max((meeting.until - time.monotonic() for meeting in open_now), default=0.0))

    def put_off(self, meeting: Meeting, left_s: float) -> None:
        """Wait for one that waits itself for so long: it must not be given up for waiting as long as this end would."""
        longer = time.monotonic() + left_s + self._margin_s
        meeting.until = min(max(meeting.until, longer), max(meeting.until, meeting.latest))

    def wait(self, client: int, meeting: Meeting, seconds: float) -> None:
        """Wait so long for what may settle a meeting, but not after it is over."""
        until = time.monotonic() + seconds
        with self.node.changed:
            while meeting.edge.verdict is None:
                left = min(until, self.last(client, meeting)) - time.monotonic()
                if left <= 0 or (self.stopped_waiting and not meeting.edge.pledged):
                    return
                self.node.changed.wait(left)

    @contextmanager
    def awaited(self, round: int, client: int) -> Iterator[None]:
        """Have it known that a call of this client waits for this end to come to a round."""
        with self.node.changed:
            self.waiting[round, client] += 1
        try:
            yield
        finally:
            with self.node.changed:
                self.waiting[round, client] -= 1
                self.waiting += Counter()  # which keeps what is above 0

    def stop_waiting(self) -> None:
        """Wait for nobody any more, but for verdicts on what is pledged."""
        with self.node.changed:
            self.stopped_waiting, self._stopped_waiting_at = True, time.monotonic()
            for meeting in self.held.values():
                self.do(meeting, Edge.stopped_waiting)
            self.node.changed.notify_all()

    def stop(self, linger_s: float) -> None:
        """Be done, once those who need a verdict of this end have it, or so many seconds are over."""
        with self.node.changed:
            self.node.changed.wait_for(lambda: self.stopped_waiting or not self.unheard(), timeout=linger_s)
            self.stopped = True
            self.node.changed.notify_all()

    def keep_watch(self) -> None:
        """Cut off from here on what lasts too long."""
        with self.node.changed:
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, name="swap-watch", daemon=True).start()

    def _watch(self) -> None:
        """Cut off callers that stall, and calls of this end that have lasted too long."""
        while True:
            with self.node.changed:
                if self.node.changed.wait_for(lambda: self.stopped, timeout=1.0):
                    return
                now = time.monotonic()
                late = [context for context, deadline in self.deadlines.items() if now > deadline]
                for (_, client), meeting in self.held.items():
                    if meeting.edge.verdict is None and now > self.last(client, meeting):
                        late += meeting.edge.calls
            for call in late:
                call.cancel()
