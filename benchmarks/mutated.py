"""What mixing makes of payloads that no honest client sends: valid ones, changed in every way we could think of.

    python -m benchmarks.mutated run --payloads 1000000   # goes on where it was stopped; --part 1/2 and 2/2 for two
    python -m benchmarks.mutated table                    # of what has been run

A case is a method with what is sent: whole adapters, each modifier of messages, push-sum, ranks that differ. It is
played as a simulation plays rounds, `peertune.rounds.round`, on tiny adapters, without training. A third of the clients
are honest. The others send what an honest client could send, changed by up to three of `benchmarks.mutations`. Where
bytes travel, or something beside adapters, they send other numbers there as well. Each of them is heard by one or two
honest ones, in a graph of 60 clients, whose mixing matrix is dense, or of 3,000, whose is sparse. After four rounds all
begin anew; between them the honest drift, as training would have them.

After each round these must hold of every honest client, and the fifth of the run:

1. all that it has and remembers is finite;
2. each factor's norm, and each head part's, is at most FAR times what it was before mixing, or times the floor;
3. so is each product, `s ‖B A‖`: of whole sites, formed in float64;
4. what it would send next is within what an honest client may send (`Message.sound`);
5. nothing is raised.

FAR and the floors are those of `peertune.rounds.bounds`; what is checked here is computed anew, the plain way. A
payload is what one client sends in one round. How much of it was refused, left out or kept out is told, for a run in
which all is refused shows nothing.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import sqrt
from types import SimpleNamespace
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from benchmarks.mutations import NORM, SCALING, Draw, beside, floor, mutated, norms
from benchmarks.studies import Kept, Row, share
from peertune.allowance import Lines
from peertune.assembly.registry import pushing
from peertune.errors import RecipeError
from peertune.method import Algorithm, Phase, standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.modifiers import MODIFIERS
from peertune.methods.robust import RULES
from peertune.rounds.bounds import FAR, SHARE, Bound
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.mixing import exchanged
from peertune.rounds.record import Evaluation
from peertune.rounds.round import run_round
from peertune.rounds.training import Optim, adamw, sgd
from peertune.topology import Fault, Graph
from peertune.types import Stack, State, Tensors, kind, over_clients, pairs, take

PAYLOADS = 1_000_000
SIZES = {"dense": 60, "sparse": 3000}
"""Clients, a third of them honest."""
CHAIN = 4
"""Rounds after which all begin anew."""
RANKS = (1, 2, 4)
"""Of clients in turn, where they differ; elsewhere it is 3."""

_SITES = {"q": (8, 8), "k": (8, 8), "v": (10, 6)}  # d_in, d_out: two of one shape, and one that isn't square
_HEAD = {"out.weight.head": (3, 5), "out.bias.head": (3,)}
_LOSSY = 40  # rounds, in every second of which something is lost with push-sum
_ROUNDING = 1e-5  # of adapters in float32


class Case(NamedTuple):
    """A method, and what is sent."""

    method: str  # a key of METHODS
    message: str  # a key of MESSAGES

    def __str__(self) -> str:
        return f"{self.method}; {self.message}"


METHODS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "dec_lora": ("dec_lora", {}),
    "ffa_lora": ("ffa_lora", {}),
    "rolora": ("rolora", {}),
    "adf_lora": ("adf_lora", {}),
    "tad_lora": ("tad_lora", {"switch_every": 2}),
    "tad_lora, adaptive": ("tad_lora", {"switch_every": "adaptive", "window_rounds": 4}),
    "decaf": ("decaf", {}),
    "decaf, truncate": ("decaf", {"unequal": "truncate"}),
    "fedrot_lora": ("fedrot_lora", {}),
    "fedrot_lora, hard": ("fedrot_lora", {"strength": "hard"}),
    "fedsa_lora": ("fedsa_lora", {}),
    "la_lora": ("la_lora", {}),
    "lora_fair": ("lora_fair", {}),
    "lora_fair, ridge 1e-300": ("lora_fair", {"ridge": 1e-300}),
    "rac_lora": ("rac_lora", {"links": 3, "link_rounds": 2}),
}
"""All of the catalogue that send something, and settings of which the algebra is another."""


class Sent(NamedTuple):
    """What is sent and how clients differ, and what they do about it."""

    modifiers: tuple[str, ...] = ()
    ranks: bool = False
    weights: str = "metropolis"


MESSAGES = {
    "whole": Sent(),
    "rows": Sent(weights="rows"),
    "one way": Sent(weights="row"),
    "push_sum": Sent(weights="push_sum"),
    "half": Sent(("half",)),
    "int8": Sent(("int8",)),
    "int4": Sent(("int4",)),
    "shared_mask": Sent(("shared_mask",)),
    "int8, shared_mask": Sent(("int8", "shared_mask")),
    "choco": Sent(("choco",)),
    "mix_moments": Sent(("mix_moments",)),
    "half, mix_moments": Sent(("half", "mix_moments")),
    "ranks": Sent(ranks=True),
    "ranks, half": Sent(("half",), ranks=True),
    "ranks, int4": Sent(("int4",), ranks=True),
    "ranks, divided": Sent(("divided",), ranks=True),
    "ranks, zero_padded": Sent(("zero_padded",), ranks=True),
    "ranks, zero_padded by norms": Sent(("zero_padded by norms",), ranks=True),
    **{rule: Sent((rule,)) for rule in RULES},
    **{f"int8, {rule}": Sent(("int8", rule)) for rule in RULES},
}

_FIELDS = {"choco": "", "mix_moments": ""}
_FIELDS |= dict.fromkeys(("divided", "zero_padded", "zero_padded by norms", *RULES), "mixer")
_SETTINGS: dict[str, dict[str, Any]] = {"zero_padded by norms": {"weights": "norms"}, "balance": {"rounds": CHAIN}}
_ONE_FACTOR = ("ffa_lora", "fedsa_lora", "rolora")  # in a round
_NEVER_WITH_PUSH_SUM = ("rolora", "tad_lora, adaptive")  # by peertune.assembly.needs


def cases() -> Iterator[Case]:
    """Yield all cases that a recipe could have."""
    for case in (Case(*each) for each in product(METHODS, MESSAGES)):
        (name, settings), sent = METHODS[case.method], MESSAGES[case.message]
        try:
            algorithm = made(case, 2, {})
        except RecipeError:
            continue
        met = {
            "kept basis": algorithm.mixer.keeps_basis,
            "mixing by entry": ALGORITHMS[name](**_given(case.method, 2)).mixer.by_entry,
            "both factors": name not in _ONE_FACTOR,
        }
        never = sent.weights == "push_sum" and case.method in _NEVER_WITH_PUSH_SUM
        never |= "unequal" in settings and not sent.ranks
        never |= settings.get("links", 0) > min(RANKS) and sent.ranks
        if not never and all(met.get(need, True) for need in algorithm.needs):
            yield case


def _given(method: str, clients: int) -> dict[str, Any]:
    settings = dict(METHODS[method][1])
    return settings | ({"clients": clients} if settings.get("switch_every") == "adaptive" else {})


def made(case: Case, clients: int, near: Mapping[int, Sequence[int]]) -> Algorithm:
    """Return the case's method, its modifiers by their defaults."""
    algorithm = ALGORITHMS[METHODS[case.method][0]](**_given(case.method, clients))
    for name in MESSAGES[case.message].modifiers:
        field = _FIELDS.get(name, "message")
        if name == "choco":
            algorithm = MODIFIERS[name](algorithm, near=lambda: near)
        elif not field:
            algorithm = MODIFIERS[name](algorithm)
        else:
            make = MODIFIERS[name.partition(" ")[0]]
            changed = make(getattr(algorithm, field), **_SETTINGS.get(name, {}))
            algorithm = algorithm._replace(**{field: changed})
    return algorithm


