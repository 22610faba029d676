"""Rows packed into blocks give what padded rows give; a base that would mix them is found out and padded."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoders import (
    CLASSES,
    CONFIGS,
    EOS,
    HEADS,
    PACKED,
    PAD,
    PADDED,
    VOCAB,
    K,
    R,
    answers,
    each,
    make_base,
    make_batch,
    make_stack,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from peertune.adapters.attention import attention, register_attention
from peertune.adapters.packing import pack, unpack
from peertune.adapters.peft_format import find_sites
from peertune.adapters.rows import Rows, bound_rows, current_rows
from peertune.adapters.stacked import attach, init_adapters
from peertune.data.batches import Encoded, pack_rows, validation_batches
from peertune.rounds.training import evaluate, row_losses
from peertune.types import take


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_packs_where_nothing_but_the_registered_attention_mixes_tokens(name: str) -> None:
    model, _ = make_stack(name)
    assert model.packs == (name in PACKED)
    assert set(CONFIGS) == {*PACKED, *PADDED}


MIXED = [5, 3, 20, 1, 7, 2, 9, 4, 6]


@pytest.mark.parametrize(
    ("lengths", "dropout", "head"),
    [
        pytest.param(MIXED, 0.0, False, id="mixed, frozen head"),
        pytest.param(MIXED, 0.2, True, id="mixed, dropout, trained head"),
        pytest.param([6] * 9, 0.2, False, id="even, dropout, frozen head", marks=pytest.mark.thorough),
        pytest.param([2] * 24, 0.0, True, id="short, trained head", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("name", each(PACKED))
def test_packed_rows_get_the_logits_and_gradients_of_padded_ones(
    name: str, lengths: list[int], dropout: float, head: bool
) -> None:
    model, adapters = make_stack(name, dropout=dropout, head=head)
    packed, padded = (make_batch(lengths, packed) for packed in (True, False))
    assert packed.packing is not None
    expected = answers(model, adapters, padded)
    assert all(x.any() for x in expected.values())
    for part, x in answers(model, adapters, packed).items():
        torch.testing.assert_close(x, expected[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", each(PACKED))
def test_empty_blocks_beside_the_others_change_nothing(name: str) -> None:
    model, adapters = make_stack(name, dropout=0.2, head=True)
    exact, filled = (make_batch([19, 15] * 18, packed) for packed in (1, 12))
    assert exact.packing is not None
    assert filled.packing is not None
    assert len(filled.packing.rows) == 24 > len(exact.packing.rows) > 12
    expected = answers(model, adapters, exact)
    for part, x in answers(model, adapters, filled).items():
        torch.testing.assert_close(x, expected[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "electra", "llama"])
def test_sites_on_every_linear_layer_pack_though_some_stand_beside_the_layers(name: str) -> None:
    model, adapters = make_stack(name, dropout=0.2, all_linear=True)
    assert model.packs
    assert "bert.pooler.dense" in model.sites or name != "bert"
    packed, padded = (answers(model, adapters, make_batch([5, 3, 20, 1, 7], packed)) for packed in (True, False))
    for part, x in packed.items():
        torch.testing.assert_close(x, padded[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["modernbert", "gpt2"])
def test_predictions_do_not_depend_on_packing(name: str) -> None:
    model, adapters = make_stack(name, dropout=0.2)
    lengths = np.random.default_rng(0).integers(1, 21, 40)
    tokens = {"input_ids": torch.from_numpy(np.random.default_rng(1).integers(2, EOS, lengths.sum()))}
    split = Encoded({}, tokens, {"input_ids": PAD}, np.cumsum(lengths) - lengths, lengths, torch.arange(40) % CLASSES)
    rows = np.random.default_rng(2).permutation(40)[:30]
    singles = [take(adapters, slice(client, client + 1)) for client in range(len(next(iter(adapters.values()))))]
    packed, padded = (
        evaluate(model, singles, validation_batches(split, rows, 150, packed), len(rows)) for packed in (True, False)
    )
    assert (packed == padded).all()
    assert len(np.unique(packed)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", each(PACKED))
def test_the_precision_does_not_decide_whether_a_model_packs(name: str, dtype: torch.dtype) -> None:
    base = make_base(name).to(dtype)
    assert attach(base, find_sites(base, CONFIGS[name][1], HEADS), r=R, lora_alpha=3).packs


@pytest.mark.parametrize("name", each(PACKED))
def test_what_stands_in_a_block_beside_a_row_does_not_touch_it_by_a_bit(name: str) -> None:
    model, adapters = make_stack(name, dropout=0.2)
    batch = make_batch([5, 3, 20, 1, 7, 2, 9, 4, 6], packed=True)
    ids, own = batch.inputs["input_ids"], batch.clients == 1
    other = torch.where(own[:, None] & (ids != PAD), (ids - 1) % (EOS - 2) + 2, ids)
    changed = answers(model, adapters, replace(batch, inputs={**batch.inputs, "input_ids": other}))
    for part, x in answers(model, adapters, batch).items():
        for client in range(K):
            mine = batch.clients == client if part == "logits" else client
            assert torch.equal(x[mine], changed[part][mine]) == (client != 1)


def test_a_model_that_packs_still_takes_padded_rows_and_calls_of_others() -> None:
    model, adapters = make_stack("bert")
    inputs = make_batch([5, 3, 2], packed=False).inputs
    fresh = make_base("bert")
    torch.testing.assert_close(model.base(**inputs).logits, fresh(**inputs).logits, rtol=1e-12, atol=1e-12)
    one_row = answers(model, adapters, make_batch([6], packed=True))  # one row saves no block
    torch.testing.assert_close(one_row, answers(model, adapters, make_batch([6], packed=False)))


# bases that would mix rows


@pytest.mark.parametrize("name", ["deberta_v2", "convbert", "mpnet"])
def test_a_padded_model_still_equals_pefts(name: str) -> None:
    model, adapters = make_stack(name)
    assert not model.packs
    batch = make_batch([5, 3, 8, 1, 7, 2], packed=False)
    found = answers(model, adapters, batch)
    for client in range(K):
        config = LoraConfig(r=R, lora_alpha=3, target_modules=list(model.sites))
        peft = get_peft_model(make_base(name), config)
        params = dict(peft.named_parameters())
        own, names = batch.clients == client, {}
        for part, x in adapters.items():
            path, _, what = part.rpartition(".")
            names[part] = params[f"base_model.model.{path}.lora_{what}.default.weight"]
            names[part].data.copy_(x[client])
        logits = peft.eval()(**{part: x[own] for part, x in batch.inputs.items()}).logits
        grads = torch.autograd.grad(
            row_losses(logits, replace(batch, labels=batch.labels[own])).sum(), list(names.values())
        )
        torch.testing.assert_close(found["logits"][own], logits.detach(), rtol=1e-9, atol=1e-9)
        for part, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(found[part][client], grad, rtol=1e-9, atol=1e-9)


class Base(nn.Module):
    """A small text model of two layers, which mix tokens as they like: `layer(x, mask) → x`."""

    main_input_name = "input_ids"

    def __init__(self, layer: Callable[[], nn.Module], hides_full_masks: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = nn.Embedding(VOCAB, 8)
            self.layers = nn.ModuleList([layer(), layer()])
            self.score = nn.Linear(8, CLASSES)
        self.config = transformers.BertConfig()
        self.config._attn_implementation = "peertune"
        self.hides_full_masks = hides_full_masks

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x, mask = self.words(input_ids), None
        if not (self.hides_full_masks and attention_mask.all()):
            mask = create_bidirectional_mask(self.config, x, attention_mask)
        for layer in self.layers:
            x = layer(x, mask)
        return SimpleNamespace(logits=self.score(x[:, 0]))


class Attending(nn.Module):
    """Attention over the tokens that the mask lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = self.linear(x)[:, None]
        mixed, _ = attention(self, y, y, y, mask)
        return x + mixed.flatten(2)


