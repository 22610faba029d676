"""The graphs that a recipe can name. `GRAPHS` at the end of the module lists them.

A factory's signature is its schema: all take `clients`, `seed`, `activation` and `weights`, then settings of their own.
All raise GraphError for settings that make no graph, or one that can never connect its clients.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peertune.errors import GraphError
from peertune.randomness import Draw, uniforms, words
from peertune.topology.pairs import MOST_EDGES, Edges, all_pairs, drawn_pairs, drawn_receivers, need_few, need_paired
from peertune.topology.rules import OneWay, Rule
from peertune.topology.weights import Graph, as_edges, need_clients, unreachable

MOST_ROUNDS = 1_000_000  # of a trace, all of which are held in memory
TRIES = 100  # random graphs drawn before giving up on a connected one
MATCHED_AT_ONCE = 2**16  # pairs of a matching looked at before those that are no longer free are left out again
ROUND_NAMES = ("round", "t", "time", "timestamp", "step")  # what the first column of a trace may be called
MOST_LONELY = 50  # clients without an edge to be expected, with which a random graph is connected once in e⁵⁰ draws


def complete(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """Every pair of clients. With activation p: each pair meets with probability p a round (TAD-LoRA's setting).

    A round's draws take time for n² / 2 pairs, and memory for the clients and the edges alone.
    """
    need_clients("complete", clients, 1)
    return Graph(
        clients,
        _AllPairs(clients),
        1,
        activation,
        seed,
        weights,
        "complete",
        exchangeable=True,
        every_pair=True,
    )


def ring(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """Each client and the next, the last and the first."""
    need_clients("ring", clients, 3)
    at = np.arange(clients)
    return _static("ring", clients, _joined(at, (at + 1) % clients), activation, seed, weights, sides=(clients,))


def path(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """Each client and the next."""
    need_clients("path", clients, 2)
    at = np.arange(clients)
    return _static("path", clients, _joined(at[:-1], at[1:]), activation, seed, weights)


def star(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """Client 0 and each other."""
    need_clients("star", clients, 2)
    at = np.arange(clients)
    return _static("star", clients, _joined(0 * at[1:], at[1:]), activation, seed, weights)


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
    # A side of 2 has one edge between its two clients, not two: `as_edges` counts each once.
    at = np.arange(clients).reshape(rows, clients // rows)
    edges = np.concatenate([_joined(at, np.roll(at, -1, axis)) for axis in (0, 1)])
    return _static("torus", clients, edges, activation, seed, weights, sides=at.shape)


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
    if left * (clients - left) > MOST_EDGES:
        raise GraphError(
            f"graph bipartite: {left:,} and {clients - left:,} clients have {left * (clients - left):,} edges, and "
            f"{MOST_EDGES:,} is the most; choose fewer clients, a smaller left, or random_regular"
        )
    one, other = np.divmod(np.arange(left * (clients - left)), clients - left)
    return _static("bipartite", clients, _joined(one, left + other), activation, seed, weights)


def hypercube(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """Clients whose numbers differ in one bit. `clients` is a power of two."""
    bits = _bits("hypercube", clients)
    edges = np.concatenate([_flips(clients, bit) for bit in range(bits)] or [np.zeros((0, 2), dtype=np.int64)])
    return _static("hypercube", clients, edges, activation, seed, weights, sides=(2,) * bits)


def exponential(*, clients: int, seed: int = 0, activation: float = 1.0, weights: Rule = "metropolis") -> Graph:
    """One-peer exponential graph: in round t client i meets client `i XOR 2^(t mod log2 n)`.

    `clients` is a power of two. log2 n rounds give the exact average (arXiv 2110.13363, here in its undirected form).
    """
    bits = _bits("exponential", clients)
    rounds = [_flips(clients, bit) for bit in range(bits)]
    return _periodic("exponential", clients, rounds, activation, seed, weights, sides=(2,) * bits)


def erdos_renyi(
    *,
    clients: int,
    seed: int = 0,
    activation: float = 1.0,
    weights: Rule = "metropolis",
    probability: float,
) -> Graph:
    """Each pair is an edge with this probability, drawn once for all rounds; drawn again until it is connected.

    For pairs that are drawn anew each round, choose complete with an activation. A draw goes through all pairs, so
    100,000 clients are the most.
    """
    need_clients("erdos_renyi", clients, 1)
    _check_probability("erdos_renyi", clients, probability)
    if (lonely := clients * (1 - probability) ** (clients - 1)) > MOST_LONELY:
        raise GraphError(
            f"graph erdos_renyi: about {lonely:,.0f} of {clients:,} clients would have no edge; "
            f"raise probability above {log(clients) / clients:.2g}"
        )
    for attempt in range(TRIES):
        edges = drawn_pairs(clients, probability, seed, Draw.ERDOS_RENYI, attempt)
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
    import networkx as nx

    need_clients("random_regular", clients, 2)
    if not 0 < degree < clients:
        raise GraphError(f"graph random_regular: degree is {degree}; choose 1 to {clients - 1}")
    if degree * clients % 2:
        raise GraphError(f"graph random_regular: clients x degree is {clients} x {degree}, odd; change one by 1")
    for attempt in range(TRIES):
        drawn = nx.random_regular_graph(degree, clients, seed=int(words(seed, Draw.RANDOM_REGULAR, attempt)))
        edges = as_edges(clients, np.fromiter(chain.from_iterable(drawn.edges), np.int64, degree * clients))
        if not unreachable(clients, edges):
            return _static("random_regular", clients, edges, activation, seed, weights)
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
    if both are still free (a random maximal matching). Metropolis weights make the two average, ½ and ½. Who meets whom
    follows from the draws of all pairs, so 100,000 clients are the most.
    """
    need_clients("matching", clients, 1)
    _check_probability("matching", clients, probability)

    @lru_cache(maxsize=2)  # a round asks for its edges more than once
    def edges_at(t: int) -> Edges:
        available = drawn_pairs(clients, probability, seed, Draw.MATCHING, t)
        order = np.argsort(uniforms(seed, Draw.MATCHING, t, available[:, 0], available[:, 1]), kind="stable")
        free, meet = [True] * clients, []
        for start in range(0, len(order), MATCHED_AT_ONCE):
            pairs = available[order[start : start + MATCHED_AT_ONCE]]
            if start:
                pairs = pairs[np.array(free)[pairs].all(axis=1)]
            for i, j in pairs.tolist():
                if free[i] and free[j]:
                    free[i] = free[j] = False
                    meet.append((i, j))
        return as_edges(clients, meet)

    return Graph(clients, edges_at, None, activation, seed, weights, "matching", exchangeable=True)


def epidemic(
    *,
    clients: int,
    seed: int = 0,
    activation: float = 1.0,
    weights: OneWay = "row",
    fan_out: int,
) -> Graph:
    """In each round each client sends to `fan_out` others, drawn anew: a directed graph.

    With an activation p each of these messages is sent with probability p. Source: Epidemic Learning (arXiv
    2310.01972, its EL-Local), whose receivers average equally what they heard and their own: `weights: row`.
    """
    need_clients("epidemic", clients, 2)
    if not 0 < fan_out < clients:
        raise GraphError(f"graph epidemic: fan_out is {fan_out}; choose 1 to {clients - 1}")
    if clients * fan_out > MOST_EDGES:
        raise GraphError(
            f"graph epidemic: {clients:,} clients send {clients * fan_out:,} messages, and {MOST_EDGES:,} is the most; "
            "choose a smaller fan_out"
        )

    @lru_cache(maxsize=2)  # a round asks for its edges more than once
    def edges_at(t: int) -> Edges:
        receivers = drawn_receivers(clients, fan_out, seed, Draw.EPIDEMIC, t)
        senders = np.repeat(np.arange(clients), fan_out)
        return as_edges(clients, _joined(senders, receivers), directed=True)

    return Graph(clients, edges_at, None, activation, seed, weights, "epidemic", exchangeable=True, directed=True)


def edge_file(
    *,
    clients: int,
    seed: int = 0,
    activation: float = 1.0,
    weights: Rule = "metropolis",
    path: str | Path,
) -> Graph:
    """Edges of a text file: lines `i,j` or `i j`; `#` starts a comment, and a line of names may come first."""
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

    A line of names may come first. Rounds count from 0, one that isn't named has no contacts, and after the last the
    trace begins again.
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
    "epidemic": epidemic,
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


@dataclass(frozen=True)
class _AllPairs:
    """Round → all pairs. Complete graphs of the same settings are equal, so that rho, say, is estimated once."""

    clients: int

    def __call__(self, t: int) -> Edges:
        return all_pairs(self.clients)


def _static(
    name: str, clients: int, edges: Any, activation: float, seed: int, weights: str, sides: tuple[int, ...] = ()
) -> Graph:
    return _periodic(name, clients, [edges], activation, seed, weights, sides)


def _periodic(
    name: str,
    clients: int,
    rounds: Iterable[Any],
    activation: float,
    seed: int,
    weights: str,
    sides: tuple[int, ...] = (),
) -> Graph:
    schedule = [as_edges(clients, edges) for edges in rounds] or [as_edges(clients, [])]

    def edges_at(t: int) -> Edges:
        return schedule[t % len(schedule)]

    return Graph(clients, edges_at, len(schedule), activation, seed, weights, name, sides=sides)


def _joined(one: NDArray[np.int64], other: NDArray[np.int64]) -> Edges:
    """Pair clients place by place."""
    return np.stack([one.ravel(), other.ravel()], axis=1)


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


def _check_probability(name: str, clients: int, probability: float) -> None:
    if not 0 < probability <= 1:
        raise GraphError(f"graph {name}: probability is {probability}; choose a number above 0, at most 1")
    need_paired(name, clients)
    remedy = "choose a lower probability, or random_regular"
    need_few(f"graph {name}: {clients:,} clients at probability {probability:g}", clients, probability, remedy)


def _read(name: str, path: str | Path, form: str, clients: int) -> list[list[int]]:
    """Read lines of integers in the form `i,j` or `round,i,j`; the last two are clients.

    The first line may name the columns instead. Where it does not name a round first, what comes first is no round.
    """
    need_clients(name, clients, 1)
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise GraphError(f"graph {name}: can't be read, {error.strerror}; give a file of lines {form}") from error
    found = []
    begun = False
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.partition("#")[0].replace(",", " ").split()
        if not fields:
            continue
        where = f"graph {name}: line {number}"
        first, begun = not begun, True
        if first and len(fields) == form.count(",") + 1 and all(field.strip('"').isidentifier() for field in fields):
            if form.startswith("round") and fields[0].strip('"').lower() not in ROUND_NAMES:
                raise GraphError(f"{where}: its columns are {', '.join(fields)}; put them in the order {form}")
            continue
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
