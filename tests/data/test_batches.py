from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peertune.data.batches import (
    BLOCK,
    Encoded,
    TrainingSteps,
    encode_images,
    encode_text,
    even_parts,
    micro_batches,
    pack_rows,
    pad,
    sample,
    validation_batches,
)
from peertune.errors import DataError
from peertune.types import Batch, Split

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]
ALL: dict[str, Any] = {"tokens": 20, "clients_together": 9, "packed": False, "seed": 0}
lengths_of_rows = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(np.array)


def encoded_rows(count: int, seed: int = 0) -> Encoded:
    """Rows of 1 to 20 tokens that name themselves: row n is n, n, …"""
    lengths = np.random.default_rng(seed).integers(1, 21, count)
    ids = torch.from_numpy(np.repeat(np.arange(count), lengths))
    return Encoded(
        {}, {"input_ids": ids}, {"input_ids": -1}, np.cumsum(lengths) - lengths, lengths, torch.arange(count)
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **special
    )


@given(lengths_of_rows, st.integers(1, 200))
def test_micro_batches_hold_every_row_once_longest_first_and_within_the_budget(
    lengths: NDArray[np.int64], tokens: int
) -> None:
    parts = list(micro_batches(lengths, tokens))
    order = np.concatenate(parts)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[order]) <= 0).all()
    for part in parts:
        assert len(part) == 1 or lengths[part].max() * len(part) <= tokens


@given(lengths_of_rows, st.integers(1, 200))
def test_micro_batches_are_as_large_as_the_budget_allows(lengths: NDArray[np.int64], tokens: int) -> None:
    parts = list(micro_batches(lengths, tokens))
    for part in parts[:-1]:
        assert lengths[part].max() * (len(part) + 1) > tokens


@given(lengths_of_rows)
def test_packing_gives_every_token_a_slot_of_its_own_and_keeps_rows_whole(lengths: NDArray[np.int64]) -> None:
    packing = pack_rows(lengths)
    if packing is None:
        return
    blocks, size = packing.rows.shape
    assert len(set(packing.slots.tolist())) == len(packing.slots) == lengths.sum()
    assert packing.width == lengths.max()
    row, position = packing.tokens // packing.width, packing.tokens % packing.width
    every_token = [(row, position) for row, length in enumerate(lengths) for position in range(length)]
    assert sorted(zip(row.tolist(), position.tolist(), strict=True)) == every_token
    rows, positions = packing.rows.flatten(), packing.positions.flatten()
    assert torch.equal(rows[packing.slots], row)
    assert torch.equal(positions[packing.slots], position)
    empty = torch.ones(blocks * size, dtype=torch.bool)
    empty[packing.slots] = False
    assert (rows[empty] == -1).all()
    assert (positions[empty] == 0).all()
    for number, length in enumerate(lengths):
        (slots,) = torch.nonzero(rows == number, as_tuple=True)
        assert slots.tolist() == list(range(int(slots[0]), int(slots[0]) + length))  # side by side, in their order
        assert positions[slots].tolist() == list(range(length))
        assert int(slots[0]) // size == int(slots[-1]) // size


