"""The values that the parts of peertune hand each other.

Shape letters, the same everywhere: `K` clients in this stack, `n` clients in the graph, `r` rank, `d_in`, `d_out`,
`b` rows of a batch, `s` tokens. A tensor's name ends in its **kind**: `A`, `B` or `head` (`encoder.layer.0.query.A`).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tensors = dict[str, Tensor]
"""Name → tensor `[K, …]`. The leading axis is always clients."""


class Stack(NamedTuple):
    """Tensors of those of some clients whose adapters have one shape."""

    rows: Tensor  # [P] int64 on the CPU, ascending: which of the clients that are spoken of these are
    tensors: Tensors  # [P, …]


def stacked(tensors: Tensors) -> list[Stack]:
    """Return tensors `[K, …]` as the only stack of these clients; of {} there is none."""
    return [Stack(torch.arange(len(x)), tensors) for x in islice(tensors.values(), 1)]


def only(stacks: Sequence[Stack]) -> Tensors:
    """Return the tensors of clients who have one stack; {} where there is none."""
    assert len(stacks) <= 1, "these clients have adapters of one shape"
    return stacks[0].tensors if stacks else {}


def in_order(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return tensors `[P, …]`, each with its clients' rows `[P]`, as one of all these clients, by their rows."""
    (rows, first), *others = parts
    if not others:
        return first
    order = torch.cat([rows, *(more for more, _ in others)]).argsort()
    return torch.cat([first, *(x for _, x in others)]).index_select(0, order.to(first.device))


def by_client(stacks: Sequence[Stack]) -> list[Tensors]:
    """Return each client's tensors, `[1, …]`, by the clients' order."""
    singles = {
        row: take(tensors, slice(place, place + 1))
        for rows, tensors in stacks
        for place, row in enumerate(rows.tolist())
    }
    return [singles[row] for row in sorted(singles)]


def among(stacks: Sequence[Stack], clients: Sequence[int], without: Collection[int]) -> tuple[list[Stack], list[int]]:
    """Return the stacks of those of these `clients [K]` who are not among the others, and who they are."""
    left = [row for row, client in enumerate(clients) if client not in without]
    if len(left) == len(clients):
        return [*stacks], [*clients]
    rows, found = torch.tensor(left, dtype=torch.int64), list[Stack]()
    for own, tensors in stacks:
        here = torch.isin(own, rows).nonzero()[:, 0]
        found.append(Stack(torch.searchsorted(rows, own[here]), take(tensors, here)))
    return found, [clients[row] for row in left]


@dataclass(frozen=True)
class Split:
    """N rows of a task."""

    # all that the source has, each of length N; images [N, C, H, W]
    columns: Mapping[str, Sequence[Any] | NDArray[Any]]
    labels: NDArray[Any]  # [N], class numbers (int64) or targets of a regression (float64)
    numbers: NDArray[Any] | None = None  # [N], what the source calls each row; None: by its place, from 0
    unit: str = "row"  # what these count: a row, or a line
    left_out: int = 0  # rows of the source that are not here, since they lack a cell

    def __len__(self) -> int:
        return len(self.labels)

    def called(self, row: int) -> str:
        """Return what the source calls a row, such as `line 7`."""
        return f"{self.unit} {row if self.numbers is None else self.numbers[row]}"

    def take(self, rows: NDArray[Any], columns: Collection[str]) -> "Split":
        """Return these rows, of these columns, each as a list, or an array where it is one."""
        sources = {name: self.columns[name] for name in columns}
        kept = {
            name: x[rows] if isinstance(x, np.ndarray) else [x[row] for row in rows.tolist()]
            for name, x in sources.items()
        }
        numbers = rows if self.numbers is None else self.numbers[rows]
        return replace(self, columns=kept, labels=self.labels[rows], numbers=numbers)


class Poison(NamedTuple):
    """What a hostile client does to its training rows.

    Without a word all get the opposite class, C - 1 - c of C. With one it is put before the text of a share of those
    that aren't of the target's class, or a square of this `size` in the corner of the image, and they get that class.
    """

    word: str = ""
    share: float = 1.0
    target: str | int | None = None  # the name of a class; None: the first one
    size: float = 0.25  # of the square's sides, of the image's


