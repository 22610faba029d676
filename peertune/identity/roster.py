"""The roster: the members of a federation with their certificates, signed by its CA.

    federation: hospitals
    serial: 4                            # one more than the last one's: the newest counts
    issued: '2026-01-27T10:00:00+00:00'
    peers:
    - client: 0                          # 0, 1, 2 …, in order of approval, for ever
      name: hospital-1
      address: hospital-1.example.org:50051   # null: it can only dial out
      fingerprints:                      # of its keys, to compare by telephone
      - 0f5c 9b1e …
      certificates:                      # none: it was revoked, or they have expired
      - |
        -----BEGIN CERTIFICATE-----
        …
    signature: MEUCIQ…                   # over all bytes above, checked before they are parsed

The certificates in the roster, not the CA, are what peers trust: who isn't in it is nobody.

A member's own roster lists only those whom it may meet on a recipe's graph, and itself: see
`peertune.identity.neighbour_roster`.
"""

import base64
import binascii
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING

import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from peertune.errors import IdentityError
from peertune.identity.certificates import federation_of, holds_at, public_key
from peertune.identity.entries import Loader, Member, checked, dump, entry, from_entry

if TYPE_CHECKING:  # its graph takes half a second to import, and who has no own roster does without
    from peertune.identity.neighbour_roster import KnownGraph

MAX_ROSTER_BYTES = 4 * 2**20

_HEADER = "# The members of a peertune federation, signed by its CA. Any change makes it invalid.\n"
_MARK = b"signature: "
_HEAD_BYTES = 1024  # in which the serial stands
_ASK = "ask the CA for one made with peertune roster"


@dataclass(frozen=True)
class Roster:
    """The members of a federation, as its CA signed them."""

    federation: str
    serial: int  # grows with every roster the CA issues
    members: tuple[Member, ...]  # by client number; all, from 0, or in a member's own roster itself and its neighbours
    issued: datetime
    ca: x509.Certificate = field(repr=False)  # whose signature it bears
    raw: bytes = field(repr=False)  # as read, to pass on
    digest: str  # SHA-256 of what is signed
    own: "KnownGraph | None" = None  # in a member's own roster

    def by_client(self, client: int) -> Member | None:
        """Return the member with that number, or None."""
        return self._seats.get(client)

    def by_certificate(self, certificate: x509.Certificate, now: datetime | None = None) -> Member | None:
        """Return the member with that very certificate, if it is in its validity, or None."""
        if not holds_at(certificate, now or datetime.now(UTC)):
            return None
        return self._holders.get(certificate.fingerprint(hashes.SHA256()))

    @cached_property
    def _seats(self) -> dict[int, Member]:
        return {member.client: member for member in self.members}

    @cached_property
    def _holders(self) -> dict[bytes, Member]:
        return {
            certificate.fingerprint(hashes.SHA256()): member
            for member in self.members
            for certificate in member.certificates
        }


def sign_roster(
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    serial: int,
    members: Sequence[Member],
    now: datetime | None = None,
    own: "KnownGraph | None" = None,
) -> bytes:
    """Return a roster as peers read it, with the certificates that haven't expired.

    Of all members in their order, or with `own` of that member and of whom it may meet. Raises IdentityError where it
    would be too large.
    """
    now = now or datetime.now(UTC)
    kept = [
        Member(m.client, m.name, m.address, tuple(c for c in m.certificates if c.not_valid_after_utc >= now))
        for m in members
    ]
    content = {
        "federation": federation_of(ca),
        "serial": serial,
        "issued": now.isoformat(timespec="seconds"),
        **({} if own is None else {"own": own.entry()}),
        "peers": [entry(member) for member in kept],
    }
    signed = (_HEADER + dump(content)).encode()
    data = signed + _MARK + base64.b64encode(key.sign(signed, ec.ECDSA(hashes.SHA256()))) + b"\n"
    if len(data) > MAX_ROSTER_BYTES:
        if own is None:
            what, mend = f"{len(members):,} members", "use fewer, or give each its own with peertune roster --recipe"
        else:
            what, mend = f"what client {own.known.client} must know of graph {own.known.name}", "choose a sparser graph"
        raise IdentityError(f"roster: {what} takes more than {MAX_ROSTER_BYTES // 2**20} MiB; {mend}")
    return data


def claimed_serial(data: bytes) -> float:
    """Return the serial that a roster claims near its beginning, unchecked and at little cost; infinity for none."""
    found = re.search(rb"^serial: (\d{1,18})\r?$", data[:_HEAD_BYTES], re.MULTILINE)
    return math.inf if found is None else int(found[1])


def load_roster(data: bytes, ca: x509.Certificate) -> Roster:
    """Read a roster. Raises IdentityError for one that this CA didn't sign as it stands, or that contradicts itself."""
    if len(data) > MAX_ROSTER_BYTES:
        raise IdentityError(f"roster: is larger than {MAX_ROSTER_BYTES // 2**20} MiB; {_ASK}")
    lines = data.replace(b"\r\n", b"\n")  # a roster may come by mail
    signed, mark, signature = lines.rpartition(b"\n" + _MARK)
    signed += b"\n"
    key = public_key(ca)
    if not mark:
        raise IdentityError(f"roster: isn't signed; {_ASK}")
    try:
        key.verify(base64.b64decode(signature.strip(), validate=True), signed, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, binascii.Error):
        raise IdentityError(
            f"roster: isn't as the CA of {federation_of(ca)} signed it: altered, or of another CA; {_ASK}"
        ) from None
    try:  # what follows would be a mistake of the CA
        found = yaml.load(signed, Loader)
        more = {"own": dict} if isinstance(found, dict) and "own" in found else {}
        content = checked(found, federation=str, serial=int, issued=str, peers=list, **more)
        if content["federation"] != federation_of(ca) or content["serial"] < 1:
            raise IdentityError("federation or serial is not the CA's")
        issued = datetime.fromisoformat(content["issued"])
        if issued.tzinfo is None:
            raise IdentityError("issued has no time zone")
        members = tuple(from_entry(value, ca) for value in content["peers"])
        own = _own(content["own"]) if "own" in content else None
        check_seats(members, own)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, IdentityError) as error:
        reason = error if isinstance(error, IdentityError) else "it is no YAML, or a time is none"
        raise IdentityError(f"roster: is signed but can't be used: {reason}; {_ASK}") from None
    return Roster(content["federation"], content["serial"], members, issued, ca, data, sha256(signed).hexdigest(), own)


def _own(value: object) -> "KnownGraph":
    from peertune.identity.neighbour_roster import KnownGraph

    return KnownGraph.from_entry(value)


def check_seats(members: Sequence[Member], own: "KnownGraph | None" = None) -> None:
    """Raise IdentityError where two members share a name or an address, or a number is not where it must be.

    All members have the numbers 0, 1, 2 …; those of a member's own roster grow, and its own is among them.
    """
    for what in ("name", "address"):
        counts = Counter(getattr(member, what) for member in members)
        if twice := [value for value, count in counts.items() if value is not None and count > 1]:
            raise IdentityError(f"two members share the {what} {twice[0]}")
    clients = [member.client for member in members]
    if own is None and clients != list(range(len(clients))):
        raise IdentityError("client numbers are not 0, 1, 2 …")
    if own is not None and clients != sorted({own.known.client, *own.known.others} & set(clients)):
        raise IdentityError("client numbers don't grow, or one is no neighbour's")
    if own is not None and own.known.client not in clients:
        raise IdentityError(f"client {own.known.client} is not among them")
