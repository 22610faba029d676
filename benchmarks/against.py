"""Two builds in turn: the package as it was at a commit, and as it is here, by what parts measure of either.

A part that can be measured so has a function `turn`, which returns figures of the package that it imports. Each call is
a process of its own, first the old build's, then the new one's, and so on, since a shared machine's speed changes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.measure import Compared, Figure
from benchmarks.same import ROOT, lay_out


def parts_of_two(names: Sequence[str]) -> list[str]:
    """Return those of the parts that can be measured of two builds."""
    return [name for name in names if hasattr(import_module(f"benchmarks.{name}"), "turn")]


def compare(commit: str, parts: Sequence[str], turns: int) -> Iterator[tuple[str, list[Compared]]]:
    """Measure each part's turns of both builds; yield what is compared, and its figures."""
    with tempfile.TemporaryDirectory(prefix="against-") as place:
        sides = Path(place, "old"), Path(place, "new")
        said = lay_out(commit, *sides)
        for side in sides:
            shutil.copytree(
                ROOT / "benchmarks", side / "code/benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__")
            )
        for part in parts:
            taken = [[_turn(side, part) for side in sides] for _ in range(turns)]
            yield (
                f"{part}, the working tree against {said}",
                [
                    Compared(*[[turn[side][place] for turn in taken] for side in range(2)])
                    for place in range(len(taken[0][0]))
                ],
            )


def _turn(side: Path, part: str) -> list[Figure]:
    """Have one build measure a part, in a process of its own."""
    program = f"import json; from benchmarks.{part} import turn; print(json.dumps([vars(one) for one in turn()]))"
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=side / "code", env=os.environ, stdout=subprocess.PIPE, check=False
    )
    if process.returncode:
        sys.exit(f"{part}: the {side.name} build ended with code {process.returncode}")
    return [Figure(**one) for one in json.loads(process.stdout.splitlines()[-1])]
