"""What the atlas's kept runs come to: the package's evidence, the table and picture of docs/atlas.md, a second opinion.

    python -m benchmarks.evidence write        # peertune/planning/evidence.json, docs/atlas.md's table, docs/atlas.png
    python -m benchmarks.evidence again FOLDER # ten runs made anew in FOLDER, and scored without peertune; goes on
    python -m benchmarks.evidence moved RUN    # how far a start that is moved by rounding ends from where it ended

Run `write` whenever `benchmarks/results/atlas.jsonl` has grown.

`again` draws ten runs of the skew `writers` with seed 0 and makes each by `peertune run`, alone and not in a stack.
Then `examples/reevaluate.py` scores the adapters that it leaves: by PEFT and scikit-learn, with no line of peertune.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from itertools import product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch

from benchmarks import atlas
from benchmarks.atlas import HALVES, METHODS, OF, SKEWS, Cell
from benchmarks.studies import Kept, Row
from peertune import build, load_recipe, simulate
from peertune.planning import evidence
from peertune.planning.advice import settings
from peertune.planning.evidence import MEASURES, Difference, Evidence
from peertune.recipe import block_defaults
from peertune.report.pairing import interval

PAGE, PICTURE = Path("docs/atlas.md"), Path("docs/atlas.png")
BEGIN, END = "<!-- python -m benchmarks.atlas table -->\n\n", "\n<!-- end of the table -->"
AGAIN = 10
MOVED = 1e-7  # of a number: as far as rounding in float32 goes


def gathered() -> Evidence:
    """Return the evidence of the runs that are kept."""
    kept, base = Kept("atlas").rows, atlas.scores("dec_lora")
    found = {method: atlas.ahead(atlas.scores(method), base) for method in METHODS[1:]}
    seen = {cell: each for cell in sorted(base) if (each := atlas.probes(cell, kept))}
    shown = [one for each in seen.values() for one in each.values()]
    return Evidence(
        runs=len(kept),
        of=len(OF.seeds) * sum(len(atlas.methods(cell)) for cell in atlas.cells()),
        skews=len(SKEWS),
        settings=_settings([*seen]),
        ranges={of: (min(one[of] for one in shown), max(one[of] for one in shown)) for of in MEASURES},
        cells=[
            evidence.Cell(
                f"{cell.skew} p={cell.p:g} steps={cell.steps} rate={cell.rate:g}",
                tuple(atlas.seen_of(cell, each.values()).tolist()),
                {method: _difference(own[cell]) for method, own in found.items() if cell in own},
            )
            for cell, each in seen.items()
        ],
        laws={method: law for method, own in found.items() if (law := atlas.law(own)) is not None},
    )


def _settings(cells: Sequence[Cell]) -> dict[str, list[Any]]:
    """Return the values that the cells' recipes have, by key, where they are not its default."""
    found: dict[str, list[Any]] = {}
    for cell, method in [*product(cells, METHODS[:1]), *product(cells[:1], METHODS[1:])]:
        recipe = load_recipe(OF.recipe, [*OF.settings, *atlas.settings(cell, method, OF.seeds[0])])
        for key, value in settings(recipe).items():
            values = found.setdefault(key, [])
            values += [] if value in values else [value]
    defaults = block_defaults()
    return {key: values for key, values in found.items() if key not in defaults or values != [defaults[key]]}


def _difference(by_seed: Mapping[int, float]) -> Difference:
    middle, low, high = interval(list(by_seed.values()))
    assert middle is not None
    return Difference(middle, low, high, len(by_seed))


def as_text(found: Evidence) -> str:
    """Return evidence as its file has it: JSON with four digits of each number, a cell a line."""

    def short(number: str) -> float:
        return float(f"{float(number):.4g}")

    values = json.loads(json.dumps(asdict(found)), parse_float=short)
    cells = ",\n  ".join(map(json.dumps, values.pop("cells")))
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    return "{\n" + ",\n".join([*lines, f' "cells": [\n  {cells}\n ]']) + "\n}\n"


