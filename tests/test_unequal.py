"""The study of unequal ranks: its recipes are what its protocol says, and its tables find what was put in."""

import json
from pathlib import Path

import pytest

from benchmarks import studies, unequal
from benchmarks.unequal import CELLS, RANKS, RATES, STUDIES, Cell, named, settings
from peertune import build, load_recipe
from peertune.assembly.ranks import ranks_of
from peertune.assembly.registry import check_choices
from peertune.recipe import Recipe

UNEQUAL = {"digits": [2] * 6 + [4] * 3 + [8] * 3, "sst2": [4] * 4 + [8] * 4 + [16] * 2}
ALL = {"digits": {"smallest": 2, "mean": 4, "largest": 8}, "sst2": {"smallest": 4, "mean": 8, "largest": 16}}


def recipe_of(study: str, cell: Cell, seed: int) -> Recipe:
    of = STUDIES[study]
    return load_recipe(of.recipe, [*of.settings, *settings(study, cell, seed)])


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_its_recipes_are_what_the_protocol_says(study: str, cell: Cell) -> None:
    recipe = recipe_of(study, cell, 3)
    check_choices(recipe)
    method, _, modifier = cell.method.partition("+")
    assert recipe.algorithm.name == method
    assert [one.name for one in recipe.modifiers] == ([modifier] if modifier else [])
    clients = len(UNEQUAL[study])
    asked = UNEQUAL[study] if cell.ranks == "unequal" else [ALL[study][cell.ranks]] * clients
    assert sorted(ranks_of(recipe)) == asked
    assert recipe.clients == clients
    assert (recipe.lora.r, recipe.lora.scaling) == (ALL[study]["mean"], "common")
    assert recipe.graph.settings["activation"] == 0.5
    assert recipe.training.learning_rate == RATES[study][method]
    assert (recipe.rounds, recipe.training.local_steps) == ({"digits": 40, "sst2": 50}[study], 3)
    assert recipe.evaluate.held_out == ("4/5" if study == "digits" else "1/20")


@pytest.mark.parametrize("ranks", ["unequal", "smallest", "mean", "largest"])
def test_all_conditions_have_one_scale(ranks: str) -> None:
    job = build(recipe_of("digits", Cell("dec_lora", ranks), 0)).job
    assert {scale for site in job.model.sites.values() for scale in site.scalings.values()} == {2.0}
    held = {rank for site in job.model.sites.values() for rank in site.scalings}
    assert held == (set(RANKS["digits"].unequal) if ranks == "unequal" else {ALL["digits"][ranks]})
    assert sorted(unequal.dealt(job)["ranks"]) == (UNEQUAL["digits"] if ranks == "unequal" else [])


@pytest.mark.parametrize("study", STUDIES)
def test_all_cells_are_asked_for_once_and_a_stack_is_of_one_fold_and_one_table(study: str) -> None:
    stacks = list(unequal.asked(study))
    names = [name for some in stacks for name in some]
    assert sorted(names) == sorted(named(cell, seed) for seed in STUDIES[study].seeds for cell in CELLS)
    for some in stacks[::7]:
        recipes = [load_recipe(STUDIES[study].recipe, own) for own in some.values()]
        assert all(one.lora == recipes[0].lora and one.evaluate == recipes[0].evaluate for one in recipes)


def test_runs_of_unequal_ranks_train_as_one_stack_and_what_each_client_sends_goes_by_its_rank() -> None:
    of = STUDIES["digits"]._replace(settings=("rounds=2", "training.local_steps=1", "graph.activation=1"))
    cells = [Cell(method, "unequal") for method in ("dec_lora", "decaf")]
    asked = {named(cell, 0): settings("digits", cell, 0) for cell in cells}
    rows = dict(studies.scored(of, asked, look=unequal.dealt, watch=unequal.added))
    assert rows.keys() == asked.keys()
    for row in rows.values():
        assert sorted(row["ranks"]) == UNEQUAL["digits"]
        assert len(row["own"]) == len(row["new"]) == 12
        sent = dict(zip(row["ranks"], row["bytes"], strict=True))
        assert [sent[rank] for rank in row["ranks"]] == row["bytes"]
        assert sent[2] < sent[4]
        assert sent[8] - sent[4] == 2 * (sent[4] - sent[2])


def test_its_tables_find_what_was_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(studies, "KEPT", tmp_path)
    # By rank: unequal ranks give those of 8 a tenth more than the smallest for all does, and take .02 of those of 2.
    gains = {"unequal": {2: -0.02, 4: 0.0, 8: 0.1}, "unequal+": {2: -0.02, 4: 0.0, 8: 0.08}}
    with (tmp_path / "unequal-digits.jsonl").open("w") as file:
        for seed in range(3):
            ranks = UNEQUAL["digits"][seed:] + UNEQUAL["digits"][:seed]
            for method, condition in (
                ("dec_lora", "unequal"),
                ("dec_lora+zero_padded", "unequal"),
                ("dec_lora", "smallest"),
            ):
                gain = gains.get(condition + "+" * ("+" in method), dict.fromkeys((2, 4, 8), 0.0))
                row = {
                    "run": named(Cell(method, condition), seed),
                    "own": [0.5 + 0.1 * seed + gain[rank] for rank in ranks],
                    "new": [] if condition == "smallest" else [0.3] * 12,  # as of those that diverge
                    "bytes": [10**6 * (rank if condition == "unequal" else 2) for rank in ranks],
                    "ranks": ranks if condition == "unequal" else [],
                }
                file.write(json.dumps(row) + "\n")
    unequal.table("digits")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "9 of 130 runs"
    dealt = "6 × 2, 3 × 4, 3 × 8"
    assert lines[4:] == [
        f"| dec_lora | {dealt} | 3 | 4.00 | 0.615 | – | 0.300 | – |",
        "| dec_lora | all 2 | 3 | 2.00 | 0.600 | +0.015 [+0.015, +0.015] | 0.000 | +0.300 [+0.300, +0.300] |",
        f"| dec_lora+zero_padded | {dealt} | 3 | 4.00 | 0.610 | – | 0.300 | – |",
        f"| dec_lora | {dealt} | 3 | 4.00 | 0.615 | -0.005 [-0.005, -0.005] | 0.300 | +0.000 [+0.000, +0.000] |",
        "| dec_lora | all 2 | 3 | 2.00 | 0.600 | +0.010 [+0.010, +0.010] | 0.000 | +0.300 [+0.300, +0.300] |",
    ]
    unequal.groups("digits")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| method | a client's rank | MB | score | unequal | less all 2 | less all 4 | less all 8 |"
    assert "| dec_lora | 2 | 2.00 | own | 0.580 | -0.020 [-0.020, -0.020] |  |  |" in lines
    assert "| dec_lora | 8 | 8.00 | own | 0.700 | +0.100 [+0.100, +0.100] |  |  |" in lines
    assert "| dec_lora+zero_padded | 8 | 8.00 | own | 0.680 | +0.080 [+0.080, +0.080] |  |  |" in lines
