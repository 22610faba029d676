"""What nobody reads is not computed: the last layer works on the one token of each row that the head reads.

A classifier reads a row's first token, or its last. The last layer's attention needs the keys and values of all tokens;
its queries, and all that follows, are for that token only. Hooks hand the layer the tokens that are read, `[N, m, d]`
of `[N, S, d]`, hand its attention all of them, and lay what comes out in its place, with zeros elsewhere. Which token
is read, and whether a layer can be treated so, is found out on loading: three rows pass whole and pruned, and the
logits must agree. A base of which that isn't true is computed whole.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from peertune.adapters.checkpointing import module_lists
from peertune.adapters.packing import pack, unpack
from peertune.adapters.rows import LastLayer, Rows, bound_rows, current_rows
from peertune.types import Packing


class Reading(NamedTuple):
    """What is read of a base's last layer; modules by name."""

    token: Literal["first", "last"]  # of each row; the last is the last that isn't padding
    pad: int | None  # what a classifier takes for padding
    layer: str
    attention: str  # the module in the layer that attends
    norm: str | None  # what stands between the layer's input and the attention's; None: nothing
    queries: tuple[str, ...]  # linear layers before the attention of which only the tokens that are read matter
    after: tuple[str, ...]  # linear layers in the attention's module after it

    def of(self, inputs: Mapping[str, Tensor]) -> LastLayer:
        """Return which tokens of the rows with these inputs are read, one of each."""
        if self.token == "first":
            first = next(iter(inputs.values()))
            return LastLayer(torch.zeros(len(first), dtype=torch.int64, device=first.device))
        ids = inputs["input_ids"]  # by the same rule as in transformers' classifiers
        return LastLayer((torch.arange(ids.shape[1], device=ids.device) * (ids != self.pad)).argmax(-1))

    def install(self, base: nn.Module) -> list[RemovableHandle]:
        """Put hooks on the modules that have these names; they do nothing for rows that are bound without `of`."""
        layer, attention = base.get_submodule(self.layer), base.get_submodule(self.attention)
        norm = None if self.norm is None else base.get_submodule(self.norm)
        hooks = [
            layer.register_forward_pre_hook(_enter, with_kwargs=True),
            layer.register_forward_hook(lambda _, __, x: _of_result(_laid_back, x), prepend=True),  # then it's unpacked
            attention.register_forward_pre_hook(_see_all(norm), with_kwargs=True),
            attention.register_forward_hook(lambda _, __, x: _of_result(_kept, x)),
        ]
        passing = [base.get_submodule(name) for name in (*self.queries, *self.after)]
        hooks += [module.register_forward_pre_hook(lambda _, args: (_kept(args[0]),)) for module in passing]
        hooks += [module.register_forward_hook(_lay_back) for module in passing[: len(self.queries)]]
        return hooks


def find_reading(base: Any, site_names: Iterable[str]) -> Reading | None:
    """Return what is read of a classifier's last layer, or None where it must be computed whole.

    Of a base without weights, in a plan, all is believed but its structure.
    """
    lists, training = module_lists(base, site_names), base.training
    base.eval()
    try:
        return _probe(base, lists[0][-1], example(base)) if len(lists) == 1 else None
    except Exception:  # whatever a model stumbles over that can't be treated so
        return None
    finally:
        base.train(training)


def example(base: Any) -> dict[str, Tensor]:
    """Return three rows as the base takes them. Raises whatever a base raises that isn't like those of transformers."""
    weight, taken = next(base.parameters()), getattr(base, "main_input_name", None)
    if taken == "input_ids":
        words, pad = base.get_input_embeddings().num_embeddings - 1, _padding(base)
        real = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
        ids = torch.where(real, torch.arange(15).view(3, 5) * 37 % words, 0 if pad is None else pad)
        return {"input_ids": ids.to(weight.device), "attention_mask": real.long().to(weight.device)}
    size: int = base.config.image_size
    shape = torch.Size((3, getattr(base.config, "num_channels", 3), size, size))
    pixels = torch.arange(shape.numel()) * 37 % 101 / 50 - 1
    return {"pixel_values": pixels.view(shape).to(weight.device, weight.dtype)}


def _padding(base: Any) -> int | None:
    pad: int | None = getattr(base.config.get_text_config(), "pad_token_id", None)
    return pad


Seen = list[tuple[nn.Module, Any, Any]]
"""Module, input and result of each call; where a module attends, it and None twice."""


