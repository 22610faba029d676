"""Many clients, and several processes: what a client costs among ten thousand, and what sharing the clients costs.

The base is MiniLM-L6, with adapters of rank 4; a round is one local step of two rows for each client, as little work as
can be, so that all else weighs most, and for the processes a usual one as well. Everybody has eight neighbours.
"""

from collections import deque
from collections.abc import Sequence
from itertools import chain

import torch

from benchmarks.measure import Figure, figure, ratios, timed
from benchmarks.setup import dropout, make
from peertune import simulate
from peertune.assembly.build import Built
from peertune.engines.distributed import joined, run_cluster, share, start
from peertune.types import ALONE, Group

SIZES = (100, 1_000, 10_000)
SHARED = ((500, 1, 2), (50, 10, 8))
"""Clients of a process, local steps, and rows of a step in the measurements of weak scaling."""


def build(clients: int, steps: int = 1, rows: int = 2, group: Group = ALONE) -> Built:
    """Return a run of so many clients, or this process's share of it."""
    return make(
        f"clients={clients}",
        "partition={name: iid}",
        "graph={name: random_regular, degree: 8}",
        "algorithm.name=dec_lora",
        "lora={r: 4, target_modules: [query, value]}",
        f"training={{local_steps: {steps}, per_device_train_batch_size: {rows}}}",
        "rounds=1000",
        "evaluate={every: 1000, rows: 1}",
        *dropout(False),
        clients=share(clients, group),
        group=group,
    )


def run(
    repeats: int = 5,
    sizes: Sequence[int] = SIZES,
    shared: Sequence[tuple[int, int, int]] = SHARED,
    processes: int = 2,
) -> list[Figure]:
    """Measure many clients in one process, then the processes."""
    scaling = (weak_scaling(repeats, *each, processes) for each in shared)
    return list(chain(growth(repeats, sizes), *scaling))


def growth(repeats: int, sizes: Sequence[int]) -> list[Figure]:
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


def weak_scaling(repeats: int, clients: int, steps: int, rows: int, processes: int) -> list[Figure]:
    """Time a round of so many clients in one process, and of as many in each of several, which have a core each."""
    turns = start(processes, _turns, repeats, clients, steps, rows)[0]
    alone, together = ([turn[which] for turn in turns] for which in ("alone", "together"))
    shares = {part: [100 * turn[part] / turn["together"] for turn in turns] for part in ("exchange", "metrics", "draw")}
    what = f"{steps} × {rows} rows"
    shared = f"a round of {processes * clients:,} clients in {processes} processes, {what}"
    return [
        figure(f"a round of {clients:,} clients in one process of one thread, {what}", alone, "s"),
        figure(shared, together, "s"),
        figure(f"weak scaling: the first over the second, {what}", ratios(alone, together), "×", "≥ 0.9"),
        figure(
            f"the exchange's share of {shared}", shares["exchange"], "%", note="waiting for the slower one included"
        ),
        figure(f"the diagnostics' share of {shared}", shares["metrics"], "%"),
        figure(f"drawing the batches, of {shared}", shares["draw"], "%"),
    ]


def _turns(repeats: int, clients: int, steps: int, rows: int) -> list[dict[str, float]]:
    """Run a round alone, while the other processes wait, and one together, in turn; return what each took."""
    torch.set_num_threads(1)
    with joined() as group:
        alone = simulate(build(clients, steps, rows).job) if group.rank == 0 else iter(())
        job = build(clients * group.size, steps, rows, group).job
        together = run_cluster(job)
        turns = []
        for t in range(repeats + 1):
            group.gather("")
            _, alone_s = timed(next, alone, None)
            group.gather("")
            record, together_s = timed(next, together)
            _, draw_s = timed(deque, job.steps(job.clients, [t] * len(job.clients)), 0)
            turns.append({"alone": alone_s, "together": together_s, "draw": draw_s, **record.seconds})
        return turns[1:]
