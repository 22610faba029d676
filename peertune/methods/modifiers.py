"""What changes one of a method's four values, `schedule`, `local`, `message` or `mixer`, or the whole `algorithm`.

A modifier's first parameter is what it changes, under that name, and it returns another of the same kind. The rest of
its signature is its schema: `modifiers: [{name: half}]` in a recipe. Several that change one kind apply in the order in
which they stand. One that takes the whole algorithm has two of its values to change together. Those that make messages
smaller are in `peertune.methods.smaller`, and those for clients of whom some may lie in `peertune.methods.robust`.
"""

from collections.abc import Callable
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from peertune.errors import RecipeError
from peertune.method import Algorithm, At, Gradient, Local, Memory, Mixer, Phase
from peertune.methods.choco import choco
from peertune.methods.mixers import averaged
from peertune.methods.robust import RULES
from peertune.methods.shares import entries, of_entries
from peertune.methods.smaller import half, int4, int8, shared_mask
from peertune.randomness import Draw, uniforms
from peertune.types import MOMENTS, Tensors, kind, norms, over_clients, pairs

DERIVED_FOR_SGD = ("fedspeed", "dfed_admm")
"""Modifiers whose pull is in proportion to gradients, which AdamW scales away."""


def fedspeed(local: Local, proximal: float = 0.1, ascent: float = 0.1) -> Local:
    """FedSpeed: a proximal term and a dual pull each client to the others; gradients are taken a step uphill.

    A local step follows `g(x + ascent · g(x) / ‖g(x)‖) + proximal · (x - x_0 + h)`: x_0 is what the round began with,
    and the dual h is zero at first. After the last step `h ← h + x - x_0`, and x + h is what is sent and mixed; a
    client that hears nobody keeps it. This holds for the kinds that a round both trains and sends.

    Where gradients differ from client to client, h comes to cancel what differs: at rest it is minus the client's own
    gradient, over `proximal`. Where all hear all, that is the common optimum. On other graphs clients come to rest
    apart, `(I - W) x = W h`; a larger `proximal` brings them together.

    Source: FedSpeed (arXiv 2302.10429) and the authors' code, whose server adds the mean of all h; with W in the mean's
    place that is DFedADMM with sharpness-aware gradients (arXiv 2308.08290). Derived for SGD: with AdamW, which scales
    what it follows, it learns far less (docs/results.md), and a run is warned. The authors let rates fall by .998 a
    round.

    Raises:
        RecipeError: `proximal` or `ascent` is not above 0.
    """
    if not 0 < ascent < inf:
        raise RecipeError(f"modifiers: fedspeed: ascent is {ascent}, give a number above 0; dfed_admm goes without")
    return _dual(local, "fedspeed", proximal, ascent)


def dfed_admm(local: Local, proximal: float = 0.1) -> Local:
    """DFedADMM: `fedspeed` with gradients where the client stands.

    Source: arXiv 2308.08290, of which we know the abstract. The formulas are those that FedSpeed's authors publish,
    with a row of W in the place of the server's mean; `proximal` is one over the paper's λ.

    Raises:
        RecipeError: `proximal` is not above 0.
    """
    return _dual(local, "dfed_admm", proximal, 0.0)


def _dual(local: Local, name: str, proximal: float, ascent: float) -> Local:
    """Return `local` with a proximal term and a dual. Memory: `dual.<adapter>.h`, of the adapter's shape."""
    if not 0 < proximal < inf:
        raise RecipeError(f"modifiers: {name}: proximal is {proximal}, give a number above 0")

    def dual(adapter: str) -> str:
        return f"dual.{adapter}.h"

    def init(adapters: Tensors, at: At) -> Memory:
        made = local.init(adapters, at)
        if any(dual(adapter) in made for adapter in adapters):
            raise RecipeError("modifiers: fedspeed and dfed_admm keep the same dual; choose one")
        return made | {dual(adapter): x.new_zeros(1, *x.shape[1:]).expand(x.shape) for adapter, x in adapters.items()}

    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        there = adapters
        if ascent:
            uphill = gradient(adapters)
            reach = ascent / (norms(uphill) + 1e-7)
            there = adapters | {name: adapters[name] + over_clients(reach, x) * x for name, x in uphill.items()}
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
        sent = {name: x + duals[name] for name, x in came.items()}
        return moved | sent, changed | {dual(name): x for name, x in duals.items()}

    needs = local.needs | {"clients that need not be private", "exchange", "kept basis", "edges both ways"}
    needs |= {"rows that need not be private"} if ascent else set()
    return local._replace(gradients=gradients, end=end, keeps_start=True, init=init, needs=needs)


