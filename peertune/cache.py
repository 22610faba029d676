"""What is kept between runs: arrays, by a digest of all that they follow from, in the user's cache folder.

An entry is a file of its own, which appears whole or not at all, so runs may share the folder. What is lost from it, or
damaged, is made anew. It holds `MAX_BYTES` at most; what was used least recently goes first.
"""

import logging
import os
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from peertune.errors import RunError
from peertune.files import write_file

log = logging.getLogger(__name__)

VARIABLE = "PEERTUNE_CACHE"
"""The environment's name for the folder; empty, nothing is kept."""
MAX_BYTES = 2**30
_DIGEST_BYTES = 32
_SUFFIX = ".safetensors"
_A_DAY_S = 86_400

Arrays = Mapping[str, NDArray[Any]]


class Entry(NamedTuple):
    """A file of the cache."""

    file: Path
    size_bytes: int
    used_at: float  # seconds since the epoch


def folder() -> Path | None:
    """Return the cache's folder, which need not be there; None where nothing is to be kept."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peertune"


def entries() -> list[Entry]:
    """Return what the cache holds, what was used last first."""
    found = []
    for file in (folder() or Path(os.devnull)).glob(f"*{_SUFFIX}"):
        try:
            status = file.stat()
        except FileNotFoundError:  # another process took it out
            continue
        found.append(Entry(file, status.st_size, status.st_mtime))
    return sorted(found, key=lambda entry: -entry.used_at)


def clear() -> list[Entry]:
    """Take everything out of the cache; return what it held."""
    held = entries()
    for entry in held:
        entry.file.unlink(missing_ok=True)
    _sweep(older_s=0)
    return held


def read(name: str) -> Arrays | None:
    """Return the entry of this name; None where there is none, or it is damaged, which is told."""
    place = folder()
    if place is None or not _is_own(place):
        return None
    file = place / (name + _SUFFIX)
    try:
        data = file.read_bytes() if file.stat().st_size <= MAX_BYTES else b""
        os.utime(file)
    except OSError:
        return None
    digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    try:
        if sha256(body).digest() == digest:
            return dict(load(body))
    except SafetensorError:
        pass
    log.warning("%s: is damaged, and made anew", file)
    return None


def write(name: str, arrays: Arrays) -> None:
    """Keep arrays under a name; where that can't be, it is told."""
    place, body = folder(), save(dict(arrays))
    if place is None or len(body) + _DIGEST_BYTES > MAX_BYTES:
        return
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_own(place):
            write_file(place / (name + _SUFFIX), sha256(body).digest() + body, private=True, lasting=False)
            _shrink()
    except (OSError, RunError) as error:
        log.warning("%s: nothing is kept there (%s); %s= keeps nothing", place, error, VARIABLE)


def _is_own(place: Path) -> bool:
    """Whether nobody else can put anything into this folder; told where somebody can."""
    try:
        status = place.stat()
    except OSError:
        return False
    own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    if not own:
        log.warning("%s: others may write there, so it is not used; give it to you alone, with chmod 700", place)
    return own


def _shrink() -> None:
    """Take out what was used least recently, until the rest is small enough, and what a killed process left."""
    room = MAX_BYTES
    for entry in entries():
        room -= entry.size_bytes
        if room < 0:
            entry.file.unlink(missing_ok=True)
    _sweep(older_s=_A_DAY_S)


def _sweep(older_s: float) -> None:
    """Take out files that were begun so long ago and never finished."""
    for file in (folder() or Path(os.devnull)).glob(f".*{_SUFFIX}-*"):
        try:
            if time.time() - file.stat().st_mtime >= older_s:
                file.unlink(missing_ok=True)
        except FileNotFoundError:
            continue
