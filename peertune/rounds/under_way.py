"""What clients that wait for nobody have begun and sent, and the same as tensors: `State.under_way`.

All of it is somebody's: a message is its receiver's, and a training its client's. So it can be dealt among processes.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from peertune.types import State, Tensors

T = TypeVar("T")


class Sent(NamedTuple):
    """What a client sent after a training."""

    sender: int
    version: int  # the sender's own round
    degree: int  # to how many it was sent
    began: int  # when its training began
    tensors: Tensors  # [1, …], as they are read


class Done(NamedTuple):
    """A training that is computed and has not ended: what its client holds when it does, `[1, …]`."""

    state: State
    loss: float
    grad_norm: float


@dataclass
class UnderWay:
    """What is under way to some clients, and at them."""

    # receiver → sender → what comes when, in this order
    mail: dict[int, dict[int, list[tuple[int, Sent]]]] = field(default_factory=dict)
    done: dict[int, Done] = field(default_factory=dict)
    started: dict[int, Tensors] = field(default_factory=dict)  # what those train from who met somebody since, [1, …]

    def send(self, receiver: int, sent: Sent, now: int, arrives: int) -> None:
        """Put a message on its way; of what has come by now a mailbox holds each neighbour's newest alone."""
        coming = self.mail.setdefault(receiver, {}).setdefault(sent.sender, [])
        coming.append((arrives, sent))
        del coming[: max(0, _here(coming, now) - 1)]

    def open(self, receiver: int, now: int) -> list[Sent]:
        """Return the newest message of each neighbour that has come, by sender, and empty the mailbox of what has."""
        found = []
        for _, coming in sorted(self.mail.get(receiver, {}).items()):
            if here := _here(coming, now):
                found.append(coming[here - 1][1])
                del coming[:here]
        return found

    def packed(self, rounds: Tensor) -> Tensors:
        """Return it as tensors, with the trainings `rounds [n]` that each of the run's clients has ended."""
        coming = [
            (receiver, at, sent)
            for receiver, mail in sorted(self.mail.items())
            for _, each in sorted(mail.items())
            for at, sent in each
        ]
        posts = {(sent.sender, sent.version): sent for _, _, sent in coming}
        place = {key: at for at, key in enumerate(posts)}
        messages = [(receiver, place[sent.sender, sent.version], at) for receiver, at, sent in coming]
        found = {
            "rounds": rounds,
            "messages": torch.tensor(messages, dtype=torch.int64).view(-1, 3),
            "posts": torch.tensor([sent[:4] for sent in posts.values()], dtype=torch.int64).view(-1, 4),
            "done": torch.tensor([*self.done], dtype=torch.int64),
            "started": torch.tensor([*self.started], dtype=torch.int64),
        }
        parts = {"post": _below([sent.tensors for sent in posts.values()]), "started": _below(self.started.values())}
        if self.done:
            done = State.of([one.state for one in self.done.values()])
            measured = [(one.loss, one.grad_norm) for one in self.done.values()]
            found["measured"] = torch.tensor(measured, dtype=torch.float64)
            parts |= {"adapters": done.adapters, "moments": done.moments, "memory": done.memory}
        return found | {f"{part}/{name}": x for part, xs in parts.items() for name, x in xs.items()}

    @classmethod
    def of(cls, found: Tensors, names: Iterable[str] = ()) -> "UnderWay":
        """Return what was `packed`, with tensors in the order of these names: norms then add up to the same bits."""
        under_way = cls()
        if not found:
            return under_way
        order = {name: at for at, name in enumerate(names)}
        parts: dict[str, Tensors] = {part: {} for part in ("post", "started", "adapters", "moments", "memory")}
        for key in sorted(found, key=lambda key: order.get(key.partition("/")[2], 0)):
            part, _, name = key.partition("/")
            if name:
                parts[part][name] = found[key]

        def row(part: str, at: int) -> Tensors:
            return {name: x[at : at + 1] for name, x in parts[part].items()}

        posts = [
            Sent(sender, version, degree, began, row("post", at))
            for at, (sender, version, degree, began) in enumerate(found["posts"].tolist())
        ]
        for receiver, at, arrives in found["messages"].tolist():
            under_way.mail.setdefault(receiver, {}).setdefault(posts[at].sender, []).append((arrives, posts[at]))
        for at, client in enumerate(found["started"].tolist()):
            under_way.started[client] = {name: x.clone() for name, x in row("started", at).items()}
        for at, client in enumerate(found["done"].tolist()):
            rounds = found["rounds"][client : client + 1].cpu()
            state = State(row("adapters", at), row("moments", at), rounds, row("memory", at))
            under_way.done[client] = Done(state, *found["measured"][at].tolist())
        return under_way


def dealt(shards: Sequence[Tensors], clients: Collection[int]) -> Tensors:
    """Return what these clients have of what several processes `packed`; {} where clients go by rounds."""
    held = [shard for shard in shards if shard]
    if not held:
        return {}
    own = UnderWay()
    for whole in map(UnderWay.of, held):
        own.mail |= _of(whole.mail, clients)
        own.done |= _of(whole.done, clients)
        own.started |= _of(whole.started, clients)
    return own.packed(held[0]["rounds"])


def _of(held: dict[int, T], clients: Collection[int]) -> dict[int, T]:
    return {client: x for client, x in held.items() if client in clients}


def _here(coming: Sequence[tuple[int, Sent]], now: int) -> int:
    """Return how many of some messages have come."""
    return bisect_right(coming, now, key=lambda message: message[0])


def _below(parts: Collection[Tensors]) -> Tensors:
    """Return tensors of several clients one below the other."""
    names = next(iter(parts), {})
    return {name: torch.cat([part[name] for part in parts]) for name in names}
