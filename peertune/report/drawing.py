"""What figures are drawn with: colours, lines and bands, and a run's numbers as arrays.

Figures carry no theme: `theme` gives the light and the dark one. Text from runs is escaped, since plotly reads some
HTML. Shape letters: `T` rounds, `n` clients.
"""

from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from peertune.report.runs import RunData, settings
from peertune.report.spending import Record, judged, spent

Array = NDArray[Any]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B5A800", "#8C8C8C")
"""Okabe and Ito's colours, which the colour-blind tell apart; to show on white and on black, yellow is darker and black
is grey."""
_METHODS = ("tad_lora", "decaf", "adf_lora", "ffa_lora", "dec_lora", "rolora", "fedrot_lora", "local")
METHOD_COLOURS = dict(zip(_METHODS, PALETTE, strict=True))
GREY = PALETTE[7]
SCALE = "Cividis"  # even in lightness, for the colour-blind too
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
MOST_POINTS = 300  # of a line
MOST_MARKED = 30  # points that are marked


def theme(dark: bool, paper: str = "rgba(0,0,0,0)") -> dict[str, Any]:
    """Return a plotly template: text, lines and background for a dark or a light page."""
    ink, line, label = ("#e6e6e6", "#3a4149", "#22272e") if dark else ("#1f2328", "#dfe3e8", "#ffffff")
    axis = {"gridcolor": line, "linecolor": line, "zerolinecolor": line, "automargin": True, "title": {"standoff": 8}}
    return {
        "layout": {
            "paper_bgcolor": paper,
            "plot_bgcolor": paper,
            "font": {"color": ink, "family": "system-ui, sans-serif", "size": 13},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "yanchor": "bottom",
                "traceorder": "normal",
                "maxheight": 320,
                "bgcolor": "rgba(0,0,0,0)",
            },
            "hoverlabel": {"bgcolor": label, "bordercolor": line, "font": {"color": ink}},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": ink},
            "margin": {"l": 56, "r": 16, "t": 36, "b": 48},
        }
    }


def chart(*traces: Any, x: str, y: str, height: int = 400, **layout: Any) -> go.Figure:
    """Put traces into a figure without a theme; x and y are the axes' titles, height is in pixels."""
    titles = {f"{axis}_title_text": plain(title) for axis, title in (("xaxis", x), ("yaxis", y)) if title}
    given = {"template": {}, "height": height, **titles, **layout}
    figure = go.Figure(data=list(traces), layout=given)  # given a template, it doesn't make its own, which takes long
    figure.layout.template = None
    return figure


def ticks(most: float) -> dict[str, Any]:
    """Return ticks for an axis of whole numbers up to `most`, such as rounds: at whole numbers, some six of them."""
    steps = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    return {"tick0": 0, "dtick": next(step for step in steps if most <= 6 * step)}


def line(x: Any, y: Any, name: str, colour: str, hover: str, number: int = 0, **given: Any) -> go.Scatter:
    """Draw a line; `number` chooses its dash and symbol among those of the same colour, `hover` has plotly's places."""
    drawn = {
        "x": x,
        "y": y,
        "name": plain(name),
        "mode": "lines+markers" if len(x) <= MOST_MARKED else "lines",
        "line": {"width": 2.5, "color": colour, "dash": DASHES[number % len(DASHES)]},
        "marker": {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7},
        "hovertemplate": f"%{{fullData.name}}<br>{hover}<extra></extra>",
    }
    return go.Scatter(drawn | given)


def band(x: Array, low: Array, high: Array, colour: str, **given: Any) -> go.Scatter:
    """Fill what lies between two curves."""
    around = {"x": np.concatenate([x, x[::-1]]), "y": np.concatenate([high, low[::-1]])}
    fill = {"fill": "toself", "fillcolor": faint(colour), "line": {"width": 0}, "hoverinfo": "skip", "mode": "lines"}
    return go.Scatter(around | fill | given)


