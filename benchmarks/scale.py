"""A million peers: what a round takes of all together and of one, and how fast their disagreement shrinks.

Every graph is measured in a process of its own, whose peak memory is its own. Clients gossip a few numbers in place of
adapters, over the edges and with the weights that any run would have. `docs/scale.md` says what follows from it.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from math import ceil, log
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from benchmarks.measure import Figure, figure, interleaved, ratios, timed
from peertune.assembly.registry import build_algorithm, build_graph, describe_graph, graph_settings
from peertune.identity.certificates import Request, issue, issue_ca, new_key
from peertune.identity.entries import Member
from peertune.identity.neighbour_roster import KnownGraph
from peertune.identity.roster import load_roster, sign_roster
from peertune.methods.schedules import switching_interval
from peertune.recipe import load_recipe
from peertune.topology import GRAPHS, Graph, may_meet, neighbourhoods, rho, row_at, summary, weights_at

MILLION = 1_000_000
SIMULATED: dict[str, tuple[int, dict[str, Any]]] = {
    "ring": (MILLION, {}),
    "random_regular": (MILLION, {"degree": 8}),
    "exponential": (2**20, {}),
    "erdos_renyi": (30_000, {"mean_degree": 20}),  # it draws all pairs: 5 · 10¹¹ of a million
}
"""Graph → clients and settings. A `mean_degree` becomes the probability of a pair."""

ONE_PEER: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "ring": ((1_000, 10_000, 100_000, MILLION), {}),
    "random_regular": ((1_000, 10_000, 100_000, MILLION), {"degree": 8}),
    "exponential": ((2**10, 2**13, 2**17, 2**20), {}),
    "complete": ((1_000, 10_000, 100_000, MILLION), {"mean_degree": 20}),
}
"""Graph → clients and settings at which one peer's row is timed."""

FEW = 1_024  # clients with which a peer's start among many is compared
STARTS = 30
ROUNDS = 30
PER_CENT = 0.01  # of the disagreement at the start, which rounds are counted to
ADAPTERS = {"MiniLM-L6": (6, 384), "LLaMA-7B": (32, 4096)}  # layers, and width in and out of query and of value
RANK = 8


def adapter_bytes(layers: int, width: int, rank: int = RANK) -> int:
    """Return the bytes of A and B in float32 at query and value of each layer."""
    return layers * 2 * rank * (width + width) * 4


def make(name: str, clients: int, settings: dict[str, Any]) -> Graph:
    """Make a graph."""
    return GRAPHS[name](clients=clients, **_given(name, clients, settings))


