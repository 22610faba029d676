"""The study of a minority client: its recipes are what its protocol says, and its tables find what was put in."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import minority, studies
from benchmarks.hostile import STUDIES
from benchmarks.minority import KINDS, RULES, named, settings
from peertune import build, load_recipe
from peertune.assembly.registry import check_choices


@pytest.mark.parametrize("rule", RULES)
def test_its_recipes_are_what_the_protocol_says(rule: str) -> None:
    recipe = load_recipe(STUDIES["digits"].recipe, [*STUDIES["digits"].settings, *settings("alone", rule, 3)])
    check_choices(recipe)
    assert recipe.algorithm.name == ("local" if rule == "local" else "dec_lora")
    assert [one.name for one in recipe.modifiers] == ([] if rule in ("none", "local") else [rule.split()[0]])
    assert (recipe.clients, recipe.rounds, recipe.training.local_steps, recipe.training.learning_rate) == (
        10,
        40,
        3,
        0.01,
    )
    assert (recipe.graph.name, recipe.graph.settings, recipe.attacks) == ("random_regular", {"degree": 4}, [])


@pytest.mark.parametrize(("kind", "its", "theirs"), [("alone", 1.0, 0.0), ("mostly", 0.8, 0.1)])
def test_one_client_alone_holds_two_classes_or_most_of_its_rows_are_of_them(
    kind: str, its: float, theirs: float
) -> None:
    recipe = load_recipe(STUDIES["digits"].recipe, [*STUDIES["digits"].settings, *settings(kind, "median", 9)])
    held = np.array(build(recipe).held)
    who, classes = minority.minority(9)
    assert (who, classes) == (9, [4, 0])
    sizes = held.sum(1)
    assert len({*sizes}) == 1
    assert 40 < sizes[0] < 50
    shares = held[:, classes].sum(1) / sizes
    assert shares[who] == pytest.approx(its, abs=0.05)
    assert np.delete(shares, who) == pytest.approx(theirs, abs=0.05)


def test_its_runs_train_as_one_stack_and_say_what_was_right_and_taken() -> None:
    of = STUDIES["digits"]._replace(settings=("clients=10", "rounds=2", "training.local_steps=1"))
    asked = {named("alone", rule, 0): settings("alone", rule, 0) for rule in ("none", "clipped hostile: 2")}
    rows = dict(studies.scored(of, asked, watch=minority.taken, at_end=minority.judged))
    assert rows.keys() == asked.keys()
    for name, row in rows.items():
        assert np.array(row["right"]).shape == (10, 5)
        assert len(row["average"]) == 5
        counts = np.array([50, 50, 50, 50, 53])  # nobody's rows, about as many of each class
        assert np.array(row["right"]) @ counts / counts.sum() == pytest.approx(np.array(row["new"]), abs=0.03)
        assert [who for who, *_ in row["taken"]] == ([*range(10)] if "clipped" in name else [])


def test_its_tables_find_what_was_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(studies, "KEPT", tmp_path)
    costs = {"none": 0.0, "median": 0.2, "krum hostile: 1": 0.0}
    with (tmp_path / "minority-digits.jsonl").open("w") as file:
        for seed in range(3):
            who, classes = minority.minority(seed)
            for rule, cost in costs.items():
                score = [0.5 + 0.1 * seed - cost if number in classes else 0.9 for number in range(5)]
                row = {
                    "run": named("mostly", rule, seed),
                    "right": [score if client == who else [0.8] * 5 for client in range(10)],
                    "average": [0.7] * 5,
                    # Of the minority little, and once of another, too
                    "taken": [
                        (client, 10.0, 1.0 if client == who or (seed, client) == (2, 7) else 6.0)
                        for client in range(10 if "krum" in rule else 0)
                    ],
                }
                file.write(json.dumps(row) + "\n")
        diverged = {"run": named("mostly", "balance gamma: 1.0", 0), "taken": []}
        file.write(json.dumps(diverged) + "\n")
    minority.table()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "10 of 180 runs"
    nothing = "+0.000 [+0.000, +0.000]"
    its, theirs, *_, average, _ = (line for line in lines if line.startswith("| mostly"))
    assert its == (
        "| mostly | the minority | the minority's | 0.600 [0.352, 0.848] | – | – | – | – | +0.500 | "
        f"{nothing} | – | +0.200 [+0.200, +0.200] |"
    )
    assert theirs.endswith(
        f"| the others' | 0.900 [0.900, 0.900] | – | – | – | – | +0.900 | {nothing} | – | {nothing} |"
    )
    assert average.startswith("| mostly | the average | the minority's | 0.700 [0.700, 0.700] |")
    minority.suspects()
    assert capsys.readouterr().out.splitlines()[2:] == ["| mostly | krum hostile: 1 | 0.10 | 0.60 | 3 of 3 | 1 of 3 |"]


def test_all_runs_are_asked_for_once() -> None:
    names = [name for some in minority.asked() for name in some]
    assert len(names) == len({*names}) == len(KINDS) * len(RULES) * 10
