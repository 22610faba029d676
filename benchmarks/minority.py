"""What rules for members that lie cost a client whose rows are unlike the others', where nobody lies: pairs by seed.

    python -m benchmarks.minority run      # goes on where it was stopped; --part 1/2 and 2/2 for two
    python -m benchmarks.minority table    # what each rule costs whom, of what has been run
    python -m benchmarks.minority named    # how much rules took of whom, and who is called a suspect

The protocol, written before anything of it was run.

Recipe, rate, rounds and the graph `four` are those of `benchmarks.hostile`: `dec_lora`, ten clients with four
neighbours each, 40 rounds of 3 local steps of 4 rows at the rate .01; four writers are nobody's. There is no attack.

One client of the ten is the minority, in seed s client s mod 10. Two of the five classes are its own, s and s + 1
(mod 5), counted from the digit 5. All clients have equally many rows, 42 to 46. There are two kinds:

- `alone`: its rows are of its two classes, half each, and nobody else has any of them.
- `mostly`: its two classes are .4 of its rows each, and .05 each of everybody else's.

The other classes are dealt evenly. Label skew was chosen since it is what parties bring of themselves: a clinic that
alone sees a disease. Images that differ, such as inverted ones, are another question.

Rules: plain averages; `local`; and each rule with one setting. `gt_pd` has the one that was chosen; `clipped` and
`cs_plus` allow for two liars, `balance` has `gamma` 1, which lost less in the look of `benchmarks.hostile`; `krum`,
`trimmed_mean` and `median` have their defaults. `trimmed_mean` with two would be the median: clients hear four.

Scores are shares of right answers, the mean over classes, on rows of the writers that are nobody's, after the last
round: of the minority's own model, of the nine others' in the mean, and of the averaged adapter, each on the minority's
two classes and on the other three. Told is what a rule costs: the score with plain averages less that with the rule,
seed by seed over ten seeds, with Student's 95 % interval. A rule costs somebody something if the interval lies above 0.

A false alarm is a client that `peertune diagnose` would name by what the rule took of it (`little_taken` in
`peertune/report/findings/trust.py`). `trimmed_mean` and `median` take entries, not clients, so they name nobody.

Before this was written both kinds were run once with seed 100, under all of these rules, to see what a run takes. So
were mixtures with .45 and .02, and with one class alone. With `alone` plain averages scored .18 on the minority's
classes and `local` .96, so there the mean leaves a rule little to take away. It was kept, since it is the plain case.

A run takes 7 to 10 s of a core; there are 2 kinds × 9 rules × 10 seeds.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from statistics import fmean, median

import numpy as np
import torch

from benchmarks.hostile import GRAPHS, LOCAL, PLAIN, STUDIES, modified
from benchmarks.studies import Asked, Kept, Row, options, scored, share, told
from peertune.report.findings.trust import little_taken, shares_taken
from peertune.rounds.job import Job
from peertune.rounds.record import RoundRecord, summed
from peertune.rounds.slices import average
from peertune.types import Stack, Tensors, by_client

CLIENTS, CLASSES = 10, 5
KINDS: Mapping[str, tuple[float, float]] = {"alone": (0.5, 0.0), "mostly": (0.4, 0.05)}
"""Kind → what share each of the minority's two classes has in its own rows, and in the others'."""
RULES = (
    PLAIN,
    LOCAL,
    "gt_pd trusted: 0.8",
    "clipped hostile: 2",
    "cs_plus hostile: 2",
    "balance gamma: 1.0",
    "krum hostile: 1",
    "trimmed_mean hostile: 1",
    "median",
)
SCORED = tuple(product(("the minority", "the others", "the average"), ("the minority's", "the others'")))
"""Whose model, on whose classes."""


def named(kind: str, rule: str, seed: int) -> str:
    """Return a run's name."""
    return f"{kind} | {rule} | seed={seed}"


def minority(seed: int) -> tuple[int, list[int]]:
    """Return which client is the minority, and its classes."""
    return seed % CLIENTS, [seed % CLASSES, (seed + 1) % CLASSES]


def proportions(kind: str, seed: int) -> list[list[float]]:
    """Return each client's share of each class, `[CLIENTS, CLASSES]`."""
    who, classes = minority(seed)

    def shares(each: float) -> list[float]:
        rest = (1 - 2 * each) / (CLASSES - 2)
        return [each if number in classes else rest for number in range(CLASSES)]

    its, theirs = map(shares, KINDS[kind])
    return [its if client == who else theirs for client in range(CLIENTS)]


def settings(kind: str, rule: str, seed: int) -> list[str]:
    """Return what one run is made with."""
    return [
        *modified(rule),
        "task={name: digits, held_out_writers: [10, 11, 12, 13]}",
        f"partition={{name: label_mixture, proportions: {proportions(kind, seed)}}}",
        GRAPHS["four"],
        "evaluate={every: 1000}",
        f"seed={seed}",
    ]


