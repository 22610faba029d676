"""The command line as real processes, for the tests that stop and kill them.

They are forked from a process that has imported what takes seconds, as a shell's commands would all begin with.
"""

import atexit
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Lock
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


MAIN = "from peertune.cli import main; main()"


class Command:
    """`peertune` with some words, or other code, as a process of its own; what it says goes to files."""

    def __init__(self, folder: Path, words: Sequence[str], environment: Mapping[str, str], code: str = MAIN) -> None:
        """Start it in this folder."""
        self._said = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115  # kept as long as this is
        streams = {number: Connection(os.dup(said.fileno())) for number, said in enumerate(self._said, 1)}
        self._process = _forked(folder, words, environment, streams, code)
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


_polling = Lock()  # two threads that ask at once how a process ended would spoil each other's answer


def _forked(
    folder: Path, words: Sequence[str], environment: Mapping[str, str], streams: dict[int, Connection], code: str = MAIN
) -> Any:
    """Start a process with these streams, by number, which are closed here."""
    process = forking().Process(target=_run, args=(folder, list(words), dict(environment), streams, code))
    with _polling:
        process.start()
    return process


def _run(
    folder: Path, words: list[str], environment: dict[str, str], streams: dict[int, Connection], code: str
) -> None:
    for number, stream in streams.items():
        os.dup2(stream.fileno(), number)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115  # of what they are here
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(folder)
    sys.argv = ["peertune", *words]
    importlib.reload(constants)  # which read the environment when they were imported
    # What it starts is forked from where it was itself, which is warm: multiprocessing would make another such process.
    shared: Any = multiprocessing.forkserver
    shared.ensure_running = shared._forkserver.ensure_running = lambda: None
    exec(code, {"__name__": "__main__"})


def start(folder: Path, *words: str, **environment: str) -> Command:
    return Command(folder, words, os.environ | {"OMP_NUM_THREADS": "1"} | environment)


CALLER = f"""#!{sys.executable} -IS
import json, os, signal, socket, sys

words = [word for word in sys.argv[1:] if word not in ("-P", "-u")]
words = words[2:] if words[:2] == ["-m", "peertune"] else words
there = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
there.connect(os.path.dirname(os.path.abspath(__file__)) + "/socket")
socket.send_fds(there, [json.dumps([os.getcwd(), words, dict(os.environ)]).encode()], [0, 1, 2])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: there.send(str(number).encode()))
code = int(there.recv(100))
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
"""What stands for `peertune`, and for `python -m peertune`, where a script calls them; signals go on, as its death."""


class Forks:
    """The processes that scripts have started which found `peertune` in this folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[int, list[str]] = {}  # each one's words, by its number

    def start(self, folder: Path, *words: str) -> Command:
        """Start the command line in a folder; the processes that it starts, as `--workers` does, are forked as well."""
        code = f"import sys; sys.executable = {str(self.folder / 'python')!r}; {MAIN}"
        return Command(folder, words, os.environ | {"OMP_NUM_THREADS": "1"}, code)

    def serve(self, there: socket.socket) -> None:
        """Run what a caller asks for, and tell it how that ended."""
        with there:
            asked, files, *_ = socket.recv_fds(there, 1 << 20, 3)
            folder, words, environment = json.loads(asked)
            streams = {number: Connection(file) for number, file in enumerate(files)}
            process = _forked(Path(folder), words, environment, streams)
            self.running[process.pid] = words
            while process.sentinel not in wait([process.sentinel, there]):
                number = int(there.recv(100) or signal.SIGKILL)
                os.kill(process.pid, number)
                if number == signal.SIGKILL:
                    break
            with _polling:
                process.join()
            del self.running[process.pid]
            with suppress(BrokenPipeError):
                there.send(f"{process.exitcode}".encode())


@contextmanager
def forks() -> Iterator[Forks]:
    """Have scripts that look into a folder first start the command line without its imports, until this ends."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening,
        ThreadPoolExecutor(32) as pool,
    ):
        for name in ("peertune", "python"):
            (Path(folder) / name).write_text(CALLER)
            (Path(folder) / name).chmod(0o755)
        listening.bind(f"{folder}/socket")
        listening.listen()
        made = Forks(Path(folder))

        def accept() -> None:
            with suppress(OSError):  # when no more are listened for
                while True:
                    pool.submit(made.serve, listening.accept()[0])

        pool.submit(accept)
        try:
            yield made
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for pid in list(made.running):  # what a test that failed has left behind
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


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
    """Wait for what has to happen while the process runs, if there is one; fail with what was `said` until then.

    Looking takes a fifth of the time at most: what is waited for needs the processor.
    """
    deadline = time.monotonic() + AT_MOST_S
    while True:
        began = time.monotonic()
        if happened():
            return
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, said()
        time.sleep(max(0.01, 4 * (time.monotonic() - began)))
