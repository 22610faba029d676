"""Swaps between real servers over real TLS: what counts, what doesn't, and that both ends agree on it."""

import logging
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from federation import Federation, found, free_ports
from processes import wait_until
from swapping import (
    AGREED,
    LONG_S,
    acquaint,
    all_swap,
    assert_all_heard,
    call,
    hello,
    offering,
    outcomes,
    payload,
    peers,
    same,
)

from peertune.files import write_file
from peertune.identity.membership import Membership
from peertune.topology import GRAPHS
from peertune.types import Tensors
from peertune.wire import tls
from peertune.wire.codec import encode
from peertune.wire.node import METHOD, PROTOCOL
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict
from peertune.wire.rpc import grpc
from peertune.wire.swap import Swapper


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return found(tmp_path_factory.mktemp("three"), 3)


def test_everybody_hears_everybody(three: Federation) -> None:
    with peers(three, range(3)) as swappers:
        for t in range(3):
            assert_all_heard(swappers, all_swap(swappers, t), t)
        assert swappers[0].neighbours[1].bytes_received == 3 * len(encode(payload(1)))


def test_payloads_of_this_round_and_the_last_are_at_hand_and_no_others(three: Federation) -> None:
    with peers(three, range(2)) as swappers:
        for t in range(4):
            all_swap(swappers, t)
        said = [Chunk(total=len(GOOD)), Chunk(data=GOOD), HAVE]
        for t, verdict in ((3, Verdict.COUNTED), (2, Verdict.COUNTED), (1, Verdict.PASSED), (0, Verdict.PASSED)):
            answers = call(three, 1, 0, iter([hello(t), *(said if verdict == Verdict.COUNTED else [])]))
            assert outcomes(answers) == [verdict]
            sent = b"".join(chunk.data for chunk in answers)
            assert sent == (encode(payload(0, t)) if verdict == Verdict.COUNTED else b"")


def test_a_payload_of_many_chunks_arrives(three: Federation) -> None:
    with peers(three, range(2)) as swappers:
        assert_all_heard(swappers, all_swap(swappers, 0, 300_000), 0, 300_000)


def test_payloads_of_other_shapes_and_types_come_as_they_are_declared_by_sender_and_no_others_do(
    three: Federation,
) -> None:
    sent = [
        {"q.A": torch.tensor([[[1, 2, 255]]], dtype=torch.uint8), "q.scale": torch.tensor([0.5])},  # packed bits
        {"q.A": torch.tensor([[[-3, 4], [5, -6]]], dtype=torch.int8)},
        payload(2),
    ]
    layouts = [{name: torch.empty_like(x, device="meta") for name, x in each.items()} for each in sent]
    for wrong in (None, 2):  # one receiver expects of another what it doesn't send
        with peers(three, range(3)) as swappers, ThreadPoolExecutor(3) as pool:

            def swap(me: int, wrong: int | None = wrong, swappers: dict[int, Swapper] = swappers) -> dict[int, Tensors]:
                others = [other for other in range(3) if other != me]
                told = {other: layouts[1 if me == 0 and other == wrong else other] for other in others}
                return swappers[me].swap(0, sent[me], others, layouts=told)

            for me, heard in enumerate(pool.map(swap, range(3), timeout=LONG_S)):
                lost = {0, 2} - {me} if wrong is not None and me != 1 else set()
                assert heard.keys() == {0, 1, 2} - {me} - lost
                assert all(same(heard[other], sent[other]) for other in heard)


def test_a_peer_that_can_only_dial_out_takes_part(tmp_path: Path) -> None:
    made = found(tmp_path, 3, silent=[0, 2])
    with peers(made, [1]) as listening:
        silent = {
            client: Swapper(Membership(made.peer(client), made.roster), AGREED, patience_s=LONG_S) for client in (0, 2)
        }
        heard = {}
        with ThreadPoolExecutor(3) as pool:
            one = pool.submit(listening[1].swap, 0, payload(1), [0, 2])
            for client, swapper in silent.items():
                heard[client] = pool.submit(swapper.swap, 0, payload(client), [1])
            assert one.result(LONG_S).keys() == {0, 2}
            assert all(came.result(LONG_S).keys() == {1} for came in heard.values())


