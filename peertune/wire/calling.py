"""The calls of one end: whom it dials when, and what it makes of what it hears in a call."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Concatenate, ParamSpec

from peertune.allowance import one_line
from peertune.errors import PeertuneError, WireError
from peertune.identity.incarnation import Incarnation
from peertune.wire.codec import Assembler
from peertune.wire.edge import Action, Ask, Edge, Offer, Say, Step, Stream
from peertune.wire.framing import Part, data_of, field_of, queued
from peertune.wire.meeting import Meeting, Meetings
from peertune.wire.node import SeatError, UnusableError, nobody
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict, Wait
from peertune.wire.rpc import grpc

FIRST_CALL_S = 1.0  # how long the higher number leaves the first call to the lower
RETRY_S = 0.2

P = ParamSpec("P")


class Calling:
    """What a node does by itself to settle its meetings."""

    def __init__(self, meetings: Meetings) -> None:
        self._node, self._meetings = meetings.node, meetings

    def meet(self, round: int, client: int, meeting: Meeting) -> None:
        """See to it that the meeting is settled."""
        node, meetings = self._node, self._meetings
        identity, roster = node.membership.current()
        member = roster.by_client(client)
        dials = member is not None and member.address is not None
        if missing := nobody(member):
            node.failed(client, SeatError(missing))
            meetings.do(meeting, Edge.unusable)
        elif not dials and identity.address is None:
            meetings.do(meeting, Edge.unusable)  # two that can only dial out
        elif node.me > client and not node.known(client).given_up:
            meetings.wait(client, meeting, FIRST_CALL_S)
        if (round, client) in meetings.waiting:  # its call has waited for this end, and goes on now
            meetings.wait(client, meeting, RETRY_S)
        tries = 0
        try:
            while not meetings.over(client, meeting):
                if not dials or meeting.edge.streams:
                    meetings.wait(client, meeting, RETRY_S)
                    continue
                tries += 1
                self._try(round, client, meeting)
                meetings.wait(client, meeting, min(2.0, RETRY_S * 2**tries))
        finally:
            self._give_up(round, client, meeting)

    def ask(
        self, clients: Sequence[int], wait_s: float, purpose: "Hello.Purpose" = Hello.PING
    ) -> dict[int, int | Exception]:
        """Ask these clients where they are, or tell them something; return the round of each, or what was wrong."""
        found: dict[int, int | Exception] = {}

        def ask(client: int) -> None:
            try:
                call = _Call(self._meetings, client, self._node.round, Meeting(), time.monotonic() + wait_s)
                found[client] = call.run(purpose)
            except SeatError as error:  # nothing was tried
                found[client] = error
            except (grpc.RpcError, PeertuneError) as error:
                self._node.failed(client, error)
                found[client] = error

        at_once(ask, clients)
        return dict(found)

    def _try(self, round: int, client: int, meeting: Meeting) -> None:
        """Call once, and keep what goes wrong."""
        node, meetings = self._node, self._meetings
        try:
            _Call(meetings, client, round, meeting, meetings.last(client, meeting)).run()
        except PeertuneError as error:  # WireError and UnusableError among them
            node.failed(client, error)
            meetings.do(meeting, Edge.unusable)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:  # as planned
                meetings.do(meeting, Edge.called_off)
            node.failed(client, error)
        except Exception as error:  # whatever it is, it costs this edge and not the thread's silent end
            node.lines.say(client, f"{type(error).__name__}: {error}", logging.ERROR)
            meetings.do(meeting, Edge.unusable)

    def _give_up(self, round: int, client: int, meeting: Meeting) -> None:
        """Settle what is still open: without the other."""
        node = self._node
        with node.changed:
            edge = meeting.edge
            if edge.verdict is not None:
                return
            if edge.pledged:
                node.lines.say(client, f"whether it counts round {round} stays unknown; here it does not")
            self._meetings.do(meeting, Edge.given_up)
            if not edge.final and not self._meetings.stopped_waiting:
                known = node.known(client)
                if not known.given_up:
                    why = known.problem or "it was not ready in time"
                    node.lines.say(client, f"round {round} goes on without it: {why}")
                known.given_up = True


class _Call:
    """One call to a client, and what came in it so far."""

    def __init__(self, meetings: Meetings, client: int, round: int, meeting: Meeting, deadline: float) -> None:
        self._node, self._meetings = meetings.node, meetings
        self._client, self._round, self._meeting = client, round, meeting
        self._requests: SimpleQueue[Chunk | Iterator[Part] | None] = SimpleQueue()
        self._call = self._node.stub(client)(
            queued(self._requests), timeout=max(0.1, deadline - time.monotonic()), metadata=self._node.claim()
        )
        self._own = meetings.own.get(round)
        self._assembler: Assembler | None = None
        self._speaks, self._hello = Incarnation(), Hello()
        self._purpose: Hello.Purpose = Hello.SWAP
        self._greeted = self._over = False
        self._there = 0  # the round it is in
        self._why = ""  # this end won't mix what came

    def run(self, purpose: "Hello.Purpose | None" = None) -> int:
        """Greet, to settle the meeting or for another purpose, and go through with it; return the round it is in.

        Raises RpcError, WireError or UnusableError.
        """
        try:
            self._greet(purpose)
            for part in self._call:
                self._take(part)
                if self._over:
                    break
        except grpc.RpcError:
            if not self._why:  # which is what there is to say, however the call ended
                raise
        except WireError as error:
            self._say(Verdict.REFUSED, str(error))
            raise
        finally:
            self._requests.put(None)
            self._meetings.do(self._meeting, Edge.ended, self._call)
            if not self._call.done():
                self._call.cancel()
        if self._why:
            raise WireError(self._why)
        return self._there

    def _greet(self, purpose: "Hello.Purpose | None") -> None:
        for action in [Ask(self._call, purpose)] if purpose is not None else self._do(Edge.dialled):
            assert isinstance(action, Ask)
            self._purpose = action.purpose
            self._requests.put(Chunk(hello=self._node.hello(self._round, action.purpose)))
        if self._meetings.stopped_waiting and not self._meeting.edge.pledged:
            self._call.cancel()

    def _take(self, part: Any) -> None:
        """Take what came next."""
        if not self._greeted and field_of(part) != "hello":
            raise WireError("does not begin with a greeting")
        match field_of(part):
            case "hello":
                self._take_hello(part.hello)
            case "wait":
                self._take_wait(part.wait)
            case "roster":
                self._node.adopt(self._client, part.roster)
            case "total":
                self._begin(part.total)
            case "data":
                self._add(data_of(part))
            case "verdict":
                self._take_verdict(part.verdict)
            case _:
                raise WireError("sends a part that is not known")

    def _take_hello(self, hello: Hello) -> None:
        node, client = self._node, self._client
        self._greeted, self._there, self._hello = True, hello.round, hello
        node.greeted(client, hello)
        self._speaks = Incarnation(hello.incarnation, hello.nonce)
        for roster in node.newer(hello):
            self._requests.put(roster)

    def _take_wait(self, wait: Wait) -> None:
        self._node.saw(self._client, wait.round, wait.step)
        if wait.left_ms:
            self._meetings.put_off(self._meeting, wait.left_ms / 1000)

    def _begin(self, total: int) -> None:
        """The other end's payload begins, of so many bytes: send this end's."""
        if self._own is None or self._assembler is not None or self._purpose != Hello.SWAP:
            raise WireError("sends a payload that nobody asked for")
        self._assembler = Assembler(total, self._own.layout(self._client))
        for action in self._do(Edge.offered):
            assert isinstance(action, Offer)
            self._requests.put(self._own.sent(self._client).parts(self._hello))

    def _add(self, data: bytes | memoryview) -> None:
        """Take more of the other end's payload, and say what this end makes of it once it is whole."""
        if self._assembler is None or self._own is None:
            raise WireError("sends data before its size")
        self._assembler.add(data)
        if self._assembler.left_bytes:
            return
        received = self._assembler.data()
        tensors, why = self._meetings.look_at(self._client, self._meeting, self._own, self._speaks, received)
        self._over = True  # unless something is to be said
        for action in self._do(Edge.came, tensors, bool(why)):
            assert isinstance(action, Say)
            self._over, self._why = False, why
            self._say(action.outcome, why)

    def _take_verdict(self, verdict: Verdict) -> None:
        if self._why:
            self._over = True
            return
        refuses = verdict.outcome == Verdict.REFUSED
        if not (refuses and self._purpose == Hello.SETTLE):  # who has no dealings with this end settles nothing
            self._do(Edge.told, verdict.outcome)
        if refuses:
            raise UnusableError(f"refuses ({one_line(verdict.reason)})")
        if verdict.outcome == Verdict.PASSED:
            self._node.saw(self._client, verdict.round)
        self._there = max(self._there, verdict.round)
        self._requests.put(None)  # by which the other end knows that it arrived

    def _do(
        self, event: Callable[Concatenate[Edge, Stream, P], Step], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Action, ...]:
        return self._meetings.do(self._meeting, event, self._call, *args, **kwargs)

    def _say(self, outcome: "Verdict.Outcome", why: str) -> None:
        self._requests.put(Chunk(verdict=Verdict(outcome=outcome, reason=why[:200])))


def at_once(action: Callable[[int], object], clients: Iterable[int]) -> None:
    """Do something for all clients at the same time, and wait until it is done for each."""
    threads = [Thread(target=action, args=(client,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
