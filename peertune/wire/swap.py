"""Swapping adapters with neighbours: one call for each active edge and round, after which both ends know if it counts.

A swap is decided in one place. The caller sends its payload and, once it holds the other's, says so; then the called
peer alone decides, and its verdict settles the edge for both. What is decided stays decided, and a payload stays at
hand for another round, so every step can be repeated: a call that breaks is made again, a caller that missed the
verdict asks for it, and a peer that was killed in the middle of a round makes the same round again with those that have
counted it. docs/wire.md has the protocol.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from queue import SimpleQueue
from typing import Any

from peertune.allowance import line
from peertune.errors import PeertuneError, WireError
from peertune.identity.incarnation import Incarnation
from peertune.identity.membership import Membership
from peertune.topology import Fault, clients_down
from peertune.types import Phase, Tensors
from peertune.wire import limits, tls
from peertune.wire.codec import Assembler, Layout, chunks, decode, encode, layout
from peertune.wire.framing import Part, data_of, kind, pack, unpack
from peertune.wire.node import OPTIONS, PROBE_S, SERVICE, Neighbour, Node, SeatError, UnusableError, nobody
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict, Wait
from peertune.wire.rpc import grpc

log = logging.getLogger(__name__)

STREAMS = 3  # of one client at a time: each end may call, and ask something beside
KEPT_ROUNDS = 64  # whose outcomes are remembered
FIRST_CALL_S = 1.0  # how long the higher number leaves the first call to the lower
MARGIN_S = 2.0  # how much longer to wait for one that waits than it does itself, beside what its training then takes
STALL_S = 30.0  # after which a caller that says nothing is cut off
LINGER_S = 10.0  # how long a peer that is done answers those who may have missed its last verdicts
RETRY_S = 0.2
SETTLE_S = 5.0  # how much longer a peer asks for a verdict that it should not go on without
STILL_HERE_S = 0.5  # between signs of life to a caller that waits


Check = Callable[[int, Tensors], str]
"""`check(client, tensors [1, …])`: why this isn't to be mixed; "" where it is."""


@dataclass(frozen=True)
class Progress:
    """Where this peer is."""

    doing: str  # starting, training, swapping, waiting or mixing
    round: int
    step: int  # local steps done
    phase: Phase | None  # what the round trains and sends; None where nobody has said


@dataclass
class _Meeting:
    """An edge in one round, at this end."""

    verdict: "Verdict.Outcome | None" = None  # COUNTED or PASSED, once; None while it is open
    tensors: Tensors | None = None
    content: tuple[Incarnation, bytes] | None = None  # which start of the other end sent what first, as SHA-256
    pledged: bool = False  # the other end may have counted it: only its verdict can tell
    streams: int = 0  # through which payloads may be travelling now
    final: bool = False  # tried, and not to be tried again
    missed: bool = False  # the other end went on without this one
    began: float = 0.0  # when this end came to it, on the monotonic clock
    until: float = 0.0  # when this end gives up
    latest: float = 0.0  # to which that may be put off
    calls: list[Any] = field(default_factory=list)  # to be cancelled once it is settled


@dataclass(frozen=True)
class _Offer:
    data: bytes
    layout: Layout
    check: Check


class _GoneError(Exception):
    """The caller hung up."""


