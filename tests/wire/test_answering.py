"""The end of an edge that is called, part by part; test_swap has the same between real servers."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest
from parties import Federation
from swapping import LONG_S, hello, offering, outcomes, payload, same
from wires import GONE, HAVE, Failed, called, kinds, peer, whole

from peertune.errors import PeertuneError
from peertune.method import Phase
from peertune.topology import Fault
from peertune.wire import answering
from peertune.wire.codec import encode
from peertune.wire.edge import Edge
from peertune.wire.meeting import KEPT_ROUNDS, MARGIN_S, Meeting
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict, Wait
from peertune.wire.rpc import grpc
from peertune.wire.swap import Progress


def test_the_called_end_counts_an_edge_and_keeps_its_verdict_until_it_was_heard(
    federation: Federation, pool: ThreadPoolExecutor
) -> None:
    swapper = peer(federation)
    for t in range(2):
        going = offering(swapper, t, [2], pool)
        answers = list(called(swapper, 2, hello(t), *whole(2, t), HAVE))
        assert kinds(answers) == ["hello", "total", "data", "verdict"]
        assert answers[-1].verdict == Verdict(outcome=Verdict.COUNTED, round=t)
        assert b"".join(part.data for part in answers) == encode(payload(0, t))
        assert same(going.result(LONG_S)[2], payload(2, t))
    known = swapper.neighbours[2]
    assert (known.up, known.down, known.bytes_sent) == (2, 0, 2 * len(encode(payload(0))))
    assert swapper.meetings.unheard() == set()

    offering(swapper, 2, [2], pool)
    assert outcomes(list(called(swapper, 2, hello(2), *whole(2, 2), HAVE, GONE))) == [Verdict.COUNTED]
    for again in (Hello.PING, Hello.SWAP):
        list(islice(called(swapper, 2, hello(2, again)), 2))
        assert swapper.meetings.unheard() == {(2, 2)}, "it may not have the verdict"
    assert outcomes(list(called(swapper, 2, hello(2, Hello.SETTLE)))) == [Verdict.COUNTED]
    assert swapper.meetings.unheard() == set()
    assert swapper.answering._serving[2] == 0


def test_who_calls_early_is_told_where_this_peer_is_and_how_long_it_waits_itself(
    federation: Federation, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "STILL_HERE_S", 0.0)
    swapper = peer(federation)
    with pytest.raises(Failed) as error:
        list(called(swapper, 2, hello(3)))
    assert (error.value.status, error.value.said) == (grpc.StatusCode.UNAVAILABLE, "takes no part now")
    swapper.enter(2)
    swapper.stepped(1)
    for t in (2, 3):
        early = [called(swapper, 2, hello(t)) for _ in range(3)]
        for call in early:
            assert next(call).hello.round == 2
            assert [next(call).wait for _ in range(2)] == [Wait(round=2, step=1)] * 2
        assert swapper.meetings.waiting == {(t, 2): 3}
        with pytest.raises(Failed) as error:
            list(called(swapper, 2, hello(t)))
        assert (error.value.status, error.value.said) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "too many calls at a time",
        )
        for call in early:
            call.close()
        assert (swapper.meetings.waiting, swapper.answering._serving[2]) == ({}, 0)
    going = offering(swapper, 2, [3], pool)
    early_one = called(swapper, 2, hello(3))
    _, waits = next(early_one), next(early_one).wait
    assert 0 < waits.left_ms <= 1000 * LONG_S
    assert outcomes(list(called(swapper, 2, hello(1)))) == [Verdict.PASSED]
    (refused,) = [part.verdict for part in called(swapper, 2, hello(2)) if part.WhichOneof("part") == "verdict"]
    assert refused == Verdict(outcome=Verdict.REFUSED, reason="calls for round 2, in which there is no edge", round=2)
    swapper.stop_waiting()
    assert going.result(LONG_S) == {}


def test_verdicts_are_remembered_for_some_rounds(federation: Federation) -> None:
    swapper = peer(federation)
    last = 100 - KEPT_ROUNDS
    for t in (last, last + 1, 99):
        swapper.remember(t, [2], [3])
    swapper.swap(100, payload(0), [])

    def asked(client: int, t: int) -> list[int]:
        return outcomes(list(called(swapper, client, hello(t, Hello.SETTLE))))

    assert [asked(2, t) for t in (last, last + 1, 99)] == [[Verdict.PASSED], [Verdict.COUNTED], [Verdict.COUNTED]]
    assert [asked(3, t) for t in (99, 100)] == [[Verdict.PASSED], [Verdict.UNKNOWN]]


def test_a_planned_fault_cuts_its_own_edge_and_a_peer_that_is_down_answers_nobody(
    federation: Federation, pool: ThreadPoolExecutor
) -> None:
    swapper = peer(federation, faults=[Fault(0, 1, edge=(0, 3)), Fault(1, 1, edge=(2, 0)), Fault(2, 2, down=0)])
    for t, cut in ((0, []), (1, [2])):
        going = offering(swapper, t, [2, 3], pool)
        for client in (2, 3):
            call = called(swapper, client, hello(t), *whole(client, t), HAVE)
            if client in (*cut, 3):
                with pytest.raises(Failed) as error:
                    list(call)
                assert error.value.status == grpc.StatusCode.FAILED_PRECONDITION
                assert error.value.said == f"edge cut in round {t}, as planned"
            else:
                assert outcomes(list(call)) == [Verdict.COUNTED]
        assert going.result(LONG_S).keys() == {2, 3} - {*cut, 3}
    assert (swapper.neighbours[3].down, swapper.neighbours[2].down, swapper.neighbours[2].up) == (2, 1, 1)
    swapper.enter(2)
    for purpose in (Hello.SWAP, Hello.SETTLE):
        with pytest.raises(Failed) as error:
            list(called(swapper, 2, hello(2, purpose)))
        assert error.value.status == grpc.StatusCode.FAILED_PRECONDITION
        assert error.value.said == "down in round 2, as planned"


def test_a_roster_that_comes_with_a_payload_is_taken_up_and_two_contents_of_one_start_are_a_clone_s(
    federation: Federation, pool: ThreadPoolExecutor
) -> None:
    swapper, newer = peer(federation), federation.roster()
    going = offering(swapper, 0, [2, 3], pool)
    greets = hello(0, incarnation=3, nonce=5)
    answers = list(called(swapper, 2, greets, Chunk(roster=newer.raw), *whole(2), HAVE))
    assert outcomes(answers) == [Verdict.COUNTED]
    assert swapper.membership.current()[1].serial == newer.serial
    assert outcomes(list(called(swapper, 2, greets, *whole(2), HAVE))) == [Verdict.COUNTED]
    *_, last = called(swapper, 2, greets, *whole(2, 1), HAVE)
    why = "two processes with its key: start 3 sends two contents in one round"
    assert last.verdict == Verdict(outcome=Verdict.REFUSED, reason=why, round=0)
    assert swapper.neighbours[2].clones == 1
    swapper.stop_waiting()
    assert going.result(LONG_S).keys() == {2}


def test_who_is_in_a_later_round_has_had_the_verdicts_of_those_before(federation: Federation) -> None:
    swapper = peer(federation)
    meetings = swapper.meetings
    for client in (2, 3):
        meetings.held[0, client] = Meeting(Edge(verdict=Verdict.COUNTED, unheard=True))
    swapper.enter(1)
    assert meetings.unheard() == {(0, 2), (0, 3)}
    meetings.is_at(2, 1)
    meetings.is_at(3, 0)
    assert meetings.unheard() == {(0, 3)}
    swapper.enter(2)
    assert meetings.unheard() == set(), "nobody needs those of two rounds ago"


def test_one_that_waits_itself_is_waited_for_longer_and_at_most_twice_as_long(
    federation: Federation, pool: ThreadPoolExecutor
) -> None:
    swapper = peer(federation, patience_s=100)
    swapper.enter(0)
    swapper._entered -= 30  # for so long this end has trained, and the other may have to
    offering(swapper, 0, [2], pool)
    meeting = swapper.meetings.held[0, 2]
    for left_s, waited_s in ((0, 100), (80, 80 + MARGIN_S + 2 * 30), (1, 142), (500, 200)):
        swapper.meetings.put_off(meeting, left_s)
        assert waited_s <= meeting.until - meeting.began < waited_s + 20


def test_what_the_called_end_will_not_mix_is_refused_and_the_edge_over(
    federation: Federation, pool: ThreadPoolExecutor
) -> None:
    swapper = peer(federation)
    going = offering(swapper, 0, [2], pool, lambda client, tensors: f"{client} is odd: {len(tensors)}")
    answers = list(called(swapper, 2, hello(0), *whole(2), HAVE))
    assert answers[-1].verdict == Verdict(outcome=Verdict.REFUSED, reason="2 is odd: 2", round=0)
    assert going.result(LONG_S) == {}
    assert outcomes(list(called(swapper, 2, hello(0)))) == [Verdict.PASSED]


@pytest.mark.parametrize("parts", [[Chunk()], [whole(2)[1]], [whole(2)[0]] * 2, [HAVE], [hello(0)]])
def test_what_a_caller_sends_out_of_order_is_refused(
    federation: Federation, pool: ThreadPoolExecutor, parts: list[Chunk]
) -> None:
    swapper = peer(federation)
    going = offering(swapper, 0, [2], pool)
    *_, last = called(swapper, 2, hello(0), *parts)
    why = "refuses what it was sent ()" if parts == [HAVE] else "sends its parts in another order than total, data, "
    assert last.verdict.outcome == Verdict.REFUSED
    assert last.verdict.reason.startswith(why)
    assert going.result(LONG_S) == {} if parts == [HAVE] else not going.done()


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([], "does not begin with a greeting"),
        ([Chunk()], "does not begin with a greeting"),
        ([HAVE], "does not begin with a greeting"),
        ([hello(0, protocol=9)], "protocol differs: "),
    ],
)
def test_who_does_not_greet_as_a_peer_of_this_run_is_refused(
    federation: Federation, parts: list[Chunk], why: str
) -> None:
    swapper = peer(federation)
    swapper.enter(5)
    *_, last = called(swapper, 2, *parts)
    assert (last.verdict.outcome, last.verdict.round) == (Verdict.REFUSED, 5)
    assert last.verdict.reason.startswith(why)


def test_who_only_tries_is_greeted_and_called_back_where_it_asks_for_that(federation: Federation) -> None:
    swapper = peer(federation)
    assert kinds(list(called(swapper, 2, hello(0, Hello.ECHO)))) == ["hello"]
    assert kinds(list(called(swapper, 2, hello(0, Hello.CALL_BACK)))) == ["hello", "verdict"]
    assert swapper.neighbours == {}


def test_a_peer_says_what_it_does(federation: Federation, pool: ThreadPoolExecutor) -> None:
    swapper = peer(federation)
    phase = Phase(frozenset({"B"}), frozenset({"A", "B"}))
    assert swapper.progress() == Progress("starting", 0, 0, None)
    swapper.enter(3, phase)
    for step in (1, 2):
        swapper.stepped(step)
        assert swapper.progress() == Progress("training", 3, step, phase)
    going = offering(swapper, 3, [2], pool)
    assert swapper.progress() == Progress("waiting", 3, 2, phase), "for the other end"
    call = called(swapper, 2, hello(3), *whole(2, 3), HAVE)
    assert next(islice(call, 1, None)).total
    assert swapper.progress().doing == "swapping"
    list(call)
    assert going.result(LONG_S).keys() == {2}
    assert swapper.progress() == Progress("mixing", 3, 2, phase)
    swapper.enter(4)
    assert swapper.progress() == Progress("training", 4, 0, None)
    swapper.pause(0.0)
    assert swapper.progress().doing == "waiting"


def test_a_peer_that_is_done_waits_for_those_who_lack_its_verdict_and_not_for_ever(
    federation: Federation, pool: ThreadPoolExecutor
) -> None:
    for patience_s, told in ((0.3, False), (LONG_S, True)):
        swapper = peer(federation, patience_s=patience_s)
        swapper.meetings.held[0, 2] = Meeting(Edge(verdict=Verdict.COUNTED, unheard=True))
        if told:
            swapper.stop_waiting()
        began = time.monotonic()
        ended = pool.submit(swapper.stop)
        ended.result(LONG_S)
        assert told or time.monotonic() - began >= patience_s
        assert swapper.meetings.unheard() == {(0, 2)}


def test_an_address_that_is_taken_is_named(federation: Federation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PeertuneError, match=f"^{address}: can't be listened at; give an address of this machine"):
            peer(federation).start(address)


def test_a_server_has_room_for_each_seat_s_calls_and_one_watch(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    server, workers = grpc.server, ThreadPoolExecutor

    def counting(number: int, **options: Any) -> ThreadPoolExecutor:
        made["workers"] = number
        return workers(number, **options)

    def serving(pool: ThreadPoolExecutor, **options: Any) -> grpc.Server:
        made["calls"] = options["maximum_concurrent_rpcs"]
        return server(pool, **options)

    monkeypatch.setattr(answering, "ThreadPoolExecutor", counting)
    monkeypatch.setattr(grpc, "server", serving)
    before = [thread.name for thread in threading.enumerate()].count("swap-watch")
    for seats, room in ((0, 16), (9, 31)):
        swapper = peer(federation, seats=seats, insecure=False)
        swapper.start("127.0.0.1:0")
        for t in range(2):
            swapper.swap(t, payload(0), [])
        assert [thread.name for thread in threading.enumerate()].count("swap-watch") <= before + 1
        swapper.stop()
        assert made == {"workers": room, "calls": room}
