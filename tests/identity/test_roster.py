import base64
import math
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from parties import Federation

from peertune.errors import GraphError, IdentityError
from peertune.identity import authority as ca
from peertune.identity.neighbour_roster import _edges, _weights
from peertune.identity.roster import MAX_ROSTER_BYTES, Roster, claimed_serial, load_roster
from peertune.topology import GRAPHS, digest, neighbourhoods, summary

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
SETTINGS = {"name": "a graph"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    made = Federation(tmp_path_factory.mktemp("federation"), now=NOW)
    made.join("hospital-1", "host-1:50051", now=NOW)
    made.join("hospital-2", now=NOW)
    made.join("hospital-2", days=10, now=NOW)
    return made


@pytest.fixture(scope="module")
def roster(federation: Federation) -> Roster:
    return federation.roster(NOW)


def signed(federation: Federation, text: str) -> bytes:
    """A roster as a CA would sign it that was talked into anything."""
    key = serialization.load_pem_private_key((federation.ca / "key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signature = key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
    return text.encode() + b"signature: " + base64.b64encode(signature) + b"\n"


def test_a_roster_says_who_is_a_member(federation: Federation, roster: Roster) -> None:
    assert roster.federation == "hospitals"
    first, second = roster.members
    assert (first.client, first.name, first.address) == (0, "hospital-1", "host-1:50051")
    assert (second.client, second.name, second.address) == (1, "hospital-2", None)
    assert (len(first.certificates), len(second.certificates)) == (1, 2)
    assert [roster.by_client(client) for client in (-1, 0, 1, 2)] == [None, first, second, None]
    assert load_roster(roster.raw, federation.certificate) == roster
    content = yaml.safe_load(roster.raw)
    assert list(content) == ["federation", "serial", "issued", "peers", "signature"]
    assert content["issued"] == "2026-03-01T12:00:00+00:00"
    assert b"\n  name: hospital-1\n" in roster.raw
    assert b"\n  - |\n    -----BEGIN CERTIFICATE-----\n" in roster.raw, "line by line"
    assert [peer["fingerprints"] for peer in content["peers"]] == [list(m.fingerprints) for m in roster.members]


def test_serials_grow(federation: Federation, roster: Roster) -> None:
    later = federation.roster(NOW)
    assert later.serial > roster.serial
    assert federation.roster(NOW).serial == later.serial + 1


def test_the_serial_that_a_roster_claims_stands_near_its_beginning_or_is_beyond_all(roster: Roster) -> None:
    for data in (roster.raw, roster.raw.replace(b"\n", b"\r\n")):
        assert claimed_serial(data) == roster.serial
    assert claimed_serial(b"serial: " + b"9" * 18) == 10**18 - 1
    for none in (b"", b"serial: x\n", b"a: serial: 7\n", b"serial: " + b"9" * 19, b"#" * 1024 + b"\nserial: 7\n"):
        assert claimed_serial(none) == math.inf


def test_only_certificates_in_their_validity_count(federation: Federation, roster: Roster) -> None:
    second = roster.members[1]
    long, short = second.certificates
    assert second.valid(NOW) == (long, short)
    assert second.valid(NOW + 11 * DAY) == (long,)
    assert second.valid(NOW - 2 * DAY) == second.valid(NOW + 91 * DAY) == ()
    assert roster.by_certificate(short, NOW) is second
    assert roster.by_certificate(short, NOW + 11 * DAY) is None
    assert roster.by_certificate(federation.certificate, NOW) is None
    assert [len(m.certificates) for m in federation.roster(NOW + 11 * DAY).members] == [1, 1]


def test_the_time_is_now_if_none_is_given(tmp_path: Path) -> None:
    for begun, valid in ((None, True), (datetime.now(UTC) - 91 * DAY, False)):
        made = Federation(tmp_path / str(valid), "hospital-1", now=begun).roster(begun)
        (certificate,) = made.members[0].certificates
        assert (made.by_certificate(certificate) is not None) == bool(made.members[0].valid()) == valid


def test_a_certificate_that_the_ca_issued_but_the_roster_lacks_is_nobodys(
    federation: Federation, roster: Roster
) -> None:
    again = federation.approve("hospital-1", now=NOW)  # the same key, the same name
    assert roster.by_certificate(again, NOW) is None
    assert federation.roster(NOW).by_certificate(again, NOW) is not None


@pytest.mark.thorough
def test_a_roster_altered_in_any_byte_is_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "hospital-1", now=NOW)
    roster = federation.roster(NOW)
    start = roster.raw.rindex(b"signature: ")
    for place in range(len(roster.raw)):
        altered = bytearray(roster.raw)
        altered[place] ^= 1
        with suppress(IdentityError):
            found = load_roster(bytes(altered), federation.certificate)
            assert (place > start, found.members) == (True, roster.members), "spare bits at the signature's end"


@pytest.mark.parametrize("change", [b"", b"# a comment\n", b"signature: AAAA\n", b"peers: []\n"])
def test_nothing_can_be_added_or_left_out(federation: Federation, roster: Roster, change: bytes) -> None:
    start = roster.raw.rindex(b"signature: ")
    for data in (
        change + roster.raw[:start],
        change + roster.raw if change else roster.raw[:-9],
        roster.raw + change if change else b"",
        roster.raw[:start] + change + roster.raw[start:] if change else roster.raw[start:],
    ):
        with pytest.raises(IdentityError, match=r"^roster: isn't (signed|as the CA)"):
            load_roster(data, federation.certificate)


def test_a_roster_may_come_by_mail(federation: Federation, roster: Roster) -> None:
    assert load_roster(roster.raw.replace(b"\n", b"\r\n"), federation.certificate).members == roster.members


def test_a_roster_of_another_ca_is_refused(roster: Roster, tmp_path: Path) -> None:
    other = Federation(tmp_path, now=NOW)
    with pytest.raises(IdentityError, match="isn't as the CA of hospitals signed it: altered, or of another CA"):
        load_roster(roster.raw, other.certificate)


def test_a_file_too_large_is_refused_before_it_is_looked_at(federation: Federation) -> None:
    with pytest.raises(IdentityError, match="larger than 4 MiB"):
        load_roster(b"x" * (MAX_ROSTER_BYTES + 1), federation.certificate)


def test_bytes_that_are_no_roster_cost_nothing(federation: Federation) -> None:
    bomb = b"a: &a [x, x]\n" + b"".join(b"b%d: &b%d [*a, *a]\n" % (n, n) for n in range(999))
    for data in (b"", b"\xff\xfe", b"[" * 2**20, bomb, bomb + b"signature: AAAA\n", b"\nsignature: \xff\n"):
        with pytest.raises(IdentityError):
            load_roster(data, federation.certificate)


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "a key too many": lambda c: c.update(extra=1),
    "a key too few": lambda c: c.pop("issued"),
    "federation": lambda c: c.update(federation="clinics"),
    "serial of another type": lambda c: c.update(serial=True),
    "serial 0": lambda c: c.update(serial=0),
    "peers of another type": lambda c: c.update(peers={}),
    "a peer of another type": lambda c: c["peers"].append("x"),
    "a peer's key too many": lambda c: c["peers"][0].update(extra=1),
    "a number left out": lambda c: c["peers"].pop(0),
    "a number twice": lambda c: c["peers"][1].update(client=0),
    "a name twice": lambda c: c["peers"][1].update(c["peers"][0], client=1, address=None),
    "a name of another shape": lambda c: c["peers"][0].update(name="A"),
    "an address of another shape": lambda c: c["peers"][0].update(address="unix:/tmp/x"),
    "an address twice": lambda c: c["peers"][1].update(address="host-1:50051"),
    "a fingerprint changed": lambda c: c["peers"][0].update(fingerprints=["0000"]),
    "a certificate of another": lambda c: c["peers"][0].update(certificates=c["peers"][1]["certificates"]),
    "no certificate": lambda c: c["peers"][0].update(certificates=["x"]),
    "a certificate of another type": lambda c: c["peers"][0].update(certificates=[3]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_ca_should_not_have_signed_is_refused_in_one_line(
    federation: Federation, roster: Roster, wrong: str
) -> None:
    content = yaml.safe_load(roster.raw)
    del content["signature"]
    assert load_roster(signed(federation, yaml.safe_dump(content)), federation.certificate).members == roster.members
    WRONG[wrong](content)
    with pytest.raises(IdentityError, match=r"^roster: is signed but can't be used: ") as caught:
        load_roster(signed(federation, yaml.safe_dump(content)), federation.certificate)
    assert "\n" not in str(caught.value)


def test_a_certificate_that_another_ca_issued_is_refused_in_a_signed_roster(
    federation: Federation, roster: Roster, tmp_path: Path
) -> None:
    other = Federation(tmp_path, "hospital-1", now=NOW)
    content = yaml.safe_load(roster.raw)
    del content["signature"]
    content["peers"][0] = yaml.safe_load(other.roster(NOW).raw)["peers"][0]
    with pytest.raises(IdentityError, match="isn't issued by the federation's CA"):
        load_roster(signed(federation, yaml.safe_dump(content)), federation.certificate)
    with pytest.raises(IdentityError, match="it is no YAML"):
        load_roster(signed(federation, "a: [\n"), federation.certificate)


def test_a_roster_keeps_those_that_were_revoked_in_their_seats(tmp_path: Path) -> None:
    made = Federation(tmp_path, "hospital-1", "hospital-2", now=NOW)
    before = made.roster(NOW)
    made.revoke("hospital-1")
    after = made.roster(NOW)
    (certificate,) = before.members[0].certificates
    assert before.by_certificate(certificate, NOW) is before.members[0]
    assert after.by_certificate(certificate, NOW) is None
    assert after.members[0].fingerprints == ()
    assert after.members[1] == before.members[1]
    with ca.opened(made.ca) as authority:
        assert (authority.serial, len(authority.revoked)) == (2, 1)
    assert isinstance(certificate, x509.Certificate)


# ---- a member's own roster


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    names = [f"hospital-{number}" for number in range(6)]
    made = Federation(tmp_path_factory.mktemp("six"), *names, now=NOW)
    made.revoke("hospital-5")
    return made


def test_an_own_roster_lists_whom_the_member_may_meet_and_what_it_must_know(six: Federation) -> None:
    graph = GRAPHS["ring"](clients=9, activation=0.5)
    rosters = six.own_rosters(graph, SETTINGS, NOW)
    assert list(rosters) == [f"hospital-{number}" for number in range(5)], "the one that is revoked gets none"
    listed = {name: [member.client for member in roster.members] for name, roster in rosters.items()}
    assert listed["hospital-0"] == [0, 1], "client 8 is in no seat yet"
    assert listed["hospital-3"] == [2, 3, 4]
    assert listed["hospital-4"] == [3, 4, 5]
    assert len({roster.serial for roster in rosters.values()}) == 1
    whole = six.roster(NOW)
    assert whole.serial == rosters["hospital-0"].serial + 1
    for name, roster in rosters.items():
        (member,) = (member for member in whole.members if member.name == name)
        client = member.client
        assert roster.by_client(client) == member
        assert (roster.by_client(client + 2), roster.by_client(-1)) == (None, None)
        assert six.identity(name, roster, NOW).client == client
        assert roster.own is not None
        known = roster.own.known
        (again,) = neighbourhoods(graph, [client], summary(graph))
        assert (roster.own.recipe, known.client, known.summary) == (SETTINGS, client, summary(graph))
        assert (known.name, known.digest) == ("ring", digest(graph))
        assert [edges.tolist() for edges in known.edges] == [edges.tolist() for edges in again.edges]


@pytest.mark.parametrize("name", ["exponential", "random_regular"])
def test_weights_and_edges_of_all_rounds_come_through_to_the_bit(six: Federation, name: str) -> None:
    settings = {"degree": 3} if name == "random_regular" else {}
    graph = GRAPHS[name](clients=8, activation=0.3, weights="laplacian", **settings)
    for roster in six.own_rosters(graph, SETTINGS, NOW).values():
        assert roster.own is not None
        known = roster.own.known
        (again,) = neighbourhoods(graph, [known.client], summary(graph))
        assert len(known.weights) == len(known.edges) == graph.period
        for mine, theirs in zip((*known.edges, *known.weights), (*again.edges, *again.weights), strict=True):
            assert (mine.tolist(), mine.dtype) == (theirs.tolist(), theirs.dtype)


def test_where_any_two_may_meet_there_is_no_own_roster_and_no_serial_is_spent(six: Federation) -> None:
    with pytest.raises(GraphError, match="graph complete: any two clients may meet"):
        six.own_rosters(GRAPHS["complete"](clients=9), SETTINGS, NOW)
    before = six.roster(NOW).serial
    assert six.roster(NOW).serial == before + 1


WRONG_OWN: dict[str, Callable[[dict[str, Any]], object]] = {
    "no mapping": lambda c: c.update(own=[]),
    "a key too many": lambda c: c["own"].update(extra=1),
    "a key too few": lambda c: c["own"].pop("recipe"),
    "a number of another type": lambda c: c["own"].update(client="3"),
    "a number that no peer has": lambda c: c["own"].update(client=7),
    "a number beyond the clients": lambda c: c["own"].update(client=9),
    "no rounds": lambda c: c["own"].update(edges=[]),
    "edges of another type": lambda c: c["own"].update(edges=[[2, 3]]),
    "edges of another shape": lambda c: c["own"].update(edges=["2-3,3-4"]),
    "a number too long": lambda c: c["own"].update(edges=["2-3333333333"]),
    "a pair the wrong way round": lambda c: c["own"].update(edges=["3-2 3-4"]),
    "a client with itself": lambda c: c["own"].update(edges=["3-3"]),
    "pairs that are not sorted": lambda c: c["own"].update(edges=["3-4 2-3"]),
    "a pair twice": lambda c: c["own"].update(edges=["3-4 3-4"]),
    "an end that is no client": lambda c: c["own"].update(edges=["3-9"]),
    "weights of too few rounds": lambda c: c["own"].update(weights=[[], []]),
    "weights of too many rounds": lambda c: c["own"].update(edges=["2-3 3-4"], weights=[[0.5, 0.5], [0.5, 0.5]]),
    "weights of too few edges": lambda c: c["own"].update(weights=[[0.5]]),
    "a weight that is none": lambda c: c["own"].update(edges=["2-3"], weights=[[float("nan")]]),
    "a weight of another type": lambda c: c["own"].update(edges=["2-3"], weights=[[1]]),
    "clients beyond counting": lambda c: c["own"]["summary"].update(clients=10**30),
    "a summary without rho": lambda c: c["own"]["summary"].pop("rho"),
    "rho that is no number": lambda c: c["own"]["summary"].update(rho=float("nan")),
    "rho above 1": lambda c: c["own"]["summary"].update(rho=1.5),
    "an endless number": lambda c: c["own"]["summary"].update(edges=float("inf")),
    "a peer that is no neighbour": lambda c: c["peers"][0].update(client=1),
    "a peer of a number below 0": lambda c: c["peers"][0].update(client=-2),
    "rho of another type": lambda c: c["own"]["summary"].update(rho="0.5"),
    "its own entry left out": lambda c: c["peers"].pop(1),
    "numbers that do not grow": lambda c: c["peers"].reverse(),
}


@pytest.mark.parametrize("wrong", WRONG_OWN)
def test_an_own_roster_that_the_ca_should_not_have_signed_is_refused_in_one_line(six: Federation, wrong: str) -> None:
    content = yaml.safe_load(six.own_rosters(GRAPHS["ring"](clients=9), SETTINGS, NOW)["hospital-3"].raw)
    del content["signature"]
    assert load_roster(signed(six, yaml.safe_dump(content)), six.certificate).own is not None
    WRONG_OWN[wrong](content)
    with pytest.raises(IdentityError, match=r"^roster: is signed but can't be used: ") as caught:
        load_roster(signed(six, yaml.safe_dump(content)), six.certificate)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("was", "becomes"), [("client: 3\n", f"client: {'9' * 5000}\n"), ("a graph", "2026-99-99")])
def test_text_that_yaml_itself_stumbles_over_is_refused_in_one_line(six: Federation, was: str, becomes: str) -> None:
    content = yaml.safe_load(six.own_rosters(GRAPHS["ring"](clients=9), SETTINGS, NOW)["hospital-3"].raw)
    del content["signature"]
    text = yaml.safe_dump(content, sort_keys=False)
    assert was in text
    with pytest.raises(IdentityError, match=r"^roster: is signed but can't be used: it is no YAML"):
        load_roster(signed(six, text.replace(was, becomes)), six.certificate)


def test_edges_name_clients_below_their_number() -> None:
    assert _edges("2-3 3-8", 9).tolist() == [[2, 3], [3, 8]]
    assert _edges("", 9).shape == (0, 2)
    with pytest.raises(IdentityError, match=r"^edges name client 9, of 9$"):
        _edges("2-3 3-9", 9)


@pytest.mark.parametrize("wrong", [[0.5], [0.5, 1.1], [-0.1, 0.5], [0.5, float("nan")], [0.5, 1], "0.5"])
def test_weights_are_a_number_from_0_to_1_for_each_edge(wrong: object) -> None:
    assert _weights([0.0, 1.0], 2).tolist() == [0.0, 1.0]
    with pytest.raises(IdentityError, match="weights must be a number from 0 to 1 for each edge"):
        _weights(wrong, 2)


def test_a_roster_that_would_be_too_large_is_refused_with_what_to_do(
    six: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peertune.identity.roster.MAX_ROSTER_BYTES", 1000)
    with pytest.raises(IdentityError, match=r"^roster: 6 members takes more than .*; use fewer, or give each its own "):
        six.roster(NOW)
    whose = r"^roster: what client 0 must know of graph ring takes more than .*; choose a sparser graph$"
    with pytest.raises(IdentityError, match=whose):
        six.own_rosters(GRAPHS["ring"](clients=9), SETTINGS, NOW)
