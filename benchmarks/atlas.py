"""When does alternation pay? `tad_lora` and others against `dec_lora` over graphs, rates, local steps and skews.

    python -m benchmarks.atlas run             # goes on where it stopped
    python -m benchmarks.atlas run --part 1/2  # every second group of runs; 2/2 in a second process has the others
    python -m benchmarks.atlas table           # of what has been run

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
from collections.abc import Iterator
from functools import partial
from itertools import product
from math import sqrt
from typing import NamedTuple

import torch

from benchmarks.studies import STUDIES, Kept, Row, scored
from peertune.rounds.metrics import product_norm
from peertune.rounds.record import RoundRecord
from peertune.types import Tensors, kind

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
PROBED = 15
"""Rounds after which what is measured on the way is kept."""


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


def _norm(adapters: Tensors, of: str) -> float:
    return sqrt(sum(float(x.double().square().sum()) / len(x) for name, x in adapters.items() if kind(name) == of))


def measured(record: RoundRecord) -> Row:
    """Return what is kept of a round: nothing, but of the one that is probed and of the last."""
    if record.state is None or (record.evaluation is None and record.state.round != PROBED):
        return {}
    held, seen = record.state.adapters, record.diagnostics
    norms = {"cross": product_norm(held)} | {of: _norm(held, of) for of in ("A", "B")}
    errors = {"cross": seen["cross_term"]} | {of: seen[f"consensus_error_{of}"] for of in ("A", "B")}
    relative = {of: float(f"{errors[of] / norm:.4g}") if norm else 0.0 for of, norm in norms.items()}
    return {"probe" if record.state.round == PROBED else "end": relative}


def run(part: str) -> None:
    """Run what has not been run: the first five seeds of all cells, then the others; a cell's runs as one stack."""
    number, parts = map(int, part.split("/"))
    torch.set_num_threads(1)
    kept = Kept("atlas")
    halves = OF.seeds[:5], OF.seeds[5:]
    for place, (seeds, cell) in enumerate(product(halves, cells())):
        if place % parts == number - 1:
            asked = {
                named(cell, method, seed): settings(cell, method, seed)
                for method, seed in product(methods(cell), seeds)
            }
            kept.all(asked, partial(scored, OF, watch=measured))


def main() -> None:
    """Run the atlas, or print what it comes to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.atlas", description=__doc__)
    parser.add_argument("action", choices=["run"])
    parser.add_argument("--part", default="1/1", help="k/n: every n-th group of runs, from the k-th on")
    run(parser.parse_args().part)


if __name__ == "__main__":
    main()
