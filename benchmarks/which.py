"""Which method? Learning rates chosen on other rows and other seeds, then scores, as pairs by seed.

    python -m benchmarks.which run digits             # changes, sgd; sst2, with SST2=FOLDER; goes on where it stopped
    python -m benchmarks.which run digits --part 1/2  # every second cell; 2/2 in a second process has the others
    python -m benchmarks.which table digits           # of the folds in which all cells have been run
    python -m benchmarks.which again digits "dec_lora p=0.5 fold=1 rate=0.01 seed=0"  # beside what is kept of it

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

`sgd`: the modifiers that were derived for SGD, with their defaults, and `dec_lora` itself, by `optim: sgd`. Two folds.
It was added when `changes` had shown that both spoil what AdamW does. Its grid of rates was placed after one run with
seed 100 for each of four rates had been looked at.

`sst2`: ten clients with the papers' mixture of labels, MiniLM-L6. Rates by the first half of the validation set, scores
on the second. Three seeds. `new` is of the second half, `own` of a twentieth of each client's rows. Its
grid of rates was placed after seed 100 had been looked at: `dec_lora` and `decaf` learn at 2e-3, and nothing at 4e-2.

Differences are from `dec_lora` on the same graph, seed by seed, with Student's 95 % interval. `local` and the servers
are held against it on both graphs. Not enough to tell: an interval that has 0 in it and is wider than two points.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from statistics import fmean
from typing import NamedTuple

import torch

from benchmarks.studies import STUDIES, Kept, Row, Scores, by_seed, held_out, paired, scored, share
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.modifiers import DERIVED_FOR_SGD

MODIFIED = {name: f"modifiers=[{{name: {name}}}]" for name in ("fedspeed", "dfed_admm", "mix_moments", "half")}
STARTS = {name: f"lora.init_lora_weights={name}" for name in ("gaussian", "pissa", "olora")}
CHANGES = {f"dec_lora+{name}": setting for name, setting in (MODIFIED | STARTS).items()}
"""What changes `dec_lora` → how a recipe says so."""
CHOOSING = (100, 101)  # seeds that choose a rate and score nothing
SERVER = ("dec_lora", "ffa_lora", "rolora")


class Cell(NamedTuple):
    """A method on a graph."""

    method: str
    activation: float


def cells(study: str) -> Iterator[Cell]:
    """Yield all cells; a client alone needs no graph."""
    if study in ("changes", "sgd"):
        changed = CHANGES if study == "changes" else [f"dec_lora+{name}" for name in DERIVED_FOR_SGD]
        yield from (Cell(method, activation) for activation in (0.5, 0.02) for method in ("dec_lora", *changed))
        return
    for activation, method in product((0.5, 0.02), ALGORITHMS):
        if method != "local" or activation == 0.5:
            yield Cell(method, activation)
    yield from (Cell(method, 1.0) for method in SERVER)


def settings(study: str, cell: Cell, rate: float, seed: int, fold: int, choosing: bool) -> list[str]:
    """Return what one run is made with."""
    return [
        *(["training.loraplus_lr_ratio=2"] if cell.method == "la_lora" else []),
        *([CHANGES[cell.method]] if cell.method in CHANGES else []),
        f"algorithm.name={cell.method.partition('+')[0]}",
        f"graph.activation={cell.activation}",
        f"training.learning_rate={rate}",
        f"seed={seed}",
        held_out(study, fold, choosing),
    ]


def run(study: str, part: str) -> None:
    """Run what has not been run: fold by fold, for each cell its rates, then its scores."""
    torch.set_num_threads(1)
    of, runs = STUDIES[study], kept(study)

    def all_of(cell: Cell, fold: int, choosing: bool, rates: Sequence[float], seeds: Sequence[int]) -> list[Row]:
        asked = {
            f"{cell.method} p={cell.activation:g} fold={fold} rate={rate:g} seed={seed}": settings(
                study, cell, rate, seed, fold, choosing
            )
            for rate, seed in product(rates, seeds)
        }
        return runs.all(asked, partial(scored, of))

    for fold, cell in product(of.scored, share(part, cells(study))):
        rows = iter(all_of(cell, fold, True, of.rates, CHOOSING))
        rate = best(study, {rate: [next(rows) for _ in CHOOSING] for rate in of.rates})
        all_of(cell, fold, False, [rate], of.seeds)


def parsed(name: str) -> tuple[Cell, int, str, int]:
    """Return what a run's name says: its cell, its fold, its rate as it is written, and its seed."""
    method, *rest = name.split()
    p, fold, rate, seed = (setting.partition("=")[2] for setting in rest)
    return Cell(method, float(p)), int(fold), rate, int(seed)