def _given(name: str, clients: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a graph's settings; a mean degree becomes a chance for each pair."""
    given = dict(settings)
    if "mean_degree" in given:
        chance = given.pop("mean_degree") / (clients - 1)
        given["activation" if name == "complete" else "probability"] = chance
    return given


def run(rounds: int = ROUNDS) -> list[Figure]:
    """Measure every graph."""
    figures = [
        figure(f"an adapter of {name}, rank {RANK}", [adapter_bytes(*shape) / 1e6], "MB", note="float32")
        for name, shape in ADAPTERS.items()
    ]
    for name, (clients, _) in SIMULATED.items():
        figures += _apart("simulate", name, clients, rounds)
    for name, (sizes, _) in ONE_PEER.items():
        for clients in sizes:
            figures += _apart("row", name, clients, rounds)
    for name, (clients, _) in SIMULATED.items():
        figures += _apart("start", name, clients, STARTS)
    return figures


def simulate(name: str, clients: int, settings: dict[str, Any], rounds: int) -> list[Figure]:
    """Gossip from a random start, on a ring from its slowest disagreement too, and compare what is left with rho."""
    where = f"{name}, {clients:,} peers"
    before = _resident("VmRSS")
    graph, making = timed(make, name, clients, settings)
    holding = _resident("VmRSS") - before
    value, finding = timed(rho, graph)
    x = np.random.default_rng(0).standard_normal((clients, 4))
    x[:, 3] = np.cos(2 * np.pi * np.arange(clients) / clients)  # the slowest disagreement of a ring
    started, spread = x.mean(axis=0), [_spread(x)]
    contacts, squares, taken, rounds_s = np.zeros((rounds, clients), dtype=np.int16), [], [], []
    for t in range(rounds):
        begun = time.perf_counter()
        W, weighing = timed(weights_at, graph, t)
        contacts[t] = np.diff(W.indptr) - 1
        squares.append((float(np.square(W.data).sum()) - 1) / (clients - 1))
        x = W @ x
        taken.append(weighing)
        rounds_s.append(time.perf_counter() - begun)
        spread.append(_spread(x))
    drift = float(np.abs(x.mean(axis=0) - started)[:3].max())
    shrunk = [after / before for before, after in pairwise(spread) if after.min() > 1e-20]  # more than rounding
    random = [float(ratio[:3].mean()) for ratio in shrunk]
    reached = next((t for t, left in enumerate(spread) if left[:3].mean() <= PER_CENT**2 * spread[0][:3].mean()), None)
    peak = _resident("VmHWM") - contacts.nbytes
    period = graph.period or 1
    by_rho = ceil(2 * log(PER_CENT) / log(value)) if value > 1e-12 else period
    bound = f"≤ {value:.6g}" if period == 1 else ""
    figures = [
        figure(f"making the graph ({where})", [making], "s"),
        figure(f"memory that it takes ({where})", [holding / 2**20], "MiB"),
        figure(f"1 - rho ({where})", [1 - value], "", note=f"found in {finding:.2g} s"),
        figure(f"T* ({where})", [switching_interval(value)], "rounds"),
        Figure(f"contacts of a peer in a round ({where})", *_range(contacts), "", contacts.size),
        figure(f"contacts of all in a round ({where})", [float(one.sum()) / 2 for one in contacts], ""),
        figure(f"rounds to 1 % of the disagreement, by rho ({where})", [by_rho], "rounds"),
    ]
    if reached is not None:
        figures.append(figure(f"the same of a random disagreement, simulated ({where})", [reached], "rounds"))
    figures += [
        figure(f"squared disagreement left by the first round ({where})", random[:1], "×", note="random start"),
        figure(f"the same by the trace of WᵀW ({where})", squares[:1], "×"),
        figure(f"left by a later round ({where})", random[-1:], "×", bound, f"round {len(random)}; by rho"),
    ]
    if graph.sides == (clients,):
        lost = [1 - float(ratio[3]) for ratio in shrunk]
        figures.append(figure(f"1 - what a round leaves of the slowest disagreement ({where})", lost, ""))
    figures += [
        figure(f"change of the mean in {rounds} rounds ({where})", [drift], "", "≤ 1e-12"),
        figure(f"a round's W ({where})", taken, "s"),
        figure(f"a round, all told ({where})", rounds_s, "s"),
        figure(f"peak memory of the process ({where})", [peak / 2**20], "MiB"),
    ]
    if name == "erdos_renyi":
        figures.append(_lonely(weights_at(graph, 0), where))
    return figures


def _lonely(W: csr_array, where: str) -> Figure:
    """Return what one client's row alone says of rho, which is at least `Σ_j W_ij² - 1 / n`."""
    rows = np.add.reduceat(np.square(W.data), W.indptr[:-1])
    note = f"the fewest neighbours are {int(np.diff(W.indptr).min()) - 1}"
    return figure(f"1 - rho at most, by one peer's row ({where})", [1 - rows.max() + 1 / W.shape[0]], "", note=note)


def row(name: str, clients: int, settings: dict[str, Any], rounds: int) -> list[Figure]:
    """Time one peer's row of W, round by round, and what it has to look up before the first."""
    where = f"{name}, {clients:,} peers"
    graph = make(name, clients, settings)
    client = clients // 3
    period = graph.period or 1
    found = [timed(row_at, graph, client, t) for t in range(period + rounds)]
    first, later = found[:period], found[period:]
    known = mean(len(row) - 1 for row, _ in later)
    note = f"{known:.3g} contacts"
    figures = [figure(f"one peer's row of a round ({where})", [1e3 * s for _, s in later], "ms", note=note)]
    if not graph.every_pair:  # which looks nothing up
        figures.append(figure(f"before its first ({where})", [1e3 * sum(s for _, s in first)], "ms"))
    return figures


def start(name: str, clients: int, settings: dict[str, Any], repeats: int) -> list[Figure]:
    """Time what a peer's start takes by its own roster among many clients and among few, in turn.

    From the signed bytes to the graph, rho, T* and the rows of a period. What else a peer does at its start, which is
    to load its base and its rows, has nothing to do with others.
    """
    key = new_key()
    ca = issue_ca(key, "bench")

    def told(count: int) -> tuple[Callable[[int], object], int, str]:
        block = json.dumps({"name": name} | _given(name, count, settings))
        recipe = load_recipe("digits-demo", [f"clients={count}", f"graph={block}"])
        graph = build_graph(recipe)
        contacts = sum(np.bincount(graph.edges_at(t).ravel(), minlength=count) for t in range(graph.period or 1))
        client = int(np.flatnonzero(contacts == np.median(contacts))[0])
        (known,) = neighbourhoods(graph, [client], summary(graph))
        seats = sorted([client, *known.others])
        members = []
        for seat in seats:
            request = Request(f"peer-{seat}", f"peer-{seat}.example.org:50051", new_key().public_key())
            members.append(Member(seat, request.name, request.address, (issue(key, ca, request, 90),)))
        raw = sign_roster(key, ca, 1, members, own=KnownGraph(graph_settings(recipe), known))

        def begin(_: int) -> None:
            own = load_roster(raw, ca).own
            assert own is not None
            graph = build_graph(recipe, own.known)
            build_algorithm(recipe, graph)
            describe_graph(graph)
            may_meet(graph, client)
            for t in range(graph.period or 1):
                row_at(graph, client, t)

        edges = sum(map(len, known.edges))
        return begin, len(raw), f"{len(seats) - 1} neighbours, {edges} edges near"

    few, many = f"{name}, {FEW:,} peers", f"{name}, {clients:,} peers"
    made = {few: told(FEW), many: told(clients)}
    times = interleaved({where: begin for where, (begin, _, _) in made.items()}, repeats)
    target = "" if name == "exponential" else "≤ 1.15"  # it has log2 n neighbours
    return [
        *(
            figure(f"its own roster ({where})", [size / 1e3], "kB", note=note)
            for where, (_, size, note) in made.items()
        ),
        *(figure(f"a peer's start by it ({where})", [1e3 * s for s in taken], "ms") for where, taken in times.items()),
        figure(f"a start among many over one among few ({many})", ratios(times[many], times[few]), "×", target),
    ]


def _spread(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean squared distance from the mean, of each column."""
    return np.asarray(np.square(x - x.mean(axis=0)).mean(axis=0))


def _range(values: NDArray[np.int16]) -> tuple[float, float, float]:
    return float(np.median(values)), float(values.min()), float(values.max())


def _resident(which: str) -> int:
    """Return this process's resident bytes: now (`VmRSS`), or at most so far (`VmHWM`)."""
    with open("/proc/self/status", encoding="utf-8") as file:  # getrusage's peak would count the parent's too
        (line,) = (line for line in file if line.startswith(which))
    return int(line.split()[1]) * 1024


Measure = Callable[[str, int, dict[str, Any], int], list[Figure]]
MEASURES: dict[str, tuple[Measure, Callable[[str], dict[str, Any]]]] = {
    "simulate": (simulate, lambda name: SIMULATED[name][1]),
    "row": (row, lambda name: ONE_PEER[name][1]),
    "start": (start, lambda name: SIMULATED[name][1]),
}


def _apart(what: str, name: str, clients: int, rounds: int) -> list[Figure]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", what, name, str(clients), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return [Figure(**fields) for fields in json.loads(done.stdout)]


if __name__ == "__main__":
    what, name = sys.argv[1:3]
    measure, settings = MEASURES[what]
    figures = measure(name, int(sys.argv[3]), settings(name), int(sys.argv[4]))
    print(json.dumps([{k: v for k, v in one.json().items() if k != "met"} for one in figures]))
