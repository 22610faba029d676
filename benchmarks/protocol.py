"""The papers' whole protocol through the command line: 150 rounds × 20 steps × 10 clients × 32 rows, SST-2, MiniLM."""

import subprocess
import tempfile
from pathlib import Path

from benchmarks.measure import Figure, figure, seconds
from benchmarks.setup import overrides
from benchmarks.start import COMMAND


def run() -> list[Figure]:
    """Run it once, with the recipe's TAD-LoRA and dropout, from the start of the process to the last file written."""
    settings = overrides("rounds=150", "training.local_steps=20", "graph.activation=0.1")
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "run"))
        command = [*COMMAND, "run", "tad-sst2-minilm", *settings, "--out", out]
        taken = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    return [
        figure("the papers' protocol, start to end", [taken / 60], "min", note="150 × 20 × 10 × 32, all dropout on")
    ]
