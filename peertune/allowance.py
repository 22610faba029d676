"""How often something is done for each client: for lines of the log that it causes, and for calls back that it asks."""

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

PER_S = 60.0
LINES = 6  # of the log that a client may cause in PER_S
LINE = 300  # characters of such a line


class Allowance:
    """So many `times` for each client within PER_S, which begin with the first."""

    def __init__(self, times: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._times, self._clock = times, clock
        self._lock = threading.Lock()
        self._taken: dict[int, tuple[float, int]] = {}  # client → when its time began, and how often since

    def take(self, client: int) -> int:
        """Do it once more: return how often it may still be done, this time included; 0: it may not."""
        now = self._clock()
        with self._lock:
            began, taken = self._taken.get(client, (now, 0))
            if now - began >= PER_S:
                began, taken = now, 0
            self._taken[client] = began, taken + 1
            return max(0, self._times - taken)


class Lines:
    """What is logged of clients: whole lines of at most LINE characters, and LINES of them within PER_S for each.

    `name(client)` is what a client is called in them.
    """

    def __init__(self, name: Callable[[int], str] = "client {}".format) -> None:
        self.name = name
        self._allowed = Allowance(LINES)

    def say(self, client: int, text: str, level: int = logging.WARNING) -> None:
        """Log what a client caused."""
        if log.isEnabledFor(level) and (left := self._allowed.take(client)):
            more = "; more of it is left out for a minute" if left == 1 else ""
            log.log(level, "%s%s", one_line(f"{self.name(client)}: {text}", LINE - len(more)), more)


def one_line(text: str, longest: int = 200) -> str:
    """Return what another says as one short printable line."""
    return "".join(c if c.isprintable() else " " for c in text[:longest])
