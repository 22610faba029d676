"""Figures as a Markdown table."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.measure import Compared


def table(figures: Iterable[Mapping[str, Any]]) -> str:
    """Return one line for each figure: median, spread, target and whether it is met."""
    lines = ["| figure | median | least – largest | target | |", "| --- | ---: | ---: | ---: | --- |"]
    for figure in figures:
        median, low, high = (_number(figure[key]) for key in ("value", "low", "high"))
        spread = f"{low} – {high}" if figure["runs"] > 1 else "one run"
        verdict = {True: "met", False: "**missed**", None: ""}[figure["met"]]
        note = "; ".join(part for part in (verdict, figure["note"]) if part)
        lines.append(f"| {figure['name']} | {median} {figure['unit']} | {spread} | {figure['target']} | {note} |")
    return "\n".join(lines)


def compared(figures: Iterable[Compared]) -> str:
    """Return one line for each figure of two builds: their medians, and old over new, with its spread."""
    lines = ["| figure | old | new | old over new | least – largest |", "| --- | ---: | ---: | ---: | ---: |"]
    for figure in figures:
        old, new = (_number(statistics.median(one.value for one in side)) for side in figure)
        over, low, high = map(_number, (statistics.median(figure.over), min(figure.over), max(figure.over)))
        unit = figure.new[0].unit
        lines.append(f"| {figure.new[0].name} | {old} {unit} | {new} {unit} | {over} × | {low} – {high} |")
    return "\n".join(lines)


def percentages(parts: Mapping[str, float], rest: float) -> str:
    """Return one line for each part, the largest first, with its share of all of them and the rest."""
    whole = sum(parts.values()) + rest
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    lines = [f"| {name} | {100 * part / whole:.0f} % |" for name, part in [*ordered, ("everything else", rest)]]
    return "\n".join(["| of a step | share |", "| --- | ---: |", *lines])


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