class Deaf(Attending):
    """Attention that ignores its mask."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().forward(x, None)


class Convolving(Attending):
    """Attention, and a convolution over neighbouring tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mixed: Tensor = self.convolution(x.mT).mT
        return super().forward(x, mask) + mixed


class Averaging(Attending):
    """Attention, and the mean of the whole row."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().forward(x, mask) + x.mean(1, keepdim=True)


class Lettered(Attending):
    """Attention, and a value for the token's place in its block."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().forward(x, mask) + torch.arange(x.shape[1], dtype=x.dtype)[:, None]


class Leaking(Attending):
    """Attention, and far less than is lost by rounding of what all rows hold together."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().forward(x, mask) + 1e-6 * x.sum()


class Blind(Attending):
    """Layers that give the same whatever they get."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.ones_like(x)


class WithoutWords(Base):
    """A text model that does not show its embeddings."""

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


class Seeing(Base):
    """A model whose main input is no text."""

    main_input_name = "pixel_values"


def packs(base: nn.Module) -> bool:
    return attach(base, ["layers.0.linear", "layers.1.linear"], r=R, lora_alpha=3).packs


def test_a_model_of_ones_own_packs_by_the_registered_attention() -> None:
    register_attention()
    assert packs(Base(Attending))


@pytest.mark.parametrize(
    "base",
    [
        Base(Deaf),
        Base(Convolving),
        Base(Averaging),
        Base(Lettered),
        Base(Leaking),
        Base(Blind),
        Base(Attending, hides_full_masks=True),
        WithoutWords(Attending),
        Seeing(Attending),
    ],
    ids=[
        "no mask",
        "convolution",
        "mean",
        "place in the block",
        "a little of all rows",
        "nothing of any row",
        "no mask for rows of one length",
        "no words",
        "images",
    ],
)
def test_a_model_that_would_mix_rows_is_padded_and_left_as_it_was(base: Base) -> None:
    register_attention()
    batch = make_batch([5, 3, 2], packed=False)
    before = base(**batch.inputs).logits
    assert not packs(base)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in base.layers)
    assert torch.equal(base(**batch.inputs).logits, before)
    assert base.training
    assert current_rows() is None


