from pathlib import Path
from typing import Any

import pytest

from benchmarks import atlas
from benchmarks.atlas import OF, SKEWS, Cell
from benchmarks.studies import Kept
from peertune.planning import advice, evidence
from peertune.planning.advice import BASE, can_probe, outside, probe
from peertune.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
KNOWN = evidence.read()


def measured(*overrides: str, skew: str = "dirichlet", method: str = "tad_lora") -> Recipe:
    """Return the recipe of a cell."""
    return load_recipe(OF.recipe, [*OF.settings, *atlas.settings(Cell(skew, 0.1, 1, 0.01), method, 0), *overrides])


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("method", atlas.METHODS)
def test_what_was_measured_lies_inside_whoever_holds_what(skew: str, method: str) -> None:
    recipe = measured(skew=skew, method=method)
    assert outside(recipe, KNOWN) == []
    assert can_probe(recipe, [])
    assert outside(measured("partition={name: dirichlet, alpha: 5}", "seed=7", "clients=11"), KNOWN) == []
    assert outside(measured("training.learning_rate=0.015", "graph.activation=0.3"), KNOWN) == []


@pytest.mark.parametrize(
    ("overrides", "keys", "probed"),
    [
        (["training.learning_rate=0.03"], ["training.learning_rate"], True),
        (["clients=40", "rounds=80"], ["clients", "rounds"], True),
        (["rounds=14"], ["rounds"], False),
        (["training.weight_decay=0.5"], ["training.weight_decay"], True),
        (["training.optim=sgd"], ["training.optim"], False),
        (["lora.init_lora_weights=pissa"], ["lora.init_lora_weights"], False),
        (["lora.rank_pattern={q_proj: 2}"], ["lora.rank_pattern.q_proj"], False),
        (["training.class_weight={cat: 2.0}"], ["training.class_weight.cat"], False),
        (["algorithm={name: decaf}"], ["algorithm.name"], False),
        (["modifiers=[{name: half}]"], ["modifiers"], False),
        (["faults=[{rounds: [0, 3], down: 1}]"], ["faults"], False),
        (["graph={name: ring}"], ["graph.name", "graph.activation"], False),
        (
            ["graph={name: epidemic, fan_out: 2, weights: push_sum}"],
            ["graph.name", "graph.weights", "graph.activation"],
            False,
        ),
        (["task={name: glue, config: stsb}"], ["task.name"], False),
        (["head=frozen"], ["head"], False),
        (["time={step_s: 1}"], [], True),
        (["time={step_s: 1, mode: asynchronous}"], ["time.mode"], False),
    ],
)
def test_what_no_cell_has_is_named_and_a_probe_is_made_where_it_is_further_numbers_alone(
    overrides: list[str], keys: list[str], probed: bool
) -> None:
    recipe = measured(*overrides)
    found = outside(recipe, KNOWN)
    assert {one.key for one in found} == {*keys}
    assert can_probe(recipe, found) is probed
    assert all(str(one).startswith(f"{one.key} is ") for one in found)
    assert advice.advise(KNOWN, found, 0.6, None).method is None


def test_a_recipe_outside_has_no_answer_whatever_its_probe_shows() -> None:
    ranges = dict.fromkeys(evidence.MEASURES, (0.0, 1e9))
    law = evidence.Law("mean", {"mean": 0.01}, 0.01)
    difference = evidence.Difference(0.2, 0.1, 0.3, 5)
    cell = evidence.Cell("a cell", (0.0, 0.0, 0.0, 0.5), {"tad_lora": difference})
    known = evidence.Evidence(10, 10, 3, {}, ranges, [cell], {"tad_lora": law})
    seen = {"cross": 0.1, "A": 0.1, "B": 0.1}
    said = advice.advise(known, [], 0.5, seen)
    assert (said.method, said.foretold[0].ahead, said.near) == ("tad_lora", True, [cell])
    said = advice.advise(known, outside(measured("rounds=80"), KNOWN), 0.5, seen)
    assert (said.method, said.foretold[0].ahead, [str(one) for one in said.outside]) == (
        None,
        None,
        ["rounds is 80, and 60 in all that was measured"],
    )
    said = advice.advise(known, [], 0.5, seen | {"A": 1e10})
    assert (said.method, [one.key for one in said.outside]) == (None, ["the probe's A"])


def test_a_probe_is_what_the_kept_run_showed_whatever_the_recipes_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    kept: dict[str, Any] = Kept("atlas").rows[atlas.named(Cell("dirichlet", 0.1, 1, 0.01), BASE, 0)]["probe"]
    told: list[int] = []
    seen = probe(measured(), told.append)
    assert seen == pytest.approx(kept, rel=1e-3)  # which was made in a stack, on another day
    assert told == [*range(1, evidence.PROBED + 1)]
