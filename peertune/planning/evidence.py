"""What measured runs say of how far methods are ahead of `dec_lora`, and what foretells it of a run's beginning.

The file beside this one is of the runs that `benchmarks/atlas.py` made. `python -m benchmarks.evidence write` makes it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log10
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).with_name("evidence.json")
PROBED = 15
"""Rounds of `dec_lora` after which its disagreement is looked at."""
MEASURES = ("cross", "A", "B")
"""What is looked at then: `peertune.rounds.metrics.relative_disagreement`."""
LEAST = 1e-9  # what counts as no disagreement at all
NEAR = 5
WITHIN = 0.95

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """By how much a method is ahead of `dec_lora`: of a share of right answers, a mean over seeds."""

    mean: float
    low: float | None  # Student's 95 % interval; None for a single seed
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Cell:
    """A setting in which methods were compared."""

    name: str
    features: tuple[float, ...]  # as `features` makes them, of means over seeds
    differences: Mapping[str, Difference]  # by method


@dataclass(frozen=True)
class Law:
    """What foretells a method's difference best, judged by each skew from the others' cells and one seed's probe."""

    by: str  # a key of PREDICTORS
    errors: Mapping[str, float]  # the root mean square by which each of PREDICTORS missed
    within: float  # what WITHIN of a skew's misses by this one stay in, of the skew where that is most


@dataclass(frozen=True)
class Evidence:
    """All of it."""

    runs: int
    of: int  # runs that there will be
    skews: int  # each of which was held out once
    settings: Mapping[str, list[object]]  # values that the cells have, by the recipe's key, where not its default
    ranges: Mapping[str, tuple[float, float]]  # of MEASURES, the least and the most of any run
    cells: list[Cell]
    laws: Mapping[str, Law]  # by method

    @property
    def chance(self) -> float:
        """How likely a difference is foretold to `Law.within`: where a further skew is no worse than all of these."""
        return WITHIN * self.skews / (self.skews + 1)


def read(file: Path = FILE) -> Evidence:
    """Return what is in a file: that of the package, or another."""
    values = json.loads(file.read_text())
    for cell in values["cells"]:
        cell["differences"] = {method: Difference(**found) for method, found in cell["differences"].items()}
    values["cells"] = [Cell(**cell) for cell in values["cells"]]
    values["laws"] = {method: Law(**law) for method, law in values["laws"].items()}
    return Evidence(**values)


def features(seen: Mapping[str, float], rho: float) -> Vector:
    """Return what a difference is foretold from: the logarithms of MEASURES, and the graph's rho."""
    return np.array([*(log10(max(seen[of], LEAST)) for of in MEASURES), rho])


def nearest(known: Vector, at: Vector) -> list[int]:
    """Return the places of the NEAR nearest of `known [n, 4]` to features `at [4]`, in units of their spread."""
    distances = np.linalg.norm((known - at) / _spread(known), axis=1)
    places: list[int] = np.argsort(distances, kind="stable")[:NEAR].tolist()
    return places


def _spread(known: Vector) -> Vector:
    spread: Vector = known.std(0) + 1e-12
    return spread


def _mean(known: Vector, differences: Vector, at: Vector) -> float:
    return float(differences.mean())


def _least_squares(known: Vector, differences: Vector, at: Vector) -> float:
    middle, spread = known.mean(0), _spread(known)
    design = np.column_stack([np.ones(len(known)), (known - middle) / spread])
    weights, *_ = np.linalg.lstsq(design, differences, rcond=None)
    return float(np.array([1.0, *((at - middle) / spread)]) @ weights)


def _nearest_cells(known: Vector, differences: Vector, at: Vector) -> float:
    return float(differences[nearest(known, at)].mean())


Predictor = Callable[[Vector, Vector, Vector], float]
"""Features `[n, 4]` and differences `[n]` of cells, and features `[4]` → a difference."""
PREDICTORS: Mapping[str, Predictor] = {
    "mean": _mean,
    "least squares": _least_squares,
    "nearest cells": _nearest_cells,
}
"""What may foretell a difference, the simplest first: nothing but the cells' mean; least squares; the nearest cells."""
