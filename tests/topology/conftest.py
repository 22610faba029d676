"""Graphs for the tests of this folder."""

from pathlib import Path

import pytest

from peertune.topology import pairs, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw in blocks, and blocks of a few pairs, as with many clients."""
    monkeypatch.setattr(weights, "LISTED_PAIRS", 20)
    monkeypatch.setattr(pairs, "BLOCK", 16)