@given(lengths_of_rows | st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=60).map(np.array))
def test_blocks_are_few_and_as_long_as_the_longest_row_asks(lengths: NDArray[np.int64]) -> None:
    longest = int(lengths.max())
    size = max(BLOCK, (longest + 15) // 16 * 16)
    packing = pack_rows(lengths)
    *_, second, first = sorted([*lengths, size], reverse=True)  # the two shortest rows
    assert (packing is None) == (len(lengths) == 1 or first + second > size)
    if packing is None:
        return
    blocks = len(packing.rows)
    assert packing.rows.shape[1] == size
    assert blocks < len(lengths)
    filled = sorted((packing.rows >= 0).sum(1).tolist())
    assert filled[0] > 0
    assert blocks == 1 or filled[0] + filled[1] > size  # no two blocks would fit into one
    assert blocks <= 2 * -(-int(lengths.sum()) // size)


def test_rows_of_lengths_like_sst2s_leave_next_to_no_slot_empty() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(2.3, 0.7, 160).astype(int) + 3, 4, 48)
    packing = pack_rows(lengths)
    assert packing is not None
    assert lengths.sum() / packing.rows.numel() > 0.97
    assert lengths.sum() / (len(lengths) * lengths.max()) < 0.4


@given(lengths_of_rows, st.integers(1, 8))
def test_blocks_come_in_multiples_with_empty_ones_at_the_end(lengths: NDArray[np.int64], multiple: int) -> None:
    exact, packing = pack_rows(lengths), pack_rows(lengths, multiple)
    if exact is None or len(exact.rows) <= 8:
        assert (packing is None) == (exact is None)
        assert packing is None or torch.equal(packing.rows, exact.rows)  # type: ignore[union-attr]
        return
    blocks = -(-len(exact.rows) // multiple) * multiple
    assert (packing is None) == (blocks >= len(lengths))
    if packing is not None:
        assert len(packing.rows) == blocks
        assert torch.equal(packing.rows[: len(exact.rows)], exact.rows)
        assert (packing.rows[len(exact.rows) :] == -1).all()
        assert torch.equal(packing.seats, exact.seats)


def test_the_same_rows_are_packed_alike_each_time() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 50)
    first, second = pack_rows(lengths), pack_rows(lengths.copy())
    assert first is not None
    assert second is not None
    assert torch.equal(first.slots, second.slots)


@given(lengths_of_rows, st.integers(1, 500), st.integers(1, 9))
def test_even_parts_hold_every_row_once_in_order_and_near_the_budget(
    lengths: NDArray[np.int64], tokens: int, least: int
) -> None:
    parts = even_parts(lengths, tokens, least)
    total, longest = int(lengths.sum()), int(lengths.max())
    wanted = max(least, round(total / tokens), 1)
    assert np.concatenate(parts).tolist() == list(range(len(lengths)))
    assert all(len(part) for part in parts)
    assert len(parts) <= wanted
    for part in parts:
        assert lengths[part].sum() <= total / wanted + longest
        assert lengths[part].sum() <= 1.5 * tokens + longest
    if longest * wanted < total:  # no row is as long as a part
        assert len(parts) == wanted
        assert min(lengths[part].sum() for part in parts) >= total / wanted - longest


@given(seed=st.integers(0, 5), client=st.integers(0, 9), rows=st.integers(1, 30), size=st.integers(1, 12))
def test_a_client_goes_through_all_its_rows_once_an_epoch(seed: int, client: int, rows: int, size: int) -> None:
    steps = 3 * rows // size + 1
    drawn = np.concatenate([sample(seed, client, rows, step, size) for step in range(steps)])
    for epoch in range(len(drawn) // rows):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


def test_epochs_clients_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        tuple(sample(seed, client, 50, epoch, 50)) for seed in range(2) for client in range(2) for epoch in range(2)
    ]
    assert len(set(orders)) == 8


@given(st.permutations(range(12)))
@settings(max_examples=10)
def test_what_a_step_draws_does_not_depend_on_what_was_drawn_before(steps: list[int]) -> None:
    expected = {step: sample(0, 1, 7, step, 4).tolist() for step in range(12)}
    assert {step: sample(0, 1, 7, step, 4).tolist() for step in steps} == expected


@pytest.mark.parametrize("columns", [("left",), ("left", "right")])
@pytest.mark.parametrize("max_length", [5, 64])
def test_padding_is_the_tokenizers_own(tokenizer: Any, columns: tuple[str, ...], max_length: int) -> None:
    generator = np.random.default_rng(0)
    texts = {
        name: [" ".join(generator.choice(list("abcdefghz"), generator.integers(0, 12))) for _ in range(40)]
        for name in ("left", "right")
    }
    split = Split(texts, np.zeros(40, dtype=np.int64))
    encoded = encode_text(tokenizer, split, columns, max_length)
    rows = np.array([3, 17, 4, 4, 39])
    expected = tokenizer(
        *[[texts[name][row] for row in rows] for name in columns],
        truncation=True,
        max_length=max_length,
        padding=True,
        return_tensors="pt",
    )
    padded = pad(encoded, rows)
    assert padded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in padded.items())


def test_rows_tokenised_alone_are_those_of_the_whole_split(tokenizer: Any) -> None:
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abcdefghz"), generator.integers(1, 12))) for _ in range(40)]
    split = Split({"text": texts}, np.arange(40))
    whole, own = encode_text(tokenizer, split, ["text"], 9), np.array([0, 3, 4, 17, 39])
    encoded = encode_text(tokenizer, split, ["text"], 9, own)
    assert len(encoded) == 40
    assert np.flatnonzero(encoded.lengths).tolist() == own.tolist()
    assert list(encoded.long) == [row for row in whole.long if row in own]
    for rows in (own, own[[3, 1, 1]]):
        padded, expected = pad(encoded, rows), pad(whole, rows)
        assert all(torch.equal(padded[name], x) for name, x in expected.items())
        assert encoded.labels[rows].tolist() == rows.tolist()


