"""Our attention against transformers' eager one."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import eager_attention_forward as bert_attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_attention

from peertune.adapters.attention import attention
from peertune.adapters.dropout import keyed_dropout
from peertune.adapters.rows import Rows, bound
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
    with bound(rows):
        dropped, _ = attention(module, query, key, eye, None, dropout=0.5)
        still, _ = attention(module.eval(), query, key, eye, None, dropout=0.5)
    expected = keyed_dropout(plain.transpose(1, 2), 0.5, rows, 8, scores=True).transpose(1, 2)
    torch.testing.assert_close(dropped, expected)
    assert torch.equal(still, plain)


def test_attention_sinks_are_refused() -> None:
    with pytest.raises(ModelError, match="Identity: attention sinks"):
        attention(nn.Identity(), *tensors(), attention_mask=None, s_aux=torch.zeros(HEADS))
