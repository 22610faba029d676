"""Chunks as gRPC messages. One that holds data is packed and read here, as protobuf would, but without its copies."""

from google.protobuf.message import DecodeError

from peertune.wire.peer_pb2 import Chunk

Part = Chunk | memoryview
"""What one message says: a Chunk, or the data of a Chunk that holds data."""

_DATA = b"\x22"  # the key of field 4, length-delimited: `bytes data = 4`


def serialize(part: Part) -> bytes:
    """Return a message: `Chunk(data=part)` of data, the Chunk itself of any other."""
    if isinstance(part, Chunk):
        return part.SerializeToString()
    return b"".join((_DATA, _varint(len(part)), part))


def deserialize(message: bytes) -> Part:
    """Return what a message says; one that can't be read is a Chunk without any part."""
    if message.startswith(_DATA):
        length, at = 0, 1
        for shift in range(0, 35, 7):
            if at == len(message):
                break
            byte = message[at]
            length |= (byte & 0x7F) << shift
            at += 1
            if byte < 0x80:
                if at + length == len(message):
                    return memoryview(message)[at:]
                break  # something follows: protobuf knows what to make of it
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


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)
