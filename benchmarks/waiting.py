"""Does alternation survive where nobody waits? What a score takes, and what is known of a slow client's class.

    python -m benchmarks.waiting run         # goes on where it was stopped; --part 1/2 and 2/2 for two processes
    python -m benchmarks.waiting table       # of what has been run, over rounds
    python -m benchmarks.waiting ends        # what is known after as much time as rounds take
    python -m benchmarks.waiting run sst2    # the same with MiniLM, SST2=FOLDER; and `table sst2`

The protocol of the digits, written before anything was run.

Ten clients on the digits 5 to 9, p = .5: every pair of clients meets in a round with this probability; a sender's own
round where nobody waits. Client 0 alone holds the digit 9: .6 of its rows, and .1 of each other digit. The others hold
a quarter of each of the other four. A message takes .1 s. Two sorts of speed:

- `straggler`: a local step takes 1 s, and client 0 10 s;
- `lognormal`: 1 s in the median, sigma .5, drawn for each step; client 0's are as long as the others'.

Rows: `dec_lora`, `adf_lora` (phases of 5 rounds) and `tad_lora`, in rounds; the same without waiting, the phases of the
last two by each client's own rounds or by common time. Phases that clients agree on (`switch_every: adaptive`) are
refused without rounds, since windows of rounds that nobody has in common measure nothing.

60 rounds of 3 local steps of 4 rows, at the rate .01; without waiting 90 times n trainings, so that time is left where
a slow client makes few of them. Ten seeds; seed s is judged on fold 1 + s mod 5 of five over all rows, every third
round.

The score is the mean accuracy of the clients' own models; the recall is that of the digit 9 in the same predictions.
The goal of a seed is what the row's method scores in rounds after half of them. Told are the virtual time, local steps
of all clients and megabytes sent by all until a run first scores as much, each over those of the same method and seed
in rounds, and the recall there. Runs that never do are counted. Intervals are Student's, 95 %, over the seeds that
reach it.

Target: at most a third of the time in rounds, at a recall of the digit 9 no more than .02 below that in rounds.

`long` was added when all that had run, and had shown that hardly anybody knows the digit 9 when a goal is reached: in
rounds its recall is .01 to .03 there, and without waiting 0 to the end, after ten trainings of client 0. So it asks
what is known after the time that rounds take in the end: the straggler, phases by own rounds, 540 times n trainings,
judged 20 times.

`salf` and `drop` were added when `long` had shown that: rounds in which a client that is late at 9 s of work sends the
sites that its backward pass has reached, or nothing. In 9 s the straggler goes through nine tenths of its first step of
three, and a round takes .3 of the time. 200 rounds, judged 20 times, take as long as the 60 without a deadline.

`sst2`: ten clients, MiniLM-L6, p = .5, float32, no dropout. Client 0 holds nine positive rows of ten, the others three.
The recall is that of the positive. 40 rounds of 2 local steps of 8 rows, at the rate 5e-3, without waiting 60 times n
trainings. Three seeds, judged every fourth round on 120 rows of the validation set, a draw of the seed's. All else is
as with the digits: the same speeds and rows of the table, the goal, the target, nothing `long`. Its protocol was
written before anything of it was run. The straggler is run first, with all its seeds.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import torch

from benchmarks.setup import overrides
from benchmarks.studies import Kept, Row, options, share, told
from peertune import load_recipe
from peertune.assembly.build import build
from peertune.engines.simulator import simulate

FOLDS = 5


class Study(NamedTuple):
    """What one data set is run with."""

    recipe: str
    kept: str  # the file of its runs
    seeds: range
    rounds: int
    proportions: Sequence[Sequence[float]]  # of classes, of client 0 and of each other
    rare: int  # the class that client 0 has
    settings: tuple[str, ...]


STUDIES = {
    "digits": Study(
        "digits-demo",
        "waiting",
        range(10),
        60,
        [[0.1, 0.1, 0.1, 0.1, 0.6], [0.25, 0.25, 0.25, 0.25, 0.0]],
        4,
        (
            "training={local_steps: 3, per_device_train_batch_size: 4, learning_rate: 1e-2}",
            "evaluate={every: 3}",
        ),
    ),
    "sst2": Study(
        "tad-sst2-minilm",
        "waiting-sst2",
        range(3),
        40,
        [[0.1, 0.9], [0.7, 0.3]],
        1,
        (
            "model.dtype=float32",
            "model.dropout=false",
            "training={local_steps: 2, per_device_train_batch_size: 8, learning_rate: 5e-3}",
            "evaluate={every: 4, rows: 120}",
        ),
    ),
}
SPEEDS = {
    "straggler": f"step_s: {[10.0, *[1.0] * 9]}",
    "lognormal": "step_s: {name: lognormal, median_s: 1.0, sigma: 0.5}",
}
METHODS = {
    "dec_lora": "{name: dec_lora}",
    "adf_lora": "{name: adf_lora, switch_every: 5}",
    "tad_lora": "{name: tad_lora}",
}


class Cell(NamedTuple):
    """What is run: a method, and how its clients wait."""

    method: str
    waits: str  # rounds, own or common; long: own, until rounds have ended; salf or drop: rounds with a deadline


LASTING = {"long": 540, "salf": 200, "drop": 200}
"""What is judged after as much time as rounds take → rounds, or n times as many trainings."""
LONG = [Cell(method, waits) for method in METHODS for waits in LASTING]
DEADLINE_S = 9.0
CELLS = [Cell("dec_lora", waits) for waits in ("rounds", "own")]
CELLS += [Cell(method, waits) for method in ("adf_lora", "tad_lora") for waits in ("rounds", "own", "common")]


def named(speed: str, cell: Cell, seed: int) -> str:
    """Return a run's name."""
    return f"{speed} {cell.method} {cell.waits} seed={seed}"


