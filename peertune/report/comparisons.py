"""The figures that compare runs; each is a function of the runs that returns None where there is nothing to show."""

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from peertune.report.drawing import (
    MOST_POINTS,
    PALETTE,
    Array,
    Cost,
    band,
    chart,
    colour,
    evaluated,
    line,
    mean_score,
    method,
    metric,
    thin,
    ticks,
)
from peertune.report.runs import RunData, settings
from peertune.report.spending import Record
from peertune.report.tables import default_keys, headings

MOST_BANDS = 8  # settings with a band around their line

Value = Callable[[Record], float | None]


class Setting(NamedTuple):
    """Runs that differ in their seed, or lie on one curve, and how they are drawn."""

    label: str
    runs: list[RunData]
    colour: str
    number: int  # among those of the same colour


def by_round(runs: Sequence[RunData], value: Value, y: str, floor: float | None = None) -> go.Figure | None:
    """Draw the mean of a value over seeds by round, ± its standard deviation, a line for each setting.

    With a `floor` above 0 the axis is logarithmic, and bands end there.
    """
    found = _gathered(runs)
    bands: list[go.Scatter] = []
    lines: list[go.Scatter] = []
    for label, alike, drawn, number in found:
        rounds, mean, deviation = _over_seeds(alike, value)
        if not len(rounds):
            continue
        digits = ".3f" if floor is None else ".3g"
        spread = f" ± %{{customdata:{digits}}}" if len(alike) > 1 else ""
        hover = f"round %{{x}}: %{{y:{digits}}}{spread}"
        lines.append(line(rounds, mean, label, drawn, hover, number, customdata=deviation, legendgroup=len(lines)))
        if len(alike) > 1 and len(found) <= MOST_BANDS:
            tied = {"showlegend": False, "legendgroup": lines[-1].legendgroup}
            low = np.maximum(mean - deviation, -inf if floor is None else floor)
            bands.append(band(rounds, low, mean + deviation, drawn, **tied))
    if not lines:
        return None
    last = max(int(each.x[-1]) for each in lines)
    scale = {} if floor is None else {"yaxis_type": "log"}
    return chart(*bands, *lines, x="round", y=y, height=_height(lines), showlegend=True, xaxis=ticks(last), **scale)


def disagreement(runs: Sequence[RunData], kind: str) -> go.Figure | None:
    """Draw how far the clients' factors of one kind are from their mean by round, a line for each setting."""
    key = f"consensus_error_{kind}"
    told = [record["diagnostics"].get(key) for run in runs for record in run.records]
    floor = 1e-6 * max((x for x in told if x is not None and isfinite(x)), default=0.0)  # what is less is rounding
    if not floor > 0:
        return None

    def value(record: Record) -> float | None:
        found = record["diagnostics"].get(key)
        return found if found is not None and found > floor else None

    return by_round(runs, value, f"Δ_{kind} (log scale)", floor)


def by_cost(runs: Sequence[RunData], cost: Cost) -> go.Figure | None:
    """Draw the mean score over clients and seeds against what was spent by then, a line for each setting.

    Runs of which it is not known have none.
    """
    lines: list[go.Scatter] = []
    for label, alike, drawn, number in _gathered(runs):
        rounds, mean, _ = _over_seeds(alike, mean_score)
        each = [cost.by_round(run) for run in alike]
        if not len(rounds) or not all(each):
            continue
        x = np.array([fmean(one[t] for one in each) for t in rounds.tolist()])
        if not x[-1] > 0:  # who spends nothing is a point
            rounds, mean, x = rounds[-1:], mean[-1:], x[-1:]
        hover = f"%{{y:.3f}} after %{{x:.3g}} {cost.unit} (round %{{customdata}})"
        lines.append(line(x, mean, label, drawn, hover, number, customdata=rounds))
    if not any(each.x[-1] > 0 for each in lines):
        return None
    given: dict[str, Any] = {"height": _height(lines), "showlegend": True, "xaxis_rangemode": "tozero"}
    return chart(*lines, x=cost.title, y=metric(runs), **given)


