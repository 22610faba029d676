"""What a method is: four small values that share a memory.

A **schedule** says which kinds train and travel, a **local** what a local step follows, a **message** what is sent and
how it is read, a **mixer** what becomes of what was heard. Each is a few pure functions; `Algorithm` holds one of each.
A *modifier* is a function from one of the four to the same kind, so its place is its type: `half(message)`.

**Memory** is what clients keep beside their adapters, tensors `[K, …]` by client. All four see all of it. A name is
`<owner>.<name>`. Its owner makes it in `init`, and returns it from any of its functions where it changes. What is kept
by edge is `[K, D, …]`, with the neighbours' numbers in another tensor. An engine deals memory among processes, keeps it
in checkpoints, and gives it to peers, without knowing what it means. The optimiser's moments show as `moments.<name>`;
what a message or a mixer returns under these names is written into them.

A call is for the K clients of `at`, a whole run's or one peer's. A client's result depends on its own row and on what
it heard, never on who else is in the call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from peertune.types import Stack, Tensors, select

Memory = Tensors
"""`<owner>.<name>` → `[K, …]`."""


class Phase(NamedTuple):
    """What one round does."""

    train: frozenset[str]  # kinds that get gradients
    send: frozenset[str]  # kinds on the wire; the others stay bit for bit


class At(NamedTuple):
    """Where each client stands; every keyed draw is made from this. All of it is on the CPU."""

    clients: Tensor  # [K] int64, their numbers
    round: Tensor  # [K] int64, each client's own; equal where rounds are synchronous
    step: Tensor  # [K] int64, local steps since the run's start
    heard: Tensor | None = None  # [H] int64, who was heard, where something was
    ranks: Tensor | None = None  # [H] int64, of each who was heard, where they differ


def standing(clients: Sequence[int], rounds: Tensor, local_steps: int = 1) -> At:
    """Return where the `clients [K]` stand at the beginning of these `rounds [K]`."""
    return At(torch.tensor(clients, dtype=torch.int64), rounds, rounds * local_steps)


class Gradient(Protocol):
    """The gradient of one local step, at any adapters, of each client's mean loss over its rows."""

    def __call__(self, adapters: Tensors, /) -> Tensors:
        """Return the gradients `[K, …]` of the kinds that train."""
        ...

    def clipped(self, adapters: Tensors, max_norm: float, /) -> Tensors:
        """Return the sum of the gradients of each client's rows, each of a row's own loss and of this norm at most."""
        ...


def nothing(adapters: Tensors, at: At) -> Memory:
    """Keep nothing beside the adapters."""
    return {}


def descent(
    gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
) -> tuple[Tensors, Memory]:
    """Follow the gradient."""
    return gradient(adapters), {}


