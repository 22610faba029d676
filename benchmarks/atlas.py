"""When does alternation pay? `tad_lora` and others against `dec_lora` over graphs, rates, local steps and skews.

    python -m benchmarks.atlas run             # goes on where it stopped
    python -m benchmarks.atlas run --part 1/2  # every second group of runs; 2/2 in a second process has the others
    python -m benchmarks.atlas table           # of what has been run
    python -m benchmarks.atlas map FILE        # the same as a heat map

The protocol, written before anything was run.

A cell is a skew, an edge probability p, a number of local steps and a learning rate. Every cell has all combinations:

- skews: `writers`, twelve clients with a writer's digits each, two more writers left out; `mixture`, ten clients with
  .8 of one class and .05 of each other; `dirichlet`, ten clients, alpha .2;
- p = .02, .1 and .5: every pair of clients meets in a round with this probability;
- 1 and 5 local steps of 4 rows, in each of 60 rounds;
- rates .005, .01 and .02.

In each cell run `dec_lora`, `tad_lora`, `ffa_lora` and `fedrot_lora`, with their defaults. At each skew, number of
steps and rate run `local` and `server` besides: `dec_lora` on the complete graph at p = 1.

Ten seeds. A seed draws everything; seed s scores on fold 1 + s mod 5 of five over all rows, so each row scores for two
seeds. `new` is the mean accuracy of the clients' own models on rows that no client has: those of the two writers, or
the fold of all rows. `own`, of `writers` alone, is on the fold of each client's own rows, on which nobody trains.

All cells with the seeds 0 to 4 run first, then all with 5 to 9; in each half the rate .01 comes first. Nothing that is
seen stops the runs or adds any: the map is of all of them, or says of how many.

A difference is from `dec_lora` in the same cell, seed by seed, with Student's 95 % interval. Which cells differ at all
is decided for all of a method together: Benjamini and Yekutieli's procedure holds the share of false discoveries at
.05, whatever the cells share. Runs that diverge score 0.

A method that trains half of the factors may need another rate. So methods are compared once more with a rate for each:
the best of the three by the seeds 0 to 4 scores on 5 to 9, and the other way round.

On the way, after 15 rounds and at the end, each run of `dec_lora` says what might foretell the difference: the cross
term over the norm of the mean product, what clients disagree about over the norm of what they hold, for A and for B,
and the graph's rho. The prediction, and its error, are of cells that it was not fitted to: skew by skew.
"""

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, product
from math import sqrt
from statistics import fmean, pstdev
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import false_discovery_control, ttest_1samp

from benchmarks.studies import STUDIES, Kept, Row, scored, share, told
from peertune.planning.evidence import MEASURES, PREDICTORS, PROBED, WITHIN, Law, Predictor, Vector, features
from peertune.rounds.metrics import relative_disagreement
from peertune.rounds.record import RoundRecord
from peertune.topology import GRAPHS, rho

OF = STUDIES["digits"]._replace(
    settings=("rounds=60", "training.per_device_train_batch_size=4"), rates=(1e-2, 5e-3, 2e-2)
)
_MIXTURE = [[0.8 if c == client % 5 else 0.05 for c in range(5)] for client in range(10)]
SKEWS = {
    "writers": ("clients=12", "partition={name: writers}"),
    "mixture": ("clients=10", f"partition={{name: label_mixture, proportions: {_MIXTURE}}}"),
    "dirichlet": ("clients=10", "partition={name: dirichlet, alpha: 0.2}"),
}
PROBABILITIES = (0.02, 0.1, 0.5)
STEPS = (1, 5)
METHODS = ("dec_lora", "tad_lora", "ffa_lora", "fedrot_lora")
ENDS = {"local": ("local", 0.02), "server": ("dec_lora", 1.0)}
"""What bounds the methods from below and above → the method and the edge probability that it is."""
HALVES = OF.seeds[:5], OF.seeds[5:]
FALSE = 0.05
"""The share of what is taken for a difference and is none, at most."""


class Cell(NamedTuple):
    """Where methods are compared; those at both ends have no edge probability, 0."""

    skew: str
    p: float
    steps: int
    rate: float