@pytest.mark.parametrize("sites", [["score"], ["layers.0.linear", "others.0"]], ids=["no list", "two lists"])
def test_a_model_whose_sites_share_no_list_of_layers_is_padded(sites: list[str]) -> None:
    register_attention()
    base = Base(Attending)
    base.others = nn.ModuleList([nn.Linear(8, 8)])
    assert not attach(base, sites, r=R, lora_alpha=3).packs


# moving tokens


packings = st.lists(st.integers(1, 60), min_size=2, max_size=40).map(np.array)


@given(packings)
@settings(max_examples=60, derandomize=True)
def test_what_is_packed_comes_back_where_it_was_and_padding_as_zeros(lengths: NDArray[np.int64]) -> None:
    packing = pack_rows(lengths)
    if packing is None:
        return
    x = torch.randn(len(lengths), int(lengths.max()), 3, generator=torch.Generator().manual_seed(0))
    real = torch.arange(x.shape[1]) < torch.from_numpy(lengths)[:, None]
    blocks = pack(x, packing)
    assert blocks.shape == (*packing.rows.shape, 3)
    assert torch.equal(unpack(blocks, packing, len(x)), x * real[..., None])
    filled = packing.rows >= 0
    assert torch.equal(blocks[filled], x[packing.rows[filled], packing.positions[filled]])
    assert not blocks[~filled].any()


def test_gradients_come_back_to_the_tokens_they_belong_to() -> None:
    packing = pack_rows(np.array([3, 20, 40, 5]))
    assert packing is not None
    x = torch.randn(4, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpack(pack(x, packing).sin(), packing, 4), x, fast_mode=True)


def test_a_site_keeps_apart_what_the_clients_have_in_a_block_in_every_precision() -> None:
    base = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 4).float())
    model = attach(base, ["0", "1"], r=2, lora_alpha=2)
    generator = torch.Generator().manual_seed(0)
    adapters = {
        name: torch.randn(2, *x.shape[1:], generator=generator).to(x.dtype)
        for name, x in init_adapters(model, 2, 0).items()
    }
    packing, clients = pack_rows(np.array([3, 20, 40, 5])), torch.tensor([0, 1, 1, 0])
    x = torch.randn(4, 40, 4, generator=generator).double()
    outputs = []
    for plan in (None, packing):
        with bound_rows(Rows(adapters, clients, clients, False, model.streams, plan)):
            y = x if plan is None else pack(x, plan)
            y = base[1](base[0](y).float())
        outputs.append(y if plan is None else unpack(y, plan, 4))
    real = torch.arange(40) < torch.tensor([3, 20, 40, 5])[:, None]
    torch.testing.assert_close(outputs[1][real], outputs[0][real])