@torch.no_grad()
def _probe(base: Any, layer: nn.Module, inputs: dict[str, Tensor]) -> Reading | None:
    zeros, seen = torch.zeros(3, dtype=torch.int64, device=next(iter(inputs.values())).device), Seen()

    def run(last: LastLayer | None, watch: Seen | None = None) -> Tensor:
        with bound_rows(Rows({}, zeros, zeros, False, {}, last=last, watch=watch)):
            logits: Tensor = base(**inputs).logits
        return logits

    def agrees(reading: Reading) -> bool:
        hooks = reading.install(base)
        try:
            pruned = run(reading.of(inputs))
        finally:
            for hook in hooks:
                hook.remove()
        if whole.is_meta:
            return True
        return bool((pruned - whole).norm() < torch.finfo(whole.dtype).eps ** 0.5 * whole.norm())

    def note(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        seen.append((module, _hidden(args, kwargs), result))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in layer.modules()]
    try:
        whole = run(None, seen)
    finally:
        for hook in hooks:
            hook.remove()
    found = _structure(base, layer, seen)
    for token in ("first", "last"):
        reading = None if found is None else found._replace(token=token)
        if reading is not None and agrees(reading):
            further = reading._replace(queries=_queries(base, seen, reading))
            return further if agrees(further) else reading
    return None


def _structure(base: Any, layer: nn.Module, seen: Seen) -> Reading | None:
    """Read off what passed through a layer's modules which of them attends, and what stands before it."""
    names, inside = {module: name for name, module in base.named_modules()}, set(layer.modules())
    attending = [module for module, x, _ in seen if x is None and module in inside]
    entered = [x for module, x, _ in seen if module is layer]
    if len(attending) != 1 or len(entered) != 1:
        return None
    (told,) = (x for module, x, _ in seen if module is attending[0] and x is not None)
    norms = [module for module, x, result in seen if result is told and x is entered[0]]
    if told is not entered[0] and not norms:
        return None
    norm = None if told is entered[0] else names[norms[0]]
    attention = names[attending[0]]
    after = _linear_layers(names, seen, attention, before=False)
    return Reading("first", _padding(base), names[layer], attention, norm, (), after)


def _queries(base: Any, seen: Seen, reading: Reading) -> tuple[str, ...]:
    """Return the layer that may make the queries: of three linear layers before the attention the first."""
    names = {module: name for name, module in base.named_modules()}
    before = _linear_layers(names, seen, reading.attention, before=True)
    return before[:1] if len(before) == 3 else ()


def _linear_layers(names: Mapping[nn.Module, str], seen: Seen, attention: str, *, before: bool) -> tuple[str, ...]:
    """Return the linear layers in a module through which something passed before it attended, or after."""
    (turn,) = (place for place, (module, x, _) in enumerate(seen) if x is None and names[module] == attention)
    some = seen[:turn] if before else seen[turn:]
    found = (names[module] for module, x, _ in some if x is not None and isinstance(module, nn.Linear | Conv1D))
    return tuple(name for name in found if name.startswith(f"{attention}."))


def _hidden(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _with_hidden(args: Any, kwargs: Any, x: Tensor) -> Any:
    return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})


def _of_result(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    return (change(x[0]), *x[1:]) if isinstance(x, tuple) else change(x)


def _read() -> Packing | None:
    """Return where the tokens that are read lie among all that entered the last layer, where it is pruned."""
    rows = current_rows()
    return None if rows is None or rows.last is None else rows.last.read


def _enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
    rows = current_rows()
    if rows is None or rows.last is None:
        return None
    x = _hidden(args, kwargs)
    rows.last.whole, rows.last.read = x, _lay_out(rows.last.position, rows.packing, *x.shape[:2])
    return None if rows.last.read is None else _with_hidden(args, kwargs, pack(x, rows.last.read))


def _see_all(norm: nn.Module | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        rows = current_rows()
        if rows is None or rows.last is None or rows.last.read is None:
            return None
        rows.last.attention, whole = module, rows.last.whole
        assert whole is not None, "the layer was entered"
        return _with_hidden(args, kwargs, whole if norm is None else norm(whole))

    return hook


def _kept(x: Tensor) -> Tensor:
    """Keep of all tokens those that are read; of these, all."""
    read = _read()
    return x if read is None or x.shape[1] != read.width else pack(x, read)


def _laid_back(x: Tensor) -> Tensor:
    """Lay the tokens that are read among all of them; the others are 0."""
    read = _read()
    return x if read is None else unpack(x, read, len(x))


def _lay_back(_: nn.Module, args: Any, x: Tensor) -> Tensor:
    return _laid_back(x)


def _lay_out(position: Tensor, packing: Packing | None, blocks: int, size: int) -> Packing | None:
    """Return where the tokens that are read lie, `[N, m]` of `[N, S]`; None where they are half of them or more."""
    row = torch.arange(len(position), device=position.device)
    most, seats, starts = (1, row, row * size) if packing is None else (packing.most, packing.seats, packing.starts)
    if 2 * most > size:
        return None
    rows, positions = row.new_full((blocks * most,), -1), row.new_zeros(blocks * most)
    rows[seats], positions[seats] = row, position
    rows, positions = rows.view(blocks, most), positions.view(blocks, most)
    return Packing(seats, starts + position, rows, positions, size, seats, seats, most)
