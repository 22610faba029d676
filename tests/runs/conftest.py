from pathlib import Path

import pytest
from run_directories import create


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return create(tmp_path / "runs" / "one")
