"""Real servers over real TLS that swap small payloads, and calls of members that write their own requests."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from federation import Federation
from processes import wait_until

from peertune.identity.membership import Membership
from peertune.types import Tensors
from peertune.wire import tls
from peertune.wire.node import METHOD, PROTOCOL
from peertune.wire.peer_pb2 import Chunk, Hello
from peertune.wire.swap import Swapper

AGREED = {"rounds": "10", "seed": "0"}
LONG_S = 300.0  # patience, and a limit, that no test comes near where all is well, on whatever machine


def payload(client: int, round: int = 0, size: int = 50) -> Tensors:
    generator = torch.Generator().manual_seed(100 * round + client)
    return {"q.A": torch.randn(1, 3, size, generator=generator), "q.B": torch.randn(1, size, 3, generator=generator)}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def peers(
    made: Federation, clients: Sequence[int], rosters: Mapping[int, Path] | None = None, **options: Any
) -> Iterator[dict[int, Swapper]]:
    """Have these peers answer, each by its file of `rosters`, or by the one of all."""
    with ExitStack() as stack:
        swappers = {}
        for client in clients:
            settings: dict[str, Any] = {"agreed": AGREED, "patience_s": LONG_S} | options
            membership = Membership(made.peer(client), (rosters or {}).get(client, made.roster))
            swapper = Swapper(membership, **settings)
            stack.callback(swapper.stop)
            stack.callback(swapper.stop_waiting)
            swapper.start(made.address(client))
            swappers[client] = swapper
        yield swappers


def acquaint(swapper: Swapper, client: int) -> float:
    """Have a peer connect to another, so that no handshake takes of its patience later; return how long that took."""
    began = time.monotonic()
    swapper.ask_rounds([client], LONG_S)
    return time.monotonic() - began


def all_swap(swappers: dict[int, Swapper], round: int = 0, size: int = 50) -> dict[int, dict[int, Tensors]]:
    """Have everybody swap with everybody in a round, at the same time."""
    with ThreadPoolExecutor(len(swappers)) as pool:
        going = {
            client: pool.submit(
                swapper.swap, round, payload(client, round, size), [other for other in swappers if other != client]
            )
            for client, swapper in swappers.items()
        }
        return {client: one.result(LONG_S) for client, one in going.items()}


def assert_all_heard(
    swappers: dict[int, Swapper], heard: dict[int, dict[int, Tensors]], round: int, size: int = 50
) -> None:
    for client, came in heard.items():
        assert came.keys() == swappers.keys() - {client}
        assert all(same(x, payload(other, round, size)) for other, x in came.items())


def call(made: Federation, who: int, whom: int, requests: Iterator[Chunk], timeout_s: float = LONG_S) -> list[Chunk]:
    """Call a peer as another member, with these requests; return the answers."""
    identity, roster = Membership(made.peer(who), made.roster).current()
    member = roster.by_client(whom)
    assert member is not None
    with tls.secure_channel(identity, member) as channel:
        stub = channel.stream_stream(
            METHOD, request_serializer=Chunk.SerializeToString, response_deserializer=Chunk.FromString
        )
        return list(stub(requests, timeout=timeout_s))


def hello(round: int, purpose: int = Hello.SWAP, **other: Any) -> Chunk:
    fields = {
        "protocol": PROTOCOL,
        "federation": "trial",
        "agreed": AGREED,
        "round": round,
        "roster_serial": 99,
    } | other
    return Chunk(hello=Hello(purpose=purpose, **fields))  # type: ignore[arg-type]


def outcomes(answers: list[Chunk]) -> list[int]:
    return [chunk.verdict.outcome for chunk in answers if chunk.WhichOneof("part") == "verdict"]


def offering(swapper: Swapper, round: int, neighbours: Sequence[int], pool: ThreadPoolExecutor, *more: Any) -> Any:
    """Have a peer wait for these neighbours in a round; return once it does."""
    going = pool.submit(swapper.swap, round, payload(swapper.me, round), neighbours, *more)
    wait_until(lambda: going.done() or (round, neighbours[0]) in swapper.meetings.held)
    return going
