"""Runs by what their scores cost: what it took to reach a score, and how good they were within a budget."""

import logging
from collections.abc import Collection, Mapping, Sequence
from math import inf, isfinite
from statistics import fmean, median
from typing import Any

from peertune.data.scores import LOWER_IS_BETTER
from peertune.errors import RunError
from peertune.report.pairing import Row, differences
from peertune.report.runs import RunData
from peertune.report.spending import Spent, spent, timed
from peertune.report.tables import (
    MEASURES,
    by_metric,
    headings,
    over_seeds,
    pooled_form,
    setting_cells,
    summarise,
    with_interval,
    with_spread,
)

log = logging.getLogger(__name__)

COSTS = {
    "rounds": "rounds",
    "megabytes_sent": MEASURES["megabytes_sent"],
    "virtual_seconds": MEASURES["virtual_seconds"],
}
"""What a score costs: field of `Spent` → heading."""
BEST = ("best", "best_average")
"""What is compared within a budget, and paired."""
_ROUNDING = 1e-9  # a mean over clients may lie this far below what it is


def reach(rows: Sequence[Row], runs: Sequence[RunData], to: float) -> list[Row]:
    """Return rows of `grouped` with what it took until the mean of the clients' own models was first as good as `to`.

    That is by the first metric, at least `to`, or at most where lower is better, in rounds that were evaluated. Each
    row has `to`: the `score`, how many `runs` there are, how many `reached` it, and what each spent until then, `each`
    (None where it never did); `measures`, for rounds, megabytes sent by a client and virtual seconds, where the row's
    runs have times, the `median` over seeds, the `least` and the `most`. A run that never reached it counts as later
    than all that did. So there is a median where more than half of the runs reached it, and a `most` where all did;
    elsewhere None. `paired`, of rows that are paired, has differences of means over the seeds in which both reached it,
    as `compare`, and `seeds`, in how many both ran.
    """
    if not isfinite(to):
        raise RunError(f"--to: {to} is no score; give a number such as 0.8")
    found = {run.name: _first(run.records, to) for run in runs}
    in_time = {run.name for run in runs if run.records and timed(run.records)}
    return [{**row, "to": _reached(row, found, to, in_time.issuperset(row["runs"]))} for row in rows]


def _first(records: Sequence[Mapping[str, Any]], to: float) -> dict[str, float]:
    """Return what was spent until the score was first reached; {} where it never was."""
    for record, until in zip(records, spent(records), strict=True):
        if evaluation := record["evaluation"]:
            sign = -1 if evaluation["metric"] in LOWER_IS_BETTER else 1
            if sign * (fmean(evaluation["clients"]) - to) >= -_ROUNDING:
                return _known(until)
    return {}


def _known(until: Spent) -> dict[str, float]:
    return {key: value for key, value in until._asdict().items() if value is not None}


def _reached(row: Row, found: Mapping[str, Mapping[str, float]], to: float, in_time: bool) -> dict[str, Any]:
    each = [found[name] for name in row["runs"]]
    measures = {}
    for key in COSTS if in_time else [key for key in COSTS if key != "virtual_seconds"]:
        values = [one.get(key, inf) for one in each]
        over = {"median": median(values), "least": min(values), "most": max(values)}
        measures[key] = {name: value if value < inf else None for name, value in over.items()}
    return {
        "score": to,
        "runs": len(each),
        "reached": sum(map(bool, each)),
        "each": [one or None for one in each],
        "measures": measures,
        "paired": _paired(row, found, tuple(COSTS)),
    }


def _paired(row: Row, found: Mapping[str, Row], measures: Sequence[str]) -> dict[str, Any] | None:
    """Return a row's differences from its partner by the summaries of their runs, and how many seeds both ran."""
    partner = row.get("_partner")
    if partner is None:
        return None
    own, other = ({**one, "_summaries": [found[name] for name in one["runs"]]} for one in (row, partner))
    return {"seeds": len({*row["seeds"]} & {*partner["seeds"]}), **differences(own, other, measures)}


