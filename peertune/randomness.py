"""Randomness as a pure function of (seed, purpose, counters).

Nothing here has a state: what a client, a round or an edge draws never depends on what was drawn before, by whom, or in
which process. That is what makes resuming, chunking clients and running them as separate peers give the same numbers.

The words come from the SplitMix64 finaliser (Steele, Lea, Flood, OOPSLA 2014), chained over the counters.
"""

from enum import StrEnum, unique
from functools import lru_cache
from hashlib import blake2b
from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ONES = 2**64 - 1


@unique
class Draw(StrEnum):
    """The purposes of draws, all of them, with their counters. What a run draws follows from the texts: they stay."""

    # what clients start from and hold
    ADAPTER = "adapter"  # of a site
    HEAD = "head"  # of a parameter
    RANKS = "ranks"
    PARTITION = "partition"  # attempt, where there may be several
    SHOTS = "shots"  # class
    # local steps, evaluation
    EPOCH = "epoch"  # client, epoch
    DROPOUT = "dropout"  # client, step, position in the batch
    SHARED_DROPOUT = "shared dropout"  # client, step: of what all rows of a step share
    EVALUATE = "evaluate"
    HELD_OUT = "held out"  # client
    FOLD = "fold"
    GENERATE = "generate"  # row
    PREFIX = "prefix"  # client, step
    STEP_TIME = "step time"  # client, or client, step
    # who meets whom
    EDGE = "edge"  # round, i, j
    ERDOS_RENYI = "erdos_renyi"  # attempt, i, j
    RANDOM_REGULAR = "random_regular"  # attempt
    MATCHING = "matching"  # round, i, j
    EPIDEMIC = "epidemic"  # round, client, place among those that it sends to
    EIGENVECTOR = "eigenvector"
    PARTNER = "partner"  # client, its own round
    TRUST = "trust"  # round, i, j
    # what is sent
    ROUNDING = "rounding"  # of an adapter: round, entry
    SHARED_MASK = "shared mask"  # of an adapter: round, entry
    # what hostile clients do
    NOISE = "noise"  # of an adapter: client, round
    GAUGE = "gauge"  # of an A: client
    BACKDOOR = "backdoor"  # client
    # phases that clients agree on
    PROBE = "probe"  # window, client, sign
    REPORTER = "reporter"  # window, place among those who report
    # what is measured of data
    DEALT = "dealt"  # client
    PROBED = "probed"

    def of(self, name: str) -> str:
        """Return the purpose for one of several things that have names."""
        return f"{self}/{name}"


@lru_cache(maxsize=64)
def _start(seed: int, purpose: str) -> int:
    """Return the word from which those of this seed and purpose follow."""
    return int.from_bytes(blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


def _chained(word: int, counter: int) -> int:
    """Return `_mix` of a word and a counter by themselves: a tenth of the time that NumPy takes for one."""
    x = (word + _GOLDEN * (counter + 1)) & _ONES
    x = ((x ^ x >> 30) * _FIRST) & _ONES
    x = ((x ^ x >> 27) * _SECOND) & _ONES
    return x ^ x >> 31


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalise the words, in place where they are an array."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(_FIRST)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_SECOND)
    x ^= x >> np.uint64(31)
    return x


def words(seed: int, purpose: str, *counters: ArrayLike) -> NDArray[np.uint64]:
    """Random 64-bit words, one for each element of the counters' broadcast shape.

    `seed` is any Python integer, `purpose` is one of `Draw`, or another text in code from outside (two purposes
    share no draws), and `counters` are integers or arrays of them, such as client, round and step.
    """
    first, given = _start(seed, purpose), list(counters)
    while given and isinstance(counter := given[0], int):
        first = _chained(first, counter)
        del given[0]
    word = np.array(first, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for x in given:
            word = _mix(word + np.uint64(_GOLDEN) * (np.asarray(x).astype(np.uint64) + np.uint64(1)))
    return word


def uniforms(seed: int, purpose: str, *counters: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each element of the counters' broadcast shape."""
    return (words(seed, purpose, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def fractions(seed: int, purpose: str, count: int, *counters: ArrayLike) -> NDArray[np.float32]:
    """`count` uniform numbers in (0, 1), each the middle of one of 2**16 equal parts; four are made of a word."""
    drawn = words(seed, purpose, *counters, np.arange(-(-count // 4)))
    return (drawn.astype("<u8").view("<u2")[:count] + np.float32(0.5)) * np.float32(2.0**-16)


def happens(chance: float, seed: int, purpose: str, *counters: ArrayLike) -> NDArray[np.bool_]:
    """Whether `uniforms(seed, purpose, *counters) < chance`, for a chance in (0, 1], without making these numbers."""
    bound = ceil(chance * 2**53)  # k 2⁻⁵³ < chance where k < bound, k being the upper 53 bits of a word
    if bound >= 2**53:
        return np.ones(np.broadcast_shapes(*map(np.shape, counters)), dtype=np.bool_)
    return np.asarray(words(seed, purpose, *counters) < np.uint64(bound << 11))


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A NumPy generator of its own for these counters, for draws that a library makes (permutations, Dirichlet)."""
    return np.random.Generator(np.random.Philox(key=int(words(seed, purpose, *counters))))
