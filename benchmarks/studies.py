"""What the studies share: two data sets, the rows that score, runs that are kept, and pairs by seed."""

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from benchmarks.setup import overrides
from peertune import load_recipe
from peertune.assembly.build import build_stack
from peertune.engines.simulator import simulate_together
from peertune.errors import ModelError
from peertune.report.pairing import interval
from peertune.rounds.job import Job
from peertune.rounds.record import RoundRecord

KEPT = Path("benchmarks/results")
MATTERS = 0.02  # an interval that is wider, with 0 in it, tells nothing

T = TypeVar("T")
Row = dict[str, Any]
Asked = Mapping[str, Sequence[str]]
"""The name of a run → its settings."""


class Study(NamedTuple):
    """What one data set is run with."""

    recipe: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    folds: int
    scored: tuple[int, ...]  # the folds that are
    chosen_by: str  # the score that chooses a rate
    together: bool  # whether runs train as one stack
    rates: tuple[float, ...] = (2e-3, 5e-3, 1e-2, 2e-2, 4e-2)  # that are chosen from


STUDIES = {
    "digits": Study(
        "digits-demo",
        (
            "clients=12",
            "task={name: digits, held_out_writers: [12, 13]}",
            "partition={name: writers}",
            "rounds=40",
            "training.local_steps=3",
            "training.per_device_train_batch_size=4",
        ),
        tuple(range(10)),
        5,
        (1, 2, 3, 4, 5),
        "own",
        together=True,
    ),
    "sst2": Study(
        "tad-sst2-minilm",
        (
            "model.dtype=float32",
            "model.dropout=false",
            "rounds=50",
            "training.local_steps=3",
            "training.per_device_train_batch_size=8",
        ),
        tuple(range(3)),
        1,
        (1,),
        "new",
        together=False,
        rates=(5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
    ),
}
STUDIES["changes"] = STUDIES["digits"]._replace(scored=(1, 2))
STUDIES["sgd"] = STUDIES["changes"]._replace(
    settings=(*STUDIES["digits"].settings, "training.optim=sgd"), rates=(0.05, 0.1, 0.2, 0.4, 0.8)
)


def held_out(study: str, fold: int, choosing: bool) -> str:
    """Return the recipe's `evaluate` block."""
    if study == "sst2":
        return f"evaluate={{every: 1000, fold: {'1/2' if choosing else '2/2, on: both, held_out: 1/20'}}}"
    folds = STUDIES[study].folds
    if not choosing:
        return f"evaluate={{every: 1000, on: both, held_out: {fold}/{folds}}}"
    return f"evaluate={{every: 1000, on: own, held_out: {fold % folds + 1}/{folds}, set_aside: {fold}/{folds}}}"


def scored(
    of: Study,
    asked: Asked,
    look: Callable[[Job], Row] = lambda job: {},
    watch: Callable[[RoundRecord, Row], Row] = lambda record, found: {},
    at_end: Callable[[Job], Row] = lambda job: {},
) -> Iterator[tuple[str, Row]]:
    """Run what is asked for, and yield the clients' scores after the last round; [] if it diverged.

    Runs of a small base train as one stack. `look` says what else is kept of a job, `watch` what is of a round,
    beside what was of those before, and `at_end` what is of a job whose state is that after the last round. Seconds are
    a run's share.
    """
    base = overrides()[:-1] if of.recipe == STUDIES["sst2"].recipe else []
    recipes = {name: load_recipe(of.recipe, [*base, *of.settings, *own]) for name, own in asked.items()}
    for part in [list(recipes)] if of.together else [[name] for name in recipes]:
        begun, jobs, looked = time.process_time(), dict[str, Job](), dict[str, Row]()
        for name, built in build_stack({name: recipes[name] for name in part}).items():
            if isinstance(built, Exception):
                raise built
            jobs[name] = replace(built.job, state=built.job.state.clone())
            looked[name] = look(built.job)
        found = _last_scores(jobs, watch, at_end)
        seconds = round((time.process_time() - begun) / len(part), 1)
        yield from ((name, {**found[name], **looked[name], "seconds": seconds}) for name in part)


def _last_scores(
    jobs: dict[str, Job], watch: Callable[[RoundRecord, Row], Row], at_end: Callable[[Job], Row]
) -> dict[str, Row]:
    found: dict[str, Row] = {name: {"own": [], "new": []} for name in jobs}  # as of those that diverge
    while jobs:
        for name, record in simulate_together(jobs):
            if isinstance(record, ModelError):
                del jobs[name]
                continue
            if isinstance(record, Exception):
                raise record
            assert record.state is not None
            found[name] |= watch(record, found[name])
            jobs[name] = replace(jobs[name], state=record.state)
            if (last := record.evaluation) is not None:
                scores = {"own": last.own, "new": last.clients if last.clients != last.own else []}
                found[name] |= {of: [round(x, 4) for x in each] for of, each in scores.items()}
            if record.state.round == jobs[name].rounds:
                found[name] |= at_end(jobs.pop(name))
    return found


class Kept:
    """The runs that have been made, by name, `only` these, in a file to which each is added at once; and in others."""

    def __init__(self, name: str, *others: str, only: Callable[[str], bool] = lambda run: True) -> None:
        self.file, *also = (KEPT / f"{each}.jsonl" for each in (name, *others))
        files = [file for file in (*also, self.file) if file.exists()]
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        self.rows: dict[str, Row] = {row["run"]: row for row in rows if only(row["run"])}

    def all(
        self,
        asked: Mapping[str, Sequence[str]],
        run: Callable[[Mapping[str, Sequence[str]]], Iterable[tuple[str, Row]]],
    ) -> list[Row]:
        """Return what runs came to; those that were not made before are made."""
        missing = {name: own for name, own in asked.items() if name not in self.rows}
        for name, row in run(missing) if missing else ():
            self.rows[name] = {"run": name, **row}
            with self.file.open("a") as kept_in:
                kept_in.write(json.dumps(self.rows[name]) + "\n")
        return [self.rows[name] for name in asked]


def share(part: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items of a part `k/n`: every n-th, from the k-th on."""
    number, parts = map(int, part.split("/"))
    return islice(items, number - 1, None, parts)


def told(values: Iterable[float], form: str = "+.3f") -> str:
    """Return a mean with its 95 % interval."""
    middle, low, high = interval([*values])
    if middle is None:
        return "–"
    return f"{middle:{form}}" if low is None else f"{middle:{form}} [{low:{form}}, {high:{form}}]"


Scores = Mapping[tuple[int, int], float]
"""(seed, fold) → the mean over clients; not a number where training diverged."""


def by_seed(found: Scores, common: Collection[tuple[int, int]]) -> dict[int, float]:
    """Return the mean over the folds that are `common`, by seed."""
    seeds = {seed for seed, _ in common}
    return {seed: fmean(found[at] for at in common if at[0] == seed) for seed in sorted(seeds)}


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Return the mean difference with its 95 % interval, and whether it is enough to tell."""
    middle, low, high = interval([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
    if middle is None or low is None or high is None:
        return ""
    unsure = low < 0 < high and high - low > MATTERS
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]{', not enough to tell' if unsure else ''}"


def options(name: str, doc: str | None, actions: Sequence[str], studies: Iterable[str]) -> argparse.Namespace:
    """Return what is asked of a benchmark that has several studies: an `action`, a `study` and a `part`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc)
    parser.add_argument("action", choices=actions)
    parser.add_argument("study", nargs="?", choices=list(studies), default="digits")
    parser.add_argument("--part", default="1/1", help="k/n: every n-th run, from the k-th on")
    return parser.parse_args()