def again(study: str, name: str) -> tuple[Row, Row]:
    """Make a run that is kept once more; return what it comes to, and what is kept of it."""
    torch.set_num_threads(1)
    cell, fold, rate, seed = parsed(name)
    of = settings(study, cell, float(rate), seed, fold, seed in CHOOSING)
    ((_, row),) = scored(STUDIES[study], {name: of})
    return row, kept(study).rows[name]


def print_again(study: str, names: Sequence[str]) -> None:
    """Print what kept runs come to when they are made once more, as Markdown."""
    print("| run | own, kept | again | clients that differ | new, kept | again | clients that differ |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in names:
        now, was = again(study, name)
        columns = []
        for score in ("own", "new"):
            differ = sum(one != other for one, other in zip(was[score], now[score], strict=True))
            columns += [f"{fmean(row[score]):.3f}" if row[score] else "–" for row in (was, now)] + [str(differ)]
        print(f"| {name} | {' | '.join(columns)} |", flush=True)


def best(study: str, tried: Mapping[float, list[Row]]) -> float:
    """Return the rate with the best mean score; one at which a run diverged comes last, the lower of equals first."""
    by = STUDIES[study].chosen_by

    def score(rate: float) -> float:
        each = [row[by] for row in tried[rate]]
        return fmean(map(fmean, each)) if all(each) else -1.0

    return max(sorted(tried), key=score)


def kept(study: str) -> Kept:
    """Return what has been run on the study's folds."""
    also = ["which-digits"] if study == "changes" else []
    folds = {f"fold={fold}" for fold in STUDIES[study].scored}
    return Kept(f"which-{study}", *also, only=lambda name: not folds.isdisjoint(name.split()))


def folds(study: str, found: Mapping[Cell, Scores]) -> list[int]:
    """Return the folds in which every cell has a score of each seed; all in which any has one, where there are none."""
    of = STUDIES[study]
    whole = [
        fold
        for fold in of.scored
        if all((seed, fold) in found.get(cell, {}) for cell, seed in product(cells(study), of.seeds))
    ]
    return whole or sorted({fold for each in found.values() for _, fold in each})


def scores(study: str, score: str) -> dict[Cell, dict[tuple[int, int], float]]:
    """Return what each cell scored in its runs that chose no rate."""
    found: dict[Cell, dict[tuple[int, int], float]] = {}
    for name, row in kept(study).rows.items():
        cell, fold, _, seed = parsed(name)
        if seed not in CHOOSING:
            value = fmean(row[score]) if row[score] else float("nan")
            found.setdefault(cell, {})[seed, fold] = value
    return found


def table(study: str) -> None:
    """Print what the cells come to, as Markdown."""
    scored_by = {score: scores(study, score) for score in ("own", "new")}
    shown = folds(study, scored_by["new"])
    for score, found in scored_by.items():
        scored_by[score] = {
            cell: own for cell, each in found.items() if (own := {at: x for at, x in each.items() if at[1] in shown})
        }
    rates: dict[Cell, set[str]] = {}
    for name in kept(study).rows:
        cell, fold, rate, seed = parsed(name)
        if seed not in CHOOSING and fold in shown:
            rates.setdefault(cell, set()).add(rate)
    print(f"folds {', '.join(map(str, shown))} of {STUDIES[study].folds}\n")
    print("| method | p | rates | seeds | own | from dec_lora | new | from dec_lora |")
    print("|---|---:|---|---:|---:|---|---:|---|")
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
    """Run a study, print its table, or make runs of it once more."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.which", description=__doc__)
    parser.add_argument("action", choices=["run", "table", "again"])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--part", default="1/1", help="k/n: every n-th cell, from the k-th on")
    parser.add_argument("names", nargs="*", help="of kept runs, to be made again")
    options = parser.parse_args()
    if options.action == "run":
        run(options.study, options.part)
    elif options.action == "again":
        print_again(options.study, options.names)
    else:
        table(options.study)


if __name__ == "__main__":
    main()
