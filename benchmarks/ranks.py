"""Clients of ranks 4, 8 and 16 that only mix: how near they come to the mean of what they began with.

    python -m benchmarks.ranks run       # goes on where it was stopped
    python -m benchmarks.ranks table     # of what has been run

Twelve clients, of ranks 4, 8 and 16 in turn, and 200 rounds without training. One product of rank 16, 48 × 40, its
singular values from 2 to .5, is common to all. Each client has noise of its own, a tenth of it in norm, and begins with
the rank-r truncation of the sum. Its factors are balanced, `U √S` and `√S Vᵀ`, the largest entry of each u positive.
For what averages factors there is a second start, `one frame`: the common product's balanced factors, with noise of a
tenth on each factor, of which a client has the first r rows and columns. So no frame is turned against another's.

The goal of a client is the rank-r truncation of the mean over the clients of what they had before it was truncated.
Told is the distance from it, over its norm, of the worst client of each rank. Beside it stands how far those of rank 16
disagree: the root of the mean of their squared distances from their mean, over its norm. Targets: .05 and 1e-3.

The graphs: all meet in each round; each pair meets with p = .3; a ring, on which no two of rank 16 are neighbours.
All is in float64. The clients of all seeds are one stack, of which those of one seed hear each other alone.
"""

import argparse
from collections.abc import Callable, Mapping
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.studies import Kept, Row
from peertune.method import Mixer, Phase, standing
from peertune.methods.mixers import gossip, products
from peertune.methods.modifiers import zero_padded
from peertune.methods.shares import of_slice
from peertune.topology import GRAPHS, Graph, weights_at
from peertune.types import Tensors

CLIENTS, ENDS, SEEDS = 12, (4, 8, 16), range(3)
RANKS = torch.tensor(ENDS * (CLIENTS // 3 * len(SEEDS)))  # of the clients of all seeds
D_OUT, D_IN, MOST, ROUNDS, NOISE = 48, 40, 16, 200, 0.1
NEAR, AGREED = 0.05, 1e-3  # the targets
BOTH = Phase(frozenset("AB"), frozenset("AB"))

GRAPHS_OF: Mapping[str, Callable[[int], Graph]] = {
    "complete": lambda seed: GRAPHS["complete"](clients=CLIENTS, activation=1.0, seed=seed),
    "p = .3": lambda seed: GRAPHS["complete"](clients=CLIENTS, activation=0.3, seed=seed),
    "ring": lambda seed: GRAPHS["ring"](clients=CLIENTS, activation=1.0, seed=seed),
}


class Way(NamedTuple):
    """A mixer, and what it begins with."""

    mixer: Mixer
    one_frame: bool = False


AVERAGES = {
    "zero-padded": zero_padded(gossip()),
    "slices": gossip(),
    "slices, divided": gossip()._replace(lacking="all"),
}
WAYS = {
    "products, truncated": Way(products("truncate")),
    **{f"products, common rank, step {step:g}": Way(products(step=step)) for step in (1.0, 0.5, 0.3, 0.1)},
    **{
        f"factors, {how}{start}": Way(mixer, start != "")
        for start in ("", ", one frame")
        for how, mixer in AVERAGES.items()
    },
}


def begun(seed: int, one_frame: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of a seed's clients, not cut to their ranks, and the mean product `[d_out, d_in]`."""
    draw = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, MOST, generator=draw, dtype=torch.float64)).Q for d in (D_OUT, D_IN))
    S = torch.linspace(2, 0.5, MOST, dtype=torch.float64)
    if one_frame:
        A, B = (noisy(x, draw) for x in (S.sqrt()[:, None] * V.mT, U * S.sqrt()))
        return A, B, (B @ A).mean(0)
    whole = noisy(U * S @ V.mT, draw)
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    root = S.sqrt()[:, None] * U.gather(1, U.abs().argmax(1, keepdim=True)).sign()
    return (root.mT * Vh)[:, :MOST], (U * root)[..., :MOST], whole.mean(0)


def noisy(x: Tensor, draw: torch.Generator) -> Tensor:
    """Return x for each client, with noise."""
    noise = torch.randn(CLIENTS, *x.shape, generator=draw, dtype=torch.float64)
    noise *= NOISE * x.norm() / noise.norm(dim=(1, 2), keepdim=True)
    return x + noise


