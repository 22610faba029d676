"""Swapping adapters with neighbours: one call for each active edge and round, after which both ends know if it counts.

A swap is decided in one place. The caller sends its payload and, once it holds the other's, says so; then the called
peer alone decides, and its verdict settles the edge for both. What is decided stays decided, and a payload stays at
hand for another round, so every step can be repeated: a call that breaks is made again, a caller that missed the
verdict asks for it, and a peer that was killed in the middle of a round makes the same round again with those that have
counted it. `edge` decides, `calling` and `answering` carry, `meeting` keeps. docs/wire.md has the protocol.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from peertune.allowance import one_line
from peertune.errors import PeertuneError
from peertune.identity.incarnation import Incarnation
from peertune.identity.membership import Membership
from peertune.method import Phase
from peertune.topology import Fault
from peertune.types import Tensors
from peertune.wire import tls
from peertune.wire.answering import Answering
from peertune.wire.calling import Calling, at_once
from peertune.wire.codec import layout
from peertune.wire.framing import outgoing
from peertune.wire.mailbox import Letter, Mailbox
from peertune.wire.meeting import Meetings, Own, PayloadCheck
from peertune.wire.node import PROBE_S, Neighbour, Node, SeatError, UnusableError, nobody
from peertune.wire.outbox import Outbox, Parcel
from peertune.wire.peer_pb2 import Hello
from peertune.wire.rpc import grpc

LINGER_S = 10.0  # how long a peer that is done answers those who may have missed its last verdicts


@dataclass(frozen=True)
class Progress:
    """Where this peer is."""

    doing: str  # starting, training, swapping, waiting or mixing
    round: int
    step: int  # local steps done
    phase: Phase | None  # what the round trains and sends; None where nobody has said


class Swapper(Node):
    """One peer's end of all its edges: what it answers, and the calls that it makes itself.

    `agreed` is what must be the same at all peers. `patience_s` is how long a round waits for a neighbour. A planned
    fault cuts the wire itself: a dropped edge in the middle of its payload, a peer that is down for whoever calls.
    There is room for the calls of `seats` members, or as many as the roster has, if those are more. `known` is what
    this peer knew of others when it last ran, `incarnation` which of its starts this is.
    """

    def __init__(
        self,
        membership: Membership,
        agreed: Mapping[str, str],
        *,
        patience_s: float,
        faults: Sequence[Fault] = (),
        insecure: bool = False,
        seats: int = 0,
        known: Mapping[int, Neighbour] | None = None,
        incarnation: Incarnation | None = None,
    ) -> None:
        super().__init__(membership, agreed, insecure=insecure, known=known, incarnation=incarnation)
        seats = max(seats, len(membership.current()[1].members))
        self.meetings = Meetings(self, patience_s)
        self.calling = Calling(self.meetings)
        self.answering = Answering(self.meetings, faults, seats)
        self.outbox = Outbox(self.meetings)
        self._entered = time.monotonic()
        self._doing = "starting"
        self._phase: Phase | None = None

    def start(self, address: str) -> int:
        """Answer calls at `address` (host:port; with TLS port 0 for any) and return the port. Raises PeertuneError.

        Until the first round is entered it answers only those who try whether they get through; to all others nobody
        is here.
        """
        return self.answering.start(address)

    def enter(self, round: int, phase: Phase | None = None) -> None:
        """Say that this peer works on `round` now, and what the round trains and sends."""
        with self.changed:
            self.round, self.step, self._doing, self._phase = round, 0, "training", phase
            self._entered, self.answering.open = time.monotonic(), True
            self.changed.notify_all()

    def stepped(self, steps: int) -> None:
        """Say how many local steps of the round are done."""
        self.step = steps

    def swap(
        self,
        round: int,
        payload: Tensors,
        neighbours: Sequence[int],
        check: PayloadCheck = lambda client, tensors: "",
        layouts: Mapping[int, Tensors] = MappingProxyType({}),
        packed: Mapping[int, Tensors] = MappingProxyType({}),
    ) -> dict[int, Tensors]:
        """Swap `payload [1, …]` with these clients and return what came, `[1, …]` each, of those whose edge counts.

        `layouts` says of clients whose payload isn't like this one what they send, `[1, …]`, by shapes and types alone.
        `packed` is what clients are sent in its place; what they send is like it.
        What `check` has something to say against costs the edge at both ends. It is called from several threads.
        Waits for a neighbour at most `patience_s`; for one that is itself waiting for somebody, a little longer than
        it will; for one that it gave up before, PROBE_S, unless that is heard meanwhile; for one that can't be reached
        at all, not.
        """
        expected = {client: layout(tensors) for client, tensors in (*packed.items(), *layouts.items())}
        each = {client: outgoing(tensors) for client, tensors in packed.items()}
        own = Own(outgoing({} if packed else payload), layout(payload), check, expected, each)
        with self.changed:
            self.round, self._doing, self.answering.open = round, "swapping", True
            meetings = self.meetings.begin(round, own, neighbours, time.monotonic() - self._entered)
        at_once(lambda client: self.calling.meet(round, client, meetings[client]), meetings)
        heard = {}
        with self.changed:
            for client, meeting in meetings.items():
                known = self.known(client)
                counts, tensors = self.meetings.taken(meeting)
                if counts:
                    heard[client] = tensors
                    known.up += 1
                else:
                    known.down += not self.vacant(client)
            self._doing = "mixing"
        return heard

    def receive(self, mailbox: Mailbox) -> None:
        """Take what is pushed into this mailbox from here on: this peer waits for nobody."""
        self.answering.mailbox = mailbox

    def push(self, version: int, degree: int, payload: Tensors, clients: Sequence[int]) -> list[int]:
        """Have `payload [1, …]` pushed to these clients, and go on; return those whom the last one has not reached.

        It is of the training that was entered last. `degree` says to how many it goes, of whom some may be planned not
        to get it.
        """
        return self.outbox.push(Parcel(version, degree, self._entered, outgoing(payload)), clients) if clients else []

    def letters(self) -> list[Letter]:
        """Return what was pushed since the last time, the newest of each neighbour, by client."""
        with self.changed:
            self._doing = "mixing"
            return [] if self.answering.mailbox is None else self.answering.mailbox.open()

    @property
    def start_number(self) -> int:
        """Which of its starts this peer says that it is."""
        return self._incarnation.number

    def note_mixed(self, not_mixed: Iterable[int], taken: Iterable[tuple[int, float, float]]) -> None:
        """Note for `peer status` of whom nothing was mixed, and what was taken of whom, as a record says it."""
        for client in not_mixed:
            self.known(client).unmixed += 1
        for client, had, took in taken:
            self.known(client).taken = took / had

    def remember(self, round: int, counted: Collection[int], failed: Collection[int]) -> None:
        """Take up what became of an earlier round's edges, so that those who missed a verdict can still have it."""
        self.meetings.remember(round, counted, failed)

    def passed_by(self, round: int) -> bool:
        """Whether a neighbour has said that it went on from this round without this peer."""
        return any(edge.missed for edge in self.meetings.of(round))

    def ask_rounds(self, clients: Sequence[int], wait_s: float = PROBE_S) -> dict[int, int]:
        """Ask these clients where they are; return the rounds of those that answer."""
        return {client: came for client, came in self.calling.ask(clients, wait_s).items() if isinstance(came, int)}

    def refusals(self, clients: Sequence[int], wait_s: float = PROBE_S) -> dict[str, str]:
        """Ask these clients whether they refuse this peer; return the names of those that do, and why.

        Nobody where one of them takes it, or where no more than half of those who have a seat refuse: none of several
        neighbours can tell alone that a peer is shut out.
        """
        roster = self.membership.current()[1]
        seats = [client for client in clients if not nobody(roster.by_client(client))]
        came = self.calling.ask(seats, wait_s)
        refusals: dict[str, str] = {}

        def look(client: int) -> None:
            error, member = came[client], roster.by_client(client)
            if isinstance(error, UnusableError) and not isinstance(error, SeatError):
                refusals[self.name(client)] = str(error)
            elif isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAUTHENTICATED:
                refusals[self.name(client)] = one_line(error.details())
            elif isinstance(error, grpc.RpcError) and not self.insecure and member and tls.is_there(member, wait_s):
                try:
                    self.probe(client, wait_s)  # which those answer, too, who are only starting
                except PeertuneError:
                    refusals[self.name(client)] = "ends the handshake with this peer: revoked, or one roster is old"

        if not any(isinstance(one, int) for one in came.values()):
            at_once(look, came)
        return dict(sorted(refusals.items())) if 2 * len(refusals) > len(seats) else {}

    def say_done(self, clients: Sequence[int]) -> None:
        """Deliver what is due, and tell these clients that nothing need be pushed here any more."""
        self.outbox.close(self._linger_s)
        self.calling.ask([client for client in clients if not self.over(client)], PROBE_S, Hello.DONE)

    def over(self, client: int) -> bool:
        """Whether there is nobody to push to: on this seat is nobody, or one that has said that it is done."""
        return self.vacant(client) or self.known(client).done

    def vacant(self, client: int) -> bool:
        """Whether nobody is on this seat, so that there is no edge to fail."""
        member = self.membership.current()[1].by_client(client)
        return member is None or not member.certificates

    def progress(self) -> Progress:
        """Return where this peer is."""
        with self.changed:
            still = [edge for edge in self.meetings.of(self.round) if edge.verdict is None]
            waits = self._doing == "swapping" and still and not any(edge.streams for edge in still)
            return Progress("waiting" if waits else self._doing, self.round, self.step, self._phase)

    @property
    def patience_s(self) -> float:
        """How long a round waits for a neighbour."""
        return self.meetings.patience_s

    @property
    def _linger_s(self) -> float:
        return min(LINGER_S, self.patience_s)

    @property
    def stopped_waiting(self) -> bool:
        """Whether this peer has been told to wait for nobody."""
        return self.meetings.stopped_waiting

    def pause(self, seconds: float) -> None:
        """Wait so long, or until told to stop waiting."""
        with self.changed:
            self._doing = "waiting"
            self.changed.wait_for(lambda: self.stopped_waiting, timeout=seconds)

    def stop_waiting(self) -> None:
        """Wait for nobody any more, in this swap and all that follow."""
        self.meetings.stop_waiting()

    def stop(self) -> None:
        """Answer no more calls, once those that need a verdict or a message of ours have it, or LINGER_S are over."""
        self.outbox.close(self._linger_s)
        self.meetings.stop(self._linger_s)
        self.answering.stop()
        self.close()
