"""Many clients, and several processes: what a client costs among ten thousand, and what sharing the clients costs.

The base is MiniLM-L6, with adapters of rank 4; a round is one local step of two rows for each client, as little work as
can be, so that all else weighs most. Everybody has eight neighbours.
"""

from typing import Any

import torch

from benchmarks.measure import Figure, figure, ratios
from benchmarks.setup import dropout, make
from peertune import simulate
from peertune.assembly import Run
from peertune.engines.cluster import joined, run_cluster, share, start
from peertune.types import ALONE, Group

SIZES = (100, 1_000, 10_000)
EACH = 500
"""Clients of a process in the measurement of weak scaling."""


def build(clients: int, group: Group = ALONE) -> Run:
    """Return a run of so many clients, or this process's share of it."""
    return make(
        f"clients={clients}",
        "partition={name: iid}",
        "graph={name: random_regular, degree: 8}",
        "algorithm.name=dec_lora",
        "lora={r: 4, target_modules: [query, value]}",
        "training={local_steps: 1, per_device_train_batch_size: 2}",
        "rounds=1000",
        "evaluate={every: 1000, rows: 1}",
        *dropout(False),
        clients=share(clients, group),
        group=group,
    )


def run(repeats: int = 5, sizes: tuple[int, ...] = SIZES, each: int = EACH, processes: int = 2) -> list[Figure]:
    """Measure many clients in one process, then the processes."""
    return growth(repeats, sizes) + weak_scaling(repeats, each, processes)


def growth(repeats: int, sizes: tuple[int, ...]) -> list[Figure]:
    """Time a client's part of a round at each size, the sizes in turn."""
    rounds = {size: simulate(build(size).job) for size in sizes}
    train: dict[int, list[float]] = {size: [] for size in sizes}
    whole: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(repeats + 1):
        for size, records in rounds.items():
            seconds = next(records).seconds
            if turn:
                train[size].append(seconds["train"] / size)
                whole[size].append(sum(seconds.values()) / size)
    figures = []
    for what, taken in (("a client's step of 2 rows", train), ("a client's part of a round", whole)):
        for size in sizes:
            figures.append(figure(f"{what}, {size:,} clients", [1e3 * x for x in taken[size]], "ms"))
            if size != sizes[0]:
                over = ratios(taken[size], taken[sizes[0]])
                figures.append(
                    figure(f"the same over that of {sizes[0]} clients", over, "×", "≤ 1.15", f"{size:,} clients")
                )
    return figures


def weak_scaling(repeats: int, each: int, processes: int) -> list[Figure]:
    """Time a round of `each` clients in one process, and of as many in each of several, which have a core each."""
    turns = start(processes, _turns, repeats, each)[0]
    alone, together = ([sum(turn[part].values()) for turn in turns] for part in ("alone", "together"))
    names = f"{each:,} clients in one process of one thread", f"{processes * each:,} clients in {processes} such"
    exchange, measuring = (
        [100 * turn["together"][stage] / sum(turn["together"].values()) for turn in turns]
        for stage in ("exchange", "metrics")
    )
    return [
        figure(f"a round of {names[0]}", alone, "s"),
        figure(f"a round of {names[1]}", together, "s"),
        figure(
            f"weak scaling: the first over the second, {processes} processes", ratios(alone, together), "×", "≥ 0.9"
        ),
        figure(f"the exchange's share of a round, {processes} processes", exchange, "%"),
        figure(f"the diagnostics' share of a round, {processes} processes", measuring, "%"),
    ]


def _turns(repeats: int, each: int) -> list[dict[str, Any]]:
    """Run a round alone, while the other processes wait, and one together, in turn; return what each took."""
    torch.set_num_threads(1)
    with joined() as group:
        alone = simulate(build(each).job) if group.rank == 0 else None
        together = run_cluster(build(each * group.size, group).job)
        turns = []
        for _ in range(repeats + 1):
            taken = {"alone": next(alone).seconds if alone is not None else {}}
            group.gather("")
            turns.append(taken | {"together": next(together).seconds})
        return turns[1:]
