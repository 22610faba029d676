import os
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from parties import Federation

from peertune.errors import IdentityError, PeertuneError, RunError
from peertune.identity import authority as ca
from peertune.identity.certificates import (
    MAX_BYTES,
    check_address,
    check_issued,
    check_name,
    federation_of,
    fingerprint,
    make_request,
    new_key,
    public_key,
    read_key,
    read_request,
)
from peertune.identity.keys import key_files, load_ca, load_identity, request
from peertune.identity.roster import Roster
from peertune.topology import GRAPHS

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path, "hospital-1", "hospital-2", now=NOW)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", ["a", "7", "hospital-3", "a" * 63])
def test_names_are_dns_labels(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a_b", "a b", "ä", "a\n", "a" * 64, "../a", "a\x1b[2J"])
def test_other_names_are_refused_in_one_printable_line(name: str) -> None:
    with pytest.raises(IdentityError, match="give lower-case letters, digits and hyphens") as caught:
        check_name(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("address", ["localhost:1", "10.0.0.1:50051", "[::1]:65535", "a_b.example.org:80", "X.org:9"])
def test_addresses_are_host_and_port(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:",
        ":1",
        "host:0",
        "host:65536",
        "host:01",
        "host:1:2",
        "host:1\n",
        "a b:1",
        "a..b:1",
        "-a:1",
        "ä:1",
        "::1:80",
        "[::g]:80",
        "unix:/tmp/x",
        "dns:///a:1",
        "peertune://a:1",
        "x" * 300 + ":1",
    ],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(IdentityError, match="give host:port"):
        check_address(address)


def test_a_certificate_says_what_its_holder_may_do_and_no_more(federation: Federation) -> None:
    own = federation.certificate
    assert federation_of(own) == "hospitals"
    limits = own.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (limits.critical, limits.value.ca, limits.value.path_length) == (True, True, 0)
    usage = own.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)

    leaf = federation.approve("hospital-1", days=30, now=NOW)
    assert check_issued(leaf, own) == "hospital-1"
    assert (leaf.not_valid_before_utc, leaf.not_valid_after_utc) == (NOW - DAY, NOW + 30 * DAY)
    limits = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (limits.critical, limits.value.ca) == (True, False)
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, False, True)
    for made in (own, leaf):
        may = made.extensions.get_extension_for_class(x509.KeyUsage).value
        others = (may.content_commitment, may.key_encipherment, may.data_encipherment, may.key_agreement, may.crl_sign)
        assert not any(others)
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(purposes) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    (organisation,) = leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    assert organisation.value == "hospitals"
    assert leaf.serial_number != federation.approve("hospital-1", now=NOW).serial_number


def test_keys_are_for_their_owner_alone_and_no_other_file_holds_one(federation: Federation) -> None:
    federation.join("hospital-1", now=NOW)
    files = [file for file in federation.folder.rglob("*") if file.is_file()]
    keys = {file for file in files if b"PRIVATE" in file.read_bytes()}
    assert {str(file.relative_to(federation.folder)) for file in keys} == {
        "ca/key.pem",
        "hospital-1/key.pem",
        "hospital-1/key-2.pem",
        "hospital-2/key.pem",
    }
    assert {mode(file) for file in keys} == {0o600}
    assert {mode(file.parent) for file in keys} == {0o700}


def test_a_key_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        request(tmp_path, "hospital-3", None)
    finally:
        os.umask(before)
    assert mode(tmp_path / "key.pem") == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hospital-3.request.pem", "key.pem"]


def test_a_request_is_read_as_it_was_made(tmp_path: Path) -> None:
    for address in ("hospital-3.example.org:50051", "[::1]:7", None):
        asked = request(tmp_path / "peer", "hospital-3", address)
        read = read_request(asked.file.read_bytes(), asked.file)
        assert (read.name, read.address, fingerprint(read.key)) == ("hospital-3", address, asked.fingerprint)
    assert re.fullmatch(r"([0-9a-f]{4} ){15}[0-9a-f]{4}", asked.fingerprint)
    assert asked.renews


def test_each_request_has_a_key_of_its_own_and_what_is_no_key_of_a_request_stays_out(tmp_path: Path) -> None:
    (tmp_path / "key-old.pem").write_bytes(b"somebody's own")
    asked = [request(tmp_path, "hospital-3", None) for _ in range(3)]
    assert [one.renews for one in asked] == [False, True, True]
    files = key_files(tmp_path)
    assert sorted(file.name for file in files) == ["key-2.pem", "key-3.pem", "key.pem"]
    keys = {fingerprint(read_key(file.read_bytes(), file).public_key()) for file in files}
    assert keys == {one.fingerprint for one in asked}


def csr(key: ec.EllipticCurvePrivateKey, *names: x509.GeneralName) -> bytes:
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_request_for_more_or_other_than_a_name_and_an_address_is_refused() -> None:
    key, name = new_key(), x509.DNSName("hospital-3")
    link = x509.UniformResourceIdentifier("peertune://host:1")
    for names in (
        [],
        [link],
        [name, x509.DNSName("hospital-1")],
        [name, link, x509.UniformResourceIdentifier("peertune://host:2")],
        [name, x509.UniformResourceIdentifier("https://host:1")],
        [name, x509.RFC822Name("a@b.org")],
        [x509.DNSName("*")],
        [x509.DNSName("Hospital.3")],
        [name, x509.UniformResourceIdentifier("peertune://host")],
    ):
        with pytest.raises(IdentityError, match=r"^asked: .*"):
            read_request(csr(key, *names), "asked")
    with pytest.raises(IdentityError, match="its key is not on the curve P-256"):
        read_request(csr(ec.generate_private_key(ec.SECP384R1()), name), "asked")
    good = csr(key, name)
    assert read_request(good + b"\n", "asked").name == "hospital-3"
    cut = b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
    for data in (b"", cut, good + b"\n" * MAX_BYTES):
        with pytest.raises(IdentityError, match="asked: is no signing request"):
            read_request(data, "asked")


def test_a_request_whose_name_was_changed_on_the_way_is_refused() -> None:
    read = x509.load_pem_x509_csr(make_request(new_key(), "hospital-3", None))
    der = read.public_bytes(serialization.Encoding.DER).replace(b"hospital-3", b"hospital-1")
    forged = x509.load_der_x509_csr(der).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(IdentityError, match="isn't signed with its own key"):
        read_request(forged, "asked")


def test_a_ca_is_made_once_and_whole(tmp_path: Path) -> None:
    ca.create_authority(tmp_path / "ca", "hospitals")
    before = {file.name: file.read_bytes() for file in (tmp_path / "ca").iterdir()}
    with pytest.raises(IdentityError, match="is there already"):
        ca.create_authority(tmp_path / "ca", "hospitals")
    assert {file.name: file.read_bytes() for file in (tmp_path / "ca").iterdir()} == before
    with pytest.raises(IdentityError, match="federation 'A B'"):
        ca.create_authority(tmp_path / "other", "A B")
    assert [path.name for path in tmp_path.iterdir()] == ["ca"]


def test_members_keep_their_numbers_and_certificates_whatever_happens_to_others(federation: Federation) -> None:
    first = federation.roster(NOW).members
    federation.revoke("hospital-1")
    federation.join("hospital-3", "host:3", now=NOW)
    members = federation.roster(NOW).members
    assert [(member.client, member.name) for member in members] == [
        (0, "hospital-1"),
        (1, "hospital-2"),
        (2, "hospital-3"),
    ]
    assert members[0].certificates == ()
    assert members[1] == first[1]
    federation.join("hospital-1", now=NOW)
    assert [len(member.certificates) for member in federation.roster(NOW).members] == [1, 1, 1]


def test_a_revoked_key_never_gets_in_again(federation: Federation) -> None:
    federation.join("hospital-1", now=NOW)  # two keys
    federation.revoke("hospital-1")
    for key in ("key.pem", "key-2.pem"):
        pem = (federation.folder / "hospital-1" / key).read_bytes()
        loaded = serialization.load_pem_private_key(pem, None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        (federation.folder / "hospital-1" / "hospital-1.request.pem").write_bytes(
            make_request(loaded, "hospital-1", None)
        )
        with pytest.raises(IdentityError, match="hospital-1: its key was revoked"):
            federation.approve("hospital-1", now=NOW)
    with pytest.raises(IdentityError, match="hospital-1: is revoked already"):
        federation.revoke("hospital-1")
    with pytest.raises(IdentityError, match="did you mean hospital-2"):
        federation.revoke("hospitl-2")


def test_two_members_share_neither_key_nor_address(federation: Federation) -> None:
    federation.join("hospital-3", "host:3", now=NOW)
    with pytest.raises(IdentityError, match="two members share the address host:3"):
        federation.join("hospital-4", "host:3", now=NOW)
    pem = (federation.folder / "hospital-1" / "key.pem").read_bytes()
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    (federation.folder / "hospital-4" / "hospital-4.request.pem").write_bytes(make_request(key, "hospital-4", None))
    with pytest.raises(IdentityError, match="hospital-4: its key is hospital-1's"):
        federation.approve("hospital-4", now=NOW)
    federation.revoke("hospital-3")
    federation.join("hospital-5", "host:3", now=NOW)  # an address is free again once its member is gone


@pytest.mark.parametrize("days", [-1, 0, 367])
def test_days_that_no_certificate_should_last_are_refused(federation: Federation, days: int) -> None:
    with pytest.raises(IdentityError, match=f"days {days}: give 1 to 366"):
        federation.approve("hospital-1", days)


def test_no_certificate_outlives_its_ca(federation: Federation) -> None:
    with pytest.raises(IdentityError, match="the CA's own certificate ends on 2036-02-27"):
        federation.approve("hospital-1", 90, NOW + 3600 * DAY)


@pytest.mark.parametrize("file", ["certificate.pem", "members.yaml"])
def test_a_damaged_ca_is_refused(federation: Federation, file: str) -> None:
    path = federation.ca / file
    other = Federation(federation.folder / "other", "hospital-1")
    for data in (b"", b"\xff", b"- [", (other.ca / file).read_bytes()):
        path.write_bytes(data)
        with pytest.raises(IdentityError, match="the CA is damaged") as caught, ca.opened(federation.ca):
            pass
        assert "\n" not in str(caught.value)


def test_two_processes_do_not_change_a_ca_at_once(federation: Federation) -> None:
    with (
        ca.opened(federation.ca),
        pytest.raises(RunError, match="another process is at work on this CA"),
        ca.opened(federation.ca),
    ):
        pass


def test_a_peer_is_who_the_roster_says(federation: Federation) -> None:
    roster = federation.roster(NOW)
    found = federation.identity("hospital-2", roster, NOW)
    assert (found.name, found.client, found.ca) == ("hospital-2", 1, federation.certificate)
    assert found.key == (federation.folder / "hospital-2" / "key.pem").read_bytes()
    assert x509.load_pem_x509_certificate(found.certificate) in roster.members[1].certificates
    assert "PRIVATE" not in repr(found)
    assert load_ca(federation.folder / "hospital-2") == federation.certificate


def test_by_its_own_roster_a_peer_keeps_its_older_certificate_for_as_long_as_handing_out_takes(
    federation: Federation,
) -> None:
    with ca.opened(federation.ca) as before:
        after, renewed = ca.renew(before, "hospital-1", 90, NOW + 80 * DAY)
        ca.keep(federation.ca, after)
    own = federation.own_rosters(GRAPHS["path"](clients=2), {"name": "a path"}, NOW + 80 * DAY)["hospital-1"]
    whole = federation.roster(NOW + 80 * DAY)

    def uses_renewed(roster: Roster, days: int) -> bool:
        used = x509.load_pem_x509_certificate(federation.identity("hospital-1", roster, NOW + days * DAY).certificate)
        return used == renewed

    assert [uses_renewed(own, days) for days in (80, 83, 84, 100)] == [False, False, True, True]
    assert uses_renewed(whole, 80), "others hear of it from each other"


def test_a_renewed_certificate_is_taken_up_with_the_roster_that_lists_it_and_the_old_one_works_until_then(
    federation: Federation,
) -> None:
    old_roster = federation.roster(NOW)
    old = federation.identity("hospital-1", old_roster, NOW)
    request(federation.folder / "hospital-1", "hospital-1", None)
    assert federation.identity("hospital-1", old_roster, NOW) == old
    federation.approve("hospital-1", now=NOW)  # the same second: the later one counts
    assert federation.identity("hospital-1", old_roster, NOW) == old
    new = federation.identity("hospital-1", federation.roster(NOW), NOW)
    assert new.key == (federation.folder / "hospital-1" / "key-2.pem").read_bytes()
    assert (new.name, new.client) == (old.name, old.client)


def test_a_folder_is_of_one_name(federation: Federation) -> None:
    with pytest.raises(IdentityError, match="is hospital-1's; give hospital-9 another --dir"):
        request(federation.folder / "hospital-1", "hospital-9", None)
    assert not (federation.folder / "hospital-1" / "key-2.pem").exists()


def test_a_peer_that_is_nobody_hears_why(federation: Federation) -> None:
    roster, folder = federation.roster(NOW), federation.folder / "hospital-1"

    def why(now: datetime = NOW) -> str:
        with pytest.raises(PeertuneError) as caught:
            load_identity(folder, roster, now)
        return str(caught.value)

    assert "its certificate expired on 2026-05-30; renew it with peertune peer request" in why(NOW + 91 * DAY)
    assert "its certificate begins on 2026-02-28" in why(NOW - 2 * DAY)
    (folder / "key.pem").chmod(0o640)
    assert f"others may read this key; run chmod 600 {folder / 'key.pem'}" in why()
    (folder / "key.pem").chmod(0o600)
    kept = (folder / "key.pem").read_bytes()
    (folder / "key.pem").write_bytes(b"nothing")
    assert "is no key that peertune made" in why()
    (folder / "key.pem").write_bytes(kept)

    certificate = folder / "hospital-1.certificate.pem"
    bundle = certificate.read_bytes()
    certificate.write_bytes(bundle[: bundle.index(b"-----END CERTIFICATE-----\n") + 26])
    assert "must hold a member's certificate and its CA's" in why()
    certificate.unlink()
    assert f"no certificate; put the certificate that the CA returned in {folder}" in why()

    other = Federation(federation.folder / "other", "hospital-1", name="clinics", now=NOW)
    theirs = (other.folder / "hospital-1" / "hospital-1.certificate.pem").read_bytes()
    certificate.write_bytes(theirs)
    assert "its CA is that of clinics, the roster's another, of hospitals" in why()
    (folder / "second.certificate.pem").write_bytes(bundle)
    assert "hospital-1.certificate.pem and second.certificate.pem are of two CAs" in why()
    (folder / "second.certificate.pem").unlink()
    certificate.write_bytes(bundle)
    load_identity(folder, roster, NOW)

    federation.revoke("hospital-1")
    roster = federation.roster(NOW)
    assert "none of its keys is in the roster (serial 2)" in why()
    roster = federation.roster(NOW + 91 * DAY)  # leaves out what has expired
    assert "its certificate expired on 2026-05-30" in why(NOW + 91 * DAY)
    (folder / "key.pem").unlink()
    assert "no key; make one with peertune peer request" in why()


def test_a_certificate_of_another_ca_of_the_same_name_is_not_issued_by_this_one(federation: Federation) -> None:
    other = Federation(federation.folder / "other", "hospital-1", now=NOW)
    theirs = other.roster(NOW).members[0].certificates[0]
    with pytest.raises(IdentityError, match="isn't issued by the federation's CA"):
        check_issued(theirs, federation.certificate)
    with pytest.raises(IdentityError, match="the CA's certificate isn't one"):
        federation_of(theirs)
    assert public_key(theirs) != public_key(federation.certificate)


def test_what_may_sign_is_no_member_s_certificate_whoever_issued_it(federation: Federation) -> None:
    with ca.opened(federation.ca) as authority:
        issuer, key = authority.certificate, authority.key
    name = x509.SubjectAlternativeName([x509.DNSName("hospital-1")])
    for may_sign in (False, True):
        made = (
            x509.CertificateBuilder()
            .subject_name(issuer.subject)
            .issuer_name(issuer.subject)
            .public_key(new_key().public_key())
            .serial_number(1)
            .not_valid_before(NOW)
            .not_valid_after(NOW + DAY)
            .add_extension(name, critical=False)
            .add_extension(x509.BasicConstraints(ca=may_sign, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        if not may_sign:
            assert check_issued(made, issuer) == "hospital-1"
            continue
        with pytest.raises(IdentityError, match="certificate: is no member's; take the one that the CA returned"):
            check_issued(made, issuer)
