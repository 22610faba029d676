"""The codec of the wire: what one client sends to one neighbour, as bytes, and back.

A payload travels as a safetensors file does: the header's length in 8 bytes, a JSON header with each tensor's dtype,
shape and place in the body, then the body. Both ends train the same sites, so each knows beforehand what must come,
its `Layout`, and believes nothing that is sent:

1. the announced size is checked before memory is set aside for it, and what comes never goes past it (`Assembler`);
2. the header must say what the layout says, to the byte, before a tensor is made;
3. a tensor's values are checked before anyone sees them (`decode`).

Whatever the bytes are, the only thing raised is a WireError, whose message is one printable line, and memory stays
within `Layout.max_bytes`, the tensors themselves and, for a crowded one, thirty times the header. Nothing is ever
unpickled.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod
from reprlib import Repr
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peertune.errors import WireError
from peertune.types import Tensors

CHUNK_BYTES = 2**22
"""The longest chunk; shorter ones cost more for each byte, and a message has room for no more."""

ALIGN_BYTES = 64
"""Where a tensor may begin without being copied."""

_LENGTH_BYTES = 8  # little-endian, before the header
_ALIGNMENT_BYTES = 8  # to a multiple of which the library pads the header with spaces

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ORDER = ["I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL"]
"""The library's order of tensors."""


class Expected(NamedTuple):
    """One tensor that must come."""

    shape: tuple[int, ...]  # without the client axis
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """How much of the body the tensor takes."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{_short(self.dtype)} {list(self.shape)}"


@dataclass(frozen=True)
class Layout:
    """What both ends expect of a payload."""

    tensors: Mapping[str, Expected]

    @cached_property
    def body_bytes(self) -> int:
        """The tensors' bytes, without the header."""
        return sum(x.size_bytes for x in self.tensors.values())

    @cached_property
    def max_bytes(self) -> int:
        """The longest encoding: the body and a header with spaces, escaped names and the longest offsets."""
        header = {name: _entry(x, self.body_bytes, self.body_bytes) for name, x in self.tensors.items()}
        return _LENGTH_BYTES + len(json.dumps(header)) + _ALIGNMENT_BYTES + self.body_bytes


def layout(payload: Tensors) -> Layout:
    """Return the layout of all payloads that are like this one, each tensor `[1, …]`; its values don't matter.

    Raises:
        ValueError: a tensor is not that of one client, or of a dtype that can't travel.
    """
    tensors = {}
    for name, x in _of_one(payload).items():
        if x.dtype not in _CODES:
            raise ValueError(f"{name}: {_short(x.dtype)} can't travel, choose from {', '.join(map(_short, _CODES))}")
        tensors[name] = Expected(tuple(x.shape), x.dtype)
    return Layout(tensors)


def laid_out(payload: Tensors) -> list[memoryview]:
    """Return the pieces whose bytes, end to end, are the encoding; those of tensors on the CPU are not copied.

    Raises:
        ValueError: a tensor is not that of one client.
    """
    ordered = sorted(_of_one(payload).items(), key=lambda item: (_ORDER.index(_CODES[item[1].dtype]), item[0]))
    header, bodies, end = {}, [], 0
    for name, x in ordered:
        bodies.append(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        begin, end = end, end + len(bodies[-1])
        header[name] = _entry(x, begin, end)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return [memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text), *bodies]


def encode(payload: Tensors) -> bytes:
    """Return one client's tensors, each `[1, …]`, as safetensors bytes; equal payloads give equal bytes.

    The library's own `save` gives the same bytes, and copies each value three times.

    Raises:
        ValueError: a tensor is not that of one client.
    """
    return b"".join(laid_out(payload))


def chunks(pieces: Sequence[memoryview], size: int = CHUNK_BYTES) -> Iterator[list[memoryview]]:
    """Cut what lies end to end into chunks of `size` bytes, the last one shorter, each in pieces; none is copied."""
    chunk: list[memoryview] = []
    room = size
    for piece in pieces:
        while len(piece) >= room:
            yield [*chunk, piece[:room]]
            chunk, piece, room = [], piece[room:], size
        if len(piece):
            chunk.append(piece)
            room -= len(piece)
    if chunk:
        yield chunk


class Assembler:
    """Puts one encoding together again from its chunks, with the body where a tensor may begin.

    Raises:
        WireError: the announced `total_bytes` can't be those of an encoding with this layout. Nothing is allocated.
    """

    left_bytes: int  # still to come

    def __init__(self, total_bytes: int, expected: Layout) -> None:
        _check_size("are announced", total_bytes, expected)
        spare = np.empty(total_bytes + ALIGN_BYTES, dtype=np.uint8)  # unlike a bytearray, not filled with zeros first
        body = spare.ctypes.data + total_bytes - expected.body_bytes
        self._data = spare[-body % ALIGN_BYTES :][:total_bytes].data
        self.left_bytes = total_bytes

    def add(self, chunk: bytes | memoryview) -> None:
        """Take the next chunk. Raises WireError where it is empty, too long, or goes past the announced total."""
        if not 1 <= len(chunk) <= CHUNK_BYTES:
            raise WireError(f"payload: a chunk has {len(chunk)} bytes where 1 to {CHUNK_BYTES} are expected")
        if len(chunk) > self.left_bytes:
            raise WireError(f"payload: a chunk has {len(chunk)} bytes where {self.left_bytes} are left to come")
        begin = len(self._data) - self.left_bytes
        self._data[begin : begin + len(chunk)] = chunk
        self.left_bytes -= len(chunk)

    def data(self) -> memoryview:
        """Return the encoding. Raises WireError where some of it hasn't come."""
        if self.left_bytes:
            total = len(self._data)
            raise WireError(f"payload: ends after {total - self.left_bytes} bytes where {total} were announced")
        return self._data


