"""Adapters that begin as a part of the frozen layer itself, which is taken out of it: PiSSA and OLoRA.

All clients must begin alike, on machines whose last bits differ. So the parts are found in float64, their signs are
fixed, and they are rounded to the 8 bits of bfloat16. What is rounded off stays in the layer: it is what is left.
"""

from typing import Literal

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peertune.errors import ModelError

Principal = Literal["pissa", "olora"]


@torch.no_grad()
def take_out(name: str, layer: nn.Module, r: int, scaling: float, how: Principal) -> tuple[Tensor, Tensor]:
    """Take `scaling · B A` out of a layer's weight `[d_out, d_in]`, in place; return A `[r, d_in]` and B `[d_out, r]`.

    `pissa` (arXiv 2404.02948, eq. 2 to 4): with the r largest singular values S of the weight and their vectors,
    A = √(S/scaling) Vᵀ and B = U √(S/scaling). `olora` (arXiv 2406.01775): A and B are the first r rows of R and
    columns of Q, of the weight's QR decomposition. PEFT's start is the same but for signs and rounding: here each
    column of PiSSA's B has its largest entry positive, as is the diagonal of OLoRA's R. A `Conv1D` is turned first,
    which PEFT 0.21 leaves out for OLoRA (`findings/peft-olora-transposed-layers.sh`).

    Both are float32, or float64 in a float64 layer. Raises ModelError where the weight isn't kept in plain numbers,
    holds such as are not finite, or has no more than r singular values.
    """
    weight = layer.weight
    if type(layer) not in (nn.Linear, Conv1D) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ModelError(
            f"lora.init_lora_weights: {how} changes the weights, and those of {name} are quantised; "
            "use model.quantization=null or init_lora_weights=true"
        )
    w = (weight.T if isinstance(layer, Conv1D) else weight).double().cpu()  # [d_out, d_in]
    if not torch.isfinite(w).all():
        raise ModelError(f"model: the weights of {name} hold numbers that are not finite; use another checkpoint")
    if how == "pissa":
        if r >= min(w.shape):
            raise ModelError(
                f"lora.init_lora_weights: pissa of rank {r} leaves nothing of {name}; "
                f"use at most {min(w.shape) - 1} there, by lora.r or lora.rank_pattern"
            )
        u, s, vt = (torch.from_numpy(np.ascontiguousarray(x)) for x in svds(w.numpy(), k=r, v0=np.ones(min(w.shape))))
        order = s.argsort(descending=True)
        root = (s[order] / scaling).sqrt()
        a, b = root[:, None] * vt[order], u[:, order] * root
        signs = b.gather(0, b.abs().argmax(0, keepdim=True)).sign()
    else:
        b, r_left = torch.linalg.qr(w[:, :r])
        a, signs = (b.T @ w).triu(), r_left.diagonal().sign()[None]
    a, b = (x.bfloat16().to(torch.promote_types(weight.dtype, torch.float32)) for x in (a * signs.T, b * signs))
    left = w - scaling * b.double() @ a.double()
    weight.copy_(left.T if isinstance(layer, Conv1D) else left)
    return a.to(weight.device), b.to(weight.device)
