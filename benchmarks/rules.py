"""What rules for members that lie cost: a thousand clients with ten neighbours each, beside a round's local steps.

Adapters are as large as those of MiniLM-L6 at rank 8 on query and value. Seconds are processor seconds of one thread. A
round is ten local steps of 32 rows by all clients, whose seconds are those of ten clients a hundred times, since a pass
holds a few clients' rows in any case, and gossip beside it.
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measure import Figure, figure, processor
from benchmarks.setup import make
from benchmarks.step import step_of
from peertune.memory import LiveBytes
from peertune.method import At, Mixer, Phase, standing
from peertune.methods.mixers import gossip
from peertune.methods.robust import RULES
from peertune.methods.shares import as_weights
from peertune.topology import GRAPHS, weights_at
from peertune.types import Tensors

LAYERS, WIDTH, RANK = 6, 384, 8
DEGREE, STEPS = 10, 10
FEW, MANY = 250, 1_000
MOST = "≤ 5"  # % of a round
GIVEN = {"balance": {"rounds": 60}}
"""Rule → what the program hands to it."""
BOTH = Phase(frozenset("AB"), frozenset("AB"))


def run() -> list[Figure]:
    """Measure what each rule adds to a round, and by how much it raises memory at a few clients and at many."""
    torch.set_num_threads(1)
    training = processor(step_of(make("algorithm.name=dec_lora", "training.local_steps=1").job), 3)
    sampled = min(training) * STEPS * MANY / 10
    plain = processor(mixing(gossip(), MANY), 3)
    figures = [
        figure("ten local steps of 1,000 clients, by those of ten", [STEPS * MANY / 10 * x for x in training], "s"),
        figure("gossip of 1,000 clients with ten neighbours", plain, "s"),
    ]
    for name, make_rule in RULES.items():
        rule = partial(make_rule, **GIVEN.get(name, {}))
        times = processor(mixing(rule(gossip()), MANY), 3)
        added = [100 * (x - min(plain)) / (sampled + min(plain)) for x in times]
        told = "" if name == "krum" else MOST
        figures += [
            figure(f"{name}: mixing", times, "s"),
            figure(f"{name}: of a round, beyond gossip", added, "%", told),
        ]
        few, many = (peak(rule(gossip()), clients) for clients in (FEW, MANY))
        figures.append(figure(f"{name}: memory beyond new adapters of {MANY:,} clients over {FEW}", [many / few], "×"))
    return figures


def drawn(clients: int) -> Tensors:
    """Return adapters of clients that have trained a little."""
    draw, found = torch.Generator().manual_seed(0), Tensors()
    for site in (f"{layer}.{which}" for layer in range(LAYERS) for which in "qv"):
        found[f"{site}.A"] = torch.randn(clients, RANK, WIDTH, generator=draw) / (3 * WIDTH) ** 0.5
        found[f"{site}.B"] = 0.1 * torch.randn(clients, WIDTH, RANK, generator=draw)
    return found


def mixing(mixer: Mixer, clients: int) -> Callable[[], None]:
    """Return what mixes all of these clients' sites once."""
    own, at = drawn(clients), standing(range(clients), torch.zeros(clients, dtype=torch.int64))
    at = at._replace(heard=torch.arange(clients))
    graph = GRAPHS["random_regular"](clients=clients, degree=DEGREE)
    weights = as_weights(weights_at(graph, 0), torch.device("cpu"))
    memory = mixer.init(own, at)
    return lambda: _mix(mixer, own, weights, memory, at)


def _mix(mixer: Mixer, own: Tensors, weights: torch.Tensor, memory: Tensors, at: At) -> None:
    used, changed = mixer.weigh(own, own, weights, memory, at, BOTH)
    for a in [name for name in own if name.endswith("A")]:
        site = {name: own[name] for name in (a, f"{a[:-1]}B")}
        assert isinstance(used, torch.Tensor)
        mixer.receive(site, site, used, memory | changed, at, BOTH)


def peak(mixer: Mixer, clients: int) -> int:
    """Return the bytes by which mixing raises memory, beyond one site's new adapters, which all mixers make."""
    with LiveBytes("cpu") as live:
        action = mixing(mixer, clients)
        taken: int = live.most(action).taken
    return taken - clients * 2 * RANK * WIDTH * 4
