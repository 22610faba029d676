"""What a peer has come to trust outlasts a CA that was restored from a copy."""

import json
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from parties import Federation

from peertune.errors import IdentityError, PeertuneError
from peertune.files import write_file
from peertune.identity import authority as ca
from peertune.identity.certificates import fingerprint, public_key
from peertune.identity.membership import Membership
from peertune.identity.roster import load_roster
from peertune.identity.trust import FILE, Trust, check_ca, read_trust
from peertune.topology import GRAPHS

DAY = timedelta(days=1)


@pytest.fixture
def three(tmp_path: Path) -> Federation:
    made = Federation(tmp_path, "hospital-1", "hospital-2", "hospital-3")
    shutil.copytree(made.ca, tmp_path / "copy")
    return made


def restore(made: Federation) -> None:
    """Put the CA's copy in its place."""
    shutil.rmtree(made.ca)
    shutil.copytree(made.folder / "copy", made.ca)


def issue(made: Federation, above: int = 0) -> Path:
    """Put a roster where the first peer looks."""
    with ca.opened(made.ca) as before:
        after, data = ca.issue_roster(before, above=above)
        ca.keep(made.ca, after)
    write_file(made.folder / "roster.yaml", data)
    return made.folder / "roster.yaml"


def first(made: Federation) -> Membership:
    return Membership(made.folder / "hospital-1", made.folder / "roster.yaml")


def members(membership: Membership) -> list[str]:
    return [member.name for member in membership.current()[1].members if member.valid()]


