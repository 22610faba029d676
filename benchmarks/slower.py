"""`python -m benchmarks.slower OLD`: whether the working tree is slower than a commit, in turn, on this machine.

The package as it was at OLD, and as it is here, do the same in turn, first the one, then the other: local steps, rounds
of 1,000 clients, swaps of four peers, and `--help`. Of each turn the new side's seconds over the old one's are
taken. What is printed is the median of the turns, with a 95 % interval by their ranks. Nothing is slower where the
lower end is at most 1.03. Seconds are those that records have, by stage, so they leave out how a run begins.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

from benchmarks.same import CLIENTS, Command, Side, ask, federate, lay_out

TURNS, LIMIT = 20, 1.03
SMALL = ("run", "digits-demo", "algorithm.name=dec_lora", "evaluate={every: 1000, rows: 10}")
PEER = (
    "peer",
    "start",
    "--recipe",
    "digits-demo",
    f"clients={CLIENTS}",
    "graph.activation=1.0",
    "network.patience_s=120",
)
RUNS: dict[str, tuple[list[tuple[str, ...]], tuple[str, ...]]] = {
    "a local step": ([(*SMALL, "rounds=4", "training.local_steps=10", "clients=8")], ("train",)),
    "a round of 1,000 clients": (
        [
            (
                *SMALL,
                "model.name=base",
                "task={name: images, path: squares}",
                "clients=1000",
                "rounds=4",
                "graph={name: ring}",
                "partition={name: iid}",
                "training={local_steps: 1, per_device_train_batch_size: 1, learning_rate: 5e-3}",
                "lora.r=2",
            )
        ],
        ("exchange", "mix", "metrics"),
    ),
    "a swap": (
        [
            (*PEER, "--dir", f"peer-{k}", "rounds=20", "training.local_steps=1", "evaluate={every: 1000, rows: 10}")
            for k in range(CLIENTS)
        ],
        ("exchange",),
    ),
}
"""What is done → the words of each process, and the stages whose seconds count."""


def main() -> None:
    """Take the turns, print a line for each thing that is done, and end with 1 where one is slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slower", description=__doc__)
    parser.add_argument("old", metavar="OLD", help="a commit, such as HEAD or main")
    parser.add_argument("--turns", type=int, default=TURNS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slower-") as place, ExitStack() as stack:
        folders = Path(place, "old"), Path(place, "new")
        print(f"the working tree against {lay_out(options.old, *folders)}", flush=True)
        sides = [stack.enter_context(Side(folder)) for folder in folders]
        for side in sides:
            side.answer()
        federate(sides)
        for folder in folders:
            draw_squares(folder)
        slower = [judged(what, sides, partial(stage, what), options.turns) for what in RUNS]
        slower.append(judged("--help", sides, said, options.turns))
    sys.exit(any(slower))


def draw_squares(folder: Path) -> None:
    """Leave a row for each of a thousand clients, grey squares of two classes, and a small base that reads them."""
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    size: Any = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    ViTForImageClassification(ViTConfig(**size, num_attention_heads=2)).save_pretrained(folder / "base")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "base")
    for split, rows in (("train", 1000), ("validation", 10)):
        for row in range(rows):
            place = folder / "squares" / split / "ab"[row % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (100 + row % 100,) * 3).save(place / f"{row}.png")


def judged(what: str, sides: Sequence[Side], action: Callable[[Side, int], float], turns: int) -> bool:
    """Do something in turn, print how long it takes new over old, and return whether it is slower."""
    taken = [[action(side, turn) for side in sides] for turn in range(turns + 1)][1:]  # the first warms up
    ratios = sorted(new / old for old, new in taken)
    low, high = interval(len(ratios))
    middle = [1e3 * statistics.median(each) for each in zip(*taken, strict=True)]
    slower = ratios[low] > LIMIT
    print(
        f"{what:<26}{statistics.median(ratios):.3f} ({ratios[low]:.3f} to {ratios[high]:.3f}), {turns} turns, "
        f"{middle[0]:.1f} to {middle[1]:.1f} ms{', slower' if slower else ''}",
        flush=True,
    )
    return slower


def interval(count: int) -> tuple[int, int]:
    """Return the places, among sorted values, of the ends of a 95 % interval of their median (binomial)."""
    below, low = 0.5**count, 0
    while below <= 0.025 and low < count // 2:
        low += 1
        below += 0.5**count * comb(count, low)
    return max(0, low - 1), count - max(1, low)


def stage(what: str, side: Side, turn: int) -> float:
    """Run, and return the seconds that a round's stages take, the median of all rounds but the first.

    Of several peers it is those of the last that comes to the round, since it waits for nobody.
    """
    words, stages = RUNS[what]
    outs = [f"turns/{what}/{turn}-{k}" for k in range(len(words))]
    commands: list[Command] = [({}, [*each, "--out", out]) for each, out in zip(words, outs, strict=True)]
    ask({side: commands})
    files = [side.folder / out / "rounds.jsonl" for out in outs]
    rounds = zip(*[map(json.loads, file.read_text().splitlines()) for file in files], strict=True)
    taken = [min(sum(one["seconds"].get(name, 0.0) for name in stages) for one in records) for records in rounds]
    return float(statistics.median(taken[1:]))


def said(side: Side, turn: int) -> float:
    """Return the seconds until `--help` has answered."""
    environment = os.environ | {"PYTHONPATH": str(side.folder / "code")}
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "peertune", "--help"], env=environment, check=True, capture_output=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
