"""Many clients' adapters over one frozen base, in one pass.

A `Site` stands in for one frozen linear layer. The rows of all clients pass through the layer together; to each row the
site adds `scaling · (x Aᵀ) Bᵀ` with the factors of the row's own client. A row's loss therefore depends on its client's
factors only, and one backward pass of the summed losses gives every client its exact gradient.

Where the classification head is trained, a `Head` gives each row its client's whole layer in the same way.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import hypot

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peertune.adapters.checkpointing import checkpoint_layers
from peertune.adapters.dropout import KeyedDropout
from peertune.adapters.packing import pack_layers
from peertune.adapters.principal import Principal, take_out
from peertune.adapters.reading import Reading, find_reading
from peertune.adapters.rows import Rows, bound_rows, current_rows
from peertune.adapters.sites import Head, Site, put_together, read_alike, scaling
from peertune.errors import ModelError
from peertune.randomness import Draw, generator
from peertune.types import Batch, Tensors

Forward = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
"""`forward(base, inputs)` returns the base's logits, `[b, classes]` or `[1, T, vocabulary]`."""


def _logits(base: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = base(**inputs).logits
    return logits


@dataclass(frozen=True)
class StackedModel:
    """A frozen base with a stack of adapters on its sites; made by `attach`."""

    base: nn.Module
    sites: Mapping[str, Site]
    heads: Mapping[str, Head]  # the layers of a trained head; empty where it is frozen
    base_dropout: bool  # whether the base's own dropout is on in training
    packs: bool  # whether the base's layers take packed rows
    streams: Mapping[nn.Module, int]
    forward: Forward
    reading: Reading | None  # what is read of the last layer; None: it is computed whole
    taken: Tensors  # the factors that were taken out of the base, `<site>.A` and `<site>.B`, with which all begin
    # `<layer>.<part>.frozen [1, …]`, what one of several runs over the base has of it for itself
    frozen: Tensors = field(default_factory=dict)

    def __call__(self, adapters: Tensors, batch: Batch, *, training: bool) -> Tensor:
        """Run the base on a batch, each row with its own client's adapter.

        Returns logits, `[b, classes]`, or of a language model `[T, vocabulary]`, one line for each label.
        """
        if self.base.training != (training and self.base_dropout):  # it goes through all modules
            self.base.train(training and self.base_dropout)
        # What goes by client wins, and adapters stand first, since they say how many clients there are.
        rows = Rows(
            adapters | (self.frozen | adapters),
            batch.clients,
            batch.keys,
            training,
            self.streams,
            batch.packing,
            shared=batch.shared,
            places=batch.places,
            each=batch.each,
            last=None if self.reading is None else self.reading.of(batch.inputs),
        )
        with bound_rows(rows):
            logits = self.forward(self.base, batch.inputs)
        return logits if batch.places is None else logits.squeeze(0)


def attach(
    base: nn.Module,
    site_names: Iterable[str],
    *,
    r: int,
    lora_alpha: float,
    rank_at: Mapping[str, int] = {},
    alpha_at: Mapping[str, float] = {},
    use_rslora: bool = False,
    ranks: Sequence[int] = (),
    own_scaling: bool = False,
    lora_dropout: float = 0.0,
    head_names: Iterable[str] = (),
    frozen_names: Iterable[str] = (),
    base_dropout: bool = False,
    output_name: str | None = None,
    checkpointing: bool = False,
    forward: Forward | None = None,
    principal: Principal | None = None,
) -> StackedModel:
    """Put sites in the place of the named layers of `base`, which is changed and frozen.

    The update is scaled by `scaling(r, lora_alpha, use_rslora)`. `rank_at` and `alpha_at` have, by their names, the
    sites with another rank or alpha. Where clients' `ranks` differ, a site carries factors of all of these, and the
    scale is that of `r` for all, or with `own_scaling` of each rank. `head_names` are the linear layers of a head that
    each client trains for itself, `frozen_names` those of which each run has its own that nobody trains. The base's
    dropout modules are replaced by keyed ones. `output_name` is the layer from which a language model's logits come: it
    is spared the tokens of which none is wanted. With `checkpointing` the layers keep nothing but what goes in, and
    compute again in the backward pass. `forward` says how to get logits from a base that does not return them itself;
    rows of such a base are not packed. With `principal` the clients begin with a part of each layer, which is taken out
    of it.

    Raises ModelError for what a stack can't carry exactly: layers other than linear ones, a rank above a layer's,
    batch normalisation (rows of different clients would share statistics) and routed experts (rows lose their order).
    """
    _refuse_what_ties_rows(base)
    base.requires_grad_(False)
    if hasattr(base, "config"):
        base.config.use_cache = False  # type: ignore[union-attr]  # keys and values serve generation alone, which asks for them
    site_names = list(site_names)
    packs = forward is None and pack_layers(base, site_names)
    reading = find_reading(base, site_names) if forward is None and output_name is None else None
    modules = dict(base.named_modules())
    streams = {module: number for number, module in enumerate(modules.values())}
    sites: dict[str, Site] = {}
    taken: Tensors = {}
    for name in site_names:
        layer = modules[name]
        d_in, d_out = _sizes(name, layer)
        rank, most = max(ranks, default=rank_at.get(name, r)), min(d_in, d_out)
        if rank > most:
            key = "lora.rank_pattern" if name in rank_at else "lora.r"
            key = f"lora.ranks: client {ranks.index(rank)}'s rank" if ranks else key
            raise ModelError(f"{key}: {rank} is above the size of {name} ({d_in} in, {d_out} out); use at most {most}")
        alpha = alpha_at.get(name, lora_alpha)
        scale = scaling(r if ranks else rank, alpha, use_rslora)
        scales = {one: scaling(one, alpha, use_rslora) if own_scaling else scale for one in ranks or [rank]}
        sites[name] = Site(layer, name, rank, scales, lora_dropout, streams[layer])
        if principal is not None:
            parts = take_out(name, layer, rank, scale, principal)
            taken |= {f"{name}.{of}": x for of, x in zip("AB", parts, strict=True)}
    alike = read_alike(base, site_names, () if reading is None else reading.queries) if forward is None else []
    others = set(chain(*alike)).difference(head_names, frozen_names)
    beside = put_together(alike, sites, {name: modules[name] for name in others})
    copied: dict[str, Head] = {}
    for name, what in (dict.fromkeys(frozen_names, "frozen") | dict.fromkeys(head_names, "head")).items():
        layer = modules[name]
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"head: {name} is a {type(layer).__name__}; only linear layers can be trained, use head=frozen"
            )
        copied[name] = Head(layer, name, what)
    dropouts = {
        name: KeyedDropout(module.p, streams[module])
        for name, module in modules.items()
        if isinstance(module, nn.Dropout)
    }
    for name, module in (sites | beside | copied | dropouts).items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, module.train(base.training))
    if output_name is not None:
        base.get_submodule(output_name).register_forward_pre_hook(_wanted)
    if reading is not None:
        reading.install(base)
    if checkpointing:
        checkpoint_layers(base, site_names)
    heads = {name: head for name, head in copied.items() if head.kind == "head"}
    return StackedModel(base, sites, heads, base_dropout, packs, streams, forward or _logits, reading, taken)


