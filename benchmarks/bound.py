"""How near honest runs come to what is refused: whole runs of two recipes, by all methods, dense and sparse.

Each is run as it is, and at ten times its learning rate until training itself diverges, if it does. What is kept: how
many times a receiver's own (or the floor) whatever it heard was at most, by kind; the same for a client that begins
when the others are done; what was refused, and in which round first; the highest loss right after mixing, over the
highest before; and the accuracy at the end, on the recipe's first 200 test rows.
`peertune.rounds.bounds` has the limits. Rows that `bound.jsonl` in the folder of the results has are not run again.
Beside that, what bounding takes is timed in turn with mixing.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Figure, figure, ratios
from benchmarks.setup import overrides
from peertune import build, load_recipe
from peertune.errors import ModelError
from peertune.method import Phase, standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.mixers import gossip
from peertune.methods.shares import as_weights, entries
from peertune.rounds.bounds import Bound, apart, largest, refused
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.mixing import exchanged
from peertune.rounds.round import run_rounds
from peertune.topology import GRAPHS, planned_weights, weights_at
from peertune.types import Stack, Tensors, only, stacked

COSTS = {10: 0.1, 1000: 0.1}  # clients, and how often two of them meet
RECIPES = {"digits-demo": 5e-3, "tad-sst2-minilm": 2e-3}  # and their learning rates
KEPT = Path("benchmarks/results/bound.jsonl")


def run() -> list[Figure]:
    """Run what has not been run, and return a figure for each row."""
    figures = [figure for clients, activation in COSTS.items() for figure in cost(clients, activation)]
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    done = {row["row"]: row for row in map(json.loads, KEPT.read_text().splitlines())} if KEPT.exists() else {}
    for recipe, rate, times, activation, method in rows():
        row = f"{recipe} {method} p={activation} rate×{times}"
        if row not in done:
            done[row] = {"row": row, **watched(recipe, rate * times, activation, method)}
            with KEPT.open("a") as file:
                file.write(json.dumps(done[row]) + "\n")
    return figures + [
        figure(f"{name}: largest {of}", [value], "×", note=f"{found['rounds']} rounds, {found['refused']} refused")
        for name, found in done.items()
        for of, value in (*found["heard"].items(), *((f"{of}, late", x) for of, x in found["late"].items()))
    ]


def cost(clients: int, activation: float, repeats: int = 5) -> list[Figure]:
    """Time what is bounded of a site of MiniLM, rank 8, beside mixing it by gossip."""
    draw, (r, d) = torch.Generator().manual_seed(0), (8, 384)
    own = {
        "q.A": torch.randn(clients, r, d, generator=draw) / (3 * d) ** 0.5,
        "q.B": 0.1 * torch.randn(clients, d, r, generator=draw),
    }
    stacks, mixed = stacked(own), stacked({name: x.clone() for name, x in own.items()})
    at = standing(range(clients), torch.zeros(clients, dtype=torch.int64))
    graph = GRAPHS["complete"](clients=clients, activation=activation)
    weights = as_weights(weights_at(graph, 0), torch.device("cpu"))
    i, j, _ = entries(weights)
    everybody = (torch.arange(clients),) * 2  # what mixing came to is held against what each had
    pairs, bound, phase = (i[i != j], j[i != j]), Bound({"q": (20.0, 2.0)}), Phase(frozenset("AB"), frozenset("AB"))

    def bounding() -> None:
        found = refused(bound, stacks, stacks, *pairs) + apart(bound, stacks, stacks, *pairs)
        if found + refused(bound, stacks, mixed, *everybody):
            raise RuntimeError("something was refused")

    actions: dict[str, Callable[[], object]] = {
        "bounding": bounding,
        "mixing": lambda: gossip().receive(own, own, weights, {}, at, phase),
    }
    taken: dict[str, list[float]] = {what: [] for what in actions}
    torch.set_num_threads(1)
    for turn, (what, action) in product(range(repeats + 1), actions.items()):
        begin = time.process_time()
        action()
        if turn:
            taken[what].append(1e3 * (time.process_time() - begin))
    each = f"{clients:,} clients, {len(pairs[0]) / clients:.1f} neighbours each"
    figures = [figure(f"{what} a site ({each})", times, "ms of one core") for what, times in taken.items()]
    return [*figures, figure(f"bounding over mixing ({each})", ratios(taken["bounding"], taken["mixing"]), "×")]


def rows() -> Iterator[tuple[str, float, int, float, str]]:
    """Yield recipe, learning rate, by how much it is multiplied, activation and method."""
    for (recipe, rate), times, activation, method in product(RECIPES.items(), (10, 1), (0.02, 1.0), ALGORITHMS):
        if method != "local" or activation == 1.0:  # which sends nothing: once is enough
            yield recipe, rate, times, activation, method


def watched(recipe: str, rate: float, activation: float, method: str, *more: str) -> dict[str, Any]:
    """Run a recipe and return what became of it."""
    base = [] if recipe == "digits-demo" else [*overrides()[:-1]]
    settings = (f"graph.activation={activation}", f"algorithm={{name: {method}}}", f"training.learning_rate={rate}")
    job = build(load_recipe(recipe, [*base, *settings, "evaluate={every: 10000, rows: 200}", *more])).job
    assert job.bound is not None
    bound, own = job.bound, dict(job.state.adapters)
    most: dict[str, float] = {}
    said, rounds, rise = "", 0, 0.0
    first: int | None = None
    accuracy: list[float] = []
    highest: dict[int, float] = {}
    mixed: set[int] = set()

    def exchange(clients: Sequence[int], sent: Sequence[Stack], t: int, refuse: Refuse) -> Heard:
        own.update({name: x for name, x in only(sent).items() if name in own})
        matrix, _ = planned_weights(job.graph, job.faults, t)
        i, j, _ = entries(torch.from_numpy(matrix.toarray()))
        for of, times in largest(bound, stacked(own), sent, i[i != j], j[i != j]).items():
            most[of] = max(most.get(of, 0.0), times)
        return exchanged(job, clients, clients, sent, t, refuse)

    refused = 0
    try:
        for record in run_rounds(job, exchange):
            assert record.state is not None
            rounds, refusals = record.round + 1, len(record.failed_edges) + len(record.not_mixed)
            if refusals and first is None:
                first = record.round
            refused += refusals
            if record.evaluation is not None:
                accuracy = record.evaluation.clients
            own.update(record.state.adapters)
            for client, loss in zip(record.clients, record.loss, strict=True):
                if client in mixed:
                    rise = max(rise, loss / highest[client])
                highest[client] = max(highest.get(client, 0.0), loss)
            mixed = {client for edge in record.edges for client in edge}
    except ModelError as error:
        said = str(error)
    return {
        "rounds": rounds,
        "ended": said,
        "refused": refused,
        "refused_first": first,
        "rise": rise,
        "accuracy": accuracy,
        "heard": most,
        "late": late(job, own),
    }


def late(job: Job, trained: Tensors) -> dict[str, float]:
    """Return what the trained adapters are to a client that begins."""
    assert job.bound is not None
    start = job.state.take(slice(0, 1)).stacks
    senders = torch.arange(len(job.clients))
    found = largest(job.bound, start, stacked(trained), torch.zeros_like(senders), senders)
    return {of: times for of, times in found.items() if times < float("inf")}
