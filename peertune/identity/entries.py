"""A member, and its entry in rosters and in the CA's own folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import UnionType
from typing import Any, get_args

import yaml
from cryptography import x509

from peertune.errors import IdentityError, RecipeError
from peertune.identity.certificates import check_address, check_issued, check_name, fingerprint_of, holds_at, pem

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True)
class Member:
    """A seat in the federation."""

    client: int  # its number, for ever
    name: str
    address: str | None  # host:port; None: it can only dial out
    certificates: tuple[x509.Certificate, ...]  # in order of issue; none: revoked, or all have expired

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprints of its keys, each once."""
        return tuple(dict.fromkeys(fingerprint_of(certificate) for certificate in self.certificates))

    def valid(self, now: datetime | None = None) -> tuple[x509.Certificate, ...]:
        """Return the certificates in their validity."""
        now = now or datetime.now(UTC)
        return tuple(certificate for certificate in self.certificates if holds_at(certificate, now))


def need_seats(clients: int, members: Sequence[Member]) -> None:
    """Raise RecipeError where a recipe has no seat for some member."""
    if members and members[-1].client >= clients:
        raise RecipeError(
            f"clients: {clients}, but the roster has {members[-1].client + 1} members; give as many or more"
        )


class _Dumper(_SafeDumper):  # type: ignore[misc]  # of two kinds, as libyaml is there or not
    """Writes certificates line by line."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def dump(content: Mapping[str, Any]) -> str:
    """Return YAML."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)


def entry(member: Member) -> dict[str, Any]:
    """Return a member as YAML has it."""
    return {
        "client": member.client,
        "name": member.name,
        "address": member.address,
        "fingerprints": list(member.fingerprints),
        "certificates": [pem(certificate).decode() for certificate in member.certificates],
    }


def from_entry(value: object, ca: x509.Certificate) -> Member:
    """Read a member. Raises IdentityError for what `entry` would not have made."""
    found = checked(value, client=int, name=str, address=str | None, fingerprints=list, certificates=list)
    name = check_name(found["name"])
    try:
        certificates = tuple(x509.load_pem_x509_certificate(text.encode()) for text in found["certificates"])
    except (ValueError, AttributeError):
        raise IdentityError(f"{name}: a certificate can't be read") from None
    member = Member(found["client"], name, found["address"], certificates)
    if member.address is not None:
        check_address(member.address)
    if any(check_issued(certificate, ca) != name for certificate in certificates):
        raise IdentityError(f"{name}: a certificate is another member's")
    if found["fingerprints"] != list(member.fingerprints):
        raise IdentityError(f"{name}: its fingerprints are not those of its certificates")
    return member


def checked(value: object, /, **kinds: type | UnionType) -> dict[str, Any]:
    """Return a mapping with exactly these keys and types. Raises IdentityError for anything else."""
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise IdentityError(f"there must be exactly {', '.join(kinds)}")
    for key, kind in kinds.items():
        types = get_args(kind) or (kind,)
        if type(value[key]) not in types:  # a subclass, as bool is of int, is another type
            raise IdentityError(f"{key} must be {' or '.join(each.__name__ for each in types)}")
    return value
