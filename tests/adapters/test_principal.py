"""A start that is a part of the base: PEFT's parts, alike on all machines, and nothing of the base is lost."""

from typing import Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peertune.adapters.principal import take_out
from peertune.errors import ModelError

Principal = Literal["pissa", "olora"]
both = pytest.mark.parametrize("how", ["pissa", "olora"])
ROUNDING = 2**-8  # of bfloat16


def layer(d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(d_in, d_out, dtype=dtype)
    made.weight.data = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0)).to(dtype)
    return made


@both
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_factors_are_pefts_but_for_signs_and_the_rounding(how: Principal, shape: tuple[int, int]) -> None:
    own, theirs = layer(*shape), layer(*shape)
    weight = own.weight.detach().clone()
    peft = get_peft_model(
        nn.Sequential(theirs),
        LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=how),
    )
    their_a, their_b = (x["default"].weight.detach() for x in (peft.model[0].lora_A, peft.model[0].lora_B))
    a, b = take_out("layer", own, 3, 2.0, how)
    signs = (b * their_b).sum(0).sign()
    torch.testing.assert_close(b * signs, their_b, rtol=ROUNDING, atol=1e-5)
    torch.testing.assert_close(a * signs[:, None], their_a, rtol=ROUNDING, atol=1e-5)
    torch.testing.assert_close(own.weight + 2 * b @ a, weight)
    assert not torch.allclose(own.weight, weight, atol=0.1)


@both
def test_machines_whose_last_bits_differ_begin_with_the_same_bits(how: Principal) -> None:
    one, other = layer(30, 40, torch.float64), layer(30, 40, torch.float64)
    with torch.no_grad():
        other.weight *= 1 + 1e-12 * torch.rand_like(other.weight)
    assert not torch.equal(one.weight, other.weight)
    for x, y in zip(take_out("", one, 4, 1.0, how), take_out("", other, 4, 1.0, how), strict=True):
        assert torch.equal(x, y)


@both
def test_signs_are_fixed(how: Principal) -> None:
    one, other = layer(30, 40), layer(30, 40)
    with torch.no_grad():
        other.weight *= -1
    (a, b), (turned, b_too) = take_out("", one, 4, 1.0, how), take_out("", other, 4, 1.0, how)
    if how == "pissa":
        assert torch.equal(a, -turned)
        assert torch.equal(b, b_too)
        assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()
    else:
        assert torch.equal(a, turned)
        assert torch.equal(b, -b_too)
        assert (a[:, :4].diagonal() > 0).all()


@both
def test_a_layer_that_lies_transposed_gives_the_same(how: Principal) -> None:
    linear, conv = layer(12, 20), Conv1D(12, 20)
    conv.weight.data = linear.weight.detach().T.clone()
    for x, y in zip(take_out("", linear, 3, 2.0, how), take_out("", conv, 3, 2.0, how), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(linear.weight.T, conv.weight)


def test_what_can_not_be_taken_is_refused() -> None:
    with pytest.raises(ModelError, match=r"init_lora_weights: pissa of rank 12 leaves nothing of q; use at most 11"):
        take_out("q", layer(12, 20), 12, 1.0, "pissa")
    broken = layer(12, 20)
    broken.weight.data[3, 4] = torch.nan
    with pytest.raises(ModelError, match="the weights of q hold numbers that are not finite"):
        take_out("q", broken, 2, 1.0, "olora")
    packed = layer(12, 20)
    packed.weight = nn.Parameter(torch.zeros(120, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"those of q are quantised; use model\.quantization=null"):
        take_out("q", packed, 2, 1.0, "pissa")
