"""Which setting is best, by which measure, and whether its lead is more than the seeds' noise."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

from scipy.special import stdtrit

from peertune.data.scores import LOWER_IS_BETTER
from peertune.report.pairing import Row, differences
from peertune.report.tables import by_metric, headings

MEASURES = {"mean": "the clients' own models", "own": "their own rows", "average": "the averaged adapter"}
"""What is judged → in words."""
MOST_SEEDS = 200


class Verdict(NamedTuple):
    """What is best of rows that differ in their method, or in anything where all have one method."""

    where: Mapping[str, Any]  # the settings that these rows share and others don't
    measure: str  # a key of MEASURES
    best: str
    score: float
    next: str  # the second
    lead: Mapping[str, Any]  # over the second, as `paired` of `tables.compare`, and above 0 if better
    seeds_needed: int | None  # in all, for this lead to be surely one; None where it is, or no number would do
    metric: str | None = None  # of several; None where there is one

    @property
    def sure(self) -> bool:
        """Whether the interval of the lead leaves out 0."""
        low, high = self.lead["low"], self.lead["high"]
        return low is not None and not low <= 0 <= high

    def __str__(self) -> str:
        names = zip(headings(list(self.where)), self.where.values(), strict=True)
        at = "".join(f"{heading} {value}, " for heading, value in names)
        digits = 3 if self.lead["seeds"] == 1 else 2
        by = "" if self.metric is None else f"{self.metric}, "
        told = f"{by}{at}{MEASURES[self.measure]}: {self.best} is best, {self.score:.{digits}f}"
        if self.lead["difference"] is None:
            return f"{told}; {self.next} is next, and has no seed in common with it"
        told = f"{told}, by {self.lead['difference']:.3f} before {self.next}"
        if self.lead["low"] is None:
            return f"{told}; one seed can't tell whether that is noise"
        told += f" [{self.lead['low']:.3f}, {self.lead['high']:.3f}]"
        if self.sure:
            return f"{told}: more than the noise of {self.lead['seeds']} seeds"
        more = "" if self.seeds_needed is None else f", about {self.seeds_needed - self.lead['seeds']} more would"
        return f"{told}: not enough seeds to tell{more}"


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Put rows in the order of what they are tried on, as it came, and there by their `mean`, the best first."""

    def place(row: Row) -> tuple[int, bool, float]:
        score, sign = row["measures"]["mean"]["mean"], 1 if row["metric"] in LOWER_IS_BETTER else -1
        return order.index(_tried_on(row)), score is None, sign * (score or 0.0)

    order = list(dict.fromkeys(map(_tried_on, rows)))
    return sorted(rows, key=place)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Judge rows of `tables.grouped`: by each metric, and each measure that all of them have, the best and the second.

    Rows that differ in another block than the algorithm's are judged apart, where methods differ. The interval is
    Student's, 95 %, of differences seed by seed; `seeds_needed` takes their mean and deviation for the true ones.
    """
    others = by_metric(rows)
    if not others:
        return _by_one(rows, None)
    return [verdict for name, alike in [(rows[0]["metric"], rows), *others] for verdict in _by_one(alike, name)]


def _by_one(rows: Sequence[Row], metric: str | None) -> list[Verdict]:
    """Judge rows by one metric, named where there are several."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_tried_on(row), []).append(row)
    if all(len(members) < 2 for members in groups.values()):
        groups = {(): list(rows)}
    found = []
    for members in groups.values():
        shared = {key: value for key, value in members[0]["by"].items() if len(groups) > 1 and not _of_method(key)}
        judged = [key for key in MEASURES if all(row["measures"][key]["mean"] is not None for row in members)]
        if all(row["measures"]["own"] == row["measures"]["mean"] for row in members):
            judged = [key for key in judged if key != "own"]
        found += [_judge(members, key, shared)._replace(metric=metric) for key in judged if len(members) > 1]
    return found


def _of_method(key: str) -> bool:
    """Whether a key of a recipe says what the method is, and not on what it is tried."""
    return key.partition(".")[0] in ("algorithm", "modifiers")


def _tried_on(row: Row) -> tuple[str, ...]:
    """Return what a row's settings but the method's are."""
    return tuple(repr(value) for key, value in row["by"].items() if not _of_method(key))


def _judge(rows: Sequence[Row], measure: str, shared: Mapping[str, Any]) -> Verdict:
    lower = rows[0]["metric"] in LOWER_IS_BETTER
    ranked = sorted(rows, key=lambda row: row["measures"][measure]["mean"], reverse=not lower)
    best, second = ranked[:2]
    lead = differences(best, second)[measure]
    if lower and lead["low"] is not None:
        lead |= {"low": -lead["high"], "high": -lead["low"]}
    if lower and lead["difference"] is not None:
        lead["difference"] = -lead["difference"]
    names = [", ".join(str(value) for key, value in row["by"].items() if key not in shared) for row in (best, second)]
    score = best["measures"][measure]["mean"]
    return Verdict(shared, measure, names[0], score, names[1], lead, _seeds_needed(lead))


def _seeds_needed(lead: Mapping[str, Any]) -> int | None:
    """Return the least number of seeds whose interval would leave out 0; None where this many do, or none would."""
    if lead["low"] is None or lead["low"] > 0 or lead["high"] < 0:
        return None
    n = lead["seeds"]
    deviation = (lead["high"] - lead["difference"]) * sqrt(n) / stdtrit(n - 1, 0.975)
    for more in range(n + 1, MOST_SEEDS + 1):
        if abs(lead["difference"]) > stdtrit(more - 1, 0.975) * deviation / sqrt(more):
            return more
    return None
