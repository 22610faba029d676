"""What the studies share: two data sets, the rows that score, runs that are kept, and pairs by seed."""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.setup import overrides
from peertune import build, load_recipe, simulate
from peertune.errors import ModelError
from peertune.report.pairing import interval
from peertune.rounds.round import Job

KEPT = Path("benchmarks/results")
MATTERS = 0.02  # an interval that is wider, with 0 in it, tells nothing

Row = dict[str, Any]


class Study(NamedTuple):
    """What one data set is run with."""

    recipe: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    folds: int
    scored: tuple[int, ...]  # the folds that are
    chosen_by: str  # the score that chooses a rate


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
    ),
    "sst2": Study(
        "tad-sst2-minilm",
        (
            "model.dropout=false",
            "rounds=50",
            "training.local_steps=3",
            "training.per_device_train_batch_size=8",
        ),
        tuple(range(5)),
        1,
        (1,),
        "new",
    ),
}
STUDIES["changes"] = STUDIES["digits"]._replace(scored=(1, 2))


def held_out(study: str, fold: int, choosing: bool) -> str:
    """Return the recipe's `evaluate` block."""
    if study == "sst2":
        return f"evaluate={{every: 1000, fold: {'1/2' if choosing else '2/2, on: both, held_out: 1/20'}}}"
    folds = STUDIES[study].folds
    if not choosing:
        return f"evaluate={{every: 1000, on: both, held_out: {fold}/{folds}}}"
    return f"evaluate={{every: 1000, on: own, held_out: {fold % folds + 1}/{folds}, set_aside: {fold}/{folds}}}"


def scored(study: str, settings: Sequence[str], look: Callable[[Job], Row] = lambda job: {}) -> Row:
    """Run once and return the clients' scores after the last round; [] where training diverged.

    `look` says what else is kept of the job.
    """
    of, begun = STUDIES[study], time.process_time()
    base = overrides()[:-1] if study == "sst2" else []
    job = build(load_recipe(of.recipe, [*base, *of.settings, *settings])).job
    found: dict[str, list[float]] = {"own": [], "new": []}
    try:
        for record in simulate(job):
            if (last := record.evaluation) is not None:
                found = {"own": last.own, "new": last.clients if last.clients != last.own else []}
    except ModelError:  # diverged
        found = {"own": [], "new": []}
    rounded = {name: [round(x, 4) for x in scores] for name, scores in found.items()}
    return {**rounded, **look(job), "seconds": round(time.process_time() - begun, 1)}


class Kept:
    """The runs that have been made, by name, `only` these, in a file to which each is added at once; and in others."""

    def __init__(self, name: str, *others: str, only: Callable[[str], bool] = lambda run: True) -> None:
        self.file, *also = (KEPT / f"{each}.jsonl" for each in (name, *others))
        files = [file for file in (*also, self.file) if file.exists()]
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        self.rows: dict[str, Row] = {row["run"]: row for row in rows if only(row["run"])}

    def once(self, name: str, run: Callable[[], Row]) -> Row:
        """Return what a run came to, which is made unless it was before."""
        if name not in self.rows:
            self.rows[name] = {"run": name, **run()}
            with self.file.open("a") as kept_in:
                kept_in.write(json.dumps(self.rows[name]) + "\n")
        return self.rows[name]


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
