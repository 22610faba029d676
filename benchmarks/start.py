"""How long a user waits: for `--help`, and from `peertune run` to the end of the first local step."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Figure, figure, seconds
from benchmarks.setup import overrides

FIRST = "peertune run, to the end of MiniLM's first step"
NEXT = "the same of the next run on the same rows"
COMMAND = [sys.executable, "-c", "from peertune.cli import main; main()"]


def run(repeats: int = 5) -> list[Figure]:
    """Measure both; once beforehand, so that files are in the page cache."""
    help_times = [seconds(_help) for _ in range(repeats + 1)]
    first, following = zip(*[_two_runs() for _ in range(repeats + 1)][1:], strict=True)
    return [
        figure("peertune --help", help_times[1:], "s", "≤ 0.3"),
        figure(FIRST, [wall for wall, _ in first], "s", "≤ 10", "a round of one step"),
        figure(NEXT, [wall for wall, _ in following], "s"),
        figure(f"{FIRST}, processor time", [processor for _, processor in first], "s"),
        figure(f"{NEXT}, processor time", [processor for _, processor in following], "s"),
    ]


def turn() -> list[Figure]:
    """Measure two runs on the same rows, one after the other."""
    (_, first), (_, following) = _two_runs()
    return [figure(f"{FIRST}, processor time", [first], "s"), figure(f"{NEXT}, processor time", [following], "s")]


def _two_runs() -> tuple[tuple[float, float], tuple[float, float]]:
    with tempfile.TemporaryDirectory() as kept:
        return _first_step(kept), _first_step(kept)


def _help() -> None:
    subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)


def _first_step(kept: str) -> tuple[float, float]:
    """Start a run whose rounds are one step, with tokens `kept` there, and stop it once it has written of the first.

    Returns seconds, and the processor's.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        settings = overrides("algorithm.name=dec_lora", "training.local_steps=1", "evaluate={every: 60}")
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with subprocess.Popen(
            [*COMMAND, "run", "tad-sst2-minilm", *settings, "--out", str(out)],
            env={**os.environ, "PEERTUNE_CACHE": kept},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            written = out / "rounds.jsonl"
            while not (written.exists() and written.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"peertune run ended with code {process.returncode}")
                time.sleep(0.01)
            taken = time.perf_counter() - start
            process.kill()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
