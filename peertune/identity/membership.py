"""Who this peer is and who the others are, as of now: rosters and certificates are taken up while a peer runs."""

import logging
import threading
import time
from pathlib import Path

from peertune.errors import IdentityError, PeertuneError
from peertune.files import write_file
from peertune.identity.keys import Identity, load_ca, load_identity, read_start
from peertune.identity.roster import MAX_ROSTER_BYTES, Roster, claimed_serial, load_roster
from peertune.identity.trust import Trust, check_ca, keep_trust, read_trust, trusted

log = logging.getLogger(__name__)

LOOK_EVERY_S = 60.0  # at certificates, which expire though no file changes


class Membership:
    """A peer's folder and its roster's file, read again when either changes.

    `ca` is the fingerprint that its CA's key must have, where somebody gave it. Who only `looks` comes to trust
    nothing. Raises IdentityError where they can't be used at the start; later what was there before stays in use.
    """

    def __init__(self, folder: Path, roster: Path, ca: str | None = None, *, looks: bool = False) -> None:
        self._folder, self._file = folder, roster
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._problem = ""
        self._looks = looks
        self._trust = read_trust(folder)
        found = self._read()
        if ca is not None:
            check_ca(found, ca)
        found, trust = self._trusted(found)
        self._current = (load_identity(folder, found), found)
        self._keep(trust)

    def current(self) -> tuple[Identity, Roster]:
        """Return who this peer is, and the roster."""
        with self._lock:
            if (stamp := self._stamp()) != self._seen:
                self._seen = stamp
                try:
                    self._take(self._read())
                    self._problem = ""
                except (PeertuneError, OSError) as error:
                    if str(error) != self._problem:
                        log.warning("%s; going on with roster %d", error, self._current[1].serial)
                    self._problem = str(error)
            return self._current

    def adopt(self, raw: bytes) -> bool:
        """Take up a roster that another peer sent, if it is newer; by its own roster a peer takes none.

        Raises IdentityError for one the CA didn't sign, or a member's own.
        """
        identity, roster = self.current()
        if raw == roster.raw or roster.own is not None or claimed_serial(raw) <= roster.serial:
            return False
        found = load_roster(raw, identity.ca)  # not under the lock, since it may take long
        if found.own is not None:
            raise IdentityError(f"it is client {found.own.known.client}'s own")
        with self._lock:
            if found.serial <= self._current[1].serial:
                return False
            self._take(found)
            try:
                write_file(self._file, raw)
            except PeertuneError as error:
                log.warning("%s; roster %d is in use until this peer ends", error, found.serial)
            self._seen = self._stamp()
            return True

    def _take(self, found: Roster) -> None:
        found, trust = self._trusted(found)
        identity = load_identity(self._folder, found)
        if identity.client != self._current[0].client:
            raise IdentityError(f"{self._file}: makes this peer client {identity.client}; start it anew")
        if (new := _graph(found)) != (began := _graph(self._current[1])):
            raise IdentityError(f"{self._file}: is {new}, and this run began with {began}; stop and resume to change")
        if found.serial > self._current[1].serial:
            there = {member.name for member in found.members if member.valid()}
            gone = [m.name for m in self._current[1].members if m.valid() and m.name not in there]
            log.warning("roster %d is in use%s", found.serial, f"; members no more: {', '.join(gone)}" if gone else "")
        self._current = identity, found
        self._keep(trust)

    def _trusted(self, found: Roster) -> tuple[Roster, Trust]:
        try:
            return trusted(found, self._trust)
        except IdentityError as error:
            raise IdentityError(f"{self._file}: {error}") from None

    def _keep(self, trust: Trust) -> None:
        if trust != self._trust and not self._looks:
            try:
                keep_trust(self._folder, trust)
            except PeertuneError as error:
                log.warning("%s: an older roster will not be told from this one", error)
        self._trust = trust

    def _read(self) -> Roster:
        data = read_start(self._file, MAX_ROSTER_BYTES, "give the roster's file")
        return load_roster(data, load_ca(self._folder))

    def _stamp(self) -> tuple[int, ...]:
        return (*map(_changed_at, (self._file, self._folder)), int(time.monotonic() / LOOK_EVERY_S))


def _graph(roster: Roster) -> str:
    """Say for what a roster is: all graphs, or one."""
    if roster.own is None:
        return "the roster of all members"
    return f"an own roster for {dict(roster.own.recipe)} with edges {roster.own.known.digest}"


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
