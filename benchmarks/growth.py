"""Ten, a hundred and a thousand clients: time for a client's step, and the cost of mixing.

Rounds of one local step are timed in turn for all sizes. Mixing's share is that of a round of the papers' 20 steps.
"""

from benchmarks.measure import Figure, copy_bandwidth, figure, ratios
from benchmarks.setup import dropout, make
from peertune import simulate
from peertune.assembly.build import Built

SIZES = (10, 100, 1000)
LOCAL_STEPS = 20


def build(clients: int) -> Built:
    """Return an Erdős–Rényi network of so many clients, each with rows of its own, in which both factors train."""
    return make(
        f"clients={clients}",
        "partition={name: iid}",
        "graph={name: complete, activation: 0.1}",
        "algorithm.name=dec_lora",
        "training.local_steps=1",
        "rounds=1000",
        "evaluate={every: 1000}",
        *dropout(False),
    )


def adapter_bytes(run: Built) -> int:
    """Return the bytes of one client's adapter; by nothing that an older package has elsewhere."""
    return sum(x[0].nbytes for x in run.job.state.adapters.values())


def run(repeats: int = 5) -> list[Figure]:
    """Measure at each size."""
    runs = {size: build(size) for size in SIZES}
    rounds = {size: simulate(run.job) for size, run in runs.items()}
    train: dict[int, list[float]] = {size: [] for size in SIZES}
    mix: dict[int, list[float]] = {size: [] for size in SIZES}
    heard: dict[int, list[int]] = {size: [] for size in SIZES}
    for turn in range(repeats + 1):
        for size, records in rounds.items():
            record = next(records)
            if turn:
                train[size].append(record.seconds["train"] / size)
                mix[size].append(record.seconds["mix"] + record.seconds["exchange"])
                heard[size].append(sum(record.neighbours))
    bandwidth = copy_bandwidth()
    one = adapter_bytes(runs[SIZES[0]])
    least, per_client = min(SIZES), {size: [1e3 * x for x in train[size]] for size in SIZES}
    figures = []
    for size in SIZES:
        figures.append(figure(f"a client's step of 32 rows, {size:,} clients", per_client[size], "ms"))
        if size != least:
            growth = ratios(train[size], train[least])
            figures.append(figure(f"the same over that of {least} clients", growth, "×", "≤ 1.1", f"{size:,} clients"))
    for size in SIZES:
        share = [100 * m / (m + LOCAL_STEPS * size * t) for m, t in zip(mix[size], train[size], strict=True)]
        # A receiver reads each adapter that it takes, its own among them, and writes one.
        moved = [one * (count + 2 * size) / bandwidth for count in heard[size]]
        note = f"{sum(heard[size]) / len(heard[size]) / size:.1f} neighbours each"
        figures.append(figure(f"mixing, {size:,} clients", [1e3 * x for x in mix[size]], "ms", note=note))
        figures.append(figure(f"mixing over moving its bytes, {size:,} clients", ratios(mix[size], moved), "×"))
        figures.append(figure(f"mixing's share of a round of {LOCAL_STEPS} steps, {size:,} clients", share, "%", "≤ 5"))
    figures.append(figure("copy bandwidth", [bandwidth / 1e9], "GB/s"))
    return figures