def test_what_a_tokenizer_puts_around_a_text_stands_once_where_the_text_has_it_already(tokenizer: Any) -> None:
    rows = {"left": ["a b", "[CLS] a b", "[CLS] a b"], "right": ["c", "c", "c [SEP]"]}
    split = Split(rows, np.zeros(3, dtype=np.int64))
    for columns in (("left",), ("left", "right")):
        ids = pad(encode_text(tokenizer, split, columns, 64), np.arange(3))["input_ids"]
        assert (ids == ids[0]).all()
        assert ids[0].tolist().count(WORDS.index("[CLS]")) == 1
    right = encode_text(tokenizer, split, ("right",), 64)
    assert (right.lengths == 3).all()


def test_a_row_without_tokens_is_refused_by_its_number() -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    split = Split({"text": ["a", "", "a"]}, np.zeros(3, dtype=np.int64))
    with pytest.raises(DataError, match="row 1 of the data has no tokens"):
        encode_text(bare, split, ["text"], 8)
    with pytest.raises(DataError, match="row 1 of the data has no tokens"):
        encode_text(bare, split, ["text"], 8, np.array([1, 2]))


def test_images_are_taken_as_they_are() -> None:
    images = np.random.default_rng(0).normal(size=(5, 1, 4, 4))
    encoded = encode_images(Split({"pixel_values": images}, np.arange(5)), tokens=17)
    padded = pad(encoded, np.array([4, 1]))
    assert padded.keys() == {"pixel_values"}
    torch.testing.assert_close(padded["pixel_values"], torch.from_numpy(images[[4, 1]]).float())
    assert encoded.lengths.tolist() == [17] * 5


def test_targets_of_a_regression_are_float32_and_classes_int64() -> None:
    pixels = {"pixel_values": np.zeros((2, 1, 1, 1))}
    assert encode_images(Split(pixels, np.array([0.5, 1.5])), 1).labels.dtype == torch.float32
    assert encode_images(Split(pixels, np.array([0, 1], dtype=np.int32)), 1).labels.dtype == torch.int64


def rows_and_keys(steps: list[list[Batch]], clients: list[int]) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """What each client trains on in each step: (row, key, tokens) of its rows, sorted."""
    found: dict[tuple[int, int], list[tuple[int, int, int]]] = {
        (step, client): [] for step in range(len(steps)) for client in clients
    }
    for step, batches in enumerate(steps):
        for batch in batches:
            tokens = batch.inputs["attention_mask"].sum(1).tolist()
            for place, row, key, count in zip(
                batch.clients.tolist(), batch.labels.tolist(), batch.keys.tolist(), tokens, strict=True
            ):
                found[step, clients[place]].append((row, key, count))
    return {name: sorted(rows) for name, rows in found.items()}


@pytest.mark.thorough
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("tokens", [1, 64, 10_000])
@given(seed=st.integers(0, 3), round=st.integers(0, 5), chunk=st.integers(1, 5), clients_together=st.integers(1, 6))
@settings(max_examples=15)
def test_what_a_client_trains_on_does_not_depend_on_who_is_asked_for_with_it(
    tokens: int, packed: bool, seed: int, round: int, chunk: int, clients_together: int
) -> None:
    encoded = encoded_rows(60)
    parts = np.array_split(np.random.default_rng(seed).permutation(60), [3, 10, 30, 45])
    common: dict[str, Any] = {"rows_per_step": 6, "local_steps": 3, "seed": seed}
    everyone = list(range(5))
    whole: dict[str, Any] = {"tokens": 10_000, "clients_together": 5, "packed": False, **common}
    together = rows_and_keys(list(TrainingSteps(encoded, parts, **whole)(everyone, round)), everyone)
    assert all(len(rows) == 6 for rows in together.values())
    assert all({row for row, _, _ in rows} <= set(parts[client].tolist()) for (_, client), rows in together.items())
    assert all(count == encoded.lengths[row] for rows in together.values() for row, _, count in rows)
    keys = [key for rows in together.values() for _, key, _ in rows]
    assert len(set(keys)) == len(keys)
    cut: dict[str, Any] = {"tokens": tokens, "clients_together": clients_together, "packed": packed, **common}
    steps = TrainingSteps(encoded, parts, **cut)
    for start in range(0, 5, chunk):
        some = everyone[start : start + chunk]
        alone = rows_and_keys(list(steps(some, round)), some)
        assert alone == {name: rows for name, rows in together.items() if name[1] in some}
    backwards = everyone[::-1]
    assert rows_and_keys(list(steps(backwards, round)), backwards) == together


