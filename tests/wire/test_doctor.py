import errno
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import parties
import pytest
from federation import Federation, found, free_ports

from peertune.errors import PeertuneError
from peertune.files import write_file
from peertune.identity.certificates import fingerprint, public_key
from peertune.identity.membership import Membership
from peertune.identity.roster import Roster
from peertune.topology import GRAPHS
from peertune.wire.doctor import Check, _compared, _inwards, check_disk, check_identity, check_memory, check_network
from peertune.wire.node import METHOD, PROTOCOL, UNTRIED, Probe
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict
from peertune.wire.rpc import grpc
from peertune.wire.swap import Swapper
from peertune.wire.tls import server_credentials

AGREED = {"rounds": "5", "seed": "0"}


@pytest.fixture
def three(tmp_path: Path) -> Federation:
    return found(tmp_path, 3)


def of(made: Federation, client: int) -> Membership:
    return Membership(made.peer(client), made.roster)


@contextmanager
def running(made: Federation, *clients: int, agreed: dict[str, str] = AGREED) -> Iterator[list[Swapper]]:
    """Have these peers answer."""
    with ExitStack() as stack:
        swappers = []
        for client in clients:
            swapper = Swapper(of(made, client), agreed, patience_s=60)
            stack.callback(swapper.stop)
            swapper.start(made.address(client))
            swappers.append(swapper)
        yield swappers


def examined(made: Federation, agreed: dict[str, str] = AGREED, listen: str | None = None) -> dict[str, Check]:
    """Return what peer 0 finds of the network, by what it is about."""
    checks = check_network(of(made, 0), agreed, listen or made.address(0))
    named = {f"{check.member} {check.what}" if check.member else check.what: check for check in checks}
    assert len(named) == len(checks)
    return named


def levels(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.level for name, check in checks.items() if check.level != "ok"}


# ---- the network


def test_by_its_own_roster_a_peer_looks_at_neighbours_and_knows_that_none_is_passed_on(three: Federation) -> None:
    file = three.own(0, "run")
    write_file(file, three.parties.own_rosters(GRAPHS["path"](clients=3), {"name": "a path"})["peer-0"].raw)
    identity, membership = check_identity(three.peer(0), file)
    assert membership is not None
    assert "peer-0 is client 0 of trial, its own roster 2" in [check.finding for check in identity]

    def said() -> dict[str, str]:
        checks = check_network(membership, AGREED, three.address(0))
        assert {check.member for check in checks} == {None, "peer-1"}
        return {check.what: check.finding for check in checks}

    with running(three, 1):
        assert said()["roster"] == "has roster 1, here is 2; have the CA hand it its newest"
    three.issue()
    with running(three, 1):
        assert said()["roster"] == "has roster 3, here is 2; ask the CA for the newest"


def test_where_all_is_well_every_check_says_so_and_nobody_notices(three: Federation) -> None:
    with running(three, 1, 2) as others:
        checks = examined(three)
        assert [swapper.neighbours for swapper in others] == [{}, {}]
    assert levels(checks) == {}
    each = ("outwards", "clock", "run", "inwards")
    assert checks.keys() == {"port", *(f"peer-{client} {what}" for client in (1, 2) for what in each)}
    assert checks["peer-2 inwards"].finding == f"gets through to {three.address(0)}"
    assert checks["peer-1 run"].finding == "nothing that must be the same differs"


def test_where_nobody_runs_that_is_no_failure(three: Federation) -> None:
    checks = examined(three)
    assert levels(checks) == {"peer-1 outwards": "warning", "peer-2 outwards": "warning", "inwards": "warning"}
    assert "ask again when peer-1 runs peer start or peer doctor" in checks["peer-1 outwards"].finding
    assert "nobody answers who could call" in checks["inwards"].finding


def test_two_doctors_examine_each_other(three: Federation) -> None:
    swapper = Swapper(of(three, 1), {}, patience_s=60)
    swapper.start(three.address(1))
    try:
        checks = examined(three)
    finally:
        swapper.stop()
    assert levels(checks) == {"peer-2 outwards": "warning"}
    assert checks["peer-1 run"].finding == "takes no part in a run now"
    assert checks["peer-1 inwards"].finding == f"gets through to {three.address(0)}"


