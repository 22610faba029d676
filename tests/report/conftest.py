from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peertune.report.runs import RunData
from peertune.rounds.clock import NS, lockstep

MakeRun = Callable[..., RunData]


def make(
    name: str = "a run",
    *,
    rounds: int = 24,
    clients: int = 6,
    every: int = 5,
    method: str = "tad_lora",
    switch_every: int | None = 4,
    activation: float = 0.3,
    seed: int = 0,
    metric: str = "accuracy",
    also: tuple[str, ...] = ("macro_f1",),
    labels: tuple[str, ...] = ("no", "yes", "perhaps"),
) -> RunData:
    """Make a run up, in all that `facts.json` and `rounds.jsonl` hold; `every=0` is one without evaluations."""
    draw = np.random.default_rng([seed, clients, len(method), round(activation * 100)])
    records = _records(
        draw,
        rounds=rounds,
        clients=clients,
        every=every,
        method=method,
        switch_every=switch_every,
        activation=activation,
        metric=metric,
    )
    for evaluation in (record["evaluation"] for record in records if record["evaluation"]):
        evaluation["also"] = [by_another(evaluation, name) for name in also]
    regression = metric == "pearson"
    algorithm = {"name": method} | ({} if switch_every is None else {"switch_every": switch_every})
    shares = draw.integers(5, 200, (clients, 1 if regression else len(labels)))
    rho = 1 - activation
    return RunData(
        folder=Path("/runs") / "made",
        name=name,
        recipe={
            "model": {"name": "digits-vit"},
            "task": {"name": "digits"},
            "clients": clients,
            "graph": {"name": "complete", "activation": activation},
            "algorithm": algorithm,
            "rounds": rounds,
            "seed": seed,
        },
        facts={
            "graph": {
                "name": "complete",
                "clients": clients,
                "edges": float(len(_pairs(clients))),
                "mean_neighbours": activation * (clients - 1),
                "isolated_share": 0.1,
                "rho": rho,
                "spectral_gap": 1 - rho,
                "draws": 1000,
                "switching_interval": 5,
            },
            "partition": {"labels": ["rows"] if regression else list(labels), "rows": shares.tolist()},
            "validation": {"rows": 180, "labels": [] if regression else [90, 60, 30]},
            "parameters": {"base": 1000, "adapter": 100},
        },
        environment={"peertune": "0.1.0", "python": "3.11"},
        records=records,
    )


def _records(
    draw: np.random.Generator,
    *,
    rounds: int,
    clients: int,
    every: int,
    method: str,
    switch_every: int | None,
    activation: float,
    metric: str,
) -> list[dict[str, Any]]:
    pairs = _pairs(clients)
    records: list[dict[str, Any]] = []
    now = dict.fromkeys(range(clients), 0)
    for t in range(rounds):
        trained = ["A", "B"] if switch_every is None else ["A"] if t // switch_every % 2 else ["B"]
        active = pairs[draw.random(len(pairs)) < activation] if method != "local" else pairs[:0]
        degree = np.bincount(active.ravel(), minlength=clients)
        learnt = 1 - np.exp(-(t + 1) / 10)
        scores = np.clip(0.4 + 0.45 * learnt + draw.normal(0, 0.05, clients), 0, 1)
        due = every and (t % every == 1 or t == rounds - 1)
        sends = method != "local"
        trained_at = {client: began + (10 + client % 3) * NS for client, began in now.items()}
        heard = [(i, j, trained_at[j]) for pair in active.tolist() for i, j in (pair, pair[::-1])]
        ends = lockstep(now, trained_at, heard)
        now = {client: end for client, (end, _) in ends.items()}
        records.append(
            {
                "round": t,
                "train": [*trained, "head"],
                "send": ["A", "B", "head"] if sends else [],
                "clients": list(range(clients)),
                "loss": (1.2 - learnt + draw.random(clients) * 0.3).tolist(),
                "grad_norm": draw.random(clients).tolist(),
                "bytes_sent": (degree * 17_684).tolist(),
                "neighbours": degree.tolist(),
                "edges": active.tolist(),
                "failed_edges": [],
                "out_of_phase": [],
                "neighbourhood_cross_term": draw.random(clients).tolist(),
                "diagnostics": {
                    "consensus_error_A": 1e-8 if t < 4 else 0.5 * learnt,
                    "consensus_error_B": 0.9 * learnt,
                    "cross_term": 1e-9 if t < 4 else 0.05 * learnt,
                    "mean_drift": 1e-8,
                    **({f"contraction_{kind}": float(draw.uniform(0.3, 0.9)) for kind in "AB"} if sends else {}),
                    **({"energy_beyond": 0.3 * learnt, "highest_apart": 0.1} if due and sends and clients > 1 else {}),
                },
                "seconds": {"train": 0.3, "exchange": 0.01, "mix": 0.01, "metrics": 0.01},
                "evaluation": {
                    "metric": metric,
                    "clients": scores.tolist(),
                    "average": float(scores.mean() + 0.05),
                    "rows": 180,
                    "top_share": [] if metric == "pearson" else [0.5] * clients,
                    "own": [],
                    "nll": (1 - scores).tolist(),
                    "ece": (scores / 10).tolist(),
                    "ensemble": float(scores.max()),
                    "route": float(scores.min()),
                    "heard_ensemble": (scores / 2).tolist(),
                    "constant": 0.0 if metric == "pearson" else 0.5,
                    "own_constant": [],
                    "own_trained": [],
                    "own_heard": [],
                    "best_rounds": [],
                    "backdoor": [],
                    "judged": [],
                    "confusion": [] if metric == "pearson" else _counts(scores).tolist(),
                    "also": [],
                }
                if due
                else None,
                "failed_writes": 0,
                "skipped": 0,
                "not_mixed": [],
                "taken": [],
                "suspects": [],
                "time_s": max(now.values()) / NS,
                "spans": [[*span] for _, span in ends.values()],
            }
        )
    return records


def by_another(evaluation: dict[str, Any], metric: str) -> dict[str, Any]:
    """Make up what the same predictions score by another metric: less by 0.2."""
    scores = {"clients": [score - 0.2 for score in evaluation["clients"]], "average": evaluation["average"] - 0.2}
    gone = {"nll": [], "ece": [], "top_share": [], "confusion": [], "also": [], "constant": 0.3}
    return evaluation | scores | gone | {"metric": metric}


def _counts(scores: np.ndarray) -> np.ndarray:
    """Return what was taken for what, of 90, 60 and 30 rows by each client: wrong ones for the next class."""
    right = np.array([[round(rows * score) for rows in (90, 60, 30)] for score in scores]).sum(0)
    return np.diag(right) + np.roll(np.diag(np.array([90, 60, 30]) * len(scores) - right), 1, axis=1)


def _pairs(clients: int) -> np.ndarray:
    return np.array([(i, j) for i in range(clients) for j in range(i + 1, clients)], dtype=int).reshape(-1, 2)


@pytest.fixture
def make_run() -> MakeRun:
    """What makes runs up, `make`."""
    return make
