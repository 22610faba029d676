"""Eight peers over hundreds of rounds while some are killed and stopped: what memory and descriptors do meanwhile."""

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.measure import Figure, figure
from benchmarks.wire import PEERS, federation
from peertune.runs import records

ROUNDS = 300
KILLED = range(PEERS // 2, PEERS)  # the others are only stopped, so that their memory can be followed
RECIPE = (
    "rounds={rounds}",
    f"clients={PEERS}",
    "graph={{name: complete, activation: 0.4}}",
    "network.patience_s=5",
    "evaluate={{every: 50, rows: 20}}",
    "training={{learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 4}}",
)


def run(rounds: int = ROUNDS, seed: int = 0) -> list[Figure]:
    """Run in rounds until all have finished; a fault strikes about every ten rounds."""
    with tempfile.TemporaryDirectory() as folder:
        return soaked(Path(folder), rounds, [part.format(rounds=rounds) for part in RECIPE], seed)


def soaked(folder: Path, rounds: int, recipe: Sequence[str], seed: int, every: int = 10) -> list[Figure]:
    """Run eight peers of this recipe in a folder until all have finished; peer k's run is `runs/k` there.

    A fault strikes about every so many rounds. A peer that was killed is spared until it has made a round again.
    """
    draw = random.Random(seed)
    kills = stops = 0
    memory: dict[int, list[float]] = {client: [] for client in range(PEERS) if client not in KILLED}
    opened: dict[int, list[float]] = {client: [] for client in memory}
    federation(folder)
    running = {client: _start(folder, client, recipe) for client in range(PEERS)}
    began = dict.fromkeys(running, 0)  # in which round each was started last
    try:
        due = every
        while any(process.poll() is None for process in running.values()):
            time.sleep(0.5)
            done = max((_rounds(folder, client) for client in running), default=0)
            for client in memory:
                if running[client].poll() is None and done > 20:
                    memory[client].append(_memory_mb(running[client].pid))
                    opened[client].append(_descriptors(running[client].pid))
            for client in KILLED:
                if running[client].poll() not in (None, 0):
                    running[client], began[client] = _start(folder, client, recipe), _rounds(folder, client)
            if done >= due and done < rounds - 20:
                due = done + every
                victim = draw.choice([client for client in running if _rounds(folder, client) > began[client]])
                if victim in KILLED and running[victim].poll() is None:
                    running[victim].send_signal(signal.SIGKILL)
                    kills += 1
                elif running[victim].poll() is None:
                    running[victim].send_signal(signal.SIGSTOP)
                    time.sleep(draw.uniform(0, 8))  # some for longer than the patience
                    running[victim].send_signal(signal.SIGCONT)
                    stops += 1
        ended = [process.returncode for process in running.values()]
        lost = [_lost(folder, client) for client in running]
    finally:
        for process in running.values():
            process.kill()
    assert ended == [0] * PEERS, ended
    return [
        figure("rounds of eight peers, all finished", [rounds], "rounds", note=f"{kills} kills, {stops} stops"),
        figure("edges lost", [100 * x for x in lost], "%"),
        figure("growth of memory, last third over first", [_growth(x) for x in memory.values()], "%", target="≤ 5"),
        figure("growth of open descriptors, likewise", [_growth(x) for x in opened.values()], "%", target="≤ 5"),
    ]


def _start(folder: Path, client: int, recipe: Sequence[str]) -> "subprocess.Popen[bytes]":
    out = folder / "runs" / f"{client}"
    words = ["peer", "start", "--dir", str(folder / f"{client}"), "--roster", str(folder / "roster.yaml")]
    if (out / "resolved.yaml").exists():
        words += ["--resume", str(out)]
    else:
        words += ["--recipe", "digits-demo", "--out", str(out), *recipe]
    with (folder / f"{client}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "peertune", *words], stdout=log, stderr=log)


def _rounds(folder: Path, client: int) -> int:
    file = folder / "runs" / f"{client}" / "rounds.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _lost(folder: Path, client: int) -> float:
    """Return the share of a peer's edges that failed."""
    found = records.read(folder / "runs" / f"{client}")
    failed, counted = (sum(len(record[key]) for record in found) for key in ("failed_edges", "edges"))
    return failed / max(1, failed + counted)


def _memory_mb(process: int) -> float:
    return float(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 1e6


def _descriptors(process: int) -> float:
    return float(len(list(Path(f"/proc/{process}/fd").iterdir())))


def _growth(values: list[float]) -> float:
    """Return by how many per cent the last third's median is above the first's."""
    third = max(1, len(values) // 3)
    return 100 * (median(values[-third:]) / median(values[:third]) - 1)