def mix_moments(algorithm: Algorithm) -> Algorithm:
    """Send AdamW's moments of what is sent, too, and average them as the adapters are averaged.

    AdamW's second moment scales each client's steps: with moments of its own each scales by its own rows. Bytes are
    three times as many. Each client keeps its own count of steps, by which AdamW corrects its moments' bias; one that
    was away for long corrects by another count than its neighbours. SGD's momentum is refused: nothing says how large
    an honest one may be.

    A sender is not mixed whose moments can't be Adam's: they are not finite, v is below 0, or m² above 1,100 v. By the
    inequality of Cauchy and Schwarz m² is at most v / (1 - β₂), and means keep that; it is 1,000 v for β₂ = .999.

    Source: the idea of DECA (arXiv 2606.03209), for factors. The paper corrects moments by differences to the
    neighbours'; this is the plain average.
    """
    message, mixer = algorithm.message, algorithm.mixer

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        sent, changed = message.send(adapters, memory, at, phase)
        moments = {name: x for name, x in memory.items() if name.startswith(MOMENTS) and name[-2:] in (".m", ".v")}
        return sent | {name: x for name, x in moments.items() if kind(name[:-2]) in phase.send}, changed

    def sound(heard: Tensors) -> Tensor:
        fine = [torch.ones(len(next(iter(heard.values()))), dtype=torch.bool, device=next(iter(heard.values())).device)]
        for name, x in heard.items():
            if not name.startswith(MOMENTS):
                continue
            fine.append(x.isfinite().flatten(1).all(1))
            if name.endswith(".v"):
                m, v = heard[f"{name[:-1]}m"].double(), x.double()
                fine.append(((v >= 0) & (m.square() <= 1_100 * v + 1e-30)).flatten(1).all(1))
        return torch.stack(fine if message.sound is None else [*fine, message.sound(heard)]).all(0)

    def receive(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        mixed, changed = mixer.receive(own, heard, weights, memory, at, phase)
        return mixed, changed | {name: averaged(x, weights) for name, x in heard.items() if name.startswith(MOMENTS)}

    needs = message.needs | {"clients that need not be private", "exchange", "kept basis", "moments", "one rank"}
    return algorithm._replace(
        message=message._replace(send=send, sound=sound, needs=needs), mixer=mixer._replace(receive=receive)
    )


def nested(local: Local, seed: int = 0) -> Local:
    """Have each client's first ranks learn what matters most: a local step trains a prefix of them.

    For each client and step a length p is drawn, from 1 to its rank r, all alike. The step's gradient is that of the
    adapter of the first p rows of A and columns of B, and 0 beyond. So the k-th of them is in `(r - k + 1) / r` of the
    steps. A prefix is then an adapter by itself, which those hold who have no more, and rank slices are mixed that have
    the same meaning at all clients. What counts as important comes from training, not from sorting one client's
    factors. With AdamW what lies beyond still moves by its momentum.

    Source: the idea of PreLort (arXiv 2606.15963), of which we know the abstract. How lengths are drawn is ours, as in
    nested dropout (arXiv 1402.0915) with equal chances.
    """

    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        r = next(x.shape[1] for name, x in adapters.items() if kind(name) == "A")
        drawn = uniforms(seed, Draw.PREFIX, at.clients.numpy(), at.step.numpy())
        first = torch.arange(r) < 1 + torch.from_numpy(drawn * r).long()[:, None]  # [K, r]
        return local.gradients(_Prefix(gradient, first), adapters, start, memory, at, phase)

    return local._replace(gradients=gradients)


class _Prefix:
    """The gradient of adapters of which only the first rows of A and columns of B are there."""

    def __init__(self, gradient: Gradient, first: Tensor) -> None:
        self._gradient, self._first = gradient, first  # [K, r]

    def _cut(self, tensors: Tensors) -> Tensors:
        found = dict(tensors)
        for name, x in tensors.items():
            if kind(name) in ("A", "B"):
                first = self._first.to(x.device)[:, :, None] if kind(name) == "A" else self._first.to(x.device)[:, None]
                found[name] = x * first
        return found

    def __call__(self, adapters: Tensors) -> Tensors:
        return self._cut(self._gradient(self._cut(adapters)))

    def clipped(self, adapters: Tensors, max_norm: float) -> Tensors:
        return self._cut(self._gradient.clipped(self._cut(adapters), max_norm))


def divided(mixer: Mixer) -> Mixer:
    """Where ranks differ, deal the weight of those who lack a rank slice among all others whom a receiver hears.

    Each takes more in proportion, the receiver's own among them, so that a slice is averaged over those who have it.
    Without this the weight returns to the receiver alone, and the mean of the slice stays; here it moves. Where all
    hear all with one weight it is the mean of those who have the slice.

    Source: raFLoRA (arXiv 2602.13486), with a server; it averages updates, and here factors are.

    Raises:
        RecipeError: the mixer mixes no slices.
    """
    if mixer.ranks == "whole":
        raise RecipeError("modifiers: divided: is for methods that mix rank slices; leave out zero_padded and decaf")
    return mixer._replace(lacking="all", needs=mixer.needs | {"ranks that differ"})


def zero_padded(mixer: Mixer, weights: Literal["graph", "norms"] = "graph") -> Mixer:
    """Where ranks differ, mix factors cut or filled with zeros to the receiver's rank, as if all had that rank.

    It is what is most often done, to be compared with. Without it each slice of rows of A and of columns of B is mixed
    among those that have it. Here those that lack a slice say zero of it, so it shrinks at the others, and the clients'
    mean moves. Where ranks are equal this changes nothing.

    With `weights: norms` what a client takes of each is in proportion to the graph's weight times the norm of the
    site's product, `‖B_j A_j‖`. Where all that it hears are zero, as at the start, the graph's weights hold.

    Source: HetLoRA (arXiv 2401.06432), with a server; its clients also give up ranks as they train, which is not here.
    Not known to us: whether its norms are of a site or of the whole adapter.

    Raises:
        RecipeError: the mixer mixes products.
    """
    if mixer.ranks == "whole":
        raise RecipeError("modifiers: zero_padded: is for methods that average factors; choose another than decaf")

    def receive(
        own: Tensors, heard: Tensors, shares: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        if at.ranks is None:
            return mixer.receive(own, heard, shares, memory, at, phase)
        sites = pairs(own)
        cut = {a: heard[a][:, : own[a].shape[1]] for a, _ in sites if a in heard}
        cut |= {b: heard[b][..., : own[b].shape[2]] for _, b in sites if b in heard}
        if weights == "norms":
            for a, b in sites:
                shares = _by_norms(shares, heard[a].double(), heard[b].double())
        return mixer.receive(own, heard | cut, shares, memory, at._replace(ranks=None), phase)

    changed = mixer._replace(receive=receive, ranks="whole", needs=mixer.needs | {"ranks that differ"})
    if weights == "graph":
        return changed
    return changed._replace(by_entry=False, needs=changed.needs | {"both factors"})


def _by_norms(weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return weights `[R, H]`, whose rows sum to 1, in proportion to theirs times the norms of products B A."""
    norms = ((A @ A.mT) * (B.mT @ B)).sum((1, 2)).clamp(min=0).sqrt()
    receivers, places, plain = entries(weights)
    told = plain * norms[places]
    sums = told.new_zeros(len(weights)).index_add(0, receivers, told)[receivers]
    return of_entries(weights, receivers, places, torch.where(sums > 0, told / sums, plain))


MODIFIERS: dict[str, Callable[..., Any]] = {
    "choco": choco,
    "dfed_admm": dfed_admm,
    "divided": divided,
    "fedspeed": fedspeed,
    "half": half,
    "int4": int4,
    "int8": int8,
    "mix_moments": mix_moments,
    "nested": nested,
    "shared_mask": shared_mask,
    "zero_padded": zero_padded,
    **RULES,
}
"""Name in a recipe → what changes a value of a method."""
