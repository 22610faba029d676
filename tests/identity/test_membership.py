"""Rosters and certificates that change while a peer runs: which of them it takes up, and what it goes on with."""

import logging
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from parties import Federation

from peertune.errors import IdentityError
from peertune.files import write_file
from peertune.identity.certificates import fingerprint, public_key
from peertune.identity.membership import LOOK_EVERY_S, Membership
from peertune.identity.roster import MAX_ROSTER_BYTES, Roster, load_roster
from peertune.identity.trust import FILE, read_trust
from peertune.topology import GRAPHS


@pytest.fixture
def three(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Federation:
    caplog.set_level(logging.WARNING)
    made = Federation(tmp_path, "hospital-1", "hospital-2", "hospital-3")
    issue(made)
    return made


def issue(made: Federation) -> bytes:
    """Put a roster where the first peer looks."""
    raw = made.roster().raw
    write_file(made.folder / "roster.yaml", raw)
    return raw


def first(made: Federation, file: str = "roster.yaml", ca: str | None = None, *, looks: bool = False) -> Membership:
    return Membership(made.folder / "hospital-1", made.folder / file, ca, looks=looks)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = caplog.messages.copy()
    caplog.clear()
    return found


def test_a_roster_whose_ca_is_another_than_was_read_out_is_refused(three: Federation) -> None:
    ca = fingerprint(public_key(three.certificate))
    with pytest.raises(IdentityError, match="--ca-fingerprint says"):
        first(three, ca="0" * 64)
    assert not (three.folder / "hospital-1" / FILE).exists(), "it trusts nothing yet"
    assert first(three, ca=ca).current()[1].serial == 1


def test_who_only_looks_trusts_nothing_and_still_goes_by_what_is_trusted(three: Federation) -> None:
    first(three, looks=True)
    assert not (three.folder / "hospital-1" / FILE).exists()
    old = (three.folder / "roster.yaml").read_bytes()
    issue(three)
    assert first(three).current()[0].name == "hospital-1"
    assert read_trust(three.folder / "hospital-1").serial == 2
    write_file(three.folder / "roster.yaml", old)
    for looks in (True, False):
        with pytest.raises(IdentityError, match=r"/roster\.yaml: is roster 1, and this peer has had 2; get a newer"):
            first(three, looks=looks)


def test_a_newer_roster_in_the_file_is_taken_up_and_told_with_who_is_gone(
    three: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    membership = first(three)
    for raw in (issue(three), None):
        assert raw is None or membership.current()[1].raw == raw
    assert said(caplog) == ["roster 2 is in use"]
    three.revoke("hospital-2")
    three.revoke("hospital-3")
    issue(three)
    assert membership.current()[1].serial == 3
    assert said(caplog) == ["roster 3 is in use; members no more: hospital-2, hospital-3"]
    issue(three)
    assert membership.current()[1].serial == 4
    assert said(caplog) == ["roster 4 is in use"], "they had gone before"


def test_a_file_that_can_not_be_used_is_told_once_until_it_is_mended(
    three: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    file = three.folder / "roster.yaml"
    membership, good = first(three), file.read_bytes()
    gone = f"{file}: can't be read (No such file or directory); give the roster's file; going on with roster 1"
    large = "roster: is larger than 4 MiB; ask the CA for one made with peertune roster; going on with roster 1"
    for _ in range(2):
        file.unlink()
        for _ in range(2):
            assert membership.current()[1].raw == good
            os.utime(membership._folder, ns=(0, time.time_ns()))  # so that it looks again
        assert said(caplog) == [gone]
        write_file(file, b"#" * (MAX_ROSTER_BYTES + 1))
        assert membership.current()[1].raw == good
        assert said(caplog) == [large]
        write_file(file, good)
        assert membership.current()[1].raw == good
        assert said(caplog) == []
    file.unlink()
    with pytest.raises(IdentityError, match=r"roster\.yaml: can't be read \(No such file or directory\); give the ros"):
        first(three)


def test_what_changes_without_a_new_time_of_its_file_is_seen_within_a_minute(
    three: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: 10 * LOOK_EVERY_S)
    monkeypatch.setattr("peertune.identity.membership.time", clock)
    file = three.folder / "roster.yaml"
    membership, before = first(three), file.stat().st_mtime_ns
    membership.current()  # which sees its own writing in the folder
    issue(three)
    os.utime(file, ns=(before, before))
    assert membership.current()[1].serial == 1
    monkeypatch.setattr(clock, "monotonic", lambda: 10.9 * LOOK_EVERY_S)
    assert membership.current()[1].serial == 1
    monkeypatch.setattr(clock, "monotonic", lambda: 11 * LOOK_EVERY_S)
    assert membership.current()[1].serial == 2


def test_a_renewed_certificate_is_taken_up_and_another_member_s_is_not(
    three: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    membership = first(three)
    before = membership.current()[0]
    three.join("hospital-1")
    issue(three)
    assert membership.current()[0].certificate not in (before.certificate, b"")
    said(caplog)
    renewed = membership.current()
    for path in (three.folder / "hospital-1").glob("*.pem"):
        path.unlink()
    for path in (three.folder / "hospital-2").glob("*.pem"):
        shutil.copy(path, three.folder / "hospital-1")
    assert membership.current() == renewed
    told = f"{three.folder}/roster.yaml: makes this peer client 1; start it anew; going on with roster 2"
    assert said(caplog) == [told]


# ---- what others send


def test_a_newer_roster_of_another_peer_is_taken_up_and_kept(
    three: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    file = three.folder / "roster.yaml"
    membership = first(three)
    three.revoke("hospital-3")
    newer, newest = three.roster().raw, three.roster().raw
    assert membership.adopt(newest)
    assert file.read_bytes() == newest
    assert read_trust(three.folder / "hospital-1").serial == 3
    for raw in (newest, newer):
        assert not membership.adopt(raw)
        assert membership.current()[1].raw == file.read_bytes() == newest
    assert said(caplog) == ["roster 3 is in use; members no more: hospital-3"]


def test_a_roster_that_can_not_be_kept_is_in_use_until_the_peer_ends(
    three: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    folder, file = three.folder / "hospital-1", three.folder / "roster.yaml"
    membership = first(three)
    for path in (folder / FILE, file):  # neither can be written
        path.unlink()
        path.mkdir()
    membership.current()
    said(caplog)
    newer = three.roster().raw
    assert membership.adopt(newer)
    assert membership.current()[1].raw == newer
    in_use, trust, roster = said(caplog)
    assert in_use == "roster 2 is in use"
    assert trust.startswith(f"{folder / FILE}: can't be written (Is a directory)")
    assert trust.endswith(": an older roster will not be told from this one")
    assert roster.startswith(f"{file}: can't be written (Is a directory)")
    assert roster.endswith("; roster 2 is in use until this peer ends")
    write_file(folder / "seen", b"")  # in the folder something changes
    assert membership.current()[1].raw == newer


def test_of_two_rosters_that_are_looked_at_at_once_the_newer_stays(
    three: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    membership = first(three)
    membership.current()  # which sees its own writing in the folder
    newer, newest = three.roster().raw, three.roster().raw

    def overtaken(raw: bytes, ca: x509.Certificate) -> Roster:
        if raw == newer:  # and not the file, which it looks at every now and then, under its lock
            monkeypatch.undo()
            assert membership.adopt(newest)
        return load_roster(raw, ca)

    monkeypatch.setattr("peertune.identity.membership.load_roster", overtaken)
    assert not membership.adopt(newer)
    assert membership.current()[1].raw == (three.folder / "roster.yaml").read_bytes() == newest


def test_an_old_roster_is_put_aside_before_its_signature_is_looked_at(three: Federation) -> None:
    old = (three.folder / "roster.yaml").read_bytes()
    new = issue(three)
    membership = first(three)
    unsigned = new.rpartition(b"signature: ")[0]
    for raw in (old, old.replace(b"\n", b"\r\n"), unsigned, b"serial: 2\n" + b"[" * 2**21):
        assert not membership.adopt(raw)
    for raw in (unsigned.replace(b"serial: 2\n", b"serial: 3\n"), b"#" * 2000 + b"\nserial: 1\n", b""):
        with pytest.raises(IdentityError, match=r"^roster: isn't signed"):
            membership.adopt(raw)
    assert membership.current()[1].raw == new


# ---- a member's own rosters


def test_a_neighbour_s_own_roster_is_not_taken_from_whoever_sends_it(three: Federation) -> None:
    ring = GRAPHS["ring"](clients=3)
    for kind in ("whole", "own"):
        rosters = three.own_rosters(ring, {"name": "a ring"})
        file = three.folder / f"{kind}.yaml"
        before = three.roster().raw if kind == "whole" else rosters["hospital-1"].raw
        write_file(file, before)
        membership = first(three, file.name)
        theirs = three.own_rosters(ring, {"name": "a ring"})["hospital-2"].raw
        if kind == "whole":
            with pytest.raises(IdentityError, match=r"^it is client 1's own$"):
                membership.adopt(theirs)
        else:
            assert not membership.adopt(theirs)
            assert not membership.adopt(three.roster().raw), "nor all members', by a peer that has its own"
        assert file.read_bytes() == membership.current()[1].raw == before


def test_a_roster_of_another_graph_or_kind_is_for_the_next_start(
    three: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    ring, path = GRAPHS["ring"](clients=3), GRAPHS["path"](clients=3)
    file = three.folder / "roster.yaml"
    write_file(file, three.own_rosters(ring, {"name": "a graph"})["hospital-1"].raw)
    membership = first(three)
    for raw in (
        three.own_rosters(ring, {"name": "another graph"})["hospital-1"].raw,
        three.own_rosters(path, {"name": "a graph"})["hospital-1"].raw,  # a file of edges of that name, with others
        three.roster().raw,
    ):
        write_file(file, raw)
        assert membership.current()[1].serial == 2
    began = "and this run began with an own roster for {'name': 'a graph'} with edges "
    told = said(caplog)
    assert len(told) == 3
    assert all(began in line and line.endswith("; stop and resume to change; going on with roster 2") for line in told)
    assert told[0].startswith(f"{file}: is an own roster for {{'name': 'another graph'}} with edges ")
    assert told[2].startswith(f"{file}: is the roster of all members, ")
    write_file(file, newest := three.own_rosters(ring, {"name": "a graph"})["hospital-1"].raw)
    assert membership.current()[1].raw == newest
    write_file(file, three.own_rosters(ring, {"name": "a graph"})["hospital-2"].raw)
    assert membership.current()[1].raw == newest
    other = "is hospital-1, client 0, and the roster is client 1's own; give this peer's"
    assert said(caplog)[-1].startswith(f"{three.folder / 'hospital-1'}: {other}; going on")
    with pytest.raises(IdentityError, match=other):
        first(three)
