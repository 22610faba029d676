"""What privacy of single rows costs in accuracy: methods × epsilon, as pairs by seed.

    python -m benchmarks.epsilons look     # rates and norms, on a seed that the study does not use
    python -m benchmarks.epsilons looked   # what was looked at
    python -m benchmarks.epsilons run      # goes on where it was stopped; --part 1/2 and 2/2 for two
    python -m benchmarks.epsilons table    # of what has been run

The protocol, written before anything of it was run.

Recipe `digits-writers`: of fourteen writers ten are clients, one each, and four are nobody's: in fold f those from 3 f
on, in a circle. Every pair meets in a round with the chance .5. 20 rounds of 3 local steps, 16 rows a step in the mean,
AdamW; a client has about a hundred rows, so a step takes about one in six. Methods: `dec_lora`, `ffa_lora`, `tad_lora`,
and `local` as what mixing has to beat. Epsilon is 1, 3, 8 or none, of each client, with delta 1e-5. The noise is each
client's own; noise that cancels between neighbours, and a trusted server, are not built, so they are not in it.

First, with seed 100: rates .003, .01 and .03, and rows' norms .1 and 1, with epsilon 3; without privacy the rates
alone. Of each method the pair is chosen with the best mean of the clients' own models; it then holds for all three
epsilons, and without privacy the rate that was chosen there.

Then ten seeds, seed s in fold s mod 5. Scores are on rows of the writers that are nobody's, after the last round: the
mean over the clients' own models, and the averaged adapter's. Told is what privacy costs: the score without it less
that with it, seed by seed, with Student's 95 % interval; and by how much a method is ahead of `dec_lora`.

A run takes 10 to 20 s of a core: the look 30 runs, the study 4 × 4 × 10.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from statistics import fmean

import torch

from benchmarks.studies import STUDIES as SHARED
from benchmarks.studies import Asked, Kept, Row, options, scored, share, told
from peertune.rounds.record import RoundRecord

STUDY = SHARED["digits"]._replace(
    recipe="digits-writers",
    settings=(
        "clients=10",
        "partition={name: writers}",
        "evaluate={every: 1000}",
        "graph={name: complete, activation: 0.5}",
        "rounds=20",
        "training.local_steps=3",
        "training.per_device_train_batch_size=16",
    ),
)
METHODS = ("dec_lora", "ffa_lora", "tad_lora", "local")
NONE = "none"
EPSILONS = (NONE, "8", "3", "1")
RATES, NORMS = ("0.003", "0.01", "0.03"), ("0.1", "1")
WRITERS = 14
LOOKED_AT, LOOKED_EPSILON = 100, "3"
CHOSEN: Mapping[tuple[str, bool], tuple[str, str]] = {
    ("dec_lora", False): ("0.03", "0"),
    ("ffa_lora", False): ("0.03", "0"),
    ("tad_lora", False): ("0.03", "0"),
    ("local", False): ("0.01", "0"),
    ("dec_lora", True): ("0.03", "0.1"),
    ("ffa_lora", True): ("0.03", "0.1"),
    ("tad_lora", True): ("0.03", "0.1"),
    ("local", True): ("0.01", "0.1"),
}
"""Method, and whether it is private → its rate, and the norm to which rows' gradients are cut."""


def named(method: str, epsilon: str, rate: str, norm: str, seed: int) -> str:
    """Return a run's name."""
    return f"{method} | {epsilon} | {rate} {norm} | seed={seed}"


def settings(method: str, epsilon: str, rate: str, norm: str, seed: int) -> list[str]:
    """Return what one run is made with."""
    private = f"privacy={{epsilon: {epsilon}, delta: 1e-5, max_grad_norm: {norm}}}"
    return [
        f"algorithm.name={method}",
        f"training.learning_rate={rate}",
        *([private] if epsilon != NONE else []),
        f"task={{name: digits, held_out_writers: {sorted((3 * (seed % 5) + k) % WRITERS for k in range(4))}}}",
        f"seed={seed}",
    ]


def average(record: RoundRecord, found: Row) -> Row:
    """Return the averaged adapter's score, of the round that is evaluated, and what was spent."""
    if record.evaluation is None or record.evaluation.average is None:
        return {}
    return {"average": round(record.evaluation.average, 4), "epsilon": max(record.epsilon, default=None)}


