"""How a peer greets others, and what it comes to know of them: without a wire, which test_swap and test_doctor have."""

import logging
import math
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parties import Federation
from wires import GONE, Context, Failed, Said, Script

from peertune.errors import IdentityError, PeertuneError, WireError
from peertune.files import write_file
from peertune.identity.incarnation import Incarnation
from peertune.identity.membership import Membership
from peertune.wire.node import (
    CALLS_BACK,
    HELLO_FIELDS,
    PROTOCOL,
    CloneError,
    Neighbour,
    Node,
    Probe,
    SeatError,
    UnusableError,
    nobody,
)
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict
from peertune.wire.rpc import grpc

AGREED = {"rounds": "10", "seed": "0"}
START = Incarnation(1000, 7)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Of three, of whom the third was revoked."""
    made = Federation(tmp_path_factory.mktemp("node"), "hospital-1")
    made.join("hospital-2", "10.0.0.1:50051")
    made.join("hospital-3")
    made.revoke("hospital-3")
    write_file(made.folder / "roster.yaml", made.roster().raw)
    return made


def peer(made: Federation, name: str = "hospital-1", **options: Any) -> Node:
    return Node(Membership(made.folder / name, made.folder / "roster.yaml"), AGREED, incarnation=START, **options)


@pytest.fixture
def node(federation: Federation, caplog: pytest.LogCaptureFixture) -> Iterator[Node]:
    """Client 0, with all that is logged at hand."""
    with caplog.at_level(logging.DEBUG):
        yield peer(federation)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    found = [(record.levelno, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return found


def test_a_seat_is_empty_where_nobody_has_it_or_no_certificate_holds(node: Node) -> None:
    roster = node.membership.current()[1]
    assert [nobody(roster.by_client(client)) for client in (1, 2, 3)] == [
        "",
        "is revoked in the roster, or its certificates have expired",
        "nobody has this seat in the roster",
    ]
    assert [node.name(client) for client in (0, 2, 3)] == ["hospital-1", "hospital-3", "client 3"]
    for client, why in ((2, "is revoked in the roster"), (3, "nobody has this seat"), (0, "has no address")):
        with pytest.raises(SeatError, match=why):
            node.stub(client)


def test_without_tls_only_this_machine_is_called(federation: Federation) -> None:
    with pytest.raises(IdentityError, match=r"^10\.0\.0\.1:50051: is not of this machine alone"):
        peer(federation, insecure=True).stub(1)


@pytest.mark.parametrize(
    ("claimed", "taken"), [("1", 1), ("0", None), ("9", None), ("x", None), ("", None), ("-1", None)]
)
def test_without_tls_a_caller_is_whom_it_claims_to_be_among_the_others(
    federation: Federation, claimed: str, taken: int | None
) -> None:
    node = peer(federation, insecure=True)
    if taken is not None:
        assert node.identify(Context(claimed)).client == taken
        return
    with pytest.raises(Failed) as error:
        node.identify(Context(claimed))
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    told = "refuses this peer, which is not in its roster 1: revoked, or one roster is old"
    assert error.value.details() == told
    assert (node.claim(), peer(federation).claim()) == ([("peertune-client", "0")], [])


def test_a_greeting_says_who_speaks_and_one_that_only_tries_nothing_of_its_start(node: Node) -> None:
    for purpose in (Hello.SWAP, Hello.SETTLE, Hello.PING, Hello.ECHO, Hello.CALL_BACK):
        hello = node.hello(4, purpose)
        assert (hello.protocol, hello.federation, dict(hello.agreed)) == (PROTOCOL, "hospitals", AGREED)
        assert (hello.round, hello.roster_serial, hello.purpose, hello.own_roster) == (4, 1, purpose, False)
        assert abs(hello.clock - time.time()) < 60
        speaks = Incarnation() if purpose in (Hello.ECHO, Hello.CALL_BACK) else START
        assert Incarnation(hello.incarnation, hello.nonce) == speaks


def greeting(node: Node, **other: Any) -> Hello:
    hello = node.hello(0, Hello.SWAP)
    hello.MergeFrom(Hello(**other))
    return hello


def test_what_differs_is_refused_by_its_name_the_federation_and_the_protocol_before_all_else(node: Node) -> None:
    node.check_hello(1, greeting(node))
    for other, why in (
        ({"protocol": 9, "agreed": {"a": "y"}}, f"protocol differs: {PROTOCOL} at hospital-1, 9 at hospital-2"),
        (
            {"federation": "evil", "agreed": {"a": "y"}},
            "federation differs: hospitals at hospital-1, evil at hospital-2",
        ),
        ({"agreed": {"base": "x", "a": "y"}}, "a differs: nothing at hospital-1, y at hospital-2"),
        ({"agreed": {"seed": "1"}}, "seed differs: 0 at hospital-1, 1 at hospital-2"),
        ({"agreed": {"seed": "01"}}, "seed differs: 0 at hospital-1, 01 at hospital-2"),
    ):
        with pytest.raises(UnusableError) as error:
            node.check_hello(1, greeting(node, **other))
        assert str(error.value) == why
    lacks = greeting(node)
    del lacks.agreed["seed"]
    with pytest.raises(UnusableError, match=r"^seed differs: 0 at hospital-1, nothing at hospital-2$"):
        node.check_hello(1, lacks)
    most = greeting(node, agreed={f"{number}": "x" for number in range(HELLO_FIELDS - len(AGREED))})
    with pytest.raises(UnusableError):
        node.check_hello(1, most)
    most.agreed["more"] = "x"
    with pytest.raises(WireError, match="names 65 fields that must agree, where 64 are enough"):
        node.check_hello(1, most)


@pytest.mark.parametrize(("ahead_s", "known"), [(3600.0, True), (-3600.0, True), (-math.inf, False), (1e11, False)])
def test_how_far_ahead_its_clock_is_is_known_of_a_time_of_these_thousand_years(
    node: Node, ahead_s: float, known: bool
) -> None:
    hello = node.hello(0, Hello.SWAP)
    hello.clock = max(0.0, time.time() + ahead_s)
    node.check_hello(1, hello)
    offset = node.neighbours[1].clock_offset_s
    assert (offset is not None and abs(offset - ahead_s) < 60) == known


def test_of_a_newer_roster_that_is_not_passed_on_is_told_once(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    for serial, own in ((2, False), (1, True), (2, True), (2, True), (9, True)):
        node.check_hello(1, greeting(node, roster_serial=serial, own_roster=own))
    has = "hospital-2: has roster 2, which is not passed on, and this peer 1; ask the CA for the newest"
    assert said(caplog) == [(logging.WARNING, has)]


def test_who_is_heard_is_reached_and_waited_for_again_unless_it_lags(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.round = 5
    known = node.neighbours[1] = Neighbour(given_up=True, problem="away")
    assert (node.in_touch([1, 2]), node.last_heard()) == (False, {})
    node.saw(1, 3, step=2)
    assert (known.round, known.step, known.reached, known.problem, known.given_up) == (3, 2, True, "", True)
    assert not node.in_touch([1]), "an edge was lost since"
    assert said(caplog) == []
    before = time.time()
    node.saw(1, 4)
    assert (known.step, known.given_up, node.in_touch([1]), node.in_touch([2])) == (0, False, True, False)
    assert before <= node.last_heard()[1] <= time.time()
    assert said(caplog) == [(logging.WARNING, "hospital-2: is back, in round 4")]
    node.saw(1, 5)
    assert said(caplog) == [], "it was not away"


def test_what_failed_is_told_when_it_begins_and_what_was_planned_is_not(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    away, wrong = Failed(grpc.StatusCode.UNAVAILABLE, "no route\nto host"), UnusableError("seed differs")
    known = node.neighbours[1] = Neighbour(reached=True)
    for planned in (
        Failed(grpc.StatusCode.FAILED_PRECONDITION, "down"),
        Failed(grpc.StatusCode.CANCELLED, "settled"),
        CloneError("two processes"),
    ):
        node.failed(1, planned)
        assert known.reached
        assert known.problem == (planned.said if isinstance(planned, Failed) else "two processes")
    assert said(caplog) == []
    node.failed(1, away)
    node.failed(1, away)
    assert (known.reached, known.problem) == (False, "no route to host")
    assert said(caplog) == [(logging.INFO, "hospital-2: no route to host")]
    node.failed(1, wrong)
    node.failed(1, wrong)
    assert said(caplog) == [(logging.WARNING, "hospital-2: seed differs")]
    node.failed(1, SeatError("nobody is there"))
    assert said(caplog) == [(logging.INFO, "hospital-2: nobody is there")]


def test_a_copy_is_told_once_and_counted_and_changes_nothing_of_who_came_first(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.check_incarnation(1, Hello(incarnation=1000, nonce=1))
    node.check_incarnation(1, Hello())
    for _ in range(3):
        with pytest.raises(CloneError, match="two processes with its key, of one start"):
            node.check_incarnation(1, Hello(incarnation=1000, nonce=2))
    known = node.neighbours[1]
    assert (known.incarnation, known.nonce, known.clones) == (1000, 1, 3)
    ((level, text),) = said(caplog)
    assert level == logging.WARNING
    assert text.startswith("hospital-2: two processes with its key, of one start (number 1000)")
    assert text.endswith("; one is refused; have its owner stop the one that should not run, or revoke it")
    node.check_incarnation(1, Hello(incarnation=1001, nonce=3))
    assert (known.incarnation, known.nonce) == (1001, 3)


def test_bytes_are_counted_of_each_both_ways(node: Node) -> None:
    for sent, received in ((1, 10), (2, 20)):
        node.count_bytes(1, sent, received)
    assert (node.neighbours[1].bytes_sent, node.neighbours[1].bytes_received) == (3, 30)


def test_a_newer_roster_is_passed_on_and_one_that_can_not_be_used_is_not_taken(node: Node) -> None:
    roster = node.membership.current()[1]
    passed = [
        list(node.newer(Hello(roster_serial=serial, own_roster=own)))
        for serial, own in ((0, False), (1, False), (0, True))
    ]
    assert [[chunk.roster for chunk in chunks] for chunks in passed] == [[roster.raw], [], []]
    with pytest.raises(WireError, match=r"^sends a roster that can't be used \(roster: isn't signed; "):
        node.adopt(1, b"serial: 7\n")
    node.adopt(1, roster.raw)


def test_who_sent_a_newer_roster_is_told_once_it_is_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Federation(tmp_path, "hospital-1", "hospital-2")
    write_file(tmp_path / "roster.yaml", made.roster().raw)
    node = peer(made)
    for _ in range(2):
        node.adopt(1, newer := made.roster().raw)
        assert node.membership.current()[1].raw == newer
        node.adopt(1, newer)
    assert [text for _, text in said(caplog) if text.startswith("hospital-2")] == [
        "hospital-2: sent roster 2, which is in use",
        "hospital-2: sent roster 3, which is in use",
    ]


def test_who_asks_to_be_called_back_hears_one_of_few_reasons_and_may_ask_a_few_times_a_minute(node: Node) -> None:
    def asked(client: int) -> str:
        verdict = node.call_back(client)
        assert verdict.outcome == Verdict.REFUSED
        return verdict.reason

    node._calling_back.add(1)
    assert asked(1) == "is calling back already"
    node._calling_back.discard(1)
    silent = "got no answer from this peer there"
    assert [asked(1) for _ in range(CALLS_BACK + 1)] == [silent] * CALLS_BACK + [
        "was asked too often: ask again in a minute"
    ]
    assert asked(2) == silent, "another member, which has no address"


# ---- probing


def probed(node: Node, *answer: Said, **options: Any) -> tuple[Probe, Script]:
    script = Script(node, answer)
    return node.probe(1, 7.0, **options), script


def greets(**other: Any) -> Chunk:
    said: dict[str, Any] = {"protocol": PROTOCOL, "federation": "hospitals", "agreed": AGREED, "roster_serial": 3}
    return Chunk(hello=Hello(**said | other))


def test_who_probes_says_that_it_only_tries_and_learns_how_the_other_differs(node: Node) -> None:
    probe, script = probed(node, greets(clock=time.time() + 3600, own_roster=True, agreed={"seed": "1"}))
    assert probe.clock_offset_s is not None
    assert abs(probe.clock_offset_s - 3600) < 60
    differs = [("rounds", "10", "nothing"), ("seed", "0", "1")]
    assert replace(probe, clock_offset_s=None) == Probe(None, 3, True, True, differs, None)
    (call,), (member,) = script.calls, script.dialled
    assert call.options == {"timeout": 7.0, "metadata": []}
    assert [part.hello.purpose for part in call.sent] == [Hello.ECHO]
    assert member == node.membership.current()[1].by_client(1)
    assert node.neighbours == {}, "nothing else changes"


def test_runs_are_compared_where_both_ends_have_one(federation: Federation, node: Node) -> None:
    other = {"protocol": 9, "federation": "evil"}
    both = [("federation", "hospitals", "evil"), ("protocol", f"{PROTOCOL}", "9")]
    silent, _ = probed(node, greets(agreed={}, **other))
    assert (silent.takes_part, silent.differs) == (False, both)
    looking = Node(node.membership, {})
    looks, _ = probed(looking, greets(agreed={"seed": "1"}, **other))
    assert (looks.takes_part, looks.differs) == (True, both)


@pytest.mark.parametrize(
    ("answer", "back"),
    [
        (Verdict(outcome=Verdict.HAVE), ""),
        (Verdict(outcome=Verdict.REFUSED, reason="a\nb"), "a b"),
        (Verdict(outcome=Verdict.REFUSED), "it does not say why"),
    ],
)
def test_who_asks_to_be_called_back_learns_what_came_of_it(node: Node, answer: Verdict, back: str) -> None:
    probe, script = probed(node, greets(), Chunk(verdict=answer), call_back=True, address="[::1]:9")
    assert probe.back == back
    assert [part.hello.purpose for part in script.calls[0].sent] == [Hello.CALL_BACK]
    assert [member and member.address for member in script.dialled] == ["[::1]:9"]


def test_where_nobody_answers_as_a_peer_probing_is_one_line(federation: Federation, node: Node) -> None:
    for said, why in (
        (Failed(grpc.StatusCode.UNAVAILABLE, "no route\nto host"), "^no route to host$"),
        (Failed(grpc.StatusCode.UNAVAILABLE), r"^StatusCode\.UNAVAILABLE$"),
        (Chunk(verdict=Verdict()), "^does not begin with a greeting$"),
    ):
        with pytest.raises(PeertuneError, match=why):
            probed(node, said)
    open_node = peer(federation, insecure=True)
    _, script = probed(open_node, greets())
    assert script.calls[0].options["metadata"] == [("peertune-client", "0")]


def test_a_peer_calls_back_at_the_first_places_of_an_address_and_from_outside_at_no_private_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Federation(tmp_path)
    made.join("hospital-1", "one.example.org:1")
    made.join("hospital-2", "two.example.org:2")
    write_file(tmp_path / "roster.yaml", made.roster().raw)
    private, public = ["10.0.0.1", "fd00::1", "10.0.0.2", "10.0.0.3"], ["8.8.8.8"]
    silent, not_private = "got no answer from this peer there", "does not call private addresses, since its own is none"
    come = [greets()]
    for own, theirs, answers, why, tried in (
        (public, public, [come], "", ["8.8.8.8:2"]),
        (public, [*public, *private], [come], not_private, []),
        ([*public, *private], private, [[GONE], come], "", ["10.0.0.1:2", "[fd00::1]:2"]),
        (private, private, [[GONE]], silent, ["10.0.0.1:2", "[fd00::1]:2", "10.0.0.2:2"]),
        (private, [], [come], silent, []),
    ):
        where = {"one.example.org": own, "two.example.org": theirs}

        def resolved(host: str, port: int, where: Any = where, **_: object) -> list[tuple[Any, ...]]:
            if not where[host]:
                raise OSError("no such name")
            return [(0, 0, 0, "", (place, port)) for place in where[host]]

        monkeypatch.setattr(socket, "getaddrinfo", resolved)
        node = peer(made)
        script = Script(node, *answers)
        found = node.call_back(1)
        assert (found.outcome, found.reason) == (Verdict.REFUSED if why else Verdict.HAVE, why)
        assert [member and member.address for member in script.dialled] == tried
        assert all(call.options["timeout"] <= 5 for call in script.calls)
        assert node._calling_back == set()


def test_a_channel_is_made_anew_when_the_roster_changes_whom_it_calls(tmp_path: Path) -> None:
    made = Federation(tmp_path, "hospital-1")
    made.join("hospital-2", "10.0.0.1:1")
    write_file(tmp_path / "roster.yaml", made.roster().raw)
    node = peer(made)
    script = Script(node, [greets()])
    for address in ("10.0.0.1:1", "10.0.0.1:2"):
        made.join("hospital-2", address)
        write_file(tmp_path / "roster.yaml", made.roster().raw)
        for _ in range(2):
            list(node.stub(1)(iter([])))
    assert [member and member.address for member in script.dialled] == ["10.0.0.1:1", "10.0.0.1:2"]