def stay(start: Tensors, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
    """Leave the adapters as local steps left them."""
    return {}, {}


def adapters_as_they_are(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
    """Send the kinds that the phase sends."""
    return select(adapters, phase.send), {}


def plain_weights(
    own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
) -> tuple[Tensor, Memory]:
    """Take the graph's weights."""
    return weights, {}


class Schedule(NamedTuple):
    """Which kinds each client trains and sends.

    `phases(memory, at)` returns K phases. One that depends on memory has an `init`; one without is a function of the
    round alone, and `Algorithm.phase` has it. Clients may disagree on what trains, and must agree on what is sent.
    Phases are asked for where a round begins, and again where a run goes on within it: no local step changes what they
    depend on.
    """

    phases: Callable[[Memory, At], list[Phase]]
    init: Callable[[Tensors, At], Memory] = nothing
    needs: frozenset[str] = frozenset()


class Local(NamedTuple):
    """What local steps follow.

    `gradients(gradient, adapters, start, memory, at, phase)` returns what a step follows, and is called at each; kinds
    that it leaves out aren't stepped. It may call `gradient` several times: a run's loss is that of the first call.
    `end(start, adapters, memory, at, phase)` is called after the last step and returns adapters that change. `start` is
    what the round began with, of the kinds that train, where `keeps_start` asks for a copy, and {} elsewhere.
    All clients of a call are at one step where `one_step` asks for it; elsewhere each may be at its own.
    Training to what isn't finite fails, but where `end` `takes_any`, and makes something finite of whatever came.
    """

    gradients: Callable[[Gradient, Tensors, Tensors, Memory, At, Phase], tuple[Tensors, Memory]] = descent
    end: Callable[[Tensors, Tensors, Memory, At, Phase], tuple[Tensors, Memory]] = stay
    keeps_start: bool = False
    one_step: bool = False
    takes_any: bool = False
    init: Callable[[Tensors, At], Memory] = nothing
    needs: frozenset[str] = frozenset()


class Edgewise(NamedTuple):
    """What goes over an edge in the place of a payload, where both ends hold what went over it before.

    `pack(payload, memory, to)` returns what of a client's payload `[1, …]` goes to a neighbour, and
    `unpack(came, memory, sender)` the payload of which this came from one; it raises WireError for what can't be.
    What comes has the shapes of what goes. `packed_bytes(payload, memory)` is how much goes over an edge both of whose
    ends hold something, and `bytes_sent(payload, memory, weights, at)` how much each of K clients sends over all of its
    edges that count, those of non-zero `weights [K, H]`.
    """

    pack: Callable[[Tensors, Memory, int], Tensors]
    unpack: Callable[[Tensors, Memory, int], Tensors]
    packed_bytes: Callable[[Tensors, Memory], int]
    bytes_sent: Callable[[Tensors, Memory, Tensor, At], list[int]]


class Message(NamedTuple):
    """What is sent, and how it is read.

    `send(adapters, memory, at, phase)` returns tensors `[K, …]`: under an adapter's name what stands for it, and
    anything else that a mixer's `weigh` wants. A phase that sends no kind sends nothing.
    `read(like, heard, round)` returns the tensors `[H, …]` that a mixer gets, of as many senders as `heard` has; `like`
    are adapters of the receiver's shapes and types.
    `layout(own, client, phase)` returns what a client sends, `[1, …]` on the meta device, if that has other shapes or
    types than `own`, what the receiver sends. Receivers hold every byte that comes against it.
    `settle(memory, heard, weights, at, phase)` is told what was heard, and over which edges the round counted, by
    non-zero `weights [K, H]`, at both of their ends alike. So what an edge that failed has lost can be sent again.
    `edgewise` says how less than what was sent goes over an edge both of whose ends remember.
    `sound(heard)` tells of each sender, `[H]`, whether an honest client may have sent this.
    `honest(adapters, memory, at, phase)` returns what those would have sent, by their rows among the K, who send
    something else than they have. They mix as if that had been sent.
    If reading what was sent isn't `exact`, differences are mixed: see `peertune.rounds.mixing`. If what is read isn't
    `whole`, it has zeros for entries that were not sent, and each entry is mixed by itself.
    """

    send: Callable[[Tensors, Memory, At, Phase], tuple[Tensors, Memory]] = adapters_as_they_are
    read: Callable[[Tensors, Tensors, int], Tensors] | None = None
    layout: Callable[[Tensors, int, Phase], Tensors] | None = None
    settle: Callable[[Memory, Tensors, Tensor, At, Phase], Memory] | None = None
    edgewise: Edgewise | None = None
    sound: Callable[[Tensors], Tensor] | None = None
    honest: Callable[[Tensors, Memory, At, Phase], Stack] | None = None
    exact: bool = True
    whole: bool = True
    init: Callable[[Tensors, At], Memory] = nothing
    needs: frozenset[str] = frozenset()


Weights = Tensor | Mapping[str, Tensor]
"""`[R, H]`, dense or sparse: row i holds what receiver i takes of each that was heard, its own among them. One for all
sites, or one by site."""


class Mixer(NamedTuple):
    """What becomes of what was heard.

    `weigh(own, heard, weights, memory, at, phase)` sees whole adapters `[K, …]` and `[H, …]` and returns the weights to
    mix with, those of the graph or others. Where only memory is to change, this is the place.
    `receive(own, heard, weights, memory, at, phase)` is called for one site at a time and returns its new adapters;
    `heard` holds the kinds that were sent, and what travels beside them as `<owner>.<adapter>.…`. All other kinds come
    back as the very tensors of `own`.

    `ranks` says how adapters of unequal ranks come to `receive`. In "slices" of rows of A and of columns of B, cut
    wherever somebody's rank ends: each is a site of its own, mixed among the clients that have it. `lacking` says who
    gets the weight of those that don't: the receiver's "own", or "all" that have it, in proportion. Or "whole", once
    for the receivers of each rank r: `own` and what is returned have A `[R, r, d_in]` and B `[R, d_out, r]`. `heard`
    has A `[H, m, d_in]` and B `[H, d_out, m]`, m the largest rank of all, with zeros beyond a sender's own, which
    `at.ranks` tells. ΔW is B A times a factor that is the same for all.
    """

    receive: Callable[[Tensors, Tensors, Tensor, Memory, At, Phase], tuple[Tensors, Memory]]
    weigh: Callable[[Tensors, Tensors, Tensor, Memory, At, Phase], tuple[Weights, Memory]] = plain_weights
    init: Callable[[Tensors, At], Memory] = nothing
    needs: frozenset[str] = frozenset()
    keeps_basis: bool = True  # whether what memory says of an adapter's entries is true of them after mixing
    by_entry: bool = True  # whether each entry is mixed by itself
    ranks: Literal["slices", "whole"] = "slices"  # how adapters of unequal ranks are received
    lacking: Literal["own", "all"] = "own"  # who gets the weight of those that lack a slice


class Algorithm(NamedTuple):
    """A method. `settings` are the arguments that made it, with everything automatic resolved."""

    schedule: Schedule
    mixer: Mixer
    local: Local = Local()  # which can't be changed
    message: Message = Message()
    settings: Mapping[str, object] = {}  # which nobody writes to

    @property
    def needs(self) -> frozenset[str]:
        """What a recipe must have for it: keys of `peertune.assembly.needs.NEEDS`."""
        return frozenset().union(*(part.needs for part in self[:4]))

    def init(self, adapters: Tensors, at: At) -> Memory:
        """Return what clients with these adapters `[K, …]` remember where they begin."""
        made = [part.init(adapters, at) for part in self[:4]]
        memory = {name: x for part in made for name, x in part.items()}
        assert len(memory) == sum(map(len, made)), "a name of memory has one owner"
        return memory

    def phase(self, round: int) -> Phase:
        """Return the phase of a client that has heard nothing."""
        at = standing([0], torch.tensor([round]))
        return self.schedule.phases(self.schedule.init({}, at), at)[0]
