"""Memory for one more client: the peak of a process of its own for ten, a hundred and a thousand of them."""

import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.growth import SIZES, adapter_bytes, build
from benchmarks.measure import Figure, figure
from peertune import simulate


def run() -> list[Figure]:
    """Measure each size once."""
    state = 3 * adapter_bytes(build(min(SIZES)))  # factors and two moments
    peaks = {size: _peak(size, SIZES) for size in SIZES}
    figures = [figure(f"peak memory, {size:,} clients", [peak / 2**20], "MiB") for size, peak in peaks.items()]
    note = f"factors and moments are {state / 2**20:.2f} MiB"
    for small, large in pairwise(SIZES):
        extra = (peaks[large] - peaks[small]) / (large - small) / state
        name = f"memory for a further client over its factors and two moments, {small:,} to {large:,}"
        figures.append(figure(name, [extra], "×", "≤ 1.3", note))
    return figures


def turn() -> list[Figure]:
    """Measure the peak for ten clients, and what each of ninety further ones takes."""
    small, large = sizes = SIZES[:2]
    peaks = {size: _peak(size, sizes) / 2**20 for size in sizes}
    return [
        figure(f"peak memory, {small} clients", [peaks[small]], "MiB"),
        figure("memory for a further client", [(peaks[large] - peaks[small]) / (large - small)], "MiB"),
    ]


def _peak(clients: int, sizes: Sequence[int]) -> int:
    """Return the largest resident size, in bytes, of a process of its own for so many clients.

    All `sizes` do equally many client-steps, since what the allocator leaves unused between tensors grows with these.
    """
    rounds = 2 * max(sizes) // clients
    command = [sys.executable, "-m", "benchmarks.memory", str(clients), str(rounds)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _main(clients: int, rounds: int) -> None:
    records = simulate(build(clients).job)
    for _ in range(rounds):
        next(records)
    with open("/proc/self/status", encoding="utf-8") as file:  # getrusage's peak would count the parent's too
        (line,) = (line for line in file if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
