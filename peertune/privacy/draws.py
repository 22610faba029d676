"""What a party draws that nobody else may foresee: which rows a step takes, and the noise that it adds.

Everything follows from the party's secret and from what is told of the occasion, by keyed hashes: BLAKE2b makes a key,
SHAKE-256 the bits. So a step that is made again from the same state has the same bits, and tells nothing new; from any
other state, other rows, or by another recipe it has bits that have nothing in common with these.

Uniform numbers have 53 bits, and normal ones are made of them by Box and Muller's transform, in float64. What rounding
tells of a sum with such noise (Mironov, CCS 2012) is not kept from others.
"""

from collections.abc import Mapping
from hashlib import blake2b, shake_256

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

SECRET_BYTES = 32


def keyed(secret: bytes, *told: str | int | bytes) -> bytes:
    """Return a key of 32 bytes that follows from a secret of up to 64 and from what is told; no two tellings collide.

    Of equal length and type nothing is taken for anything else: each part goes with both.
    """
    found = blake2b(key=secret, digest_size=32)
    for part in told:
        raw = part if isinstance(part, bytes) else str(part).encode()
        found.update(f"{type(part).__name__}{len(raw)}:".encode() + raw)
    return found.digest()


def of_client(secret: bytes, client: int) -> bytes:
    """Return the secret of one client of a simulation, which has one for all."""
    return keyed(secret, "client", client)


def uniform_numbers(key: bytes, count: int) -> NDArray[np.float64]:
    """Return `count` numbers in (0, 1], all alike likely."""
    words = np.frombuffer(shake_256(key).digest(8 * count), dtype="<u8")
    return ((words >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53


def normals(key: bytes, count: int) -> NDArray[np.float64]:
    """Return `count` numbers of the standard normal distribution."""
    half = -(-count // 2)
    first, second = uniform_numbers(key, 2 * half).reshape(2, half)
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def sampled(key: bytes, rows: int, rate: float) -> NDArray[np.int64]:
    """Return which of so many rows are taken, ascending: each by itself with the chance `rate`, be it none."""
    return np.flatnonzero(uniform_numbers(key, rows) <= rate)


def digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a digest, 16 bytes, of these tensors' names, shapes and bits."""
    found = blake2b(digest_size=16)
    for name, x in sorted(tensors.items()):
        bits = x.detach().cpu().contiguous()
        found.update(f"{name} {bits.dtype} {list(bits.shape)} ".encode())
        found.update(bits.numpy().data)
    return found.digest()
