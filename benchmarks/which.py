"""Which method? Learning rates chosen on other rows and other seeds, then scores, as pairs by seed.

    python -m benchmarks.which run digits             # or changes; or sst2, with SST2=FOLDER; goes on where it stopped
    python -m benchmarks.which run digits --part 1/2  # every second cell; 2/2 in a second process has the others
    python -m benchmarks.which table digits           # of what has been run

The protocol, written before anything was run.

A cell is a method and a graph: each method at p = .5 and .02 (every pair of clients meets in a round with this
probability), `local`, and with a server, which is the complete graph at p = 1, `dec_lora` (FedAvg), `ffa_lora` and
`rolora`. Methods have their defaults, but `la_lora` its authors' rate of B, twice that of A. Each cell's learning rate
is one of five, the best of the mean over two seeds that score nothing, on rows that score nothing.

`digits`: twelve clients, each with the digits of one writer; the last two writers belong to nobody. 40 rounds of 3
local steps of 4 rows. All rows of the twelve are in five folds. For scores on a fold each client holds out its rows in
it, and trains on the rest; the rate is then one that was best on the next fold, in runs in which nobody had the first.
Ten seeds for each fold. Scores are of the clients' own models: `own`, on what each holds out, and `new`, on the two
writers that no run trained on. A seed's score is its mean over folds. The grid of rates was placed after four cells had
been looked at with seed 100.

`changes`: the same digits, with what changes `dec_lora`: each modifier that any method takes, and each start of the
factors, with its defaults. Two folds of the five; `dec_lora` itself is that of `digits`.

`sst2`: ten clients with the papers' mixture of labels, MiniLM-L6. Rates by the first half of the validation set, scores
on the second. Three seeds, then two more. `new` is of the second half, `own` of a twentieth of each client's rows.

Differences are from `dec_lora` on the same graph, seed by seed, with Student's 95 % interval. `local` and the servers
are held against it on both graphs. Not enough to tell: an interval that has 0 in it and is wider than two points.
"""

import argparse
import json
import time
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from benchmarks.setup import overrides
from peertune import build, load_recipe, simulate
from peertune.errors import ModelError
from peertune.methods.catalogue import ALGORITHMS
from peertune.report.pairing import interval

MODIFIED = {name: f"modifiers=[{{name: {name}}}]" for name in ("fedspeed", "dfed_admm", "mix_moments", "half")}
STARTS = {name: f"lora.init_lora_weights={name}" for name in ("gaussian", "pissa", "olora")}
CHANGES = {f"dec_lora+{name}": setting for name, setting in (MODIFIED | STARTS).items()}
"""What changes `dec_lora` → how a recipe says so."""
KEPT = Path("benchmarks/results")
RATES = (2e-3, 5e-3, 1e-2, 2e-2, 4e-2)
CHOOSING = (100, 101)  # seeds that choose a rate and score nothing
SERVER = ("dec_lora", "ffa_lora", "rolora")
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


class Cell(NamedTuple):
    """A method on a graph."""

    method: str
    activation: float


def cells(study: str) -> Iterator[Cell]:
    """Yield all cells; a client alone needs no graph."""
    if study == "changes":
        yield from (Cell(method, activation) for activation in (0.5, 0.02) for method in ("dec_lora", *CHANGES))
        return
    for activation, method in product((0.5, 0.02), ALGORITHMS):
        if method != "local" or activation == 0.5:
            yield Cell(method, activation)
    yield from (Cell(method, 1.0) for method in SERVER)


def held_out(study: str, fold: int, choosing: bool) -> str:
    """Return the recipe's `evaluate` block."""
    if study == "sst2":
        return f"evaluate={{every: 1000, fold: {'1/2' if choosing else '2/2, on: both, held_out: 1/20'}}}"
    folds = STUDIES[study].folds
    if not choosing:
        return f"evaluate={{every: 1000, on: both, held_out: {fold}/{folds}}}"
    return f"evaluate={{every: 1000, on: own, held_out: {fold % folds + 1}/{folds}, set_aside: {fold}/{folds}}}"


def scored(study: str, cell: Cell, rate: float, seed: int, fold: int, choosing: bool) -> Row:
    """Run once and return the clients' scores after the last round; [] where training diverged."""
    of, begun = STUDIES[study], time.process_time()
    base = overrides()[:-1] if study == "sst2" else []
    extra = ["training.loraplus_lr_ratio=2"] if cell.method == "la_lora" else []
    extra += [CHANGES[cell.method]] if cell.method in CHANGES else []
    settings = [
        f"algorithm.name={cell.method.partition('+')[0]}",
        f"graph.activation={cell.activation}",
        f"training.learning_rate={rate}",
        f"seed={seed}",
        held_out(study, fold, choosing),
    ]
    found: dict[str, list[float]] = {"own": [], "new": []}
    try:
        for record in simulate(build(load_recipe(of.recipe, [*base, *of.settings, *extra, *settings])).job):
            if (last := record.evaluation) is not None:
                found = {"own": last.own, "new": last.clients if last.clients != last.own else []}
    except ModelError:  # diverged
        found = {"own": [], "new": []}
    rounded = {name: [round(x, 4) for x in scores] for name, scores in found.items()}
    return {**rounded, "seconds": round(time.process_time() - begun, 1)}


