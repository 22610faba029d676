"""Who this peer is and who the others are, as of now: rosters and certificates are taken up while a peer runs."""

import logging
import threading
import time
from pathlib import Path

from peertune.errors import IdentityError, PeertuneError
from peertune.files import write_file
from peertune.net.identity import Identity, load_ca, load_identity
from peertune.net.roster import MAX_ROSTER_BYTES, Roster, load_roster

log = logging.getLogger(__name__)

LOOK_EVERY_S = 60.0  # at certificates, which expire though no file changes


class Membership:
    """A peer's folder and its roster's file, read again when either changes.

    Raises IdentityError where they can't be used at the start; later what was there before stays in use.
    """

    def __init__(self, folder: Path, roster: Path) -> None:
        self._folder, self._file = folder, roster
        self._lock = threading.Lock()
        self._seen = self._stamp()
        found = self._read()
        self._current = (load_identity(folder, found), found)

    def current(self) -> tuple[Identity, Roster]:
        """Return who this peer is, and the roster."""
        with self._lock:
            if (stamp := self._stamp()) != self._seen:
                self._seen = stamp
                try:
                    self._take(self._read())
                except PeertuneError as error:
                    log.warning("%s; going on with roster %d", error, self._current[1].serial)
            return self._current

    def adopt(self, raw: bytes) -> bool:
        """Take up a roster that another peer sent, if it is newer. Raises IdentityError for one the CA didn't sign."""
        with self._lock:
            found = load_roster(raw, self._current[0].ca)
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
        if found.serial < self._current[1].serial:
            raise IdentityError(f"{self._file}: is roster {found.serial}, older than the one in use")
        identity = load_identity(self._folder, found)
        if identity.client != self._current[0].client:
            raise IdentityError(f"{self._file}: makes this peer client {identity.client}; start it anew")
        self._current = identity, found

    def _read(self) -> Roster:
        try:
            with self._file.open("rb") as file:
                data = file.read(MAX_ROSTER_BYTES + 1)
        except OSError as error:
            raise IdentityError(f"{self._file}: can't be read ({error.strerror}); give the roster's file") from None
        return load_roster(data, load_ca(self._folder))

    def _stamp(self) -> tuple[int, ...]:
        times = [path.stat().st_mtime_ns if path.exists() else 0 for path in (self._file, self._folder)]
        return (*times, int(time.monotonic() / LOOK_EVERY_S))
