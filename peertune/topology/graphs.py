"""The graphs that a recipe can name. `GRAPHS` at the end of the module lists them.

A factory's signature is its schema: all take `clients`, `seed`, `activation` and `weights`, then settings of their own.
All raise GraphError for settings that make no graph, or one that can never connect its clients.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from peertune.draws import uniforms, words
from peertune.errors import GraphError
from peertune.topology.weights import Edges, Graph, Rule, as_edges, need_clients, unreachable

MOST_ROUNDS = 1_000_000  # of a trace, all of which are held in memory
MOST_PAIRED = 10_000  # clients of a graph that may join any two of them: 50 million pairs
TRIES = 100  # random graphs drawn before giving up on a connected one


def complete(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """Every pair of clients. With activation p: each pair meets with probability p a round (TAD-LoRA's setting)."""
    need_clients("complete", clients, 1)
    pairs = _pairs(clients)
    return Graph(clients, lambda t: pairs, 1, activation, seed, weights, "complete", exchangeable=True)


def ring(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """Each client and the next, the last and the first."""
    need_clients("ring", clients, 3)
    return _static("ring", clients, nx.cycle_graph(clients).edges, activation, seed, weights)


def path(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """Each client and the next."""
    need_clients("path", clients, 2)
    return _static("path", clients, nx.path_graph(clients).edges, activation, seed, weights)


def star(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """Client 0 and each other."""
    need_clients("star", clients, 2)
    return _static("star", clients, nx.star_graph(clients - 1).edges, activation, seed, weights)


def torus(
    *,
    clients: int,
    seed: int = 0,
    activation: float = 1.0,
    weights: Rule = "metropolis",
    rows: int | None = None,
) -> Graph:
    """A grid of `rows` by clients / rows whose borders meet, as square as possible if `rows` isn't given."""
    need_clients("torus", clients, 4)
    if rows is None:
        rows = max(d for d in range(1, int(clients**0.5) + 1) if clients % d == 0)
        if rows == 1:
            raise GraphError(f"graph torus: {clients} is prime, so it fills no grid; change clients or choose ring")
    if rows < 2 or clients % rows or clients == rows:
        raise GraphError(
            f"graph torus: {clients} clients don't fill {rows} rows of 2 or more; choose a divisor above 1"
        )
    # A side of 2 has one edge between its two clients, not two.
    grid = nx.convert_node_labels_to_integers(nx.grid_2d_graph(rows, clients // rows, periodic=True))
    return _static("torus", clients, grid.edges, activation, seed, weights)


def bipartite(
    *,
    clients: int,
    seed: int = 0,
    activation: float = 1.0,
    weights: Rule = "metropolis",
    left: int | None = None,
) -> Graph:
    """Each of the first `left` clients (half of them if not given) and each of the others."""
    need_clients("bipartite", clients, 2)
    left = clients // 2 if left is None else left
    if not 0 < left < clients:
        raise GraphError(f"graph bipartite: left is {left}; choose 1 to {clients - 1}, so that both sides have clients")
    edges = nx.complete_bipartite_graph(left, clients - left).edges
    return _static("bipartite", clients, edges, activation, seed, weights)


def hypercube(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """Clients whose numbers differ in one bit. `clients` is a power of two."""
    bits = _bits("hypercube", clients)
    edges = [edge for bit in range(bits) for edge in _flips(clients, bit)]
    return _static("hypercube", clients, edges, activation, seed, weights)


def exponential(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """One-peer exponential graph: in round t client i meets client `i XOR 2^(t mod log2 n)`.

    `clients` is a power of two. log2 n rounds give the exact average (arXiv 2110.13363, here in its undirected form).
    """
    bits = _bits("exponential", clients)
    rounds = [_flips(clients, bit) for bit in range(bits)]
    return _periodic("exponential", clients, rounds, activation, seed, weights)


def erdos_renyi(
    *,
    clients: int,
    seed: int = 0,
    activation: float = 1.0,
    weights: Rule = "metropolis",
    probability: float,
) -> Graph:
    """Each pair is an edge with this probability, drawn once for all rounds; drawn again until it is connected.

    For pairs that are drawn anew each round, choose complete with an activation.
    """
    need_clients("erdos_renyi", clients, 1)
    _check_probability("erdos_renyi", probability)
    pairs = _pairs(clients)
    for attempt in range(TRIES):
        edges = pairs[uniforms(seed, "erdos_renyi", attempt, pairs[:, 0], pairs[:, 1]) < probability]
        if not unreachable(clients, edges):
            return _static("erdos_renyi", clients, edges, activation, seed, weights)
    raise GraphError(f"graph erdos_renyi: none of {TRIES} draws is connected; raise probability above {probability}")


def random_regular(
    *,
    clients: int,
    seed: int = 0,
    activation: float = 1.0,
    weights: Rule = "metropolis",
    degree: int,
) -> Graph:
    """Each client has `degree` neighbours, drawn once for all rounds; drawn again until it is connected."""
    need_clients("random_regular", clients, 2)
    if not 0 < degree < clients:
        raise GraphError(f"graph random_regular: degree is {degree}; choose 1 to {clients - 1}")
    if degree * clients % 2:
        raise GraphError(f"graph random_regular: clients x degree is {clients} x {degree}, odd; change one by 1")
    for attempt in range(TRIES):
        drawn = nx.random_regular_graph(degree, clients, seed=int(words(seed, "random_regular", attempt)))
        if nx.is_connected(drawn):
            return _static("random_regular", clients, drawn.edges, activation, seed, weights)
    raise GraphError(f"graph random_regular: none of {TRIES} draws is connected; raise degree above {degree}")


def matching(
    *,
    clients: int,
    seed: int = 0,
    activation: float = 1.0,
    weights: Rule = "metropolis",
    probability: float,
) -> Graph:
    """In each round a client meets at most one other.

    Each pair is available with this probability. The available pairs are gone through in random order, and a pair meets
    if both are still free (a random maximal matching). Metropolis weights make the two average, ½ and ½.
    """
    need_clients("matching", clients, 1)
    _check_probability("matching", probability)
    pairs = _pairs(clients)

    def edges_at(t: int) -> Edges:
        draws = uniforms(seed, "matching", t, pairs[:, 0], pairs[:, 1])
        available = np.flatnonzero(draws < probability)
        free, meet = [True] * clients, []
        for i, j in pairs[available[np.argsort(draws[available], kind="stable")]].tolist():
            if free[i] and free[j]:
                free[i] = free[j] = False
                meet.append((i, j))
        return as_edges(clients, meet)

    return Graph(clients, edges_at, None, activation, seed, weights, "matching", exchangeable=True)


def edge_file(
    *,
    clients: int,
    seed: int = 0,
    activation: float = 1.0,
    weights: Rule = "metropolis",
    path: str | Path,
) -> Graph:
    """Edges of a text file: lines `i,j` or `i j`; `#` starts a comment."""
    name = f"edges ({path})"
    return _static(name, clients, _read(name, path, "i,j", clients), activation, seed, weights)


def trace_file(
    *,
    clients: int,
    seed: int = 0,
    activation: float = 1.0,
    weights: Rule = "metropolis",
    path: str | Path,
) -> Graph:
    """Contacts of a text file: lines `round,i,j` or `round i j`, in any order; `#` starts a comment.

    Rounds count from 0, one that isn't named has no contacts, and after the last the trace begins again.
    """
    name = f"trace ({path})"
    contacts = _read(name, path, "round,i,j", clients)
    if contacts and (last := max(t for t, _, _ in contacts)) >= MOST_ROUNDS:
        raise GraphError(
            f"graph {name}: round {last:,} is too far; number the rounds from 0, to {MOST_ROUNDS - 1:,} at most"
        )
    rounds: list[list[tuple[int, int]]] = [[] for _ in range(1 + max((t for t, _, _ in contacts), default=0))]
    for t, i, j in contacts:
        rounds[t].append((i, j))
    return _periodic(name, clients, rounds, activation, seed, weights)


GRAPHS: dict[str, Callable[..., Graph]] = {
    "bipartite": bipartite,
    "complete": complete,
    "edges": edge_file,
    "erdos_renyi": erdos_renyi,
    "exponential": exponential,
    "hypercube": hypercube,
    "matching": matching,
    "path": path,
    "random_regular": random_regular,
    "ring": ring,
    "star": star,
    "torus": torus,
    "trace": trace_file,
}


def _static(name: str, clients: int, edges: Any, activation: float, seed: int, weights: str) -> Graph:
    return _periodic(name, clients, [edges], activation, seed, weights)


def _periodic(name: str, clients: int, rounds: Iterable[Any], activation: float, seed: int, weights: str) -> Graph:
    schedule = [as_edges(clients, edges) for edges in rounds] or [as_edges(clients, [])]
    return Graph(clients, lambda t: schedule[t % len(schedule)], len(schedule), activation, seed, weights, name)


def _pairs(clients: int) -> Edges:
    if clients > MOST_PAIRED:
        raise GraphError(
            f"graph: {clients:,} clients make too many pairs to hold; choose at most {MOST_PAIRED:,}, or a sparse graph"
        )
    return np.stack(np.triu_indices(clients, 1), axis=1).astype(np.int64)


def _flips(clients: int, bit: int) -> Edges:
    """Pair the clients whose numbers differ in this bit."""
    low = np.arange(clients)
    low = low[low >> bit & 1 == 0]
    return np.stack([low, low | 1 << bit], axis=1)


def _bits(name: str, clients: int) -> int:
    need_clients(name, clients, 1)
    if clients & (clients - 1):
        raise GraphError(f"graph {name}: clients is {clients}, not a power of two; choose 2, 4, 8, 16 and so on")
    return clients.bit_length() - 1


def _check_probability(name: str, probability: float) -> None:
    if not 0 < probability <= 1:
        raise GraphError(f"graph {name}: probability is {probability}; choose a number above 0, at most 1")


def _read(name: str, path: str | Path, form: str, clients: int) -> list[list[int]]:
    """Read lines of integers in the form `i,j` or `round,i,j`; the last two are clients."""
    need_clients(name, clients, 1)
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise GraphError(f"graph {name}: can't be read, {error.strerror}; give a file of lines {form}") from error
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.partition("#")[0].replace(",", " ").split()
        if not fields:
            continue
        where = f"graph {name}: line {number}"
        if len(fields) != form.count(",") + 1 or not all(field.isdecimal() for field in fields):
            raise GraphError(f"{where}: {line.strip()!r} isn't of the form {form}, whole numbers from 0")
        values = [int(field) for field in fields]
        i, j = values[-2:]
        if max(i, j) >= clients:
            raise GraphError(
                f"{where}: there is no client {max(i, j)}; {clients} clients have numbers 0 to {clients - 1}"
            )
        if i == j:
            raise GraphError(f"{where}: client {i} is paired with itself; an edge joins two clients")
        found.append(values)
    return found
