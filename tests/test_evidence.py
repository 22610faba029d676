"""What the package and the page say of the atlas is what its kept runs come to."""

from pathlib import Path

import pytest

from benchmarks import atlas
from benchmarks.evidence import AGAIN, PAGE, as_text, drawn, gathered, table
from benchmarks.studies import Kept
from peertune.planning import evidence

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_evidence_that_ships_is_of_the_runs_that_are_kept() -> None:
    assert evidence.FILE.read_text() == as_text(gathered()), "run: python -m benchmarks.evidence write"


def test_the_pages_tables_are_of_the_runs_that_are_kept() -> None:
    assert table() in PAGE.read_text(), "run: python -m benchmarks.evidence write"


def test_the_runs_that_are_made_again_are_ten_of_the_writers_and_the_same_each_time() -> None:
    runs = drawn()
    assert runs == drawn()
    assert len({name for name, _, _ in runs}) == AGAIN
    assert all(name.startswith("writers ") and row == Kept("atlas").rows[name] for name, _, row in runs)
    assert {name.split()[4] for name, _, _ in runs} <= {*atlas.METHODS, *atlas.ENDS}
