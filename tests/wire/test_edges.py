"""What becomes of one edge at each of its ends, part by part; test_swap has the same between real servers."""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest
import torch
from parties import Federation
from swapping import AGREED, LONG_S, hello, offering, outcomes, payload, same
from wires import GONE, Failed, Said, Script, called

from peertune.files import write_file
from peertune.identity.membership import Membership
from peertune.method import Phase
from peertune.topology import Fault
from peertune.types import Tensors
from peertune.wire import answering, calling, meeting
from peertune.wire.codec import encode
from peertune.wire.edge import Edge
from peertune.wire.meeting import KEPT_ROUNDS, Meeting
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict, Wait
from peertune.wire.rpc import grpc
from peertune.wire.swap import Progress, Swapper


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Clients 0 and 1 have addresses, 2 and 3 can only dial out."""
    made = Federation(tmp_path_factory.mktemp("edges"), name="trial")
    for client in range(4):
        made.join(f"peer-{client}", f"127.0.0.1:{client + 1}" if client < 2 else None)
    write_file(made.folder / "roster.yaml", made.roster().raw)
    return made


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls made again at once."""
    monkeypatch.setattr(calling, "RETRY_S", 0.001)


started: list[Swapper] = []


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for peers to swap in; at the end all are told to hurry, so that a test that fails ends, too."""
    with ThreadPoolExecutor(4) as made:
        yield made
        for swapper in started:
            swapper.hurry()
    started.clear()


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


# ---- the end that is called


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
    swapper.stepped()
    for t in (2, 3):
        early = [called(swapper, 2, hello(t)) for _ in range(3)]
        for call in early:
            assert next(call).hello.round == 2
            assert [next(call).wait for _ in range(2)] == [Wait(round=2, step=1)] * 2
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
    swapper.hurry()
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
        swapper.stepped()
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
            swapper.hurry()
        began = time.monotonic()
        ended = pool.submit(swapper.stop)
        ended.result(LONG_S)
        assert told or time.monotonic() - began >= patience_s
        assert swapper.meetings.unheard() == {(0, 2)}


# ---- the end that calls


def test_a_caller_sends_its_own_and_takes_the_verdict_of_the_other(federation: Federation) -> None:
    swapper = peer(federation)
    script = Script(swapper, [hello(0), *whole(1), COUNTED])
    assert same(swapper.swap(0, payload(0), [1])[1], payload(1))
    (call,) = script.calls
    assert LONG_S - 60 < call.options["timeout"] <= LONG_S
    assert call.options["metadata"] == [("peertune-client", "0")]
    sent = call.sent
    assert kinds(sent) == ["hello", "total", "data", "verdict"]
    assert (sent[0].hello.purpose, sent[-1].verdict) == (Hello.SWAP, Verdict(outcome=Verdict.HAVE))
    assert b"".join(part.data for part in sent) == encode(payload(0))
    known = swapper.neighbours[1]
    assert (known.up, known.bytes_received, swapper.meetings.held[0, 1].edge.streams) == (
        1,
        len(encode(payload(1))),
        frozenset(),
    )


PAYLOAD = whole(1)
BROKEN: list[Said] = [hello(0), *PAYLOAD, GONE]  # after which this end has promised to ask


@pytest.mark.parametrize(
    ("answers", "purposes"),
    [
        ([[GONE], [hello(0), *PAYLOAD, COUNTED]], ["SWAP", "SWAP"]),
        ([[hello(0), *PAYLOAD[:2], GONE], [hello(0), *PAYLOAD, COUNTED]], ["SWAP", "SWAP"]),
        ([BROKEN, [hello(0), COUNTED]], ["SWAP", "SETTLE"]),
        ([BROKEN, [GONE], [hello(0), COUNTED]], ["SWAP", "SETTLE", "SETTLE"]),
        (
            [BROKEN, [hello(0), verdict(Verdict.UNKNOWN)], [hello(0), *PAYLOAD, COUNTED]],
            ["SWAP", "SETTLE", "SWAP"],
        ),
    ],
)
def test_a_call_that_breaks_is_made_again_and_asks_for_the_verdict_where_there_may_be_one(
    federation: Federation, answers: list[list[Said]], purposes: list[str]
) -> None:
    swapper = peer(federation, patience_s=20)
    script = Script(swapper, *answers)
    assert same(swapper.swap(0, payload(0), [1])[1], payload(1))
    assert [Hello.Purpose.Name(call.sent[0].hello.purpose) for call in script.calls] == purposes


def test_a_caller_that_is_told_to_hurry_still_learns_what_became_of_what_it_promised(
    federation: Federation,
) -> None:
    ends: list[Said] = [COUNTED, GONE]
    for then in ends:
        swapper = peer(federation)
        hurried: list[Said] = [hello(0), *PAYLOAD, swapper.hurry, then]
        script = Script(swapper, hurried, [hello(0), COUNTED])
        assert same(swapper.swap(0, payload(0), [1])[1], payload(1))
        assert len(script.calls) == 1 + (then is GONE)
    swapper = peer(federation)
    sooner: list[Said] = [hello(0), *PAYLOAD[:2], swapper.hurry, *PAYLOAD[2:], COUNTED]
    script = Script(swapper, sooner)
    assert swapper.swap(0, payload(0), [1]) == {}, "nothing was promised yet"
    assert len(script.calls) == 1
    assert swapper.swap(1, payload(0), [1]) == {}
    assert len(script.calls) == 1, "nor is anybody called"


def test_what_stays_unknown_does_not_count_and_is_told(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meeting, "SETTLE_S", 0.1)
    swapper = peer(federation, patience_s=0.1)
    script = Script(swapper, BROKEN, [GONE])
    assert swapper.swap(0, payload(0), [1]) == {}
    assert len(script.calls) > 1
    assert said(caplog, logging.WARNING) == [
        "peer-1: whether it counts round 0 stays unknown; here it does not",
        "peer-1: round 0 goes on without it: gone",
    ]
    assert swapper.neighbours[1].given_up


def test_who_went_on_without_this_peer_is_known_where_it_is(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    swapper = peer(federation)
    script = Script(swapper, [hello(5), verdict(Verdict.PASSED, round=7)])
    assert not swapper.passed_by(0)
    assert swapper.swap(0, payload(0), [1]) == {}
    assert (swapper.passed_by(0), swapper.passed_by(1), len(script.calls)) == (True, False, 1)
    known = swapper.neighbours[1]
    assert (known.round, known.down, known.given_up, known.problem) == (7, 1, False, "")
    assert said(caplog, logging.WARNING, logging.ERROR) == []


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([hello(0), verdict(Verdict.REFUSED, reason="a\nb")], "refuses (a b)"),
        ([COUNTED], "does not begin with a greeting"),
        ([hello(0), COUNTED], "counts an edge of which this end has nothing"),
        ([hello(0), *PAYLOAD[1:]], "sends data before its size"),
        ([hello(0), PAYLOAD[0], PAYLOAD[0]], "sends a payload that nobody asked for"),
        ([hello(0), Chunk(total=7)], "payload: 7 bytes are announced where 1200 to"),
        ([hello(0), Chunk()], "sends a part that is not known"),
        ([hello(0, protocol=9)], "protocol differs: "),
        ([Failed(grpc.StatusCode.FAILED_PRECONDITION, "down in round 0, as planned")], "down in round 0, as planned"),
    ],
)
def test_what_trying_again_would_not_mend_is_tried_once(
    federation: Federation, caplog: pytest.LogCaptureFixture, answer: list[Said], problem: str
) -> None:
    swapper = peer(federation)
    script = Script(swapper, answer)
    assert swapper.swap(0, payload(0), [1]) == {}
    (call,) = script.calls
    known = swapper.neighbours[1]
    assert known.problem.startswith(problem)
    assert (known.down, known.given_up) == (1, False)
    planned = "planned" in problem
    assert [line.startswith(f"peer-1: {problem}") for line in said(caplog, logging.WARNING)] == [True] * (not planned)
    if not (planned or "refuses" in problem or "differs" in problem):
        assert call.sent[-1].verdict.outcome == Verdict.REFUSED
        assert call.sent[-1].verdict.reason.startswith(problem), "the other end is told"


def test_what_a_caller_will_not_mix_it_refuses_and_a_fault_of_this_end_costs_the_edge_only(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    def odd(client: int, tensors: Tensors) -> str:
        return f"{client} is odd: {torch.equal(tensors['q.A'], payload(1)['q.A'])}"

    def broken(client: int, tensors: Tensors) -> str:
        raise ValueError("what this end made")

    for check, line, sent in (
        (odd, "peer-1: 1 is odd: True", Verdict(outcome=Verdict.REFUSED, reason="1 is odd: True")),
        (broken, "peer-1: ValueError: what this end made", None),
    ):
        caplog.clear()
        swapper = peer(federation)
        script = Script(swapper, [hello(0), *PAYLOAD, verdict(Verdict.REFUSED, reason="so be it")])
        assert swapper.swap(0, payload(0), [1], check) == {}
        assert said(caplog, logging.WARNING, logging.ERROR) == [line]
        (call,) = script.calls
        assert [part.verdict for part in call.sent if part.WhichOneof("part") == "verdict"] == ([sent] if sent else [])


def test_a_call_is_made_again_after_longer_and_longer_and_every_two_seconds_in_the_end(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calling, "RETRY_S", 0.2)
    swapper = peer(federation)
    script = Script(swapper, [GONE])
    waits: list[float] = []

    def wait(client: int, meeting: Meeting, seconds: float) -> None:
        assert client == 1
        waits.append(seconds)
        if len(waits) == 5:
            swapper.meetings.do(meeting, Edge.unusable)

    swapper.meetings.wait = wait  # type: ignore[method-assign]
    assert swapper.swap(0, payload(0), [1]) == {}
    assert waits == [0.4, 0.8, 1.6, 2.0, 2.0]
    assert len(script.calls) == 5
    assert swapper.neighbours.keys() == {1}


def test_the_higher_of_two_leaves_the_first_call_to_the_lower_unless_that_was_given_up(
    federation: Federation, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calling, "FIRST_CALL_S", LONG_S)
    swapper = peer(federation, 1)
    script = Script(swapper, [hello(1), *whole(0, 1), COUNTED])
    going = offering(swapper, 0, [0], pool)
    assert outcomes(list(called(swapper, 0, hello(0), *whole(0), HAVE))) == [Verdict.COUNTED]
    assert same(going.result(LONG_S)[0], payload(0))
    assert script.calls == []
    swapper.neighbours[0].given_up = True
    assert same(swapper.swap(1, payload(1, 1), [0])[0], payload(0, 1))
    assert len(script.calls) == 1


def test_who_is_asked_where_it_is_says_so_and_who_refuses_says_why(federation: Federation) -> None:
    swapper = peer(federation)
    script = Script(swapper, [hello(4)])
    assert swapper.ask_rounds([1, 2, 7], 7.0) == {1: 4, 2: 4}
    assert [[part.hello.purpose for part in call.sent] for call in script.calls] == [[Hello.PING]] * 2
    assert all(6 < call.options["timeout"] <= 7 for call in script.calls)
    assert swapper.refusals([1, 2, 7]) == {}
    for answer, why in (
        (Failed(grpc.StatusCode.UNAUTHENTICATED, "refuses\nthis peer"), "refuses this peer"),
        (hello(0, federation="evil"), "federation differs: trial at peer-0, evil at peer-1"),
        (GONE, None),
    ):
        swapper = peer(federation)
        Script(swapper, [answer])
        assert swapper.ask_rounds([1]) == {}
        assert swapper.refusals([1, 7]) == ({} if why is None else {"peer-1": why})
    assert 7 not in swapper.neighbours, "nobody has that seat"


# ---- the server


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
