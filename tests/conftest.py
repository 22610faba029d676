import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tensors this small, threads wait more than they work

from pathlib import Path

import pytest


@pytest.fixture
def glue_path() -> Path:
    """The folder with one folder of Parquet files for each GLUE task."""
    path = Path(__file__).parents[2] / "shared" / "data" / "glue"
    if not path.is_dir():
        pytest.skip(f"no GLUE data in {path}")
    return path
