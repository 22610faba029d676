"""Are unequal ranks worth it? Parties of unequal machines beside all at one rank, as pairs by seed.

    python -m benchmarks.unequal run digits             # goes on where it was stopped; --part 1/2 and 2/2 for two
    SST2=FOLDER python -m benchmarks.unequal run sst2   # the same with MiniLM
    python -m benchmarks.unequal table digits           # of what has been run
    python -m benchmarks.unequal groups digits          # by the rank that a client has

The protocol, written before anything of it was run.

The question is that of parties of which some can't afford what others can. They may agree on the rank that the weakest
affords, or each takes what it can. The mean and the largest rank for all are beyond some; they say what is missing.

Conditions: `unequal`, ranks that the seed deals to the clients; all at the `smallest` of these, at their `mean`, and at
the `largest`. An update counts `lora_alpha / lora.r` times in each, with one `lora.r` (`lora.scaling: common`), so a
rank slice does the same to a layer in all. A higher rank thus is more slices that each move as fast, not only more
room. All conditions of a seed have the same rows, batches and edges, and begin with slices of the same A.

Methods, with their defaults: `dec_lora` and `tad_lora`, which average factors by rank slice; `decaf`, which mixes
products at the common rank; and `dec_lora` with `zero_padded`, which fills low ranks with zeros. Where ranks are equal
that changes nothing, so its equal ranks are those of `dec_lora`.

`digits`: the recipe `digits-writers`. Twelve clients with a writer's rows each; two writers are nobody's. p = .5: every
pair of clients meets in a round with this probability. 40 rounds of 3 local steps of 4 rows. Six clients have rank 2,
three 4 and three 8, in the mean 4. Ten seeds; seed s holds out fold 1 + s mod 5 of five.

`sst2`: ten clients with the recipe's mixture of labels, MiniLM-L6, p = .5, float32, the base's dropout off. 50 rounds
of 3 local steps of 8 rows. Four clients have rank 4, four 8 and two 16, in the mean 8. Five seeds. Scores are on the
second half of the validation set, and on a twentieth of each client's rows, which it holds out.

A method has one rate in all conditions. On the digits that is .01, and .02 for `tad_lora`. On the same rows and graph,
at rank 4, `benchmarks.which` chose .02 for `tad_lora` in four folds of five, .01 for `decaf` in three, and .01 for
`dec_lora` in two and .02 in three. `dec_lora` was looked at with seed 100 on fold 1, at .005, .01 and .02, the last
without the largest rank. Unequal ranks score most at .01, ranks 2 and 4 for all at .02. So .01 rather favours unequal
ranks. In that look `unequal` was below `smallest` on `new` at each rate, and above it on `own` at two of three. The
rates of SST-2 are the best of three in docs/results.md, at rank 8, on the same graph and as many rounds; nothing of it
was looked at. Rounds are as they were in both.

Scores are of the clients' own models after the last round, the mean over clients: `own`, on what each holds out, and
`new`, on rows that no client has. Megabytes are what a client sends in the whole run, by the records.

Told are differences of `unequal` from each other condition, seed by seed, with Student's 95 % interval: of the mean
over all clients, and over those of each rank, from the same clients in the other condition. Not enough to tell: an
interval that has 0 in it and is wider than two points.

Unequal ranks are worth it, for a method, if the mean over all clients is above that of `smallest` on one score, and
below it on none. They cost nobody anything if clients of no rank are below `smallest` on either. Above and below: the
interval leaves out 0.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from statistics import fmean
from typing import NamedTuple

import torch

from benchmarks.studies import STUDIES as SHARED
from benchmarks.studies import Asked, Kept, Row, held_out, options, paired, scored, share
from peertune.rounds.job import Job
from peertune.rounds.record import RoundRecord

STUDIES = {
    "digits": SHARED["digits"]._replace(recipe="digits-writers", settings=()),
    "sst2": SHARED["sst2"]._replace(settings=(*SHARED["sst2"].settings, "graph.activation=0.5"), seeds=tuple(range(5))),
}


class Ranks(NamedTuple):
    """The ranks of a study."""

    r: int  # by which updates are scaled, whatever rank a client has
    unequal: Mapping[int, int]  # rank → how many clients have it

    def all_at(self, which: str) -> int:
        """Return the rank that all have in one of `EQUAL`."""
        mean = sum(rank * clients for rank, clients in self.unequal.items()) / sum(self.unequal.values())
        return {"smallest": min(self.unequal), "mean": round(mean), "largest": max(self.unequal)}[which]


RANKS = {"digits": Ranks(4, {2: 6, 4: 3, 8: 3}), "sst2": Ranks(8, {4: 4, 8: 4, 16: 2})}
EQUAL = ("smallest", "mean", "largest")
METHODS = ("dec_lora", "dec_lora+zero_padded", "tad_lora", "decaf")
RATES = {
    "digits": {"dec_lora": 1e-2, "tad_lora": 2e-2, "decaf": 1e-2},
    "sst2": {"dec_lora": 5e-3, "tad_lora": 5e-3, "decaf": 2e-3},
}
SCORES = ("own", "new")


class Cell(NamedTuple):
    """What is run: a method, and which ranks the clients have."""

    method: str  # a modifier after a plus
    ranks: str  # unequal, or one of EQUAL


CELLS = [
    Cell(method, ranks)
    for ranks in ("unequal", *EQUAL)
    for method in METHODS
    if ranks == "unequal" or "+" not in method
]


def others(method: str) -> Iterator[Cell]:
    """Yield what unequal ranks are held against; of a modified method also unequal ranks without the modifier."""
    plain, plus, _ = method.partition("+")
    yield from (Cell(plain, ranks) for ranks in (("unequal", *EQUAL) if plus else EQUAL))


def named(cell: Cell, seed: int) -> str:
    """Return a run's name."""
    return f"{cell.method} {cell.ranks} seed={seed}"


