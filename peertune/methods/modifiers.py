"""What changes one of a method's four values, `schedule`, `local`, `message` or `mixer`, or the whole `algorithm`.

A modifier's first parameter is what it changes, under that name, and it returns another of the same kind. The rest of
its signature is its schema: `modifiers: [{name: half}]` in a recipe. Several that change one kind apply in the order in
which they stand. One that takes the whole algorithm has two of its values to change together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peertune.method import Algorithm, At, Gradient, Local, Memory, Message, Phase
from peertune.types import Tensors, kind


def half(message: Message) -> Message:
    """Send adapters in bfloat16, which halves what travels of those in float32.

    Others read a rounded adapter, so differences of what is read are mixed, see `peertune.rounds.round`: with symmetric
    W the clients' mean stays what it was. What travels beside adapters stays as it is. Our own; rounding values without
    error feedback leaves clients about one part in 500 apart.
    """

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        sent, changed = message.send(adapters, memory, at, phase)
        return {name: x.bfloat16() if name in adapters else x for name, x in sent.items()}, changed

    def read(like: Tensors, heard: Tensors) -> Tensors:
        whole = {name: x.to(like[name].dtype) if name in like else x for name, x in heard.items()}
        return whole if message.read is None else message.read(like, whole)

    return message._replace(send=send, read=read, exact=False, needs=message.needs | {"exchange"})


def fedspeed(local: Local, proximal: float = 0.1, ascent: float = 0.1) -> Local:
    """FedSpeed: a proximal term and a dual pull each client to the others; gradients are taken a step uphill.

    A local step follows `g(x + ascent · g(x) / ‖g(x)‖) + proximal · (x - x_0 + h)`: x_0 is what the round began with,
    and the dual h is zero at first. After the last step `h ← h + x - x_0`, and x + h is what is sent and mixed. Where
    gradients differ from client to client, h comes to cancel what differs: at rest it is minus the client's own
    gradient, over `proximal`. This holds for the kinds that a round both trains and sends. Where all hear all, that is
    the common optimum. On other graphs clients come to rest apart, `(I - W) x = W h`; a larger `proximal` brings them
    together.

    Source: FedSpeed (arXiv 2302.10429) and the authors' code, whose server adds the mean of all h; with W in the mean's
    place that is DFedADMM with sharpness-aware gradients (arXiv 2308.08290). Derived for SGD: with AdamW, which scales
    what it follows, it is a heuristic. The authors let rates fall by .998 a round.
    """
    return _dual(local, "fedspeed", proximal, ascent)


def dfed_admm(local: Local, proximal: float = 0.1) -> Local:
    """DFedADMM: `fedspeed` with gradients where the client stands.

    Source: arXiv 2308.08290, of which we know the abstract. The formulas are those that FedSpeed's authors publish,
    with a row of W in the place of the server's mean; `proximal` is one over the paper's λ.
    """
    return _dual(local, "dfed_admm", proximal, 0.0)


def _dual(local: Local, owner: str, proximal: float, ascent: float) -> Local:
    """Return `local` with a proximal term and a dual. Memory: `<owner>.<adapter>.dual`, of the adapter's shape."""

    def dual(name: str) -> str:
        return f"{owner}.{name}.dual"

    def init(adapters: Tensors, at: At) -> Memory:
        return local.init(adapters, at) | {dual(name): torch.zeros_like(x) for name, x in adapters.items()}

    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        there = adapters
        if ascent:
            uphill = gradient(adapters)
            norms = torch.stack([x.flatten(1).square().sum(1) for x in uphill.values()]).sum(0).sqrt()
            reach = ascent / (norms + 1e-7)
            there = adapters | {name: adapters[name] + _rows(reach, x) * x for name, x in uphill.items()}
        followed, changed = local.gradients(gradient, there, start, memory, at, phase)
        pulled = {
            name: x + proximal * (adapters[name] - start[name] + memory[dual(name)]) if kind(name) in phase.send else x
            for name, x in followed.items()
        }
        return pulled, changed

    def end(start: Tensors, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        moved, changed = local.end(start, adapters, memory, at, phase)
        came = {name: moved.get(name, adapters[name]) for name in start if kind(name) in phase.send}
        duals = {name: memory[dual(name)] + x - start[name] for name, x in came.items()}
        return moved | {name: x + duals[name] for name, x in came.items()}, changed | {
            dual(name): x for name, x in duals.items()
        }

    return local._replace(gradients=gradients, end=end, keeps_start=True, init=init, needs=local.needs | {"exchange"})


def _rows(per_client: Tensor, like: Tensor) -> Tensor:
    return per_client.view(-1, *[1] * (like.dim() - 1))


def mix_moments(algorithm: Algorithm) -> Algorithm:
    """Send the optimiser's moments of what is sent, too, and average them with the graph's weights.

    AdamW's second moment scales each client's steps: with moments of its own each scales by its own rows. Bytes are
    three times as many with AdamW, twice with momentum. A sender whose moments are not finite, or whose second moment
    is below zero, is not mixed. What it says within that is believed.

    Source: the idea of DECA (arXiv 2606.03209), for factors. The paper corrects moments by differences to the
    neighbours'; this is the plain average.
    """
    message, mixer = algorithm.message, algorithm.mixer

    def travel(memory: Memory, phase: Phase) -> Memory:
        moments = {name: x for name, x in memory.items() if name.startswith("moments.") and name[-2:] in (".m", ".v")}
        return {name: x for name, x in moments.items() if kind(name[:-2]) in phase.send}

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        sent, changed = message.send(adapters, memory, at, phase)
        return sent | travel(memory, phase), changed

    def sound(heard: Tensors) -> Tensor:
        moments = {name: x.flatten(1) for name, x in heard.items() if name.startswith("moments.")}
        fine = [x.isfinite().all(1) & ((x >= 0).all(1) | (not name.endswith(".v"))) for name, x in moments.items()]
        before = [] if message.sound is None else [message.sound(heard)]
        return torch.stack([*fine, *before]).all(0)

    def receive(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        mixed, changed = mixer.receive(own, heard, weights, memory, at, phase)
        moments = {name: x.flatten(1) for name, x in heard.items() if name.startswith("moments.")}
        averaged = {name: weights.to(rows.device, rows.dtype) @ rows for name, rows in moments.items()}
        return mixed, changed | {name: x.view_as(memory[name]) for name, x in averaged.items()}

    return algorithm._replace(
        message=message._replace(send=send, sound=sound, needs=message.needs | {"exchange", "moments"}),
        mixer=mixer._replace(receive=receive),
    )


MODIFIERS: dict[str, Callable[..., Any]] = {
    "dfed_admm": dfed_admm,
    "fedspeed": fedspeed,
    "half": half,
    "mix_moments": mix_moments,
}
"""Name in a recipe → what changes a value of a method."""