def mixed(mixer: Mixer, pairs: Tensors, weights: Tensor, t: int) -> Tensors:
    """Return the factors after a round, whole ones rank by rank, or slice by slice."""
    new, everybody = {name: x.clone() for name, x in pairs.items()}, torch.arange(len(RANKS))
    for low, high in pairwise((0, *ENDS)):
        if mixer.ranks == "whole":
            those, heard, mine, theirs = everybody[high == RANKS], everybody, slice(high), slice(MOST)
        else:
            those = heard = everybody[high <= RANKS]
            mine = theirs = slice(low, high)
        at = standing(those.tolist(), torch.full((len(those),), t))
        at = at._replace(heard=heard, ranks=RANKS if mixer.ranks == "whole" else None)
        own, told = (cut(pairs, *which) for which in ((those, mine), (heard, theirs)))
        share = of_slice(weights, everybody, those, heard, to_own=mixer.lacking == "own")
        after, _ = mixer.receive(own, told, share, {}, at, BOTH)
        new["site.A"][those, mine], new["site.B"][those, :, mine] = after["site.A"], after["site.B"]
    return new


def cut(pairs: Tensors, clients: Tensor, part: slice) -> Tensors:
    """Return these rows of A, and columns of B, of some clients."""
    return {"site.A": pairs["site.A"][clients, part], "site.B": pairs["site.B"][clients, :, part]}


def come_to(graph: str, way: Way) -> Row:
    """Return how far the worst client of each rank ends from its goal, and how far those of rank 16 disagree."""
    A, B, means = zip(*(begun(seed, way.one_frame) for seed in SEEDS), strict=True)
    has = torch.arange(MOST) < RANKS[:, None]
    pairs = {"site.A": torch.cat(A) * has[..., None], "site.B": torch.cat(B) * has[:, None]}
    graphs = [GRAPHS_OF[graph](seed) for seed in SEEDS]
    for t in range(ROUNDS):
        weights = torch.block_diag(*(torch.from_numpy(weights_at(each, t).toarray()) for each in graphs))
        pairs = mixed(way.mixer, pairs, weights, t)
    far: dict[str, list[float]] = {str(r): [] for r in ENDS}
    apart = []
    for found, mean in zip((pairs["site.B"] @ pairs["site.A"]).split(CLIENTS), means, strict=True):
        U, S, Vh = torch.linalg.svd(mean)
        for r in ENDS:
            goal = U[:, :r] * S[:r] @ Vh[:r]
            errors = (found[RANKS[:CLIENTS] == r] - goal).norm(dim=(1, 2))
            far[str(r)].append(float(errors.max() / goal.norm()))
        high = found[RANKS[:CLIENTS] == MOST]
        apart.append(float((high - high.mean(0)).square().sum((1, 2)).mean().sqrt() / high.mean(0).norm()))
    return {"far": far, "apart": apart}


def run() -> None:
    """Run what has not been run."""
    torch.set_num_threads(1)
    asked = {f"{graph}; {way}": (graph, way) for graph, way in product(GRAPHS_OF, WAYS)}
    Kept("ranks").all(asked, lambda left: ((name, come_to(graph, WAYS[way])) for name, (graph, way) in left.items()))


def table() -> None:
    """Print what the rows come to, as Markdown: least and largest over the seeds."""
    kept = Kept("ranks").rows
    print("| graph | mixing | rank 4 | rank 8 | rank 16 | disagreement | both targets |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for graph, way in product(GRAPHS_OF, WAYS):
        if (row := kept.get(f"{graph}; {way}")) is None:
            continue
        far, apart = row["far"], row["apart"]
        worst = map(max, zip(*far.values(), strict=True))
        met = sum(one <= NEAR and other <= AGREED for one, other in zip(worst, apart, strict=True))
        columns = [
            *(f"{min(each):.3f} – {max(each):.3f}" for each in far.values()),
            f"{min(apart):.0e} – {max(apart):.0e}",
        ]
        print(f"| {graph} | {way} | {' | '.join(columns)} | {met} of {len(apart)} |")


def main() -> None:
    """Run the study, or print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("action", choices=["run", "table"])
    run() if parser.parse_args().action == "run" else table()


if __name__ == "__main__":
    main()
