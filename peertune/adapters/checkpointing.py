"""Gradient checkpointing through sites: a layer keeps its input alone, and computes again in the backward pass.

PyTorch does the work; what it can't know is whose rows passed. The backward pass runs after the rows are unbound, on a
GPU in another thread, so each layer binds them again. Masks of dropout are hashed and come out the same, so results do
not change by a single bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peertune.adapters.rows import bound_rows, current_rows
from peertune.errors import ModelError


def checkpoint_layers(base: nn.Module, site_names: Iterable[str]) -> None:
    """Have the layers above the sites keep their inputs alone, in training.

    Layers are the members of the outermost module lists that hold sites. Raises ModelError where there are none.
    """
    lists = module_lists(base, site_names)
    if not lists:
        raise ModelError(
            f"training.gradient_checkpointing: {type(base).__name__} keeps its layers in no list; leave it out"
        )
    for layer in (layer for layers in lists for layer in layers):
        layer.forward = _checkpointed(layer.forward)


def module_lists(base: nn.Module, site_names: Iterable[str]) -> list[nn.ModuleList]:
    """Return the outermost module lists above the sites; a site beside them, as a pooler, is in none."""
    found: dict[nn.ModuleList, None] = {}
    for name in site_names:
        parents = [base.get_submodule(name[:end]) for end, mark in enumerate(name) if mark == "."]
        found |= dict.fromkeys([parent for parent in parents if isinstance(parent, nn.ModuleList)][:1])
    return list(found)


def _checkpointed(forward: Any) -> Any:
    def again(*args: Any, **kwargs: Any) -> Any:
        rows = current_rows()
        if rows is None or not rows.training or not torch.is_grad_enabled():
            return forward(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            with bound_rows(rows):
                return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again
