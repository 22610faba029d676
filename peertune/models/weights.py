"""Which weights a base has, in a few characters: what a number depends on most."""

from collections.abc import Collection, Mapping
from hashlib import sha256

import torch
from torch import Tensor

from peertune.errors import ModelError


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors, each with its name, its shape and its values, in 16 characters.

    Values count as they are in bfloat16, so that a base has one digest in whatever precision it is held.
    """
    made = sha256()
    for name, x in sorted(tensors.items()):
        made.update(f"{name} {list(x.shape)}".encode())
        rounded = x.to(torch.bfloat16) if x.is_floating_point() else x
        made.update(rounded.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data if x.numel() else b"")
    return made.hexdigest()[:16]


def digests(
    state: Mapping[str, Tensor], head: Collection[str], drawn: Collection[str] = (), form: str = "body"
) -> dict[str, str]:
    """Return the digests of what a checkpoint brought: of its `head`, where it has one, and of all else, its body.

    Args:
        state: a model's state dict.
        head: the modules of its head.
        drawn: what of `state` was drawn from the seed, which belongs to no checkpoint.
        form: the body's name. One that is held in 4 bits has another than the same in plain numbers.
    """
    inside = tuple(f"{root}." for root in head)
    own = {name: x for name, x in state.items() if name.startswith(inside)}
    found = {form: digest({name: x for name, x in state.items() if name not in own})}
    brought = {name: x for name, x in own.items() if name not in drawn}
    return found | ({"head": digest(brought)} if brought else {})


def check_weights(name: str, now: Mapping[str, str], was: Mapping[str, str]) -> None:
    """Raise ModelError where the weights of the base `name` are others than a run was made with.

    Compared are the `digests` that both have: what a run of an earlier version does not say is not known.
    """
    differ = [part for part in now if part in was and was[part] != now[part]]
    if differ:
        (part, *_) = differ
        raise ModelError(
            f"model.name: the weights of {name} are no longer those that the run began with (digest of the {part} "
            f"{now[part]}, then {was[part]}); put those back, or start a new run"
        )
