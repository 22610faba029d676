"""What makes a roster a member's own: the graph as that member must know it.

Such a roster lists those alone whom the member may meet on a recipe's graph, and itself. Before `peers` stands what the
member must know of the graph, so that neither the file nor the member's work grows with the federation:

    own:
      client: 17
      recipe: {clients: 1000000, degree: 3, name: random_regular, …}   # what it must say of its graph
      name: random_regular
      digest: 4d17a1c6a0d5e6a2           # of all the graph's edges
      edges:                             # of each round of a period: its own, and its neighbours' where W needs them
      - 2-17 2-951 2-30044 17-20 17-4711 …
      weights: []                        # of these edges, a list for each round, where they don't follow from them
      summary: {clients: 1000000, rho: 0.75, …}
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray

from peertune.errors import IdentityError
from peertune.identity.entries import checked
from peertune.topology import GraphSummary, Neighbourhood

_PAIRS = re.compile(r"(?:\d{1,9}-\d{1,9}(?: \d{1,9}-\d{1,9})*)?", re.ASCII)


@dataclass(frozen=True)
class KnownGraph:
    """What a member must know of the graph of a run."""

    recipe: Mapping[str, Any]  # what the recipe must say of its graph (`registry.graph_settings`)
    known: Neighbourhood

    def entry(self) -> dict[str, Any]:
        """Return it as YAML has it."""
        known = self.known
        return {
            "client": known.client,
            "recipe": dict(self.recipe),
            "name": known.name,
            "digest": known.digest,
            "edges": [" ".join(f"{i}-{j}" for i, j in edges.tolist()) for edges in known.edges],
            "weights": [weights.tolist() for weights in known.weights],
            "summary": vars(known.summary),
        }

    @classmethod
    def from_entry(cls, value: object) -> "KnownGraph":
        """Read what `entry` made. Raises IdentityError for anything else."""
        found = checked(value, client=int, recipe=dict, name=str, digest=str, edges=list, weights=list, summary=dict)
        summary = GraphSummary(**checked(found["summary"], **get_type_hints(GraphSummary)))
        rounds = len(found["edges"])
        if not rounds or len(found["weights"]) not in (0, rounds) or not 0 <= found["client"] < summary.clients <= 1e9:
            raise IdentityError("its rounds, weights and clients don't fit each other")
        if not all(map(isfinite, vars(summary).values())) or not 0 <= summary.rho <= 1:
            raise IdentityError("its summary holds what is no number, or a rho that is not from 0 to 1")
        edges = tuple(_edges(line, summary.clients) for line in found["edges"])
        weights = tuple(_weights(line, len(pairs)) for line, pairs in zip(found["weights"], edges, strict=False))
        known = Neighbourhood(found["client"], found["name"], found["digest"], edges, weights, summary)
        return cls(found["recipe"], known)


def _edges(line: object, clients: int) -> NDArray[np.int64]:
    """Read a round's edges, `[E, 2]`."""
    if not isinstance(line, str) or not _PAIRS.fullmatch(line):
        raise IdentityError("edges must be pairs i-j")
    pairs = np.array([pair.split("-") for pair in line.split()], dtype=np.int64).reshape(-1, 2)
    if pairs.size and pairs.max() >= clients:
        raise IdentityError(f"edges name client {pairs.max()}, of {clients}")
    if (pairs[:, 0] >= pairs[:, 1]).any() or (np.diff(pairs[:, 0] * clients + pairs[:, 1]) <= 0).any():
        raise IdentityError("edges must be sorted pairs i-j with i < j, each once")
    return pairs


def _weights(line: object, edges: int) -> NDArray[np.float64]:
    """Read a round's weights, `[E]`."""
    if not isinstance(line, list) or len(line) != edges or not all(type(x) is float and 0 <= x <= 1 for x in line):
        raise IdentityError("weights must be a number from 0 to 1 for each edge")
    return np.array(line, dtype=np.float64)
