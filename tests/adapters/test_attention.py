"""Our attention against transformers' eager one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel
from transformers.models.bert.modeling_bert import eager_attention_forward as bert_attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_attention
from transformers.models.t5.modeling_t5 import eager_attention_forward as t5_attention

from peertune.adapters.attention import attention, register_attention
from peertune.adapters.dropout import keyed_dropout
from peertune.adapters.rows import Rows, bound_rows
from peertune.errors import ModelError

ROWS, HEADS, TOKENS, WIDTH = 3, 4, 6, 5


class Layer(nn.Module):
    """What transformers' attention asks of the layer it runs in."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = HEADS // groups
        self.head_dim = WIDTH


def tensors(groups: int = HEADS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, heads, TOKENS, WIDTH) for heads in (HEADS, groups, groups)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return query, key, value


def padding() -> Tensor:
    """Rows of 6, 4 and 1 tokens."""
    mask = torch.arange(TOKENS) < torch.tensor([6, 4, 1])[:, None]
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)[
        :, None, None
    ]


def causal() -> Tensor:
    lowest = torch.finfo(torch.float64).min
    return torch.full((TOKENS, TOKENS), lowest, dtype=torch.float64).triu(1).expand(ROWS, 1, TOKENS, TOKENS)


masks = pytest.mark.parametrize(
    "mask", [None, padding(), causal(), torch.minimum(padding(), causal())], ids=["none", "padding", "causal", "both"]
)


@masks
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_equals_eager_attention_under_every_mask_and_scaling(mask: Tensor | None, scaling: float | None) -> None:
    query, key, value = tensors()
    ours, weights = attention(nn.Identity(), query, key, value, mask, scaling=scaling)
    theirs, _ = bert_attention(nn.Identity(), query, key, value, mask, scaling=scaling)
    assert weights is None
    assert ours.shape == (ROWS, TOKENS, HEADS, WIDTH)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@masks
@pytest.mark.parametrize("groups", [1, 2])
def test_heads_share_keys_and_values_in_groups_as_llamas_do(mask: Tensor | None, groups: int) -> None:
    query, key, value = tensors(groups)
    ours, _ = attention(Layer(groups), query, key, value, mask, scaling=0.4)
    theirs, _ = llama_attention(Layer(groups), query, key, value, mask, scaling=0.4)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # theirs rounds its softmax to float32


@masks
def test_scores_are_capped_as_gemmas_are(mask: Tensor | None) -> None:
    query, key, value = tensors(groups=2)
    ours, _ = attention(nn.Identity(), query, key, value, mask, softcap=0.7)
    theirs, _ = gemma2_attention(Layer(groups=2), query, key, value, mask, softcap=0.7)
    uncapped, _ = attention(nn.Identity(), query, key, value, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, uncapped, rtol=1e-2)


def test_its_gradients_equal_those_of_eager_attention() -> None:
    both = []
    for function in (attention, bert_attention):
        query, key, value = (x.requires_grad_() for x in tensors())
        output = function(nn.Identity(), query, key, value, padding())[0]
        both.append(torch.autograd.grad(output.sin().sum(), [query, key, value]))
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)


def test_padding_gets_no_attention_and_no_gradient() -> None:
    query, key, value = (x.requires_grad_() for x in tensors())
    output, _ = attention(nn.Identity(), query, key, value, padding())
    for grad in torch.autograd.grad(output.sum(), (key, value)):
        assert not grad[1, :, 4:].any()
        assert not grad[2, :, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precisions_stay_near_eager_attention(dtype: torch.dtype) -> None:
    query, key, value = tensors(dtype=dtype)
    ours, _ = attention(nn.Identity(), query, key, value, None)
    theirs, _ = bert_attention(nn.Identity(), query, key, value, None)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)


def test_its_probabilities_are_dropped_by_key_in_training_only() -> None:
    query, key, _ = tensors()
    eye = torch.eye(TOKENS, dtype=torch.float64).expand(ROWS, HEADS, TOKENS, TOKENS)  # shows the probabilities
    module = nn.Identity()
    rows = Rows({}, torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS) + 5, True, {module: 8})
    plain, _ = attention(module, query, key, eye, None, dropout=0.5)
    with bound_rows(rows):
        dropped, _ = attention(module, query, key, eye, None, dropout=0.5)
        still, _ = attention(module.eval(), query, key, eye, None, dropout=0.5)
    expected = keyed_dropout(plain.transpose(1, 2), 0.5, rows, 8, scores=True).transpose(1, 2)
    torch.testing.assert_close(dropped, expected)
    assert torch.equal(still, plain)


@masks
def test_biases_of_positions_are_added_as_t5s_are(mask: Tensor | None) -> None:
    bias = torch.randn(1, HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, _ = attention(nn.Identity(), *tensors(), mask, position_bias=bias)
    theirs, _ = t5_attention(nn.Identity(), *tensors(), mask, position_bias=bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_t5_has_its_relative_positions() -> None:
    register_attention()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5EncoderModel(T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)).eval()
    with torch.no_grad():
        for table in (x for name, x in model.named_parameters() if "relative" in name):
            table.normal_(generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
        theirs = model(**inputs).last_hidden_state
        model.set_attn_implementation("peertune")
        torch.testing.assert_close(model(**inputs).last_hidden_state[:, :3], theirs[:, :3])


@pytest.mark.parametrize("name", ["s_aux", "sinks", "indices", "block_indices"])
def test_what_it_does_not_know_is_refused(name: str) -> None:
    given: dict[str, Any] = {"attention_mask": None, name: torch.zeros(HEADS)}
    with pytest.raises(ModelError, match=r"model: Identity has (attention sinks|sparse attention), which is not supp"):
        attention(nn.Identity(), *tensors(), **given)
    attention(nn.Identity(), *tensors(), **given | {name: None})