def test_to_those_who_want_to_swap_a_doctor_is_nobody(three: Federation) -> None:
    doctor = Swapper(of(three, 0), AGREED, patience_s=60)
    doctor.start(three.address(0))
    try:
        with running(three, 1) as (swapper,):
            assert swapper.ask_rounds([0], wait_s=10) == {}
            assert "takes no part now" in swapper.neighbours[0].problem
            assert swapper.neighbours[0].seen_at is None
            assert not swapper.probe(0, wait_s=10).differs
    finally:
        doctor.stop()


def test_all_that_differs_is_named(three: Federation) -> None:
    with running(three, 1, agreed={"rounds": "6", "seed": "0", "base": "abc"}), running(three, 2):
        checks = examined(three)
        silent = examined(three, agreed={})
    assert levels(checks) == {"peer-1 run": "failed"}
    assert checks["peer-1 run"].finding.startswith(
        "differs in base: nothing here, abc there; rounds: 5 here, 6 there; give all peers one recipe"
    )
    assert levels(silent) == {}
    assert "give --recipe or --resume to compare" in silent["peer-1 run"].finding


def test_an_address_at_which_this_peer_is_not_is_found_out_by_the_others(three: Federation) -> None:
    (elsewhere,) = free_ports(1)
    with running(three, 1, 2):
        checks = examined(three, listen=f"127.0.0.1:{elsewhere}")
    assert levels(checks) == {"peer-1 inwards": "failed", "peer-2 inwards": "failed"}
    finding = checks["peer-1 inwards"].finding
    assert finding.startswith(f"can't call {three.address(0)} (got no answer from this peer there); ")
    assert finding.endswith(
        f"open TCP port {three.ports[0]} inwards, or correct the address with peertune peer request"
    )


def test_a_peer_that_runs_here_already_is_the_one_that_is_called(three: Federation) -> None:
    with running(three, 0, 1):
        checks = examined(three)
    assert levels(checks) == {"peer-2 outwards": "warning"}
    assert "is in use: by this peer's own peer start" in checks["port"].finding
    assert checks["peer-1 inwards"].finding == f"gets through to {three.address(0)}"


def test_something_else_at_this_peer_s_port_is_found_out_by_the_others(three: Federation) -> None:
    with running(three, 1), socket.create_server(("127.0.0.1", three.ports[0])):
        checks = examined(three)
    assert levels(checks) == {"peer-1 inwards": "failed", "peer-2 outwards": "warning"}
    refused = "got no answer from this peer there"
    assert refused in checks["peer-1 inwards"].finding, "as where nobody listens: no more is told of a port"


def test_an_address_of_another_machine_can_t_be_listened_at(three: Federation) -> None:
    checks = examined(three, listen="192.0.2.1:50051")
    assert checks["port"].level == "failed"
    assert "can't be listened at; give an address of this machine" in checks["port"].finding


def test_a_peer_that_only_calls_is_asked_for_nothing_more(tmp_path: Path) -> None:
    made = found(tmp_path, 3, silent=[0, 2])
    with running(made, 1):
        checks = check_network(of(made, 0), AGREED, None)
    assert {check.level for check in checks} == {"ok"}
    assert [(check.member, check.what) for check in checks if check.member != "peer-1"] == [
        ("peer-2", "outwards"),
        (None, "inwards"),
    ]


def test_a_member_who_does_not_know_this_peer_yet_is_told_from_one_who_is_away(tmp_path: Path) -> None:
    made = found(tmp_path, 2)
    old = made.folder / "old.yaml"
    old.write_bytes(made.roster.read_bytes())
    late = Federation(made.parties, [*made.ports, *free_ports(1)])
    late.parties.join("peer-2", late.address(2))
    late.issue()
    swapper = Swapper(Membership(late.peer(1), old), AGREED, patience_s=60)
    swapper.start(late.address(1))
    try:
        checks = check_network(of(late, 2), AGREED, late.address(2))
    finally:
        swapper.stop()
    (refused,) = (check for check in checks if check.member == "peer-1" and check.what == "outwards")
    assert refused.level == "failed"
    assert refused.finding.startswith(f"{late.address(1)}: answers, but not to this peer (")
    assert refused.finding.endswith("see that both have the newest roster, and that neither is revoked")