def cells() -> Iterator[Cell]:
    """Yield all cells, those without an edge probability among them."""
    for rate, skew, p, steps in product(OF.rates, SKEWS, (0.0, *PROBABILITIES), STEPS):
        yield Cell(skew, p, steps, rate)


def methods(cell: Cell) -> tuple[str, ...]:
    """Return what is run in a cell."""
    return METHODS if cell.p else tuple(ENDS)


def clients(skew: str) -> int:
    """Return how many clients there are."""
    return int(SKEWS[skew][0].removeprefix("clients="))


def named(cell: Cell, method: str, seed: int) -> str:
    """Return a run's name."""
    return f"{cell.skew} p={cell.p:g} steps={cell.steps} rate={cell.rate:g} {method} seed={seed}"


def settings(cell: Cell, method: str, seed: int) -> list[str]:
    """Return what one run is made with."""
    algorithm, p = ENDS.get(method, (method, cell.p))
    fold = f"{1 + seed % OF.folds}/{OF.folds}"
    if cell.skew == "writers":
        scored_on = ["task={name: digits, held_out_writers: [12, 13]}"]
        scored_on += [f"evaluate={{every: 1000, on: both, held_out: {fold}}}"]
    else:
        scored_on = [f"task={{name: digits, validation_split: {fold}, test: validation}}", "evaluate={every: 1000}"]
    return [
        *SKEWS[cell.skew],
        *scored_on,
        f"algorithm.name={algorithm}",
        f"graph.activation={p}",
        f"training.local_steps={cell.steps}",
        f"training.learning_rate={cell.rate}",
        f"seed={seed}",
    ]


def measured(record: RoundRecord) -> Row:
    """Return what is kept of a round: nothing, but of the one that is probed and of the last."""
    if record.state is None or (record.evaluation is None and record.state.round != PROBED):
        return {}
    seen = relative_disagreement(record.state.adapters, record.diagnostics)
    relative = {of: float(f"{value:.4g}") for of, value in seen.items()}
    return {"probe" if record.state.round == PROBED else "end": relative}


def run(part: str) -> None:
    """Run what has not been run: the first five seeds of all cells, then the others; a cell's runs as one stack."""
    torch.set_num_threads(1)
    kept = Kept("atlas")
    for seeds, cell in share(part, product(HALVES, cells())):
        asked = {
            named(cell, method, seed): settings(cell, method, seed) for method, seed in product(methods(cell), seeds)
        }
        kept.all(asked, partial(scored, OF, watch=lambda record, _: measured(record)))


BySeed = dict[Cell, dict[int, float]]
"""Cell → seed → a score, or a difference of two."""


def scores(method: str) -> BySeed:
    """Return what a method scored: the mean over the clients' own models, 0 where training diverged.

    What has no edge probability stands in the cells of all three.
    """
    kept, found = Kept("atlas").rows, BySeed()
    for cell, seed in product(cells(), OF.seeds):
        row = kept.get(named(cell if method in METHODS else cell._replace(p=0.0), method, seed))
        if cell.p and row is not None:
            found.setdefault(cell, {})[seed] = fmean(row["new"] or [0.0])
    return found


def ahead(ours: BySeed, theirs: BySeed) -> BySeed:
    """Return by how much the one is ahead of the other, in each cell and for each seed that both have."""
    return {
        cell: {seed: own[seed] - theirs[cell][seed] for seed in common}
        for cell, own in ours.items()
        if (common := sorted(own.keys() & theirs.get(cell, {}).keys()))
    }


def at_best_rate(found: BySeed) -> BySeed:
    """Return the scores at the rate that is best by the other half of the seeds; of cells with all rates and seeds."""
    rates: dict[Cell, dict[float, dict[int, float]]] = {}
    for cell, each in found.items():
        if each.keys() == {*OF.seeds}:
            rates.setdefault(cell._replace(rate=0.0), {})[cell.rate] = each

    def best(of: Mapping[float, Mapping[int, float]], seeds: Sequence[int]) -> Mapping[int, float]:
        return of[max(sorted(of), key=lambda rate: fmean(of[rate][seed] for seed in seeds))]

    return {
        cell: {seed: best(of, others)[seed] for half, others in (HALVES, HALVES[::-1]) for seed in half}
        for cell, of in rates.items()
        if len(of) == len(OF.rates)
    }


