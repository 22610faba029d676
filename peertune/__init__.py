"""Serverless fine-tuning: every party trains a LoRA adapter on its own data and mixes it with its neighbours'.

>>> import peertune
>>> run = peertune.run("digits-demo", ["rounds=2"], out="runs/two")
>>> run.summary["mean"], run.adapters.keys()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

from peertune.deprecation import NAMES, said

if TYPE_CHECKING:  # for those who check types, the same names as below
    from peertune.api.running import resume as resume
    from peertune.api.running import run as run
    from peertune.api.runs import Run as Run
    from peertune.api.runs import Runs as Runs
    from peertune.api.sweeping import sweep as sweep
    from peertune.assembly.build import build as build
    from peertune.data.partition import PARTITIONS as PARTITIONS
    from peertune.data.partition import Partition as Partition
    from peertune.data.tasks import TASKS as TASKS
    from peertune.engines.simulator import simulate as simulate
    from peertune.errors import PeertuneError as PeertuneError
    from peertune.errors import Stopped as Stopped
    from peertune.method import Algorithm as Algorithm
    from peertune.method import At as At
    from peertune.method import Gradient as Gradient
    from peertune.method import Local as Local
    from peertune.method import Memory as Memory
    from peertune.method import Message as Message
    from peertune.method import Mixer as Mixer
    from peertune.method import Phase as Phase
    from peertune.method import Schedule as Schedule
    from peertune.methods.attacks import ATTACKS as ATTACKS
    from peertune.methods.attacks import Attack as Attack
    from peertune.methods.catalogue import ALGORITHMS as ALGORITHMS
    from peertune.methods.mixers import gossip as gossip
    from peertune.methods.modifiers import MODIFIERS as MODIFIERS
    from peertune.methods.schedules import alternating as alternating
    from peertune.methods.schedules import both as both
    from peertune.methods.schedules import by_round as by_round
    from peertune.recipe import load_recipe as load_recipe
    from peertune.topology import GRAPHS as GRAPHS
    from peertune.topology import Graph as Graph
    from peertune.types import Split as Split
    from peertune.types import Task as Task
    from peertune.types import Tensors as Tensors

__version__ = "0.2.0"
"""Of the package; the one place, which the wheel's metadata follow."""

_NAMES = {
    "api.running": "resume run",
    "api.runs": "Run Runs",
    "api.sweeping": "sweep",
    "assembly.build": "build",
    "data.partition": "PARTITIONS Partition",
    "data.tasks": "TASKS",
    "engines.simulator": "simulate",
    "errors": "PeertuneError Stopped",
    "method": "Algorithm At Gradient Local Memory Message Mixer Phase Schedule",
    "methods.attacks": "ATTACKS Attack",
    "methods.catalogue": "ALGORITHMS",
    "methods.mixers": "gossip",
    "methods.modifiers": "MODIFIERS",
    "methods.schedules": "alternating both by_round",
    "recipe": "load_recipe",
    "topology": "GRAPHS Graph",
    "types": "Split Task Tensors",
}
_HOMES = {name: f"peertune.{home}" for home, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES, key=lambda name: (not name.isupper(), name[0].islower(), name))


def __getattr__(name: str) -> Any:
    # Names load on first use: `peertune --help` answers without waiting for torch.
    if (going := NAMES.get(name)) is not None:
        warn(said(f"peertune.{name}", going), DeprecationWarning, stacklevel=2)
        name = going.instead
    if name not in _HOMES:
        raise AttributeError(f"module 'peertune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