class Swapper(Node):
    """One peer's end of all its edges: a server that answers, and the calls it makes itself.

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
        self._seats = max(seats, len(membership.current()[1].members))
        self._patience_s, self._faults = patience_s, faults
        self._step = 0
        self._offers: dict[int, _Offer] = {}
        self._meetings: dict[tuple[int, int], _Meeting] = {}
        self._serving: Counter[int] = Counter()  # streams by client
        self._deadlines: dict[Any, float] = {}  # of calls that wait for the other end
        self._unheard: set[tuple[int, int]] = set()  # verdicts of ours that the caller may not have
        self._waiting: dict[tuple[int, int], int] = {}  # calls that wait for this end to be ready
        self._hurried = self._stopped = self._open = self._watching = self._echo_only = False
        self._hurried_at = 0.0
        self._entered, self._margin_s = time.monotonic(), MARGIN_S
        self._doing = "starting"
        self._phase: Phase | None = None
        self._server: Any = None

    # ---- what the engine calls

    def start(self, address: str, *, echo_only: bool = False) -> int:
        """Answer calls at `address` (host:port, port 0 for any) and return the port. Raises PeertuneError.

        Until the first round is entered, or with `echo_only`, it answers only those who try whether they get through;
        to all others nobody is here.
        """
        self._echo_only = echo_only
        workers = 4 + STREAMS * self._seats
        self._server = grpc.server(
            ThreadPoolExecutor(workers, thread_name_prefix="swap"),
            options=[*OPTIONS, *limits.of_connections(self._seats)],
            maximum_concurrent_rpcs=workers,
        )
        handler = grpc.stream_stream_rpc_method_handler(
            self._answer, request_deserializer=unpack, response_serializer=pack
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Swap": handler}),))
        try:
            if self._insecure:
                tls.check_loopback(address)
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, tls.server_credentials(self.membership.current))
        except RuntimeError:
            raise PeertuneError(
                f"{address}: can't be listened at; give an address of this machine and a free port"
            ) from None
        self._server.start()
        self._keep_watch()
        return int(port)

    def enter(self, round: int, phase: Phase | None = None) -> None:
        """Say that this peer works on `round` now, and what the round trains and sends."""
        with self._changed:
            self._round, self._step, self._doing, self._phase = round, 0, "training", phase
            self._entered, self._open = time.monotonic(), True
            self._changed.notify_all()

    def stepped(self) -> None:
        """Say that another local step is done."""
        self._step += 1

    def swap(
        self,
        round: int,
        payload: Tensors,
        neighbours: Sequence[int],
        nan_in: Collection[str] = (),
        check: Check = lambda client, tensors: "",
    ) -> dict[int, Tensors]:
        """Swap `payload [1, …]` with these clients and return what came, `[1, …]` each, of those whose edge counts.

        What `check` has something to say against costs the edge at both ends. It is called from several threads.
        Waits for a neighbour at most `patience_s`; for one that is itself waiting for somebody, a little longer than
        it will; for one that it gave up before, PROBE_S, unless that is heard meanwhile; for one that can't be reached
        at all, not.
        """
        self._keep_watch()
        offer = _Offer(encode(payload), layout(payload, nan_in), check)
        now = time.monotonic()
        with self._changed:
            self._round, self._doing, self._open = round, "swapping", True
            self._margin_s = MARGIN_S + 2 * (now - self._entered)  # one that waits in the round before has yet to train
            self._unheard = {(t, client) for t, client in self._unheard if t >= round - 1}
            self._offers = {t: kept for t, kept in self._offers.items() if t >= round - 1} | {round: offer}
            self._meetings = {key: kept for key, kept in self._meetings.items() if key[0] > round - KEPT_ROUNDS}
            meetings = {client: self._meetings.setdefault((round, client), _Meeting()) for client in neighbours}
            for meeting in meetings.values():
                meeting.began, meeting.until, meeting.latest = now, now + self._patience_s, now + 2 * self._patience_s
            self._changed.notify_all()
        _at_once(lambda client: self._meet(round, client, meetings[client]), meetings)
        heard = {}
        with self._changed:
            for client, meeting in meetings.items():
                known = self._known(client)
                if meeting.verdict == Verdict.COUNTED:
                    assert meeting.tensors is not None
                    heard[client], meeting.tensors = meeting.tensors, None
                    known.up += 1
                else:
                    meeting.tensors = None
                    known.down += not self.vacant(client)
            self._doing = "mixing"
        return heard

    def remember(self, round: int, counted: Collection[int], failed: Collection[int]) -> None:
        """Take up what became of an earlier round's edges, so that those who missed a verdict can still have it."""
        with self._changed:
            for client in (*counted, *failed):
                verdict = Verdict.COUNTED if client in counted else Verdict.PASSED
                self._meetings[round, client] = _Meeting(verdict)

    def passed_by(self, round: int) -> bool:
        """Whether a neighbour has said that it went on from this round without this peer."""
        with self._changed:
            return any(meeting.missed for (t, _), meeting in self._meetings.items() if t == round)

    def ask_rounds(self, clients: Sequence[int], wait_s: float = PROBE_S) -> dict[int, int]:
        """Ask these clients where they are; return the rounds of those that answer."""
        return {client: came for client, came in self._ask(clients, wait_s).items() if isinstance(came, int)}

    def _ask(self, clients: Sequence[int], wait_s: float) -> dict[int, int | Exception]:
        """Ask these clients where they are; return the round of each, or what was wrong."""
        found: dict[int, int | Exception] = {}

        def ask(client: int) -> None:
            try:
                found[client] = self._call(client, 0, _Meeting(), time.monotonic() + wait_s, Hello.PING)
            except SeatError as error:  # nothing was tried
                found[client] = error
            except (grpc.RpcError, PeertuneError) as error:
                self._failed(client, error)
                found[client] = error

        _at_once(ask, clients)
        return dict(found)

    def refusals(self, clients: Sequence[int], wait_s: float = PROBE_S) -> dict[str, str]:
        """Ask these clients whether they refuse this peer; return the names of those that do, and why.

        Nobody where one of them takes it, or where no more than half of those who have a seat refuse: none of several
        neighbours can tell alone that a peer is shut out.
        """
        roster = self.membership.current()[1]
        seats = [client for client in clients if not nobody(roster.by_client(client))]
        came = self._ask(seats, wait_s)
        refusals: dict[str, str] = {}

        def look(client: int) -> None:
            error, member = came[client], roster.by_client(client)
            if isinstance(error, UnusableError) and not isinstance(error, SeatError):
                refusals[self.name(client)] = str(error)
            elif isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAUTHENTICATED:
                refusals[self.name(client)] = line(error.details())
            elif isinstance(error, grpc.RpcError) and not self._insecure and member and tls.is_there(member, wait_s):
                try:
                    self.knock(client, wait_s)  # which those answer, too, who are only starting
                except PeertuneError:
                    refusals[self.name(client)] = "ends the handshake with this peer: revoked, or one roster is old"

        if not any(isinstance(one, int) for one in came.values()):
            _at_once(look, came)
        return dict(sorted(refusals.items())) if 2 * len(refusals) > len(seats) else {}

    def vacant(self, client: int) -> bool:
        """Whether nobody is on this seat, so that there is no edge to fail."""
        member = self.membership.current()[1].by_client(client)
        return member is None or not member.certificates

    def progress(self) -> Progress:
        """Return where this peer is."""
        with self._changed:
            doing = self._doing
            if doing == "swapping":
                open_now = [m for (t, _), m in self._meetings.items() if t == self._round and m.verdict is None]
                doing = "waiting" if open_now and not any(meeting.streams for meeting in open_now) else doing
            return Progress(doing, self._round, self._step, self._phase)

    @property
    def patience_s(self) -> float:
        """How long a round waits for a neighbour."""
        return self._patience_s

    @property
    def hurried(self) -> bool:
        """Whether this peer has been told to wait for nobody."""
        return self._hurried

    def pause(self, seconds: float) -> None:
        """Wait so long, or until told to hurry."""
        with self._changed:
            self._doing = "waiting"
            self._changed.wait_for(lambda: self._hurried, timeout=seconds)

    def hurry(self) -> None:
        """Wait for nobody any more, in this swap and all that follow."""
        with self._changed:
            self._hurried, self._hurried_at = True, time.monotonic()
            for meeting in self._meetings.values():
                if meeting.verdict is None and not meeting.pledged:
                    for call in meeting.calls:
                        call.cancel()
            self._changed.notify_all()

    def stop(self) -> None:
        """Answer no more calls, once those that still need a verdict of ours have it, or LINGER_S are over."""
        deadline = time.monotonic() + min(LINGER_S, self._patience_s)
        with self._changed:
            while self._unheard and not self._hurried and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))
            self._stopped = True
            self._changed.notify_all()
        if self._server is not None:
            self._server.stop(1.0).wait()
        for channel, _ in self._channels.values():
            channel.close()

    # ---- one edge, from this end

    def _meet(self, round: int, client: int, meeting: _Meeting) -> None:
        """See to it that the meeting is settled."""
        identity, roster = self.membership.current()
        member = roster.by_client(client)
        dials = member is not None and member.address is not None
        if missing := nobody(member):
            self._failed(client, SeatError(missing))
            meeting.final = True
        elif not dials and identity.address is None:
            meeting.final = True  # two that can only dial out
        elif self.me > client and not self._known(client).given_up:
            self._await(client, meeting, FIRST_CALL_S)
        if (round, client) in self._waiting:  # its call has waited for this end, and goes on now
            self._await(client, meeting, RETRY_S)
        tries = 0
        try:
            while not self._over(client, meeting):
                if not dials or meeting.streams:
                    self._await(client, meeting, RETRY_S)
                    continue
                tries += 1
                self._try(round, client, meeting)
                self._await(client, meeting, min(2.0, RETRY_S * 2**tries))
        finally:
            self._give_up(round, client, meeting)

    def _try(self, round: int, client: int, meeting: _Meeting) -> None:
        """Call once, and keep what goes wrong."""
        try:
            purpose = Hello.SETTLE if meeting.pledged else Hello.SWAP
            self._call(client, round, meeting, self._last(client, meeting), purpose)
        except PeertuneError as error:  # WireError and UnusableError among them
            self._failed(client, error)
            meeting.final = True
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:  # as planned: the other end doesn't count it
                meeting.final, meeting.pledged = True, False
            self._failed(client, error)
        except Exception as error:  # whatever it is, it costs this edge and not the thread's silent end
            self.lines.say(client, f"{type(error).__name__}: {error}", logging.ERROR)
            meeting.final = True

    def _give_up(self, round: int, client: int, meeting: _Meeting) -> None:
        """Settle what is still open: without the other."""
        with self._changed:
            if meeting.verdict is not None:
                return
            if meeting.pledged:
                self.lines.say(client, f"whether it counts round {round} stays unknown; here it does not")
            self._settle(meeting, Verdict.PASSED)
            if not meeting.final and not self._hurried:
                known = self._known(client)
                if not known.given_up:
                    why = known.problem or "it was not ready in time"
                    self.lines.say(client, f"round {round} goes on without it: {why}")
                known.given_up = True

    def _over(self, client: int, meeting: _Meeting) -> bool:
        return meeting.verdict is not None or meeting.final or time.monotonic() >= self._last(client, meeting)

    def _last(self, client: int, meeting: _Meeting) -> float:
        """Return when this end gives up, on the monotonic clock: soon, for as long as the other is given up."""
        if meeting.pledged:  # what the other end decided must be known, if it can be
            return (self._hurried_at if self._hurried else meeting.latest) + SETTLE_S
        if self._hurried:
            return self._hurried_at
        return min(meeting.until, meeting.began + PROBE_S) if self._known(client).given_up else meeting.until

    def _await(self, client: int, meeting: _Meeting, seconds: float) -> None:
        """Wait so long for what may settle a meeting, but not after it is over."""
        until = time.monotonic() + seconds
        with self._changed:
            while meeting.verdict is None and (left := min(until, self._last(client, meeting)) - time.monotonic()) > 0:
                if self._hurried and not meeting.pledged:
                    return
                self._changed.wait(left)

    def _settle(self, meeting: _Meeting, verdict: "Verdict.Outcome") -> "Verdict.Outcome":
        """Decide, unless it is decided; return what is. The lock is held."""
        if meeting.verdict is None:
            meeting.verdict = verdict
            for call in meeting.calls:
                call.cancel()
            self._changed.notify_all()
        return meeting.verdict

    def _call(self, client: int, round: int, meeting: _Meeting, deadline: float, purpose: "Hello.Purpose") -> int:
        """Call the client once, and return the round it is in. Raises RpcError, WireError or UnusableError."""
        queue: SimpleQueue[Chunk | bytes | None] = SimpleQueue()
        call = self._stub(client)(
            _requests(queue),
            timeout=max(0.1, deadline - time.monotonic()),
            metadata=self._claim(),
            wait_for_ready=False,
        )
        with self._changed:
            if purpose != Hello.PING:
                meeting.calls.append(call)
            if self._hurried and not meeting.pledged:
                call.cancel()
            offer = self._offers.get(round)
        queue.put(Chunk(hello=self._hello(round, purpose)))
        speaks, why = Incarnation(), ""
        there, assembler, attached, greeted = 0, None, False, False
        try:
            for chunk in call:
                if not greeted and kind(chunk) != "hello":
                    raise WireError("does not begin with a greeting")
                match kind(chunk):
                    case "hello":
                        greeted = True
                        there = chunk.hello.round
                        self._check_hello(client, chunk.hello)
                        self._check_incarnation(client, chunk.hello)
                        self._saw(client, there)
                        speaks = Incarnation(chunk.hello.incarnation, chunk.hello.nonce)
                        for roster in self._newer(chunk.hello):
                            queue.put(roster)
                    case "wait":
                        self._saw(client, chunk.wait.round, chunk.wait.step)
                        if chunk.wait.left_ms:  # it must not be given up for waiting as long as this end would
                            longer = time.monotonic() + chunk.wait.left_ms / 1000 + self._margin_s
                            meeting.until = min(max(meeting.until, longer), max(meeting.until, meeting.latest))
                    case "roster":
                        self._adopt(client, chunk.roster)
                    case "total":
                        if offer is None or assembler is not None or purpose != Hello.SWAP:
                            raise WireError("sends a payload that nobody asked for")
                        assembler = Assembler(chunk.total, offer.layout)
                        with self._changed:
                            meeting.streams += 1
                            attached = True
                        queue.put(offer.data)
                    case "data":
                        if assembler is None or offer is None:
                            raise WireError("sends data before its size")
                        assembler.add(data_of(chunk))
                        if not assembler.left_bytes:
                            received = assembler.data()
                            tensors = decode(received, offer.layout)
                            self._check_content(client, meeting, speaks, received)
                            self._count_bytes(client, len(offer.data), len(received))
                            why = offer.check(client, tensors)
                            with self._changed:
                                if meeting.verdict is not None:
                                    return there
                                if why:
                                    meeting.calls.remove(call)  # over which the other end is told
                                    meeting.final = True
                                    self._settle(meeting, Verdict.PASSED)
                                else:
                                    meeting.tensors, meeting.pledged = tensors, True
                            outcome = Verdict.REFUSED if why else Verdict.HAVE
                            queue.put(Chunk(verdict=Verdict(outcome=outcome, reason=why[:200])))
                    case "verdict" if why:
                        break
                    case "verdict":
                        with self._changed:
                            if call in meeting.calls:  # settling cancels all others
                                meeting.calls.remove(call)
                        self._verdict(client, round, meeting, chunk.verdict)
                        there = max(there, chunk.verdict.round)
                        queue.put(None)  # by which the other end knows that it arrived
                    case _:
                        raise WireError("sends a part that is not known")
        except grpc.RpcError:
            if not why:  # which is what there is to say, however the call ended
                raise
        except WireError as error:
            queue.put(Chunk(verdict=Verdict(outcome=Verdict.REFUSED, reason=str(error)[:200])))
            raise
        finally:
            queue.put(None)
            with self._changed:
                if attached:
                    meeting.streams -= 1
                if call in meeting.calls:
                    meeting.calls.remove(call)
                self._changed.notify_all()
            if not call.done():
                call.cancel()
        if why:
            raise WireError(why)
        return there

    def _verdict(self, client: int, round: int, meeting: _Meeting, verdict: Verdict) -> None:
        """Take the called peer's verdict."""
        with self._changed:
            if verdict.outcome == Verdict.COUNTED:
                if not meeting.pledged:
                    raise WireError("counts an edge of which this end has nothing")
                self._settle(meeting, Verdict.COUNTED)
            elif verdict.outcome == Verdict.PASSED:
                meeting.final, meeting.pledged = True, False
                meeting.missed = self._settle(meeting, Verdict.PASSED) == Verdict.PASSED
                self._saw(client, verdict.round)
            elif verdict.outcome == Verdict.REFUSED:
                meeting.pledged = False
                raise UnusableError(f"refuses ({line(verdict.reason)})")
            else:  # it has forgotten: what was pledged is void, and the swap is made again
                meeting.pledged = False

    # ---- one call, at the end that is called

    def _answer(self, requests: Iterator[Part], context: Any) -> Iterator[Part]:
        member = self._identify(context)
        client = member.client
        try:
            with self._admitted(client, context):
                yield from self._converse(client, requests, context)
        except _GoneError:
            log.debug("%s hung up", member.name)
        except WireError as error:
            self.lines.say(client, str(error))
            self._known(client).problem = line(str(error))
            yield Chunk(verdict=Verdict(outcome=Verdict.REFUSED, reason=str(error)[:200], round=self._round))
        except UnusableError as error:
            self._failed(client, error)
            yield Chunk(verdict=Verdict(outcome=Verdict.REFUSED, reason=str(error)[:200], round=self._round))

    def _converse(self, client: int, requests: Iterator[Part], context: Any) -> Iterator[Part]:
        first = self._read(requests, context)
        if first is None or kind(first) != "hello":
            raise WireError("does not begin with a greeting")
        hello = first.hello
        tries = hello.purpose in (Hello.CALL_BACK, Hello.ECHO)
        if (self._echo_only or not self._open) and not tries:
            context.abort(grpc.StatusCode.UNAVAILABLE, "takes no part now")
        yield Chunk(hello=self._hello(self._round, hello.purpose))
        if tries:
            if hello.purpose == Hello.CALL_BACK:
                yield Chunk(verdict=self._call_back(client))
            return
        self._check_hello(client, hello)
        if not context.is_active():  # it may have been started again since
            raise _GoneError
        self._check_incarnation(client, hello)
        if hello.purpose != Hello.PING:
            self._saw(client, hello.round)
            with self._changed:  # who is further has gone on, with our verdicts or without
                self._unheard = {(t, other) for t, other in self._unheard if other != client or t >= hello.round}
        yield from self._newer(hello)
        if hello.purpose == Hello.PING:
            return
        t = hello.round
        if self.me in clients_down(self._faults, t):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"down in round {t}, as planned")
        if hello.purpose == Hello.SETTLE:
            yield Chunk(verdict=Verdict(outcome=self._recall(t, client), round=self._round))
            self._has_heard(t, client)
            return
        meeting, offer = yield from self._reach(t, client, context)
        if meeting is None or offer is None:
            yield Chunk(verdict=Verdict(outcome=Verdict.PASSED, round=self._round))
            return
        try:
            speaks = Incarnation(hello.incarnation, hello.nonce)
            outcome = yield from self._exchange(t, client, speaks, meeting, offer, requests, context)
        finally:
            with self._changed:
                meeting.streams -= 1
                self._changed.notify_all()
        yield Chunk(verdict=Verdict(outcome=outcome, round=self._round))
        if self._read(requests, context) is not None:
            raise WireError("goes on after the verdict")
        self._has_heard(t, client)

    def _reach(self, t: int, client: int, context: Any) -> Generator[Part, None, tuple[_Meeting | None, _Offer | None]]:
        """Wait until this peer has its payload of round t; return the meeting and the offer, None where it is over."""
        with self._changed:
            self._waiting[t, client] = self._waiting.get((t, client), 0) + 1
        try:
            while True:
                with self._changed:
                    meeting, offer = self._meetings.get((t, client)), self._offers.get(t)
                    if meeting is not None and offer is not None and meeting.verdict != Verdict.PASSED:
                        meeting.streams += 1
                        return meeting, offer
                    if t < self._round or (meeting is not None and meeting.verdict is not None) or self._stopped:
                        return None, None
                    if t == self._round and offer is not None:
                        raise WireError(f"calls for round {t}, in which there is no edge")
                    if not context.is_active():
                        raise _GoneError
                    self._changed.wait(STILL_HERE_S)
                    still = [m for (at, _), m in self._meetings.items() if at == self._round and m.verdict is None]
                    left_s = max((one.until - time.monotonic() for one in still), default=0.0)
                    wait = Wait(round=self._round, step=self._step, left_ms=int(1000 * max(0.0, left_s)))
                yield Chunk(wait=wait)
        finally:
            with self._changed:
                self._waiting[t, client] -= 1
                if not self._waiting[t, client]:
                    del self._waiting[t, client]

    def _exchange(
        self,
        t: int,
        client: int,
        speaks: Incarnation,
        meeting: _Meeting,
        offer: _Offer,
        requests: Iterator[Part],
        context: Any,
    ) -> "Generator[Part, None, Verdict.Outcome]":
        """Send this end's payload while the other's comes, and return the verdict."""
        cut = any(
            fault.edge is not None and fault.at(t) and sorted(fault.edge) == sorted((self.me, client))
            for fault in self._faults
        )
        yield Chunk(total=len(offer.data))
        own, assembler = chunks(offer.data), None
        while True:
            part = next(own, None)
            if part is not None:
                yield part
            chunk = self._read(requests, context)
            if chunk is None:
                raise WireError("hangs up before the end of its payload")
            match kind(chunk):
                case "roster":
                    self._adopt(client, chunk.roster)
                case "total" if assembler is None:
                    assembler = Assembler(chunk.total, offer.layout)
                case "data" if assembler is not None:
                    if cut:
                        with self._changed:
                            meeting.final = True
                            self._settle(meeting, Verdict.PASSED)
                        context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"edge cut in round {t}, as planned")
                    assembler.add(data_of(chunk))
                case "verdict" if assembler is not None and chunk.verdict.outcome == Verdict.HAVE:
                    break
                case "verdict":
                    with self._changed:
                        if not meeting.pledged:  # it won't take what it was sent in another call either
                            meeting.final = True
                            self._settle(meeting, Verdict.PASSED)
                    raise WireError(f"refuses what it was sent ({line(chunk.verdict.reason)})")
                case _:
                    raise WireError("sends its parts in another order than total, data, verdict")
        if next(own, None) is not None:
            raise WireError("says that it has what it was not sent")
        received = assembler.data()
        tensors = decode(received, offer.layout)
        self._check_content(client, meeting, speaks, received)
        self._count_bytes(client, len(offer.data), len(received))
        why = offer.check(client, tensors)
        with self._changed:
            if meeting.verdict is None and why:
                meeting.final = True
                self._settle(meeting, Verdict.PASSED)
                raise WireError(why)
            if meeting.verdict is None:
                meeting.tensors = tensors
                self._unheard.add((t, client))
            return self._settle(meeting, Verdict.COUNTED)

    def _check_content(self, client: int, meeting: _Meeting, speaks: Incarnation, received: memoryview) -> None:
        """Raise CloneError where one start of the other end has sent something else for this round."""
        if not speaks.number:
            return
        content = speaks, sha256(received).digest()
        with self._changed:
            if meeting.content is None or meeting.content[0] != speaks:
                meeting.content = content
            same = meeting.content == content
        if not same:
            said = f"start {speaks.number} sends two contents in one round"
            self._refuse_clone(client, f"two processes with its key: {said}")

    def _has_heard(self, t: int, client: int) -> None:
        """Note that the caller has this end's verdict."""
        with self._changed:
            self._unheard.discard((t, client))
            self._changed.notify_all()

    def _recall(self, t: int, client: int) -> "Verdict.Outcome":
        """Return the verdict on a meeting, once what came for it has been looked at."""
        with self._changed:
            meeting = self._meetings.get((t, client))
            if meeting is not None:
                self._changed.wait_for(lambda: meeting.verdict is not None or not meeting.streams, timeout=STALL_S)
                if meeting.verdict is not None:
                    return meeting.verdict
            return Verdict.PASSED if t < self._round else Verdict.UNKNOWN

    def _read(self, requests: Iterator[Part], context: Any) -> Any:
        """Return the next of the caller's chunks, None at the end; a caller that stalls is cut off.

        Raises _GoneError where it is gone.
        """
        with self._changed:
            self._deadlines[context] = time.monotonic() + min(STALL_S, self._patience_s)
        try:
            return next(requests, None)
        except grpc.RpcError:
            raise _GoneError from None
        finally:
            with self._changed:
                self._deadlines.pop(context, None)

    def _keep_watch(self) -> None:
        with self._changed:
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, name="swap-watch", daemon=True).start()

    def _watch(self) -> None:
        """Cut off callers that stall, and calls of this end that have lasted too long."""
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._stopped, timeout=1.0):
                    return
                now = time.monotonic()
                late = [context for context, deadline in self._deadlines.items() if now > deadline]
                for (_, client), meeting in self._meetings.items():
                    if meeting.verdict is None and now > self._last(client, meeting):
                        late += meeting.calls
            for call in late:
                call.cancel()

    @contextmanager
    def _admitted(self, client: int, context: Any) -> Iterator[None]:
        """Hold one of the client's few streams."""
        with self._changed:
            if self._serving[client] >= STREAMS:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at a time")
            self._serving[client] += 1
        try:
            yield
        finally:
            with self._changed:
                self._serving[client] -= 1


def _at_once(action: Callable[[int], object], clients: Iterable[int]) -> None:
    """Do something for all clients at the same time, and wait until it is done for each."""
    threads = [threading.Thread(target=action, args=(client,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _requests(queue: "SimpleQueue[Chunk | bytes | None]") -> Iterator[Part]:
    """Turn what is put in the queue into a call's requests; bytes are a payload."""
    while (item := queue.get()) is not None:
        if isinstance(item, bytes):
            yield Chunk(total=len(item))
            yield from chunks(item)
        else:
            yield item
