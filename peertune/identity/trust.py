"""What a peer has come to trust, so that a CA that was restored from a copy, or another one, can't undo it.

It is `trusted.json` in the peer's folder: the fingerprint of the CA's key; serial and digest of the newest roster that
the peer has used, with the keys in it; and all keys that were revoked while it looked on. A member's key that is left
out of a newer roster, though still valid when that was issued, was revoked: a CA leaves out nothing else of a member.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

from peertune.errors import IdentityError
from peertune.files import write_file
from peertune.identity.certificates import fingerprint_of
from peertune.identity.entries import Member
from peertune.identity.roster import Roster

log = logging.getLogger(__name__)

FILE = "trusted.json"
_SERIAL = "roster.serial"  # where other versions keep the serial alone
_DIGITS = 64  # of a fingerprint


@dataclass(frozen=True)
class Trust:
    """What a peer has come to trust."""

    ca: str = ""  # the fingerprint of its key; "": of none yet
    serial: int = 0  # of the newest roster; 0: of none yet
    digest: str = ""  # of what is signed in it
    keys: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # in it: name → fingerprint → until (ISO 8601)
    revoked: tuple[str, ...] = ()  # fingerprints, sorted


def read_trust(folder: Path) -> Trust:
    """Return what a peer's folder says. Raises IdentityError where it is damaged or can't be read."""
    file = folder / FILE
    try:
        found = json.loads(file.read_bytes())
        keys = {str(name): {str(k): str(until) for k, until in own.items()} for name, own in found["keys"].items()}
        texts = str(found["ca"]), int(found["serial"]), str(found["digest"])
        return Trust(*texts, keys, tuple(map(str, found["revoked"])))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise IdentityError(f"{file}: can't be read ({error.strerror}); let this peer read it") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise IdentityError(
            f"{file}: is damaged; remove it, and start with --ca-fingerprint and the newest roster"
        ) from None
    try:
        return Trust(serial=int((folder / _SERIAL).read_text()))
    except (OSError, ValueError):
        return Trust()


def keep_trust(folder: Path, trust: Trust) -> None:
    """Write it to a peer's folder. Raises RunError where that can't be done."""
    write_file(folder / FILE, json.dumps(asdict(trust)).encode() + b"\n")


def trusted(roster: Roster, trust: Trust) -> tuple[Roster, Trust]:
    """Return a roster without the keys that were revoked, and what is trusted once it is in use.

    Raises IdentityError for a roster of another CA, one that is older, and another of the same serial.
    """
    ca = fingerprint_of(roster.ca)
    if trust.ca not in ("", ca):
        raise IdentityError(
            f"is of the CA with the fingerprint {ca}, and this peer trusts that with {trust.ca}; "
            "take what that one returned, or begin in another --dir"
        )
    if roster.serial < trust.serial:
        raise IdentityError(f"is roster {roster.serial}, and this peer has had {trust.serial}; get a newer one")
    if roster.serial == trust.serial and trust.digest not in ("", roster.digest):
        raise IdentityError(
            f"is another roster {roster.serial} than this peer has had: the CA was restored from a copy, or there are "
            f"two of it; have it issue one with peertune roster --serial-above {roster.serial}"
        )
    listed = {member.name: _keys(member) for member in roster.members}
    gone = {
        key
        for name, keys in trust.keys.items()
        for key, until in keys.items()
        if name in listed and key not in listed[name] and datetime.fromisoformat(until) > roster.issued
    }
    revoked = {*trust.revoked, *gone}
    back = [name for name, keys in listed.items() if not revoked.isdisjoint(keys)]
    if back and roster.serial > trust.serial:
        log.warning(
            "roster %d lists revoked keys, which stay out, of %s: was the CA restored from a copy?",
            roster.serial,
            ", ".join(back),
        )
    if back:
        roster = _without(roster, revoked)
    keys = {name: {key: until for key, until in own.items() if key not in revoked} for name, own in listed.items()}
    return roster, Trust(ca, roster.serial, roster.digest, keys, tuple(sorted(revoked)))


def _keys(member: Member) -> dict[str, str]:
    """Return the keys of a member's certificates, and until when the last of each is valid."""
    by_end = sorted(member.certificates, key=lambda one: one.not_valid_after_utc)
    return {fingerprint_of(one): one.not_valid_after_utc.isoformat() for one in by_end}


def _without(roster: Roster, revoked: set[str]) -> Roster:
    """Return the roster without the certificates of these keys."""
    members = tuple(
        replace(member, certificates=tuple(c for c in member.certificates if fingerprint_of(c) not in revoked))
        for member in roster.members
    )
    return replace(roster, members=members)


def check_ca(roster: Roster, asked: str) -> None:
    """Raise IdentityError where the fingerprint of a roster's CA is not the one that was read out."""
    digits = "".join(asked.lower().replace(":", "").split())
    if len(digits) != _DIGITS or not set(digits) <= set("0123456789abcdef"):
        raise IdentityError(f"--ca-fingerprint {asked!r}: give the {_DIGITS} digits that peertune ca list shows")
    ca = fingerprint_of(roster.ca)
    if digits != ca.replace(" ", ""):
        said = " ".join(digits[place : place + 4] for place in range(0, _DIGITS, 4))
        raise IdentityError(
            f"the CA's fingerprint is {ca}, and --ca-fingerprint says {said}: it is another CA of the name "
            f"{roster.federation}; take the certificate and the roster of the one whose fingerprint was read out"
        )
