"""What docs/results.md prints comes out again: a row of a table, a run that a study keeps, and both elsewhere."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import Call

from benchmarks import processors, which

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
FEW = [*processors.SHORT, "rounds=5", "evaluate.every=5", "seed=0"]
"""What is made in one set-up after the other: the beginning of a run of the table."""
pytestmark = pytest.mark.thorough


def test_a_table_comes_out_as_it_is_printed(peertune: Call) -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("peertune ") and "runs/short" in line]
    sweep, compare = map(shlex.split, lines)
    assert [word for word in sweep if "=" in word and not word.startswith("seed=")] == list(processors.SHORT)
    for words in (sweep, compare):
        code, out, err = peertune(*words[1:])
        assert code == 0, err
    table = out.strip()
    assert len(table.splitlines()) == 3
    assert table in PAGE.read_text(), out


def test_a_run_of_a_study_comes_out_as_it_is_kept() -> None:
    """It was made on another processor: accuracies are shares of rows, and none of its answers lies near another."""
    now, kept = which.again("digits", "dec_lora p=0.5 fold=1 rate=0.01 seed=0")
    assert (now["own"], now["new"]) == (kept["own"], kept["new"])
    assert len(now["own"]) == len(now["new"]) == 12


@pytest.fixture(scope="module")
def here() -> processors.Made:
    return processors.make(FEW)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("AVX2", {"settings": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}),
        ("SSE4", {"cpu_capability": "DEFAULT"}),
        ("two threads", {"threads": 2}),
        ("without oneDNN", {"onednn": False}),
    ],
)
def test_a_run_has_the_same_scores_on_another_processor_and_says_where_it_was_made(
    where: str, says: dict[str, Any], here: processors.Made
) -> None:
    found = processors.elsewhere(where, FEW)
    assert {key: found.environment[key] for key in says} == says
    assert found.scores == here.scores
    assert processors.moved(here, found).max() < processors.margins(here).min() / 10
