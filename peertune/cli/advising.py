"""The command `advise`."""

import shlex
from typing import TYPE_CHECKING

from peertune.cli.common import (
    AsJson,
    Overrides,
    Plugins,
    RecipeName,
    importing,
    interruptible,
    messages,
    print_json,
    progress,
)

if TYPE_CHECKING:
    from peertune.planning.advice import Foretold
    from peertune.planning.evidence import Cell

CELLS_SHOWN = 3
WEAK = "skews that were held out are missed by more than the difference that is foretold"
MISSING = "too little was measured"


def advise(recipe: RecipeName, overrides: Overrides = None, plugin: Plugins = None, as_json: AsJson = False) -> None:
    """Say whether alternation would pay for a recipe: tad_lora against dec_lora, by runs that were measured.

    The first 15 rounds of the recipe are run with dec_lora, and nothing is kept of them. What clients disagree about
    then, and the graph's rho, foretell the difference in accuracy, as in the cells of docs/atlas.md. "Not enough to
    tell" is an answer: where the recipe has what no cell has, or where other skews were missed by more than the
    difference. Then it says which commands would measure it.

    Examples:

      peertune advise digits-demo

      peertune advise digits-demo rounds=60 training.local_steps=5 training.per_device_train_batch_size=4
    """
    with interruptible(), messages():
        with importing():
            from dataclasses import asdict

            from peertune.assembly.registry import build_graph, describe_graph
            from peertune.planning import advice, evidence
            from peertune.recipe import load_recipe

        known, loaded = evidence.read(), load_recipe(recipe, overrides or [])
        graph, beyond, seen = describe_graph(build_graph(loaded)), advice.outside(loaded, known), None
        if advice.can_probe(loaded, beyond):
            with progress("rounds of the probe", evidence.PROBED) as show:
                seen = advice.probe(loaded, lambda done: show(done, ""))
        found = advice.advise(known, beyond, graph["rho"], seen)
    interval, to_measure = graph["switching_interval"], _to_measure(recipe, overrides or [])
    if as_json:
        told = {"method": found.method, "switch_every": interval if found.method == advice.ALTERNATING else None}
        told |= {"chance": known.chance, "outside": [str(one) for one in found.outside], "probe": seen}
        told |= {"rho": graph["rho"], "switching_interval": interval, "to_measure": to_measure}
        told |= {name: [asdict(one) for one in getattr(found, name)] for name in ("foretold", "near")}
        print_json(told | {"cells": len(known.cells), "runs": known.runs, "runs_planned": known.of})
        return
    print(f"graph     rho {graph['rho']:.3f}, T* {interval}")
    print(f"evidence  {len(known.cells)} cells, {known.runs:,} of {known.of:,} runs (docs/atlas.md), as accuracy")
    if seen is None:
        print("probe     none, since it would change nothing")
    else:
        shares = f"cross term {seen['cross']:.3g}, A {seen['A']:.3g}, B {seen['B']:.3g}"
        print(f"probe     {advice.BASE}, {evidence.PROBED} rounds; disagreement over what clients hold: {shares}")
    for one in found.foretold:
        print(f"foretold  {_foretold(one)}")
    for cell in found.near[:CELLS_SHOWN]:
        print(f"measured  {_measured(cell, advice.ALTERNATING)}")
    if found.method is None:
        print("advice    not enough to tell whether alternation pays")
        for why in [*map(str, found.outside)] or [WEAK if found.foretold else MISSING]:
            print(f"because   {why}")
        print(f"measure   {to_measure[0]}\n          {to_measure[1]}")
        return
    every = f" algorithm.switch_every={interval}, T* as in all cells" * (found.method == advice.ALTERNATING)
    print(f"advice    algorithm.name={found.method}{every}, at this learning rate; what is best at another is not told")
    print(f"sure      to {known.chance:.0%} at most: {known.skews} skews were held out in turn, and yours is another")


def _to_measure(recipe: str, overrides: list[str]) -> list[str]:
    """Return the commands that would tell."""
    kept = [word for word in overrides if not word.startswith(("algorithm", "seed"))]
    asked = ["algorithm={name: dec_lora},{name: tad_lora}", "seed=0,1,2,3,4", "--out", "runs/told"]
    compared = "peertune compare runs/told --by algorithm.name --paired-with dec_lora"
    return [shlex.join(["peertune", "sweep", recipe, *kept, *asked]), compared]


def _foretold(one: "Foretold") -> str:
    word = {True: ": ahead", False: ": behind", None: ""}[one.ahead]
    missed = f"which misses skews held out by {one.law.errors[one.law.by]:.3f}, 95 % within {one.law.within:.3f}"
    told = f"{one.method} {one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}] against dec_lora{word}"
    return f"{told}; by {one.law.by}, {missed}"


def _measured(cell: "Cell", method: str) -> str:
    if (x := cell.differences.get(method)) is None:
        return f"nothing of {method} at {cell.name}"
    between = "" if x.low is None else f" [{x.low:+.3f}, {x.high:+.3f}]"
    return f"{method} {x.mean:+.3f}{between}, {x.seeds} seeds of {cell.name}"
