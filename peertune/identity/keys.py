"""A peer's own folder: the keys that never leave it, and what the CA made of them.

    peer/key.pem  key-2.pem …          a key for each request; those of older certificates keep working
    peer/NAME.request.pem              what the CA is asked for, of the newest key
    peer/NAME.certificate.pem          what the CA returned: the peer's certificate, followed by the CA's own

The CA's certificate in there is what rosters are checked with. Which key is in use follows from the roster: the one of
the newest certificate that it lists, so that a renewed certificate is taken up when everybody has heard of it. A
peer's own roster nobody else hears of: by that the older certificate stays in use until HANDING_OUT before its end.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from peertune.errors import IdentityError
from peertune.files import reported, write_file
from peertune.identity.certificates import (
    MAX_BYTES,
    federation_of,
    fingerprint,
    fingerprint_of,
    holds_at,
    key_pem,
    make_request,
    new_key,
    pem,
    read_bundle,
    read_key,
)
from peertune.identity.entries import Member
from peertune.identity.roster import Roster

HANDING_OUT = timedelta(days=7)  # own rosters, after certificates were renewed


@dataclass(frozen=True)
class Identity:
    """Who this peer is, with what it proves it by."""

    name: str
    client: int
    address: str | None  # host:port at which others reach it; None: it can only dial out
    key: bytes = field(repr=False)  # PEM
    certificate: bytes = field(repr=False)  # PEM
    ca: x509.Certificate = field(repr=False)


@dataclass(frozen=True)
class Asked:
    """A signing request that was made."""

    file: Path  # to send to the CA
    fingerprint: str  # of the key, to compare by telephone
    renews: bool  # the folder had a key before


def request(folder: Path, name: str, address: str | None) -> Asked:
    """Make a key and a signing request for it in a folder; older keys in there stay.

    Raises IdentityError for a name or an address that can't be, or a folder of another name's; RunError where it can't
    be written.
    """
    key = new_key()
    asked = make_request(key, name, address)
    with reported(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        other = next((file for file in folder.glob("*.request.pem") if file.name != f"{name}.request.pem"), None)
        keys = key_files(folder)
    if other is not None:
        raise IdentityError(f"{folder}: is {other.name.removesuffix('.request.pem')}'s; give {name} another --dir")
    number = 1 + max((_number(file) for file in keys), default=0)
    write_file(folder / ("key.pem" if number == 1 else f"key-{number}.pem"), key_pem(key), private=True)
    file = folder / f"{name}.request.pem"
    write_file(file, asked)
    return Asked(file, fingerprint(key.public_key()), renews=bool(keys))


def key_files(folder: Path) -> list[Path]:
    """Return the files of a peer's keys."""
    return [file for file in (folder / "key.pem", *folder.glob("key-*.pem")) if _number(file) and file.exists()]


def _number(file: Path) -> int:
    """Return a key's place among those of its folder, or 0 for another file."""
    digits = "1" if file.stem == "key" else file.stem.removeprefix("key-")
    return int(digits) if digits.isdecimal() else 0


def read_start(file: Path, most: int, mend: str) -> bytes:
    """Return the contents of a file, of a larger one `most + 1` bytes. Raises IdentityError where it can't be read."""
    try:
        with file.open("rb") as stream:
            return stream.read(most + 1)
    except OSError as error:
        raise IdentityError(f"{file}: can't be read ({error.strerror}); {mend}") from None


def read_small(file: Path) -> bytes:
    """Return the contents of a small file. Raises IdentityError where it can't be read or isn't small."""
    data = read_start(file, MAX_BYTES, "give one that you can read")
    if len(data) > MAX_BYTES:
        raise IdentityError(f"{file}: is larger than {MAX_BYTES // 2**10} KiB, which no key or certificate is")
    return data


