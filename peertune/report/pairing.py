"""Paired differences: rows of a comparison held against others, seed by seed."""

import logging
from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from peertune.errors import RunError

log = logging.getLogger(__name__)

Row = Mapping[str, Any]

OWN = ("own", "own_trained", "own_heard")
"""What a client judges on rows of its own: what it has after mixing, what it trained, the mean of what others sent."""
SCORES = ("mean", "best", *OWN, "average", "best_average", "ensemble", "heard_ensemble", "route", "nll", "ece")
"""Measures of which paired differences are taken."""


def pair(rows: Sequence[dict[str, Any]], keys: Sequence[str], reference: str) -> None:
    """Give each row its differences from its reference, seed by seed."""
    key = next((key for key in keys if any(str(row["by"][key]) == reference for row in rows)), None)
    if key is None:
        values = sorted({str(value) for row in rows for value in row["by"].values()})
        raise RunError(f"--paired-with: no run has {reference}; choose from {', '.join(values)}")
    references = [row for row in rows if str(row["by"][key]) == reference]
    alone = []
    for row in rows:
        partners = [other for other in references if not _apart(row, other, key)]
        if len(partners) > 1:
            raise RunError(
                f"--paired-with: {reference} stands in {len(partners)} rows that {row['by']} could be paired with; "
                "compare fewer runs, or choose --by"
            )
        _hold_against(row, partners[0] if partners and partners[0] is not row else None)
        if not partners:
            alone.append(_in_the_way(row, references, key))
        elif row["paired"] and not set(row["seeds"]) & set(partners[0]["seeds"]):
            alone.append(f"{_named(row)} has seeds {row['seeds']}, and {_named(partners[0])} {partners[0]['seeds']}")
    if len(references) == len(rows):
        raise RunError(f"--paired-with: all rows have {key}={reference}; give runs of another value as well")
    if len(alone) == len(rows) - len(references):
        raise RunError(f"--paired-with: nothing pairs with {reference}: {'; '.join(alone)}")
    for why in alone:
        log.warning("--paired-with: %s; it is left out", why)


def _hold_against(row: dict[str, Any], partner: Row | None) -> None:
    """Give a row its differences from its partner, by each metric."""
    row["paired"] = None if partner is None else differences(row, partner)
    row["_partner"] = partner
    theirs = {} if partner is None else {metric["metric"]: metric for metric in partner["also"]}
    for metric in row["also"]:
        other = theirs.get(metric["metric"])
        metric["paired"] = None if partner is None or other is None else differences(row | metric, {**partner, **other})


def _apart(row: Row, other: Row, key: str) -> list[str]:
    """Return the other keys in which two rows differ; one of the same block may be a setting that one of them lacks."""
    block = key.partition(".")[0]
    pairs = [(k, row["by"][k], other["by"][k]) for k in row["by"] if k != key]
    return [k for k, a, b in pairs if a != b and not (k.partition(".")[0] == block and None in (a, b))]


def _in_the_way(row: Row, references: Sequence[Row], key: str) -> str:
    """Say in which settings the nearest of the references differs from a row that has no partner."""
    nearest = min(references, key=lambda other: len(_apart(row, other, key)))
    keys = _apart(row, nearest, key)
    told = ", ".join(f"{k} is {row['by'][k]} here and {nearest['by'][k]} there" for k in keys)
    return f"{_named(row)} and {_named(nearest)} differ: {told}"


def _named(row: Row) -> str:
    return str(row["runs"][0]) + (f" and {len(row['runs']) - 1} more" if len(row["runs"]) > 1 else "")


def differences(row: Row, partner: Row, measures: Sequence[str] = SCORES) -> dict[str, dict[str, Any]]:
    """Return for each measure what a row of `grouped` differs by from another, seed by seed; see `compare`."""
    theirs = dict(zip(partner["seeds"], partner["_summaries"], strict=True))
    both = [(own, theirs[seed]) for seed, own in zip(row["seeds"], row["_summaries"], strict=True) if seed in theirs]
    found = {}
    for key in measures:
        apart = [own[key] - other[key] for own, other in both if key in own and key in other]
        middle, low, high = interval(apart)
        found[key] = {"difference": middle, "low": low, "high": high, "seeds": len(apart)}
    return found


def interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the mean of values and its 95 % interval by Student's t; None for what they are too few to tell."""
    if not values:
        return None, None, None
    middle = fmean(values)
    if len(values) < 2:
        return middle, None, None
    half = stdtrit(len(values) - 1, 0.975) * stdev(values) / sqrt(len(values))
    return middle, middle - half, middle + half