def looked_at() -> Iterator[Asked]:
    """Yield what is run with the seed that is looked at, as stacks."""
    for method in METHODS:
        for epsilon, norms in ((LOOKED_EPSILON, NORMS), (NONE, ("0",))):
            ways = [(method, epsilon, rate, norm, LOOKED_AT) for rate, norm in product(RATES, norms)]
            yield {named(*way): settings(*way) for way in ways}


def asked() -> Iterator[Asked]:
    """Yield the study's runs, a seed after the other, as stacks."""
    for seed in STUDY.seeds:
        for epsilon in EPSILONS:
            own = {method: CHOSEN[method, epsilon != NONE] for method in METHODS}
            yield {
                named(method, epsilon, *chosen, seed): settings(method, epsilon, *chosen, seed)
                for method, chosen in own.items()
            }


def kept() -> Kept:
    """Return what has been run."""
    return Kept("epsilons-digits")


def run(part: str, all_of: Iterator[Asked]) -> None:
    """Run what has not been run."""
    torch.set_num_threads(1)
    runs = kept()
    for some in share(part, all_of):
        runs.all(some, partial(scored, STUDY, watch=average))


def score(row: Row, which: str) -> float:
    """Return the clients' mean score, or the averaged adapter's; 0 where training diverged."""
    return float(row.get("average", 0.0)) if which == "average" else fmean(row["new"] or [0.0])


def look() -> None:
    """Print what was looked at, the best first, as Markdown."""
    rows = kept().rows
    print("| method | epsilon | rate | norm | clients | average |\n|---|---|---|---|---:|---:|")
    for method, epsilon in product(METHODS, (NONE, LOOKED_EPSILON)):
        ways = product(RATES, ("0",) if epsilon == NONE else NORMS)
        found = [(way, rows.get(named(method, epsilon, *way, LOOKED_AT))) for way in ways]
        there = [(score(row, "new"), score(row, "average"), way) for way, row in found if row is not None]
        for clients, mean, way in sorted(there, reverse=True):
            print(f"| {method} | {epsilon} | {way[0]} | {way[1]} | {clients:.3f} | {mean:.3f} |")


def table() -> None:
    """Print what privacy costs each method, as Markdown."""
    rows = kept().rows

    def of(method: str, epsilon: str, seed: int, which: str) -> float | None:
        row = rows.get(named(method, epsilon, *CHOSEN[method, epsilon != NONE], seed))
        return None if row is None else score(row, which)

    runs = sum(of(*each, "new") is not None for each in product(METHODS, EPSILONS, STUDY.seeds))
    print(f"{runs} of {len(METHODS) * len(EPSILONS) * len(STUDY.seeds)} runs\n")
    print("| method | ε | rate, norm | clients' mean | its cost | ahead of `dec_lora` | averaged adapter | its cost |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for method, epsilon in product(METHODS, EPSILONS):
        this, plain, beside = (method, epsilon), (method, NONE), ("dec_lora", epsilon)
        cells = [
            told(_differences(of, this, None, "new"), ".3f"),
            "" if epsilon == NONE else told(_differences(of, plain, this, "new")),
            "" if method == "dec_lora" else told(_differences(of, this, beside, "new")),
            told(_differences(of, this, None, "average"), ".3f"),
            "" if epsilon == NONE else told(_differences(of, plain, this, "average")),
        ]
        way = ", ".join(each for each in CHOSEN[method, epsilon != NONE] if each != "0")
        print(f"| `{method}` | {epsilon} | {way} | {' | '.join(cells)} |")


def _differences(
    of: Callable[[str, str, int, str], float | None], one: tuple[str, str], other: tuple[str, str] | None, which: str
) -> list[float]:
    """Return one setting's scores, or by how much they are above another's, of the seeds that there are."""
    found = [(of(*one, seed, which), 0.0 if other is None else of(*other, seed, which)) for seed in STUDY.seeds]
    return [a - b for a, b in found if a is not None and b is not None]


def main() -> None:
    """Run what is missing, or print a table."""
    asked_for = options("epsilons", __doc__, ["look", "looked", "run", "table"], ["digits"])
    if asked_for.action in ("look", "run"):
        run(asked_for.part, looked_at() if asked_for.action == "look" else asked())
    else:
        {"looked": look, "table": table}[asked_for.action]()


if __name__ == "__main__":
    main()
