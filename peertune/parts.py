"""The parts of a recipe that are chosen by name; the only reader of the tables of names.

They are made without a base model, so that a graph or a partition can be looked at in a second.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peertune.algorithms.methods import ALGORITHMS
from peertune.data.partition import PARTITIONS
from peertune.data.tasks import TASKS, Task
from peertune.recipe import Part, Recipe, arguments
from peertune.topology import GRAPHS, Graph, rho
from peertune.types import Algorithm

log = logging.getLogger(__name__)


def build_graph(recipe: Recipe) -> Graph:
    """Make the recipe's graph."""
    graph: Graph = _make(GRAPHS, recipe.graph, "graph", clients=recipe.clients, seed=recipe.seed)
    return graph


def build_task(recipe: Recipe) -> Task:
    """Load the recipe's data."""
    log.info("loading the task %s", recipe.task.name)
    task: Task = _make(TASKS, recipe.task, "task")
    return task


def build_partition(recipe: Recipe, task: Task) -> list[NDArray[np.int64]]:
    """Deal the training rows to the clients; return the rows of each."""
    divide = _make(PARTITIONS, recipe.partition, "partition")
    parts: list[NDArray[np.int64]] = divide(task.train, recipe.clients, recipe.seed)
    return parts


def build_algorithm(recipe: Recipe, graph: Graph) -> Algorithm:
    """Make the recipe's method for this graph."""
    algorithm: Algorithm = _make(ALGORITHMS, recipe.algorithm, "algorithm", rho=partial(rho, graph))
    return algorithm


def resolved_parts(recipe: Recipe, algorithm: Algorithm) -> dict[str, Part]:
    """Return the parts with every default written out, and what is automatic as it came out for this algorithm."""

    def complete(table: Mapping[str, Callable[..., Any]], part: Part, where: str, *given: str) -> Part:
        return Part(name=part.name, **arguments(table, part, where, given))

    return {
        "task": complete(TASKS, recipe.task, "task"),
        "partition": complete(PARTITIONS, recipe.partition, "partition"),
        "graph": complete(GRAPHS, recipe.graph, "graph", "clients", "seed"),
        "algorithm": Part(name=recipe.algorithm.name, **algorithm.settings),
    }


def _make(table: Mapping[str, Callable[..., Any]], part: Part, where: str, **given: Any) -> Any:
    """Call the factory of the part's name with the recipe's settings, and what it asks for of `given`."""
    settings = arguments(table, part, where, tuple(given))
    asked = inspect.signature(table[part.name]).parameters
    return table[part.name](**settings, **{name: value for name, value in given.items() if name in asked})
