"""What a peer does where training diverges right after it mixed: it falls back on what it was before."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from math import inf

from peertune.errors import DivergedError
from peertune.types import State

log = logging.getLogger(__name__)

EXPLODED = 10.0
"""How many times the highest mean loss of all rounds before the loss is, right after mixing, that has exploded."""
LEFT_OUT_ROUNDS = 10
"""For how many rounds a peer takes nothing from whom it mixed before it fell back; twice as many if it does so again.

Of several each returns a round after the last, and whom it mixed without harm since begins anew: so in time one member
that spoils whatever it is mixed into parts a peer from itself, and not from the others.
"""
SUSPECTED_ROUNDS = 10
"""For how many rounds after it mixed something a peer holds that to be why it diverges; later it is training itself."""


class Past:
    """What became of a peer's rounds, and what it has kept.

    `recall(before)` returns the newest state that was kept with fewer than `before` rounds behind it, None where there
    is none; without it there is nothing to fall back on. `name(client)` is what messages call a client.
    """

    def __init__(self, recall: Callable[[int], State | None] | None, name: Callable[[int], str]) -> None:
        self._recall, self._name = recall, name
        self._highest = 0.0
        self._mixed: dict[int, Collection[int]] = {}  # by round, those that were made in order
        self._suspected: Counter[int] = Counter()
        self._left_out: dict[int, int] = {}  # client → until which round
        self._last = (-1, 0)  # the round in which it fell back, and on how many rounds

    @property
    def suspects(self) -> list[tuple[int, int, int]]:
        """Whom it left out, until which round, and how often since it mixed them without harm, by client."""
        return [(client, until, self._suspected[client]) for client, until in sorted(self._left_out.items())]

    def suspect(self, suspects: Iterable[Sequence[int]]) -> None:
        """Take up what `suspects` was before a restart."""
        for client, until, times in suspects:
            self._left_out[client], self._suspected[client] = until, times

    def add(self, round: int, loss: Sequence[float], mixed: Collection[int]) -> None:
        """Take up what a round came to, and from whom it mixed something; whom it mixed in the last did no harm."""
        if self._last[0] != round:
            for client in next(reversed(self._mixed.values()), ()):
                del self._suspected[client]
        else:  # what was mixed into what it fell back from is undone
            self._mixed = {t: clients for t, clients in self._mixed.items() if t < self._last[1]}
        self._highest = max([self._highest, *loss])
        self._mixed[round] = mixed

    def most_loss(self, round: int) -> float:
        """Return what the loss of this round may be: anything unless the last one mixed, or once it has fallen back."""
        last = next(reversed(self._mixed.values()), ())
        return EXPLODED * self._highest if last and self._recall and not self.fell_back_in(round) else inf

    def fell_back_in(self, round: int) -> bool:
        """Return whether this round is made again from an older state."""
        return self._last[0] == round

    def left_out(self, client: int, round: int) -> str:
        """Return why nothing of this client is mixed in this round; "" where it is."""
        until = self._left_out.get(client, 0)
        return f"left out until round {until}: training diverged after it was mixed" if round < until else ""

    def fall_back(self, round: int, error: DivergedError) -> State:
        """Return the newest state of before something was mixed, with which this round is made again.

        Where that diverges as well, the next call returns an older one. Raises the error where nothing was mixed in the
        last rounds, or there is nothing older: then it is training itself that diverges.
        """
        again = self.fell_back_in(round)
        last = max((t for t in list(self._mixed)[-SUSPECTED_ROUNDS:] if self._mixed[t]), default=None)
        if last is None or self._recall is None:
            raise error
        state = self._recall(self._last[1] if again else 1 + last)
        if state is None:
            raise error
        suspects = sorted({client for t, clients in self._mixed.items() if t >= state.round for client in clients})
        for place, client in enumerate(c for c in suspects if self._left_out.get(c, 0) <= round):
            self._left_out[client] = round + LEFT_OUT_ROUNDS * 2 ** self._suspected[client] + place
            self._suspected[client] += 1
        self._last = (round, state.round)
        log.warning(
            "round %d: %s; goes on from what it was before round %d, and for now takes nothing from %s",
            round,
            str(error).partition(";")[0],
            state.round,
            ", ".join(f"{self._name(client)} until round {self._left_out[client]}" for client in suspects),
        )
        return state.clone().at(round)
