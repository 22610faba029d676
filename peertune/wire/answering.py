"""The calls of others: a server that greets them, has them wait until this end is ready, and tells them its verdict."""

import logging
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from peertune.allowance import one_line
from peertune.errors import PeertuneError, WireError
from peertune.identity.incarnation import Incarnation
from peertune.rounds.posts import Post
from peertune.topology import Fault, clients_down
from peertune.wire import limits, tls
from peertune.wire.codec import Assembler, decode
from peertune.wire.edge import Edge, Offer, Say
from peertune.wire.framing import Part, data_of, deserialize, field_of, serialize
from peertune.wire.mailbox import Letter, Mailbox
from peertune.wire.meeting import Meeting, Meetings, Own
from peertune.wire.node import OPTIONS, SERVICE, UnusableError
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict, Wait
from peertune.wire.rpc import grpc

log = logging.getLogger(__name__)

STREAMS = 3  # of one client at a time: each end may call, and ask something beside
STALL_S = 30.0  # after which a caller that says nothing is cut off
STILL_HERE_S = 0.5  # between signs of life to a caller that waits


class _GoneError(Exception):
    """The caller hung up."""


class Answering:
    """What a node answers. Planned faults cut the wire itself: an edge in mid-payload, a peer that is down for all."""

    def __init__(self, meetings: Meetings, faults: Sequence[Fault], seats: int) -> None:
        self._node, self._meetings, self._faults, self._seats = meetings.node, meetings, faults, seats
        # It takes part once it is open; before, one may try whether one gets through.
        self.open = False
        self.mailbox: Mailbox | None = None  # of a peer that waits for nobody
        self._serving: Counter[int] = Counter()  # streams by client
        self._server: Any = None

    def start(self, address: str) -> int:
        """Answer calls at `address` (host:port, port 0 for any) and return the port. Raises PeertuneError."""
        workers = 4 + STREAMS * self._seats
        self._server = grpc.server(
            ThreadPoolExecutor(workers, thread_name_prefix="swap"),
            options=[*OPTIONS, *limits.of_connections(self._seats)],
            maximum_concurrent_rpcs=workers,
        )
        handler = grpc.stream_stream_rpc_method_handler(
            self.answer, request_deserializer=deserialize, response_serializer=serialize
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Swap": handler}),))
        try:
            if self._node.insecure:
                tls.check_loopback(address)
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, tls.server_credentials(self._node.membership.current))
        except RuntimeError:
            raise PeertuneError(
                f"{address}: can't be listened at; give an address of this machine and a free port"
            ) from None
        self._server.start()
        self._meetings.keep_watch()
        return int(port)

    def stop(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.stop(1.0).wait()

    def answer(self, requests: Iterator[Part], context: Any) -> Iterator[Part]:
        """Answer one call."""
        node, member = self._node, self._node.identify(context)
        client = member.client
        try:
            with self._admitted(client, context):
                yield from self._converse(client, requests, context)
        except _GoneError:
            log.debug("%s hung up", member.name)
        except WireError as error:
            node.lines.say(client, str(error))
            node.known(client).problem = one_line(str(error))
            yield self._verdict(Verdict.REFUSED, str(error))
        except UnusableError as error:
            node.failed(client, error)
            yield self._verdict(Verdict.REFUSED, str(error))

    def _verdict(self, outcome: "Verdict.Outcome", why: str = "") -> Chunk:
        return Chunk(verdict=Verdict(outcome=outcome, reason=why[:200], round=self._node.round))

    def _converse(self, client: int, requests: Iterator[Part], context: Any) -> Iterator[Part]:
        node, meetings = self._node, self._meetings
        first = self._read(requests, context)
        if first is None or field_of(first) != "hello":
            raise WireError("does not begin with a greeting")
        hello = first.hello
        tries = hello.purpose in (Hello.CALL_BACK, Hello.ECHO)
        if not (self.open or tries):
            context.abort(grpc.StatusCode.UNAVAILABLE, "takes no part now")
        yield Chunk(hello=node.hello(node.round, hello.purpose))
        if tries:
            if hello.purpose == Hello.CALL_BACK:
                yield Chunk(verdict=node.call_back(client))
            return
        node.check_hello(client, hello)
        if not context.is_active():  # it may have been started again since
            raise _GoneError
        node.check_incarnation(client, hello)
        if hello.purpose != Hello.PING:
            node.saw(client, hello.round)
            meetings.is_at(client, hello.round)
        node.known(client).done = hello.purpose == Hello.DONE
        yield from node.newer(hello)
        if hello.purpose in (Hello.PING, Hello.DONE):
            return
        t = hello.round
        if hello.purpose == Hello.PUSH:
            self._take(client, hello, requests, context)
            yield self._verdict(Verdict.COUNTED)
            return
        if node.me in clients_down(self._faults, t):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"down in round {t}, as planned")
        if hello.purpose == Hello.SETTLE:
            yield self._verdict(self._recall(t, client, context))
        elif (reached := (yield from self._reach(t, client, context))) is None:
            yield self._verdict(Verdict.PASSED)
            return
        else:
            meeting, own = reached
            try:
                outcome = yield from self._exchange(client, hello, meeting, own, requests, context)
            finally:
                meetings.do(meeting, Edge.ended, context)
            yield self._verdict(outcome)
            if self._read(requests, context) is not None:
                raise WireError("goes on after the verdict")
        with node.changed:
            if (t, client) in meetings.held:
                meetings.do(meetings.held[t, client], Edge.heard)

    def _reach(self, t: int, client: int, context: Any) -> Generator[Part, None, tuple[Meeting, Own] | None]:
        """Wait until this peer has its payload of round t; return the meeting and the payload, None if it is over."""
        node, meetings = self._node, self._meetings
        with meetings.awaited(t, client):
            while True:
                with node.changed:
                    meeting, own = meetings.held.get((t, client)), meetings.own.get(t)
                    ready, left = meeting is not None and own is not None, t < node.round or meetings.stopped
                    (action,) = meetings.do(meeting or Meeting(), Edge.called, context, ready, left)
                    if isinstance(action, Say):
                        return None
                    if isinstance(action, Offer):
                        assert meeting is not None
                        assert own is not None
                        return meeting, own
                    if t == node.round and own is not None:
                        raise WireError(f"calls for round {t}, in which there is no edge")
                    if not context.is_active():
                        raise _GoneError
                    node.changed.wait(STILL_HERE_S)
                    wait = Wait(round=node.round, step=node.step, left_ms=int(1000 * meetings.left_s()))
                yield Chunk(wait=wait)

    def _exchange(
        self, client: int, hello: Hello, meeting: Meeting, own: Own, requests: Iterator[Part], context: Any
    ) -> "Generator[Part, None, Verdict.Outcome]":
        """Send this end's payload while the other's comes, and return the verdict."""
        sending, assembler = own.sent(client).parts(hello), None
        yield next(sending)
        while True:
            part = next(sending, None)
            if part is not None:
                yield part
            chunk = self._read(requests, context)
            if chunk is None:
                raise WireError("hangs up before the end of its payload")
            match field_of(chunk):
                case "roster":
                    self._node.adopt(client, chunk.roster)
                case "total" if assembler is None:
                    assembler = Assembler(chunk.total, own.layout(client))
                case "data" if assembler is not None:
                    if self._is_cut(client, hello.round):
                        self._meetings.do(meeting, Edge.given_up)
                        why = f"edge cut in round {hello.round}, as planned"
                        context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
                    assembler.add(data_of(chunk))
                case "verdict" if assembler is not None and chunk.verdict.outcome == Verdict.HAVE:
                    break
                case "verdict":
                    self._meetings.do(meeting, Edge.declined)
                    raise WireError(f"refuses what it was sent ({one_line(chunk.verdict.reason)})")
                case _:
                    raise WireError("sends its parts in another order than total, data, verdict")
        if next(sending, None) is not None:
            raise WireError("says that it has what it was not sent")
        return self._decide(client, hello, meeting, own, assembler.data(), context)

    def _decide(
        self, client: int, hello: Hello, meeting: Meeting, own: Own, received: memoryview, context: Any
    ) -> "Verdict.Outcome":
        """Return the verdict on what came. Raises WireError where that is not to be mixed."""
        speaks = Incarnation(hello.incarnation, hello.nonce)
        tensors, why = self._meetings.look_at(client, meeting, own, speaks, received)
        (action,) = self._meetings.do(meeting, Edge.had, context, tensors, bool(why))
        assert isinstance(action, Say)
        if action.outcome == Verdict.REFUSED:
            raise WireError(why)
        return action.outcome

    def _take(self, client: int, hello: Hello, requests: Iterator[Part], context: Any) -> None:
        """Take what a client pushes, unless it has come before. Raises WireError for what can't be mixed."""
        box, version, start = self.mailbox, hello.round, hello.incarnation
        if box is None or not box.may_send(client, version):
            raise WireError(f"pushes version {version}, in which there is no edge")
        with self._node.changed:
            if not box.is_new(client, start, version):
                return
        said, came_at, assembler = None, 0.0, None
        while assembler is None or assembler.left_bytes:
            chunk = self._read(requests, context)
            if chunk is None:
                raise WireError("hangs up before the end of its payload")
            match field_of(chunk):
                case "roster":
                    self._node.adopt(client, chunk.roster)
                case "post" if said is None:
                    said, came_at = chunk.post, time.monotonic()
                case "total" if assembler is None and said is not None:
                    assembler = Assembler(chunk.total, box.like)
                case "data" if assembler is not None:
                    assembler.add(data_of(chunk))
                case _:
                    raise WireError("sends its parts in another order than post, total, data")
        assert said is not None
        received = assembler.data()
        post = Post(client, start, version, said.degree)
        letter = Letter(post, came_at - said.age_ms / 1000, decode(received, box.like))
        self._node.count_bytes(client, 0, len(received))
        with self._node.changed:
            box.put(letter)

    def _is_cut(self, client: int, t: int) -> bool:
        edges = (sorted(fault.edge) for fault in self._faults if fault.edge is not None and fault.at(t))
        return sorted((self._node.me, client)) in edges

    def _recall(self, t: int, client: int, context: Any) -> "Verdict.Outcome":
        """Return the verdict on a meeting, once what came for it has been looked at."""
        node, meetings, until = self._node, self._meetings, time.monotonic() + STALL_S
        with node.changed:
            while True:
                meeting = meetings.held.get((t, client), Meeting())
                (action,) = meetings.do(meeting, Edge.asked, context, t < node.round)
                if isinstance(action, Say):
                    return action.outcome
                if not node.changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "is still looking at what came; ask again")

    def _read(self, requests: Iterator[Part], context: Any) -> Any:
        """Return the next of the caller's chunks, None at the end; a caller that stalls is cut off.

        Raises _GoneError where it is gone.
        """
        with self._node.changed:
            self._meetings.deadlines[context] = time.monotonic() + min(STALL_S, self._meetings.patience_s)
        try:
            return next(requests, None)
        except grpc.RpcError:
            raise _GoneError from None
        finally:
            with self._node.changed:
                self._meetings.deadlines.pop(context, None)

    @contextmanager
    def _admitted(self, client: int, context: Any) -> Iterator[None]:
        """Hold one of the client's few streams."""
        with self._node.changed:
            if self._serving[client] >= STREAMS:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at a time")
            self._serving[client] += 1
        try:
            yield
        finally:
            with self._node.changed:
                self._serving[client] -= 1