def test_a_newer_roster_at_a_neighbour_is_pointed_out_and_not_taken(three: Federation) -> None:
    old = three.folder / "old.yaml"
    old.write_bytes(three.roster.read_bytes())
    three.issue()
    with running(three, 1):
        checks = check_network(Membership(three.peer(0), old), AGREED, three.address(0))
    (roster,) = (check for check in checks if check.what == "roster")
    assert (roster.level, roster.member) == ("warning", "peer-1")
    assert roster.finding.startswith("has roster 2, here is 1; get that one")
    assert b"serial: 1\n" in old.read_bytes()


def test_a_name_that_nobody_knows_is_a_failure(tmp_path: Path) -> None:
    made = found(tmp_path, 1)
    made.parties.join("peer-1", "nowhere.invalid:50051")
    made.parties.join("peer-2", f"localhost:{free_ports(1)[0]}")
    made.issue()
    checks = examined(made)
    assert levels(checks) == {"peer-1 name": "failed", "peer-2 outwards": "warning", "inwards": "warning"}
    assert checks["peer-2 name"].finding.startswith("localhost is ")
    assert checks["peer-1 name"].finding.startswith("nowhere.invalid: can't be resolved (")


@pytest.mark.parametrize(
    ("error", "why"),
    [(TimeoutError("timed out"), "timed out"), (OSError(errno.EHOSTUNREACH, "No route to host"), "No route to host")],
)
def test_a_way_that_is_shut_is_told_with_the_port_to_open_and_not_waited_at(
    three: Federation, monkeypatch: pytest.MonkeyPatch, error: OSError, why: str
) -> None:
    def shut(place: tuple[str, int], timeout: float) -> None:
        assert place[0] == "127.0.0.1"
        assert timeout <= 5
        raise error

    monkeypatch.setattr(socket, "create_connection", shut)
    checks = examined(three)
    assert levels(checks) == {"peer-1 outwards": "failed", "peer-2 outwards": "failed", "inwards": "warning"}
    port = three.ports[1]
    assert checks["peer-1 outwards"].finding == (
        f"127.0.0.1:{port}: no way through ({why}); open TCP port {port} outwards here, inwards at peer-1"
    )


