"""What the commands share."""

import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Annotated, Any

import typer

from peertune.errors import Exit, PeertuneError

log = logging.getLogger(__name__)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's path, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to set, such as graph.activation=0.02 seed=1."),
]


def _allow(modules: list[str] | None) -> None:
    from peertune.assembly import plugins

    plugins.allow(modules or [])


Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="Let the recipe run this module's code, as MODULE:FUNCTION for a name; may be repeated.",
        callback=_allow,
        expose_value=False,
    ),
]
"""An option that does its work as it is read; `peertune.assembly.plugins` has what it said."""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for machines.")]


def leads() -> bool:
    """Return whether this process speaks for the run: it is the only one, or rank 0 of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def messages() -> Iterator[None]:
    """Show on standard error what the program is doing, from the first moment on; with the time where that is a file.

    A command enters this before it imports what takes seconds.
    """
    logger = logging.getLogger("peertune")
    handler = logging.StreamHandler()
    form = "%(message)s" if sys.stderr.isatty() else "%(asctime)s %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(f"peertune: {form}", "%Y-%m-%d %H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if leads() else logging.ERROR)
    logger.info("starting")
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def importing() -> Iterator[None]:
    """Import what takes seconds without looking for garbage: a tenth of the time, since all of it stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print JSON on standard output."""
    print(json.dumps(value, indent=2))


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a termination signal stop a run as Ctrl-C does, with exit code 130."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with told_first():
            yield
    except KeyboardInterrupt:
        if leads():
            print("peertune: stopped before the first round; nothing was kept", file=sys.stderr)
        sys.exit(Exit.STOPPED)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def told_first() -> Iterator[None]:
    """Let an error go on that a signal overtakes: where a process is gone, torchrun soon stops those that say so."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if isinstance(stop.__context__, PeertuneError):
            raise stop.__context__ from None
        raise


TOGETHER_S = 1.0
"""Within this time two SIGTERM are one."""


@contextmanager
def asked_to_stop(answer: str, then: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Collect termination signals, Ctrl-C among them: say `answer` at the first and do `then`; at the second, stop.

    Of several processes none answers, since torchrun stops those that are left of a run in the same way. SIGTERM twice
    within a second is one request: a cluster sends it to all of a job, and what a process runs under passes it on.
    """
    asked: list[int] = []
    last = -TOGETHER_S

    def ask(number: int, *_: object) -> None:
        nonlocal last
        since, last = time.monotonic() - last, time.monotonic()
        if asked and number == signal.SIGTERM == asked[-1] and since < TOGETHER_S:
            return
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        then()
        if "RANK" not in os.environ:
            print(f"peertune: {answer}", file=sys.stderr)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


Show = Callable[[int, str], None]
"""`show(done, words)`: how much of the work is done, and what there is to say of it."""


@contextmanager
def progress(unit: str, total: int, done: int = 0) -> Iterator[Show]:
    """Yield what shows how far the work is: a bar on a terminal, elsewhere a line every now and then."""
    if not (leads() and sys.stderr.isatty()):
        yield lines(unit, total, done)
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn(unit),
        bars.MofNCompleteColumn(),
        bars.BarColumn(bar_width=30),
        bars.TextColumn("{task.description}"),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    # What is printed meanwhile goes above the bar, unless it goes elsewhere.
    with bars.Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda done, words: bar.update(task, completed=done, description=words)


LINE_S = 30.0
"""Seconds between two lines of progress."""


def lines(unit: str, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> Show:
    """Return what logs how far the work is: at once, every `LINE_S`, and at the end."""
    began, first, due, told = clock(), done, -inf, -1

    def show(done: int, words: str) -> None:
        nonlocal due, told
        now = clock()
        if told == done if done >= total else now < due:
            return
        due, told = now + LINE_S, done
        left = (now - began) / (done - first) * (total - done) if first < done < total else None
        said = (f"{unit} {done:,} of {total:,}", words, "" if left is None else f"{duration(left)} left")
        log.info("%s", ", ".join(filter(None, said)))

    return show


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