def against(runs: Sequence[RunData], key: str, value: Value, x: str) -> go.Figure | None:
    """Draw the value at the last evaluation against a setting, ± its standard deviation over seeds, a line a method."""
    scored = [run for run in runs if evaluated(run) and isinstance(settings(run).get(key), int | float)]
    lines = []
    places: set[float] = set()
    for label, alike, drawn, number in _gathered(scored, key):
        found: dict[float, list[float]] = {}
        for run in alike:
            final = value(evaluated(run)[-1])
            if final is not None and isfinite(final):
                found.setdefault(settings(run)[key], []).append(final)
        xs = sorted(found)
        places.update(xs)
        spread = [stdev(found[at]) if len(found[at]) > 1 else 0.0 for at in xs]
        bars = {"array": spread, "thickness": 1.2, "width": 4} if any(spread) else None
        ys = [fmean(found[at]) for at in xs]
        lines.append(line(xs, ys, label, drawn, "%{x}: %{y:.3f}", number, error_y=bars))
    if len(places) < 2:
        return None
    ticks = sorted(places)
    wide = ticks[0] > 0 and ticks[-1] >= 10 * ticks[0]
    axis = {"type": "log" if wide else "linear", "tickvals": ticks, "ticktext": [f"{at:g}" for at in ticks]}
    return chart(*lines, x=x, y=metric(runs), height=_height(lines), showlegend=True, xaxis=axis)


def _keys(runs: Sequence[RunData], x: str | None) -> dict[str, list[str]]:
    """Return method → the keys in which its runs differ, those that follow from the setting `x` not among them.

    An automatic `switch_every` follows from the graph's activation, and must not cut a curve against it to pieces.
    """
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        alike.setdefault((method(run), str(settings(run).get(x or ""))), []).append(settings(run))
    compared = default_keys(runs) if runs else []
    found: dict[str, list[str]] = {}
    for (name, _), members in alike.items():
        keys = found.setdefault(name, ["algorithm.name"])
        differing = [key for key in compared if any(values.get(key) != members[0].get(key) for values in members)]
        keys += [key for key in differing if key not in keys]
    return found


def _gathered(runs: Sequence[RunData], x: str | None = None) -> list[Setting]:
    """Put runs together that differ in their seed, and in `x`, alone.

    Colours are the methods', or the settings' of a single method.
    """
    keys = _keys(runs, x)
    groups: dict[tuple[tuple[str, str], ...], list[RunData]] = {}
    for run in runs:
        values = settings(run)
        groups.setdefault(tuple((key, str(values[key])) for key in keys[method(run)] if key in values), []).append(run)
    one_method = len(keys) == 1
    found: list[Setting] = []
    for place, (by, alike) in enumerate(groups.items()):
        name = method(alike[0])
        named = dict(zip(headings([key for key, _ in by]), by, strict=True))
        parts = [f"{heading}={value}" for heading, (key, value) in named.items() if key != "algorithm.name"]
        label = ", ".join(parts if one_method and parts else [name, *parts])
        drawn = PALETTE[place % len(PALETTE)] if one_method and len(groups) > 1 else colour(alike[0])
        found.append(Setting(label, alike, drawn, sum(setting.colour == drawn for setting in found)))
    return found


def _over_seeds(runs: Sequence[RunData], value: Value) -> tuple[Array, Array, Array]:
    """Return the rounds `[T]` that all runs have, and the mean and the standard deviation over runs, each `[T]`."""
    each = [{r["round"]: v for r in run.records if (v := value(r)) is not None and isfinite(v)} for run in runs]
    common = sorted(set.intersection(*map(set, each)))
    rounds = [common[at] for at in thin(len(common), MOST_POINTS)]
    table = np.array([[one[at] for at in rounds] for one in each])
    deviation = table.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(rounds))
    return np.array(rounds, dtype=np.int32), table.mean(0), deviation


def _height(lines: Sequence[Any]) -> int:
    """Return pixels: a long legend, of one column on a narrow screen, needs room of its own."""
    return 400 + 19 * min(max(0, len(lines) - 4), 12)
