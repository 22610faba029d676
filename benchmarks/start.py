"""How long a user waits: for `--help`, and from `peertune run` to the end of the first local step."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Figure, figure, seconds
from benchmarks.setup import overrides

COMMAND = [sys.executable, "-c", "from peertune.cli import main; main()"]


def run(repeats: int = 5) -> list[Figure]:
    """Measure both; once beforehand, so that files are in the page cache."""
    help_times = [seconds(_help) for _ in range(repeats + 1)]
    first_times, next_times = [], []
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as kept:
            first_times.append(_first_step(kept))
            next_times.append(_first_step(kept))
    return [
        figure("peertune --help", help_times[1:], "s", "≤ 0.3"),
        figure("peertune run, to the end of MiniLM's first step", first_times[1:], "s", "≤ 10", "a round of one step"),
        figure("the same of the next run on the same rows", next_times[1:], "s"),
    ]


def _help() -> None:
    subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)


def _first_step(kept: str) -> float:
    """Start a run whose rounds are one step, with tokens `kept` there, and stop it once it has written of the first."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        settings = overrides("algorithm.name=dec_lora", "training.local_steps=1", "evaluate={every: 60}")
        start = time.perf_counter()
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
    return taken
