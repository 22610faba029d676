"""Local training and evaluation of a stack: the only place, beside the network, where values change in place."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peertune.adapters.stacked import StackedModel
from peertune.errors import DivergedError, ModelError
from peertune.types import Batch, Phase, State, Tensors, kind, select


class Optimizer(NamedTuple):
    """An optimiser over stacks, as two functions.

    `init(adapters)` makes the moments, each `[K, …]`; zeros are shared by all clients until the state is cloned.
    `update(params, grads, moments, rate)` steps `params` and `moments` in place: the parameters that have a gradient,
    each client by its own count of steps.
    """

    init: Callable[[Tensors], Tensors]
    update: Callable[[Tensors, Tensors, Tensors, float], None]


class Trained(NamedTuple):
    """What local steps came to, each `[K]` and a mean over the steps."""

    loss: Tensor
    grad_norm: Tensor  # before clipping


@dataclass(frozen=True)
class Optim:
    """How the clients' factors are stepped; one for all clients."""

    optimizer: Optimizer
    rate: Callable[[int], float]  # learning rate at a step counted from the run's start
    max_grad_norm: float  # each client's gradient is clipped to this norm; 0 leaves it
    reset: Literal["never", "round", "phase"]  # when moments start afresh


def _over_clients(per_client: Tensor, like: Tensor) -> Tensor:
    return per_client.view(-1, *[1] * (like.dim() - 1))


