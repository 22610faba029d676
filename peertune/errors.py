"""What can be wrong with what a user gave us.

PeertuneError
├── RecipeError    a recipe, an override or an argument of a named part
├── GraphError     a graph that can't be made or can't connect its clients
├── DataError      a task's data or a partition of it
├── ModelError     a base model, its sites or an adapter
│   └── DivergedError  training came to numbers that it can't go on from
├── RunError       a run directory, a checkpoint, an export or another file
├── IdentityError  a name, a key, a certificate or a roster
└── WireError      what another peer sent

Each message is one line: where it is, what is wrong, what would be right. The command line prints it and exits with
`Exit.INPUT`.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class Exit(IntEnum):
    """How a command ends, as its exit code; 3 to 5 are of peers alone, whose run is kept whole."""

    DONE = 0
    FAULT = 1  # of the program, or a check of `peer doctor` that failed
    INPUT = 2  # a mistake in what the user gave, or a machine without room for it
    CUT_SHORT = 3  # of the rounds in which a peer was up it made too few
    ALONE = 4  # no edge of a peer ever counted
    REFUSED = 5  # those whom a peer should meet refuse it
    STOPPED = 130  # by a signal; as shells have it for Ctrl-C


class PeertuneError(Exception):
    """A mistake in the input; the message is one line for the user."""


class RecipeError(PeertuneError):
    """A recipe, an override or an argument of a named part is wrong."""


class GraphError(PeertuneError):
    """A graph can't be made as asked, or can never connect its clients."""


class DataError(PeertuneError):
    """A task's data is missing or malformed, or can't be partitioned as asked."""


class ModelError(PeertuneError):
    """A base model can't be loaded, or its layers can't carry the adapters."""


class DivergedError(ModelError):
    """A loss or an adapter is no longer finite, or a loss is far above all before."""


class RunError(PeertuneError):
    """A run directory, a checkpoint, an export or another file can't be read or written."""


class IdentityError(PeertuneError):
    """A name, a key, a certificate or a roster is missing, wrong or not to be trusted."""


class WireError(PeertuneError):
    """What another peer sent is not what both ends expect; it costs the edge, not the run."""


class Stopped(KeyboardInterrupt):
    """A run was stopped after so many `rounds`, which its `folder` keeps."""

    def __init__(self, folder: Path, rounds: int) -> None:
        super().__init__(f"stopped after {rounds} rounds; go on with peertune.resume({str(folder)!r})")
        self.folder, self.rounds = folder, rounds


def tried(make: Callable[[], T]) -> T | Exception:
    """Return what is made, or why it can't be, where one of several that fails is to stop no other."""
    try:
        return make()
    except Exception as error:
        return error


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Say that `name` is not among `known`, with the nearest match, or all of them where none is near."""
    choices = sorted(known)
    near = get_close_matches(str(name), choices, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
    return f"{what}: unknown name {str(name)!r}, {hint}"
