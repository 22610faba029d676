"""The end of an edge that calls, part by part; test_swap has the same between real servers."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from parties import Federation
from swapping import LONG_S, hello, offering, outcomes, payload, same
from wires import COUNTED, GONE, HAVE, Failed, Said, Script, called, kinds, peer, said, verdict, whole

from peertune.types import Tensors
from peertune.wire import calling, meeting
from peertune.wire.codec import encode
from peertune.wire.edge import Edge
from peertune.wire.meeting import Meeting
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict, Wait
from peertune.wire.rpc import grpc


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls made again at once."""
    monkeypatch.setattr(calling, "RETRY_S", 0.001)


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


def test_a_caller_that_is_told_to_stop_waiting_still_learns_what_became_of_what_it_promised(
    federation: Federation,
) -> None:
    ends: list[Said] = [COUNTED, GONE]
    for then in ends:
        swapper = peer(federation)
        stopped_waiting: list[Said] = [hello(0), *PAYLOAD, swapper.stop_waiting, then]
        script = Script(swapper, stopped_waiting, [hello(0), COUNTED])
        assert same(swapper.swap(0, payload(0), [1])[1], payload(1))
        assert len(script.calls) == 1 + (then is GONE)
    swapper = peer(federation)
    sooner: list[Said] = [hello(0), *PAYLOAD[:2], swapper.stop_waiting, *PAYLOAD[2:], COUNTED]
    script = Script(swapper, sooner)
    assert swapper.swap(0, payload(0), [1]) == {}, "nothing was promised yet"
    assert len(script.calls) == 1
    assert swapper.swap(1, payload(0), [1]) == {}
    assert len(script.calls) == 1, "nor is anybody called"


def test_what_stays_unknown_does_not_count_and_is_told(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meeting, "SETTLE_S", 0.1)
    unknown = "peer-1: whether it counts round 0 stays unknown; here it does not"
    swapper = peer(federation, patience_s=0.1)
    script = Script(swapper, BROKEN, [GONE])
    assert swapper.swap(0, payload(0), [1]) == {}
    assert len(script.calls) > 1
    assert said(caplog, logging.WARNING) == [unknown, "peer-1: round 0 goes on without it: gone"]
    assert swapper.neighbours[1].given_up

    caplog.clear()
    swapper = peer(federation)
    script = Script(swapper, BROKEN, [hello(0), verdict(Verdict.REFUSED, reason="no dealings")])
    assert swapper.swap(0, payload(0), [1]) == {}
    assert len(script.calls) == 2, "there is no use in asking again"
    assert said(caplog, logging.WARNING) == ["peer-1: refuses (no dealings)", unknown]


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


def test_a_seat_without_a_member_and_two_that_can_only_dial_out_cost_their_edges_at_once(
    federation: Federation,
) -> None:
    swapper = peer(federation)
    assert swapper.swap(0, payload(0), [7]) == {}
    assert swapper.neighbours[7].problem == "nobody has this seat in the roster"
    silent = peer(federation, 2)
    script = Script(silent, [hello(0), *whole(3), COUNTED])
    assert silent.swap(0, payload(2), [3]) == {}
    assert script.calls == []
    assert [edge.final for edge in silent.meetings.of(0)] == [True]


def test_a_caller_takes_up_a_roster_and_where_the_other_is_and_waits_for_it_as_long_as_it_waits_itself(
    federation: Federation,
) -> None:
    swapper, newer = peer(federation, patience_s=100), federation.roster()
    seen: list[Any] = []

    def look() -> None:
        known, meeting = swapper.neighbours[1], swapper.meetings.held[0, 1]
        seen.extend((known.round, known.step, meeting.until - meeting.began))

    waits = Chunk(wait=Wait(round=0, step=3, left_ms=150_000))
    Script(swapper, [hello(0), Chunk(roster=newer.raw), waits, look, *PAYLOAD, COUNTED])
    assert swapper.swap(0, payload(0), [1]).keys() == {1}
    assert swapper.membership.current()[1].serial == newer.serial
    assert seen[:2] == [0, 3]
    assert 150 < seen[2] < 160


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
    swapper = peer(federation, 2)
    Script(swapper, [hello(0, federation="evil")], [GONE])
    assert swapper.refusals([0, 1]) == {}, "one of two can't tell alone"
