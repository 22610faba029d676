"""Each client's best adapter so far.

The best is kept in the client's memory, beside what its method keeps there: `best.score [K]`, `best.round [K]`, and
`best.<name>` for each tensor of the adapter. So it is resumed, dealt among processes and given to peers as all else is.
"""

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor

from peertune.data.scores import LOWER_IS_BETTER
from peertune.errors import RunError
from peertune.method import Memory
from peertune.rounds.record import Evaluation
from peertune.types import Stack, State, Tensors, over_clients

_OWNER = "best."
_SCORE, _ROUND = f"{_OWNER}score", f"{_OWNER}round"


def begun(adapters: Tensors) -> Memory:
    """Return what clients with these adapters `[K, …]` keep of the best before the first evaluation."""
    like = next(iter(adapters.values()))
    score = torch.full((len(like),), torch.nan, dtype=torch.float64, device=like.device)
    rounds = torch.full((len(like),), -1, dtype=torch.int64, device=like.device)
    return {_SCORE: score, _ROUND: rounds} | {f"{_OWNER}{name}": x for name, x in adapters.items()}


def part(memory: Memory) -> Memory:
    """Return what of a memory is kept of the best; {} where nothing is."""
    return {name: x for name, x in memory.items() if name.startswith(_OWNER)}


def beside(memory: Memory) -> Memory:
    """Return what of a memory is not kept of the best."""
    return {name: x for name, x in memory.items() if not name.startswith(_OWNER)}


def keep(state: State, clients: Sequence[int], evaluation: Evaluation, round: int) -> list[int]:
    """Take the adapters of those `clients [K]` who never scored better, **in place**.

    Returned is of which round is what is kept of each who was judged. Of equal scores the first stays. A score that is
    not a number is none, and who is hostile has none. [] where no best is kept.
    """
    if _SCORE not in state.parts[0][1].memory:
        return []
    kept = torch.empty(state.clients, dtype=torch.int64)
    scores = dict(zip(evaluation.judged or clients, evaluation.clients, strict=False))
    for rows, part in state.parts:
        own = [scores.get(clients[row], nan) for row in rows.tolist()]
        kept[rows] = _keep(part, own, evaluation.metric, round).cpu()
    return [int(number) for client, number in zip(clients, kept.tolist(), strict=True) if client in scores]


def _keep(state: State, clients: Sequence[float], metric: str, round: int) -> Tensor:
    """Do so for one cohort, whose clients scored so; return whose round is kept, `[K]`."""
    best, rounds = state.memory[_SCORE], state.memory[_ROUND]
    scores = torch.tensor(clients, dtype=best.dtype, device=best.device)
    ahead = scores < best if metric in LOWER_IS_BETTER else scores > best
    better = ahead | (best.isnan() & ~scores.isnan())
    best[better], rounds[better] = scores[better], round
    for name, x in state.adapters.items():
        state.memory[f"{_OWNER}{name}"][better] = x[better]
    return rounds


def kept(state: State, *, last: bool = False) -> tuple[list[Stack], list[int]]:
    """Return each client's best adapter, and the round of each, `[K]`; where none was kept the last, and [].

    Who was never evaluated has its last adapter, and the round -1. Where best ones were kept the `last` can be asked
    for; RunError where none were.
    """
    if _SCORE not in state.parts[0][1].memory:
        if last:
            raise RunError("the run kept no best adapters, so all that it has are its last ones; leave out --last")
        return state.stacks, []
    if last:
        return state.stacks, []
    rounds = state.remembered(_ROUND)
    return [Stack(rows, _best(part)) for rows, part in state.parts], [int(number) for number in rounds.tolist()]


def _best(state: State) -> Tensors:
    """Return the best adapters of one cohort's clients, `[K, …]`."""
    none = state.memory[_ROUND] < 0
    best = {name: state.memory[f"{_OWNER}{name}"] for name in state.adapters}
    if bool(none.any()):
        best = {name: torch.where(over_clients(none, x), state.adapters[name], x) for name, x in best.items()}
    return best