def load_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key of a file. Raises IdentityError where it holds none, or others than its owner may read it."""
    if file.exists() and file.stat().st_mode & 0o077:
        raise IdentityError(f"{file}: others may read this key; run chmod 600 {file}")
    return read_key(read_small(file), file)


def load_keys(folder: Path) -> dict[Path, ec.EllipticCurvePrivateKey]:
    """Return a peer's keys by their files. Raises IdentityError where there is none, or one that can't be used."""
    if not (files := key_files(folder)):
        raise IdentityError(f"{folder}: no key; make one with peertune peer request --dir {folder}")
    return {file: load_key(file) for file in files}


def load_ca(folder: Path) -> x509.Certificate:
    """Return the certificate of the CA that a peer trusts: the one in what the CA returned to it.

    Raises IdentityError where nothing of the CA's is there, or files of two CAs are.
    """
    return _bundles(folder)[0][1]


def _bundles(folder: Path) -> list[tuple[x509.Certificate, x509.Certificate]]:
    """Return each certificate in a peer's folder with its CA's; there is at least one, all of one CA."""
    files = sorted(folder.glob("*.certificate.pem"))
    if not files:
        raise IdentityError(f"{folder}: no certificate; put the certificate that the CA returned in {folder}")
    found = [read_bundle(read_small(file), file) for file in files]
    for file, (_, ca) in zip(files, found, strict=True):
        if ca != found[0][1]:
            raise IdentityError(f"{folder}: {files[0].name} and {file.name} are of two CAs; leave those of one")
    return found


def load_identity(folder: Path, roster: Roster, now: datetime | None = None) -> Identity:
    """Return who a peer is: of the certificates for its keys that the roster lists, the newest in its validity.

    By its own roster, the oldest that is valid for HANDING_OUT yet: neighbours are handed theirs one after the other,
    and know the newer certificate by then. Raises IdentityError where there is no key or none that only its owner can
    read, nothing that the CA returned, a roster of another CA or another member's own, or no such certificate in it.
    """
    now = now or datetime.now(UTC)
    keys = {fingerprint(key.public_key()): key for key in load_keys(folder).values()}
    bundles = _bundles(folder)
    ca = bundles[0][1]
    if ca != roster.ca:
        raise IdentityError(
            f"{folder}: its CA is that of {federation_of(ca)}, the roster's another, of {roster.federation}; "
            f"put the certificate that the roster's CA returned in {folder}"
        )
    listed = [
        (certificate, member)
        for member in roster.members
        for certificate in member.certificates
        if fingerprint_of(certificate) in keys
    ]
    ours = sorted((found for found in listed if holds_at(found[0], now)), key=_age)
    if not ours:
        returned = [own for own, _ in bundles if fingerprint_of(own) in keys]
        raise IdentityError(f"{folder}: {_why_not([own for own, _ in listed] or returned, roster, now)}")
    lasting = [] if roster.own is None else [one for one in ours if one[0].not_valid_after_utc - now >= HANDING_OUT]
    certificate, member = lasting[0] if lasting else ours[-1]
    if roster.own is not None and (other := roster.own.known.client) != member.client:
        who = f"{member.name}, client {member.client}"
        raise IdentityError(f"{folder}: is {who}, and the roster is client {other}'s own; give this peer's")
    key = keys[fingerprint_of(certificate)]
    return Identity(member.name, member.client, member.address, key_pem(key), pem(certificate), ca)


def _age(found: tuple[x509.Certificate, Member]) -> tuple[datetime, datetime]:
    return found[0].not_valid_before_utc, found[0].not_valid_after_utc


def _why_not(certificates: list[x509.Certificate], roster: Roster, now: datetime) -> str:
    """Say why none of a peer's certificates counts, from those in the roster or else those in its folder."""
    if any(holds_at(certificate, now) for certificate in certificates) or not certificates:
        return (
            f"none of its keys is in the roster (serial {roster.serial}); get a newer one, or have the CA approve you"
        )
    last = max(certificate.not_valid_after_utc for certificate in certificates)
    if last < now:
        return f"its certificate expired on {last:%Y-%m-%d}; renew it with peertune peer request"
    first = min(certificate.not_valid_before_utc for certificate in certificates)
    return f"its certificate begins on {first:%Y-%m-%d}; set this machine's clock"
