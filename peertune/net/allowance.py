"""How often something is done for each member: for lines of the log that it causes, and for calls back that it asks."""

import threading
import time
from collections.abc import Callable

PER_S = 60.0


class Allowance:
    """So many `times` for each member within PER_S, which begin with the first."""

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