def _zeros_like(x: Tensor) -> Tensor:
    """Zeros that take no memory until they are cloned, since all clients share them."""
    return x.new_zeros((1, *x.shape[1:])).expand(x.shape)


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

    def update(params: Tensors, grads: Tensors, moments: Tensors, rate: float) -> None:
        for what in {kind(name) for name in grads}:
            moments[f"steps.{what}"] += 1
        for name, grad in grads.items():
            x, m, v = params[name], moments[f"{name}.m"], moments[f"{name}.v"]
            steps = _over_clients(moments[f"steps.{kind(name)}"].double(), x)
            m.lerp_(grad, 1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = (v / (1 - beta2**steps).to(x.dtype)).sqrt_().add_(epsilon)
            x.mul_(1 - rate * weight_decay).sub_(m / (1 - beta1**steps).to(x.dtype) / denominator, alpha=rate)

    return Optimizer(init, update)


def sgd(momentum: float = 0.0, weight_decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent, equal to `torch.optim.SGD` for each client; moments are `<name>.m [K, …]`."""

    def init(adapters: Tensors) -> Tensors:
        return {f"{name}.m": _zeros_like(x) for name, x in adapters.items()} if momentum else {}

    def update(params: Tensors, grads: Tensors, moments: Tensors, rate: float) -> None:
        for name, grad in grads.items():
            step = grad.add(params[name], alpha=weight_decay)
            if momentum:
                step = moments[f"{name}.m"].mul_(momentum).add_(step)
            params[name].sub_(step, alpha=rate)

    return Optimizer(init, update)


def learning_rate(
    kind: Literal["constant", "linear", "cosine"], peak: float, warmup: int, steps: int
) -> Callable[[int], float]:
    """Return the rate at each step: a linear rise over `warmup` steps, then constant, or falling to 0 at `steps`.

    The same three shapes as in Hugging Face's `get_scheduler`.
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
            case "cosine":
                return peak * float(0.5 * (1 + np.cos(np.pi * min(1.0, share))))

    return rate


def row_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return each row's loss `[b]`: cross-entropy over classes, or squared error from targets that are no classes.

    Of a language model it is the sum over the row's labels of their cross-entropy.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if batch.labels.is_floating_point():
        return (logits.squeeze(-1) - batch.labels) ** 2
    losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    return losses if batch.places is None else _row_sums(losses, batch)


def _row_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sum `[T]`, a value for each label of a language model, by row, `[b]`."""
    assert batch.places is not None, "a language model's batch says where its labels are predicted"
    width = batch.inputs["input_ids"].shape[1]
    return values.new_zeros(len(batch.clients)).index_add(0, batch.places // width, values)


Read = Callable[[Tensor, Batch], Tensor]
"""What is read from logits in evaluation: `(logits, batch) → [b]`."""


def predictions(logits: Tensor, batch: Batch) -> Tensor:
    """Return the likeliest class of each row, or the value of a regression."""
    return logits.squeeze(-1).double() if batch.labels.is_floating_point() else logits.argmax(-1)


def hits(logits: Tensor, batch: Batch) -> Tensor:
    """Return for each row how many of its labels a language model holds for the likeliest token."""
    return _row_sums((logits.argmax(-1) == batch.labels).double(), batch)


def train_local(
    model: StackedModel,
    state: State,
    steps: Iterable[list[Batch]],
    phase: Phase,
    optim: Optim,
    first_step: int,
) -> Trained:
    """Train the phase's kinds on each client's own rows, **in place**.

    `steps` yields the micro-batches of one local step after the other; their gradients add up, so how the rows are cut
    changes nothing. `first_step` is the number of the first of them, counted from the run's start. Kinds that the phase
    does not train get no gradient and stay bit for bit. `state` is stepped where it lies: a copy of thousands of
    adapters and their moments would double what they take.

    Raises ModelError where the base drew from PyTorch's global generator: its result would depend on history; and
    DivergedError where a loss or an adapter is not finite.
    """
    adapters, grads = state.adapters, dict[str, Tensor]()
    first = next(iter(adapters.values()))
    totals = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    norms = torch.zeros_like(totals)
    global_draws = _generator_state(totals.device)
    count = 0
    for count, batches in enumerate(steps, start=1):
        add_gradients(model, adapters, batches, phase.train, grads, totals)
        norms += clip(grads, optim.max_grad_norm) if grads else 0
        optim.optimizer.update(adapters, grads, state.moments, optim.rate(first_step + count - 1))
        for grad in grads.values():
            grad.zero_()
    if not torch.equal(global_draws, _generator_state(totals.device)):
        raise ModelError(
            "model: it draws dropout that can't be keyed by row, so results would depend on history; "
            "use model.dropout=false"
        )
    if not all(x.isfinite().all() for x in (*select(adapters, phase.train).values(), totals)):
        raise DivergedError(
            f"training: a loss or an adapter is no longer finite after round {state.round}; "
            "lower training.learning_rate or training.max_grad_norm"
        )
    return Trained(totals / max(1, count), norms / max(1, count))


def add_gradients(
    model: StackedModel,
    adapters: Tensors,
    batches: Iterable[Batch],
    kinds: Collection[str],
    grads: Tensors,
    losses: Tensor,
) -> None:
    """Add the gradients of these kinds over one step's micro-batches to `grads`, and the losses to `losses [K]`.

    Both are the sums of what they were and of each client's own mean over its rows. A name that `grads` lacks is made.
    """
    trained = select(adapters, kinds)
    for batch in batches:
        # Only the clients of this batch pass through autograd: its cost does not grow with the stack.
        part = slice(int(batch.clients.min()), int(batch.clients.max()) + 1)
        params = {name: x[part].detach().requires_grad_(name in trained) for name, x in adapters.items()}
        batch = replace(batch, clients=batch.clients - part.start).to(losses.device)
        found = row_losses(model(params, batch, training=True), batch) * batch.weights
        found.sum().backward()
        received = {name: param.grad for name, param in params.items() if param.grad is not None}
        for name, grad in received.items():
            if name not in grads:
                grads[name] = torch.zeros_like(adapters[name])
            grads[name][part] += grad
        losses[part].index_add_(0, batch.clients, found.detach().double())


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def clip(grads: Tensors, max_norm: float) -> Tensor:
    """Scale each client's gradient, over all its tensors together, to at most `max_norm`, in place; 0 leaves it.

    As `torch.nn.utils.clip_grad_norm_` does for one client. Returns the norms before, `[K]`.
    """
    norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()
    if max_norm > 0:
        scale = (max_norm / (norms + 1e-6)).clamp_(max=1.0)
        for grad in grads.values():
            grad.mul_(_over_clients(scale, grad))
    return norms


@torch.no_grad()
def evaluate(
    model: StackedModel,
    singles: Sequence[Tensors],
    batches: Iterable[tuple[Batch, NDArray[np.int64]]],
    rows: int,
    read: Read = predictions,
) -> NDArray[Any]:
    """Return what is read of each single adapter's logits on one set of rows, `[len(singles), rows]`.

    `singles` are adapters `[1, …]`. Each batch comes with the numbers of its rows, `[b]`, and one adapter after the
    other takes it: its rows fill the device, and nothing need be computed for another's factors.
    """
    values: Tensor | None = None
    for batch, numbers in batches:
        batch = batch.to(next(iter(singles[0].values())).device)
        found = torch.stack([read(model(single, batch, training=False), batch) for single in singles])
        values = found.new_zeros(len(singles), rows) if values is None else values
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
