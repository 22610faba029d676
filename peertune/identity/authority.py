"""The federation's CA: who is a member. It lives in a folder on a machine that need not be on a network.

ca/key.pem           signs certificates and rosters; it stays there
ca/certificate.pem   its own certificate of that key
ca/members.yaml      every member with all its certificates, the keys that were revoked, the last roster's serial
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from peertune.errors import IdentityError, unknown
from peertune.files import locked, reported, write_file, written_folder
from peertune.identity.certificates import (
    Request,
    federation_of,
    fingerprint,
    issue,
    issue_ca,
    key_pem,
    new_key,
    pem,
    public_key,
)
from peertune.identity.entries import Loader, Member, checked, dump, entry, from_entry
from peertune.identity.keys import load_key
from peertune.identity.roster import check_seats, sign_roster

if TYPE_CHECKING:  # it takes half a second to import, and only members' own rosters need it
    from peertune.topology import Graph


@dataclass(frozen=True)
class Authority:
    """A CA and those it made members."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate
    serial: int  # of the last roster; 0: none yet
    members: tuple[Member, ...]  # client k is at place k, revoked ones too
    revoked: tuple[str, ...]  # fingerprints of keys that never get in again

    @property
    def federation(self) -> str:
        """The federation's name."""
        return federation_of(self.certificate)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of its key, by which its members know it from another of the same name."""
        return fingerprint(self.key.public_key())

    def by_name(self, name: str) -> Member | None:
        """Return the member of that name, or None."""
        return next((member for member in self.members if member.name == name), None)


def create_authority(folder: Path, federation: str, now: datetime | None = None) -> Authority:
    """Make a CA in a folder. Raises IdentityError for a folder that isn't empty, RunError where it can't be written."""
    with reported(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise IdentityError(f"{folder}: is there already; give another --dir")
    key = new_key()
    made = Authority(key, issue_ca(key, federation, now), 0, (), ())
    with written_folder(folder, private=True) as beside:
        write_file(beside / "key.pem", key_pem(key), private=True)
        write_file(beside / "certificate.pem", pem(made.certificate))
        keep(beside, made)
    return made


@contextmanager
def opened(folder: Path) -> Iterator[Authority]:
    """Yield the CA of a folder, and keep other processes out of it.

    Raises IdentityError where there is none or it is damaged, RunError where another process is at work on it.
    """
    if not (folder / "key.pem").exists():
        raise IdentityError(f"{folder}: no CA; make one with peertune ca init, or give its --dir")
    with locked(folder, "CA"):
        key = load_key(folder / "key.pem")
        try:
            certificate = x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())
            federation_of(certificate)
            if public_key(certificate) != key.public_key():
                raise IdentityError("certificate.pem is of another key")
            found = yaml.load((folder / "members.yaml").read_bytes(), Loader)
            content = checked(found, serial=int, peers=list, revoked=list)
            members = tuple(from_entry(value, certificate) for value in content["peers"])
            check_seats(members)
        except (OSError, ValueError, yaml.YAMLError, IdentityError) as error:
            reason = " ".join(str(error).split())
            raise IdentityError(f"{folder}: the CA is damaged ({reason}); restore it from a copy") from None
        yield Authority(key, certificate, content["serial"], members, tuple(content["revoked"]))


def keep(folder: Path, authority: Authority) -> None:
    """Write what changes about a CA. Raises RunError where it can't be written."""
    content = {
        "serial": authority.serial,
        "peers": [entry(member) for member in authority.members],
        "revoked": list(authority.revoked),
    }
    write_file(folder / "members.yaml", dump(content).encode())


def approve(
    authority: Authority, request: Request, days: int, now: datetime | None = None
) -> tuple[Authority, x509.Certificate]:
    """Return the CA with the requester as a member, and its new certificate; its older ones stay valid.

    Raises IdentityError for a key that was revoked or is another member's, an address that is another member's, or days
    that can't be.
    """
    key = fingerprint(request.key)
    if key in authority.revoked:
        raise IdentityError(f"{request.name}: its key was revoked; have it make a new request, with a new key")
    if other := next((m.name for m in authority.members if m.name != request.name and key in m.fingerprints), None):
        raise IdentityError(f"{request.name}: its key is {other}'s; have it make a new request in another --dir")
    certificate = issue(authority.key, authority.certificate, request, days, now)
    old = authority.by_name(request.name) or Member(len(authority.members), request.name, None, ())
    new = replace(old, address=request.address, certificates=(*old.certificates, certificate))
    members = (*authority.members[: new.client], new, *authority.members[new.client + 1 :])
    check_seats(members)
    return replace(authority, members=members), certificate


def renew(
    authority: Authority, name: str, days: int, now: datetime | None = None
) -> tuple[Authority, x509.Certificate]:
    """Return the CA with a further certificate for a member's newest key, and that certificate.

    The member takes it up with the next roster and need do nothing. Raises IdentityError for who isn't a member, or was
    revoked.
    """
    member = _present(authority, name)
    return approve(authority, Request(name, member.address, public_key(member.certificates[-1])), days, now)


def revoke(authority: Authority, name: str) -> Authority:
    """Return the CA with none of a member's certificates; it keeps its number, and its keys never get in again.

    Raises IdentityError for who isn't a member, or was revoked before.
    """
    member = _present(authority, name)
    gone = replace(member, address=None, certificates=())
    members = tuple(gone if other is member else other for other in authority.members)
    return replace(authority, members=members, revoked=(*authority.revoked, *member.fingerprints))


def _present(authority: Authority, name: str) -> Member:
    member = authority.by_name(name)
    if member is None:
        raise IdentityError(unknown("member", name, (member.name for member in authority.members)))
    if not member.certificates:
        raise IdentityError(f"{name}: is revoked already; issue a roster to make it known")
    return member


def issue_roster(authority: Authority, now: datetime | None = None, above: int = 0) -> tuple[Authority, bytes]:
    """Return the CA with the next serial, `above` another one, and the roster of that serial."""
    new = replace(authority, serial=max(authority.serial, above) + 1)
    return new, sign_roster(new.key, new.certificate, new.serial, new.members, now)


def issue_own_rosters(
    authority: Authority, graph: "Graph", settings: Mapping[str, Any], now: datetime | None = None, above: int = 0
) -> tuple[Authority, Iterator[tuple[Member, bytes]]]:
    """Return the CA with the next serial, `above` another one, and of that serial each member with its own roster.

    For members with a certificate, on this graph, which follows from these `settings`. Raises GraphError where any two
    clients may meet; and IdentityError, when it comes to it, for a member whose roster would be too large.
    """
    from peertune.identity.neighbour_roster import KnownGraph
    from peertune.topology import neighbourhoods, summary

    new = replace(authority, serial=max(authority.serial, above) + 1)
    facts = summary(graph)
    known = neighbourhoods(graph, [member.client for member in new.members if member.certificates], facts)

    def sign() -> Iterator[tuple[Member, bytes]]:
        for own in known:
            seats = sorted([own.client, *own.others])
            listed = [new.members[client] for client in seats if client < len(new.members)]
            roster = sign_roster(new.key, new.certificate, new.serial, listed, now, KnownGraph(settings, own))
            yield new.members[own.client], roster

    return new, sign()
