"""What stands for gRPC where a test looks at one end of a call, in this process and without a server."""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from typing import Any, NoReturn

import pytest
from parties import Federation
from swapping import AGREED, LONG_S, payload

from peertune.identity.entries import Member
from peertune.identity.keys import Identity
from peertune.identity.membership import Membership
from peertune.wire.codec import encode
from peertune.wire.framing import serialize
from peertune.wire.node import METHOD, Node, SeatError, nobody
from peertune.wire.peer_pb2 import Chunk, Verdict
from peertune.wire.rpc import grpc
from peertune.wire.swap import Swapper


class Failed(grpc.RpcError):  # type: ignore[misc]  # as gRPC fails
    def __init__(self, status: grpc.StatusCode, said: str = "") -> None:
        self.status, self.said = status, said

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str:
        return self.said


GONE = Failed(grpc.StatusCode.UNAVAILABLE, "gone")


class Context:
    """Of a call that a client makes without TLS, and that it does not end."""

    def __init__(self, client: int | str) -> None:
        self.client = client

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("peertune-client", f"{self.client}")]

    def is_active(self) -> bool:
        return True

    def abort(self, code: grpc.StatusCode, why: str) -> NoReturn:
        raise Failed(code, why)


Said = Chunk | Exception | Callable[[], object]
"""A part, what the call fails with, or what happens meanwhile."""


def requests(parts: Sequence[Said]) -> Iterator[Chunk]:
    for part in parts:
        if isinstance(part, Chunk):
            yield part
        elif isinstance(part, Exception):
            raise part
        else:
            part()


def called(swapper: Swapper, client: int, *parts: Said) -> Generator[Chunk, None, None]:
    """Call a peer as this client with these parts, and yield what it answers."""
    for part in swapper.answering.answer(requests(parts), Context(client)):
        yield Chunk.FromString(serialize(part))


class Script:
    """Who answers the calls of a peer as it is written, one after the other, and the last of it for ever."""

    def __init__(self, node: Node, *answers: Sequence[Said]) -> None:
        self.calls: list[Call] = []
        self.dialled: list[Member | None] = []
        self._answers = answers
        node._dial = self._dial  # type: ignore[method-assign]

    def _dial(self, identity: Identity, member: Member | None) -> "Script":
        if missing := nobody(member):
            raise SeatError(missing)
        self.dialled.append(member)
        return self

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """As a channel is closed."""

    def stream_stream(self, method: str, **how: object) -> "Callable[..., Call]":
        assert method == METHOD
        return self._call

    def _call(self, sent: Iterator[Any], **options: Any) -> "Call":
        answer = self._answers[min(len(self.calls), len(self._answers) - 1)]
        self.calls.append(Call(answer, sent, options))
        return self.calls[-1]


class Call:
    """A call as the caller has it; `sent` is what it says in it, once it is over."""

    def __init__(self, answer: Sequence[Said], sent: Iterator[Any], options: dict[str, Any]) -> None:
        self.options = options
        self._answer, self._sent, self._cancelled = answer, sent, False

    def __iter__(self) -> Iterator[Chunk]:
        for part in requests(self._answer):
            if self._cancelled:
                raise Failed(grpc.StatusCode.CANCELLED, "cancelled here")
            yield part

    def cancel(self) -> None:
        self._cancelled = True

    def done(self) -> bool:
        return True

    @cached_property
    def sent(self) -> list[Chunk]:
        return [Chunk.FromString(serialize(part)) for part in self._sent]


started: list[Swapper] = []
"""All peers that `peer` has made."""


def peer(made: Federation, client: int = 0, patience_s: float = LONG_S, **options: Any) -> Swapper:
    membership = Membership(made.folder / f"peer-{client}", made.folder / "roster.yaml")
    started.append(Swapper(membership, AGREED, patience_s=patience_s, **{"insecure": True} | options))
    return started[-1]


def whole(client: int, round: int = 0) -> list[Chunk]:
    """A payload in its parts."""
    data = encode(payload(client, round))
    return [Chunk(total=len(data)), Chunk(data=data[:500]), Chunk(data=data[500:])]


def verdict(outcome: "Verdict.Outcome", **other: Any) -> Chunk:
    return Chunk(verdict=Verdict(outcome=outcome, **other))


HAVE, COUNTED = verdict(Verdict.HAVE), verdict(Verdict.COUNTED)


def kinds(parts: list[Chunk]) -> list[str]:
    found = [str(part.WhichOneof("part")) for part in parts]
    return [kind for place, kind in enumerate(found) if kind != "data" or found[place - 1] != "data"]


def said(caplog: pytest.LogCaptureFixture, *levels: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno in levels]
