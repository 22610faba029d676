"""Who waits for whom, drawn over virtual time."""

import numpy as np
import plotly.graph_objects as go

from peertune.report.drawing import PALETTE, Array, chart, thin, ticks, virtual_time
from peertune.report.runs import RunData

MOST_ROWS = 100  # clients
MOST_SPANS = 2_000  # drawn, from the start of the run; so many bars a browser moves with ease
MOST_SEEN = 1_200  # of them at first, in at least and at most so many rounds
LEAST_ROUNDS, MOST_ROUNDS = 6, 16
FEW = 40  # clients up to which bars that follow each other are told apart
OFTEN = 10  # clients that others wait for most have a row, however many there are


def waiting(run: RunData) -> go.Figure | None:
    """Draw when each client trained and for whom it waited, a row for each client; first seen are the first rounds."""
    spans = np.array(
        [[record["round"], *span] for record in run.records for span in record.get("spans", ())], dtype=float
    ).reshape(-1, 6)  # [S, 6]
    if not len(spans):
        return None
    shown = _shown(spans)
    spans = spans[np.isin(spans[:, 1], shown)]
    spans = spans[np.argsort(spans[:, 2], kind="stable")][:MOST_SPANS]
    time = virtual_time([run])
    spans[:, 2:5] /= time.per_unit
    rounds, clients, began, trained, ended, waited_for = spans.T
    rows = np.searchsorted(shown, clients)
    seen = min(max(MOST_SEEN // len(shown), LEAST_ROUNDS), MOST_ROUNDS)
    until = np.median(ended[rounds == rounds[rounds < rounds[0] + seen].max()])

    few = len(shown) <= FEW

    def bars(name: str, colour: str, which: Array, start: Array, end: Array, hover: str) -> go.Bar:
        told = np.column_stack([clients, rounds, start.round(3), end.round(3), (end - start).round(3), waited_for])
        return go.Bar(
            x=(end - start)[which].round(4),
            y=rows[which],
            base=start[which].round(4),
            customdata=told[which],
            name=name,
            orientation="h",
            marker={"color": colour, "line": {"width": 0.7 if few else 0, "color": "rgba(255,255,255,0.7)"}},
            hovertemplate="client %{customdata[0]}, round %{customdata[1]}<br>" + hover + "<extra></extra>",
        )

    when = f"%{{customdata[4]:.3g}} {time.unit}, from %{{customdata[2]:.4g}} to %{{customdata[3]:.4g}}"
    named = np.arange(0, len(shown), ticks(len(shown))["dtick"]) if shown[-1] < len(shown) else thin(len(shown), 20)
    return chart(
        bars("trains", PALETTE[0], ended > began, began, trained, f"trains {when}"),
        bars("waits", PALETTE[4], ended > trained, trained, ended, f"waits {when}, for client %{{customdata[5]}}"),
        x=time.title,
        y="client",
        height=min(max(300, 160 + 24 * len(shown)), 760),
        barmode="overlay",
        bargap=0.25 if few else 0.1,
        showlegend=True,
        dragmode="pan",
        xaxis_range=[0, until],
        yaxis={
            "autorange": "reversed",
            "showgrid": False,
            "tickvals": named,
            "ticktext": [str(k) for k in shown[named]],
        },
    )


def _shown(spans: Array) -> Array:
    """Return the clients that have a row: all, or those that others waited for most, and some of the others."""
    clients = np.unique(spans[:, 1].astype(int))
    if len(clients) <= MOST_ROWS:
        return clients
    waited = spans[spans[:, 5] >= 0]
    caused = np.bincount(waited[:, 5].astype(int), waited[:, 4] - waited[:, 3])  # by client, of time
    often = np.intersect1d(clients, np.argsort(-caused, kind="stable")[:OFTEN])
    rest = np.setdiff1d(clients, often)
    return np.union1d(often, rest[thin(len(rest), MOST_ROWS - len(often))])