def run(study: str, part: str) -> None:
    """Run what has not been run: fold by fold, for each cell its rates, then its scores."""
    file = KEPT / f"which-{study}.jsonl"
    number, parts = map(int, part.split("/"))
    torch.set_num_threads(1)
    of, done = STUDIES[study], kept(study)

    def once(cell: Cell, rate: float, seed: int, fold: int, choosing: bool) -> Row:
        name = f"{cell.method} p={cell.activation:g} fold={fold} rate={rate:g} seed={seed}"
        if name not in done:
            done[name] = {"run": name, **scored(study, cell, rate, seed, fold, choosing)}
            with file.open("a") as kept_in:
                kept_in.write(json.dumps(done[name]) + "\n")
        return done[name]

    for fold, (place, cell) in product(of.scored, enumerate(cells(study))):
        if place % parts != number - 1:
            continue
        tried = {rate: [once(cell, rate, seed, fold, True) for seed in CHOOSING] for rate in RATES}
        rate = best(study, tried)
        for seed in of.seeds:
            once(cell, rate, seed, fold, False)


def best(study: str, tried: Mapping[float, list[Row]]) -> float:
    """Return the rate with the best mean score; one at which a run diverged comes last, the lower of equals first."""
    by = STUDIES[study].chosen_by

    def score(rate: float) -> float:
        each = [row[by] for row in tried[rate]]
        return fmean(map(fmean, each)) if all(each) else -1.0

    return max(sorted(tried), key=score)


def kept(study: str) -> dict[str, Row]:
    """Return what has been run on the study's folds, by name."""
    files = [KEPT / f"which-{name}.jsonl" for name in (study, *(["digits"] if study == "changes" else []))]
    rows = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    folds = {f"fold={fold}" for fold in STUDIES[study].scored}
    return {row["run"]: row for row in rows if folds & {*row["run"].split()}}


Scores = Mapping[tuple[int, int], float]
"""(seed, fold) → the mean over clients; not a number where training diverged."""


def scores(study: str, score: str) -> dict[Cell, dict[tuple[int, int], float]]:
    """Return what each cell scored in its runs that chose no rate."""
    found: dict[Cell, dict[tuple[int, int], float]] = {}
    for name, row in kept(study).items():
        method, *settings = name.split()
        p, fold, _, seed = (setting.partition("=")[2] for setting in settings)
        if int(seed) not in CHOOSING:
            value = fmean(row[score]) if row[score] else float("nan")
            found.setdefault(Cell(method, float(p)), {})[int(seed), int(fold)] = value
    return found


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


def table(study: str) -> None:
    """Print what the cells come to, as Markdown."""
    print("| method | p | rates | seeds | own | from dec_lora | new | from dec_lora |")
    print("|---|---:|---|---:|---:|---|---:|---|")
    rates: dict[Cell, set[str]] = {}
    for name in kept(study):
        method, p, _, rate, seed = name.split()
        if int(seed.removeprefix("seed=")) not in CHOOSING:
            rates.setdefault(Cell(method, float(p[2:])), set()).add(rate.removeprefix("rate="))
    scored_by = {score: scores(study, score) for score in ("own", "new")}
    for cell in cells(study):
        if cell not in rates:
            continue
        columns = []
        for found in scored_by.values():
            own, told = found[cell], []
            alone = cell.activation == 1 or cell.method == "local"
            for activation in (0.5, 0.02):
                other = found.get(Cell("dec_lora", activation), {})
                if alone or (activation == cell.activation and cell.method != "dec_lora"):
                    common = own.keys() & other.keys()
                    difference = paired(by_seed(own, common), by_seed(other, common))
                    told.append(f"{difference}{f' (p = {activation:g})' if alone else ''}")
            columns += [f"{fmean(own.values()):.3f}", "; ".join(told) or "–"]
        seeds = len({seed for seed, _ in own})
        where = "–" if cell.method == "local" else f"{cell.activation:g}"
        tried = ", ".join(sorted(rates[cell], key=float))
        print(f"| {cell.method} | {where} | {tried} | {seeds} | {' | '.join(columns)} |")


def main() -> None:
    """Run a study, or print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.which", description=__doc__)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--part", default="1/1", help="k/n: every n-th cell, from the k-th on")
    options = parser.parse_args()
    if options.action == "run":
        run(options.study, options.part)
    else:
        table(options.study)


if __name__ == "__main__":
    main()
