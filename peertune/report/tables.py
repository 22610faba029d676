"""Runs as tables: what `rounds.jsonl` comes to in one row, and rows as text."""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]

COLUMNS = {
    "run": "run",
    "mean": "mean",
    "min": "min",
    "max": "max",
    "best": "best",
    "average": "average",
    "consensus_error_A": "Δ_A",
    "consensus_error_B": "Δ_B",
    "cross_term": "cross",
    "megabytes_sent": "MB/client",
    "seconds": "s",
}
"""Key of a summary → heading of its column."""
LEGEND = """\
mean, min, max: the clients' own models at the end; best: the best mean of all rounds; average: the averaged adapter;
Δ_A, Δ_B: consensus error of the factors; cross: the cross term; MB/client: sent in the whole run; s: seconds"""


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one row for a run's records, as read from `rounds.jsonl`.

    `mean`, `min`, `max`, `std` are over the clients' own models at the last evaluation, `average` is the averaged
    adapter's score there; `best` is the best mean of all evaluations. Consensus errors and the cross term are those
    of the last round, traffic is a client's mean over the run, seconds are the whole run's.
    """
    evaluated = [record for record in records if record["evaluation"]]
    row: dict[str, Any] = {"rounds": len(records)}
    if evaluated:
        final = evaluated[-1]["evaluation"]
        scores = final["clients"]
        best = max(evaluated, key=lambda record: fmean(record["evaluation"]["clients"]))
        row |= {
            "metric": final["metric"],
            "mean": fmean(scores),
            "min": min(scores),
            "max": max(scores),
            "std": pstdev(scores),
            "average": final["average"],
            "best": fmean(best["evaluation"]["clients"]),
            "best_round": best["round"],
        }
    if records:
        row |= {
            key: records[-1]["diagnostics"][key] for key in ("consensus_error_A", "consensus_error_B", "cross_term")
        }
        row["megabytes_sent"] = (
            fmean(sum(per_client) for per_client in zip(*(r["bytes_sent"] for r in records), strict=True)) / 1e6
        )
        row["seconds"] = sum(sum(record["seconds"].values()) for record in records)
    return row


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if key == "seconds" else f"{value:.3g}" if value < 0.01 else f"{value:.3f}"
    return str(value)


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> Table:
    """Lay rows out for the terminal; `columns` maps keys to headings."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(columns.values()):
        result.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*(_cell(key, row.get(key)) for key in columns))
    return result


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Lay rows out as a Markdown table."""
    lines = [" | ".join(columns.values()), " | ".join("---" if i == 0 else "---:" for i in range(len(columns)))]
    lines += [" | ".join(_cell(key, row.get(key)) for key in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
