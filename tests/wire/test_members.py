"""Members that are not what they seem: called peers that lie, those that are refused, and copies of a peer."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from federation import Federation, found
from swapping import AGREED, LONG_S, acquaint, call, hello, offering, outcomes, payload, peers, same

from peertune.identity.incarnation import Incarnation
from peertune.identity.membership import Membership
from peertune.wire import tls
from peertune.wire.codec import encode
from peertune.wire.node import OPTIONS, PROTOCOL, SERVICE, Neighbour
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict, Wait
from peertune.wire.rpc import grpc
from peertune.wire.swap import Swapper

HAVE = Chunk(verdict=Verdict(outcome=Verdict.HAVE))
COUNTED = Chunk(verdict=Verdict(outcome=Verdict.COUNTED))
GOOD = encode(payload(2))
TOTAL = Chunk(total=len(GOOD))
NAN = encode({name: x * torch.nan for name, x in payload(2).items()})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return found(tmp_path_factory.mktemp("three"), 3)


# ---- called peers that lie


@contextmanager
def answered(made: Federation, client: int, answers: Callable[[], Iterator[Chunk]]) -> Iterator[list[str]]:
    """Have a member answer each call as it likes, with what it returns; yield what it was sent, by kind."""
    came: list[str] = []

    def answer(requests: Iterator[Chunk], context: grpc.ServicerContext) -> Iterator[Chunk]:
        came.append(str(next(requests).WhichOneof("part")))
        yield from answers()
        came.extend(str(one.WhichOneof("part")) for one in requests)

    server = grpc.server(ThreadPoolExecutor(4), options=OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(
        answer, request_deserializer=Chunk.FromString, response_serializer=Chunk.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Swap": handler}),))
    membership = Membership(made.peer(client), made.roster)
    server.add_secure_port(made.address(client), tls.server_credentials(membership.current))
    server.start()
    try:
        yield came
    finally:
        server.stop(0).wait()


LIES: dict[str, tuple[list[Chunk], str]] = {  # what is answered, what is said of it
    "no greeting": ([TOTAL, Chunk(data=GOOD), COUNTED], "does not begin with a greeting"),
    "a verdict at once": ([COUNTED], "does not begin with a greeting"),
    "no part": ([hello(0), Chunk()], "sends a part that is not known"),
    "another protocol": ([hello(0, protocol=9)], f"protocol differs: {PROTOCOL} at peer-0, 9 at peer-2"),
    "huge total": ([hello(0), Chunk(total=2**63)], "payload: 9223372036854775808 bytes are announced"),
    "two totals": ([hello(0), TOTAL, TOTAL], "sends a payload that nobody asked for"),
    "no total": ([hello(0), Chunk(data=GOOD)], "sends data before its size"),
    "too much": ([hello(0), TOTAL, Chunk(data=GOOD + b"x")], "payload: a chunk has 1337 bytes"),
    "not a number": ([hello(0), TOTAL, Chunk(data=NAN)], "q.A: holds nan where finite"),
    "noise": ([hello(0), TOTAL, Chunk(data=random.Random(0).randbytes(len(GOOD)))], "header: is said to"),
    "a forged roster": ([hello(0), Chunk(roster=b"federation: trial\n")], "sends a roster that can't be used"),
    "counted without a payload": ([hello(0), COUNTED], "counts an edge of which this end has nothing"),
    "counted before all came": ([hello(0), TOTAL, Chunk(data=GOOD[:-1]), COUNTED], "counts an edge of which"),
    "a forged line": ([hello(0), Chunk(verdict=Verdict(outcome=4, reason="a\nb"))], "refuses (a b)"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_of_a_peer_that_is_called_costs_its_edge_and_nothing_else(three: Federation, lie: str) -> None:
    answers, said = LIES[lie]
    with (
        answered(three, 2, lambda: iter(answers)) as came,
        peers(three, [0, 1]) as swappers,
        ThreadPoolExecutor() as pool,
    ):
        begin = time.monotonic()
        going = pool.submit(swappers[0].swap, 0, payload(0), [1, 2])
        assert same(swappers[1].swap(0, payload(1), [0])[0], payload(0))
        heard = going.result(LONG_S)
        assert heard.keys() == {1}
        assert same(heard[1], payload(1))
        assert time.monotonic() - begin < 15, "it is not tried again"
        assert came.count("hello") == 1
        known = swappers[0].neighbours[2]
        assert known.problem.startswith(said)
        assert known.problem.isprintable()
        assert (known.up, known.down) == (0, 1)


def test_a_called_peer_cannot_put_off_the_end_of_a_round_for_ever(three: Federation) -> None:
    over, waiting = threading.Event(), threading.Event()

    def waits() -> Iterator[Chunk]:
        yield hello(0)
        if not waiting.is_set():
            yield Chunk(verdict=Verdict(outcome=Verdict.PASSED))
        while waiting.is_set() and not over.wait(0.05):
            yield Chunk(wait=Wait(round=0, step=1, left_ms=2**31))

    with answered(three, 2, waits), peers(three, [0]) as swappers, ThreadPoolExecutor() as pool:
        patience_s = 1.0 + 10 * acquaint(swappers[0], 2)
        swappers[0].meetings.patience_s = patience_s
        waiting.set()
        begin = time.monotonic()
        going = pool.submit(swappers[0].swap, 0, payload(0), [2])
        try:
            assert going.result(LONG_S) == {}, "it waits for twice the patience"
            assert swappers[0].neighbours[2].step == 1, "it was called, and told to wait"
            assert time.monotonic() - begin >= 2 * patience_s
        finally:
            over.set()
            swappers[0].stop_waiting()


# ---- who is refused


def test_a_revoked_peer_with_an_old_roster_learns_that_all_refuse_it_and_who_is_away_does_not(tmp_path: Path) -> None:
    made = found(tmp_path, 4)
    old = made.folder / "old.yaml"
    old.write_bytes(made.roster.read_bytes())
    made.parties.revoke("peer-3")
    made.issue()
    with peers(made, [0, 1]) as there, peers(made, [3], {3: old}) as revoked:
        assert there[0].refusals([1], LONG_S) == {}, "who is starting refuses nobody"
        for swapper in there.values():
            swapper.enter(0)
        why = "ends the handshake with this peer: revoked, or one roster is old"
        assert revoked[3].refusals([0, 1], LONG_S) == {"peer-0": why, "peer-1": why}
        assert revoked[3].refusals([0, 1, 2], LONG_S) == {"peer-0": why, "peer-1": why}, "most, and nobody else answers"
        assert revoked[3].refusals([0, 2], LONG_S) == {}, "one of two can't tell"
        assert there[0].refusals([2], LONG_S) == there[0].refusals([3], LONG_S) == {}, (
            "nobody is there, nobody has the seat"
        )
        assert there[0].refusals([1, 2], LONG_S) == {}
    made.parties.join("peer-4", f"127.0.0.1:{made.ports[3]}")
    made.issue()
    with socket.create_server(("127.0.0.1", made.ports[3])) as forwards, peers(made, [0]) as one:

        def forward() -> None:
            while True:
                forwards.accept()[0].close()

        threading.Thread(target=forward, daemon=True).start()
        assert one[0].refusals([4], LONG_S) == {}, "a port that is forwarded to nobody"
        assert "refused" not in one[0].neighbours[4].problem, "it is there, and hangs up"


def test_peers_that_differ_refuse_each_other(three: Federation) -> None:
    with peers(three, [0]) as one, peers(three, [1], agreed=AGREED | {"seed": "7"}) as other:
        for swapper in (one | other).values():
            swapper.enter(0)
        assert one[0].refusals([1], LONG_S) == {"peer-1": "seed differs: 0 at peer-0, 7 at peer-1"}


# ---- two processes with one identity


FIRST, COPY, LATER = Incarnation(1000, 1), Incarnation(1000, 2), Incarnation(1001, 3)


def met(made: Federation, here: Swapper, incarnation: Incarnation | None, round: int, content: int) -> Neighbour | str:
    """Have peer 1, of this start, swap `content` with peer 0 and stop; return what it knows then, or its problem."""
    with peers(made, [1], incarnation=incarnation) as there, ThreadPoolExecutor() as pool:
        going = pool.submit(here.swap, round, payload(0, round), [1])
        came = there[1].swap(round, payload(1, content), [0])
        assert going.result(LONG_S).keys() == ({1} if came else set())
        known = there[1].neighbours[0]
        return known if came else known.problem


def test_a_peer_that_is_started_again_makes_a_round_anew_with_other_contents(
    three: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    with peers(three, [0]) as swappers:
        assert isinstance(met(three, swappers[0], FIRST, 0, content=0), Neighbour)
        swappers[0].enter(1)
        with peers(three, [1], incarnation=LATER) as again:  # from an older checkpoint
            assert same(again[1].swap(0, payload(1, 9), [0])[0], payload(0))
        assert isinstance(met(three, swappers[0], None, 1, content=1), Neighbour), "a version that does not say it"
        known = swappers[0].neighbours[1]
        assert (known.incarnation, known.nonce, known.clones) == (*asdict(LATER).values(), 0)
    assert "two processes" not in caplog.text


@pytest.mark.parametrize(("before", "after"), [(FIRST, COPY), (LATER, FIRST)])
def test_a_copy_of_a_peer_is_refused_told_once_and_counted(
    three: Federation, caplog: pytest.LogCaptureFixture, before: Incarnation, after: Incarnation
) -> None:
    with peers(three, [0]) as swappers:
        assert isinstance(met(three, swappers[0], before, 0, content=0), Neighbour)
        for t in (1, 2):
            problem = met(three, swappers[0], after, t, content=t)
            assert isinstance(problem, str)
            assert problem.startswith("refuses (two processes with its key")
        known = swappers[0].neighbours[1]
        assert (known.incarnation, known.nonce) == (before.number, before.nonce)
        assert known.clones >= 2
        assert isinstance(met(three, swappers[0], before, 3, content=3), Neighbour), "who came first goes on"
        said = [record.getMessage() for record in caplog.records]
        assert len([line for line in said if line.startswith("peer-1: two processes with its key")]) == 1
    with peers(three, [0], known={1: replace(known)}) as again:
        problem = met(three, again[0], after, 0, content=0)
        assert isinstance(problem, str), "what was known outlives a restart"


def test_what_a_thief_said_of_its_start_does_not_keep_out_a_member_with_a_new_key(tmp_path: Path) -> None:
    made = found(tmp_path, 3)
    highest = Incarnation(2**62, 1)
    with peers(made, [0]) as swappers:
        assert isinstance(met(made, swappers[0], highest, 0, content=0), Neighbour)
        assert isinstance(met(made, swappers[0], FIRST, 1, content=1), str), "of one key a lower number proves a copy"
        for renews in (True, False):
            if not renews:
                made.parties.revoke("peer-1")
            made.parties.join("peer-1", made.address(1))
            made.issue()
            came = met(made, swappers[0], FIRST, 2 + (not renews), content=2)
            assert isinstance(came, str if renews else Neighbour), "while the old key holds, it counts"
        known = swappers[0].neighbours[1]
        assert (known.incarnation, known.nonce) == (FIRST.number, FIRST.nonce)


def test_one_start_that_sends_two_contents_for_a_round_is_a_copy_in_memory(three: Federation) -> None:
    with peers(three, [0]) as swappers, ThreadPoolExecutor() as pool:
        for t, number in ((0, 0), (1, 1000)):
            going = offering(swappers[0], t, [2], pool)
            answered = []
            for content in (2, 2, 8):
                data = encode(payload(2, content))
                said = hello(t, incarnation=number, nonce=number)
                answered += outcomes(call(three, 2, 0, iter([said, Chunk(total=len(data)), Chunk(data=data), HAVE])))
            last = Verdict.REFUSED if number else Verdict.COUNTED
            assert answered == [Verdict.COUNTED, Verdict.COUNTED, last]
            assert same(going.result(LONG_S)[2], payload(2, 2)), "the first stays in use"
            assert swappers[0].neighbours[2].clones == bool(number)


def test_who_only_tries_whether_it_gets_through_says_nothing_of_its_start(three: Federation) -> None:
    with peers(three, [0]) as swappers, peers(three, [1], incarnation=LATER) as there:
        swappers[0].enter(0)
        there[1].probe(0, LONG_S)
        assert swappers[0].ask_rounds([1], LONG_S) == {}
        there[1].enter(0)
        assert swappers[0].ask_rounds([1], LONG_S) == {1: 0}
        assert swappers[0].neighbours[1].incarnation == 1001
        greeted = call(three, 2, 1, iter([hello(0, Hello.ECHO)]))[0].hello
        assert (greeted.incarnation, greeted.nonce) == (0, 0)
