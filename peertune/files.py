"""Files and folders that appear whole or not at all: written beside their place and renamed into it."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from peertune.errors import RunError


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn what the file system has against writing `path` into one line for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: can't be written ({reason}); give one you can write to, with room") from error


def check_absent(folder: Path) -> None:
    """Raise RunError where there is something in the place of what is to be written."""
    with reported(folder):
        if folder.exists():
            raise RunError(f"{folder}: is there already; give another folder")


@contextmanager
def written_folder(folder: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a folder to write into, which takes the place of `folder` when all is written, and vanishes otherwise.

    `private`: for its owner alone.
    """
    with reported(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.with_name(f".{folder.name}-{uuid4().hex}")
        beside.mkdir(mode=0o700 if private else 0o777)
        try:
            yield beside
            for path in (*beside.rglob("*"), beside):
                _sync(path)
            if folder.exists():
                folder.rename(beside.with_name(f"{beside.name}-old"))
            beside.rename(folder)
            _sync(folder.parent)
        finally:
            for left in (beside, beside.with_name(f"{beside.name}-old")):
                shutil.rmtree(left, ignore_errors=True)


def write_file(file: Path, data: bytes, *, private: bool = False, lasting: bool = True) -> None:
    """Write a file, whole or not at all; `private`: never readable but by its owner.

    Not `lasting`, a power cut may take it: for what is written every second. Raises RunError where it can't be written.
    """
    beside = file.with_name(f".{file.name}-{os.getpid()}-{threading.get_ident()}")
    with reported(file):
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
            with open(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                if lasting:
                    os.fsync(descriptor)
            os.replace(beside, file)
            if lasting:
                _sync(file.parent)
        finally:
            beside.unlink(missing_ok=True)


def append_line(file: Path, text: str) -> None:
    """Add a line to a file that is there. Raises RunError where it can't be written; then the file is as before."""
    with reported(file):
        before = file.stat().st_size
        try:
            with file.open("a") as lines:
                lines.write(text + "\n")
                lines.flush()
                os.fsync(lines.fileno())
        except OSError:
            os.truncate(file, before)  # what there was room for is no line
            raise


def _sync(path: Path) -> None:
    """Have the disk hold what is written, so that a power cut leaves whole files or none."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes from working on the same folder. Raises RunError where one does already."""
    lock = FileLock(folder / ".lock", timeout=0.2)  # so long, for one that only looks (`is_locked`)
    with reported(folder):
        try:
            lock.acquire()
        except Timeout:  # an OSError, too
            raise RunError(f"{folder}: another process is at work on this {what}; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return whether a process is at work on a folder (see `locked`); one that can't be looked into counts as idle."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except OSError as error:
        return isinstance(error, Timeout)  # which is one, too
