"""Chunks as gRPC messages. One that holds data is packed and read here, as protobuf would, but without its copies."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue

from google.protobuf.message import DecodeError

from peertune.types import Tensors
from peertune.wire.codec import CHUNK_BYTES, chunks, laid_out
from peertune.wire.peer_pb2 import Chunk, Hello

LEAST_BYTES = 2**20
"""The longest chunk of those who don't say how long a chunk they take."""

Part = Chunk | memoryview | bytes
"""What one message says: a Chunk, the data of a Chunk that holds data, or such a message as it is sent."""

_DATA = b"\x22"  # the key of field 4, length-delimited: `bytes data = 4`
_MOST = 6  # bytes of it and of a length


@dataclass(frozen=True)
class Outgoing:
    """One client's payload as it is sent, copied once for all who get it."""

    messages: tuple[bytes, ...]  # each a Chunk that holds data, `CHUNK_BYTES` of it but in the last

    @cached_property
    def total_bytes(self) -> int:
        """How long the encoding is."""
        return sum(len(data) for data in self._data())

    def parts(self, to: Hello) -> Iterator[Part]:
        """Yield how long it is and then its chunks, none longer than this end takes."""
        yield Chunk(total=self.total_bytes)
        if to.chunk_bytes >= CHUNK_BYTES:
            yield from self.messages
            return
        for data in self._data():
            yield from (piece for (piece,) in chunks([data], max(to.chunk_bytes, LEAST_BYTES)))

    def _data(self) -> Iterator[memoryview]:
        for message in self.messages:
            data = deserialize(message)
            assert isinstance(data, memoryview)
            yield data


def outgoing(payload: Tensors) -> Outgoing:
    """Return one client's tensors, each `[1, …]`, as they are sent. Raises ValueError for those of several."""
    cut = chunks(laid_out(payload))
    return Outgoing(tuple(b"".join((_header(sum(map(len, pieces))), *pieces)) for pieces in cut))


def queued(queue: "SimpleQueue[Chunk | Iterator[Part] | None]") -> Iterator[Part]:
    """Turn what is put in the queue into a call's requests: parts, and several at a time; None ends them."""
    while (item := queue.get()) is not None:
        if isinstance(item, Chunk):
            yield item
        else:
            yield from item


def serialize(part: Part) -> bytes:
    """Return a message: `Chunk(data=part)` of data, any other as it is."""
    if isinstance(part, Chunk):
        return part.SerializeToString()
    return part if isinstance(part, bytes) else b"".join((_header(len(part)), part))


def deserialize(message: bytes) -> Chunk | memoryview:
    """Return what a message says; one that can't be read is a Chunk without any part."""
    for begin in range(2, min(_MOST, len(message)) + 1):  # where data that goes on to the end of the message may begin
        header = _header(len(message) - begin)
        if len(header) == begin and message.startswith(header):
            return memoryview(message)[begin:]
    try:
        return Chunk.FromString(message)
    except DecodeError:
        return Chunk()


def field_of(part: Chunk | memoryview) -> str | None:
    """Return which of a Chunk's fields it holds; None for one that this version doesn't know."""
    return part.WhichOneof("part") if isinstance(part, Chunk) else "data"


def data_of(part: Chunk | memoryview) -> bytes | memoryview:
    """Return the data that it holds."""
    return part.data if isinstance(part, Chunk) else part


def _header(length: int) -> bytes:
    """Return what stands before so many bytes of data: the field's key and the length as a varint."""
    header = bytearray(_DATA)
    while length > 0x7F:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*header, length])