def discovered(found: BySeed) -> set[Cell]:
    """Return the cells with a difference, of which at most .05 have none: Benjamini and Yekutieli (2001).

    Each cell has a paired t-test over its seeds; one in which all seeds differ by the same is sure.
    """
    tried = {cell: list(each.values()) for cell, each in found.items() if len(each) > 1}
    if not tried:
        return set()
    chances = [float(not each[0]) if len({*each}) == 1 else ttest_1samp(each, 0).pvalue for each in tried.values()]
    return {cell for cell, p in zip(tried, false_discovery_control(chances, method="by"), strict=True) if p <= FALSE}


def probes(cell: Cell, kept: Mapping[str, Row]) -> dict[int, Mapping[str, float]]:
    """Return what `dec_lora` shows of a cell after the first rounds, by seed; {} if it diverged."""
    rows = {seed: kept[name] for seed in OF.seeds if (name := named(cell, "dec_lora", seed)) in kept}
    return {seed: row["probe"] for seed, row in rows.items()} if all("probe" in row for row in rows.values()) else {}


def seen_of(cell: Cell, each: Collection[Mapping[str, float]]) -> Vector:
    """Return a cell's features, of the mean over some probes."""
    return features({of: fmean(seen[of] for seen in each) for of in MEASURES}, cell_rho(cell))


def cell_rho(cell: Cell) -> float:
    """Return the rho of a cell's graph."""
    return _rho(clients(cell.skew), cell.p)


@cache
def _rho(clients: int, activation: float) -> float:
    return rho(GRAPHS["complete"](clients=clients, seed=0, activation=activation), draws=4_000)


def foretold(found: BySeed, by: Predictor) -> BySeed:
    """Return the mean difference that the other skews' cells foretell, by what each seed of `dec_lora` shows."""
    kept, told = Kept("atlas").rows, BySeed()
    seen = {cell: each for cell in found if (each := probes(cell, kept))}
    for skew in SKEWS:
        others = [cell for cell in seen if cell.skew != skew]
        if len(others) < 12:  # more than twice what is fitted
            continue
        known = np.array([seen_of(cell, seen[cell].values()) for cell in others])
        differences = np.array([fmean(found[cell].values()) for cell in others])
        for cell in seen:
            if cell.skew == skew:
                told[cell] = {n: by(known, differences, seen_of(cell, [probe])) for n, probe in seen[cell].items()}
    return told


def missed(found: BySeed, by: Predictor) -> dict[str, list[float]]:
    """Return for each skew by how much its cells' mean differences are missed that the other skews' cells foretell."""
    apart: dict[str, list[float]] = {}
    for cell, each in foretold(found, by).items():
        apart.setdefault(cell.skew, []).extend(abs(x - fmean(found[cell].values())) for x in each.values())
    return apart


def law(found: BySeed) -> Law | None:
    """Return what foretells a difference best; None where there are too few cells. Of equals the simplest."""
    by_skew = {name: missed(found, by) for name, by in PREDICTORS.items()}
    if not all(by_skew.values()):
        return None
    errors = {name: sqrt(fmean(x * x for x in chain(*each.values()))) for name, each in by_skew.items()}
    best = min(errors, key=errors.__getitem__)
    return Law(best, errors, max(float(np.quantile(each, WITHIN)) for each in by_skew[best].values()))