def judged(job: Job) -> Row:
    """Return the share of each class that is right, of each client's own model and of the averaged adapter."""
    stacks = job.state.stacks
    mean = {name: x[None] for name, x in average(stacks).items()}
    return {"right": [_right(job, one) for one in by_client(stacks)], "average": _right(job, mean)}


def _right(job: Job, single: Tensors) -> list[float]:
    counts = np.array(job.evaluate([Stack(torch.zeros(1, dtype=torch.int64), single)], [0]).confusion)
    return [round(float(x), 4) for x in counts.diagonal() / counts.sum(1)]


def taken(record: RoundRecord, found: Row) -> Row:
    """Return what has been taken of each client until this round's end."""
    return {"taken": summed([*found.get("taken", []), *record.taken])}


def asked() -> Iterator[Asked]:
    """Yield runs that train as one stack: all rules of a seed and a kind."""
    for seed, kind in product(STUDIES["digits"].seeds, KINDS):
        yield {named(kind, rule, seed): settings(kind, rule, seed) for rule in RULES}


def kept() -> Kept:
    """Return what has been run."""
    return Kept("minority-digits")


def run(part: str) -> None:
    """Run what has not been run."""
    torch.set_num_threads(1)
    runs = kept()
    for some in share(part, asked()):
        runs.all(some, partial(scored, STUDIES["digits"], watch=taken, at_end=judged))


def score(row: Row, seed: int, model: str, classes: str) -> float:
    """Return the score of somebody's model on somebody's classes, 0 where training diverged."""
    if "right" not in row:
        return 0.0
    who, own = minority(seed)
    judging = [number for number in range(CLASSES) if (number in own) == (classes == "the minority's")]
    models = {
        "the minority": [row["right"][who]],
        "the others": [each for client, each in enumerate(row["right"]) if client != who],
        "the average": [row["average"]],
    }
    return fmean(each[number] for each in models[model] for number in judging)


def pairs(rows: Mapping[str, Row], kind: str, rule: str, seeds: Sequence[int]) -> list[tuple[int, Row, Row]]:
    """Return the seeds of which there are runs with plain averages and with the rule, with both."""
    of = {seed: [rows.get(named(kind, each, seed)) for each in (PLAIN, rule)] for seed in seeds}
    return [(seed, plain, ruled) for seed, (plain, ruled) in of.items() if plain is not None and ruled is not None]


def table() -> None:
    """Print what plain averages score, and what each rule costs, as Markdown."""
    rows, seeds = kept().rows, STUDIES["digits"].seeds
    print(f"{len(rows)} of {len(KINDS) * len(RULES) * len(seeds)} runs\n")
    others = [rule for rule in RULES if rule != PLAIN]
    print(f"| minority | whose model | on whose classes | plain averages | {' | '.join(others)} |")
    print(f"|---|---|---|---:|{'---:|' * len(others)}")
    for kind, (model, classes) in product(KINDS, SCORED):
        plain = [score(row, seed, model, classes) for seed, row, _ in pairs(rows, kind, PLAIN, seeds)]
        costs = (
            told(
                score(one, seed, model, classes) - score(other, seed, model, classes)
                for seed, one, other in pairs(rows, kind, rule, seeds)
            )
            for rule in others
        )
        print(f"| {kind} | {model} | {classes} | {told(plain, '.3f')} | {' | '.join(costs)} |")


def suspects() -> None:
    """Print what rules took of the minority and of the others, and in how many runs somebody is named, as Markdown."""
    rows, seeds = kept().rows, STUDIES["digits"].seeds
    print("| minority | rule | of the minority | of the median other | the minority named | another named |")
    print("|---|---|---:|---:|---:|---:|")
    for kind, rule in product(KINDS, RULES):
        runs = [(minority(seed)[0], row["taken"]) for seed, _, row in pairs(rows, kind, rule, seeds) if row["taken"]]
        if runs:
            shares = [(who, shares_taken(each)) for who, each in runs]
            its = fmean(each[who] for who, each in shares)
            theirs = fmean(median(x for client, x in each.items() if client != who) for who, each in shares)
            named_of = [(who, little_taken(each)) for who, each in shares]
            counts = (sum(who in each for who, each in named_of), sum(bool(each - {who}) for who, each in named_of))
            alarms = " | ".join(f"{count} of {len(runs)}" for count in counts)
            print(f"| {kind} | {rule} | {its:.2f} | {theirs:.2f} | {alarms} |")


def main() -> None:
    """Run what is missing, or print a table."""
    asked_for = options("minority", __doc__, ["run", "table", "named"], STUDIES)
    if asked_for.action == "run":
        run(asked_for.part)
    else:
        {"table": table, "named": suspects}[asked_for.action]()


if __name__ == "__main__":
    main()