def decode(data: bytes | bytearray | memoryview, expected: Layout) -> Tensors:
    """Return the tensors of an encoding, each `[1, …]`, on the CPU, in the layout's order.

    Where they are writable and aligned, as an Assembler leaves them, they are views of `data`, else copies.

    Raises:
        WireError: the bytes are not an encoding with this layout, or a value isn't one that may be sent: infinity, NaN,
            a byte that is neither true nor false.
    """
    begins = _read_header(data, expected)
    body = memoryview(data)[len(data) - expected.body_bytes :]
    return {name: _tensor(name, body[begins[name] :], x) for name, x in expected.tensors.items()}


def _entry(x: Expected | Tensor, begin: int, end: int) -> dict[str, Any]:
    """Return what a header says of a tensor that takes these bytes of the body."""
    return {"dtype": _CODES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}


def _of_one(payload: Tensors) -> Tensors:
    """Take the client axis off."""
    for name, x in payload.items():
        if x.dim() == 0 or len(x) != 1:
            raise ValueError(f"{name}: is {list(x.shape)} where the tensor of one client, [1, …], is expected")
    return {name: x[0] for name, x in payload.items()}


def _check_size(verb: str, size: int, expected: Layout) -> None:
    low, high = expected.body_bytes, expected.max_bytes
    if not low <= size <= high:
        raise WireError(f"payload: {size} bytes {verb} where {low} to {high} are expected")


def _read_header(data: bytes | bytearray | memoryview, expected: Layout) -> dict[str, int]:
    """Return where in the body each tensor begins, once all that the header says is what the layout says."""
    _check_size("came", len(data), expected)
    length, room = int.from_bytes(data[:_LENGTH_BYTES], "little"), len(data) - _LENGTH_BYTES - expected.body_bytes
    if length != room:
        raise WireError(f"header: is said to have {length} bytes where there are {room}")
    header = _parse(bytes(data[_LENGTH_BYTES : _LENGTH_BYTES + length]))
    for name in header:
        if name not in expected.tensors:
            raise WireError(f"{_shown(name)}: is no tensor that is expected")
    places = []
    for name, x in expected.tensors.items():
        if name not in header:
            raise WireError(f"{name}: is missing where {x} is expected")
        places.append((*_place(name, header[name], x), name))
    end = 0
    for begin, next_end, name in sorted(places):
        if begin != end:
            raise WireError(f"{name}: begins at byte {begin} of the body where {end} is expected")
        end = next_end
    return {name: begin for begin, _, name in places}


def _parse(header: bytes) -> dict[str, Any]:
    """Return the header's JSON object, as strictly as the library reads it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise WireError(f"header: says {_shown(name)} twice where once is expected")
            found[name] = value
        return found

    def natural(digits: str) -> int:
        if digits.startswith("-"):  # -0, too
            raise ValueError("a count can't be negative")
        return int(digits)

    with suppress(ValueError, RecursionError):  # not UTF-8, not JSON, thousands of digits, nested too deeply
        parsed = json.loads(header.decode(), object_pairs_hook=unique, parse_int=natural)
        if isinstance(parsed, dict) and header.startswith(b"{"):
            return parsed
    raise WireError(f"header: starts with {_shown(header[:16])} and is not the JSON object that is expected")


def _place(name: str, entry: Any, x: Expected) -> tuple[int, int]:
    """Return the first byte of a tensor in the body, and the one after its last."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"{name}: is described by {_shown(entry)} where dtype, shape and data_offsets are expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype != _CODES[x.dtype] or not _are_counts(shape) or tuple(shape) != x.shape:
        known = _short(_DTYPES[dtype]) if isinstance(dtype, str) and dtype in _DTYPES else _shown(dtype)
        raise WireError(f"{name}: is {known} {_shown(shape)} where {x} is expected")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != x.size_bytes:
        raise WireError(f"{name}: has the data_offsets {_shown(offsets)} where {x.size_bytes} bytes are expected")
    return offsets[0], offsets[1]


def _are_counts(value: Any) -> bool:
    """Tell whether this is a list of whole numbers; JSON's true and 1.0 equal 1, and are none."""
    return isinstance(value, list) and all(type(number) is int for number in value)


def _tensor(name: str, body: memoryview, x: Expected) -> Tensor:
    """Return the tensor `[1, …]` at the start of `body`, in aligned memory: kernels round by that."""
    there = np.frombuffer(body[: x.size_bytes], dtype=np.uint8)
    aligned = there.flags.writeable and there.ctypes.data % ALIGN_BYTES == 0
    raw = torch.from_numpy(there) if aligned and there.size else torch.empty(x.size_bytes, dtype=torch.uint8)
    if not aligned:
        raw.numpy().data[:] = there.data
    if x.dtype is torch.bool and raw.numel() and (highest := int(raw.max())) > 1:
        raise WireError(f"{name}: holds the byte {highest} where 0 or 1 is expected")
    flat = raw.view(x.dtype)
    if x.dtype.is_floating_point and flat.numel():
        for bound in torch.stack(torch.aminmax(flat)).tolist():  # both are NaN where one value is
            if not isfinite(bound):
                raise WireError(f"{name}: holds {bound} where finite values are expected")
    return flat.view(1, *x.shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(value: object) -> str:
    """Return what a peer sent as a short printable text, so that it can't forge or flood a log."""
    shorten = Repr()
    shorten.maxlevel = 2
    text = shorten.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
