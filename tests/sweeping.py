"""Sweeps as processes."""

import json
from pathlib import Path
from typing import Any

import processes
import pytest

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


def assert_same(one: Any, other: Any, rel: float = 1e-9) -> None:
    """Hold what JSON has against each other, numbers up to rounding; seconds by their names."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            if key == "seconds":
                assert (one[key] and list(one[key])) == (other[key] and list(other[key]))
            else:
                assert_same(one[key], other[key], rel)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair, rel)
    else:
        assert one == (pytest.approx(other, rel=rel, abs=rel / 1e3) if isinstance(other, float) else other)