def settings(study: str, cell: Cell, seed: int) -> list[str]:
    """Return what one run is made with. Equal ranks are a table, too, so that the scale is that of `lora.r`."""
    ranks, (method, _, modifier) = RANKS[study], cell.method.partition("+")
    clients = sum(ranks.unequal.values())
    table = ranks.unequal if cell.ranks == "unequal" else {ranks.all_at(cell.ranks): clients}
    return [
        f"algorithm={{name: {method}}}",
        *([f"modifiers=[{{name: {modifier}}}]"] if modifier else []),
        f"lora.r={ranks.r}",
        f"lora.ranks={dict(table)}",
        "lora.scaling=common",
        f"training.learning_rate={RATES[study][method]}",
        held_out(study, 1 + seed % STUDIES[study].folds, choosing=False),
        f"seed={seed}",
    ]


def dealt(job: Job) -> Row:
    """Return the clients' ranks, where they differ."""
    return {"ranks": [*job.ranks]}


def added(record: RoundRecord, found: Row) -> Row:
    """Return what each client has sent until this round's end."""
    before = found.get("bytes", [0] * len(record.bytes_sent))
    return {"bytes": [sum(each) for each in zip(before, record.bytes_sent, strict=True)]}


def asked(study: str) -> Iterator[Asked]:
    """Yield all runs, those together that may train as one stack: of one fold and of ranks that are alike."""
    seeds = STUDIES[study].seeds
    for first, ranks in product(range(5), ("unequal", *EQUAL)):
        some = product(seeds[first::5], (cell for cell in CELLS if cell.ranks == ranks))
        yield {named(cell, seed): settings(study, cell, seed) for seed, cell in some}


def kept(study: str) -> Kept:
    """Return what has been run."""
    return Kept(f"unequal-{study}")


def run(study: str, part: str) -> None:
    """Run what has not been run: all conditions of some seeds after the other, so that what is there is in pairs."""
    torch.set_num_threads(1)
    runs = kept(study)
    for some in share(part, asked(study)):
        runs.all(some, partial(scored, STUDIES[study], look=dealt, watch=added))


def means(study: str, rows: Mapping[str, Row], cell: Cell, what: str, rank: int | None = None) -> dict[int, float]:
    """Return the mean over clients by seed, 0 where training diverged; of a rank, over those who have it if unequal."""
    found = {}
    for seed in STUDIES[study].seeds:
        row, unequal = (rows.get(named(each, seed)) for each in (cell, Cell("dec_lora", "unequal")))
        if row is not None and unequal is not None:
            values = row[what] or [0.0] * len(unequal["ranks"])
            found[seed] = fmean(x for x, r in zip(values, unequal["ranks"], strict=True) if rank in (None, r))
    return found


def table(study: str) -> None:
    """Print what the rows come to, as Markdown."""
    rows, ranks = kept(study).rows, RANKS[study]
    print(f"{len(rows)} of {len(CELLS) * len(STUDIES[study].seeds)} runs\n")
    print("| method | ranks | seeds | MB | own | unequal less it | new | unequal less it |")
    print("|---|---|---:|---:|---:|---|---:|---|")
    for method in METHODS:
        unequal = Cell(method, "unequal")
        for cell in (unequal, *others(method)):
            found = {what: means(study, rows, cell, what) for what in ("bytes", *SCORES)}
            if not found["bytes"]:
                continue
            columns = [f"{len(found['bytes'])}", f"{fmean(found['bytes'].values()) / 1e6:.2f}"]
            for what in SCORES:
                less = "–" if cell == unequal else paired(means(study, rows, unequal, what), found[what])
                columns += [f"{fmean(found[what].values()):.3f}", less]
            if cell.ranks == "unequal":
                told = ", ".join(f"{clients} × {rank}" for rank, clients in ranks.unequal.items())
            else:
                told = f"all {ranks.all_at(cell.ranks)}"
            print(f"| {cell.method} | {told} | {' | '.join(columns)} |")


def groups(study: str) -> None:
    """Print what those of each rank score, and what the same clients do at ranks that all have, as Markdown."""
    rows = kept(study).rows
    alike = " | ".join(f"less all {RANKS[study].all_at(ranks)}" for ranks in EQUAL)
    print(f"| method | a client's rank | MB | score | unequal | {alike} |")
    print("|---|---:|---:|---|---:|---|---|---|")
    for method, rank, what in product(METHODS, RANKS[study].unequal, SCORES):
        unequal = Cell(method, "unequal")
        own, sent = (means(study, rows, unequal, each, rank) for each in (what, "bytes"))
        if own:
            equal = [cell for cell in others(method) if cell.ranks in EQUAL]
            less = " | ".join(paired(own, means(study, rows, cell, what, rank)) for cell in equal)
            first = f"{method} | {rank} | {fmean(sent.values()) / 1e6:.2f} | {what} | {fmean(own.values()):.3f}"
            print(f"| {first} | {less} |")


def main() -> None:
    """Run a study, or print one of its tables."""
    asked_for = options("unequal", __doc__, ["run", "table", "groups"], STUDIES)
    if asked_for.action == "run":
        run(asked_for.study, asked_for.part)
    else:
        {"table": table, "groups": groups}[asked_for.action](asked_for.study)


if __name__ == "__main__":
    main()
