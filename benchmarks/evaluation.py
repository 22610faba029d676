"""Evaluation of ten clients and their average on one validation set: rows per second, and its share of a run."""

from functools import partial

import torch

from benchmarks.measure import Figure, figure, interleaved, processor
from benchmarks.setup import make
from peertune.method import standing
from peertune.rounds.training import train_local

EVERY, LOCAL_STEPS = 10, 20  # as in the papers' recipes


def run(repeats: int = 5) -> list[Figure]:
    """Measure, beside a local step, with the recipe's dropout."""
    job = make("algorithm.name=dec_lora", "training.local_steps=1").job
    clients = job.graph.clients
    state = job.state.clone()
    phase = job.algorithm.phase(0)
    times = interleaved(
        {
            "evaluate": lambda _: job.evaluate(state.stacks, job.clients),
            "step": lambda turn: train_local(
                job.model,
                state,
                job.steps(range(clients), [turn] * clients),
                phase,
                job.optim,
                standing(job.clients, state.at(turn).rounds),
            ),
        },
        repeats,
    )
    rows = job.evaluate(state.stacks, job.clients).rows * (clients + 1)
    shares = [100 * e / (e + EVERY * LOCAL_STEPS * s) for e, s in zip(times["evaluate"], times["step"], strict=True)]
    return [
        figure(f"evaluation of {clients} clients and their average", times["evaluate"], "s", note=f"{rows:,} rows"),
        figure("evaluation", [rows / x for x in times["evaluate"]], "rows/s"),
        figure(f"its share of a run, every {EVERY} rounds of {LOCAL_STEPS} steps", shares, "%"),
    ]


def turn() -> list[Figure]:
    """Measure evaluation of 120 rows, by one thread's processor time, in float32 and in what the machine has."""
    torch.set_num_threads(1)
    figures = []
    for dtype in ("float32", "auto"):
        job = make("algorithm.name=dec_lora", f"model.dtype={dtype}", "evaluate.rows=120").job
        rows = job.evaluate(job.state.stacks, job.clients).rows * (len(job.clients) + 1)
        taken = processor(partial(job.evaluate, job.state.stacks, job.clients), 3)
        name = f"evaluation of a row of a client, {job.model.base.dtype}".replace("torch.", "")
        figures.append(figure(name, [1e3 * x / rows for x in taken], "ms"))
    return figures
