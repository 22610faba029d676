"""Ten seeds of `digits-demo` as one stack against each by itself: processor time, with whatever threads there are.

Rounds are timed in turn, without an evaluation. A whole run is its rounds, and loading, which a stack does once.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

from benchmarks.measure import Figure, figure, ratios
from peertune import load_recipe, simulate
from peertune.assembly.build import Built, build, build_stack
from peertune.engines.simulator import simulate_together
from peertune.rounds.job import Job

SEEDS = 10


def run(repeats: int = 5) -> list[Figure]:
    """Measure."""
    recipes = {
        str(seed): load_recipe("digits-demo", ["evaluate={every: 1000, rows: 10}", f"seed={seed}"])
        for seed in range(SEEDS)
    }
    begun = time.process_time()
    built = {name: one for name, one in build_stack(recipes).items() if isinstance(one, Built)}
    assert len(built) == SEEDS
    together = time.process_time() - begun
    jobs = {name: replace(one.job, state=one.job.state.clone()) for name, one in built.items()}
    taken = [(_alone(jobs), _stacked(jobs)) for _ in range(repeats + 1)][1:]  # the first warms up
    alone, stacked = ([seconds / SEEDS for seconds in each] for each in zip(*taken, strict=True))
    begun = time.process_time()
    build(recipes["0"])
    return [
        figure("a round of digits-demo, processor time", alone, "s", note="10 clients, 10 local steps"),
        figure(f"the same in a stack of {SEEDS} seeds", stacked, "s"),
        figure("the first over the second", ratios(alone, stacked), "×", "≥ 2.5"),
        figure("loading a run, processor time", [time.process_time() - begun], "s"),
        figure(f"loading {SEEDS} runs as one stack", [together], "s"),
    ]


def _alone(jobs: Mapping[str, Job]) -> float:
    """Return what a round of each takes, one after the other."""
    begun = time.process_time()
    for job in jobs.values():
        next(simulate(job))
    return time.process_time() - begun


def _stacked(jobs: Mapping[str, Job]) -> float:
    """Return what a round of all together takes."""
    own = {name: replace(job, state=job.state.clone()) for name, job in jobs.items()}
    begun = time.process_time()
    for _, record in simulate_together(own):
        assert not isinstance(record, Exception)
    return time.process_time() - begun
