"""The command line as real processes, for the tests that stop and kill them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# A shell may have told its background jobs to ignore SIGINT; a job in the foreground gets it.
PROCESS = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from peertune.cli import main; main()"
)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def finish_well(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 200) -> None:
    """See all processes end with 0, and leave none behind."""
    try:
        for process in processes:
            code, _, err = finish(process, timeout_s)
            assert code == 0, err
    finally:
        for process in processes:
            process.kill()


def wait_until(
    happened: Callable[[], bool], process: subprocess.Popen[str] | None = None, said: Callable[[], str] = str
) -> None:
    """Wait for what has to happen while the process runs, if there is one; fail with what was `said` until then."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)
