"""What this peer pushes: to each neighbour its newest message, while it trains on.

A message that can't be delivered is tried again until it gets through, the other end refuses it, or a newer one takes
its place.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import NamedTuple

from peertune.allowance import one_line
from peertune.errors import PeertuneError, WireError
from peertune.wire.framing import Outgoing, Part, field_of, queued
from peertune.wire.meeting import Meetings
from peertune.wire.node import SeatError, UnusableError, nobody
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict
from peertune.wire.peer_pb2 import Post as Said
from peertune.wire.rpc import grpc

RETRY_S = 0.2
RETRY_MOST_S = 2.0


class Parcel(NamedTuple):
    """A message on its way."""

    version: int
    degree: int  # to how many it goes
    began: float  # when its training began, on the monotonic clock
    data: Outgoing


class Outbox:
    """A thread for each neighbour that ever is sent something, and what it is to deliver."""

    def __init__(self, meetings: Meetings) -> None:
        self._node, self._meetings = meetings.node, meetings
        self._due: dict[int, Parcel] = {}
        self._carried: set[int] = set()  # to whom a thread delivers
        self._closed = False

    def push(self, parcel: Parcel, clients: Sequence[int]) -> list[int]:
        """Have a message delivered to these clients, and return those whom the last one has not reached by now."""
        with self._node.changed:
            late = [client for client in clients if client in self._due]
            for client in clients:
                self._node.known(client).down += client in self._due
                self._due[client] = parcel
                if client not in self._carried:
                    self._carried.add(client)
                    threading.Thread(target=self._carry, args=(client,), name=f"push-{client}", daemon=True).start()
            self._node.changed.notify_all()
        return late

    def close(self, linger_s: float) -> None:
        """Deliver what is due, for so many seconds at most, or until this peer waits for nobody."""
        with self._node.changed:
            self._node.changed.wait_for(
                lambda: self._closed or not self._due or self._meetings.stopped_waiting, timeout=linger_s
            )
            self._closed = True
            self._node.changed.notify_all()

    def _carry(self, client: int) -> None:
        """Deliver to a client what is due, until the box is closed."""
        node, tries = self._node, 0
        while True:
            with node.changed:
                node.changed.wait_for(lambda: self._closed or client in self._due)
                if self._closed:
                    return
                parcel = self._due[client]
            error = self._try(client, parcel)
            again = isinstance(error, SeatError | grpc.RpcError)  # the next roster may have somebody on the seat
            again = again and not node.known(client).done
            tries = tries + 1 if again else 0
            with node.changed:
                node.known(client).up += error is None
                if not again and self._due.get(client) is parcel:
                    del self._due[client]
                    node.changed.notify_all()
            if error is not None:
                node.failed(client, error)
            if again:
                with node.changed:
                    self._pause(client, parcel, min(RETRY_MOST_S, RETRY_S * 2 ** min(tries, 8)))

    def _pause(self, client: int, parcel: Parcel, seconds: float) -> None:
        """Wait so long, or until there is something newer to deliver."""
        self._node.changed.wait_for(lambda: self._closed or self._due.get(client) is not parcel, timeout=seconds)

    def _try(self, client: int, parcel: Parcel) -> Exception | None:
        """Call once; return what went wrong."""
        try:
            self._send(client, parcel)
        except (PeertuneError, grpc.RpcError) as error:
            return error
        except Exception as error:  # whatever it is, it costs this message and not the thread's silent end
            self._node.lines.say(client, f"{type(error).__name__}: {error}", logging.ERROR)
            return error
        return None

    def _send(self, client: int, parcel: Parcel) -> None:
        """Push a message. Raises RpcError, WireError or UnusableError."""
        node = self._node
        if missing := nobody(node.membership.current()[1].by_client(client)):
            raise SeatError(missing)
        requests: SimpleQueue[Chunk | Iterator[Part] | None] = SimpleQueue()
        call = node.stub(client)(queued(requests), timeout=self._meetings.patience_s, metadata=node.claim())
        requests.put(Chunk(hello=node.hello(parcel.version, Hello.PUSH)))
        greeted = False
        try:
            for part in call:
                match field_of(part):
                    case "hello" if not greeted:
                        greeted = True
                        node.greeted(client, part.hello)
                        requests.put(self._parts(parcel, part.hello))
                    case "roster" if greeted:
                        node.adopt(client, part.roster)
                    case "verdict" if greeted:
                        if part.verdict.outcome != Verdict.COUNTED:
                            raise UnusableError(f"refuses ({one_line(part.verdict.reason)})")
                        node.count_bytes(client, parcel.data.total_bytes, 0)
                        return
                    case _:
                        raise WireError("answers what is pushed with something else than a greeting and a verdict")
            raise WireError("hangs up before its verdict")
        finally:
            requests.put(None)
            call.cancel()

    def _parts(self, parcel: Parcel, to: Hello) -> Iterator[Part]:
        """Yield what follows the greeting: a newer roster, what the message is, and the message."""
        yield from self._node.newer(to)
        age_ms = int(1000 * (time.monotonic() - parcel.began))
        yield Chunk(post=Said(degree=parcel.degree, age_ms=age_ms))
        yield from parcel.data.parts(to)