def limit(
    rows: Sequence[Row], runs: Sequence[RunData], megabytes_sent: float = inf, virtual_seconds: float = inf
) -> list[Row]:
    """Return rows of `grouped` with the best that their runs had been when no more was spent.

    `megabytes_sent` are a client's, in the mean over clients. Each row has `within`, and so has each of `also`: the
    `limits`, how many `runs` there are and how many were `evaluated` within the limits, and over these `measures`: the
    `mean` and `std` over seeds of `best` and `best_average`, as `compare` has them, and of what had been spent at the
    last evaluation within. `paired`, of rows that are paired, has differences of the two over the seeds in which both
    were evaluated, and `seeds`, in how many both ran.

    Raises:
        RunError: A limit isn't above 0, or is of time and a run has none.

    """
    for name, value in (("--budget", megabytes_sent), ("--within", virtual_seconds)):
        if not value > 0:
            raise RunError(f"{name}: {value} is out of range; give a number above 0")
    if virtual_seconds < inf and (without := [run.name for run in runs if not timed(run.records)]):
        other = next((f", and {run.name} has some" for run in runs if run.name not in without), "")
        raise RunError(f"--within: {without[0]} has no virtual times{other}; give runs of recipes with time.step_s")
    limits = {"megabytes_sent": megabytes_sent, "virtual_seconds": virtual_seconds}
    found = {run.name: _best(run.records, limits) for run in runs}
    if none := [name for name, summary in found.items() if not summary]:
        more = f" and {len(none) - 1} more have" if len(none) > 1 else " has"
        log.warning("%s%s no evaluation within %s", none[0], more, _spendable(limits))
    return [
        {
            **row,
            "within": _limited(row, found, limits),
            "also": [
                {
                    **metric,
                    "within": _limited(row, {run: _of_metric(x, metric["metric"]) for run, x in found.items()}, limits),
                }
                for metric in row["also"]
            ],
        }
        for row in rows
    ]


def _spendable(limits: Mapping[str, float | None]) -> str:
    words = {"megabytes_sent": "MB sent by a client", "virtual_seconds": "virtual seconds"}
    return " and ".join(f"{limits[key]:g} {words[key]}" for key in words if limits[key] not in (None, inf))