def table() -> str:
    """Return what `python -m benchmarks.atlas table` prints."""
    with redirect_stdout(StringIO()) as printed:
        atlas.table()
    return printed.getvalue()


def write() -> None:
    """Write what the kept runs come to where the package and the page have it."""
    evidence.FILE.write_text(as_text(gathered()))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}")
    atlas.draw(str(PICTURE))


def asked(seeds: Sequence[int]) -> dict[str, list[str]]:
    """Return the atlas's runs with these seeds: name → settings."""
    return {
        atlas.named(cell, method, seed): atlas.settings(cell, method, seed)
        for cell in atlas.cells()
        for method, seed in product(atlas.methods(cell), seeds)
    }


def drawn() -> list[tuple[str, list[str], Row]]:
    """Return ten kept runs of the writers, of the protocol's first half: each one's name, settings and row."""
    kept = Kept("atlas").rows
    every = [(name, own) for name, own in asked(HALVES[0]).items() if name.startswith("writers ")]
    order = Random(0).sample(every, len(every))
    return [(name, own, kept[name]) for name, own in order if name in kept and kept[name]["new"]][:AGAIN]


def make(own: Sequence[str], run: Path) -> None:
    """Make a run in its directory, unless it is there."""
    if not (run / "adapters" / "average").exists():
        command = [sys.executable, "-m", "peertune", "run", OF.recipe, *OF.settings, *own, "--out", str(run)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def again(name: str, own: Sequence[str], row: Row, run: Path) -> str:
    """Make a run anew and have it scored by other code; return a line of the table."""
    make(own, run)
    last = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])["evaluation"]
    now = [round(score, 4) for score in last["clients"]]
    differ = sum(one != other for one, other in zip(row["new"], now, strict=True))
    command = [sys.executable, "examples/reevaluate.py", str(run), "peertune/models/digits-vit"]
    examined = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    return f"| {name} | {fmean(row['new']):.4f} | {fmean(now):.4f} | {differ} | {examined} |"


def moved(name: str) -> str:
    """Make a run twice, once from adapters that are moved by MOVED of themselves; return a line of a table."""
    torch.set_num_threads(1)
    job = build(load_recipe(OF.recipe, [*OF.settings, *asked(OF.seeds)[name]])).job
    ends = []
    for by in (0.0, MOVED):
        state, draw = job.state.clone(), torch.Generator().manual_seed(0)
        for x in state.adapters.values():
            x.mul_(1 + by * torch.randn(x.shape, generator=draw))
        *_, last = simulate(replace(job, state=state))
        assert last.state is not None
        assert last.evaluation is not None
        ends.append((last.state.adapters, last.evaluation.clients))
    (one, scores), (other, moved_scores) = ends
    apart = max(float((other[key] - x).norm() / x.norm()) for key, x in one.items())
    differ = sum(a != b for a, b in zip(scores, moved_scores, strict=True))
    return f"| {name} | {apart:.1%} | {differ} | {fmean(moved_scores) - fmean(scores):+.4f} |"


def main() -> None:
    """Write the evidence, or make runs again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("write", help="write what the kept runs come to")
    commands.add_parser("again", help="make ten runs anew").add_argument("folder", type=Path)
    commands.add_parser("moved", help="how far rounding grows in runs").add_argument("names", nargs="+", metavar="RUN")
    options = parser.parse_args()
    if options.action == "write":
        write()
        return
    if options.action == "moved":
        print("| run | adapters end apart by | clients that differ | their mean differs by |\n|---|---:|---:|---:|")
        for name in options.names:
            print(moved(name), flush=True)
        return
    print("| run | kept | made again | clients that differ | by PEFT and scikit-learn |", flush=True)
    print("|---|---:|---:|---:|---|", flush=True)
    for name, own, row in drawn():
        print(again(name, own, row, options.folder / name.replace(" ", ",")), flush=True)


if __name__ == "__main__":
    main()