def test_a_clock_an_hour_wrong_does_not_matter(tmp_path: Path) -> None:
    made = found(tmp_path, 2, now=datetime.now(UTC) + timedelta(hours=1))
    with peers(made, range(2)) as swappers:
        assert_all_heard(swappers, all_swap(swappers), 0)


def test_a_mismatch_costs_the_edge_at_once_and_names_the_field_at_both_ends(
    three: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    with peers(three, [0]) as one, peers(three, [1], agreed=AGREED | {"seed": "7"}) as other:
        begin = time.monotonic()
        assert all_swap(one | other) == {0: {}, 1: {}}
        assert time.monotonic() - begin < LONG_S / 2
        assert "seed differs: 0 at peer-0, 7 at peer-1" in one[0].neighbours[1].problem
        assert "seed differs: 7 at peer-1, 0 at peer-0" in other[1].neighbours[0].problem


def test_what_a_member_makes_others_log_is_a_few_short_lines_a_minute(
    three: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    def told(name: str) -> list[str]:
        return [said for record in caplog.records if (said := record.getMessage()).startswith(f"{name}: ")]

    with peers(three, [0]) as swappers, caplog.at_level(logging.INFO):
        swappers[0].enter(0)
        for number in range(10):
            differs = hello(0, agreed=AGREED | {"base": f"{number}\n{'x' * 10_000}"})
            assert outcomes(call(three, 2, 0, iter([differs]))) == [Verdict.REFUSED]
            assert outcomes(call(three, 2, 0, iter([Chunk(total=number)]))) == [Verdict.REFUSED]
        assert len(told("peer-2")) == 6
        assert told("peer-2")[0].startswith("peer-2: base differs: nothing at peer-0, 0 xxx")
        assert told("peer-2")[-1].endswith("; more of it is left out for a minute")
        assert all(len(line) <= 300 and line.isprintable() for line in told("peer-2"))
        call(three, 1, 0, iter([hello(0, agreed=AGREED | {"seed": "7"})]))
        assert told("peer-1") == ["peer-1: seed differs: 0 at peer-0, 7 at peer-1"], "others are told of as before"


def test_of_long_texts_that_differ_is_told_where_they_part(three: Federation) -> None:
    long = "x" * 150
    with peers(three, [0], agreed=AGREED | {"graph": f"{long}ring"}) as swappers:
        swappers[0].enter(0)
        call(three, 2, 0, iter([hello(0, agreed=AGREED | {"graph": f"{long}star"})]))
        told = f"graph differs: …{'x' * 20}ring at peer-0, …{'x' * 20}star at peer-2"
        assert swappers[0].neighbours[2].problem == told


def test_a_neighbour_that_is_not_there_costs_the_patience_once(three: Federation) -> None:
    with peers(three, [0], patience_s=8.0) as swappers:
        taken = []
        for t in range(2):
            begin = time.monotonic()
            assert swappers[0].swap(t, payload(0, t), [1]) == {}
            taken.append(time.monotonic() - begin)
        assert taken[0] >= 8.0 > taken[1]
        assert swappers[0].neighbours[1].down == 2


def test_a_peer_is_in_touch_with_whom_it_has_reached_until_an_edge_is_lost(three: Federation) -> None:
    with peers(three, range(2), patience_s=0.5) as swappers:
        swappers[1].enter(0)
        assert not swappers[0].in_touch([1, 2])
        assert swappers[0].ask_rounds([1, 2], LONG_S) == {1: 0}
        assert (swappers[0].in_touch([1, 2]), swappers[0].in_touch([2])) == (True, False)
        assert swappers[0].swap(0, payload(0), [1]) == {}  # the other never comes to swap
        assert not swappers[0].in_touch([1, 2])


def test_a_neighbour_that_was_given_up_and_is_heard_again_is_waited_for_as_before(
    three: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with peers(three, range(2), patience_s=0.3) as swappers, ThreadPoolExecutor() as pool:
        probe_s = 0.5 + 10 * acquaint(swappers[0], 1)
        monkeypatch.setattr("peertune.wire.meeting.PROBE_S", probe_s)
        assert swappers[0].swap(0, payload(0), [1]) == {}
        assert swappers[0].neighbours[1].given_up
        swappers[0].meetings.patience_s = LONG_S
        swappers[1].enter(1)  # trains, for longer than is waited for whom nobody hears
        began = time.monotonic()
        going = pool.submit(swappers[0].swap, 1, payload(0, 1), [1])
        wait_until(lambda: time.monotonic() > began + probe_s + 0.5)
        assert not going.done()
        assert same(swappers[1].swap(1, payload(1, 1), [0])[0], payload(0, 1))
        assert same(going.result(LONG_S)[1], payload(1, 1))
        assert not swappers[0].neighbours[1].given_up


def test_a_neighbour_that_comes_late_is_waited_for(three: Federation) -> None:
    with peers(three, range(2)) as swappers, ThreadPoolExecutor() as pool:
        swappers[0].enter(4)
        early = pool.submit(swappers[1].swap, 5, payload(1, 5), [0])
        wait_until(lambda: 1 in swappers[0].neighbours and swappers[0].neighbours[1].round == 5)
        assert not early.done()
        assert same(swappers[0].swap(5, payload(0, 5), [1])[1], payload(1, 5))
        assert same(early.result(LONG_S)[0], payload(0, 5))


def test_a_round_can_be_made_again_with_those_that_counted_it(three: Federation) -> None:
    with peers(three, range(2)) as swappers:
        assert_all_heard(swappers, all_swap(swappers), 0)
        swappers[0].enter(1)
        swappers[1].stop()
        with peers(three, [1]) as again:  # killed before it kept the round
            assert same(again[1].swap(0, payload(1), [0])[0], payload(0))
            assert not swappers[0].passed_by(0)


def test_a_round_that_the_other_end_gave_up_is_passed_at_both(three: Federation) -> None:
    with peers(three, range(2)) as swappers:
        swappers[0].meetings.patience_s = 0.5
        assert swappers[0].swap(3, payload(0, 3), [1]) == {}
        swappers[0].enter(7)
        assert swappers[1].swap(3, payload(1, 3), [0]) == {}
        assert swappers[1].passed_by(3)
        assert swappers[1].ask_rounds([0], LONG_S) == {0: 7}


def test_a_neighbour_that_waits_for_a_dead_one_is_not_given_up(three: Federation) -> None:
    with peers(three, range(2)) as swappers, ThreadPoolExecutor() as pool:
        patience_s = 3.0 + 10 * acquaint(swappers[0], 1)
        for swapper in swappers.values():
            swapper.meetings.patience_s = patience_s
        ahead = pool.submit(swappers[0].swap, 1, payload(0, 1), [1])
        assert swappers[1].swap(0, payload(1), [2]) == {}  # takes all its patience, and so would take the other's
        assert same(swappers[1].swap(1, payload(1, 1), [0])[0], payload(0, 1))
        assert same(ahead.result(LONG_S)[1], payload(1, 1))


def test_a_seat_that_is_empty_or_can_only_dial_as_this_peer_costs_no_time(tmp_path: Path) -> None:
    made = found(tmp_path, 3, silent=[0, 1])
    made.parties.revoke("peer-2")
    made.issue()
    swapper = Swapper(Membership(made.peer(0), made.roster), AGREED, patience_s=LONG_S)
    begin = time.monotonic()
    assert swapper.swap(0, payload(0), [1, 2, 7]) == {}
    assert time.monotonic() - begin < LONG_S / 2
    assert {client: known.down for client, known in swapper.neighbours.items()} == {1: 1, 2: 0, 7: 0}
    assert [swapper.vacant(client) for client in (1, 2, 7)] == [False, True, True]
    swapper.stop()


def test_a_peer_that_is_told_to_stop_waiting_waits_for_nobody(three: Federation) -> None:
    with peers(three, range(2), patience_s=LONG_S) as swappers, ThreadPoolExecutor() as pool:
        going = offering(swappers[0], 0, [1], pool)
        swappers[0].stop_waiting()
        assert going.result(LONG_S) == {}


def test_a_peer_that_pauses_is_said_to_wait(three: Federation) -> None:
    swapper = Swapper(Membership(three.peer(0), three.roster), AGREED, patience_s=1.0)
    swapper.enter(3)
    swapper.pause(0.0)
    assert (swapper.progress().doing, swapper.progress().round) == ("waiting", 3)


def test_a_restarted_peer_still_has_its_verdicts(three: Federation) -> None:
    with peers(three, [0]) as swappers:
        swappers[0].enter(5)
        swappers[0].remember(4, counted=[2], failed=[1])
        assert outcomes(call(three, 2, 0, iter([hello(4, Hello.SETTLE)]))) == [Verdict.COUNTED]
        assert outcomes(call(three, 1, 0, iter([hello(4, Hello.SETTLE)]))) == [Verdict.PASSED]


# ---- wires that break


class Proxy:
    """Passes bytes on between those who call its port and another port, and cuts connections off in the middle."""

    def __init__(self, port: int, to: int, cut_after_bytes: Sequence[int]) -> None:
        self.cuts = 0
        self._to, self._left = to, list(cut_after_bytes)
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
            except OSError:
                return
            other = socket.create_connection(("127.0.0.1", self._to))
            budget = [self._left.pop(0) if self._left else 1 << 60]
            for source, sink in ((one, other), (other, one)):
                threading.Thread(target=self._pass, args=(source, sink, budget, (one, other)), daemon=True).start()

    def _pass(
        self, source: socket.socket, sink: socket.socket, budget: list[int], both: Sequence[socket.socket]
    ) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data[: max(0, budget[0])])
                budget[0] -= len(data)
                if budget[0] <= 0:
                    self.cuts += 1
                    break
        except OSError:
            pass
        for end in both:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_connections_cut_in_mid_payload_are_made_again_and_both_ends_agree(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    made = found(tmp_path, 2, through={1: port}, silent=[0])  # all goes by the proxy
    draw = random.Random(0)
    size = 25_000  # 0.6 MB each way
    cuts = [draw.randrange(5_000, 1_200_000) for _ in range(12)]
    proxy = Proxy(port, made.ports[1], cuts)
    caller = Swapper(Membership(made.peer(0), made.roster), AGREED, patience_s=LONG_S)
    with peers(made, [1], patience_s=LONG_S) as swappers:
        both = {0: caller, 1: swappers[1]}
        for t in range(8):
            assert_all_heard(both, all_swap(both, t, size), t, size)
    assert proxy.cuts >= 8
    proxy.close()


# ---- members that do not keep to the protocol


def test_a_stale_round_is_passed_and_a_future_one_waits_and_changes_nothing(three: Federation) -> None:
    with peers(three, [0], patience_s=5.0) as swappers:
        swappers[0].enter(5)
        assert outcomes(call(three, 2, 0, iter([hello(3)]))) == [Verdict.PASSED]
        assert outcomes(call(three, 2, 0, iter([hello(4, Hello.SETTLE)]))) == [Verdict.PASSED]
        with pytest.raises(grpc.RpcError) as error:
            call(three, 2, 0, iter([hello(10**12)]), timeout_s=2.0)
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert (swappers[0].round, swappers[0].meetings.held) == (5, {})


def test_a_duplicate_gets_the_same_payload_and_verdict_and_changes_nothing(three: Federation) -> None:
    with peers(three, [0, 2]) as swappers:
        heard = all_swap(swappers)
        data = encode(payload(2, 8))  # not what it sent before
        for _ in range(3):
            verdict = Chunk(verdict=Verdict(outcome=Verdict.HAVE))
            answers = call(three, 2, 0, iter([hello(0), Chunk(total=len(data)), Chunk(data=data), verdict]))
            assert outcomes(answers) == [Verdict.COUNTED]
            assert b"".join(chunk.data for chunk in answers) == encode(payload(0))
        assert same(heard[0][2], payload(2))
        assert swappers[0].meetings.held[0, 2].edge.brought is None


@pytest.mark.parametrize("refusing", [0, 1])
@pytest.mark.parametrize("silent", [[], [1]])
def test_what_one_end_refuses_to_mix_fails_at_both_ends_at_once(
    tmp_path: Path, refusing: int, silent: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    made = found(tmp_path, 2, silent=silent)
    why = f"round 0: what client {1 - refusing} sent is too large"

    def check(client: int, tensors: Tensors) -> str:
        return why if same(tensors, payload(client)) else ""

    def take(client: int, tensors: Tensors) -> str:
        return ""

    with peers(made, [0]) as swappers, ThreadPoolExecutor(2) as pool:
        swappers[1] = Swapper(Membership(made.peer(1), made.roster), AGREED, patience_s=LONG_S)
        if not silent:
            swappers[1].start(made.address(1))
        begin = time.monotonic()
        going = [
            pool.submit(swappers[k].swap, 0, payload(k), [1 - k], check if k == refusing else take) for k in range(2)
        ]
        assert [one.result(LONG_S) for one in going] == [{}, {}]
        assert time.monotonic() - begin < LONG_S / 2, "nobody waits for what is settled"
        assert [(swappers[k].neighbours[1 - k].up, swappers[k].neighbours[1 - k].down) for k in range(2)] == [
            (0, 1)
        ] * 2
        assert_all_heard(swappers, all_swap(swappers, 1), 1)
        swappers[1].stop()
    said = [record.getMessage() for record in caplog.records]
    assert f"peer-{1 - refusing}: {why}" in said
    assert any(line.startswith(f"peer-{refusing}: ") and why in line for line in said), "the other end knows why"


HAVE = Chunk(verdict=Verdict(outcome=Verdict.HAVE))
ODD = Chunk(verdict=Verdict(outcome=9))  # type: ignore[arg-type]
GOOD = encode(payload(2))
NAN = encode({name: x * torch.nan for name, x in payload(2).items()})
NOISE = random.Random(0).randbytes(len(GOOD))
TOTAL = Chunk(total=len(GOOD))
UNGREETED = "does not begin with a greeting"
DISORDER = "sends its parts in another order than total, data, verdict"
GARBAGE: dict[str, tuple[list[Chunk], str]] = {  # what is sent, what is said of it
    "nothing": ([], UNGREETED),
    "no greeting": ([Chunk(data=b"x")], UNGREETED),
    "no part": ([Chunk()], UNGREETED),
    "another protocol": ([hello(0, protocol=9)], f"protocol differs: {PROTOCOL} at peer-0, 9 at peer-2"),
    "another federation": ([hello(0, federation="evil")], "federation differs: trial at peer-0, evil at peer-2"),
    "a forged line": ([hello(0, agreed={"a\nb": "c\nd"})], "a b differs: nothing at peer-0, c d at peer-2"),
    "many fields": ([hello(0, agreed=dict.fromkeys(map(str, range(50_000)), "x"))], "names 50000 fields that must agr"),
    "huge total": ([hello(0), Chunk(total=2**63)], "payload: 9223372036854775808 bytes are announced where 1200 to"),
    "no total": ([hello(0), Chunk(data=GOOD)], DISORDER),
    "two totals": ([hello(0), TOTAL, TOTAL], DISORDER),
    "empty chunk": ([hello(0), TOTAL, Chunk(data=b"")], "payload: a chunk has 0 bytes where 1 to 4194304 are expected"),
    "too much": ([hello(0), TOTAL, Chunk(data=GOOD + b"x")], "payload: a chunk has 1337 bytes where 1336 are left"),
    "too little": ([hello(0), TOTAL, Chunk(data=GOOD[:-1]), HAVE], "payload: ends after 1335 bytes where 1336 were"),
    "not a number": ([hello(0), TOTAL, Chunk(data=NAN), HAVE], "q.A: holds nan where finite values are expected"),
    "noise": ([hello(0), TOTAL, Chunk(data=NOISE), HAVE], "header: is said to have 7106521602475165645 bytes where"),
    "a forged roster": ([hello(0), Chunk(roster=b"federation: trial\n")], "sends a roster that can't be used"),
    "another verdict": ([hello(0), TOTAL, Chunk(data=GOOD), ODD], "refuses what it was sent ()"),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_of_a_member_is_dropped_and_costs_nobody_else_anything(
    three: Federation, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    sent, said = GARBAGE[what]
    with peers(three, [0, 1]) as swappers, ThreadPoolExecutor() as pool:
        going = offering(swappers[0], 0, [2, 1], pool)
        answers = call(three, 2, 0, iter(sent), timeout_s=20.0)
        assert outcomes(answers) == [Verdict.REFUSED]
        assert answers[-1].verdict.reason.startswith(said)
        begin = time.monotonic()
        assert same(swappers[1].swap(0, payload(1), [0])[0], payload(0))
        assert time.monotonic() - begin < LONG_S / 2
        assert not going.done() or 2 not in going.result()
        swappers[0].stop_waiting()
        assert going.result(LONG_S).keys() == {1}
        lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith(f"peer-2: {said}")]
        assert [line.isprintable() for line in lines] == [True], "told once, in one line"


def test_a_member_that_says_nothing_is_cut_off_and_holds_few_streams(
    three: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peertune.wire.answering.STALL_S", 1.0)
    with peers(three, [0, 1]) as swappers:
        identity, roster = Membership(three.peer(2), three.roster).current()
        member = roster.by_client(0)
        assert member is not None
        silent = threading.Event()

        def nothing() -> Iterator[Chunk]:
            silent.wait(LONG_S)
            yield from ()

        with tls.secure_channel(identity, member) as channel:
            stub = channel.stream_stream(
                METHOD, request_serializer=Chunk.SerializeToString, response_deserializer=Chunk.FromString
            )
            codes = []
            calls = [stub(nothing(), timeout=LONG_S) for _ in range(20)]
            assert_all_heard(swappers, all_swap(swappers), 0)  # the others go on meanwhile
            for one in calls:
                with pytest.raises(grpc.RpcError) as error:
                    list(one)
                codes.append(error.value.code())
            silent.set()
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) >= 15
        assert grpc.StatusCode.CANCELLED in codes


# ---- rosters that change


def test_a_newer_roster_spreads_from_one_peer_and_shuts_the_revoked_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = found(tmp_path, 3)
    rosters = {client: made.peer(client) / "roster.yaml" for client in (1, 2)}  # each has a file of its own
    for file in rosters.values():
        file.write_bytes(made.roster.read_bytes())
    with peers(made, range(3), rosters) as swappers:
        assert_all_heard(swappers, all_swap(swappers), 0)
        for swapper in swappers.values():
            swapper.meetings.patience_s = 6.0
        made.parties.revoke("peer-2")
        made.issue()  # peer 0 alone has it
        heard = all_swap(swappers, 1)
        assert heard[0].keys() == {1}
        known = swappers[0].neighbours[2]
        revoked = "is revoked in the roster, or its certificates have expired"
        assert (known.reached, known.problem) == (False, revoked)
        said = [record.getMessage() for record in caplog.records]
        assert said.count("roster 2 is in use; members no more: peer-2") == 2, "by file, and from peer 0"
        assert swappers[1].membership.current()[1].serial == 2  # from peer 0
        assert all_swap(swappers, 2)[1].keys() == {0}
        assert made.peer(1).joinpath("roster.yaml").read_bytes() == made.roster.read_bytes()


def test_an_own_roster_is_neither_passed_on_nor_taken_and_who_has_an_older_one_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = found(tmp_path, 3)
    path = GRAPHS["path"](clients=3)

    def issue(*clients: int) -> None:
        rosters = made.parties.own_rosters(path, {"name": "a path"})
        for client in clients:
            write_file(made.own(client, "path"), rosters[f"peer-{client}"].raw)

    def told() -> list[str]:
        return sorted(said for record in caplog.records if "ask the CA" in (said := record.getMessage()))

    issue(0, 1)
    rosters = {client: made.own(client, "path") for client in (0, 1)}
    with peers(made, range(3), rosters) as swappers:
        serials = [swappers[client].membership.current()[1].serial for client in range(3)]
        assert serials == [2, 2, 1], "the last has the whole one of before"

        near = [[1], [0, 2], [1]]

        def heard(t: int) -> list[list[int]]:
            with ThreadPoolExecutor(3) as pool:
                going = [pool.submit(swappers[k].swap, t, payload(k, t), near[k]) for k in range(3)]
                return [sorted(one.result(LONG_S)) for one in going]

        assert heard(0) == near
        older = "peer-1: has roster 2, which is not passed on, and this peer 1; ask the CA for the newest"
        assert told() == [older]
        issue(1)
        for t in (1, 2, 3):
            assert heard(t) == near
        newer = "peer-1: has roster 3, which is not passed on, and this peer 2; ask the CA for the newest"
        assert told() == [older, newer]
        made.issue()  # the last has all members' newest, and passes it to nobody
        assert heard(4) == near
        assert [swappers[client].membership.current()[1].serial for client in range(3)] == [2, 3, 4]
        assert swappers[1].neighbours[2].bytes_received < 10_000


def test_without_tls_only_loopback_is_listened_at(three: Federation) -> None:
    from peertune.errors import PeertuneError

    swapper = Swapper(Membership(three.peer(0), three.roster), AGREED, patience_s=1.0, insecure=True)
    with pytest.raises(PeertuneError, match="not of this machine alone"):
        swapper.start("0.0.0.0:50051")
    with peers(three, range(2), insecure=True) as swappers:
        assert_all_heard(swappers, all_swap(swappers), 0)


def test_the_wait_for_verdicts_ends_when_all_have_them(three: Federation) -> None:
    with peers(three, range(3)) as swappers:
        for t in range(5):
            all_swap(swappers, t)
        begin = time.monotonic()
        for swapper in swappers.values():
            assert not swapper.meetings.unheard()
            swapper.stop()
        assert time.monotonic() - begin < 20  # three that waited in vain would take 30


def test_what_a_failed_edge_brought_is_not_kept(three: Federation) -> None:
    with peers(three, [0]) as swappers, ThreadPoolExecutor() as pool:
        for t in range(3):
            going = offering(swappers[0], t, [2], pool)
            data = encode(payload(2, t))
            parts = [
                hello(t),
                Chunk(total=len(data)),
                Chunk(data=data),
                Chunk(verdict=Verdict(outcome=Verdict.REFUSED)),
            ]
            assert outcomes(call(three, 2, 0, iter(parts))) == [Verdict.REFUSED]
            assert going.result(LONG_S) == {}
        assert all(meeting.edge.brought is None for meeting in swappers[0].meetings.held.values())


def test_a_certificate_that_ends_costs_the_edge_and_no_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = found(tmp_path, 2)
    ended = made.parties.approve("peer-1", 1, datetime.now(UTC) - timedelta(days=3))
    with peers(made, [0], patience_s=LONG_S) as swappers:
        identity, roster = swappers[0].membership.current()
        members = (roster.members[0], replace(roster.members[1], certificates=(ended,)))
        swappers[0].membership._current = identity, replace(roster, members=members)  # as it will be in three months
        begin = time.monotonic()
        assert swappers[0].swap(0, payload(0), [1]) == {}
        assert time.monotonic() - begin < LONG_S / 2
    assert "Traceback" not in capfd.readouterr().err