@contextmanager
def answering(made: Federation, client: int, answer: list[Chunk]) -> Iterator[None]:
    """Have a program that is none of ours, but holds a member's key, answer in its place."""

    def swap(requests: Iterator[Chunk], context: Any) -> Iterator[Chunk]:
        yield from answer

    server = grpc.server(ThreadPoolExecutor(4))
    handler = grpc.stream_stream_rpc_method_handler(
        swap, request_deserializer=Chunk.FromString, response_serializer=Chunk.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peertune.v1.Peer", {"Swap": handler}),))
    assert METHOD == "/peertune.v1.Peer/Swap"
    server.add_secure_port(made.address(client), server_credentials(of(made, client).current))
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(("offset_s", "level"), [(290, "ok"), (-3600, "warning"), (1e9, "warning")])
def test_a_clock_that_is_minutes_wrong_is_pointed_out(three: Federation, offset_s: float, level: str) -> None:
    hello = Hello(protocol=PROTOCOL, federation="trial", roster_serial=1, clock=time.time() + offset_s)
    with answering(three, 1, [Chunk(hello=hello), Chunk(verdict=Verdict(outcome=Verdict.HAVE))]):
        checks = examined(three)
    assert checks["peer-1 clock"].level == level
    if offset_s == -3600:
        assert checks["peer-1 clock"].finding == "its clock is 60 minutes behind this one; set the one that is wrong"


def test_what_a_neighbour_says_is_one_printable_line(three: Federation) -> None:
    hello = Hello(protocol=PROTOCOL + 1, federation="\x1b[2J\n" * 1000, agreed={"a\nb": "\x07"})
    refused = Verdict(outcome=Verdict.REFUSED, reason="\x1b]0;\n" * 1000)
    with answering(three, 1, [Chunk(hello=hello), Chunk(verdict=refused)]):
        checks = examined(three)
    assert levels(checks) == {"peer-1 run": "failed", "peer-1 inwards": "failed", "peer-2 outwards": "warning"}
    assert all(check.finding.isprintable() and len(check.finding) < 2000 for check in checks.values())
    assert f"protocol: {PROTOCOL} here, {PROTOCOL + 1} there" in checks["peer-1 run"].finding


def test_a_neighbour_that_does_not_greet_is_refused(three: Federation) -> None:
    with answering(three, 1, [Chunk(verdict=Verdict(outcome=Verdict.HAVE))]):
        checks = examined(three)
    assert "(does not begin with a greeting)" in checks["peer-1 outwards"].finding


def test_a_peer_calls_each_member_back_once_at_a_time(three: Federation) -> None:
    backs: list[Probe] = []
    with running(three, 1), socket.create_server(("127.0.0.1", three.ports[0])) as mute:
        asking = Swapper(of(three, 0), AGREED, patience_s=60)
        first = threading.Thread(target=lambda: backs.append(asking.probe(1, wait_s=30, call_back=True)))
        first.start()
        connection, _ = mute.accept()  # the call back has come, and gets no answer
        second = asking.probe(1, wait_s=30, call_back=True)
        first.join(60)
        connection.close()
        asking.stop()
    assert second.back == "is calling back already"
    assert backs[0].back == "got no answer from this peer there"


def test_a_peer_calls_each_member_back_a_few_times_a_minute(three: Federation) -> None:
    with running(three, 0, 1, 2) as (first, _, last):
        assert [first.probe(1, wait_s=30, call_back=True).back for _ in range(7)] == [
            *[""] * 6,
            "was asked too often: ask again in a minute",
        ]
        assert last.probe(1, wait_s=30, call_back=True).back == "", "the others as before"
        checks = examined(three)
    assert levels(checks) == {"peer-1 inwards": "warning"}
    often = "it was asked too often: ask again in a minute"
    assert checks["peer-1 inwards"].finding == f"did not call {three.address(0)}: {often}"


def test_a_peer_of_the_public_network_calls_back_nobody_in_a_private_one(tmp_path: Path) -> None:
    made = found(tmp_path, 3, hosts=["127.0.0.1", "8.8.8.8", "127.0.0.1"])
    with running(made, 0, 1, 2) as (first, *_):
        answers = [first.probe(other, wait_s=30, call_back=True, address=made.address(other)) for other in (1, 2)]
    assert [answer.back for answer in answers] == ["does not call private addresses, since its own is none", ""]


def test_without_tls_the_same_holds_on_this_machine(three: Federation) -> None:
    swapper = Swapper(of(three, 1), AGREED, patience_s=60, insecure=True)
    swapper.start(three.address(1))
    try:
        checks = check_network(of(three, 0), AGREED, three.address(0), insecure=True)
    finally:
        swapper.stop()
    assert {check.what: check.level for check in checks if check.member == "peer-1"} == dict.fromkeys(
        ("outwards", "clock", "run", "inwards"), "ok"
    )


def test_probing_where_nobody_is_is_one_line(three: Federation) -> None:
    swapper = Swapper(of(three, 0), AGREED, patience_s=60)
    try:
        with pytest.raises(PeertuneError, match=r"^nobody has this seat in the roster"):
            swapper.probe(7)
        with pytest.raises(PeertuneError, match="refused"):
            swapper.probe(1, wait_s=10)
    finally:
        swapper.stop()


# ---- who this peer is


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """The folder of a member whose certificate holds 90 days; the roster lies beside it."""
    made = parties.Federation(tmp_path)
    made.join("hospital-1", "host:50051")
    (tmp_path / "roster.yaml").write_bytes(made.roster().raw)
    return tmp_path / "hospital-1"


def identity(folder: Path) -> tuple[dict[str, Check], Membership | None]:
    checks, membership = check_identity(folder, folder.parent / "roster.yaml")
    return {check.what: check for check in checks}, membership


def test_a_member_in_good_standing_passes(hospital: Path) -> None:
    checks, membership = identity(hospital)
    assert {name: check.level for name, check in checks.items()} == dict.fromkeys(
        ("key", "certificate", "roster", "expiry"), "ok"
    )
    assert membership is not None
    assert checks["roster"].finding == "hospital-1 is client 0 of hospitals, roster 1"
    printed = fingerprint(public_key(membership.current()[1].ca))
    assert f"the CA of hospitals with the fingerprint {printed}; is it the one that " in checks["certificate"].finding


def test_each_part_of_an_identity_is_looked_at_though_another_fails(hospital: Path) -> None:
    (hospital / "key.pem").chmod(0o644)
    checks, membership = identity(hospital)
    assert membership is None
    assert {name: check.level for name, check in checks.items()} == {
        "key": "failed",
        "certificate": "ok",
        "roster": "failed",
    }
    assert checks["key"].finding == f"{hospital}/key.pem: others may read this key; run chmod 600 {hospital}/key.pem"


def test_an_altered_roster_and_an_empty_folder_are_failures(hospital: Path, tmp_path: Path) -> None:
    roster = tmp_path / "roster.yaml"
    roster.write_bytes(roster.read_bytes().replace(b"host:50051", b"evil:50051"))
    checks, _ = identity(hospital)
    assert "isn't as the CA of hospitals signed it" in checks["roster"].finding
    (tmp_path / "empty").mkdir()
    checks, _ = identity(tmp_path / "empty")
    assert {check.level for check in checks.values()} == {"failed"}
    assert "make one with peertune peer request" in checks["key"].finding


@pytest.mark.parametrize(("days", "level"), [(13, "warning"), (16, "ok")])
def test_a_certificate_that_ends_soon_is_to_be_renewed(tmp_path: Path, days: int, level: str) -> None:
    made = parties.Federation(tmp_path)
    made.join("hospital-1", days=days)
    (tmp_path / "roster.yaml").write_bytes(made.roster().raw)
    checks, _ = identity(tmp_path / "hospital-1")
    assert checks["expiry"].level == level
    if level == "warning":
        until = datetime.now(UTC) + timedelta(days=days)
        assert checks["expiry"].finding == (
            f"the certificate ends on {until:%Y-%m-%d}, in 12 days; renew it with peertune peer request"
        )


# ---- what is made of what was seen

SEEN = Probe(0.0, 1, False, True, [], "")


@pytest.fixture
def roster(hospital: Path) -> Roster:
    return Membership(hospital, hospital.parent / "roster.yaml").current()[1]


def compared(roster: Roster, have_run: bool = True, **other: Any) -> list[tuple[str, str, str]]:
    """Return what is said of a member of whom this was seen, by a peer with roster 1."""
    checks = list(_compared(roster.members[0], replace(SEEN, **other), roster, have_run))
    assert {check.member for check in checks} == {"hospital-1"}
    return [(check.what, check.level, check.finding) for check in checks]


SAME = ("run", "ok", "nothing that must be the same differs")


@pytest.mark.parametrize(
    ("offset_s", "level", "finding"),
    [
        (-4.6, "ok", "within 6 s of this one"),
        (300.0, "ok", "within 301 s of this one"),
        (301.0, "warning", "its clock is 5 minutes ahead of this one; set the one that is wrong"),
        (-3600.0, "warning", "its clock is 60 minutes behind this one; set the one that is wrong"),
    ],
)
def test_a_clock_may_be_minutes_wrong(roster: Roster, offset_s: float, level: str, finding: str) -> None:
    assert compared(roster, clock_offset_s=offset_s) == [("clock", level, finding), SAME]
    assert compared(roster, clock_offset_s=None) == [SAME]


@pytest.mark.parametrize(
    ("serial", "own", "level", "finding"),
    [
        (2, False, "warning", "has roster 2, here is 1; get that one, or start: peers pass it on"),
        (2, True, "warning", "has roster 2, here is 1; ask the CA for the newest"),
        (0, False, "ok", "has roster 0, here is 1; it takes up that in the next swap"),
        (0, True, "warning", "has roster 0, here is 1; have the CA hand it its newest"),
    ],
)
def test_of_another_roster_is_told_who_mends_it(
    roster: Roster, serial: int, own: bool, level: str, finding: str
) -> None:
    found = compared(roster, clock_offset_s=None, roster_serial=serial, own_roster=own)
    assert found == [("roster", level, finding), SAME]


@pytest.mark.parametrize(
    ("have_run", "other", "level", "finding"),
    [
        (True, {"takes_part": False}, "ok", "takes no part in a run now"),
        (False, {}, "ok", "takes part in a run; give --recipe or --resume to compare"),
        (
            True,
            {"differs": [("base", "a", "b"), ("seed", "0", "1")]},
            "failed",
            "differs in base: a here, b there; seed: 0 here, 1 there; give all peers one recipe and one base",
        ),
        (
            False,
            {"takes_part": False, "differs": [("protocol", "2", "1")]},
            "failed",
            "differs in protocol: 2 here, 1 there; give all peers one recipe and one base",
        ),
    ],
)
def test_runs_are_compared_where_both_have_one(
    roster: Roster, have_run: bool, other: dict[str, Any], level: str, finding: str
) -> None:
    assert compared(roster, have_run, clock_offset_s=None, **other) == [("run", level, finding)]


def test_who_gets_through_to_this_peer_is_told_of_each_and_no_way_at_all_is_a_failure(roster: Roster) -> None:
    def inwards(*backs: str | None, address: str | None = "[::1]:7") -> list[tuple[str, str]]:
        met = [
            (replace(roster.members[0], name=f"hospital-{k}"), replace(SEEN, back=back)) for k, back in enumerate(backs)
        ]
        checks = list(_inwards(address, met))
        assert {check.what for check in checks} == {"inwards"}
        assert [check.member for check in checks if check.member] == [
            f"hospital-{k}" for k, back in enumerate(backs) if back is not None and address
        ]
        return [(check.level, check.finding) for check in checks]

    through = ("ok", "gets through to [::1]:7")
    busy = ("warning", "did not call [::1]:7: it is calling back already")
    shut = "can't call [::1]:7 (no way); open TCP port 7 inwards, or correct the address with peertune peer request"
    nobody = ("warning", "nobody answers who could call [::1]:7; ask again when a neighbour runs")
    assert inwards("", address=None) == [("ok", "this peer has no address: it is the one that calls")]
    assert inwards() == inwards(None) == [nobody]
    assert inwards("", None, "") == [through, through]
    assert inwards("", "no way", UNTRIED["busy"]) == [through, ("warning", shut), busy], "some get through"
    assert inwards("no way", "no way", UNTRIED["busy"]) == [("failed", shut), ("failed", shut), busy]
    assert inwards(UNTRIED["busy"]) == [busy]


# ---- this machine


def test_room_is_asked_for_in_units_of_checkpoints(tmp_path: Path) -> None:
    small, large = check_disk(tmp_path), check_disk(tmp_path, 2**50)
    assert small.finding.endswith("GiB are free") or small.level == "warning"
    assert large.level == "warning"
    assert f"have {20 * 2**20:.1f} GiB, for 20 checkpoints" in large.finding
    assert large.what == small.what == "disk"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"MemFree: 1 kB\nMemAvailable:    {2**20} kB\n", ["ok: 1.0 GiB of memory are free"]),
        (f"MemAvailable: {2**19} kB\n", ["warning: 0.5 GiB of memory are free; have 1 GiB or more"]),
        ("MemFree: 1 kB\n", []),
        (None, []),
    ],
)
def test_a_gib_of_memory_should_be_free_where_that_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, said: list[str]
) -> None:
    assert {check.what for check in check_memory()} <= {"memory"}, "of this machine"
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr("peertune.memory.Path", {"/proc/meminfo": tmp_path / "meminfo"}.__getitem__)
    assert [f"{check.level}: {check.finding}" for check in check_memory()] == said
