"""Rows packed into blocks for the length of the base's layers.

A base gets padded rows and gives answers for padded rows. In between, nearly all that it does it does token by token,
so hooks pack the tokens of several rows into each block before the first of its layers and put them back after the
last; attention keeps to a row by its mask (see `attention.py`). Blocks have one size, so shapes recur from step to
step, which matters on CPUs: PyTorch prepares each shape of a bfloat16 product once, at the cost of the product itself.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peertune.adapters.checkpointing import module_lists
from peertune.adapters.rows import Rows, bound_rows, current_rows
from peertune.types import Packing

log = logging.getLogger(__name__)


def pack(x: Tensor, packing: Packing) -> Tensor:
    """Lay padded rows `x [b, s, …]` in blocks, `[N, S, …]`; empty slots are 0."""
    return _move(x, packing.tokens, packing.slots, packing.rows.shape)


def unpack(x: Tensor, packing: Packing, rows: int) -> Tensor:
    """Lay blocks `x [N, S, …]` out as padded rows, `[b, s, …]`; padding is 0."""
    return _move(x, packing.slots, packing.tokens, (rows, packing.width))


def _move(x: Tensor, source: Tensor, target: Tensor, shape: Iterable[int]) -> Tensor:
    whole = x.new_zeros((*shape, *x.shape[2:]))
    return whole.flatten(0, 1).index_copy(0, target, x.flatten(0, 1).index_select(0, source)).view(whole.shape)


def pack_layers(base: nn.Module, site_names: Iterable[str]) -> bool:
    """Make the layers of a text model pack the rows of batches that bring a packing, and say whether they now do.

    The layers are the one module list that holds sites; a site beside it, as a pooler, gets padded rows. A
    model that mixes tokens by other means than the registered
    attention would mix rows: before anything is trusted, three rows pass through the base padded, packed, and packed
    with one of them changed. The first two must agree, and the change must not reach the other rows by a single bit;
    with padding, and with rows of one length, where a model may leave its mask out.
    """
    lists = module_lists(base, site_names)
    layers = lists[0] if len(lists) == 1 else None
    if layers is None or getattr(base, "main_input_name", None) != "input_ids":
        return False
    hooks = [layer.register_forward_pre_hook(_pack_arguments, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(_unpack_result))
    planned = next(base.parameters()).is_meta  # shapes alone are looked at, and one set of rows has them
    lengths = [(5, 3, 4)] if planned else [(5, 3, 4), (4, 4, 4)]
    if all(_keeps_rows_apart(base, layers, of) for of in lengths):
        return True
    log.info("rows are padded and not packed: %s mixes tokens in ways of its own", type(base).__name__)
    for hook in hooks:
        hook.remove()
    return False


def _pack_arguments(_: nn.Module, args: Any, kwargs: Any) -> Any:
    rows = current_rows()
    return _packed((args, kwargs), rows) if rows is not None and rows.packing is not None else None


def _packed(x: Any, rows: Rows) -> Any:
    """Pack whatever has a value for each token: hidden states, and positions in any form, which rows may share."""
    packing = rows.packing
    assert packing is not None, "only called for packed rows"
    match x:
        case Tensor() if 2 <= x.dim() <= 3 and x.shape[1] == packing.width and len(x) in (1, len(rows.clients)):
            return pack(x.expand(len(rows.clients), *x.shape[1:]), packing)
        case tuple():
            return tuple(_packed(part, rows) for part in x)
        case dict():
            return {name: _packed(part, rows) for name, part in x.items()}
        case _:
            return x


def _unpack_result(_: nn.Module, args: Any, result: Any) -> Any:
    rows = current_rows()
    if rows is None or rows.packing is None:
        return None
    if isinstance(result, tuple):
        return (unpack(result[0], rows.packing, len(rows.clients)), *result[1:])
    return unpack(result, rows.packing, len(rows.clients))


@torch.no_grad()
def _keeps_rows_apart(base: nn.Module, layers: nn.ModuleList, lengths: tuple[int, int, int]) -> bool:
    device, width = next(base.parameters()).device, max(lengths)
    row = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    rows, positions = torch.full((2, 8), -1), torch.zeros(2, 8, dtype=torch.int64)
    rows.view(-1)[: len(row)], positions.view(-1)[: len(row)] = row, position  # the first two rows fill the first block
    starts, seats = torch.tensor([0, lengths[0], 8]), torch.arange(3)
    packing = Packing(torch.arange(len(row)), row * width + position, rows, positions, width, starts, seats, 2)
    packing = packing.to(device)
    real = torch.zeros(3, width, dtype=torch.bool, device=device)
    real.view(-1)[packing.tokens] = True
    zeros = torch.zeros(3, dtype=torch.int64, device=device)

    def run(ids: Tensor, packing: Packing | None) -> Tensor:
        seen: list[Tensor] = []
        hook = layers[-1].register_forward_hook(lambda _, __, x: seen.append(x[0] if isinstance(x, tuple) else x))
        try:
            with bound_rows(Rows({}, zeros, zeros, False, {}, packing)):
                base(input_ids=ids, attention_mask=real.long())
        finally:
            hook.remove()
        return seen[0]

    training = base.training
    base.eval()
    try:
        words = base.get_input_embeddings().num_embeddings - 1  # type: ignore[operator]  # what transformers models have
        ids = torch.arange(3 * width, device=device).view(3, width) * 37 % words
        other = ids.clone()
        other[1] = (other[1] + 1) % words
        padded, packed = run(ids, None), run(ids, packing)
        if packed.is_meta:  # a plan: there are shapes, and nothing that could mix
            return packed.shape == padded.shape
        changed = run(other, packing)
    except Exception:  # whatever a model stumbles over that can't take blocks
        return False
    finally:
        base.train(training)
    if not padded.shape == packed.shape == changed.shape:
        return False
    alike = torch.finfo(padded.dtype).eps ** 0.5 * padded[real].norm()
    apart = torch.equal(packed[[0, 2]][real[[0, 2]]], changed[[0, 2]][real[[0, 2]]])
    return bool((packed - padded)[real].norm() < alike and apart and not torch.equal(packed[1], changed[1]))
