"""What an engine needs to run a recipe, and the one thing that engines do themselves: an exchange."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from peertune.adapters.stacked import StackedModel
from peertune.allowance import Lines
from peertune.method import Algorithm, Phase, standing
from peertune.methods.private import Private
from peertune.rounds import deadline
from peertune.rounds.bounds import Bound, Refusal
from peertune.rounds.clock import Clock, Pushing
from peertune.rounds.record import Evaluation
from peertune.rounds.slices import of_rank
from peertune.rounds.training import Optim
from peertune.rounds.turns import Steps
from peertune.topology import Fault, Graph
from peertune.types import ALONE, Group, Stack, State, Tensors, by_site, only, take


class Heard(NamedTuple):
    """What an exchange brought the K receivers."""

    stacks: Sequence[Stack]  # of the H, as they are read; of the receivers themselves among them
    weights: Tensor  # [K, H], what each receiver takes of each that was heard
    clients: Sequence[int]  # [H], who was heard
    failed: list[tuple[int, int]]  # edges, as records have them, that were active and over which nothing came
    vacant: Sequence[tuple[int, int]] = ()  # and those at whose other end there is nobody
    sent: Sequence[int] | None = None  # [K], to how many each sends, where that is not as many as it hears
    sites: Tensor | None = None  # [H], how many of the last sites each who was heard sends; None: all

    @property
    def tensors(self) -> Tensors:
        """What was heard, `[H, …]`, where all who were have adapters of one shape."""
        return only(self.stacks)


Refuse = Callable[[Sequence[Stack], Tensor, Tensor], list[Refusal]]
"""`refuse(heard, receivers [E], senders [E])`: which of these pairs can't be mixed, by the receivers' state."""


Exchange = Callable[[Sequence[Stack], int, Refuse], Heard]
"""`exchange(payload, round, refuse)`: the only thing in which engines differ. `payload` is of the K, and `refuse` takes
what was read.

What an end refuses counts at neither.
"""


class Pausing(NamedTuple):
    """How often the state within a round is kept, and by whom."""

    every: int  # local steps, counted from the run's start
    keep: Callable[[State], object]  # is told the state of all of a job's clients

    def after(self, round: int, local_steps: int) -> range:
        """Return after how many steps within this round."""
        return range(-round * local_steps % self.every or self.every, local_steps, self.every)


@dataclass(frozen=True)
class Job:
    """All that an engine needs to run a recipe; made by `build`."""

    model: StackedModel
    graph: Graph
    algorithm: Algorithm
    optim: Optim
    steps: Steps
    evaluate: Callable[[Sequence[Stack], Sequence[int]], Evaluation]  # of K clients' adapters, and who they are
    state: State  # where the run starts
    clients: Sequence[int]  # [K], whose state it is: all of the graph's, a process's share of them, or a peer
    rounds: int
    local_steps: int
    evaluate_every: int
    clients_per_pass: int
    bound: Bound | None = None  # what may be mixed; None: everything
    # of K clients' adapters [K, …], each with those it heard in a round: by metric, scores [K]
    ensembles: "Callable[[Tensors, Heard, Sequence[int]], list[list[float]]] | None" = None
    # of K clients' adapters, and who they are: each one's score on its client's own rows [K]; None: nobody asks
    judge_own: "Callable[[Sequence[Stack], Sequence[int]], list[float]] | None" = None
    most_loss: float = inf  # training to a mean loss above it counts as diverged
    private: Private | None = None  # what local steps are held to; None: nothing
    clock: Clock | None = None  # how long things take in virtual time; None: nothing has a time
    pushing: Pushing | None = None  # how clients mix that wait for nobody; None: they go by rounds
    ranks: Sequence[int] = ()  # of all of the graph's clients, where they differ
    pausing: Pausing | None = None  # None: what is kept is kept between rounds
    faults: Sequence[Fault] = ()
    group: Group = ALONE  # the processes that share the clients
    lines: Lines = field(default_factory=Lines, compare=False)  # what is logged of clients

    @property
    def alone(self) -> bool:
        """Whether this is a client without the others, a peer: it takes two to disagree."""
        return self.group.size == 1 == len(self.clients) < self.graph.clients

    def sent(self, kinds: frozenset[str], client: int = -1) -> Tensors:
        """Return what a client sends at the start, `[1, …]`, in a phase that trains and sends these kinds.

        Where ranks differ it is this `client`, whose values are of no account; elsewhere its first one.
        """
        one = self.state.take(slice(0, 1))
        at = standing(self.clients[:1], one.rounds)
        adapters = take(self._like(client), slice(0, 1)) if self.ranks else one.adapters
        return self.algorithm.message.send(adapters, one.known, at, Phase(kinds, kinds))[0]

    @property
    def cuts(self) -> list[int]:
        """The ranks that there are, ascending, where they differ; [] where all clients have one."""
        return sorted(set(self.ranks))

    def read(self, tensors: Tensors, round: int, client: int = -1) -> Tensors:
        """Return what was sent in a round as mixers get it, `[H, …]` both; where ranks differ, of this client's."""
        read = self.algorithm.message.read
        return tensors if read is None else read(self._like(client), tensors, round)

    def _like(self, client: int) -> Tensors:
        """Return adapters of a client's shapes."""
        if not self.ranks:
            return self.state.adapters
        for rows, part in self.state.parts:
            if self.ranks[self.clients[int(rows[0])]] == self.ranks[client]:
                return part.adapters
        return of_rank(self.state.stacks[0].tensors, self.ranks[client])

    @property
    def sites(self) -> int:
        """How many there are, parts of a head among them."""
        return len(by_site(self.state.adapters))

    def reached(self, clients: Sequence[int], rounds: Sequence[int]) -> Tensor | None:
        """Return the number of sites that each local step of these clients reaches until the deadline, `[K, S]`."""
        return deadline.reached(self.clock, clients, rounds, self.local_steps, self.sites)

    @property
    def device(self) -> torch.device:
        """Where the base and the stack are."""
        return next(iter(self.state.stacks[0].tensors.values())).device


CLOCK = "clock.now"
"""What each client's memory holds of virtual time: the nanosecond in which its next round begins, `[K]`."""


ExchangeOf = Callable[[Sequence[int], Sequence[Stack], int, Refuse], Heard]
"""`exchange(clients, payload, round, refuse)`: an exchange that is told which of a job's clients take part."""
