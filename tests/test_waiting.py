"""The study of those who don't wait: its recipes are what its protocol says, and its table finds what was put in."""

import json
from pathlib import Path

import pytest

from benchmarks import studies, waiting
from benchmarks.waiting import CELLS, LONG, SPEEDS, STUDIES, Cell, named, settings
from peertune import load_recipe
from peertune.assembly.registry import build_clock, build_partition, build_task, check_choices, label_counts

NINE = STUDIES["digits"].rare


@pytest.mark.parametrize("cell", [*CELLS, *LONG], ids=" ".join)
def test_its_recipes_are_what_the_protocol_says(cell: Cell) -> None:
    recipe = load_recipe("digits-demo", settings("digits", "straggler", cell, 7))
    check_choices(recipe)
    clock = build_clock(recipe)
    assert clock is not None
    assert [clock.step_s(client, 5) for client in (0, 1, 9)] == [10, 1, 1]
    assert (recipe.time.mode == "rounds") == (cell.waits in ("rounds", "salf", "drop"))
    assert (recipe.time.deadline_s is not None) == (cell.waits in ("salf", "drop"))
    task = build_task(recipe)
    held = label_counts(task, task.train, build_partition(recipe, task))
    assert [row[NINE] > 0 for row in held] == [True, *[False] * 9]
    assert held[0][NINE] == pytest.approx(0.6 * sum(held[0]), abs=1)
    assert task.classes[NINE] == "9"
    assert recipe.task.settings["validation_split"] == "3/5"


def test_with_sentences_the_straggler_comes_first_and_has_most_of_what_is_positive() -> None:
    runs = list(waiting.asked("sst2"))
    assert len(runs) == len(set(runs)) == 48
    assert {speed for _, speed, _ in runs[:24]} == {"straggler"}
    for seed, speed, cell in runs[:: len(runs) - 1]:
        recipe = load_recipe("tad-sst2-minilm", settings("sst2", speed, cell, seed))
        check_choices(recipe)
        assert recipe.partition.settings["proportions"] == [[0.1, 0.9], *[[0.7, 0.3]] * 9]
        assert recipe.rounds == (40 if cell.waits == "rounds" else 60)


def test_its_table_finds_what_was_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(studies, "KEPT", tmp_path)
    speed = next(iter(SPEEDS))
    with (tmp_path / "waiting.jsonl").open("w") as file:
        for seed in range(4):
            # In rounds .6 at half of them; without waiting a quarter of the time, twice the steps, but one seed never.
            rounds = [[30, 900.0, 900, 1.0, 0.6, 0.5], [60, 1800.0, 1800, 2.0, 0.7, 0.6]]
            best = 0.65 if seed else 0.55
            own = [[30, 100.0, 900, 1.0, 0.4, 0.1], [90, 225.0, 1800, 2.5, best, 0.4 + 0.1 * (seed % 2)]]
            for waits, seen in (("rounds", rounds), ("own", own), ("long", own)):
                file.write(json.dumps({"run": named(speed, Cell("dec_lora", waits), seed), "seen": seen}) + "\n")
    waiting.table("digits")
    waiting.table_of_ends()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12 of 250 runs"
    told = next(line for line in lines if "| own |" in line)
    assert "| straggler | dec_lora | own | 3 of 4 | 0.25 [0.25, 0.25] | 2.00 [2.00, 2.00] | 2.50 [2.50, 2.50] |" in told
    assert "| -0.033 [" in told, "recalls of .5, .4 and .5 beside .5"
    assert told.endswith("| 0.625 |")
    assert lines[-1].startswith("| dec_lora | long | 4 | 0.700 [0.700, 0.700] | 0.625 [")
    assert "| 0.600 [0.600, 0.600] | 0.450 [" in lines[-1]
