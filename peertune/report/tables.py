"""Runs as tables: what `rounds.jsonl` comes to in one row, and rows as text."""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

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
    "megabytes_sent": "MB",
    "seconds": "s",
}
"""Key of a summary → heading of its column."""
LEGEND = """\
mean, min, max: the clients' own models at the end; best: the best mean of all rounds; average: the averaged adapter;
Δ_A, Δ_B: consensus error of the factors; cross: the cross term; MB: sent by a client in the whole run; s: seconds"""


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
        return f"{value:.0f}" if key == "seconds" else f"{value:.3g}" if value < 0.01 else f"{value:.3f}"
    return str(value)


def cells(rows: Sequence[Row], columns: Mapping[str, str]) -> list[list[str]]:
    """Lay summaries out as lines of cells, the headings first; `columns` maps keys to headings."""
    return [list(columns.values()), *([_cell(key, row.get(key)) for key in columns] for row in rows)]


def text(lines: Sequence[Sequence[str]]) -> str:
    """Align lines of cells, the first column to the left. Nothing is cut, however narrow the terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(
        " ".join([line[0].ljust(widths[0]), *rest]) for line, (_, *rest) in zip(lines, aligned, strict=True)
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Write lines of cells as a Markdown table, the first line its head."""
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))
