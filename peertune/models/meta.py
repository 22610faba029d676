"""Bases without weights: on the meta device, with all shapes and types right, to plan what they would take."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert


def empty_model(auto: Any, config: Any, dtype: torch.dtype, quantization: str | None) -> nn.Module:
    """Return what `auto.from_pretrained` would, of a checkpoint of this config that lacks nothing, without weights."""
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, dtype=dtype, attn_implementation="peertune")
    if quantization is not None:
        kept = tuple(f"{name}." for name in get_keys_to_not_convert(model))  # as when it is loaded
        for name, layer in list(model.named_modules()):
            if type(layer) in (nn.Linear, Conv1D) and not f"{name}.".startswith(kept):
                model.set_submodule(name, FourBits(layer))
    return model.eval()


class FourBits(nn.Linear):
    """Stands in for a linear layer whose weights bitsandbytes holds in nf4 with double quantisation (arXiv 2305.14314).

    64 weights share a scale of 8 bits and 256 scales one of 32: 4.127 bits a weight. Each pass, forward and backward,
    makes the whole weight for a moment.
    """

    def __init__(self, layer: nn.Module) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor), "linear layers have a weight"
        d_in, d_out = weight.shape if isinstance(layer, Conv1D) else weight.shape[::-1]
        super().__init__(d_in, d_out, bias=layer.bias is not None, device="meta", dtype=weight.dtype)
        blocks = -(-weight.numel() // 64)
        self.weight = nn.Parameter(torch.empty(-(-weight.numel() // 2), dtype=torch.uint8, device="meta"), False)
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8, device="meta"))
        self.register_buffer("scales_of_scales", torch.empty(-(-blocks // 256), dtype=torch.float32, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, …, d_in]` → `[b, …, d_out]`."""
        y: Tensor = _Product.apply(x, self.in_features, self.out_features)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, d_in: int, d_out: int) -> Tensor:
        ctx.sizes = d_in, d_out
        return x @ x.new_empty(d_in, d_out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        d_in, d_out = ctx.sizes
        return grad @ grad.new_empty(d_out, d_in), None, None
