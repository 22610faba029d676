"""Local training and evaluation of a stack: the only place, beside the network, where values change in place."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peertune.adapters.stacked import StackedModel
from peertune.errors import DivergedError, ModelError
from peertune.method import At, Local, Memory, Phase
from peertune.rounds import deadline
from peertune.types import Batch, State, Tensors, kind, norms, over_clients, select

Rates = Mapping[str, float | Tensor]
"""Kind → learning rate, for all clients or for each, `[K]`."""


class Optimizer(NamedTuple):
    """An optimiser over stacks, as two functions.

    `init(adapters)` makes the moments, each `[K, …]`; zeros are shared by all clients until the state is cloned.
    `update(params, grads, moments, rates)` steps `params` and `moments` in place: the parameters that have a gradient,
    each client by its own count of steps, each kind at its own rate.
    """

    init: Callable[[Tensors], Tensors]
    update: Callable[[Tensors, Tensors, Tensors, Rates], None]


class Trained(NamedTuple):
    """What a round's local steps have come to so far."""

    steps: int
    losses: Tensor  # [K], the sum over the steps
    grad_norms: Tensor  # [K], likewise, before clipping
    start: Tensors  # [K, …], what the round began with, where the method asks for it
    memory: Memory  # what has changed of what the method remembers, in the last call

    @property
    def loss(self) -> Tensor:
        """The mean over the steps, `[K]`."""
        return self.losses / max(1, self.steps)

    @property
    def grad_norm(self) -> Tensor:
        """The mean over the steps, `[K]`."""
        return self.grad_norms / max(1, self.steps)


@dataclass(frozen=True)
class Optim:
    """How the clients' factors are stepped; one for all clients."""

    optimizer: Optimizer
    rates: Callable[[int], Rates]  # at a step counted from the run's start
    max_grad_norm: float  # each client's gradient is clipped to this norm; 0 leaves it
    reset: Literal["never", "round", "phase"]  # when moments start afresh
    smoothing: float = 0.0  # of labels, in training


def _zeros_like(x: Tensor) -> Tensor:
    """Zeros that take no memory until they are cloned, since all clients share them."""
    return x.new_zeros((1, *x.shape[1:])).expand(x.shape)


def _descend(x: Tensor, step: Tensor, rate: float | Tensor) -> None:
    """Step `x [K, …]` down, in place, at its client's rate."""
    if isinstance(rate, Tensor):
        x.sub_(step * over_clients(rate, x).to(x.dtype))
    else:
        x.sub_(step, alpha=_in_range(rate, x))


def _in_range(factor: float, x: Tensor) -> float:
    """Return a factor as `x`'s dtype has it, infinite where it is beyond: PyTorch raises for that, and not for inf."""
    return factor if factor <= torch.finfo(x.dtype).max else inf


TOGETHER = 32
"""Tensors that are stepped by one call. A call for each would cost more than its arithmetic where they are small."""


def adamw(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.0) -> Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), equal to `torch.optim.AdamW` for each client.

    Moments are `<name>.m` and `<name>.v [K, …]`, and `steps.<kind> [K]`: A and B are stepped in different phases, so
    each kind counts its own steps.
    """

    def init(adapters: Tensors) -> Tensors:
        moments = {f"{name}.{part}": _zeros_like(x) for name, x in adapters.items() for part in ("m", "v")}
        for name, x in adapters.items():
            moments[f"steps.{kind(name)}"] = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return moments

    def unbias(beta: float, names: list[str], xs: list[Tensor], moments: Tensors) -> list[Tensor]:
        """Return for each tensor `1 - beta^t` by each client's number of steps t."""
        by = {what: 1 - beta ** moments[f"steps.{what}"].double() for what in set(map(kind, names))}
        by = {what: x.to(xs[0].dtype) for what, x in by.items()}
        return [over_clients(by[kind(name)], x) for name, x in zip(names, xs, strict=True)]

    def update(params: Tensors, grads: Tensors, moments: Tensors, rates: Rates) -> None:
        for what in {kind(name) for name in grads}:
            moments[f"steps.{what}"] += 1
        names = list(grads)
        for start in range(0, len(names), TOGETHER):
            step(params, {name: grads[name] for name in names[start : start + TOGETHER]}, moments, rates)

    def step(params: Tensors, grads: Tensors, moments: Tensors, rates: Rates) -> None:
        names, slopes = list(grads), list(grads.values())
        xs = [params[name] for name in names]
        ms, vs = ([moments[f"{name}.{part}"] for name in names] for part in "mv")
        torch._foreach_lerp_(ms, slopes, 1 - beta1)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, slopes, slopes, value=1 - beta2)
        denominators = torch._foreach_div(vs, unbias(beta2, names, xs, moments))
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, epsilon)
        moves = torch._foreach_div(ms, unbias(beta1, names, xs, moments))
        torch._foreach_div_(moves, denominators)
        for name, x, move in zip(names, xs, moves, strict=True):
            rate = rates[kind(name)]
            if weight_decay:
                decay = 1 - rate * weight_decay
                x.mul_(over_clients(decay, x).to(x.dtype) if isinstance(decay, Tensor) else decay)
            _descend(x, move, rate)

    return Optimizer(init, update)


