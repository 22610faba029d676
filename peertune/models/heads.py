"""Classification heads: what a base has of one, and whether it tells apart what the task does."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peertune.randomness import Draw, generator

log = logging.getLogger(__name__)


def head_config(classes: Sequence[str]) -> dict[str, Any]:
    """Return what a config says of a head that tells these classes apart, by number; of a regression's without any."""
    names = list(classes) or ["LABEL_0"]  # as transformers calls a single output
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification" if classes else "regression",
    }


def backbone(model: nn.Module) -> str:
    """Return the child that makes the hidden states: the one that the model names, or else the largest."""
    sizes = _sizes(model)
    prefix = str(model.base_model_prefix)
    return prefix if prefix in sizes else max(sizes, key=sizes.__getitem__)  # CLIP has no child of its prefix


def head_roots(model: nn.Module) -> tuple[str, ...]:
    """Return the children with parameters that are not the backbone."""
    own = backbone(model)
    return tuple(name for name, size in _sizes(model).items() if size and name != own)


def _sizes(model: nn.Module) -> dict[str, int]:
    return {name: sum(x.numel() for x in child.parameters()) for name, child in model.named_children()}


def seed_parameters(model: nn.Module, parameters: Mapping[str, Tensor], seed: int) -> None:
    """Draw these of a model's parameters from the seed: weights normal with its `initializer_range`, biases zero."""
    std = getattr(model.config, "initializer_range", 0.02)
    for name, parameter in parameters.items():
        if parameter.dim() > 1:
            value = generator(seed, Draw.HEAD.of(name)).normal(0.0, std, tuple(parameter.shape))
        else:
            value = np.full(tuple(parameter.shape), 0.0 if name.endswith("bias") else 1.0)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value))


def order(own: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Return for each class which of a head's `own` outputs is called so; None where not all names agree.

    Case, spaces and the like count only where names differ in nothing else, and `LABEL_1` is `1`.
    """
    for spelt in (str, _plain):
        there, wanted = [spelt(name) for name in own], [spelt(name) for name in classes]
        if sorted(there) == sorted(wanted) and len(set(there)) == len(there):
            return [there.index(name) for name in wanted]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", re.sub(r"^LABEL_(?=\d+$)", "", str(name)).casefold())


def put_in_order(name: str, model: nn.Module, wider: nn.Module, own: Sequence[str], classes: Sequence[str]) -> None:
    """Bring the outputs of a checkpoint's head in the order of the task's classes, **in place**, and say what was done.

    `own` is what the checkpoint calls the outputs. `wider` is the model for one class more, without weights: its shapes
    tell which parameters of the head have a row for each. Where the names don't agree, outputs are taken in the order
    that they have, with a warning.
    """
    found = order(own, classes)
    called = ", ".join(map(str, own[:5])) + (", …" if len(own) > 5 else "")
    wanted = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
    if found is None:
        log.warning(
            f"model.name: {name}: the outputs of its head are called {called}, and are taken for the classes {wanted} "
            "in this order; if that is wrong, give a copy whose config.json names them so (id2label)"
        )
        return
    if found == list(range(len(found))):
        if list(own) != list(classes):
            log.info(f"model.name: {name}: the outputs of its head, {called}, are the classes {wanted}")
        return
    log.warning(
        f"model.name: {name}: the outputs of its head, {called}, are put in the order of the task's classes, {wanted}"
    )
    roots, shapes = head_roots(model), {key: x.shape for key, x in wider.named_parameters()}
    for key, x in model.named_parameters():
        if key.partition(".")[0] in roots and x.shape != shapes[key]:
            with torch.no_grad():
                x.copy_(x[found])
