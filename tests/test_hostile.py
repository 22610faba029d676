"""The study of members that lie: its recipes are what its protocol says, and its tables find what was put in."""

import json
from pathlib import Path

import pytest

from benchmarks import hostile, studies
from benchmarks.hostile import CLEAN, STUDIES, Cell, liars, named, settings
from peertune import load_recipe
from peertune.assembly.registry import check_choices

STUDIED = list(hostile.studied())


def test_all_runs_are_asked_for_once_and_those_of_decaf_last() -> None:
    names = [named(cell, seed) for cell, seed in STUDIED]
    assert len(names) == len({*names}) == 2840
    decaf = [cell.rule.startswith("decaf+") for cell, _ in STUDIED]
    assert decaf == sorted(decaf)
    assert sum(decaf) == 200
    assert sorted(name for some in hostile.asked(iter(STUDIED)) for name in some) == sorted(names)


@pytest.mark.parametrize("rule", sorted({cell.rule for cell, _ in STUDIED}))
def test_its_recipes_are_what_the_protocol_says(rule: str) -> None:
    for cell in {cell for cell, seed in STUDIED if cell.rule == rule and seed == 3}:
        recipe = load_recipe(STUDIES["digits"].recipe, [*STUDIES["digits"].settings, *settings(cell, 3)])
        check_choices(recipe)
        method, _, own = rule.rpartition("+")
        assert recipe.algorithm.name == ("local" if own == "local" else method or "dec_lora")
        assert [one.name for one in recipe.modifiers] == ([] if own in ("none", "local") else [own.split()[0]])
        attacks = [] if cell.attack in (CLEAN, "absent") else [(cell.attack, tuple(liars(3, cell.hostile)))]
        assert [(one.name, tuple(one.clients)) for one in recipe.attacks] == attacks
        assert len(recipe.faults) == (cell.hostile if cell.attack == "absent" else 0)
        assert recipe.evaluate.held_out == "4/5"


def test_a_loss_is_held_against_the_methods_own_clean_run_of_the_same_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(studies, "KEPT", tmp_path)
    with (tmp_path / "hostile-digits.jsonl").open("w") as file:
        for cell, score in (
            (Cell("none", CLEAN, 0, "labels", "four"), 0.8),
            (Cell("none", "scale", 2, "labels", "four"), 0.3),
            (Cell("none", CLEAN, 0, "labels", "half"), 0.8),
            (Cell("none", "scale", 2, "labels", "half"), 0.4),
            (Cell("gt_pd trusted: 0.8", "scale", 2, "labels", "four"), 0.79),
            (Cell("decaf+none", CLEAN, 0, "labels", "four"), 0.6),
            (Cell("decaf+none", "scale", 2, "labels", "four"), 0.55),
        ):
            # who is hostile scores nothing under the attack, and 0 in the clean run: it must not count there
            scores = [score] * 8 if cell.hostile else [0.0 if i in liars(0, 2) else score for i in range(10)]
            file.write(json.dumps({"run": named(cell, 0), "own": [], "new": scores}) + "\n")
    rows = hostile.kept().rows
    assert hostile.losses(rows, Cell("decaf+none", "scale", 2, "labels", "four"), [0, 1]) == pytest.approx({0: 0.05})
    hostile.holds([0, 1])
    assert "| scale | – | +0.400 to +0.500 | – | +0.010 to +0.010 |" in capsys.readouterr().out.splitlines()
