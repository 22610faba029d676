"""Which start of a peer speaks: by that a peer that was started again is told from two with one identity.

Each start takes the next number of its peer's folder and draws a nonce; every greeting carries both. The number lies
beside the key, not in the run: who goes back to an older checkpoint starts anew with a higher number, and a copy of the
disk that is started beside the first is found out. A number is never below the time of its start, so that a folder that
is made anew, or put back from a copy, goes on above what others have heard.
"""

import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from peertune.errors import IdentityError
from peertune.files import write_file

FILE = "incarnation"
"""In the peer's folder: the number of its last start."""


@dataclass(frozen=True)
class Incarnation:
    """One start of a peer; number 0 where nothing is said of it."""

    number: int = 0
    nonce: int = 0


def next_incarnation(folder: Path, now: float | None = None) -> Incarnation:
    """Take the next number of a peer's folder, which the disk holds when this returns.

    Raises IdentityError where the last one can't be read, RunError where the next can't be written.
    """
    file = folder / FILE
    try:
        last = int(file.read_text())
    except FileNotFoundError:
        last = 0
    except (OSError, ValueError):
        raise IdentityError(f"{file}: holds no number; remove it, if no other process runs with this key") from None
    number = max(last + 1, int(time.time() if now is None else now))
    write_file(file, f"{number}\n".encode())
    return Incarnation(number, secrets.randbits(63))


def clone(known: Incarnation, said: Incarnation) -> str:
    """Return what proves that two processes speak with one identity, of which `known` was heard before; "" if nothing.

    A higher number replaces a lower one. An end that says nothing of its start is of a version that has none.
    """
    if not said.number or said.number > known.number or said == known:
        return ""
    if said.number == known.number:
        return f"two processes with its key, of one start (number {said.number})"
    return f"two processes with its key: one of start {said.number} speaks after one of start {known.number}"
