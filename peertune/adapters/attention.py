"""Attention for short rows, with keyed dropout on its probabilities.

`transformers` lets a model run on a registered attention function. Ours exists for two reasons: the probabilities'
dropout must be keyed like all other (see `dropout.py`), and on a CPU plain products are faster for short rows than
PyTorch's fused attention, whose bfloat16 backward is slow there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from peertune.adapters.dropout import keyed_dropout
from peertune.adapters.packing import pack, unpack
from peertune.adapters.rows import current_rows
from peertune.errors import ModelError
from peertune.memory import device_type

_UNKNOWN = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}
"""What models hand their attention that would change its result → what it is."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Softmax attention: `query [b, heads, s, d]`, `key` and `value [b, groups, s, d]` → `[b, s, heads, d]`.

    Packed rows come as N blocks of S slots in the place of `b` and `s`. `attention_mask` is added to the scores and
    holds causality and padding, and so is T5's `position_bias`. Heads may share keys and values in groups. Raises
    ModelError for attention sinks and sparse attention, which this function does not know.
    """
    for name, what in _UNKNOWN.items():
        if others.get(name) is not None:
            raise ModelError(f"model: {type(module).__name__} has {what}, which is not supported; choose another base")
    if position_bias is not None:
        attention_mask = position_bias if attention_mask is None else attention_mask + position_bias
    heads_per_group = query.shape[1] // key.shape[1]
    if heads_per_group > 1:
        key, value = key.repeat_interleave(heads_per_group, dim=1), value.repeat_interleave(heads_per_group, dim=1)
    rows = current_rows()
    if rows is not None and rows.watch is not None:
        rows.watch.append((module, None, None))
    read = rows.last.read if rows is not None and rows.last is not None and rows.last.attention is module else None
    if read is not None:  # of all tokens that may be looked at, these alone look
        blocks = len(query)
        query = pack(query.transpose(1, 2), read).transpose(1, 2)
        if attention_mask is not None and attention_mask.shape[2] > 1:
            attention_mask = attention_mask.expand(blocks, -1, -1, -1).transpose(1, 2)
            attention_mask = pack(attention_mask, read).transpose(1, 2)
    drops = module.training and dropout > 0 and rows is not None
    # Of a CPU the fused kernel's bfloat16 backward is slow.
    slow = device_type(query) == "cpu" and query.dtype.itemsize == 2 and torch.is_grad_enabled()
    if not (drops or slow) and softcap is None:
        found = _fused(query, key, value, attention_mask, scaling).transpose(1, 2)
        return (found.contiguous() if read is None else unpack(found, read, len(found))), None
    scores = (query @ key.transpose(2, 3)).mul_(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores.add_(attention_mask)
    # In float32, as many models do themselves: more exact, and faster than PyTorch's bfloat16 softmax of short rows.
    precise = torch.promote_types(query.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=precise).to(query.dtype)
    if drops and rows is not None:
        probabilities = keyed_dropout(probabilities, dropout, rows, rows.streams[module], scores=True)
    found = (probabilities @ value).transpose(1, 2)
    return (found.contiguous() if read is None else unpack(found, read, len(found))), None


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    if not query.is_meta:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    # Of meta tensors PyTorch would take the products apart; these are the kernels that devices have for a mask.
    fused: Tensor
    if device_type(query) == "cpu":
        fused, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scaling
        )
        return fused
    bias = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
    fused, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scaling)
    return fused


def attention_mask(mask_function: Callable[..., Any], dtype: torch.dtype, **sizes: Any) -> Tensor | None:
    """Return what is added to the scores: 0 where a token may look, the dtype's lowest number elsewhere.

    `mask_function(row, head, query, key)` is the model's rule for places in a row (all, causal, a window). Packed rows
    `[N, 1, S, S]` keep it, and to themselves; padded rows get `transformers`' own mask, `[b, 1, s, s]`.
    """
    rows = current_rows()
    packing = None if rows is None else rows.packing
    if packing is None:
        return eager_mask(mask_function=mask_function, dtype=dtype, **sizes)
    row, place = packing.rows[:, None], packing.positions[:, None]
    own = row[..., :, None] == row[..., None, :]
    allowed = own & mask_function(row[..., :, None], row.new_zeros(()), place[..., :, None], place[..., None, :])
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def register_attention() -> None:
    """Make this attention known to `transformers` as `attn_implementation="peertune"`."""
    AttentionInterface.register("peertune", attention)
    AttentionMaskInterface.register("peertune", attention_mask)
