"""Sweeps as processes."""

import json
from pathlib import Path
from typing import Any

import processes

SMALL = [
    "clients=4",
    "partition={name: iid}",
    "graph={name: complete, activation: 0.5}",
    "training={local_steps: 1, per_device_train_batch_size: 2}",
    "evaluate={every: 4, rows: 4}",
]


def start(folder: Path, *words: str) -> processes.Command:
    return processes.start(folder, "sweep", "digits-demo", *SMALL, *words)


def finish(process: processes.Command) -> tuple[int, str, str]:
    return processes.finish(process)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) | {"seconds": None} for line in (run / "rounds.jsonl").read_text().splitlines()]