def faint(colour: str) -> str:
    """Return a colour of the palette, as light as what stands behind lines."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def plain(text: object) -> str:
    """Escape what plotly would read as HTML, and cut what no legend can hold."""
    whole = str(text)
    return escape(whole if len(whole) <= 60 else f"{whole[:59]}…", quote=False)


def method(run: RunData) -> str:
    """Return the name of the run's method."""
    return str(settings(run).get("algorithm.name"))


def colour(run: RunData) -> str:
    """Return the colour of the run's method, the same in all figures."""
    name = method(run)
    return METHOD_COLOURS.get(name, PALETTE[len(name) % len(PALETTE)])


def metric(runs: Sequence[RunData]) -> str:
    """Return the metric's name as words, from the first run that was evaluated."""
    names = (str(record["evaluation"]["metric"]) for run in runs for record in evaluated(run)[-1:])
    return next(names, "score").replace("_", " ")


def evaluated(run: RunData) -> list[dict[str, Any]]:
    """Return the records with an evaluation."""
    return [record for record in run.records if record["evaluation"]]


def mean_score(record: Record) -> float | None:
    """Return the mean score of the clients' own models, None where the round was not evaluated."""
    return fmean(record["evaluation"]["clients"]) if record["evaluation"] else None


def average(record: Record) -> float | None:
    """Return the averaged adapter's score, None where the round was not evaluated."""
    return record["evaluation"]["average"] if record["evaluation"] else None


def mean_loss(record: Record) -> float | None:
    """Return the mean train loss of the clients."""
    return fmean(record["loss"]) if record["loss"] else None


class Cost(NamedTuple):
    """What scores are drawn against, and how it is told."""

    field: str  # of Spent
    per_unit: float  # as it is told, of what `Spent` has
    unit: str
    title: str

    def by_round(self, run: RunData) -> dict[int, float]:
        """Return what was spent by the end of each round; {} where it is not known."""
        each = {so_far.rounds - 1: getattr(so_far, self.field) for so_far in spent(run.records)}
        return {t: x / self.per_unit for t, x in each.items() if x is not None}


TRAFFIC = Cost("megabytes_sent", 1, "MB", "megabytes sent by a client")


def virtual_time(runs: Sequence[RunData]) -> Cost:
    """Return virtual time in the unit that suits the longest of these runs."""
    most = max((record.get("time_s") or 0 for run in runs for record in run.records), default=0)
    per_unit, unit = next((each for each in _UNITS_OF_TIME if most >= 3 * each[0]), _UNITS_OF_TIME[-1])
    return Cost("virtual_seconds", per_unit, unit, f"virtual time ({unit})")


_UNITS_OF_TIME = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def thin(length: int, most: int) -> Array:
    """Return at most so many indices below `length`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))


def by_client(
    run: RunData,
    values: Callable[[Record], Sequence[float] | None],
    most: int = MOST_POINTS,
    whose: Callable[[Record], Sequence[int]] = lambda record: record["clients"],
) -> tuple[Array, Array, Array]:
    """Return rounds `[T]`, clients `[n]` and values `[T, n]`: NaN where there is none, and no round without any."""
    clients = sorted({client for record in run.records for client in whose(record)})
    table = np.full((len(run.records), len(clients)), np.nan, dtype=np.float32)
    for row, record in zip(table, run.records, strict=True):
        given = values(record)
        if given is not None:
            row[np.searchsorted(clients, whose(record))] = given
    table[~np.isfinite(table)] = np.nan  # of a run that diverged
    there = np.flatnonzero(np.isfinite(table).any(1))
    there = there[thin(len(there), most)]
    rounds = np.array([record["round"] for record in run.records], dtype=np.int32)
    return rounds[there], np.array(clients, dtype=np.int32), table[there]


def scores_by_client(run: RunData, most: int = MOST_POINTS) -> tuple[Array, Array, Array]:
    """Return evaluated rounds `[T]`, clients `[n]` and the scores of their own models `[T, n]`."""
    return by_client(
        run, lambda record: record["evaluation"]["clients"] if record["evaluation"] else None, most, judged
    )
