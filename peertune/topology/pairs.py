"""Pairs of clients that meet by chance, found without holding all pairs at any time.

A pair's draw is its own, so pairs are gone through in blocks and only those drawn are kept: time for each of the
n (n - 1) / 2 pairs, some nanoseconds, but memory for the clients and the pairs found.
"""

from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peertune.errors import GraphError
from peertune.randomness import happens, words

Edges = NDArray[np.int64]

MOST_EDGES = 10_000_000  # of a round; the mixing matrix takes some 150 bytes for each while it is made
MOST_PAIRED = 100_000  # clients all of whose pairs are gone through: 5 · 10⁹ draws
BLOCK = 2**16  # pairs drawn at once: half a MiB of words, which stays in a core's cache


def pair_count(clients: int) -> int:
    """Return `n (n - 1) / 2`."""
    return clients * (clients - 1) // 2


@lru_cache(maxsize=2)  # every round asks for them
def all_pairs(clients: int) -> Edges:
    """List every pair of clients, `[n (n - 1) / 2, 2]`. Raises GraphError for more than `MOST_EDGES`."""
    need_few(f"graph: {clients:,} clients", clients, 1.0, "choose an activation below 1, or a sparse graph")
    pairs = np.stack(np.triu_indices(clients, 1), axis=1).astype(np.int64)
    pairs.flags.writeable = False
    return pairs


def need_few(what: str, clients: int, chance: float, remedy: str) -> None:
    """Raise GraphError, which ends in the remedy, where more than `MOST_EDGES` pairs can be expected to meet."""
    if (expected := ceil(chance * pair_count(clients))) > MOST_EDGES:
        raise GraphError(f"{what} have about {expected:,} edges, and {MOST_EDGES:,} is the most; {remedy}")


def need_paired(name: str, clients: int) -> None:
    """Raise GraphError for more than `MOST_PAIRED` clients, whose pairs would take minutes to go through."""
    if clients > MOST_PAIRED:
        raise GraphError(
            f"graph {name}: {clients:,} clients make {pair_count(clients):,} pairs to draw; "
            f"choose at most {MOST_PAIRED:,} clients, or a sparse graph such as random_regular"
        )


def drawn_pairs(clients: int, chance: float, seed: int, purpose: str, *counters: int) -> Edges:
    """Return the pairs i < j for which `uniforms(seed, purpose, *counters, i, j) < chance`, sorted, `[E, 2]`.

    Memory grows with the clients and the pairs returned, time with all pairs.
    """
    if pair_count(clients) <= BLOCK:
        every = all_pairs(clients)
        return every[happens(chance, seed, purpose, *counters, every[:, 0], every[:, 1])]
    found: list[Any] = [np.zeros((0, 2), dtype=np.int64)]
    first = 0
    while first < clients - 1:
        rows = min(max(1, BLOCK // (clients - 1 - first)), clients - 1 - first)
        i = np.arange(first, first + rows)
        for left in range(first + 1, clients, BLOCK):  # more than one only where a row is longer than a block
            j = np.arange(left, min(left + BLOCK, clients))
            drawn = np.flatnonzero(happens(chance, seed, purpose, *counters, i[:, None], j))
            row, column = np.divmod(drawn, len(j))
            pairs = np.stack([i[row], j[column]], axis=1)
            found.append(pairs[pairs[:, 0] < pairs[:, 1]] if rows > 1 else pairs)
        first += rows
    return np.concatenate(found)


def drawn_partners(clients: int, client: int, chance: float, seed: int, purpose: str, *counters: int) -> Edges:
    """Return those of `drawn_pairs` that have this client, `[E, 2]`, in the time of n draws."""
    found: list[Any] = [np.zeros((0, 2), dtype=np.int64)]
    for left in range(0, client, BLOCK):
        i = np.arange(left, min(left + BLOCK, client))
        i = i[happens(chance, seed, purpose, *counters, i, client)]
        found.append(np.stack([i, np.full(len(i), client)], axis=1))
    for left in range(client + 1, clients, BLOCK):
        j = np.arange(left, min(left + BLOCK, clients))
        j = j[happens(chance, seed, purpose, *counters, client, j)]
        found.append(np.stack([np.full(len(j), client), j], axis=1))
    return np.concatenate(found)


def drawn_receivers(clients: int, count: int, seed: int, purpose: str, *counters: int) -> NDArray[np.int64]:
    """Return `count` others for each client, `[n, count]`, any as likely as any other.

    Each client's are its own draw, `words(seed, purpose, *counters, client, place)`, by Floyd's algorithm (Bentley,
    CACM 30(9), 1987), all clients at a time.
    """
    everyone, places = np.arange(clients)[:, None], np.arange(count)
    at_random = words(seed, purpose, *counters, everyone, places)
    drawn = np.empty((clients, count), dtype=np.int64)
    for place, last in enumerate(range(clients - 1 - count, clients - 1)):
        one = (at_random[:, place] % np.uint64(last + 1)).astype(np.int64)
        taken = (drawn[:, :place] == one[:, None]).any(axis=1)
        drawn[:, place] = np.where(taken, last, one)
    return drawn + (drawn >= everyone)  # of the others, counted without the client itself