def table() -> None:
    """Print what the cells come to, as Markdown: at each rate, and at each method's best; then what is foretold."""
    scored_by, others = {method: scores(method) for method in (*METHODS, *ENDS)}, [*METHODS[1:], *ENDS]
    made = sum(map(len, scored_by["dec_lora"].values()))
    print(f"{made} of {len(OF.seeds) * sum(cell.p > 0 for cell in cells())} seeds and cells")
    for shown in (scored_by, {method: at_best_rate(each) for method, each in scored_by.items()}):
        base = shown["dec_lora"]
        found = {method: ahead(shown[method], base) for method in others}
        sure = {method: discovered(each) for method, each in found.items()}
        print(f"\n| skew | p | steps | rate | seeds | dec_lora | {' | '.join(others)} |")
        print(f"|---|---:|---:|---:|---:|---:|{'---|' * len(others)}")
        for cell, own in sorted(base.items()):
            columns = [
                f"{told(each[cell].values())}{' *' if cell in sure[method] else ''}" if cell in each else "–"
                for method, each in found.items()
            ]
            first = f"{cell.skew} | {cell.p:g} | {cell.steps} | {cell.rate or 'best'} | {len(own)}"
            print(f"| {first} | {fmean(own.values()):.3f} | {' | '.join(columns)} |")
    print(f"\n| method | spread | {' | '.join(f'missed by {name}' for name in PREDICTORS)} | best | 95 % within |")
    print(f"|---|---:|{'---:|' * len(PREDICTORS)}---|---:|")
    for method in METHODS[1:]:
        differences = ahead(scored_by[method], scored_by["dec_lora"])
        if (best := law(differences)) is not None:
            spread = pstdev(fmean(each.values()) for each in differences.values())
            errors = " | ".join(f"{error:.3f}" for error in best.errors.values())
            print(f"| {method} | {spread:.3f} | {errors} | {best.by} | {best.within:.3f} |")


def draw(file: str) -> None:
    """Draw by how much methods are ahead of `dec_lora`, a panel for each one and skew; outlined where that is sure."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    base = scores("dec_lora")
    columns, rows = [*product(PROBABILITIES, STEPS)], sorted(OF.rates)
    figure = Figure(figsize=(3.4 * len(SKEWS), 2.1 * (len(METHODS) - 1)), dpi=150, layout="constrained")
    panels = figure.subplots(len(METHODS) - 1, len(SKEWS), squeeze=False)
    found = {method: ahead(scores(method), base) for method in METHODS[1:]}
    sure = {method: discovered(each) for method, each in found.items()}
    for (method, skew), axes in zip(product(found, SKEWS), panels.flat, strict=True):
        values = np.full((len(rows), len(columns)), np.nan)
        for (y, rate), (x, (p, steps)) in product(enumerate(rows), enumerate(columns)):
            if (cell := Cell(skew, p, steps, rate)) in found[method]:
                values[y, x] = fmean(found[method][cell].values())
                colour = "white" if abs(values[y, x]) > 0.06 else "black"
                axes.text(x, y, f"{100 * values[y, x]:+.1f}", ha="center", va="center", fontsize=7, color=colour)
                if cell in sure[method]:
                    axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, linewidth=1.5))
        image = axes.imshow(values, cmap="RdBu", vmin=-0.1, vmax=0.1, aspect="auto")
        axes.set_xticks(range(len(columns)), [f"{p:g}\n{steps}" for p, steps in columns], fontsize=7)
        axes.set_yticks(range(len(rows)), [f"{rate:g}" for rate in rows], fontsize=7)
        axes.set_title(f"{method}, {skew}", fontsize=9, loc="left")
    figure.supxlabel("edge probability, and local steps in a round", fontsize=8)
    figure.supylabel("learning rate", fontsize=8)
    bar = figure.colorbar(image, ax=panels, label="points of accuracy ahead of dec_lora")
    bar.set_ticks([-0.1, -0.05, 0, 0.05, 0.1], labels=["-10", "-5", "0", "+5", "+10"])
    figure.savefig(file)


def main() -> None:
    """Run the atlas, or print what it comes to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.atlas", description=__doc__)
    parser.add_argument("action", choices=["run", "table", "map"])
    parser.add_argument("file", nargs="?", help="where the map goes, such as docs/atlas.svg")
    parser.add_argument("--part", default="1/1", help="k/n: every n-th group of runs, from the k-th on")
    options = parser.parse_args()
    if options.action == "run":
        run(options.part)
    elif options.action == "table":
        table()
    elif options.file is None:
        parser.error("map: give the FILE that it goes to")
    else:
        draw(options.file)


if __name__ == "__main__":
    main()
