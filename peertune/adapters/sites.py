"""The modules that stand in for a base's linear layers: sites, which carry the clients' factors, and heads."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from peertune.adapters.dropout import keyed_dropout
from peertune.adapters.products import PLAIN, Part, products
from peertune.adapters.reading import example
from peertune.adapters.rows import Rows, bound_rows, current_rows


def scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """Return what `B A` of rank r is multiplied by, as in PEFT: `lora_alpha / r`, or with rsLoRA `lora_alpha / √r`.

    What is divided by r shrinks as r grows; what is divided by √r does not (arXiv 2312.03732).
    """
    return lora_alpha / (sqrt(r) if use_rslora else r)


class Site(nn.Module):
    """A frozen linear layer that carries a stack; without bound rows it is the layer alone.

    With r = 0 it carries none, and stands there since it reads what sites read. Clients whose ranks differ have at most
    r, and `scalings` has the scale of each rank; those of one pass have one rank.
    """

    def __init__(
        self, layer: nn.Module, name: str, r: int, scalings: Mapping[int, float], dropout: float, stream: int
    ) -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        self.r = r
        self.scalings = scalings
        self.dropout = dropout
        self.stream = stream
        self.together = Together([self])
        if r == 0:
            self.register_state_dict_post_hook(_under_its_own_name)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, s, d_in]`, packed `[N, S, d_in]`, or `[b, d_in]` → the same with d_out."""
        rows = current_rows()
        if rows is None:
            return self.layer(x)  # type: ignore[no-any-return]  # nn.Module's call is untyped
        return self.together.made(self, x, rows)

    def part(self, x: Tensor, rows: Rows) -> Part:
        """Return what is to be multiplied with for these rows."""
        if self.r == 0:
            return Part(self.layer)
        drops = rows.training and self.dropout > 0
        dropped = keyed_dropout(x, self.dropout, rows, self.stream) if drops else None
        A, B = (rows.adapters[f"{self.name}.{factor}"] for factor in "AB")
        return Part(self.layer, self.scalings[A.shape[1]], A, B, dropped)


def _under_its_own_name(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    """Name the weights of a layer without factors as if nothing stood there: peers compare bases by these names."""
    inside = f"{prefix}layer."
    for name in [name for name in state if name.startswith(inside)]:
        state[prefix + name.removeprefix(inside)] = state.pop(name)


class Together:
    """Sites, and layers beside them with r = 0, that read one input: the first to be called makes what all do of it."""

    def __init__(self, members: Sequence[Site]) -> None:
        self.members = members
        for member in members:
            member.together = self

    def made(self, member: Site, x: Tensor, rows: Rows) -> Tensor:
        """Return what a member makes of `x`."""
        read, made = rows.made.pop(self, (None, {}))
        if read is not x or member not in made:
            each = rows.of_each(x)
            parts = [one.part(x, rows) for one in self.members]
            own = None if each else rows.own_columns(x, max(part.r for part in parts))
            found = products(x, own, parts, each)
            made = dict(zip(self.members, found, strict=True))
        y: Tensor = made.pop(member)
        if made:
            rows.made[self] = x, made
        return y


class Head(nn.Module):
    """A linear layer of which every client has a copy of its own; without bound rows it is the layer alone.

    Copies are tensors of the `kind`: `head`, which are trained, or `frozen`, which are not.
    """

    def __init__(self, layer: nn.Linear, name: str, kind: str) -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, …, d_in]` → `[b, …, d_out]`."""
        rows = current_rows()
        if rows is None:
            return self.layer(x)  # type: ignore[no-any-return]  # nn.Module's call is untyped
        clients = rows.clients_of(x)
        weight = rows.adapters[f"{self.name}.weight.{self.kind}"].to(x.dtype)  # [K, d_out, d_in]
        y = x.flatten(0, -2) @ weight.flatten(0, 1).T
        if self.layer.bias is not None:
            y = y + rows.adapters[f"{self.name}.bias.{self.kind}"].to(x.dtype).flatten()
        y = y.view(len(y), *weight.shape[:2])[torch.arange(len(y), device=y.device), clients]
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def read_alike(base: Any, site_names: Iterable[str], apart: Collection[str] = ()) -> list[list[str]]:
    """Return the names of the linear layers that read one input, where some of them are to be sites.

    It is found out by a pass. Layers that pass more than once, and those `apart`, are in none.
    """
    seen, training = list[tuple[str, Tensor]](), base.training
    base.eval()
    layers = {name: layer for name, layer in base.named_modules() if type(layer) in PLAIN and name not in apart}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
        for name, layer in layers.items()
    ]
    try:
        with bound_rows(None):
            base(**example(base))
    except Exception:  # whatever a model stumbles over that wants other inputs
        return []
    finally:
        base.train(training)
        for hook in hooks:
            hook.remove()
    names, called = set(site_names), [name for name, _ in seen]
    alike: dict[int, list[str]] = {}
    for name, x in seen:
        alike.setdefault(id(x), []).append(name)
    found = [group for group in alike.values() if len(group) > 1 and all(called.count(name) == 1 for name in group)]
    return [group for group in found if not names.isdisjoint(group)]


def put_together(
    alike: Iterable[Sequence[str]], sites: Mapping[str, Site], layers: Mapping[str, nn.Module]
) -> dict[str, Site]:
    """Put sites together with those of these `layers` that read what they read; return what is to stand for the others.

    `alike` are the names of each group. Sites of different ranks are apart, since they share no columns.
    """
    beside = {name: Site(layer, name, 0, {}, 0.0, 0) for name, layer in layers.items() if name not in sites}
    for names in alike:
        members = [site for name in names if (site := sites.get(name) or beside.get(name)) is not None]
        largest = max(one.r for one in members)
        for r in {one.r or largest for one in members}:
            Together([one for one in members if (one.r or largest) == r])
    return beside