def settings(study: str, speed: str, cell: Cell, seed: int) -> list[str]:
    """Return what one run is made with."""
    of, waiting = STUDIES[study], "mode: rounds"
    if cell.waits in ("salf", "drop"):
        waiting = f"deadline_s: {DEADLINE_S}, late: {cell.waits}"
    elif cell.waits != "rounds":
        waiting = f"mode: asynchronous, phases: {'common' if cell.waits == 'common' else 'own'}"
    rounds = ({"rounds": of.rounds} | LASTING).get(cell.waits, of.rounds * 3 // 2)
    first, others = of.proportions
    fold = f"task={{name: digits, validation_split: {1 + seed % FOLDS}/{FOLDS}, test: validation}}"
    return [
        *([fold] if study == "digits" else overrides()[:-1]),
        "clients=10",
        f"partition={{name: label_mixture, proportions: {[first, *[others] * 9]}}}",
        "graph={name: complete, activation: 0.5}",
        *of.settings,
        f"algorithm={METHODS[cell.method]}",
        f"time={{{SPEEDS[speed]}, latency_s: 0.1, {waiting}}}",
        f"rounds={rounds}",
        *([f"evaluate.every={rounds // 20}"] if cell.waits in LASTING else []),
        f"seed={seed}",
    ]


def scored(study: str, asked: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Row]]:
    """Run what is asked for, and yield by evaluation: round, seconds, local steps, megabytes, score and recall."""
    of = STUDIES[study]
    for name, own in asked.items():
        job = build(load_recipe(of.recipe, own)).job
        steps, sent, time_s, seen = 0, 0, 0.0, list[list[float]]()
        for record in simulate(job):
            steps, sent = steps + job.local_steps * len(record.spans), sent + sum(record.bytes_sent)
            time_s = max(time_s, record.time_s or 0.0)  # rounds have no common end
            if (found := record.evaluation) is not None:
                recall = found.confusion[of.rare][of.rare] / sum(found.confusion[of.rare])
                score = fmean(found.clients)
                seen.append([record.round + 1, round(time_s, 3), steps, sent / 1e6, round(score, 4), round(recall, 4)])
        yield name, {"seen": seen}