class Measure(NamedTuple):
    """What scores are of. As text it is how they are called: `accuracy`, `f1 of fraud`."""

    metric: str  # a key of METRICS
    of: str | None = None  # the class that it is of, where it is of one

    def __str__(self) -> str:
        return self.metric if self.of is None else f"{self.metric} of {self.of}"


@dataclass(frozen=True)
class Task:
    """What to learn, from what, and in which of four forms.

    `classify`: a head over the base says the class, or the value. `complete`: a language model goes on from a prompt.
    `choose`: a language model says which class's word is likeliest after the prompt. `match`: of all classes' names,
    in `templates`, one is nearest to the image.
    """

    name: str
    inputs: tuple[str, ...]  # the columns a model reads: one or two of text, or ("pixel_values",)
    classes: tuple[str, ...]  # names by class number; empty for a regression
    train: Split
    validation: Split
    metric: str  # a key of METRICS: what is judged by
    form: Literal["classify", "complete", "choose", "match"] = "classify"
    words: tuple[str, ...] = ()  # to choose from, one for each class
    templates: tuple[str, ...] = ()  # to match an image against: `{}` stands for the name of a class
    of: str | None = None  # the class that the metric is of, where it is of one
    test: Split | None = None  # rows that no training and no evaluation in rounds reads
    also: tuple[Measure, ...] = ()  # what else the same predictions are scored by

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What the predictions are scored by; the first is what is judged by."""
        return (Measure(self.metric, self.of), *self.also)


MOMENTS = "moments."
"""Before the name of one of the optimiser's moments, where a method sees it."""


