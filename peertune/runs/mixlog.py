"""What a peer that waits for nobody has mixed when: `mixed.jsonl`, of which no line is ever taken back.

A line for each start of the peer, `{"start": number, "round": where it goes on}`, and one for each training after which
it opened its mailbox: `{"round", "degree", "heard", "mixed": [{"client", "start", "version", "degree", "staleness"}],
"at"}`. It is written before anything that depends on it is sent. So whatever others have of a start that was killed is
in the log, and `peertune replay` can make it again.
"""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from peertune.errors import RunError
from peertune.files import append_line, reported, write_file
from peertune.rounds.posts import Post, Taken
from peertune.types import Tensors

log = logging.getLogger(__name__)

FILE = "mixed.jsonl"
MESSAGES = "messages"


class Line(NamedTuple):
    """What a peer mixed after a training."""

    degree: int  # to how many it sent what it had trained
    heard: int  # messages that its mailbox held
    taken: list[Taken]  # those of them that it mixed


@dataclass(frozen=True)
class Start:
    """One start of a peer: where it went on, and what it mixed after each training from there."""

    number: int
    round: int
    lines: list[Line] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The training after the last one that it mixed."""
        return self.round + len(self.lines)


class MixLog:
    """Writes the log. A line that can't be written is warned of once, and waits until lines can be written again."""

    def __init__(self, run: Path, *, keeps_messages: bool = False) -> None:
        self._run, self._keeps_messages = run, keeps_messages
        self._waiting: deque[Callable[[], None]] = deque()
        self._failing = False

    def begin(self, number: int, round: int) -> None:
        """Note that a start of the peer goes on in this round. Raises RunError where that can't be written."""
        file = self._run / FILE
        with reported(file):
            file.touch()
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # a line that was cut off is none
        append_line(file, json.dumps({"start": number, "round": round}))

    def add(self, round: int, degree: int, heard: int, came: Sequence[tuple[Taken, Tensors]]) -> None:
        """Note what is mixed after a training, and keep the messages themselves where that was asked for."""
        mixed = [taken.post._asdict() | {"staleness": taken.staleness} for taken, _ in came]
        if self._keeps_messages:
            self._waiting += (partial(_keep, self._run, taken.post, tensors) for taken, tensors in came)
        line = {"round": round, "degree": degree, "heard": heard, "mixed": mixed, "at": time.time()}
        self._waiting.append(partial(append_line, self._run / FILE, json.dumps(line)))
        try:
            while self._waiting:
                self._waiting[0]()
                self._waiting.popleft()
            self._failing = False
        except RunError as error:
            if not self._failing:
                log.warning("%s; the run goes on, and can't be replayed if it is stopped before there is room", error)
            self._failing = True


def read(run: Path) -> list[Start]:
    """Return a peer's starts, in their order. A last line that was cut off is none.

    Raises RunError where the file isn't there, or a line is damaged or out of order: what follows can't be replayed.
    """
    try:
        lines = (run / FILE).read_text(errors="replace").splitlines()
    except OSError:
        raise RunError(f"{run}: has no readable {FILE}; give the run of a peer with time.mode=asynchronous") from None
    starts: list[Start] = []
    for number, text in enumerate(lines, start=1):
        try:
            _read(json.loads(text), starts)
        except (ValueError, TypeError, KeyError, IndexError):
            if number < len(lines):
                raise RunError(f"{run}/{FILE}: line {number} is damaged or out of order; restore the file") from None
    return starts


def _read(said: Any, starts: list[Start]) -> None:
    if "start" in said:
        starts.append(Start(int(said["start"]), int(said["round"])))
        return
    if int(said["round"]) != starts[-1].end:
        raise ValueError("a training is missing")
    taken = [
        Taken(Post(*(int(one[name]) for name in Post._fields)), int(one["staleness"])) for one in list(said["mixed"])
    ]
    line = Line(int(said["degree"]), int(said["heard"]), taken)
    numbers = [line.degree, line.heard, *(number for post, staleness in taken for number in (*post, staleness))]
    if min(numbers) < 0 or not len({post.client for post, _ in taken}) == len(taken) <= line.heard:
        raise ValueError("it can't have been so")
    starts[-1].lines.append(line)


def _keep(run: Path, post: Post, tensors: Tensors) -> None:
    file = _file(run, post)
    with reported(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, save({name: x.cpu().contiguous() for name, x in tensors.items()}))


def kept(run: Path, post: Post) -> Tensors:
    """Return a message that was kept, `[1, …]`. Raises RunError where it isn't there."""
    file = _file(run, post)
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        raise RunError(f"{file}: is missing or damaged; it was kept if peer start had --keep-messages") from None


def _file(run: Path, post: Post) -> Path:
    return run / MESSAGES / f"client-{post.client:03d}" / f"start-{post.start}-round-{post.version:06d}.safetensors"
