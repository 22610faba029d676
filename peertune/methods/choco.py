"""CHOCO: clients tell each other changes of public copies, which both ends of an edge hold.

**What goes over an edge** depends on what went over it before. If the last round that sent a kind counted, which both
ends know, the entries that changed travel: a bit for each entry, the values of those that did, and as a number the
round of the copy that they change. If not, the whole copy travels, once. A number that is not that of the copy held is
refused. So an end that hears another holds its public copy to the bit, and whole copies are mixed and held against the
bound. All begin alike, so at first only changes travel.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from peertune.errors import RecipeError, WireError
from peertune.method import Algorithm, At, Edgewise, Memory, Phase
from peertune.methods.smaller import check_whole
from peertune.types import Tensors, kind, payload_bytes, select

Near = Callable[[], Mapping[int, Sequence[int]]]
"""Client → the clients that it has an edge with, sorted; of all clients, or of those whose edges are known."""


def choco(algorithm: Algorithm, share: float = 0.1, step: float = 0.5, near: Near = dict) -> Algorithm:
    """CHOCO-Gossip: clients send the entries that changed most, and mix copies that all who hear a client hold.

    Each client i has a public copy x̂_i. In a round the `share` of each adapter's entries in which it lags most become
    those of x_i, and these are sent; then `x_i ← x_i + step · Σ_j W_ij (x̂_j - x̂_i)`. What isn't sent stays in
    `x_i - x̂_i` and comes later, so clients come to agree however small the share. Sending the largest *values*, and
    adding to them what earlier rounds left out, does not converge: values don't become smaller as clients agree, and
    changes do. A smaller share wants a smaller `step`.

    Edges must stay, always active. Memory: each client's public copy, and its neighbours', so it takes as many adapters
    as a client has neighbours. Over an edge that failed a whole copy travels, once.

    Source: CHOCO-Gossip (arXiv 1902.00340), with local steps as in CHOCO-SGD (arXiv 1907.09356), and entries that are
    taken over in the place of compressed differences that are added, which for the largest entries is the same.

    Raises:
        RecipeError: `share` isn't between 0 and 1, `step` isn't above 0 and at most 1, or adapters are rounded or
            masked already.
    """
    if not 0 < share < 1:
        raise RecipeError(f"modifiers: choco: share is {share}, give a number between 0 and 1")
    if not 0 < step <= 1:
        raise RecipeError(f"modifiers: choco: step is {step}, give a number above 0, at most 1")
    message, mixer, copies = algorithm.message, algorithm.mixer, _Copies(share, near)
    check_whole("choco", message)

    def init(adapters: Tensors, at: At) -> Memory:
        return message.init(adapters, at) | copies.init(adapters, at)

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        sent, changed = message.send(adapters, memory, at, phase)
        return sent | {n: copies.moved(x, memory[_copy(n)]) for n, x in select(adapters, phase.send).items()}, changed

    def settle(memory: Memory, heard: Tensors, weights: Tensor, at: At, phase: Phase) -> Memory:
        changed = {} if message.settle is None else message.settle(memory, heard, weights, at, phase)
        return changed | copies.settle(memory, heard, weights, at)

    def receive(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        mixed, changed = mixer.receive(own, heard, weights, memory, at, phase)
        return {n: x if x is own[n] else torch.lerp(own[n], x, step) for n, x in mixed.items()}, changed

    edgewise = Edgewise(copies.pack, copies.unpack, copies.packed_bytes, copies.bytes_sent)
    needs = message.needs | {"exchange", "static graph", "edges both ways", "kept basis", "mixing by entry", "one rank"}
    told = message._replace(send=send, settle=settle, init=init, exact=False, edgewise=edgewise, needs=needs)
    return algorithm._replace(message=told, mixer=mixer._replace(receive=receive))


class _Copies(NamedTuple):
    """The copies of K clients and their D neighbours.

    Memory: `choco.<adapter>.copy [K, …]`, and the round that made it, -1 at the start, `choco.<kind>.round [K]`;
    `choco.<adapter>.theirs [K, D, …]` of the neighbours `choco.near [K, D]`, -1 where a client has fewer, and the last
    round that brought one, `choco.<kind>.last [K, D]`, which brought the neighbour this client's, too.
    """

    share: float
    near: Near

    def init(self, adapters: Tensors, at: At) -> Memory:
        made = {_copy(name): x.clone() for name, x in adapters.items()}
        known = self.near()
        if not (D := max(map(len, known.values()), default=0)):
            return made
        near = [[*known[client], *[-1] * (D - len(known[client]))] for client in at.clients.tolist()]
        made |= {_theirs(n): made[_copy(n)][:, None].expand(-1, D, *x.shape[1:]) for n, x in adapters.items()}
        made["choco.near"] = torch.tensor(near, dtype=torch.int64).view(-1, D)
        for of in set(map(kind, adapters)):
            made[_last(of)] = torch.full_like(made["choco.near"], -1)
            made[_round(of)] = torch.full_like(at.round, -1)
        return made

    def most(self, x: Tensor) -> int:
        """Return how many entries of an adapter `[K, …]` change in a round, at most."""
        return max(1, round(self.share * x.shape[1:].numel()))

    def moved(self, x: Tensor, copy: Tensor) -> Tensor:
        """Return the public copies `[K, …]` after they took over the entries in which they lag most."""
        now, before = x.flatten(1), copy.flatten(1)
        places = (now - before).abs().topk(self.most(x), dim=1).indices
        return before.scatter(1, places, now.gather(1, places)).view_as(x)

    def settle(self, memory: Memory, heard: Tensors, weights: Tensor, at: At) -> Memory:
        """Return what is held after the round's edges counted or failed."""
        assert at.heard is not None, "an exchange says who was heard"
        names = [name for name in heard if _copy(name) in memory]
        own = torch.searchsorted(at.heard, at.clients).to(weights.device)
        changed = {_copy(name): heard[name][own] for name in names}
        if names and "choco.near" in memory:
            counted, places = _counted(memory, weights, at)
            rounds = at.round.to(weights.device)
            for of in set(map(kind, names)):
                changed[_round(of)] = rounds.clone()
                changed[_last(of)] = torch.where(counted, rounds[:, None], memory[_last(of)])
            for name in names:
                theirs = memory[_theirs(name)].clone()
                theirs[counted] = heard[name][places[counted]]
                changed[_theirs(name)] = theirs
        return changed

    def bytes_sent(self, payload: Tensors, memory: Memory, weights: Tensor, at: At) -> list[int]:
        """Return how many bytes each client sends, whole copies over edges that failed in the round before."""
        if "choco.near" not in memory:
            return [0] * len(at.clients)
        counted, _ = _counted(memory, weights, at)
        size = torch.full_like(memory["choco.near"], payload_bytes(_beside(payload, memory)))
        for of, part in _by_kind(payload, memory).items():
            size += torch.where(_together(memory, of), self._changes_bytes(part), payload_bytes(part))
        each: list[int] = (size * counted).sum(1).tolist()
        return each

    def packed_bytes(self, payload: Tensors, memory: Memory) -> int:
        """Return how many bytes changes take, over an edge that counted in the round before."""
        parts = _by_kind(payload, memory).values()
        return payload_bytes(_beside(payload, memory)) + sum(map(self._changes_bytes, parts))

    def _changes_bytes(self, part: Tensors) -> int:
        bits = -(-sum(x.shape[1:].numel() for x in part.values()) // 8)
        return bits + _NUMBER_BYTES + sum(self.most(x) * x.element_size() for x in part.values())

    def pack(self, payload: Tensors, memory: Memory, to: int) -> Tensors:
        """Return what of a payload `[1, …]` goes to a neighbour."""
        slot, packed = _slot(memory, to), _beside(payload, memory)
        for of, part in _by_kind(payload, memory).items():
            if not _together(memory, of)[0, slot]:
                packed |= part
                continue
            now, before = _flat(part.values()), _flat(memory[_copy(name)] for name in part)
            changed = (now != before) & ~(now.isnan() & before.isnan())
            values = now.new_zeros(1, sum(map(self.most, part.values())))
            values[0, : int(changed.sum())] = now[changed]
            told = {"number": memory[_last(of)][:, slot], "places": _as_bits(changed), "values": values}
            packed |= {f"choco.{of}.{what}": x for what, x in told.items()}
        return packed

    def unpack(self, came: Tensors, memory: Memory, sender: int) -> Tensors:
        """Return the payload of which this came from a neighbour. Raises WireError where it is none."""
        slot, whole = _slot(memory, sender), {name: x for name, x in came.items() if not name.startswith("choco.")}
        copies = {name: memory[_theirs(name)][:, slot] for name in _adapters(memory)}
        for of in sorted(set(map(kind, copies))):
            if (bits := came.get(f"choco.{of}.places")) is None:
                continue
            number, held = int(came[f"choco.{of}.number"]), int(memory[_last(of)][0, slot])
            if number != held:
                raise WireError(f"choco: changes {of} of round {number} where that of round {held} is held")
            part, values = select(copies, {of}), came[f"choco.{of}.values"]
            flat = _flat(part.values()).clone()
            changed = _from_bits(bits)[:, : flat.shape[1]]
            if (count := int(changed.sum())) > values.shape[1]:
                raise WireError(f"choco: {count} entries of {of} changed where {values.shape[1]} can at most")
            flat[changed] = values[0, :count]
            sizes = [x[0].numel() for x in part.values()]
            whole |= {n: x.view_as(part[n]) for n, x in zip(part, flat.split(sizes, 1), strict=True)}
        return whole


_NUMBER_BYTES = 8


def _copy(name: str) -> str:
    return f"choco.{name}.copy"


def _theirs(name: str) -> str:
    return f"choco.{name}.theirs"


def _round(of: str) -> str:
    return f"choco.{of}.round"


def _last(of: str) -> str:
    return f"choco.{of}.last"


def _adapters(memory: Memory) -> list[str]:
    """Return the names of the adapters of which there are copies, sorted."""
    return sorted(n[len("choco.") : -len(".copy")] for n in memory if n.startswith("choco.") and n.endswith(".copy"))


def _by_kind(payload: Tensors, memory: Memory) -> dict[str, Tensors]:
    """Return the adapters of a payload by kind, in the order of their names."""
    names = [name for name in _adapters(memory) if name in payload]
    return {of: {n: payload[n] for n in names if kind(n) == of} for of in sorted(set(map(kind, names)))}


def _beside(payload: Tensors, memory: Memory) -> Tensors:
    """Return what of a payload there are no copies of."""
    return {name: x for name, x in payload.items() if _copy(name) not in memory}


def _slot(memory: Memory, to: int) -> int:
    """Return where a client's one row of memory has this neighbour."""
    slot: int = memory["choco.near"][0].tolist().index(to)
    return slot


def _together(memory: Memory, of: str) -> Tensor:
    """Return over which edges `[K, D]` both ends hold the other's newest copies of a kind."""
    return memory[_last(of)] == memory[_round(of)][:, None]


def _counted(memory: Memory, weights: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """Return over which edges `[K, D]` the round counted, and where their other ends are among those heard."""
    assert at.heard is not None, "an exchange says who was heard"
    near, heard = memory["choco.near"], at.heard.to(weights.device)
    places = torch.searchsorted(heard, near).clamp(max=len(heard) - 1)
    return (heard[places] == near) & (weights.to_dense().gather(1, places) != 0), places


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.flatten(1) for x in tensors], 1)


_POWERS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _as_bits(chosen: Tensor) -> Tensor:
    """Return `chosen [1, N]` as bits, `[1, ⌈N / 8⌉]` uint8."""
    padded = pad(chosen.to(torch.uint8), (0, -chosen.shape[1] % 8)).unflatten(1, (-1, 8))
    bits: Tensor = (padded * _POWERS.to(chosen.device)).sum(2, dtype=torch.uint8)
    return bits


def _from_bits(bits: Tensor) -> Tensor:
    """Return what such bits say, `[1, 8 · bytes]`."""
    chosen: Tensor = (bits[:, :, None] & _POWERS.to(bits.device)) != 0
    return chosen.flatten(1)