def _best(records: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> dict[str, Any]:
    """Summarise the records up to the last evaluation within the limits; {} where there is none."""
    last, until = -1, None
    for place, (record, so_far) in enumerate(zip(records, spent(records), strict=True)):
        used = _known(so_far)
        if record["evaluation"] and all(used.get(key, 0) <= most * (1 + _ROUNDING) for key, most in limits.items()):
            last, until = place, used
    return {} if until is None else {**summarise(records[: last + 1]), **until}


def _of_metric(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what a summary has of another metric, with what was spent."""
    of = next((metric for metric in summary.get("also", ()) if metric["metric"] == name), None)
    return {} if of is None else {**of, **{key: summary[key] for key in COSTS if key in summary}}


def _limited(row: Row, found: Mapping[str, Mapping[str, Any]], limits: Mapping[str, float]) -> dict[str, Any]:
    each = [{key: found[name][key] for key in (*BEST, *COSTS) if key in found[name]} for name in row["runs"]]
    there = [one for one in each if one]
    keys = [key for key in (*BEST, *COSTS) if there and all(key in one for one in there)]
    return {
        "limits": {key: value if value < inf else None for key, value in limits.items()},
        "runs": len(each),
        "evaluated": len(there),
        "each": [one or None for one in each],
        "measures": {key: over_seeds([one[key] for one in there]) for key in keys},
        "paired": _paired(row, found, BEST),
    }


# ---- as text


def tabled(rows: Sequence[Row], reference: str | None = None) -> list[tuple[str, list[list[str]]]]:
    """Lay what `reach` and `limit` found out as tables: a title, and lines of cells, the headings first.

    Rows that are paired have their differences from `reference` in tables of their own.
    """
    found = []
    if "to" in rows[0]:
        several = ": median over seeds [least, most]" if any(len(row["runs"]) > 1 for row in rows) else ""
        title = f"until {_goal(rows)}"
        found.append((title + several, _reached_lines(rows)))
        if lines := _apart_lines(rows, "to", COSTS, "both reached"):
            found.append((f"{title}, difference from {reference} where both reached it, {_INTERVAL}", lines))
    others = by_metric(rows) if "within" in rows[0] else []
    for name, alike in [(rows[0]["metric"], rows), *others] if "within" in rows[0] else []:
        title = f"{f'{name}, ' if others else ''}best within {_spendable(rows[0]['within']['limits'])}"
        found.append((f"{title}, and what was spent at the last evaluation within", _limited_lines(alike)))
        if lines := _apart_lines(alike, "within", BEST, "both evaluated"):
            found.append((f"{title}, difference from {reference} where both were evaluated, {_INTERVAL}", lines))
    return found


_INTERVAL = "with its 95 % interval"


def _goal(rows: Sequence[Row]) -> str:
    metrics = {row["metric"] for row in rows} - {None}
    sides = {"at most" if name in LOWER_IS_BETTER else "at least" for name in metrics}
    names = " or ".join(sorted(name.replace("_", " ") for name in metrics)) or "the score"
    return f"{names} is {sides.pop() if len(sides) == 1 else 'as good as'} {rows[0]['to']['score']:g}"


def _reached_lines(rows: Sequence[Row]) -> list[list[str]]:
    shown = _shown(rows, "to", COSTS)
    lines = [[*headings(list(rows[0]["by"])), "reached", *(COSTS[key] for key in shown)]]
    for row in rows:
        to = row["to"]
        costs = [_until(key, to["runs"], to["measures"].get(key)) for key in shown]
        lines.append([*setting_cells(row), f"{to['reached']} of {to['runs']}", *costs])
    return lines


def _shown(rows: Sequence[Row], kind: str, keys: Collection[str]) -> list[str]:
    return [key for key in keys if any(key in row[kind]["measures"] for row in rows)]


def _until(key: str, runs: int, found: Mapping[str, float | None] | None) -> str:
    if found is None:
        return "-"
    if found["median"] is None:
        return "not reached"
    form = _form(key, found["median"])
    least, most = (None if found[end] is None else f"{found[end]:{form}}" for end in ("least", "most"))
    return f"{found['median']:{form}}" + (f" [{least}, {most or 'never'}]" if runs > 1 else "")


def _form(key: str, value: float) -> str:
    return "g" if key == "rounds" else pooled_form(key, value)


def _limited_lines(rows: Sequence[Row]) -> list[list[str]]:
    shown = _shown(rows, "within", (*BEST, "megabytes_sent", "virtual_seconds")) or ["best"]
    lines = [[*headings(list(rows[0]["by"])), "evaluated", *(MEASURES[key] for key in shown)]]
    for row in rows:
        within = row["within"]
        cells = [with_spread(key, **within["measures"].get(key, {"mean": None, "std": None})) for key in shown]
        lines.append([*setting_cells(row), f"{within['evaluated']} of {within['runs']}", *cells])
    return lines


def _apart_lines(rows: Sequence[Row], kind: str, keys: Collection[str], both: str) -> list[list[str]]:
    """Lay paired differences out; [] where no row has a partner."""
    paired = [row for row in rows if row[kind]["paired"] is not None]
    shown = _shown(paired, kind, keys)
    if not shown:
        return []
    lines = [[*headings(list(rows[0]["by"])), both, *((COSTS | MEASURES)[key] for key in shown)]]
    for row in paired:
        found = row[kind]["paired"]
        cells = [with_interval(found[key], _apart_form(key, found[key]["difference"])) for key in shown]
        lines.append([*setting_cells(row), f"{found[shown[0]]['seeds']} of {found['seeds']}", *cells])
    return lines


def _apart_form(key: str, value: float | None) -> str:
    return ".1f" if key == "rounds" else pooled_form(key, value or 0.0) if key in COSTS else ".3f"
