"""Whether alternation pays for a recipe: what its own beginning, and runs that were measured before, foretell.

Nothing is answered that the evidence doesn't hold. A recipe has an answer where all that shapes its training is among
the measured cells' settings, but for who holds what; where its probe shows nothing that no cell showed; and where the
foretold difference is larger than the misses on skews that had been held out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peertune.assembly.build import build
from peertune.assembly.registry import completed
from peertune.engines.simulator import simulate
from peertune.errors import RecipeError
from peertune.planning.evidence import MEASURES, PREDICTORS, PROBED, Cell, Evidence, Law, Vector, features, nearest
from peertune.recipe import NO_SETTINGS, Choice, Recipe, block_defaults, flat
from peertune.rounds.metrics import relative_disagreement

BASE, ALTERNATING = "dec_lora", "tad_lora"


@dataclass(frozen=True)
class Outside:
    """Something of a recipe that no measured cell has."""

    key: str  # of the recipe, or of its probe
    value: Any
    measured: Sequence[Any]  # the values that cells have, or the least and the most

    @property
    def number(self) -> bool:
        """Whether it is only further off than what was measured, and not something else."""
        return all(map(_number, [self.value, *self.measured]))

    def __str__(self) -> str:
        had = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in self.measured]
        between = f"{had[0]} to {had[-1]}" if self.number and len({*had}) > 1 else " or ".join(dict.fromkeys(had))
        value = f"{self.value:.4g}" if isinstance(self.value, float) else self.value
        return f"{self.key} is {value}, and {between} in all that was measured"


@dataclass(frozen=True)
class Foretold:
    """By how much a method would be ahead of `dec_lora`, as a share of right answers."""

    method: str
    difference: float
    low: float  # less `Law.within`
    high: float
    law: Law
    ahead: bool | None  # or behind; None where that can't be told


@dataclass(frozen=True)
class Advice:
    """What is advised, and why."""

    method: str | None  # None: not enough to tell
    outside: list[Outside]  # for which there is no answer
    foretold: list[Foretold]  # for each method; [] where nothing was probed
    near: list[Cell]  # the nearest first


def outside(recipe: Recipe, evidence: Evidence) -> list[Outside]:
    """Return the recipe's settings that no cell has. Who holds what is none: cells of one skew foretell another's."""
    measured = {**{key: [value] for key, value in block_defaults().items()}, **evidence.settings}
    return [
        found for key, value in settings(recipe).items() if (found := _beyond(key, value, measured.get(key, [None])))
    ]


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return by key what shapes a recipe's training, but for the rows and who holds them."""
    chosen = completed(recipe)
    names = {f"{block}.name": chosen[block].name for block in ("task", "graph", "algorithm")}
    graph = {f"graph.{key}": chosen["graph"].settings.get(key) for key in ("activation", "weights")}
    blocks = {"model", "lora", "head", "clients", "modifiers", "training", "rounds", "faults", "attacks"}
    own = flat(recipe.model_dump(mode="json", include=blocks))
    names["time.mode"] = recipe.time.mode  # the rest of `time` changes nothing where all go by rounds
    return names | graph | {key: value for key, value in own.items() if key not in NO_SETTINGS}


def probe(recipe: Recipe, show: Callable[[int], None] = lambda done: None) -> dict[str, float]:
    """Run the first rounds of a recipe with `dec_lora`, and return what clients disagree about then, of MEASURES.

    `show` is told after each round how many are done. Raises what `build` and `simulate` raise.
    """
    changed = {"algorithm": Choice(name=BASE), "evaluate": recipe.evaluate.model_copy(update={"every": recipe.rounds})}
    job = build(recipe.model_copy(update=changed)).job
    if job.ranks:
        raise RecipeError("lora.ranks: nothing was measured of ranks that differ; give lora.r")
    for record in simulate(job):
        assert record.state is not None
        show(record.state.round)
        if record.state.round == PROBED:
            return relative_disagreement(record.state.adapters, record.diagnostics)
    raise AssertionError(f"{recipe.rounds} rounds are too few for a probe")


def can_probe(recipe: Recipe, beyond: Sequence[Outside]) -> bool:
    """Whether a probe can be made and would say anything: what the recipe has and no cell has is further numbers."""
    return recipe.rounds >= PROBED and all(found.number for found in beyond)


def advise(evidence: Evidence, beyond: Sequence[Outside], rho: float, seen: Mapping[str, float] | None) -> Advice:
    """Return what is to be done by what is known: the recipe's settings `outside`, its graph's rho and its probe."""
    if seen is None:
        return Advice(None, list(beyond), [], [])
    shown = [_beyond(f"the probe's {of}", seen[of], evidence.ranges[of]) for of in MEASURES]
    apart = [*beyond, *(found for found in shown if found is not None)]
    at = features(seen, rho)
    foretold = [_foretell(evidence, method, at, told=not apart) for method in evidence.laws]
    answers = {one.method: one.ahead for one in foretold}
    method = {True: ALTERNATING, False: BASE, None: None}[answers.get(ALTERNATING)]
    known = np.array([cell.features for cell in evidence.cells])
    return Advice(method, apart, foretold, [evidence.cells[place] for place in nearest(known, at)])


def _foretell(evidence: Evidence, method: str, at: Vector, *, told: bool) -> Foretold:
    cells, law = [cell for cell in evidence.cells if method in cell.differences], evidence.laws[method]
    known = np.array([cell.features for cell in cells])
    differences = np.array([cell.differences[method].mean for cell in cells])
    middle = PREDICTORS[law.by](known, differences, at)
    low, high = middle - law.within, middle + law.within
    return Foretold(method, middle, low, high, law, low > 0 if told and not low <= 0 <= high else None)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _beyond(key: str, value: Any, measured: Sequence[Any]) -> Outside | None:
    """Return what lies outside: no number from the least to the most, and nothing that some cell has."""
    found = Outside(key, value, sorted(measured) if all(map(_number, measured)) else measured)
    if value in measured or (found.number and min(measured) <= value <= max(measured)):
        return None
    return found
