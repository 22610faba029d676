import json
import random
import re
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peertune.errors import PeertuneError, WireError
from peertune.types import Tensors
from peertune.wire.codec import CHUNK_BYTES, Assembler, Expected, Layout, chunks, decode, encode, layout
from peertune.wire.node import MESSAGE_BYTES

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(1, *shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, (1, *shape), generator=generator).to(dtype)


def bits(x: Tensor) -> list[int]:
    found: list[int] = x.reshape(-1).view(torch.uint8).tolist()
    return found


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert list(ours) == list(theirs)
    for name, x in ours.items():
        assert (x.shape, x.dtype) == (theirs[name].shape, theirs[name].dtype)
        assert bits(x) == bits(theirs[name])


def assembled(data: bytes, expected: Layout, size: int) -> memoryview:
    assembler = Assembler(len(data), expected)
    for (chunk,) in chunks([memoryview(data)], size):
        assembler.add(chunk)
    return assembler.data()


def packed(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def split(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


# ---------------------------------------------------------------------------------------------------------------- valid

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
layouts = st.dictionaries(names, st.tuples(shapes, st.sampled_from([*FLOATS, *INTEGERS, torch.bool])), max_size=6)


@pytest.mark.thorough
@settings(max_examples=300, derandomize=True)
@given(layouts, st.integers(0, 2**32), st.integers(1, 600))
@example({}, 0, 1)
@example(
    {"steps": ((), torch.int64), "none.A": ((0, 4), torch.float32), '"\n\x7fé\U0001f600': ((1,), torch.bool)}, 0, 1
)
def test_a_payload_comes_back_bit_for_bit_in_chunks_of_any_size(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], seed: int, size: int
) -> None:
    payload = {name: filled(*tensor, seed + i) for i, (name, tensor) in enumerate(tensors.items())}
    expected = layout(payload)
    data = encode(payload)
    assert expected.body_bytes <= len(data) <= expected.max_bytes
    assert len(split(data)[1]) == expected.body_bytes
    assert encode(dict(reversed(payload.items()))) == data
    assert safetensors.torch.save({name: x[0] for name, x in payload.items()}) == data
    decoded = decode(assembled(data, expected, size), expected)
    assert_same(decoded, payload)
    assert all(x.data_ptr() % 16 == 0 for x in decoded.values())


def test_decoded_tensors_are_the_receivers_own() -> None:
    payload = {"q.A": filled((2, 3), torch.float32, 0)}
    data = bytearray(encode(payload))
    decoded = decode(data, layout(payload))
    data[:] = bytes(len(data))
    assert_same(decoded, payload)


def test_part_of_a_stack_and_a_transposed_factor_are_encoded_by_their_values() -> None:
    stack = filled((3, 2, 4), torch.float32, 0)[0]
    parts = {"q.A": stack[1:2], "q.B": stack[1:2].mT.requires_grad_()}
    assert_same(decode(encode(parts), layout(parts)), {name: x.detach().contiguous() for name, x in parts.items()})


def test_the_bytes_are_a_safetensors_file_without_the_client_axis() -> None:
    payload = {"q.A": filled((2, 3), torch.float32, 0), "steps": filled((), torch.int64, 1)}
    read = safetensors.torch.load(encode(payload))
    assert_same({name: read[name][None] for name in payload}, payload)


def test_the_header_of_minilm_adds_less_than_two_percent_to_the_factors() -> None:
    payload = {
        f"encoder.layer.{layer}.attention.self.{module}.{kind}": filled(shape, torch.float32, layer)
        for layer in range(6)
        for module in ("query", "value")
        for kind, shape in (("A", (8, 384)), ("B", (384, 8)))
    }
    factor_bytes = 24 * 8 * 384 * 4
    assert layout(payload).body_bytes == factor_bytes
    assert len(encode(payload)) <= layout(payload).max_bytes <= 1.02 * factor_bytes


def test_chunks_stay_below_the_limit_of_a_grpc_message() -> None:
    data = memoryview(bytes(2 * CHUNK_BYTES + 5))
    assert [len(chunk) for (chunk,) in chunks([data])] == [CHUNK_BYTES, CHUNK_BYTES, 5]
    assert CHUNK_BYTES + 1024 < MESSAGE_BYTES
    assert [list(map(len, chunk)) for chunk in chunks([data[:3], data[:0], data[:9]], 4)] == [[3, 1], [4], [4]]
    assert list(chunks([data[:0]])) == []


@pytest.mark.parametrize(("value", "shown"), [(torch.nan, "nan"), (-torch.inf, "-inf")])
def test_neither_nan_nor_infinity_comes_through(value: float, shown: str) -> None:
    payload = {"reports": torch.tensor([[1.0, 2.0]]), "probe": torch.ones(1, 2)}
    with pytest.raises(WireError, match=rf"^probe: holds {shown} where finite values are expected$"):
        decode(encode(payload | {"probe": torch.tensor([[value, 1.0]])}), layout(payload))


@pytest.mark.parametrize("x", [torch.ones(2, 3), torch.ones(0, 3), torch.tensor(1.0)])
def test_only_one_clients_tensors_make_a_payload(x: Tensor) -> None:
    for use in (layout, encode):
        with pytest.raises(ValueError, match=r"q\.A: is \[.*\] where the tensor of one client, \[1, …\], is expected"):
            use({"q.A": x})


def test_a_dtype_that_cannot_travel_is_refused_by_the_sender() -> None:
    with pytest.raises(ValueError, match=r"^q\.A: complex64 can't travel, choose from float64, float32,"):
        layout({"q.A": torch.ones(1, 2, dtype=torch.complex64)})


# ------------------------------------------------------------------------------------------------------------- refusals

PAYLOAD = {"enc.q.A": torch.ones(1, 2, 3), "enc.q.B": torch.ones(1, 4, 2), "flag": torch.tensor([[True, False]])}
LAYOUT = layout(PAYLOAD)
ENTRIES: dict[str, Any] = json.loads(split(encode(PAYLOAD))[0])


def described(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return PAYLOAD's encoding with another header."""
    entries = deepcopy(ENTRIES)
    change(entries)
    return packed(json.dumps(entries, separators=(",", ":")).encode(), split(encode(PAYLOAD))[1])


REFUSALS: dict[str, tuple[bytes, str]] = {
    "another shape": (
        described(lambda h: h["enc.q.A"].update(shape=[3, 2])),
        "enc.q.A: is float32 [3, 2] where float32 [2, 3] is expected",
    ),
    "another dtype": (
        described(lambda h: h["enc.q.A"].update(dtype="F64", shape=[4, 3])),
        "enc.q.A: is float64 [4, 3] where float32 [2, 3] is expected",
    ),
    "an unknown dtype": (
        described(lambda h: h["enc.q.A"].update(dtype="C\n64")),
        "enc.q.A: is 'C\\n64' [2, 3] where float32 [2, 3] is expected",
    ),
    "numbers that only equal the right ones": (
        described(lambda h: h["enc.q.B"].update(shape=[4.0, 2])),
        "enc.q.B: is float32 [4.0, 2] where float32 [4, 2] is expected",
    ),
    "a missing tensor": (
        described(lambda h: h.pop("flag")),
        "flag: is missing where bool [2] is expected",
    ),
    "an unknown tensor": (
        described(lambda h: h.update({"x\nERROR": h.pop("flag")})),
        "'x\\nERROR': is no tensor that is expected",
    ),
    "metadata": (
        described(lambda h: h.update(__metadata__={})),
        "'__metadata__': is no tensor that is expected",
    ),
    "no description": (
        described(lambda h: h.update(flag=[])),
        "flag: is described by [] where dtype, shape and data_offsets are expected",
    ),
    "a further description": (
        described(lambda h: h["flag"].update(x=1)),
        "flag: is described by {'data_offsets': [56, 58], 'dtype': 'BOOL', 'shape': [2], 'x': 1} where dtype, "
        "shape and data_offsets are expected",
    ),
    "offsets that are too far apart": (
        described(lambda h: h["flag"].update(data_offsets=[56, 2**63])),
        "flag: has the data_offsets [56, 9223372036854775808] where 2 bytes are expected",
    ),
    "offsets of another tensor": (
        described(lambda h: h["flag"].update(data_offsets=[0, 2])),
        "enc.q.A: begins at byte 0 of the body where 2 is expected",
    ),
    "a name twice": (
        described(lambda h: h.update({"enc.q.?": h.pop("flag")})).replace(b"enc.q.?", b"enc.q.A"),
        "header: says 'enc.q.A' twice where once is expected",
    ),
    "a header that is a list": (
        packed(b"[" + b" " * 98 + b"]", split(encode(PAYLOAD))[1]),
        "header: starts with b'[               ' and is not the JSON object that is expected",
    ),
    "a header in UTF-16": (
        packed("{}".encode("utf-16-le"), split(encode(PAYLOAD))[1]),
        "header: starts with b'{\\x00}\\x00' and is not the JSON object that is expected",
    ),
    "a header length of another message": (
        struct.pack("<Q", 2**64 - 1) + encode(PAYLOAD)[8:],
        f"header: is said to have 18446744073709551615 bytes where there are {len(encode(PAYLOAD)) - 66}",
    ),
    "too few bytes": (
        encode(PAYLOAD)[:57],
        f"payload: 57 bytes came where 58 to {LAYOUT.max_bytes} are expected",
    ),
    "too many bytes": (
        encode(PAYLOAD) + bytes(999),
        f"payload: {len(encode(PAYLOAD)) + 999} bytes came where 58 to {LAYOUT.max_bytes} are expected",
    ),
    "a byte that is neither true nor false": (
        encode(PAYLOAD)[:-1] + b"\x02",
        "flag: holds the byte 2 where 0 or 1 is expected",
    ),
    "infinity": (
        encode(PAYLOAD | {"enc.q.B": torch.full((1, 4, 2), torch.inf)}),
        "enc.q.B: holds inf where finite values are expected",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_names_the_tensor_what_came_and_what_is_expected(what: str) -> None:
    data, message = REFUSALS[what]
    with pytest.raises(WireError, match=f"^{re.escape(message)}$") as refusal:
        decode(data, LAYOUT)
    assert isinstance(refusal.value, PeertuneError)


@pytest.mark.parametrize("nested", [b"[", b'{"a":', b'{"enc.q.A":{"shape":[' + b"[" * 3000])
def test_a_header_that_is_nested_too_deeply_is_refused(nested: bytes) -> None:
    wide = layout({"é" * 1000: torch.ones(1, 1)})
    header = (b'{"a":' + nested * 3000)[:4000]
    with pytest.raises(WireError, match=r"^header: starts with .* and is not the JSON object that is expected$"):
        decode(packed(header, bytes(4)), wide)


def test_what_a_peer_sent_is_shortened() -> None:
    wide = layout({"é" * 500: torch.ones(1, 1)})
    entry = {"dtype": "\x1b" * 20, "shape": [["\n" * 20] * 2] * 6, "data_offsets": [0, 4]}
    header = json.dumps({"é" * 500: entry}, separators=(",", ":"), ensure_ascii=False).encode()
    with pytest.raises(WireError, match=r"^é{500}: is '.*' \[\[.*\.\.\. where float32 \[1\] is expected$") as refusal:
        decode(packed(header, bytes(4)), wide)
    assert_is_one_printable_line(refusal.value, wide)


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    wide = layout({"é" * 2000: torch.ones(1, 1)})
    with pytest.raises(WireError, match="is not the JSON object that is expected"):
        decode(packed(b'{"a":' + b"9" * 5000 + b"}", bytes(4)), wide)


@pytest.mark.parametrize("total", [-1, 0, 57, LAYOUT.max_bytes + 1, 2**31, 2**63, 2**64 - 1])
def test_an_announced_total_that_does_not_fit_is_refused_before_anything_is_allocated(total: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(
            WireError, match=f"^payload: {total} bytes are announced where 58 to {LAYOUT.max_bytes} are expected$"
        ):
            Assembler(total, LAYOUT)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_the_least_and_the_most_that_an_encoding_may_take_are_taken() -> None:
    for total in (58, LAYOUT.max_bytes):
        assert Assembler(total, LAYOUT).left_bytes == total


def test_chunks_that_are_empty_too_long_too_many_or_too_few_are_refused() -> None:
    assembler = Assembler(256, LAYOUT)
    assembler.add(bytes(200))
    for size, message in [
        (0, "a chunk has 0 bytes where 1 to 4194304 are expected"),
        (CHUNK_BYTES + 1, "a chunk has 4194305 bytes where 1 to 4194304 are expected"),
        (57, "a chunk has 57 bytes where 56 are left to come"),
    ]:
        with pytest.raises(WireError, match=f"^payload: {message}$"):
            assembler.add(bytes(size))
    with pytest.raises(WireError, match=r"^payload: ends after 200 bytes where 256 were announced$"):
        assembler.data()
    assert assembler.left_bytes == 56
    assembler.add(bytes(56))
    with pytest.raises(WireError, match=r"^payload: a chunk has 1 bytes where 0 are left to come$"):
        assembler.add(b"x")
    assert assembler.data() == bytes(256)


class Counting(TorchDispatchMode):
    """Counts the operations on tensors, the making of one included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("what", list(REFUSALS)[:-2])
def test_no_tensor_is_made_before_the_whole_header_is_checked(what: str) -> None:
    with Counting() as operations, pytest.raises(WireError):
        decode(REFUSALS[what][0], LAYOUT)
    assert operations.count == 0
    with operations:
        decode(encode(PAYLOAD), LAYOUT)
    assert operations.count > 0


# ----------------------------------------------------------------------------------------------------------------- fuzz

PAYLOADS = [
    {
        "q.A": filled((2, 3), torch.float32, 0),
        "q.B": filled((2, 2), torch.float64, 1),
        "out.weight.head": filled((3,), torch.bfloat16, 2),
        "steps": filled((), torch.int64, 3),
        "flags": filled((2,), torch.bool, 4),
        "none.A": filled((0, 4), torch.float32, 5),
    },
    {"é" * 600 + ".A": filled((1, 2), torch.float32, 6)},  # its header has room for much
    {"h.head": filled((2,), torch.float16, 7), "n": filled((2, 1), torch.int8, 8)},
]
LAYOUTS = [layout(payload) for payload in PAYLOADS]
Header = dict[str, Any]
Mutation = Callable[[random.Random, bytes, Layout], bytes]


def rewritten(change: Callable[[random.Random, Header, Layout], object]) -> Mutation:
    """Return a mutation that changes what the header says, and keeps its length true."""

    def mutate(rng: random.Random, data: bytes, expected: Layout) -> bytes:
        header, body = split(data)
        entries = json.loads(header)
        changed = change(rng, entries, expected)
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        return packed(changed if isinstance(changed, bytes) else text, body)

    return mutate


def entry_of(rng: random.Random, header: Header) -> Header:
    found: Header = header[rng.choice(list(header))]
    return found


def flipped(rng: random.Random, data: bytes, begin: int, end: int) -> bytes:
    changed = bytearray(data)
    for place in rng.sample(range(begin, end), min(rng.choice([1, 1, 2, 5]), end - begin)):
        changed[place] ^= rng.randrange(1, 256)
    return bytes(changed)


def truncated(rng: random.Random, data: bytes, expected: Layout) -> bytes:
    return data[: rng.randrange(len(data))]


def extended(rng: random.Random, data: bytes, expected: Layout) -> bytes:
    return data + rng.randbytes(rng.choice([1, 8, rng.randint(1, 300)]))


def another_length(rng: random.Random, data: bytes, expected: Layout) -> bytes:
    length = int.from_bytes(data[:8], "little")
    near = (length + rng.choice([-8, -1, 1, 8, rng.randint(1, 2000)])) % 2**64
    return (
        struct.pack("<Q", rng.choice([near, 2**63, 2**64 - 1, 2**32 + length, rng.getrandbits(63) + 10**6])) + data[8:]
    )


def flip_anywhere(rng: random.Random, data: bytes, expected: Layout) -> bytes:
    return flipped(rng, data, 0, len(data))


def flip_header(rng: random.Random, data: bytes, expected: Layout) -> bytes:
    header, body = split(data)
    place = rng.randrange(len(header.rstrip()))
    return packed(flipped(rng, header, place, place + 1), body)


def flip_body(rng: random.Random, data: bytes, expected: Layout) -> bytes:
    return flipped(rng, data, len(data) - expected.body_bytes, len(data))


def edit_header(rng: random.Random, data: bytes, expected: Layout) -> bytes:
    header, body = split(data)
    begin = rng.randrange(len(header))
    piece = "".join(rng.choices('{}[]",:0123456789-.eE \\u\t\n\x00é', k=rng.randint(0, 3))).encode()
    return packed(header[:begin] + piece + header[begin + rng.randint(0, 2) :], body)


def another_shape(rng: random.Random, header: Header, expected: Layout) -> None:
    shape = (entry := entry_of(rng, header))["shape"]
    if shape and rng.random() < 0.5:
        shape[rng.randrange(len(shape))] += rng.choice([1, 2, 255])
    else:
        entry["shape"] = rng.choice([[*shape, 1], [1, *shape], [*shape, 0]])


def another_dtype(rng: random.Random, header: Header, expected: Layout) -> None:
    entry = entry_of(rng, header)
    entry["dtype"] = rng.choice(
        [x for x in ("F64", "F32", "F16", "I64", "U8", "f32", "F8_E4M3") if x != entry["dtype"]]
    )


def huge_shape(rng: random.Random, header: Header, expected: Layout) -> None:
    entry_of(rng, header)["shape"] = rng.choice([[2**31, 2**31], [2**62, 4], [10**40], [2**64], [2**63, 0]])


def huge_offsets(rng: random.Random, header: Header, expected: Layout) -> None:
    offsets = entry_of(rng, header)["data_offsets"]
    far = rng.choice([2**31, 2**63, 2**64, 10**40])
    offsets[:] = rng.choice([[offsets[0], far], [far, far + offsets[1] - offsets[0]], [far, offsets[1]]])


def moved_offsets(rng: random.Random, header: Header, expected: Layout) -> None:
    offsets = rng.choice([e for e in header.values() if e["data_offsets"][1] > e["data_offsets"][0]])["data_offsets"]
    by = rng.choice([x for x in (-8, -4, -2, -1, 1, 2, 4, 8) if x != 0])
    offsets[:] = rng.choice([[offsets[0] + by, offsets[1] + by], [offsets[0] + by, offsets[1]], offsets[::-1]])


def overlapping(rng: random.Random, header: Header, expected: Layout) -> None:
    entry = rng.choice([e for e in header.values() if e["data_offsets"][0] > 0] or list(header.values()))
    first, last = entry["data_offsets"]
    by = rng.randint(1, first) if first else -rng.randint(1, 9)
    entry["data_offsets"] = [first - by, last - by] if last > first else [first, last + 1]


def nested(rng: random.Random, header: Header, expected: Layout) -> bytes:
    opening = rng.choice([b"[", b'{"":', b'[{"a":'])
    return (b'{"a":' + opening * 3000)[: rng.randint(20, expected.max_bytes - expected.body_bytes - 8)]


def duplicated(rng: random.Random, header: Header, expected: Layout) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    name = rng.choice(list(header))
    entry = json.dumps(header[name], separators=(",", ":"))
    if rng.random() < 0.5:
        return f"{text[:-1]},{json.dumps(name, ensure_ascii=False)}:{entry}}}".encode()
    return text.replace(entry, f'{entry[:-1]},"dtype":"F32"}}', 1).encode()


def not_utf8(rng: random.Random, header: Header, expected: Layout) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    if rng.random() < 0.3:
        return text.encode(rng.choice(["utf-16", "utf-16-le", "utf-32-be", "utf-8-sig"]))
    data = text.encode()
    place = data.index(b'"') + 1
    return data[:place] + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88", b"\x80"]) + data[place:]


def renamed(rng: random.Random, header: Header, expected: Layout) -> None:
    name = rng.choice(list(header))
    hostile = [
        "\nERROR all is lost",
        "\x1b[31m",
        "\u202e",
        "x" * 400,
        name.upper(),
        name + " ",
        "",
        "\x00",
        "__metadata__",
    ]
    header[rng.choice([other for other in hostile if other not in header])] = header.pop(name)


def missing(rng: random.Random, header: Header, expected: Layout) -> None:
    del header[rng.choice(list(header))]


def further(rng: random.Random, header: Header, expected: Layout) -> None:
    header[rng.choice(["__metadata__", "x", "", "q.a"])] = rng.choice(
        [{}, {"format": "pt"}, None, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}]
    )


def another_type(rng: random.Random, header: Header, expected: Layout) -> None:
    name = rng.choice(list(header))
    key = rng.choice(["dtype", "shape", "data_offsets", None])
    wrong: object = rng.choice(
        [None, True, 1.5, -1, "F", [[]], [None], [True, 1.0], {}, {"a": 1}, "x" * 99, float("nan")]
    )
    if key is None:
        header[name] = wrong
    elif rng.random() < 0.5:
        header[name][key] = wrong
    else:
        header[name][rng.choice(["", "Shape", "offset"])] = header[name].pop(key)


def equal_numbers(rng: random.Random, header: Header, expected: Layout) -> None:
    numbers = rng.choice([e[key] for e in header.values() for key in ("shape", "data_offsets") if e[key]])
    place = rng.randrange(len(numbers))
    numbers[place] = rng.choice([float(numbers[place]), -0.0 if numbers[place] == 0 else str(numbers[place])])


def negative_zero(rng: random.Random, header: Header, expected: Layout) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).replace("[0,", "[-0,", 1).encode()


def no_object(rng: random.Random, header: Header, expected: Layout) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return rng.choice(
        [b"[]", b"null", b"3", b'"a"', b"{}{}", b"", b" " + text, text + b"\x00", text[:-1], b"[" + text + b"]"]
    )


def unsound(value: float) -> Mutation:
    """Return a mutation that puts a value that may not be sent into a tensor of floats."""

    def mutate(rng: random.Random, data: bytes, expected: Layout) -> bytes:
        read = safetensors.torch.load(data)
        floats = [n for n, x in expected.tensors.items() if x.dtype.is_floating_point and x.size_bytes]
        flat = read[rng.choice(floats)].view(-1)
        flat[rng.randrange(len(flat))] = value
        return safetensors.torch.save(read)

    return mutate


def random_bytes(rng: random.Random, data: bytes, expected: Layout) -> bytes:
    return rng.randbytes(rng.randint(0, expected.max_bytes + 20))


def random_header(rng: random.Random, data: bytes, expected: Layout) -> bytes:
    room = expected.max_bytes - expected.body_bytes - 8
    return packed(rng.choice([b"", b"{"]) + rng.randbytes(rng.randint(0, room - 1)), data[-expected.body_bytes :])


def reordered(rng: random.Random, header: Header, expected: Layout) -> None:
    begin = 0
    for name in rng.sample(list(header), len(header)):
        size = expected.tensors[name].size_bytes
        header[name]["data_offsets"] = [begin, begin := begin + size]


def respelled(rng: random.Random, header: Header, expected: Layout) -> bytes:
    shuffled = {name: header[name] for name in rng.sample(list(header), len(header))}
    text = json.dumps(shuffled, separators=(",", ":"), ensure_ascii=rng.random() < 0.5)
    return text.encode() + rng.choice(["", " ", "\n", "\t \r"]).encode()


REFUSED: dict[str, Mutation] = {
    "truncated": truncated,
    "extended": extended,
    "another length": another_length,
    "flip header": flip_header,
    "another shape": rewritten(another_shape),
    "another dtype": rewritten(another_dtype),
    "huge shape": rewritten(huge_shape),
    "huge offsets": rewritten(huge_offsets),
    "moved offsets": rewritten(moved_offsets),
    "overlapping": rewritten(overlapping),
    "nested": rewritten(nested),
    "duplicated": rewritten(duplicated),
    "not UTF-8": rewritten(not_utf8),
    "renamed": rewritten(renamed),
    "missing": rewritten(missing),
    "further": rewritten(further),
    "another type": rewritten(another_type),
    "equal numbers": rewritten(equal_numbers),
    "negative zero": rewritten(negative_zero),
    "no object": rewritten(no_object),
    "NaN": unsound(torch.nan),
    "infinity": unsound(-torch.inf),
    "random bytes": random_bytes,
    "random header": random_header,
}
EITHER: dict[str, Mutation] = {
    "flip anywhere": flip_anywhere,
    "flip body": flip_body,
    "edit header": edit_header,
    "reordered": rewritten(reordered),  # another place for each tensor: another valid encoding, of other values
}
HARMLESS: dict[str, Mutation] = {"respelled": rewritten(respelled)}
MUTATIONS = REFUSED | EITHER | HARMLESS


def inputs(seed: int, each: int) -> Iterator[tuple[str, bytes, Layout]]:
    """Yield `each` inputs of every class of mutation."""
    rng = random.Random(seed)
    valid = [encode(payload) for payload in PAYLOADS]
    for what, mutate in MUTATIONS.items():
        for _ in range(each):
            i = rng.choices(range(len(valid)), [6, 1, 3])[0]
            yield what, mutate(rng, valid[i], LAYOUTS[i]), LAYOUTS[i]


def assert_is_what_the_bytes_mean(decoded: Tensors, data: bytes, expected: Layout) -> None:
    """Compare with what the safetensors library, which is stricter in nothing, reads."""
    read = safetensors.torch.load(data)
    assert_same(decoded, {name: read[name][None] for name in expected.tensors})
    assert read.keys() == expected.tensors.keys()
    for name, x in expected.tensors.items():
        assert (tuple(decoded[name].shape), decoded[name].dtype) == ((1, *x.shape), x.dtype)
        if x.dtype.is_floating_point:
            assert not decoded[name].isinf().any()
            assert not decoded[name].isnan().any()
        elif x.dtype is torch.bool:
            assert set(bits(decoded[name])) <= {0, 1}


def assert_is_one_printable_line(refusal: WireError, expected: Layout) -> None:
    assert str(refusal).isprintable()
    assert len(str(refusal)) < 220 + max(map(len, expected.tensors))


@pytest.mark.thorough
def test_whatever_bytes_come_they_are_refused_or_mean_what_is_decoded() -> None:
    before = deepcopy(LAYOUTS)
    refused, accepted = Counter[str](), Counter[str]()
    for what, data, expected in inputs(seed=0, each=900):
        given = bytearray(data)
        try:
            decoded = decode(given, expected)
        except WireError as refusal:
            refused[what] += 1
            assert_is_one_printable_line(refusal, expected)
        else:
            accepted[what] += 1
            assert_is_what_the_bytes_mean(decoded, data, expected)
        assert given == data
    assert before == LAYOUTS
    assert refused.total() + accepted.total() == 900 * len(MUTATIONS)
    assert {what: accepted[what] for what in REFUSED} == dict.fromkeys(REFUSED, 0)
    assert {what: refused[what] for what in HARMLESS} == dict.fromkeys(HARMLESS, 0)
    assert all(min(refused[what], accepted[what]) > 20 for what in EITHER)


Messages = tuple[int, list[bytes]]


def as_sent(rng: random.Random, data: bytes) -> Messages:
    return len(data), [bytes(chunk) for (chunk,) in chunks([memoryview(data)], rng.choice([1, 7, 64, len(data)]))]


def another_total(rng: random.Random, data: bytes) -> Messages:
    _, sent = as_sent(rng, data)
    return rng.choice([len(data) + rng.choice([-1, 1, 2]), -1, 2**31, 2**63, 2**64, rng.getrandbits(64)]), sent


def empty_chunk(rng: random.Random, data: bytes) -> Messages:
    total, sent = as_sent(rng, data)
    sent.insert(rng.randint(0, len(sent)), b"")
    return total, sent


def long_chunk(rng: random.Random, data: bytes) -> Messages:
    total, sent = as_sent(rng, data)
    sent.insert(rng.randint(0, len(sent)), LONG)
    return total, sent


def too_many(rng: random.Random, data: bytes) -> Messages:
    total, sent = as_sent(rng, data)
    sent.insert(rng.randint(0, len(sent)), rng.choice(sent))
    return total, sent


def too_few(rng: random.Random, data: bytes) -> Messages:
    total, sent = as_sent(rng, data)
    del sent[rng.randrange(len(sent))]
    return total, sent


def out_of_order(rng: random.Random, data: bytes) -> Messages:
    total, sent = as_sent(rng, data)
    rng.shuffle(sent)
    return total, sent


LONG = bytes(CHUNK_BYTES + 1)
STREAMS: dict[str, Callable[[random.Random, bytes], Messages]] = {
    "another total": another_total,
    "empty chunk": empty_chunk,
    "long chunk": long_chunk,
    "too many": too_many,
    "too few": too_few,
    "out of order": out_of_order,
    "as sent": as_sent,
}


@pytest.mark.thorough
def test_whatever_chunks_come_they_are_refused_or_mean_what_is_decoded() -> None:
    rng = random.Random(1)
    refused, accepted = Counter[str](), Counter[str]()
    before = deepcopy(LAYOUTS)
    valid = [encode(payload) for payload in PAYLOADS]
    for what, stream in STREAMS.items():
        for _ in range(2500):
            i = rng.choices(range(len(valid)), [6, 1, 3])[0]
            total, sent = stream(rng, valid[i])
            try:
                assembler = Assembler(total, LAYOUTS[i])
                for chunk in sent:
                    assembler.add(chunk)
                data = assembler.data()
                assert data == b"".join(sent)
                assert_is_what_the_bytes_mean(decode(data, LAYOUTS[i]), bytes(data), LAYOUTS[i])
                accepted[what] += 1
            except WireError as refusal:
                refused[what] += 1
                assert_is_one_printable_line(refusal, LAYOUTS[i])
    assert before == LAYOUTS
    assert refused.total() + accepted.total() == 17_500
    assert accepted.keys() == {"as sent", "out of order"}  # a single chunk, or one swapped with its like, is in order
    assert refused.keys() == STREAMS.keys() - {"as sent"}


def test_no_bytes_make_the_decoder_take_more_memory_than_a_message_may() -> None:
    wide, room = LAYOUTS[1], LAYOUTS[1].max_bytes - LAYOUTS[1].body_bytes - 8
    crowded = packed(b'{"a":[' + b"{}," * ((room - 10) // 3) + b"{}]}", bytes(wide.body_bytes))
    hostile = [("crowded", crowded, wide), *inputs(seed=2, each=20)]
    rng = random.Random(3)
    tracemalloc.start()
    try:
        for what, data, expected in hostile:
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            try:
                assembler = Assembler(rng.choices([len(data), 2**40, 2**63], [8, 1, 1])[0], expected)
                assembler.add(data)
                decode(assembler.data(), expected)
            except WireError:
                pass
            assert tracemalloc.get_traced_memory()[1] - start < 20_000 + 35 * expected.max_bytes, what
    finally:
        tracemalloc.stop()


def test_a_layout_of_one_shape_is_no_layout_of_another() -> None:
    assert layout({"q.A": torch.ones(1, 2)}) == Layout({"q.A": Expected((2,), torch.float32)})
    assert layout({"q.A": torch.ones(1, 2)}) != layout({"q.A": torch.ones(1, 3)})
