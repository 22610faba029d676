"""Chunks as gRPC messages. One that holds data is packed and read here, as protobuf would, but without its copies."""

from google.protobuf.message import DecodeError

from peertune.wire.peer_pb2 import Chunk

Part = Chunk | memoryview
"""What one message says: a Chunk, or the data of a Chunk that holds data."""

_DATA = b"\x22"  # the key of field 4, length-delimited: `bytes data = 4`
_MOST = 6  # bytes of it and of a length


def serialize(part: Part) -> bytes:
    """Return a message: `Chunk(data=part)` of data, the Chunk itself of any other."""
    if isinstance(part, Chunk):
        return part.SerializeToString()
    return b"".join((_header(len(part)), part))


def deserialize(message: bytes) -> Part:
    """Return what a message says; one that can't be read is a Chunk without any part."""
    for begin in range(2, min(_MOST, len(message)) + 1):  # where data that goes on to the end of the message may begin
        header = _header(len(message) - begin)
        if len(header) == begin and message.startswith(header):
            return memoryview(message)[begin:]
    try:
        return Chunk.FromString(message)
    except DecodeError:
        return Chunk()


def field_of(part: Part) -> str | None:
    """Return which of a Chunk's fields it holds; None for one that this version doesn't know."""
    return part.WhichOneof("part") if isinstance(part, Chunk) else "data"


def data_of(part: Part) -> bytes | memoryview:
    """Return the data that it holds."""
    return part.data if isinstance(part, Chunk) else part


def _header(length: int) -> bytes:
    """Return what stands before so many bytes of data: the field's key and the length as a varint."""
    header = bytearray(_DATA)
    while length > 0x7F:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*header, length])
