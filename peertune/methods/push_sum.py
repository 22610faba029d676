"""Push-sum: a scalar beside the adapters makes averages exact where edges go one way.

A sender splits its mass in equal parts among itself and those that it sends to, by P whose columns sum to 1; x is the
mass of adapters and w that of scalars, `x ← P x` and `w ← P w`, with w = 1 at first. Neither sum ever changes, and all
ratios z = x / w come to the clients' mean. Clients hold, train and send z, with w beside it:
`z_i ← Σ_j R_ij z_j`, `R_ij = P_ij w_j / Σ_j P_ij w_j`. So any mixer serves, with the rows of R as its weights.

Each **kind** has a scalar of its own, which is pushed in the rounds in which that kind is sent. With one for all, the
mean that clients come to would be another where a phase sends some kinds only.

**What others say.** A mass is above 0 and at most all that there is. One who claims more than its own could have its
receivers exceed that, and one who takes mass and gives none could have theirs vanish. So what a client comes to hold is
held within the same limits: nobody becomes such as others refuse.

**What is lost.** A sender tells each receiver running totals of the mass that it has given it. So what a message that
is lost would have brought comes with the next one over the same edge. In a simulation it is enough to hold what is
under way, by receiver and by those senders of whom the recipe plans to lose something: its mass, and its mean.

Source: push-sum (Kempe, Dobra, Gehrke, FOCS 2003), running totals as in robust push-sum (Hadjicostis, Vaidya,
Domínguez-García, IEEE TAC 61, 2016). Differs from stochastic gradient push (arXiv 1811.10792): there a local step
changes x, here it changes z, and counts as much as the client's mass, which is 1 in the mean.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peertune.method import Algorithm, At, Memory, Message, Phase, Weights
from peertune.types import Tensors, kind, select

Lost = Callable[[int], Sequence[tuple[int, int, float]]]
"""Round → (sender, receiver, share of the sender's mass) of each message that is lost in it."""
LARGEST = 1 + 1e-6
"""What part of all mass no client's is above, but for rounding."""

_OWNER = "push."


def pushed(
    algorithm: Algorithm, clients: int, lost: Lost | None = None, lossy: Sequence[Sequence[int]] = ()
) -> Algorithm:
    """Return the method with push-sum in the place of plain averages; the graph's weights are P.

    `lossy` says for each of the clients of whom a message to it may be `lost`. Memory: `push.<kind>.weight [K]`. Where
    something may be lost, D is the longest of these lists, and there are `push.senders [K, D]`, -1 where they are
    fewer, the mass under way `push.<kind>.late [K, D]` and its mean `push.<adapter>.late [K, D, …]`.

    The method sends adapters as they are, and takes the graph's weights (`peertune.assembly.needs`).
    """
    mixer, push = algorithm.mixer, _Push(clients, lost, lossy, max(map(len, lossy), default=0))

    def init(adapters: Tensors, at: At) -> Memory:
        return mixer.init(adapters, at) | push.init(adapters, at)

    def receive(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        late = {name: memory[_late(name)].flatten(0, 1) for name in own if name in heard}
        wider = heard | {name: torch.cat([heard[name], x]) for name, x in late.items()}
        return mixer.receive(own, wider, weights, memory, at, phase)

    changed = mixer._replace(init=init, weigh=push.weigh, receive=receive if push.slots else mixer.receive)
    return algorithm._replace(message=Message(push.send, sound=push.sound), mixer=changed)


class _Push(NamedTuple):
    """What `pushed` is given, and the D slots that a receiver has for what is under way."""

    clients: int
    lost: Lost | None
    lossy: Sequence[Sequence[int]]
    slots: int

    def init(self, adapters: Tensors, at: At) -> Memory:
        device, kinds = next(iter(adapters.values())).device, sorted(set(map(kind, adapters)))
        K, D = len(at.clients), self.slots
        made = {_weight(k): torch.ones(K, dtype=torch.float64, device=device) for k in kinds}
        if D:
            made |= {_late(k): torch.zeros(K, D, dtype=torch.float64, device=device) for k in kinds}
            for name, x in adapters.items():
                made[_late(name)] = x.new_zeros((1, 1, *x.shape[1:])).expand(K, D, *x.shape[1:])
            senders = [[*near, *[-1] * (D - len(near))] for near in (self.lossy[c] for c in at.clients.tolist())]
            made["push.senders"] = torch.tensor(senders, dtype=torch.int64, device=device).view(K, D)
        return made

    def send(self, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        sent = select(adapters, phase.send)
        return sent | {_weight(k): memory[_weight(k)] for k in sorted(set(map(kind, sent)))}, {}

    def sound(self, heard: Tensors) -> Tensor:
        """A mass is above 0, and at most that of all clients."""
        masses = torch.stack([x for name, x in heard.items() if name.startswith(_OWNER)])
        return ((masses > 0) & (masses <= self.clients * LARGEST)).all(0)

    def weigh(
        self, own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Weights, Memory]:
        entries, (K, H) = weights.to_sparse().coalesce(), weights.shape
        (receivers, places), shares = entries.indices(), entries.values()
        slots = self._slots(entries, memory, at) if self.slots else None
        changed, used = Memory(), Memory()
        for k in sorted({kind(name) for name in own if name in heard}):
            w, rows, columns = heard[_weight(k)], receivers, places
            mass = shares * w[places]
            if slots is not None:
                arrives, more = self._late(k, own, heard, memory, slots)
                changed |= more
                slot = torch.arange(arrives.numel(), device=w.device)
                rows, columns = torch.cat([rows, slot // self.slots]), torch.cat([columns, H + slot])
                mass = torch.cat([mass, arrives.flatten()])
            total = mass.new_zeros(K).index_add(0, rows, mass)
            total = total.clamp(min=torch.finfo(total.dtype).tiny)  # of who says that it has none, or no number
            changed[_weight(k)] = total.clamp(max=self.clients)
            at_places, size = torch.stack([rows, columns]), (K, H + K * self.slots)
            R = torch.sparse_coo_tensor(at_places, mass / total[rows], size, check_invariants=False)
            used[k] = R.to_dense() if weights.layout == torch.strided else R.coalesce()
        return {name.rpartition(".")[0]: used[kind(name)] for name in own if name in heard}, changed

    def _slots(self, entries: Tensor, memory: Memory, at: At) -> "_Slots":
        """Look up what became of the round's messages that may be lost."""
        assert at.heard is not None, "an exchange says who was heard"
        (receivers, places), shares = entries.indices(), entries.values()
        K, H = entries.shape
        senders, heard = memory["push.senders"], at.heard.to(entries.device)
        place = torch.searchsorted(heard, senders).clamp(max=max(0, H - 1))
        wanted, keys = torch.arange(K, device=heard.device)[:, None] * H + place, receivers * H + places  # sorted
        entry = torch.searchsorted(keys, wanted).clamp(max=max(0, len(keys) - 1))
        came = (heard[place] == senders) & (keys[entry] == wanted) & (shares[entry] > 0)
        lost, row = torch.zeros_like(came, dtype=shares.dtype), {c: k for k, c in enumerate(at.clients.tolist())}
        for t in set(at.round.tolist()):
            for sender, receiver, share in self.lost(t) if self.lost is not None else ():
                if receiver in row:
                    lost[row[receiver], senders[row[receiver]] == sender] = share
        assert bool((heard[place] == senders)[lost > 0].all()), "an exchange brings what is lost, too"
        return _Slots(place, came, lost)

    def _late(self, k: str, own: Tensors, heard: Tensors, memory: Memory, slots: "_Slots") -> tuple[Tensor, Memory]:
        """Return the mass under way of a kind that arrives, `[K, D]`, and what is under way after the round."""
        before, gone = memory[_late(k)], slots.lost * heard[_weight(k)][slots.place]
        arrives = before * slots.came
        after = before - arrives + gone
        changed = {_late(k): after}
        if bool(gone.any()):
            part = gone / torch.where(gone > 0, after, 1.0)  # of the mass under way, what this round adds
            for name in own:
                if kind(name) == k:
                    mean = memory[_late(name)]
                    share = part.view(*part.shape, *[1] * (mean.dim() - 2)).to(mean.dtype)
                    changed[_late(name)] = mean * (1 - share) + heard[name][slots.place] * share  # lerp may overflow
        return arrives, changed


class _Slots(NamedTuple):
    """What a round did to the receivers' slots, each `[K, D]`."""

    place: Tensor  # of the slot's sender among the heard
    came: Tensor  # whether its message came
    lost: Tensor  # what share of its mass was lost


def _weight(of: str) -> str:
    return f"{_OWNER}{of}.weight"


def _late(of: str) -> str:
    return f"{_OWNER}{of}.late"