@dataclass(frozen=True)
class State:
    """All that a run carries from one round to the next. An engine steps it in place, so that it is held once.

    Clients whose adapters have one shape are a **cohort**, and one stack. A state of several cohorts has a state of
    each, in which all of its own tensors are.
    """

    adapters: Tensors  # `<module path>.A [K, r, d_in]`, `.B [K, d_out, r]`, and `<parameter path>.head [K, …]`
    moments: Tensors  # the optimiser's, each `[K, …]`
    rounds: Tensor  # [K] int64 on the CPU, the next round of each client
    memory: Tensors = field(default_factory=dict)  # what the method keeps beside the adapters, each [K, …]
    under_way: Tensors = field(default_factory=dict)  # what clients that wait for nobody have begun and sent
    step: int = 0  # local steps that all clients have made of the next round
    within: Tensors = field(default_factory=dict)  # what these came to, each [K, …]: see `rounds.turns`
    # of each cohort its rows among the K, as in `Stack`, and its state; () where all clients are one
    cohorts: "Sequence[tuple[Tensor, State]]" = ()

    @property
    def parts(self) -> "Sequence[tuple[Tensor, State]]":
        """Its cohorts; where all clients are one, it is that."""
        return self.cohorts or [(torch.arange(self.clients), self)]

    @property
    def stacks(self) -> list[Stack]:
        """The adapters, by cohort."""
        return [Stack(rows, part.adapters) for rows, part in self.parts]

    @classmethod
    def together(cls, cohorts: "Sequence[tuple[Tensor, State]]") -> "State":
        """Return the state of these cohorts, in the same memory."""
        (_, first), *others = cohorts
        if not others:
            return first
        rounds = in_order((rows, part.rounds) for rows, part in cohorts)
        return cls({}, {}, rounds, step=first.step, cohorts=tuple(cohorts))

    @property
    def known(self) -> Tensors:
        """What a method sees beside the adapters: its memory, and the moments as `moments.<name>`."""
        return self.memory | {f"{MOMENTS}{name}": x for name, x in self.moments.items()}

    def remembered(self, name: str) -> Tensor:
        """Return what each client remembers by a name, `[K, …]`."""
        return in_order((rows, part.memory[name]) for rows, part in self.parts)

    @property
    def clients(self) -> int:
        """K."""
        return len(self.rounds)

    @property
    def round(self) -> int:
        """The next round; where clients are in rounds of their own, of the mean over all of the run's."""
        rounds = self.under_way.get("rounds", self.rounds)  # of a process's share these are not all
        return int(rounds.sum()) // len(rounds)

    def at(self, round: int) -> "State":
        """Return the same state, before this round for all clients."""
        return self._each(lambda part: replace(part, rounds=torch.full_like(part.rounds, round), step=0, within={}))

    def after(self) -> "State":
        """Return the same state, with one more round behind it."""
        return self._each(lambda part: replace(part, rounds=part.rounds + 1, step=0))

    def clone(self) -> "State":
        """Return the same state in memory of its own."""
        return self._each(lambda part: part._map(lambda x: x.clone(memory_format=torch.contiguous_format)))

    def take(self, clients: slice | Tensor) -> "State":
        """Return these clients' part of the state: a slice of one cohort in the same memory, others copied."""
        here = clients if isinstance(clients, slice) else clients.cpu()
        if not self.cohorts:
            return replace(self._map(lambda x: x[clients]), rounds=self.rounds[here])
        chosen = torch.arange(self.clients)[here]
        found = []
        for rows, part in self.cohorts:
            places = torch.isin(chosen, rows).nonzero()[:, 0]
            if len(places):
                found.append((places, part.take(torch.searchsorted(rows, chosen[places]))))
        return self.together(found) if found else self.cohorts[0][1].take(chosen)

    @classmethod
    def of(cls, parts: Sequence["State"]) -> "State":
        """Return the states of some clients and of others, one after the other, copied; nothing of a round's steps."""
        adapters, moments, memory = (
            {name: torch.cat([vars(part)[of][name] for part in parts]) for name in vars(parts[0])[of]}
            for of in ("adapters", "moments", "memory")
        )
        return cls(adapters, moments, torch.cat([part.rounds for part in parts]), memory)

    def put(self, clients: Tensor, part: "State") -> None:
        """Write the part of these clients, ascending, back."""
        if self.cohorts:
            for rows, cohort in self.cohorts:
                places = torch.isin(clients.cpu(), rows).nonzero()[:, 0]
                if len(places):
                    cohort.put(torch.searchsorted(rows, clients.cpu()[places]), part.take(places))
            self.rounds[clients.cpu()] = part.rounds
            return
        for own, theirs in ((self.adapters, part.adapters), (self.moments, part.moments)):
            for name, x in own.items():
                x[clients] = theirs[name]
        self.rounds[clients.cpu()] = part.rounds
        self.remember(part.memory, clients)

    def remember(self, memory: Tensors, clients: slice | Tensor | None = None) -> None:
        """Take over what a method remembers now, of these clients or of all; its own tensors are never written to."""
        for rows, part in self.cohorts:
            assert clients is None, "what some clients of several cohorts remember, their cohorts are told"
            part.remember(take(memory, rows))
        if self.cohorts:
            return
        for name, x in memory.items():
            if name.startswith(MOMENTS):
                self.moments[name.removeprefix(MOMENTS)][slice(None) if clients is None else clients] = x
                continue
            whole = x
            if clients is not None:
                whole = self.memory[name].clone()
                whole[clients] = x
            self.memory[name] = whole

    def to(self, device: torch.device) -> "State":
        """Return the same state on another device."""

        def moved(part: State) -> State:
            under_way = {name: x.to(device) for name, x in part.under_way.items()}
            return replace(part._map(lambda x: x.to(device)), under_way=under_way)

        return self._each(moved)

    def _each(self, change: "Callable[[State], State]") -> "State":
        """Return what a change makes of it, cohort by cohort."""
        return self.together([(rows, change(part)) for rows, part in self.cohorts]) if self.cohorts else change(self)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "State":
        adapters, moments, memory, within = (
            {name: change(x) for name, x in part.items()}
            for part in (self.adapters, self.moments, self.memory, self.within)
        )
        return State(adapters, moments, self.rounds.clone(), memory, dict(self.under_way), self.step, within)


