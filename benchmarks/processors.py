"""One short run as other processors make it: which answers differ, how far, and how near the nearest was to another.

    python -m benchmarks.processors          # three seeds in each set-up, a process for each: minutes

Answers are those of the clients' own models and of the averaged adapter to the rows of the validation set. An answer's
margin is how far its logit is above the second; logits are those of one processor less those of another, centred.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import peertune
from peertune.assembly.encoding import encode
from peertune.assembly.loading import load
from peertune.assembly.registry import build_parts
from peertune.data.batches import validation_batches
from peertune.recipe import load_recipe
from peertune.rounds.training import evaluate
from peertune.types import take

SHORT = (
    "rounds=20",
    "training.local_steps=3",
    "training.per_device_train_batch_size=4",
    "training.learning_rate=0.01",
    "graph.activation=0.5",
    "evaluate.every=20",
    "algorithm.name=dec_lora",
)
"""The run, of `digits-demo`."""
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "as it is": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "SSE4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "two threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "without oneDNN": {"WITHOUT_ONEDNN": "1"},  # ours, since it has none for that
}
"""A set-up → what a process is told for it; one thread where nothing is said."""


class Made(NamedTuple):
    """What a run came to."""

    environment: Mapping[str, Any]  # what it says of where it was made
    scores: Sequence[float]  # of the clients' own models, and of the averaged adapter
    logits: NDArray[np.float32]  # [clients + 1, rows, classes]


def make(overrides: Sequence[str]) -> Made:
    """Make the run in this process, as its environment has it."""
    if os.environ.get("WITHOUT_ONEDNN"):
        torch.backends.mkldnn.set_flags(False)
    run = peertune.run("digits-demo", overrides)
    recipe = load_recipe("digits-demo", overrides)
    parts = build_parts(recipe)
    loaded = load(recipe, parts.task)
    encoded = encode(recipe, parts, loaded.base)
    mean = {name: x.mean(0, keepdim=True) for name, x in run.adapters.items()}
    models = [*(take(run.adapters, slice(client, client + 1)) for client in range(recipe.clients)), mean]
    batches = validation_batches(encoded.validation, encoded.evaluated, loaded.tokens, loaded.packed)
    logits = evaluate(loaded.model, models, batches, len(encoded.evaluated), lambda logits, _: logits)
    last = run.records[-1]["evaluation"]
    return Made(run.environment, [*last["clients"], last["average"]], logits)


def elsewhere(where: str, overrides: Sequence[str]) -> Made:
    """Make the run in a process of its own, set up so."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "logits.npy")
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.processors", "--write", str(file), *overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1", **SETTINGS[where]}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        told = json.loads(done.stdout)
        return Made(told["environment"], told["scores"], np.load(file))


def margins(made: Made) -> NDArray[np.float32]:
    """Return how far each answer's logit is above the second, `[clients + 1, rows]`."""
    ranked = np.sort(made.logits, -1)
    found: NDArray[np.float32] = ranked[..., -1] - ranked[..., -2]
    return found


def moved(one: Made, other: Made) -> NDArray[np.float32]:
    """Return the largest difference of an answer's logits, `[clients + 1, rows]`; what all have in common left out."""
    first, second = (made.logits - made.logits.mean(-1, keepdims=True) for made in (one, other))
    found: NDArray[np.float32] = np.abs(first - second).max(-1)
    return found


def main() -> None:
    """Print a table of all set-ups and seeds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processors", description=__doc__)
    parser.add_argument("--write", help="make one run here, print its scores, and write its logits to this file")
    parser.add_argument("settings", nargs="*", default=SHORT, help="of digits-demo, in the place of the short run's")
    options = parser.parse_args()
    if options.write:
        made = make(options.settings)
        np.save(options.write, made.logits)
        print(json.dumps({"environment": made.environment, "scores": made.scores}))
        return
    print("| set-up | seed | answers that differ | logits differ by at most | nearest margin |")
    print("|---|---:|---:|---:|---:|")
    for seed in range(3):
        first: Made | None = None
        for where in SETTINGS:
            made = elsewhere(where, [*options.settings, f"seed={seed}"])
            first = first or made
            differ = int((made.logits.argmax(-1) != first.logits.argmax(-1)).sum())
            count, far = f"{differ} of {made.logits[..., 0].size:,}", f"{moved(first, made).max():.0e}"
            print(f"| {where} | {seed} | {count} | {far} | {margins(made).min():.1e} |", flush=True)


if __name__ == "__main__":
    main()
