"""`python -m benchmarks.within`: what a checkpoint within a round takes, in turn with a local step.

Of ten clients in a simulation, and of one, as a peer has it; MiniLM-L6 on SST-2 (`SST2` is a folder with it), as in all
benchmarks.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Figure, figure, interleaved
from benchmarks.setup import make
from benchmarks.table import table
from peertune.method import standing
from peertune.rounds.training import train_local
from peertune.runs import checkpoints


def run(clients: Sequence[int], repeats: int = 9) -> list[Figure]:
    """Measure both for these clients, with the recipe's dropout."""
    job = make("algorithm.name=dec_lora", "training.local_steps=1", clients=clients).job
    state, phase = job.state.clone(), job.algorithm.phase(0)
    with tempfile.TemporaryDirectory() as folder:
        times = interleaved(
            {
                "write": lambda _: checkpoints.save_within(Path(folder), state, clients),
                "step": lambda turn: train_local(
                    job.model,
                    state,
                    job.steps(clients, [turn] * len(clients)),
                    phase,
                    job.optim,
                    standing(clients, state.at(turn).rounds),
                ),
            },
            repeats,
        )
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    whose = "one client" if len(clients) == 1 else f"{len(clients)} clients"
    return [
        figure(f"a checkpoint of {whose}", [1e3 * x for x in times["write"]], "ms", note=f"{size / 1e6:.1f} MB"),
        figure(f"a local step of {whose}", [1e3 * x for x in times["step"]], "ms"),
    ]


if __name__ == "__main__":
    print(table(one.json() for clients in (range(10), [0]) for one in run(clients)))