@given(seed=st.integers(0, 20), tokens=st.integers(20, 400), clients_together=st.integers(1, 6))
@settings(max_examples=30)
def test_a_batch_holds_rows_of_few_neighbouring_clients(seed: int, tokens: int, clients_together: int) -> None:
    encoded = encoded_rows(60, seed)
    parts = np.array_split(np.arange(60), 6)
    common: dict[str, Any] = {"rows_per_step": 8, "local_steps": 2, "clients_together": clients_together, "seed": seed}
    for packed in (False, True):
        for batches in TrainingSteps(encoded, parts, tokens=tokens, packed=packed, **common)(range(6), 0):
            for batch in batches:
                spread = int(batch.clients.max() - batch.clients.min()) + 1
                lengths = batch.inputs["attention_mask"].sum(1)
                if packed:  # cut by tokens, and clients' rows are not of one length
                    assert spread <= 3 * clients_together
                    assert len(batch.clients.unique()) == spread
                    assert lengths.sum() <= 1.5 * tokens + 20
                    assert (batch.packing is None) == (pack_rows(lengths.numpy()) is None)
                    assert batch.packing is None or batch.packing.width == batch.inputs["input_ids"].shape[1]
                else:
                    assert spread <= clients_together
                    assert batch.packing is None


def test_rounds_go_on_where_the_one_before_stopped() -> None:
    encoded = encoded_rows(20)
    steps = TrainingSteps(encoded, [np.arange(20)], rows_per_step=4, local_steps=5, **ALL)
    seen = [row for step in range(2) for rows in rows_and_keys(list(steps([0], step)), [0]).values() for row in rows]
    assert sorted(row for row, _, _ in seen) == sorted([*range(20), *range(20)])
    assert len({key for _, key, _ in seen}) == 40


def test_a_clients_shares_in_its_loss_sum_to_one() -> None:
    steps = TrainingSteps(encoded_rows(20), [np.arange(20)], rows_per_step=7, local_steps=1, **ALL)
    (batches,) = steps([0], 0)
    assert sum(float(batch.weights.sum()) for batch in batches) == pytest.approx(1)


@given(
    st.lists(st.integers(0, 59), min_size=1, max_size=30, unique=True).map(np.array),
    st.booleans(),
    st.integers(1, 300),
)
def test_validation_shows_every_row_once(rows: NDArray[np.int64], packed: bool, tokens: int) -> None:
    encoded = encoded_rows(60)
    seen = []
    for batch, places in validation_batches(encoded, rows, tokens, packed):
        assert batch.labels.tolist() == rows[places].tolist()
        assert batch.inputs["input_ids"][:, 0].tolist() == rows[places].tolist()
        assert batch.inputs["attention_mask"].sum(1).tolist() == encoded.lengths[rows[places]].tolist()
        longest = encoded.lengths[rows[places]].max()
        if packed:
            assert encoded.lengths[rows[places]].sum() <= 1.5 * tokens + longest
            plan = pack_rows(encoded.lengths[rows[places]])
            assert (batch.packing is None) == (plan is None)
        else:
            assert batch.inputs["input_ids"].numel() <= max(tokens, longest)
            assert batch.packing is None
        assert not batch.clients.any()
        seen += places.tolist()
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize(("tokens", "sizes"), [(12, [1] * 5), (24, [2, 2, 1]), (99, [5]), (11, None)])
def test_rows_of_one_length_travel_client_by_client_where_a_batch_has_room_for_a_clients(
    tokens: int, sizes: list[int] | None
) -> None:
    images = encode_images(Split({"pixel_values": np.zeros((20, 1, 2, 2))}, np.arange(20)), tokens=4)
    parts = [np.arange(4 * client, 4 * client + 4) for client in range(5)]
    settings = {**ALL, "tokens": tokens}
    (batches,) = TrainingSteps(images, parts, rows_per_step=3, local_steps=1, **settings)(range(5), 0)
    assert torch.cat([batch.clients for batch in batches]).tolist() == np.repeat(np.arange(5), 3).tolist()
    if sizes is None:
        assert {batch.each for batch in batches} == {None}
    else:
        assert [len(batch.clients) / 3 for batch in batches] == sizes
        assert {batch.each for batch in batches} == {3}
