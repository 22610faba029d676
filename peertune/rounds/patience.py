"""When a run ends early: clients' mean score has not improved for some evaluations.

It follows from the records, and from nothing else. So a run that is resumed counts on, and who looks at a run sees why
it ended. Knows no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import inf, isnan
from statistics import fmean
from typing import Any, NamedTuple

from peertune.data.scores import LOWER_IS_BETTER


class Seen(NamedTuple):
    """An evaluation."""

    round: int
    worth: float  # the mean score, with the sign by which more is better


class RanOut(NamedTuple):
    """Patience that ran out."""

    round: int  # in which it did
    best: int  # in which the mean score was best


def seen(record: Mapping[str, Any], every: int) -> list[Seen]:
    """Return the evaluation of a record, as JSON has it, where one was due after `every` rounds.

    That of a last round which was none of these does not count: a run with more rounds would not have it.
    """
    found = record["evaluation"]
    if found is None or (record["round"] + 1) % every:
        return []
    mean = fmean(found["clients"])
    worth = -mean if found["metric"] in LOWER_IS_BETTER else mean
    return [Seen(record["round"], -inf if isnan(worth) else worth)]


def ran_out(evaluations: Sequence[Seen], patience: int | None) -> RanOut | None:
    """Return where patience ran out: the last `patience` evaluations are no better than the best before them."""
    if patience is None or len(evaluations) <= patience:
        return None
    best = max(evaluations, key=lambda one: one.worth)  # the first of equals
    if len(evaluations) - 1 - evaluations.index(best) < patience:
        return None
    return RanOut(evaluations[-1].round, best.round)


def ended_early(records: Iterable[Mapping[str, Any]], evaluate: Mapping[str, Any]) -> RanOut | None:
    """Return where a run with these records ended early, by its recipe's block `evaluate`; None where it did not."""
    evaluations = [one for record in records for one in seen(record, evaluate.get("every", 1))]
    return ran_out(evaluations, evaluate.get("patience"))