def _refuse_what_ties_rows(base: nn.Module) -> None:
    for name, module in base.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"model: {name} normalises over the batch, so clients would see each other's rows; "
                "choose a model without batch normalisation"
            )
        if re.search(r"Experts?$|MoE|Moe[A-Z]|SparseMoe", type(module).__name__):
            raise ModelError(
                f"model: {type(module).__name__} routes tokens to experts, which a stack can't follow row by row; "
                "choose a dense model"
            )


def _wanted(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Keep of hidden states `[b, s, d]` those after which a label is to be predicted, `[1, T, d]`."""
    rows = current_rows()
    if rows is None or rows.places is None:
        return None
    return (args[0].flatten(0, 1)[rows.places][None],)


def _sizes(name: str, layer: nn.Module) -> tuple[int, int]:
    """Return `(d_in, d_out)` of a layer that can be a site."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):  # GPT-2's linear layer, whose weight lies transposed
        return layer.weight.shape[0], layer.weight.shape[1]
    raise ModelError(f"lora.target_modules: {name} is a {type(layer).__name__}; only linear layers can be sites")


def init_adapters(
    model: StackedModel, clients: int, seed: int, *, gaussian: bool = False, r: int | None = None
) -> Tensors:
    """Return the common start of all clients: A Kaiming-uniform as in PEFT (bound 1/√d_in), B = 0, the base's own head.

    With `gaussian` A is normal with standard deviation 1/r, as with PEFT's `init_lora_weights="gaussian"`.
    A's values depend on the seed and the site's name alone; clients of a lower rank `r` have its first rows. What was
    taken out of the base is the start where there is such. Factors are float32, or float64 over a float64 base. All
    clients share the memory: clone a start before training it in place.
    """
    weight = next(model.base.parameters())
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    adapters: Tensors = {}
    for name, site in model.sites.items():
        d_in, d_out = _sizes(name, site.layer)
        draw, shape, bound = generator(seed, Draw.ADAPTER.of(name)), (site.r, d_in), d_in**-0.5
        a = draw.normal(0.0, 1 / site.r, shape) if gaussian else draw.uniform(-bound, bound, shape)
        rank = site.r if r is None else r
        adapters[f"{name}.A"] = torch.from_numpy(a[:rank]).to(weight.device, dtype).expand(clients, -1, -1)
        b = torch.zeros(d_out, rank, dtype=dtype, device=weight.device)
        adapters[f"{name}.B"] = b.expand(clients, -1, -1)
    adapters |= {name: x.expand(clients, -1, -1) for name, x in model.taken.items()}
    for name, head in model.heads.items():
        for part, value in head.layer.named_parameters():
            own = value.detach().to(dtype, copy=True)  # the base may come to have another run's
            adapters[f"{name}.{part}.head"] = own.expand(clients, *value.shape)
    return adapters


def frozen_norms(model: StackedModel) -> dict[str, tuple[float, float]]:
    """Return the Frobenius norm of each frozen layer that carries a stack, by the site's name, and the site's scale.

    Of several scales it is the largest. Where the head is trained, so too by the names of its parts: the norm of the
    layer's parts together, and 1. Sums are in float64. A layer that keeps its weight in another form, as 4 bits, is
    asked what it does to unit vectors.
    """
    found = {name: (_layer_norm(site.layer), max(site.scalings.values())) for name, site in model.sites.items()}
    for name, head in model.heads.items():
        parts = dict(head.layer.named_parameters())
        found |= dict.fromkeys([f"{name}.{part}" for part in parts], (hypot(*map(_norm, parts.values())), 1.0))
    return found


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64))


@torch.no_grad()
def _layer_norm(layer: nn.Module) -> float:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if type(layer) in (nn.Linear, Conv1D) and weight.is_floating_point():
        return _norm(weight)
    d_in, _ = _sizes("", layer)
    dtype = next((x.dtype for x in layer.parameters() if x.is_floating_point()), torch.float32)
    zero = layer(torch.zeros(1, d_in, dtype=dtype, device=weight.device))
    unit = torch.eye(d_in, dtype=dtype, device=weight.device)
    return hypot(*(_norm(layer(some) - zero) for some in unit.split(512)))
