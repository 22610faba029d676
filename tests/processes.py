"""The command line as real processes, for the tests that stop and kill them.

They are forked from a process that has imported what takes seconds, as a shell's commands would all begin with.
"""

import atexit
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants

# A shell may have told its background jobs to ignore SIGINT; a job in the foreground gets it.
PROCESS = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from peertune.cli import main; main()"
)


AT_MOST_S = 900.0
"""How long is waited for what has to happen: no test ends sooner since a machine is slow, or has other work."""


def forking() -> Any:
    """Return what makes processes, forked from one that is warm."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where it finds `warm`
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["warm"])
    multiprocessing.forkserver.ensure_running()
    return forks


class Command:
    """`peertune` with some words as a process of its own; what it says goes to files."""

    def __init__(self, folder: Path, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it in this folder."""
        self._said = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115  # kept as long as this is
        files = [said.name for said in self._said]
        arguments = (folder, list(words), dict(environment), files)
        self._process = forking().Process(target=_run, args=arguments)
        self._process.start()
        atexit.register(self.kill)
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.poll() is None:
            self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return its exit code."""
        self._process.join(timeout)
        code = self.returncode
        if code is None:
            raise subprocess.TimeoutExpired("peertune", timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, and return what it said on both streams."""
        self.wait(timeout)
        out, err = (Path(said.name).read_text() for said in self._said)
        return out, err


def _run(folder: Path, words: list[str], environment: dict[str, str], files: list[str]) -> None:
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(folder)
    sys.argv = ["peertune", *words]
    importlib.reload(constants)  # which read the environment when they were imported
    from peertune.cli import main

    main()


def start(folder: Path, *words: str, **environment: str) -> Command:
    return Command(folder, words, os.environ | {"OMP_NUM_THREADS": "1"} | environment)


Process = Command | subprocess.Popen[str]


def problems(said: str) -> str:
    """What is wrong, of what a command says on standard error: no progress, and warnings without their time."""
    stamp = r"^peertune: [\d-]+ [\d:]+"
    return re.sub(f"(?m){stamp} WARNING ", "peertune: ", re.sub(f"(?m){stamp} INFO .*\n", "", said))


def finish(process: Process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=AT_MOST_S)
    assert process.returncode is not None
    return process.returncode, out, problems(err)


def finish_well(processes: Sequence[Process]) -> None:
    """See all processes end with 0, and leave none behind."""
    try:
        for process in processes:
            code, _, err = finish(process)
            assert code == 0, err
    finally:
        for process in processes:
            process.kill()


def wait_until(happened: Callable[[], bool], process: Process | None = None, said: Callable[[], str] = str) -> None:
    """Wait for what has to happen while the process runs, if there is one; fail with what was `said` until then."""
    deadline = time.monotonic() + AT_MOST_S
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)