class World:
    """Clients of a case, the last two thirds of whom are not honest."""

    def __init__(self, case: Case, size: str, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.n = case, SIZES[size]
        self.seed = crc32(f"{case}, {size}, {dtype}, {seed}".encode())  # so that each case draws its own
        self.honest = torch.arange(self.n // 3)
        self.liars = torch.arange(self.n // 3, self.n)
        self.dtype = dtype
        self.sent = MESSAGES[case.message]
        self.static, self.directed = "choco" in self.sent.modifiers, self.sent.weights in ("row", "push_sum")
        graph = Graph(
            clients=self.n,
            edges_at=lambda t: self.links(t)[0],
            period=None,
            activation=1.0,
            seed=self.seed,
            weights=self.sent.weights,
            directed=self.directed,
            row_counts=tuple(range(1, self.n + 1)) if self.sent.weights == "rows" else (),
        )
        near = {client: list[int]() for client in range(self.n)}
        if self.static:
            for i, j in graph.edges_at(0).tolist():
                near[i].append(j)
                near[j].append(i)
        algorithm, faults = made(case, self.n, {i: sorted(those) for i, those in near.items()}), list[Fault]()
        if self.sent.weights == "push_sum":  # some of what liars send comes in a later round
            for t in range(0, _LOSSY, 2):
                faults += [Fault(t, t, (i, j)) for i, j in self.links(t)[0][-8::2].tolist()]
            algorithm = pushing(algorithm, graph, faults)
        names = [f"{name}.{part}" for name, part in (("out", "weight"), ("out", "bias"))]
        layers = dict.fromkeys(_SITES, (NORM, SCALING)) | dict.fromkeys(names, (NORM, 1.0))
        self.lines = _Counting(len(self.honest))
        self.ranks = [RANKS[client % len(RANKS)] for client in range(self.n)] if self.sent.ranks else []
        model: Any = SimpleNamespace(frozen={})
        self.algorithm = algorithm
        begun = self.begun(Draw(self.seed, 0))
        self.job = Job(
            model=model,
            graph=graph,
            algorithm=algorithm,
            optim=Optim(sgd(), lambda step: dict.fromkeys(("A", "B", "head"), 0.1), 0.0, "never"),
            steps=lambda clients, rounds, first=0, salts=(): iter(()),
            evaluate=lambda adapters, clients: Evaluation("accuracy", [], None, 1, []),
            state=begun,
            clients=range(self.n),
            rounds=2**31,
            local_steps=1,
            evaluate_every=7,  # which measures cross terms, and evaluates nothing
            clients_per_pass=self.n,
            bound=Bound(layers, algorithm.message.sound),
            ranks=self.ranks,
            faults=faults,
            lines=self.lines,
        )

    def links(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the edges of a round, and of each client that isn't honest one who hears it."""
        draw = np.random.default_rng([self.seed, 0 if self.static else t])
        h, liars = self.n // 3, np.arange(self.n // 3, self.n)
        heard_by = draw.integers(h, size=(2, len(liars)))
        ends = [np.stack([liars, heard_by[0]], 1), np.stack([liars, heard_by[1]], 1)[draw.random(len(liars)) < 0.4]]
        ends.append(np.stack([np.arange(h), (np.arange(h) + 1) % h], 1)[draw.random(h) < 0.6])
        edges = np.concatenate(ends) if self.directed else np.sort(np.concatenate(ends), 1)
        return np.unique(edges, axis=0), heard_by[0]

    def begun(self, draw: Draw, round: int = 0) -> State:
        """Return the state of clients as honest ones may have it, at the start or after some training."""
        ranks = np.array(self.ranks or [3] * self.n)
        cohorts = []
        for r in sorted({*ranks.tolist()}):
            rows = torch.from_numpy((ranks == r).nonzero()[0])
            K = len(rows)
            learnt = draw.power(-3, 0.3, K, 1, 1) * (draw.uniform(0, 1, K, 1, 1) < 0.8)
            adapters: Tensors = {}
            for site, (d_in, d_out) in _SITES.items():
                adapters[f"{site}.A"] = (1 + learnt) * draw.normal(K, r, d_in) / sqrt(3 * d_in)
                adapters[f"{site}.B"] = learnt * draw.normal(K, d_out, r) / sqrt(r * d_out) * NORM / SCALING
            adapters |= {name: draw.normal(K, *shape) for name, shape in _HEAD.items()}
            adapters = {name: x.to(self.dtype) for name, x in adapters.items()}
            moments = {}
            if "mix_moments" in self.sent.modifiers:
                gradients = {name: 1e-3 * draw.normal(*x.shape) for name, x in adapters.items()}
                for name, x in adamw().init(adapters).items():
                    adapter, _, of = name.rpartition(".")
                    g = gradients[adapter].to(x.dtype) if of in ("m", "v") else x
                    moments[name] = g.square() if of == "v" else g.clone()
            part = State(adapters, moments, torch.full((K,), round), {})
            part.remember(self.algorithm.init(adapters, standing(rows.tolist(), part.rounds)))
            cohorts.append((rows, part))
        return State.together(cohorts) if self.ranks else cohorts[0][1]

    def rounds(self) -> Iterator["Came"]:
        """Play rounds without end."""
        t, state = 0, self.job.state.clone()
        while True:
            draw = Draw(self.seed, 1, t)
            fresh = self.begun(draw, t)
            if t % CHAIN:
                honest = state.take(self.honest)
                state = fresh
                state.put(self.honest, honest)
                state = state.at(t)
            else:
                state = fresh
            yield self._round(draw, state, t)
            t += 1

    def _drift(self, draw: Draw, state: State, t: int) -> None:
        """Have the honest train a little."""
        for rows, part in state.parts:
            honest = rows < len(self.honest)
            start = {name: x.clone() for name, x in part.adapters.items()}
            for x in part.adapters.values():
                step = 0.03 * draw.normal(len(rows), *x.shape[1:]) * over_clients(honest, x)
                x += step.to(x.dtype)
            at = standing(rows.tolist(), part.rounds)
            moved, _ = self.algorithm.local.end(start, part.adapters, part.known, at, self.algorithm.phase(t))
            for name, x in moved.items():
                part.adapters[name].copy_(x)

    def _round(self, draw: Draw, state: State, t: int) -> "Came":
        before: dict[int, Tensors] = {}
        phase = self.algorithm.phase(t)

        def exchange(sent: Sequence[Stack], round: int, refuse: Refuse) -> Heard:
            for cohort, (_, part) in enumerate(state.parts):
                before[cohort] = {name: x.clone() for name, x in part.adapters.items()}
            told = [self._told(draw, state, stack, phase, t) for stack in sent]
            return exchanged(self.job, self.job.clients, self.job.clients, told, round, refuse)

        self.lines.counts.clear()
        payloads = len(self.liars) if phase.send else 0
        try:
            if t % CHAIN:
                self._drift(draw, state, t)
            state, record = run_round(self.job, state, self.job.clients, t, exchange)
        except Exception as error:  # which no payload may bring about
            return Came(payloads, 0, 0, 0, {}, [f"round {t}: {type(error).__name__}: {error}"[:300]])
        most, broken = self._held(state, before, phase, t)
        tried = len(self.links(t)[0])
        return Came(payloads, tried, len(record.failed_edges), len(record.not_mixed), most, broken)

    def _told(self, draw: Draw, state: State, sent: Stack, phase: Phase, t: int) -> Stack:
        """Return what a cohort sends, of which some are not honest."""
        part = next(part for rows, part in state.parts if torch.equal(rows, sent.rows))
        liars = (sent.rows >= len(self.honest)).nonzero()[:, 0]
        near = self._near(state, sent.rows[liars], part, t)
        x = mutated(draw, take(part.adapters, liars), near)
        adapters = {name: y.index_copy(0, liars, x[name]) for name, y in part.adapters.items()}
        at = standing(sent.rows.tolist(), part.rounds)
        said, _ = self.algorithm.message.send(adapters, part.known, at, phase)
        told = {}
        for name, y in sent.tensors.items():
            theirs = said[name][liars]
            told[name] = y.index_copy(0, liars, theirs if name in adapters else beside(draw, theirs, self.n))
        return Stack(sent.rows, told)

    def _near(self, state: State, liars: Tensor, part: State, t: int) -> Tensors:
        """Return what one who hears each of these has, in their shapes."""
        by = torch.from_numpy(self.links(t)[1])[liars - len(self.honest)]
        near = {name: x[: len(liars)].double().clone() for name, x in part.adapters.items()}
        for rows, other in state.parts:
            there = torch.isin(by, rows).nonzero()[:, 0]
            places = torch.searchsorted(rows, by[there])
            for name, x in other.adapters.items():
                theirs = x[places].double()
                if theirs.shape[1:] == near[name].shape[1:]:
                    near[name][there] = theirs
        return near

    def _held(
        self, state: State, before: Mapping[int, Tensors], phase: Phase, t: int
    ) -> tuple[dict[str, float], list[str]]:
        """Return how much of what is allowed for the honest came to at most, and what does not hold."""
        most, broken = dict[str, float](), list[str]()

        def hold(what: str, of: str, value: Tensor, own: Tensor, floor: float) -> None:
            share = float((value / (FAR * own.clamp(min=floor))).nan_to_num(nan=torch.inf).max())
            most[of] = max(most.get(of, 0.0), share)
            if not share <= 1 + _ROUNDING:
                broken.append(f"round {t}: {what} is {share:.3g} times what the bound allows")

        for cohort, (rows, part) in enumerate(state.parts):
            places = (rows < len(self.honest)).nonzero()[:, 0]
            old, new = take(before[cohort], places), take(part.adapters, places)
            for name, x in {**part.adapters, **part.moments, **part.memory}.items():
                if x.is_floating_point() and not bool(x[places].isfinite().all()):
                    broken.append(f"round {t}: {name} is not finite")
            for name, x in new.items():
                hold(name, kind(name), norms(x.double()), norms(old[name].double()), floor(name, x))
            for a, b in pairs(new):
                value, own = (SCALING * norms(x[b].double() @ x[a].double()) for x in (new, old))
                hold(f"the product of {a[:-2]}", "products", value, own, SHARE * NORM)
            if (sound := self.algorithm.message.sound) is not None and phase.send:
                at = standing(rows.tolist(), part.rounds)
                said, _ = self.algorithm.message.send(part.adapters, part.known, at, phase)
                if not bool(sound(said)[places].all()):
                    broken.append(f"round {t}: what travels beside the adapters is such as nobody takes")
        return most, broken


class Came(NamedTuple):
    """What a round came to."""

    payloads: int
    edges: int
    failed: int  # edges, those that faults planned among them
    left_out: int
    most: Mapping[str, float]  # by kind, and of products, which share of what is allowed the honest came to at most
    broken: Sequence[str]


class _Counting(Lines):
    """What would be logged of the first `honest` clients, counted by its end."""

    def __init__(self, honest: int) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._honest = honest

    def say(self, client: int, text: str, level: int = 0) -> None:
        self.counts[text.rpartition("; ")[2]] += client < self._honest


def played(case: Case, payloads: int, seed: int = 0, stop_at: int = 5) -> Row:
    """Play a case until so many payloads were sent; where something breaks, until it has so often."""
    found: Row = {"payloads": 0, "edges": 0, "failed": 0, "left_out": 0, "kept": 0, "most": {}, "broken": []}
    turns = [*product(SIZES, (torch.float32, torch.float64))]
    worlds: dict[int, tuple[World, Iterator[Came]]] = {}
    begun, number = time.process_time(), 0
    while found["payloads"] < payloads and len(found["broken"]) < stop_at:
        turn = number % len(turns)
        if turn not in worlds:
            size, dtype = turns[turn]
            world = World(case, size, seed, dtype)
            worlds[turn] = world, world.rounds()
        world, rounds = worlds[turn]
        came = next(rounds)
        for name in ("payloads", "edges", "failed", "left_out"):
            found[name] += getattr(came, name)
        found["kept"] += sum(many for what, many in world.lines.counts.items() if what.startswith("it keeps"))
        found["most"] |= {of: max(found["most"].get(of, 0.0), x) for of, x in came.most.items()}
        found["broken"] += [f"{world.n} clients, {str(world.dtype)[6:]}, {what}" for what in came.broken[:2]]
        number += 1
    return {**found, "rounds": number, "seconds": round(time.process_time() - begun, 1)}


def main() -> None:
    """Run all cases, or print what they came to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutated", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--payloads", type=int, default=PAYLOADS, help="of all cases together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="k/n: every n-th case, from the k-th on, of all payloads")
    options = parser.parse_args()
    all_of = {f"{case} seed={options.seed}": case for case in cases()}
    each, asked = -(-options.payloads // len(all_of)), dict(share(options.part, all_of.items()))
    kept = Kept("mutated", only=lambda run: run in asked)
    if options.action == "run":
        torch.set_num_threads(1)
        kept.all({f"{name}": () for name in asked}, partial(_run, asked, each, options.seed))
    print(table(list(kept.rows.values())))
    if any(row["broken"] for row in kept.rows.values()):
        sys.exit(1)


def _run(
    asked: Mapping[str, Case], payloads: int, seed: int, left: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Row]]:
    done, begun = len(asked) - len(left), time.monotonic()
    print(f"{len(left)} of {len(asked)} cases, {payloads:,} payloads each …", file=sys.stderr, flush=True)
    for name in left:
        row = played(asked[name], payloads, seed)
        done += 1
        broken = f"; BROKEN: {row['broken'][0]}" if row["broken"] else ""
        print(f"{done}/{len(asked)} {time.monotonic() - begun:.0f} s: {name}{broken}", file=sys.stderr, flush=True)
        yield name, row


def table(rows: Sequence[Row]) -> str:
    """Return what cases came to, by method, as Markdown."""
    lines = ["| method | payloads | refused | left out | kept out | A | B | products | head | broken |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    methods = list(dict.fromkeys(row["run"].partition(";")[0] for row in rows))
    for method in [*methods, ""]:
        own = [row for row in rows if not method or row["run"].partition(";")[0] == method]
        sums = {of: sum(row[of] for row in own) for of in ("payloads", "edges", "failed", "left_out", "kept")}
        most = (
            {of: max(row["most"].get(of, 0.0) for row in own) for of in ("A", "B", "products", "head")} if own else {}
        )
        shares = [f"{sums[of] / max(1, sums['edges']):.0%}" for of in ("failed", "left_out")]
        broken = sum(bool(row["broken"]) for row in own)
        cells = [method or "all", f"{sums['payloads']:,}", *shares, f"{sums['kept']:,}"]
        lines.append(f"| {' | '.join([*cells, *(f'{x:.2f}' for x in most.values()), str(broken)])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
