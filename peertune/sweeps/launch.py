"""Processes for the runs of a sweep, on this machine; `peertune.sweeps.slurm` has those in SLURM's queue.

A launcher takes the runs that are left and how often the user has asked to stop, starts processes, and looks after them
every now and then: a generator of `Look`. Whether a run is finished, its directory says (`peertune.sweeps.grid`).
"""

import multiprocessing
import multiprocessing.forkserver
import os
import re
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

COMMAND = (sys.executable, "-P", "-m", "peertune")
"""The command line as a process; -P: modules of the folder that one is in don't count."""
WARM = "peertune.assembly.build"
"""Imported once by the process that runs on this machine are forked from: it takes longer than many a short run."""
LOOK_S = 0.2
"""How often processes on this machine are looked at."""


@dataclass(frozen=True)
class Command:
    """One run as a process, or several as one stack; begun, or gone on with where it has begun."""

    words: tuple[str, ...]  # of `peertune run` at its beginning, recipe and overrides; of `sweep` recipe and grid
    folder: Path  # its run directory, or the sweep's
    options: tuple[str, ...] = ()  # of it whenever it starts
    stack: tuple[str, ...] = ()  # the runs of the grid that are one stack, where it is one

    def now(self) -> list[str]:
        """Return the words of the command line to start now."""
        if self.stack:
            names = [word for name in self.stack for word in ("--stacked", name)]
            return ["sweep", *self.options, *self.words, "--out", str(self.folder), *names]
        words = ("--resume",) if self.folder.is_dir() else (*self.words, "--out")
        return ["run", *self.options, *words, str(self.folder)]


class Queued(NamedTuple):
    """An element in SLURM's queue."""

    id: str  # such as 1234_0
    state: str  # SLURM's word, such as PENDING or RUNNING


@dataclass(frozen=True)
class Look:
    """How the tasks stand."""

    # since the last look: the name of a run → the last words on it, which say why if it isn't finished
    ended: Mapping[str, str]
    jobs: Mapping[str, Queued] = field(default_factory=dict)  # what is in the queue, where there is one


Looks = Generator[Look, None, None]


class Launcher(NamedTuple):
    """Where the processes of a sweep are."""

    launch: Callable[[Mapping[str, Command], Callable[[], int]], Looks]
    stacks: int = 0  # for how many processes runs are put together to stacks; 0: each run has its own
    on_cpu: bool = False  # whether those on a CPU are, too


def local(jobs: int, stack: bool | None = None) -> Launcher:
    """Return the launcher of processes on this machine, `jobs` at a time, which share its cores.

    Runs of a small base are put together to stacks (`peertune.sweeps.stacks`): on a GPU, or always if `stack` is true,
    or never if it is false.

    At the first request to stop nothing begins any more and those at work finish their round and keep it; at the
    second they stop at once. What was stopped doesn't count as ended.
    """

    def launch(tasks: Mapping[str, Command], stopping: Callable[[], int]) -> Looks:
        environment = _environment(jobs)
        queue = list(tasks)
        at_work: dict[str, ForkServerProcess] = {}
        told = 0
        with tempfile.TemporaryDirectory() as folder:
            said = {name: Path(folder, str(number)) for number, name in enumerate(tasks)}
            try:
                while at_work or (queue and not stopping()):
                    while queue and len(at_work) < jobs and not stopping():
                        name = queue.pop(0)
                        at_work[name] = _forked(tasks[name].now(), environment, said[name])
                    if stopping() > told:
                        told += 1
                        for process in at_work.values():
                            process.terminate()
                    ended: dict[str, str] = {}
                    for name, process in list(at_work.items()):
                        if process.exitcode is None:
                            continue
                        del at_work[name]
                        if process.exitcode == 0 or not told:
                            messages, silent = said[name].read_bytes(), f"ended with exit code {process.exitcode}"
                            ended |= {run: last_words(messages, silent, run) for run in tasks[name].stack or [name]}
                    yield Look(ended)
                    if at_work:
                        wait([process.sentinel for process in at_work.values()], LOOK_S)
            finally:
                for process in at_work.values():
                    process.terminate()
                    process.join()

    return Launcher(launch, stacks=0 if stack is False else jobs, on_cpu=bool(stack))


def tried(words: list[str]) -> tuple[int, bytes, bytes]:
    """Run the command with these words as a process, and return its exit code, what it answered and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        answered, said = Path(folder, "answered"), Path(folder, "said")
        process = _forked(words, dict(os.environ), said, answered)
        try:
            process.join()
        finally:
            process.terminate()
            process.join()
        assert process.exitcode is not None
        return process.exitcode, answered.read_bytes(), said.read_bytes()


def warm_up(jobs: int) -> None:
    """Start what `jobs` processes at a time will be forked from, which imports for seconds; return at once."""
    _warm_up(_environment(jobs))


def _environment(jobs: int) -> dict[str, str]:
    """Return the environment of processes that share the cores of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ({} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}) | dict(os.environ)


def _warm_up(environment: Mapping[str, str]) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload([WARM])
    before = os.environ.copy()
    os.environ.update(environment, PYTHONSAFEPATH="1")  # for its imports, as -P in `COMMAND`
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for the sweep
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.clear()
        os.environ.update(before)


def _forked(
    words: list[str], environment: dict[str, str], said: Path, answered: Path = Path(os.devnull)
) -> "ForkServerProcess":
    """Return a process that is the command with these words, forked from one that has imported `WARM`."""
    _warm_up(environment)
    for file in (said, answered):
        file.touch()
    forks = multiprocessing.get_context("forkserver")
    process = forks.Process(target=_be, args=(words, environment, said, answered))
    process.start()
    return process


def _be(words: list[str], environment: dict[str, str], said: Path, answered: Path) -> None:
    """Be the command with these words, in a session of its own, which answers and says what it does to files."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in ((1, answered), (2, said)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.argv = ["peertune", *words]
    runpy.run_module("peertune", run_name="__main__")  # as `python -m` in `COMMAND`


_PROGRESS = re.compile(r"peertune: \S+ \S+ INFO ")


def last_words(messages: bytes, silent: str, run: str = "") -> str:
    """Return the last line that a process said, or that what starts it did, or `silent` where neither said anything.

    Of several runs it is the line that begins with the name of this `run`, where there is one. What it logs while all
    goes well counts for nothing.
    """
    lines = [line for line in messages.decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not _PROGRESS.match(line)]
    own = [line for line in lines if not line.startswith(("submitit ", "srun: "))]
    last = [line.removeprefix("peertune: ") for line in own or lines or [silent]]
    mine = [line.removeprefix(f"{run}: ") for line in last if run and line.startswith(f"{run}: ")]
    return (mine or last)[-1]