def sgd(momentum: float = 0.0, weight_decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent, equal to `torch.optim.SGD` for each client; moments are `<name>.m [K, …]`."""

    def init(adapters: Tensors) -> Tensors:
        return {f"{name}.m": _zeros_like(x) for name, x in adapters.items()} if momentum else {}

    def update(params: Tensors, grads: Tensors, moments: Tensors, rates: Rates) -> None:
        for name, grad in grads.items():
            step = grad.add(params[name], alpha=_in_range(weight_decay, grad))
            if momentum:
                step = moments[f"{name}.m"].mul_(momentum).add_(step)
            _descend(params[name], step, rates[kind(name)])

    return Optimizer(init, update)


def learning_rate(
    kind: Literal["constant", "linear", "cosine", "cosine_with_min_lr"],
    peak: float,
    warmup: int,
    steps: int,
    least: float = 0.0,
) -> Callable[[int], float]:
    """Return the rate at each step: a linear rise over `warmup` steps, then constant, or falling to 0 at `steps`.

    With `cosine_with_min_lr` it falls to `least`. The same shapes as in Hugging Face's `get_scheduler`.
    """

    def rate(step: int) -> float:
        if step < warmup:
            return peak * step / warmup
        share = (step - warmup) / max(1, steps - warmup)
        match kind:
            case "constant":
                return peak
            case "linear":
                return peak * max(0.0, 1 - share)
            case "cosine" | "cosine_with_min_lr":
                return least + (peak - least) * float(0.5 * (1 + np.cos(np.pi * min(1.0, share))))

    return rate


def row_losses(logits: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Return each row's loss `[b]`: cross-entropy over classes, or squared error from targets that are no classes.

    Of a language model it is the sum over the row's labels of their cross-entropy. With `smoothing` a label is its own
    class but for this share, which goes to all classes alike.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if batch.labels.is_floating_point():
        return (logits.squeeze(-1) - batch.labels) ** 2
    losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=smoothing)
    return losses if batch.places is None else _row_sums(losses, batch)


def _row_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sum `[T]`, a value for each label of a language model, by row, `[b]`."""
    assert batch.places is not None, "a language model's batch says where its labels are predicted"
    width = batch.inputs["input_ids"].shape[1]
    return values.new_zeros(len(batch.clients)).index_add(0, batch.places // width, values)


Read = Callable[[Tensor, Batch], Tensor]
"""What is read from logits in evaluation: `(logits, batch) → [b, …]`."""


def predictions(logits: Tensor, batch: Batch) -> Tensor:
    """Return the likeliest class of each row, or the value of a regression."""
    return logits.squeeze(-1).double() if batch.labels.is_floating_point() else logits.argmax(-1)


def probabilities(logits: Tensor, batch: Batch) -> Tensor:
    """Return the probability of each class for each row, `[b, classes]` in float64."""
    return logits.double().softmax(-1)


def hits(logits: Tensor, batch: Batch) -> Tensor:
    """Return for each row how many of its labels a language model holds for the likeliest token."""
    return _row_sums((logits.argmax(-1) == batch.labels).double(), batch)


def train_local(
    model: StackedModel,
    state: State,
    steps: Iterable[list[Batch]],
    phase: Phase,
    optim: Optim,
    at: At,
    local: Local = Local(),  # noqa: B008  # which can't be changed
    frozen: Mapping[str, Tensor] = MappingProxyType({}),
    before: Trained | None = None,
    reached: Tensor | None = None,
    *,
    ends: bool = True,
) -> Trained:
    """Train the phase's kinds on each client's own rows, **in place**: gradients, `local`, clip, step.

    `steps` yields the micro-batches of one local step after the other; their gradients add up, so how the rows are cut
    changes nothing. The K clients stand each `at` a step of its own. Kinds that the phase does not train get no
    gradient and stay bit for bit. Adapters and moments are stepped where they lie: a copy of thousands of
    them would double what they take. What `local` remembers is returned. `frozen [K, …]` is what each client has of the
    base for itself: as `StackedModel.frozen`. A round's steps may be made in several calls, to the same bits: each is
    told what those `before` came to, and only with the last the round's training `ends`. Of a round that has a deadline
    `reached [K, S]` says how many of the last sites each step reaches, as in `peertune.rounds.deadline`.

    Raises ModelError where the base drew from PyTorch's global generator: its result would depend on history; and
    DivergedError where a loss or an adapter is not finite. Where the phase trains nothing, no step is made.
    """
    steps = steps if phase.train else ()
    adapters, memory = state.adapters, state.known
    trained = select(adapters, phase.train)
    if before is None:
        start = {name: x.clone() for name, x in trained.items()} if local.keeps_start else {}
        first = next(iter(adapters.values()))
        totals, lengths = torch.zeros(2, len(first), dtype=torch.float64, device=first.device)
        count = 0
    else:
        count, start = before.steps, before.start
        totals, lengths = before.losses.clone(), before.grad_norms.clone()
    begun = None if reached is None else deadline.begun(reached).to(totals.device)
    global_draws, changed = _generator_state(totals.device), dict[str, Tensor]()
    for batches in steps:
        count += 1
        gradient = BatchGradient(model, batches, phase.train, optim.smoothing, frozen)
        grads, new = local.gradients(gradient, adapters, start, memory, at, phase)
        changed |= new
        memory |= new
        late = {} if reached is None else deadline.rows_without(adapters, reached[:, count - 1])
        for name in grads.keys() & late.keys():
            grads[name][late[name].to(totals.device)] = 0
        loss, length = gradient.loss, clip(grads, optim.max_grad_norm) if grads else 0
        with deadline.kept(state, late):
            optim.optimizer.update(adapters, grads, state.moments, _rates_at(optim, at.step, totals.device))
        if begun is not None:
            loss, length = loss * begun[:, count - 1], length * begun[:, count - 1]
        totals += loss
        lengths += length
        at = at._replace(step=at.step + 1)
        del gradient, grads
    if not torch.equal(global_draws, _generator_state(totals.device)):
        raise ModelError(
            "model: it draws dropout that can't be keyed by row, so results would depend on history; "
            "use model.dropout=false"
        )
    if not local.takes_any:
        _need_finite([*trained.values(), totals], at)
    if ends:
        moved, new = local.end(start, adapters, memory, at, phase)
        changed |= new
        for name, x in moved.items():
            adapters[name].copy_(x)
        _need_finite(moved.values(), at)
    return Trained(count, totals, lengths, start, changed)


def _need_finite(tensors: Iterable[Tensor], at: At) -> None:
    """Raise DivergedError where a number that local steps came to is infinite or none."""
    if not all(x.isfinite().all() for x in tensors):
        raise DivergedError(
            f"training: a loss or an adapter is no longer finite after round {int(at.round[0])}; "
            "lower training.learning_rate or training.max_grad_norm"
        )


def _rates_at(optim: Optim, steps: Tensor, device: torch.device) -> Rates:
    """Return the rates at these `steps [K]`: one for all clients where they are alike."""
    first, *others = steps.tolist()
    rates = optim.rates(first)
    each = [rates, *(rates if step == first else optim.rates(step) for step in others)]
    if all(one is rates or one == rates for one in each):
        return rates
    return {kind: torch.tensor([one[kind] for one in each], dtype=torch.float64, device=device) for kind in rates}


class BatchGradient:
    """The `Gradient` of one local step over its micro-batches; their gradients add up."""

    def __init__(
        self,
        model: StackedModel,
        batches: Sequence[Batch],
        kinds: Collection[str],
        smoothing: float = 0.0,
        frozen: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.model, self.batches, self.kinds, self.smoothing = model, batches, kinds, smoothing
        self.frozen = frozen
        self._loss: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Each client's mean loss `[K]`, in float64, where the gradient was taken first."""
        assert self._loss is not None, "a local step follows a gradient"
        return self._loss

    def __call__(self, adapters: Tensors) -> Tensors:
        """Return the gradients of the kinds, where adapters get one; see `Gradient`."""
        grads = dict[str, Tensor]()
        losses = self._no_losses(adapters)
        for batch in self.batches:
            # Only the clients of this batch pass through autograd: its cost does not grow with the stack.
            part = slice(int(batch.clients.min()), int(batch.clients.max()) + 1)
            params = {name: x[part].detach().requires_grad_(kind(name) in self.kinds) for name, x in adapters.items()}
            params |= {name: x[part] for name, x in self.frozen.items()}
            batch = replace(batch, clients=batch.clients - part.start).to(losses.device)
            found = row_losses(self.model(params, batch, training=True), batch, self.smoothing) * batch.weights
            found.sum().backward()
            received = {name: param.grad for name, param in params.items() if param.grad is not None}
            for name, grad in received.items():
                if name not in grads:
                    grads[name] = torch.zeros_like(adapters[name])
                grads[name][part] += grad
            losses[part].index_add_(0, batch.clients, found.detach().double())
        self._loss = losses if self._loss is None else self._loss
        return grads

    def clipped(self, adapters: Tensors, max_norm: float) -> Tensors:
        """Return the sums `[K, …]` of the rows' gradients, each cut to a norm; see `Gradient`.

        Each row is a client of its own in the pass, so its gradient comes out by itself. A gradient that is not finite
        counts as none. No loss is told: it would tell of the rows.
        """
        losses = self._no_losses(adapters)
        sums = {name: torch.zeros_like(x) for name, x in select(adapters, self.kinds).items()}
        for batch in self.batches:
            rows, each = batch.clients.to(losses.device), torch.arange(len(batch.clients))
            params = {name: x[rows].detach().requires_grad_(name in sums) for name, x in adapters.items()}
            alone = replace(batch, clients=each, each=1, packing=None).to(losses.device)
            logits = self.model(params | {name: x[rows] for name, x in self.frozen.items()}, alone, training=True)
            (row_losses(logits, alone, self.smoothing) * alone.weights).sum().backward()
            found = {name: x for name in sums if (x := params[name].grad) is not None}
            lengths = norms(found)
            scale = torch.where(lengths.isfinite(), (max_norm / (lengths + 1e-6)).clamp(max=1.0), 0)  # as `clip` has it
            for name, x in found.items():
                sums[name].index_add_(0, rows, x.nan_to_num(0, 0, 0) * over_clients(scale, x))
        self._loss = losses
        return sums

    def _no_losses(self, adapters: Tensors) -> Tensor:
        first = next(iter(adapters.values()))
        return torch.zeros(len(first), dtype=torch.float64, device=first.device)


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def clip(grads: Tensors, max_norm: float) -> Tensor:
    """Scale each client's gradient, over all its tensors together, to at most `max_norm`, in place; 0 leaves it.

    As `torch.nn.utils.clip_grad_norm_` does for one client. Returns the norms before, `[K]`.
    """
    before = norms(grads)
    if max_norm > 0:
        scale = (max_norm / (before + 1e-6)).clamp_(max=1.0)
        for grad in grads.values():
            grad.mul_(over_clients(scale, grad))
    return before


@torch.no_grad()
def evaluate(
    model: StackedModel,
    singles: Sequence[Tensors],
    batches: Iterable[tuple[Batch, NDArray[np.int64]]],
    rows: int,
    read: Read = predictions,
) -> NDArray[Any]:
    """Return what is read of each single adapter's logits on one set of rows, `[len(singles), rows, …]`.

    `singles` are adapters `[1, …]`. Each batch comes with the numbers of its rows, `[b]`, and one adapter after the
    other takes it: its rows fill the device, and nothing need be computed for another's factors.
    """
    values: Tensor | None = None
    for batch, numbers in batches:
        batch = batch.to(next(iter(singles[0].values())).device)
        found = torch.stack([read(model(single, batch, training=False), batch) for single in singles])
        values = found.new_zeros(len(singles), rows, *found.shape[2:]) if values is None else values
        values[:, torch.from_numpy(numbers).to(values.device)] = found
    assert values is not None, "a validation set has rows"
    return values.cpu().numpy()


def reset_moments(
    moments: Tensors, reset: Literal["never", "round", "phase"], phase: Phase, before: Phase | None
) -> None:
    """Zero the moments, in place, where the setting says that they start afresh in this round."""
    if reset == "round" or (reset == "phase" and before is not None and before.train != phase.train):
        for x in moments.values():
            x.zero_()