def asked(study: str) -> Iterator[tuple[int, str, Cell]]:
    """Yield seed, speed and cell of all runs, a seed of all rows after the other."""
    seeds = STUDIES[study].seeds
    if study == "digits":
        yield from product(seeds, SPEEDS, CELLS)
        yield from product(seeds, ["straggler"], LONG)
    else:
        yield from ((seed, speed, cell) for speed, seed, cell in product(SPEEDS, seeds, CELLS))


def run(study: str, part: str) -> None:
    """Run what has not been run."""
    torch.set_num_threads(1)
    kept = Kept(STUDIES[study].kept)
    for seed, speed, cell in share(part, asked(study)):
        kept.all({named(speed, cell, seed): settings(study, speed, cell, seed)}, partial(scored, study))


def reached(seen: Sequence[Sequence[float]], goal: float) -> Sequence[float] | None:
    """Return the first evaluation that scores as much as the goal."""
    return next((one for one in seen if one[4] >= goal), None)


def compared(study: str, rows: Mapping[str, Any], speed: str, cell: Cell) -> dict[str, list[float]]:
    """Return for each seed what a row took to its goal over what rounds did, and what it knew there."""
    found: dict[str, list[float]] = {key: [] for key in ("time", "steps", "MB", "recall", "score", "missed")}
    for seed in STUDIES[study].seeds:
        names = named(speed, cell, seed), named(speed, Cell(cell.method, "rounds"), seed)
        if not rows.keys() >= {*names}:
            continue
        own, theirs = (rows[name]["seen"] for name in names)
        goal = next(one[4] for one in theirs if one[0] == STUDIES[study].rounds // 2)
        first, there = reached(own, goal), reached(theirs, goal)
        assert there is not None, "rounds reach what they score"
        found["score"].append(own[-1][4])
        found["missed"].append(float(first is None))
        if first is not None:
            for place, key in enumerate(("time", "steps", "MB"), start=1):
                found[key].append(first[place] / there[place])
            found["recall"].append(first[5] - there[5])
    return found


def table(study: str) -> None:
    """Print what the rows come to, as Markdown."""
    rows = Kept(STUDIES[study].kept).rows
    print(f"{len(rows)} of {len([*asked(study)])} runs\n")
    rare = {"digits": "the 9", "sst2": "the positive"}[study]
    print(
        f"| speeds | method | waits | reached | time | steps | MB | recall of {rare}, difference | score at the end |"
    )
    print("|---|---|---|---:|---|---|---|---|---:|")
    for speed, cell in product(SPEEDS, [*CELLS, *(one for one in LONG if one.waits != "long")]):
        found = compared(study, rows, speed, cell)
        if cell.waits == "rounds" or not found["score"]:
            continue
        seeds, missed = len(found["score"]), int(sum(found["missed"]))
        columns = [told(found[key], "+.3f" if key == "recall" else ".2f") for key in ("time", "steps", "MB", "recall")]
        first = f"{speed} | {cell.method} | {cell.waits} | {seeds - missed} of {seeds}"
        print(f"| {first} | {' | '.join(columns)} | {fmean(found['score']):.3f} |")


def table_of_ends() -> None:
    """Print what is known of the straggler's class after the time that rounds take, as Markdown."""
    rows = Kept(STUDIES["digits"].kept).rows
    print("| method | waits | seeds | score in rounds | score | recall of the 9 in rounds | recall |")
    print("|---|---|---:|---|---|---|---|")
    for cell in LONG:
        pairs = [
            [rows[named("straggler", one, seed)]["seen"][-1] for one in (Cell(cell.method, "rounds"), cell)]
            for seed in STUDIES["digits"].seeds
            if named("straggler", cell, seed) in rows
        ]
        if pairs:
            columns = [told([pair[side][what] for pair in pairs], ".3f") for what in (4, 5) for side in (0, 1)]
            print(f"| {cell.method} | {cell.waits} | {len(pairs)} | {' | '.join(columns)} |")


def main() -> None:
    """Run the study, or print its table."""
    asked_for = options("waiting", __doc__, ["run", "table", "ends"], STUDIES)
    if asked_for.action == "run":
        run(asked_for.study, asked_for.part)
    elif asked_for.action == "table":
        table(asked_for.study)
    else:
        table_of_ends()


if __name__ == "__main__":
    main()
