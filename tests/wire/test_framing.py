import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from peertune.wire.codec import CHUNK_BYTES, encode
from peertune.wire.framing import data_of, deserialize, field_of, outgoing, serialize
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict, Wait

some = settings(max_examples=200, derandomize=True)
lengths = st.one_of(st.integers(0, 300), st.sampled_from([127, 128, 16_383, 16_384, 2**20, 2**21]))


@some
@given(lengths)
def test_data_is_packed_as_protobuf_packs_it_and_read_back(length: int) -> None:
    data = bytes(range(256)) * (length // 256 + 1)
    data = data[:length]
    assert serialize(memoryview(data)) == Chunk(data=data).SerializeToString()
    part = deserialize(Chunk(data=data).SerializeToString())
    assert isinstance(part, memoryview), "not a copy by protobuf"
    assert field_of(part) == "data"
    assert data_of(part) == data


@pytest.mark.parametrize(
    ("says", "longest"), [(0, 2**20), (5, 2**20), (3 * 2**20, 3 * 2**20), (2**22, 2**22), (2**31, 2**22)]
)
def test_a_payload_goes_in_chunks_as_long_as_the_other_end_takes(says: int, longest: int) -> None:
    payload = {"a": torch.arange(3.0)[None], "b": torch.randn(1, 1_500_000)}
    sent = outgoing(payload)
    total, *parts = (Chunk.FromString(serialize(part)) for part in sent.parts(Hello(chunk_bytes=says)))
    assert total.total == sent.total_bytes == sum(len(part.data) for part in parts)
    assert b"".join(part.data for part in parts) == encode(payload)
    assert longest / 4 < max(len(part.data) for part in parts) <= longest


def test_a_payload_is_copied_once_whoever_gets_it() -> None:
    sent = outgoing({"a": torch.ones(1, 2_000_000)})
    _, *first = sent.parts(Hello(chunk_bytes=CHUNK_BYTES))
    _, *second = sent.parts(Hello(chunk_bytes=CHUNK_BYTES))
    assert [serialize(part) is message for part, message in zip(first, sent.messages, strict=True)] == [True, True]
    assert [a is b for a, b in zip(first, second, strict=True)] == [True, True]


def test_other_chunks_are_protobufs_own() -> None:
    for chunk in (
        Chunk(),
        Chunk(hello=Hello(federation="x", agreed={"a": "b"})),
        Chunk(wait=Wait(round=3)),
        Chunk(total=7),
        Chunk(verdict=Verdict(reason="no")),
        Chunk(roster=b"\x22"),
    ):
        assert serialize(chunk) == chunk.SerializeToString()
        assert deserialize(serialize(chunk)) == chunk
        assert field_of(chunk) == chunk.WhichOneof("part")


@some
@given(st.binary(max_size=40))
def test_any_message_is_read_as_protobuf_reads_it(tail: bytes) -> None:
    for message in (b"\x22" + tail, tail):
        try:
            expected = Chunk.FromString(message)
        except DecodeError:
            expected = Chunk()
        part = deserialize(message)
        assert field_of(part) == expected.WhichOneof("part")
        if field_of(part) == "data":
            assert data_of(part) == expected.data
        else:
            assert part == expected
