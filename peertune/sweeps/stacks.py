"""Which runs of a sweep train as one stack, in one process: what they share is the base, its rows and adapters' shape.

A small base is loaded once for all of them, and a call of one of its many small operators serves them all. Calls bind a
GPU. A CPU is bound by arithmetic, and so is any device by a large base: there each run has a process of its own.
"""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from peertune.assembly.registry import build_attacks, build_graph, takes
from peertune.models.load import MODELS
from peertune.recipe import Recipe, flat

if TYPE_CHECKING:
    from peertune.sweeps.grid import SweepRun

SMALL_BYTES = 2**24
"""Weights up to which a base is small."""
BY_RUN = ("seed", "partition", "graph", "algorithm", "modifiers", "faults", "time", "rounds", "checkpoint")
"""Blocks and keys that runs of one stack may differ in."""
BY_RUN_IN_TRAINING = (
    "learning_rate",
    "loraplus_lr_ratio",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "lr_scheduler_span",
    "warmup_steps",
)
"""And keys of the block `training`: rates go by client."""


def stacks(runs: "Sequence[SweepRun]", processes: int, on_cpu: bool = False) -> "list[list[SweepRun]]":
    """Return the runs that are one stack, for all runs; most often of one run alone where nothing is to gain.

    What could be one stack is several where so many `processes` would otherwise have nothing to do. Runs on a CPU are
    put together if asked for, `on_cpu`.
    """
    alike: dict[str, list[SweepRun]] = {}
    for run in runs:
        alike.setdefault(_shared(run, on_cpu), []).append(run)
    parts = [np.array_split(range(len(some)), ceil(processes * len(some) / len(runs))) for some in alike.values()]
    return [
        [some[place] for place in part]
        for some, each in zip(alike.values(), parts, strict=True)
        for part in each
        if len(part)
    ]


def described(parts: "Sequence[Sequence[SweepRun]]") -> str:
    """Say how many runs train as how many stacks; nothing where none does."""
    sizes = [len(part) for part in parts if len(part) > 1]
    if not sizes:
        return ""
    of = "one stack" if len(sizes) == 1 else f"{len(sizes)} stacks of {', '.join(map(str, sizes))}"
    return f"{sum(sizes)} of {sum(map(len, parts))} runs train as {of}: their clients share every pass"


def _shared(run: "SweepRun", on_cpu: bool) -> str:
    """Return what runs of one stack have in common; a run that shares with none has its name in it."""
    recipe = run.recipe
    values = flat(recipe.model_dump(mode="json", exclude=set(BY_RUN)))
    shared = {key: x for key, x in values.items() if not key.startswith(_TRAINING)}
    gains = on_cpu or (recipe.device != "cpu" and torch.cuda.is_available())
    return str(shared) if gains and _can_share(recipe) else f"{run.name} {shared}"


_TRAINING = tuple(f"training.{key}" for key in BY_RUN_IN_TRAINING)


def _can_share(recipe: Recipe) -> bool:
    """Return whether a run can be in a stack with others, and its base is small.

    Trackers know one run at a time. A task that takes the seed may draw other rows for each, and so do attacks on rows.
    An adapter that is there already brings a head, which the base has once. Clients that wait for nobody train when
    their own results are due.
    """
    alone = (
        recipe.time.mode == "asynchronous"
        or recipe.report_to
        or recipe.lora.init is not None
        or takes("task", recipe.task.name, "seed")
        or (recipe.attacks and any(one.attack.poison for one in build_attacks(recipe, build_graph(recipe))))
    )
    return not alone and _weights_bytes(recipe.model.name) <= SMALL_BYTES


def _weights_bytes(name: str) -> float:
    """Return how large a base's weights are, of one that comes with the package or is a folder; inf of the hub's."""
    files = [*Path(MODELS.get(name, name)).glob("*.safetensors")]
    return sum(file.stat().st_size for file in files) if files else float("inf")
