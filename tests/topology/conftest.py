"""Graphs for the tests of this folder."""

from pathlib import Path

import pytest

from peertune.topology import pairs, rho, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw in blocks, and blocks of a few pairs, as with many clients; nothing is remembered that was drawn before."""
    rho.cache_clear()
    monkeypatch.setattr(weights, "LISTED_PAIRS", 20)
    monkeypatch.setattr(pairs, "BLOCK", 16)
