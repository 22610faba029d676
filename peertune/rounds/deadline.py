"""A deadline for a round's local steps: what a client that is late has trained then, and what of it is sent.

A backward pass goes from the last site to the first. At the deadline a late client has the gradients of the sites that
its pass has reached: with `salf` it steps these, and the others stay where the step before left them. It sends every
site that it has stepped in the round. A site that it has not reached is a failed edge for that site alone, at both
ends: what it weighs returns to the receiver's own, so that the mean of the clients is kept. With `drop` a late client
keeps its whole steps, and all of its edges fail.

SALF (arXiv 2403.18375) has a server average each layer over those who reached it, and corrects for how seldom that is;
among neighbours there is nothing to correct, since what is missing moves nobody. That a forward pass takes a third of a
step is ours: a backward pass computes twice as much. All sites take the same time. AdamW's count of steps is by kind,
so a kind counts a step of which one of its sites was reached.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf

import torch
from torch import Tensor

from peertune.rounds.clock import Clock
from peertune.types import State, Tensors, by_site, kind, payload_bytes

FORWARD = 1 / 3
"""The share of a local step that its forward pass takes."""


def reached(
    clock: Clock | None, clients: Sequence[int], rounds: Sequence[int], steps: int, sites: int
) -> Tensor | None:
    """Return the number of sites that each of a round's local `steps` reaches until the deadline, `[K, steps]`.

    -1 is a step that is not begun. None where there is no deadline.
    """
    if clock is None or clock.deadline_s == inf:
        return None
    found = torch.full((len(clients), steps), -1, dtype=torch.int64)
    for row, (client, t) in enumerate(zip(clients, rounds, strict=True)):
        for step, share in enumerate(clock.until_deadline(client, range(t * steps, (t + 1) * steps))):
            backward = 1.0 if share == 1 else max(0.0, (share - FORWARD) / (1 - FORWARD)) * (clock.late == "salf")
            found[row, step] = int(backward * sites)
    return found


def sent(clock: Clock, reached: Tensor, sites: int) -> Tensor:
    """Return how many sites each client sends, `[K]`, the last ones: those of its first step, or all or none."""
    return reached[:, 0] if clock.late == "salf" else sites * (reached[:, -1] == sites)


def rows_without(adapters: Tensors, reached: Tensor) -> dict[str, Tensor]:
    """Return for each adapter the rows of clients whose last `reached [K]` sites it is not among.

    Likewise `steps.<kind>`: the rows of those who have reached no site of that kind. What nobody lacks has no name.
    """
    places = {name: place for place, own in enumerate(by_site(adapters)) for name in own}
    last = 1 + max(places.values())
    places |= {f"steps.{kind(name)}": place for name, place in places.items()}  # of the last of its kind
    found = {name: (reached < last - place).nonzero()[:, 0] for name, place in places.items()}
    return {name: rows for name, rows in found.items() if len(rows)}


@contextmanager
def kept(state: State, late: Mapping[str, Tensor]) -> Iterator[None]:
    """Have these rows of adapters, and of their moments, be afterwards what they were."""
    held = []
    for name, x in (state.adapters | state.moments).items() if late else ():
        owner = name if name in late else name.rpartition(".")[0]  # a moment is its adapter's
        if owner in late:
            rows = late[owner].to(x.device)
            held.append((x, rows, x[rows]))
    yield
    for x, rows, before in held:
        x[rows] = before


def begun(reached: Tensor) -> Tensor:
    """Return what a step's measurement weighs in the mean over those that were begun, `[K, steps]`; a row sums to S."""
    here = (reached >= 0).double()
    return here * here.shape[1] / here.sum(1, keepdim=True)


def bytes_sent(payload: Tensors, adapters: Tensors, sent: Sequence[int], messages: Sequence[int]) -> list[int]:
    """Return the bytes of each client's `messages [K]`, which are of so many of the adapters' last sites `[K]`."""
    sizes = [payload_bytes({name: payload[name] for name in own if name in payload}) for own in by_site(adapters)]
    return [sum(sizes[len(sizes) - sites :]) * count for sites, count in zip(sent, messages, strict=True)]
