"""Messages that take fewer bytes than adapters as they are.

Others then read something else of a client than it has, so differences of what is read are mixed, see
`peertune.rounds.mixing`: with symmetric W the clients' mean stays what it was, and a client that hears nobody keeps its
adapter. What travels beside adapters, such as reports of phases, stays as it is.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from peertune.errors import RecipeError
from peertune.method import At, Memory, Message, Phase
from peertune.randomness import Draw, fractions, words
from peertune.types import Tensors, kind, select


def half(message: Message) -> Message:
    """Send adapters in bfloat16, which halves what travels of those in float32.

    Others read rounded adapters, so differences of what is read are mixed, and the clients' mean stays what it was. Our
    own; rounding values without error feedback leaves clients about one part in 500 apart.

    Raises:
        RecipeError: adapters are rounded already.
    """
    check_whole("half", message)

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        sent, changed = message.send(adapters, memory, at, phase)
        return {name: x.bfloat16() if name in adapters else x for name, x in sent.items()}, changed

    def read(like: Tensors, heard: Tensors, round: int) -> Tensors:
        whole = {name: x.to(like[name].dtype) if name in like else x for name, x in heard.items()}
        return whole if message.read is None else message.read(like, whole, round)

    return message._replace(send=send, read=read, exact=False, needs=message.needs | {"exchange"})


def int8(message: Message, block: int = 64, seed: int = 0) -> Message:
    """Send adapters in 8 bits, a quarter of what travels of those in float32.

    An entry x travels as a whole number q from -127 to 127, and is read as `q · s`. Each `block` of entries has a step
    s that takes a byte: the least, of four for each power of two, with which all fit. x is rounded at random,
    `q = floor(x / s + u)`, so that the mean of what is read is x. All clients use the same u, drawn from the recipe's
    seed, the round, and the entry's place, so those who agree are read alike. Without training, clients come to agree
    to about a fifth of a step.

    Source: rounding at random as in QSGD (arXiv 1610.02132), one u for all as in Moniqua (arXiv 2002.11787). The steps,
    and that differences are mixed, are ours.

    Raises:
        RecipeError: `block` is below 1, or adapters are rounded already.
    """
    return _rounded(message, _Rounding("int8", 8, block, seed))


def int4(message: Message, block: int = 32, seed: int = 0) -> Message:
    """Send adapters in 4 bits, less than a seventh of what travels of those in float32.

    It is `int8` with whole numbers from -7 to 7, two to a byte.

    Raises:
        RecipeError: `block` is below 1, or adapters are rounded already.
    """
    return _rounded(message, _Rounding("int4", 4, block, seed))


def shared_mask(message: Message, share: float = 0.25, seed: int = 0) -> Message:
    """Send a random `share` of each adapter's entries, in a round the same ones at all clients.

    Which these are follows from the recipe's seed and the round, so no place travels. All other entries count as not
    sent: with m = 1 where an entry is sent and 0 elsewhere, `x_i ← x_i + Σ_j W_ij m ∘ (x_j - x_i)`. Nothing is
    remembered, so any graph will do, one that changes with the round or whose edges fail, too. Disagreement shrinks as
    if each entry met in a share of the rounds: a round leaves `1 - share · (1 - rho)` of its square.

    With `half`, `int8` or `int4` before it, the entries that are sent are rounded. Our own; to mix some entries in each
    round is as old as gossip by coordinates.

    Raises:
        RecipeError: `share` isn't between 0 and 1.
    """
    if not 0 < share < 1:
        raise RecipeError(f"modifiers: shared_mask: share is {share}, give a number between 0 and 1")
    _check_layout("shared_mask", message)

    def count(x: Tensor) -> int:
        return max(1, round(share * x.shape[1:].numel()))

    def chosen(name: str, x: Tensor, t: int) -> Tensor:
        """Return the places of the entries that are sent in round t, sorted."""
        drawn = words(seed, Draw.SHARED_MASK.of(name), t, np.arange(x.shape[1:].numel()))
        places = np.argpartition(drawn, count(x) - 1)[: count(x)]
        return torch.from_numpy(np.sort(places)).to(x.device)

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        (t,) = at.round.unique().tolist() or [0]  # where all clients of a process are down
        sent = select(adapters, phase.send)
        return message.send({n: x.flatten(1)[:, chosen(n, x, t)] for n, x in sent.items()}, memory, at, phase)

    def read(like: Tensors, heard: Tensors, t: int) -> Tensors:
        came = heard
        if message.read is not None:
            came = message.read({name: x.flatten(1)[:, : count(x)] for name, x in like.items()}, heard, t)
        whole = dict(came)
        for name in like.keys() & came.keys():
            x = like[name]
            spread = x.new_zeros(len(came[name]), x.shape[1:].numel())
            spread[:, chosen(name, x, t)] = came[name]
            whole[name] = spread.view(-1, *x.shape[1:])
        return whole

    needs = message.needs | {"exchange", "mixing by entry", "one rank", "unjudged messages"}
    return message._replace(send=send, read=read, exact=False, whole=False, needs=needs)


def check_whole(name: str, message: Message) -> None:
    """Raise RecipeError where a message holds something else than whole adapters as they are."""
    if not message.whole:
        instead = "leave one of the two out" if name == "choco" else "give it before that"
        raise RecipeError(f"modifiers: {name}: stands after shared_mask; {instead}")
    if not message.exact:
        raise RecipeError(f"modifiers: {name}: less is sent already; give one of choco, half, int8 and int4")
    _check_layout(name, message)


def _check_layout(name: str, message: Message) -> None:
    """Raise RecipeError where senders may send other shapes than their receivers, or changes."""
    if message.edgewise is not None:
        raise RecipeError(f"modifiers: {name}: stands after choco; leave one of the two out")
    if message.layout is not None:
        raise RecipeError(f"modifiers: {name}: needs clients that send the same shapes; choose another algorithm")


def _rounded(message: Message, rounding: "_Rounding") -> Message:
    """Return the message with each sent kind as bytes, `<modifier>.<kind>` `[K, N]` uint8."""
    if rounding.block < 1:
        raise RecipeError(f"modifiers: {rounding.name}: block is {rounding.block}, give a number of entries above 0")
    check_whole(rounding.name, message)

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        sent, changed = message.send(adapters, memory, at, phase)
        packed = {name: x for name, x in sent.items() if name not in adapters}
        for of in sorted(phase.send & set(map(kind, adapters))):
            packed[f"{rounding.name}.{of}"] = rounding.pack({n: sent[n] for n in select(adapters, {of})}, at.round)
        return packed, changed

    def read(like: Tensors, heard: Tensors, round: int) -> Tensors:
        whole = dict(heard)
        for of in sorted(set(map(kind, like))):
            if (packed := whole.pop(f"{rounding.name}.{of}", None)) is not None:
                whole |= rounding.unpack(packed, select(like, {of}))
        return whole if message.read is None else message.read(like, whole, round)

    needs = message.needs | {"exchange", "kept basis"}
    return message._replace(send=send, read=read, exact=False, needs=needs)


_STEPS = torch.tensor([m * 2.0**e for e in range(-47, 17) for m in (1, 1.25, 1.5, 1.75)], dtype=torch.float64)
"""By a byte; all of them exact in float32, from 7e-15 to 114,688."""


class _Rounding(NamedTuple):
    """Rounding by block. Whatever the bytes are, they are read as numbers, which `peertune.rounds.bounds` judges."""

    name: str
    bits: int
    block: int
    seed: int

    @property
    def most(self) -> int:
        """The largest whole number."""
        return (1 << self.bits - 1) - 1

    def pack(self, adapters: Tensors, rounds: Tensor) -> Tensor:
        """Return what stands for adapters `[K, …]` of one kind in these `rounds [K]`: `[K, N]` uint8.

        First come the bytes of all steps, then all entries; the adapters are in the order of their names.
        """
        each = [self._divided(name, x.flatten(1), rounds) for name, x in sorted(adapters.items())]
        steps, numbers = (torch.cat(part, 1) for part in zip(*each, strict=True))
        if self.bits == 4:
            numbers = pad(numbers + 8, (0, numbers.shape[1] % 2)).view(torch.uint8)
            numbers = numbers[:, ::2] | numbers[:, 1::2] << 4
        return torch.cat([steps, numbers.view(torch.uint8)], 1)

    def unpack(self, packed: Tensor, like: Tensors) -> Tensors:
        """Return adapters `[H, …]`, of the shapes and types of these, that `packed [H, N]` stands for."""
        shapes = {name: (x.shape[1:], x.dtype) for name, x in sorted(like.items())}
        sizes = [shape.numel() for shape, _ in shapes.values()]
        blocks = [-(-size // self.block) for size in sizes]
        steps, numbers = packed.tensor_split([sum(blocks)], 1)
        if self.bits == 4:
            numbers = torch.stack([numbers & 15, numbers >> 4], 2).flatten(1)[:, : sum(sizes)]
        numbers = numbers.view(torch.int8) - (8 if self.bits == 4 else 0)
        parts = zip(shapes.items(), steps.split(blocks, 1), numbers.split(sizes, 1), strict=True)
        return {
            name: (number * self._spread(step, number.shape[1], dtype)).view(-1, *shape)
            for (name, (shape, dtype)), step, number in parts
        }

    def _divided(self, name: str, x: Tensor, rounds: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bytes of the steps, `[K, blocks]` uint8, and the whole numbers `[K, n]` int8, of x `[K, n]`.

        What isn't finite travels as the largest number that there is, which nobody mixes.
        """
        size = x.shape[1]
        largest = pad(x.abs(), (0, -size % self.block)).unflatten(1, (-1, self.block)).amax(2)
        fit = torch.searchsorted(_STEPS.to(x.device, x.dtype), largest / self.most)
        steps = fit.clamp(max=len(_STEPS) - 1).to(torch.uint8)
        times, place = rounds.unique(return_inverse=True)
        drawn = [fractions(self.seed, Draw.ROUNDING.of(name), size, t) for t in times.tolist()]
        up = torch.from_numpy(np.array(drawn, dtype=np.float32).reshape(-1, size))[place].to(x.device)
        numbers = (x / self._spread(steps, size, x.dtype) + up).floor()
        return steps, numbers.nan_to_num(nan=self.most).clamp(-self.most, self.most).to(torch.int8)

    def _spread(self, steps: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """Return the step of each of the entries, `[K, size]`."""
        return _STEPS.to(steps.device, dtype)[steps.long()].repeat_interleave(self.block, 1)[:, :size]