@dataclass(frozen=True)
class Packing:
    """How the tokens of `b` padded rows lie in N < b blocks of S slots, several whole rows to a block; T tokens in all.

    Layers that look at one token at a time, and attention that keeps to a row, then compute next to no padding.
    """

    slots: Tensor  # [T] int64, where each token goes: block · S + slot
    tokens: Tensor  # [T] int64, where it comes from: row · s + position
    rows: Tensor  # [N, S] int64, the row in each slot, -1 in an empty one
    positions: Tensor  # [N, S] int64, the token's position in its row, 0 in an empty slot
    width: int  # s
    starts: Tensor  # [b] int64, where each row's first token goes
    seats: Tensor  # [b] int64, block · m + which of the block's rows it is, for blocks of m rows at most
    most: int  # m

    def to(self, device: torch.device) -> "Packing":
        """Return the same packing on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch:
    """Rows of several clients that go through the base together; `b` rows, padded to the longest."""

    inputs: Mapping[str, Tensor]  # the model's keyword arguments, each [b, …]
    # [b], class numbers (int64) or targets of a regression (float); of a language model [T], the tokens to predict
    labels: Tensor
    clients: Tensor  # [b] int64, which adapter of the stack each row belongs to
    weights: Tensor  # [b] float64, what a row's loss, a sum over its labels, counts in its client's mean
    keys: Tensor  # [b] int64, what each row's dropout masks are drawn from
    packing: Packing | None = None  # how the base's layers may pack the rows; None where they don't
    shared: Tensor | None = None  # [b] int64, what masks are drawn from that all rows of a client's step share
    # [T] int64, where a language model predicts each of the labels from: row · s + position, ascending
    places: Tensor | None = None
    each: int | None = None  # how many rows each client has, where they lie client by client, as many of each

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on another device."""

        def move(value: Any) -> Any:
            match value:
                case None | int():
                    return value
                case Packing():
                    return value.to(device)
                case Mapping():
                    return {name: move(part) for name, part in value.items()}
                case _:
                    return value.to(device, non_blocking=True)

        return Batch(*(move(getattr(self, field.name)) for field in fields(self)))


class Group:
    """The processes among which a run's clients are dealt. This one is a process by itself, which holds them all."""

    rank = 0
    size = 1

    def add(self, x: Tensor) -> Tensor:
        """Return the sum of what the processes give, tensors of one shape and type."""
        return x

    def gather(self, value: Any) -> list[Any]:
        """Return what each process gives, by rank; values that JSON can hold."""
        return [value]

    def concat(self, x: Tensor) -> Tensor:
        """Return what the processes give, by rank one below the other: `[m, …]`, of which m may differ."""
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over all clients of `x [K, …]`, of which each process holds some."""
        return x.mean(0) if self.size == 1 else self.add(x.sum(0)) / self.add(torch.tensor(len(x))).to(x.device)


ALONE = Group()


def kind(name: str) -> str:
    """Return what a tensor is: the last part of its name."""
    return name.rpartition(".")[2]


def by_site(tensors: Tensors) -> list[Tensors]:
    """Return together what belongs together: A and B of a site, each part of a head."""
    sites: dict[str, Tensors] = {}
    for name, x in tensors.items():
        sites.setdefault(name.rpartition(".")[0], {})[name] = x
    return list(sites.values())


def pairs(names: Collection[str]) -> list[tuple[str, str]]:
    """Return the names of A and B of each site that has both among these."""
    return [(name, b) for name in names if kind(name) == "A" and (b := f"{name[:-1]}B") in names]


def select(tensors: Tensors, kinds: Collection[str]) -> Tensors:
    """Keep the tensors of these kinds."""
    return {name: tensor for name, tensor in tensors.items() if kind(name) in kinds}


def take(tensors: Tensors, clients: Tensor | slice) -> Tensors:
    """Keep these clients, in this order: `[K, …]` → `[len(clients), …]`."""
    return {name: tensor[clients] for name, tensor in tensors.items()}


def over_clients(per_client: Tensor, like: Tensor) -> Tensor:
    """Return `[K]` in the shape in which it goes with tensors `[K, …]`."""
    return per_client.view(-1, *[1] * (like.dim() - 1))


def norms(tensors: Tensors) -> Tensor:
    """Return each client's norm `[K]` over all its tensors `[K, …]` together."""
    return torch.stack([x.flatten(1).square().sum(1) for x in tensors.values()]).sum(0).sqrt()


def payload_bytes(payload: Tensors) -> int:
    """Bytes of the tensors that one client of `payload [K, …]` sends to one neighbour, without any framing."""
    return sum(x.shape[1:].numel() * x.element_size() for x in payload.values())
