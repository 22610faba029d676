"""Smaller messages: how many times fewer bytes, and what that costs in accuracy, as pairs by seed.

    python -m benchmarks.smaller run digits  # or sst2, with SST2=FOLDER; goes on where it was stopped
    python -m benchmarks.smaller run digits whole int4  # these rows alone
    python -m benchmarks.smaller table digits  # of what has been run

The protocol, written before anything was run.

A row is `dec_lora` with a list of modifiers, at p = .5: every pair of clients meets in a round with this probability.
All rows have the same rounds and, by seed, the same edges; only what travels over them differs. All have one learning
rate, that of whole messages: .01 for the digits, the middle of the grid in `benchmarks.which`, and .005 for SST-2, the
best of three in docs/results.md. No row has a rate of its own. Whole messages at this rate are cells of
`benchmarks.which`; what has been run there isn't run again.

The set-ups are those of `benchmarks.which`, with the rows that score there. `digits`: twelve clients with a writer
each, two writers held out, 40 rounds, five folds, ten seeds. `sst2`: ten clients, MiniLM-L6, 50 rounds, the second
half of the validation set, five seeds. Scores are of the clients' own models: `own`, on what each holds out, and `new`,
on rows that no client has. A seed's score is its mean over folds.

Bytes are those of one message as it travels between peers, with its header (`peertune.wire.codec.encode`).

The loss is what whole messages score less what the row scores, seed by seed, with Student's 95 % interval. Targets: at
least 4 times fewer bytes with the interval's upper end at .01 at most, at least 8 times with .02. A row meets one if
both scores do. `int4 most` was added when the first seed of `int4` and `int4 half` had been looked at.
After three seeds of `int4`, whose steps were powers of two, there came to be four steps for each power of two, by what
clients' noise was without training; nothing of these runs is kept.
"""

import argparse
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import groupby, product
from math import isnan
from statistics import fmean

import torch

from benchmarks.studies import STUDIES, Kept, Row, by_seed, held_out, scored
from peertune.report.pairing import interval
from peertune.rounds.job import Job
from peertune.wire.codec import encode

ROWS = {
    "whole": "",
    "int4": "{name: int4}",
    "int4 most": "{name: int4}, {name: shared_mask, share: 0.9}",
    "int4 half": "{name: int4}, {name: shared_mask, share: 0.5}",
    "int8": "{name: int8}",
    "int8 third": "{name: int8}, {name: shared_mask, share: 0.33}",
    "quarter": "{name: shared_mask}",
    "eighth": "{name: shared_mask, share: 0.125}",
    "int4 quarter": "{name: int4}, {name: shared_mask}",
    "half": "{name: half}",
}
"""Row → its modifiers."""
RATES = {"digits": 1e-2, "sst2": 5e-3}
SEEDS = {"digits": 10, "sst2": 5}
TARGETS = {8: 0.02, 4: 0.01}
"""At least so many times fewer bytes → the most that accuracy may lose."""


def message_bytes(job: Job) -> Row:
    """Return how long one client's message is, with its header."""
    return {"message_bytes": len(encode(job.sent(job.algorithm.phase(0).send)))}


def names(study: str, rows: Iterable[str] = ROWS) -> dict[str, tuple[int, int, str]]:
    """Return fold, seed and row of each run, by the name that it has in `benchmarks.which`, too: fold by fold."""
    of = STUDIES[study]
    found = {}
    for fold, seed, row in product(of.scored, range(SEEDS[study]), rows):
        what = "dec_lora" if row == "whole" else "+".join(["dec_lora", *row.split()])
        found[f"{what} p=0.5 fold={fold} rate={RATES[study]:g} seed={seed}"] = fold, seed, row
    return found


def kept(study: str) -> Kept:
    """Return what has been run."""
    return Kept(f"smaller-{study}", f"which-{study}", only=names(study).__contains__)


def run(study: str, rows: list[str]) -> None:
    """Run what has not been run: fold by fold, seed by seed, each with all rows, so that what is there is in pairs."""
    torch.set_num_threads(1)
    of, runs = STUDIES[study], kept(study)
    for _, some in groupby(names(study, rows or ROWS).items(), lambda one: one[1][:2]):
        asked = {
            name: [
                "algorithm.name=dec_lora",
                f"modifiers=[{ROWS[row]}]",
                "graph.activation=0.5",
                f"training.learning_rate={RATES[study]}",
                f"seed={seed}",
                held_out(study, fold, choosing=False),
            ]
            for name, (fold, seed, row) in some
        }
        runs.all(asked, partial(scored, of, look=message_bytes))


def lost(whole: Mapping[int, float], row: Mapping[int, float]) -> tuple[float, float, float]:
    """Return what a row loses, seed by seed: the mean and its 95 % interval."""
    middle, low, high = interval([whole[seed] - row[seed] for seed in sorted(whole.keys() & row.keys())])
    return tuple(float("nan") if x is None else x for x in (middle, low, high))  # type: ignore[return-value]


def verdict(times: float, upper: float) -> str:
    """Say whether a row meets the target of those that send so many times less."""
    for least, most in TARGETS.items():
        if times >= least and not isnan(upper):
            return f"≥ {least} ×, ≤ {most:g}: {'met' if upper <= most else '**missed**'}"
    return "–"


def table(study: str) -> None:
    """Print what the rows come to, as Markdown."""
    scores: dict[str, dict[str, dict[tuple[int, int], float]]] = {}
    size: dict[str, int] = {}
    every = names(study)
    for name, row in kept(study).rows.items():
        fold, seed, what = every[name]
        size[what] = row.get("message_bytes") or size.get(what, 0)
        for score in ("own", "new"):
            value = fmean(row[score]) if row[score] else float("nan")
            scores.setdefault(what, {}).setdefault(score, {})[seed, fold] = value
    print("| message | bytes | times fewer | seeds | own | loss | new | loss | target |")
    print("|---|---:|---:|---:|---:|---|---:|---|---|")
    for what, found in scores.items():
        columns, upper = [], 0.0
        for score, own in found.items():
            common = own.keys() & scores["whole"][score].keys()
            columns.append(f"{fmean(own.values()):.3f}")
            if what == "whole":
                columns.append("–")
                continue
            middle, low, high = lost(by_seed(scores["whole"][score], common), by_seed(own, common))
            columns.append(f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]")
            upper = max(high, upper)  # where there is one seed, not a number
        times, seeds = size["whole"] / size[what], len({seed for seed, _ in found["own"]})
        told = "–" if what == "whole" else verdict(times, upper)
        print(f"| {what} | {size[what]:,} | {times:.2f} | {seeds} | {' | '.join(columns)} | {told} |")


def main() -> None:
    """Run a study, or print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smaller", description=__doc__)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("study", choices=list(RATES))
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; all, in this order")
    options = parser.parse_args()
    if unknown := set(options.rows) - ROWS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no row; choose from {', '.join(ROWS)}")
    if options.action == "run":
        run(options.study, options.rows)
    else:
        table(options.study)


if __name__ == "__main__":
    main()