def test_a_restored_ca_does_not_bring_back_whom_it_had_revoked(
    three: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    issue(three)
    running = first(three)
    three.revoke("hospital-2")
    assert members(running) == ["hospital-1", "hospital-2", "hospital-3"]
    issue(three)
    assert members(running) == ["hospital-1", "hospital-3"]

    restore(three)
    issue(three, above=2)
    warned = "roster 3 lists revoked keys, which stay out, of hospital-2: was the CA restored from a copy?"
    for _ in range(3):  # it has written to its folder, and looks into it again
        assert members(running) == ["hospital-1", "hospital-3"]
    assert caplog.messages.count(warned) == 1
    assert members(first(three)) == ["hospital-1", "hospital-3"], "a restart keeps it"
    issue(three)
    for membership in (running, first(three)):
        assert members(membership) == ["hospital-1", "hospital-3"], "in every roster that follows"
    three.join("hospital-2")
    issue(three)
    for membership in (running, first(three)):
        assert members(membership) == ["hospital-1", "hospital-2", "hospital-3"], "with a new key"
        (certificate,) = membership.current()[1].members[1].certificates
        assert certificate not in three.roster().members[1].certificates[:1]


def test_who_is_revoked_while_a_peer_is_down_is_known_at_its_next_start(three: Federation) -> None:
    issue(three)
    first(three)
    three.revoke("hospital-2")
    issue(three)
    assert members(first(three)) == ["hospital-1", "hospital-3"]
    assert len(read_trust(three.folder / "hospital-1").revoked) == 1
    restore(three)
    issue(three, above=2)
    assert members(first(three)) == ["hospital-1", "hospital-3"]


def test_two_rosters_of_one_serial_are_told_apart(three: Federation, caplog: pytest.LogCaptureFixture) -> None:
    file = issue(three)
    genuine = file.read_bytes()
    running = first(three)
    three.revoke("hospital-2")
    restore(three)
    three.approve("hospital-3")
    issue(three)
    told = r"roster.yaml: is another roster 1 than this peer has had: the CA was restored from a copy, or .*above 1"
    with pytest.raises(IdentityError, match=told):
        first(three)
    assert running.current()[1].raw == genuine
    assert caplog.messages[-1].endswith("peertune roster --serial-above 1; going on with roster 1")
    write_file(file, genuine.replace(b"\n", b"\r\n"))
    assert members(first(three)) == members(running) == ["hospital-1", "hospital-2", "hospital-3"], "it came by mail"


def test_a_key_that_has_expired_was_not_revoked(tmp_path: Path) -> None:
    began = datetime.now(UTC) - 20 * DAY
    made = Federation(tmp_path, "hospital-1", now=began)
    made.join("hospital-2", days=10, now=began)
    write_file(tmp_path / "roster.yaml", made.roster(began).raw)
    first(made)
    issue(made)
    assert members(first(made)) == ["hospital-1"]
    made.approve("hospital-2")  # the same key
    issue(made)
    assert members(first(made)) == ["hospital-1", "hospital-2"]


def test_whom_an_own_roster_or_a_restored_ca_leaves_out_altogether_was_not_revoked(three: Federation) -> None:
    folder = three.folder / "hospital-1"
    for graph, listed in (("ring", 3), ("path", 2), ("ring", 3)):
        raw = three.own_rosters(GRAPHS[graph](clients=3), {"name": graph})["hospital-1"].raw
        write_file(three.folder / "roster.yaml", raw)
        assert len(members(first(three))) == listed
    assert read_trust(folder).revoked == ()
    three.join("hospital-4")
    issue(three)
    first(three)
    restore(three)
    issue(three, above=4)
    assert len(members(first(three))) == 3
    three.approve("hospital-4")  # its request of before
    issue(three)
    assert len(members(first(three))) == 4


def test_the_serial_that_another_version_kept_counts(three: Federation) -> None:
    issue(three)
    folder = three.folder / "hospital-1"
    (folder / "roster.serial").write_text("7\n")
    with pytest.raises(IdentityError, match="is roster 1, and this peer has had 7; get a newer one"):
        first(three)
    issue(three, above=7)
    first(three)
    assert read_trust(folder).serial == 8


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ca": "", "serial": "x", "digest": "", "keys": {}, "revoked": []}'])
def test_a_damaged_memory_is_not_taken_for_none(three: Federation, text: str) -> None:
    issue(three)
    (three.folder / "hospital-1" / FILE).write_text(text)
    with pytest.raises(PeertuneError, match=r"trusted.json: is damaged; remove it, and start with --ca-fingerprint"):
        first(three)


def test_it_is_kept_as_json_and_holds_no_more_than_the_roster(three: Federation) -> None:
    issue(three)
    first(three)
    kept = json.loads((three.folder / "hospital-1" / FILE).read_text())
    roster = load_roster((three.folder / "roster.yaml").read_bytes(), three.certificate)
    assert (kept["serial"], kept["digest"], kept["revoked"]) == (1, roster.digest, [])
    assert {name: list(keys) for name, keys in kept["keys"].items()} == {
        member.name: list(member.fingerprints) for member in roster.members
    }
    assert isinstance(read_trust(three.folder / "hospital-1"), Trust)


def test_what_can_not_be_read_is_not_taken_for_none(three: Federation) -> None:
    issue(three)
    (three.folder / "hospital-1" / FILE).mkdir()
    with pytest.raises(IdentityError, match=r"trusted.json: can't be read \(Is a directory\); let this peer read it"):
        first(three)


def test_the_cas_fingerprint_is_compared_however_it_is_written(three: Federation) -> None:
    roster = three.roster()
    ca = fingerprint(public_key(roster.ca))
    for said in (ca, ca.upper(), ca.replace(" ", ":"), ca.replace(" ", ""), f" {ca}\n"):
        check_ca(roster, said)
    other = f"{ca[:-1]}{'1' if ca[-1] == '0' else '0'}"
    told = f"the CA's fingerprint is {ca}, and --ca-fingerprint says {other}: it is another CA of the name hospitals; "
    with pytest.raises(IdentityError, match=re.escape(told)):
        check_ca(roster, other.replace(" ", ""))
    for none in ("", ca[:-1], f"{ca}0", f"{ca[:-1]}g"):
        with pytest.raises(IdentityError, match="give the 64 digits that peertune ca list shows"):
            check_ca(roster, none)
