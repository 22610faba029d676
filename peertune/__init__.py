"""Serverless fine-tuning: every party trains a LoRA adapter on its own data and mixes it with its neighbours'.

>>> from peertune import build, load_recipe, simulate
>>> run = build(load_recipe("digits-demo", ["rounds=2"]))
>>> for record in simulate(run.job):
...     print(record.round, record.loss)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peertune.assembly.build import build
    from peertune.data.partition import PARTITIONS, Partition
    from peertune.data.tasks import TASKS
    from peertune.engines.simulator import simulate
    from peertune.errors import PeertuneError
    from peertune.method import Algorithm, At, Gradient, Local, Memory, Message, Mixer, Phase, Schedule
    from peertune.methods.catalogue import ALGORITHMS
    from peertune.methods.mixers import gossip
    from peertune.methods.modifiers import MODIFIERS
    from peertune.methods.schedules import alternating, both, by_round
    from peertune.recipe import load_recipe
    from peertune.topology import GRAPHS, Graph
    from peertune.types import Split, Task, Tensors

__all__ = [
    "ALGORITHMS",
    "GRAPHS",
    "MODIFIERS",
    "PARTITIONS",
    "TASKS",
    "Algorithm",
    "At",
    "Gradient",
    "Graph",
    "Local",
    "Memory",
    "Message",
    "Mixer",
    "Partition",
    "PeertuneError",
    "Phase",
    "Schedule",
    "Split",
    "Task",
    "Tensors",
    "alternating",
    "both",
    "build",
    "by_round",
    "gossip",
    "load_recipe",
    "simulate",
]

_HOMES = {
    "ALGORITHMS": "peertune.methods.catalogue",
    "Algorithm": "peertune.method",
    "At": "peertune.method",
    "GRAPHS": "peertune.topology",
    "Gradient": "peertune.method",
    "Graph": "peertune.topology",
    "Local": "peertune.method",
    "MODIFIERS": "peertune.methods.modifiers",
    "Memory": "peertune.method",
    "Message": "peertune.method",
    "Mixer": "peertune.method",
    "PARTITIONS": "peertune.data.partition",
    "Partition": "peertune.data.partition",
    "PeertuneError": "peertune.errors",
    "Phase": "peertune.method",
    "Schedule": "peertune.method",
    "Split": "peertune.types",
    "TASKS": "peertune.data.tasks",
    "Task": "peertune.types",
    "Tensors": "peertune.types",
    "alternating": "peertune.methods.schedules",
    "both": "peertune.methods.schedules",
    "build": "peertune.assembly.build",
    "by_round": "peertune.methods.schedules",
    "gossip": "peertune.methods.mixers",
    "load_recipe": "peertune.recipe",
    "simulate": "peertune.engines.simulator",
}


def __getattr__(name: str) -> Any:
    # Names load on first use: `peertune --help` answers without waiting for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'peertune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
