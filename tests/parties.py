"""A federation in a folder, made as its people make it, for the tests of who is who."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from peertune.identity import authority as ca
from peertune.identity.certificates import bundle, read_request
from peertune.identity.keys import Identity, load_identity, request
from peertune.identity.roster import Roster, load_roster
from peertune.topology import Graph


class Federation:
    """The folders of a CA and of its peers, one for each name."""

    def __init__(self, folder: Path, *names: str, name: str = "hospitals", now: datetime | None = None) -> None:
        self.folder, self.ca = folder, folder / "ca"
        ca.create_authority(self.ca, name, now)
        for member in names:
            self.join(member, now=now)

    @property
    def certificate(self) -> x509.Certificate:
        """The CA's own."""
        with ca.opened(self.ca) as authority:
            return authority.certificate

    def join(self, name: str, address: str | None = None, days: int = 90, now: datetime | None = None) -> None:
        """Have a peer ask, the CA approve, and the peer put away what comes back; again to renew."""
        request(self.folder / name, name, address)
        self.approve(name, days, now)

    def approve(self, name: str, days: int = 90, now: datetime | None = None) -> x509.Certificate:
        file = self.folder / name / f"{name}.request.pem"
        with ca.opened(self.ca) as before:
            after, certificate = ca.approve(before, read_request(file.read_bytes(), file), days, now)
            ca.keep(self.ca, after)
        (self.folder / name / f"{name}.certificate.pem").write_bytes(bundle(certificate, self.certificate))
        return certificate

    def revoke(self, name: str) -> None:
        with ca.opened(self.ca) as before:
            ca.keep(self.ca, ca.revoke(before, name))

    def roster(self, now: datetime | None = None) -> Roster:
        with ca.opened(self.ca) as before:
            after, data = ca.issue_roster(before, now)
            ca.keep(self.ca, after)
        return load_roster(data, self.certificate)

    def own_rosters(self, graph: Graph, settings: Mapping[str, Any], now: datetime | None = None) -> dict[str, Roster]:
        """Each member's own roster, by name, on a graph that follows from these settings."""
        with ca.opened(self.ca) as before:
            after, rosters = ca.issue_own_rosters(before, graph, settings, now)
            ca.keep(self.ca, after)
        return {member.name: load_roster(data, self.certificate) for member, data in rosters}

    def identity(self, name: str, roster: Roster, now: datetime | None = None) -> Identity:
        return load_identity(self.folder / name, roster, now)
