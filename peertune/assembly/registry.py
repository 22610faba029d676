"""What a recipe chooses by name; the only reader of the tables of names.

It is made without a base model, so that a graph or a partition can be looked at in a second.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from peertune.assembly.needs import check_needs, check_privacy
from peertune.assembly.plugins import Choices, Found, find
from peertune.assembly.ranks import ranks_of
from peertune.data.partition import PARTITIONS, Partition, counts, fold
from peertune.data.poison import Twins, extended, poisoned
from peertune.data.poison import check as poison_check
from peertune.data.skew import divergence_by_chance, divergences, effective_clients
from peertune.data.tasks import TASKS
from peertune.errors import RecipeError, unknown
from peertune.method import Algorithm, Local, Message, Mixer, Schedule
from peertune.methods.attacks import ATTACKS, Attack, Planned, attacked
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.modifiers import MODIFIERS
from peertune.methods.push_sum import pushed
from peertune.methods.schedules import switching_interval
from peertune.randomness import Draw, generator
from peertune.recipe import Choice, Recipe, Time, arguments
from peertune.rounds.clock import STEP_TIMES, Clock, StepTime, each
from peertune.runs import trackers
from peertune.topology import (
    GRAPHS,
    Fault,
    Graph,
    Neighbourhood,
    clients_down,
    graph_near,
    lost_messages,
    may_meet,
    need_both_ways,
    one_period,
    rho,
    slowest,
    summary,
    with_rows,
)
from peertune.types import ALONE, Group, Poison, Split, Task

log = logging.getLogger(__name__)

_VALUES = {"Schedule": Schedule, "Local": Local, "Message": Message, "Mixer": Mixer, "Algorithm": Algorithm}
_TABLES = {
    "task": Choices("task", TASKS, ("seed", "missing_cells"), {"Task": Task}),
    "partition": Choices("partition", PARTITIONS, ("missing_cells",), {"Partition": Partition}),
    "graph": Choices("graph", GRAPHS, ("clients", "seed"), {"Graph": Graph}, with_rows),
    "algorithm": Choices("algorithm", ALGORITHMS, ("rho", "clients", "seed"), {"Algorithm": Algorithm}),
    "modifiers": Choices("modifier", MODIFIERS, (*map(str.lower, _VALUES), "seed", "near", "rounds"), _VALUES),
    "attacks": Choices("attack", ATTACKS, ("seed", "hostile", "slowest"), {"Attack": Attack}),
}
"""Block of a recipe → what it may name."""
_MEANT_OTHERWISE = {("algorithm", "fedrot_lora"): 2}
"""Names that stood for something else in earlier versions, and how many meanings they have had."""


Rows = Mapping[int, NDArray[np.int64]]
"""Client → rows of the training split, sorted."""


class Parts(NamedTuple):
    """The first step of `build`: what the recipe chooses by name, and for whom."""

    task: Task
    graph: Graph
    faults: Sequence[Fault]
    algorithm: Algorithm
    clients: Sequence[int]  # all, a process's share of them, or one, a peer
    rows: Rows  # client → the rows that it trains on
    held_out: Rows  # client → its other ones, on which it is judged; {} where nobody is
    ranks: Sequence[int]  # [n], where the recipe has a table of them
    twins: Mapping[int, Sequence[Twins]]  # client → what it trains on for its rows, where it is hostile
    clock: Clock | None  # virtual time, in a simulation that has one
    group: Group  # the processes that share the clients
    peer: bool  # whether there are other clients, and nobody here who holds them


def build_parts(
    recipe: Recipe,
    clients: Sequence[int] | None = None,
    own_data: bool = False,
    *,
    known: Neighbourhood | None = None,
    group: Group = ALONE,
    task: Task | None = None,
) -> Parts:
    """Make all that is chosen by name, but a task that is there; for these clients, and as the arguments of `build`."""
    trackers.check(recipe.report_to)
    check_privacy(recipe)
    task = build_task(recipe) if task is None else task
    learnt = takes("task", recipe.task.name, "classes") and not recipe.task.settings.get("classes")
    if recipe.privacy and task.classes and learnt:
        raise RecipeError(
            "task.classes: are learnt from the rows, so that one row could add a class that all see; name them"
        )
    graph = build_graph(recipe, known)
    faults = build_faults(recipe)
    clients = range(recipe.clients) if clients is None else clients
    dealt = dict.fromkeys(clients, np.arange(len(task.train))) if own_data else build_partition(recipe, task)
    rows, held_out = hold_out(recipe, {client: dealt[client] for client in clients}, len(task.train))
    peer = group.size == 1 and len(clients) < recipe.clients
    waits = recipe.time.mode == "rounds"
    if peer:
        if waits:
            need_both_ways(graph)
        if recipe.evaluate.patience is not None:
            raise RecipeError(
                "evaluate.patience: a peer that stops early leaves its neighbours' edges to fail; leave it out, and "
                "give evaluate.load_best=true, by which each peer keeps its best adapter"
            )
    if not (waits or peer) and recipe.checkpoint.steps is not None:
        raise RecipeError(
            "checkpoint.steps: clients that wait for nobody have no step in common, so that no state lies within a "
            "round; leave it out in a simulation with time.mode=asynchronous"
        )
    clock = build_clock(recipe, peer=peer)
    if peer and clock is not None:
        log.info("time.step_s: is of simulations; a peer takes the time that it takes")
        clock = None
    ranks = ranks_of(recipe)
    algorithm = build_algorithm(recipe, graph)
    plan = build_attacks(recipe, graph)
    if (peer or group.size > 1) and (knowing := _knows_all(recipe, plan)):
        raise RecipeError(
            f"attacks: {knowing} goes by what all clients have, which is known where one process simulates them; "
            "leave it out among peers and with --workers"
        )
    if enemies := hostile(recipe):
        log.info("attacks: %s hostile; scores are of the others", _are(enemies))
    task, twins = _with_twins(recipe, plan, task, rows)
    return Parts(task, graph, faults, algorithm, clients, rows, held_out, ranks, twins, clock, group, peer)


def _with_twins(recipe: Recipe, plan: Sequence[Planned], task: Task, rows: Rows) -> tuple[Task, dict[int, list[Twins]]]:
    """Return the task with what hostile clients train on in the place of their `rows` after the training rows."""
    more, twins, size = list[Split](), dict[int, list[Twins]](), len(task.train)
    for place, planned in enumerate(plan):
        if (poison := planned.attack.poison) is None:
            continue
        poison_check(f"attacks[{place}]: {recipe.attacks[place].name}", task, poison)
        for client in sorted({*planned.clients} & rows.keys()):
            more.append(poisoned(task, poison, rows[client], recipe.seed, client))
            own = size + np.arange(len(rows[client]))
            size += len(own)
            twins.setdefault(client, []).append(Twins(planned.first, planned.last, own))
    return (replace(task, train=extended(task.train, more)) if more else task), twins


def hold_out(recipe: Recipe, rows: Rows, of: int) -> tuple[Rows, Rows]:
    """Divide each client's rows into those that it trains on and those on which it is judged.

    These are the recipe's share of them, a seeded draw, at least one; or those in a fold of all rows of the split, `of`
    so many. A fold that is set aside is in neither. Raises RecipeError for a client that is left without rows.
    """
    if recipe.evaluate.on == "common":
        return rows, {}
    held_out = {}
    if isinstance(part := recipe.evaluate.held_out, str):
        folds = {name: fold(name, of) for name in (part, recipe.evaluate.set_aside) if name}
        held_out = {client: np.intersect1d(own, folds[part]) for client, own in rows.items()}
        trained = {client: np.setdiff1d(own, np.concatenate([*folds.values()])) for client, own in rows.items()}
        for client in rows:
            if not (len(held_out[client]) and len(trained[client])):
                raise RecipeError(
                    f"evaluate.held_out: client {client} has {len(held_out[client])} rows in fold {part} and "
                    f"{len(trained[client])} to train on; use fewer folds or clients, or a share such as 0.2"
                )
        return trained, held_out
    for client, own in rows.items():
        if len(own) < 2:
            raise RecipeError(
                f"evaluate.on: client {client} has one row and can hold out none; "
                "use evaluate.on=common, or fewer clients"
            )
        count = min(len(own) - 1, max(1, round(part * len(own))))
        held_out[client] = np.sort(generator(recipe.seed, Draw.HELD_OUT, client).permutation(own)[:count])
    return {client: np.setdiff1d(own, held_out[client]) for client, own in rows.items()}, held_out


def validating_rows(recipe: Recipe, rows: int) -> NDArray[np.int64]:
    """Return which of a validation set's `rows` are used: all, or those in the recipe's fold."""
    return np.arange(rows) if recipe.evaluate.fold is None else fold(recipe.evaluate.fold, rows)


def build_graph(recipe: Recipe, known: Neighbourhood | None = None) -> Graph:
    """Make the recipe's graph, or what is known of it where only one client's neighbourhood is."""
    if known is None:
        graph: Graph = _make("graph", recipe.graph, clients=recipe.clients, seed=recipe.seed)
        if graph.clients != recipe.clients:
            raise RecipeError(f"graph: {recipe.graph.name} made one of {graph.clients} clients, not {recipe.clients}")
        return graph
    settings = completed(recipe)["graph"].settings
    near = graph_near(known, seed=recipe.seed, activation=settings["activation"], weights=settings["weights"])
    return with_rows(near, settings.get("row_counts"))


def graph_settings(recipe: Recipe) -> dict[str, Any]:
    """Return what the recipe says of its graph beyond defaults: all from which it follows but files and code.

    Raises RecipeError for a graph that one who is told its edges could not make, for lack of a setting.
    """
    for needed in ("activation", "weights"):
        if not takes("graph", recipe.graph.name, needed):
            raise RecipeError(f"graph: {recipe.graph.name} takes no {needed}, which own rosters need; use one for all")
    return {**beyond_defaults("graph", recipe.graph), "clients": recipe.clients, "seed": recipe.seed}


def beyond_defaults(where: str, choice: Choice) -> dict[str, Any]:
    """Return a choice's name and those settings that are not their defaults, by key: what it is in every version.

    A version that lacks a setting makes of the choice what one that has it makes of its default. A name that stood for
    something else in an earlier version goes with a number, `meaning`, so that the two don't agree.
    """
    defaults, meaning = choice_defaults(where, choice.name), _MEANT_OTHERWISE.get((where, choice.name))
    marked = {"name": choice.name} if meaning is None else {"name": choice.name, "meaning": meaning}
    return marked | {key: value for key, value in choice.settings.items() if value != defaults.get(key)}


def choice_defaults(where: str, name: str) -> dict[str, Any]:
    """Return the defaults of a choice's settings. Raises RecipeError for a name that is none."""
    parameters = inspect.signature(_found(where, name).factory).parameters.values()
    given = _TABLES[where].given
    return {p.name: p.default for p in parameters if p.name not in given and p.default is not p.empty}


def takes(where: str, name: str, setting: str) -> bool:
    """Return whether a choice has this setting. Raises RecipeError for a name that is none."""
    return setting in inspect.signature(_found(where, name).factory).parameters


def from_outside(recipe: Recipe, *blocks: str) -> dict[str, Mapping[str, str]]:
    """Return which code stands behind names from outside, by block; of these blocks, or of all."""
    named = _chosen(recipe, blocks or _TABLES)
    return {where: origin for block, where, choice in named if (origin := _found(block, choice.name, where).origin)}


def build_task(recipe: Recipe) -> Task:
    """Load the recipe's data."""
    log.info("loading the task %s", recipe.task.name)
    task: Task = _make("task", recipe.task, seed=recipe.seed, missing_cells=recipe.missing_cells)
    return task


def build_partition(recipe: Recipe, task: Task) -> list[NDArray[np.int64]]:
    """Deal the training rows to the clients; return the rows of each."""
    divide = _make("partition", recipe.partition, missing_cells=recipe.missing_cells)
    parts: list[NDArray[np.int64]] = divide(task.train, recipe.clients, recipe.seed)
    return parts


def build_algorithm(recipe: Recipe, graph: Graph, of: Callable[[Graph], float] = rho) -> Algorithm:
    """Make the recipe's method for this graph, with its modifiers; `of` says what the graph's rho is.

    Raises RecipeError where the recipe lacks what one of these needs.
    """
    given: dict[str, Any] = {"rho": partial(of, graph), "clients": recipe.clients, "seed": recipe.seed}
    algorithm: Algorithm = _make("algorithm", recipe.algorithm, **given)
    for place, choice in enumerate(recipe.modifiers):
        if choice.name in [earlier.name for earlier in recipe.modifiers[:place]]:
            raise RecipeError(f"modifiers[{place}]: {choice.name} stands twice; give it once")
        values: dict[str, Any] = algorithm._asdict() | {"algorithm": algorithm}
        values |= {"seed": recipe.seed, "rounds": recipe.rounds, "near": partial(_near, graph)}
        changed = _make("modifiers", choice, f"modifiers[{place}]", **values)
        (field,) = (name for name, x in values.items() if type(x) is type(changed))
        if not takes("modifiers", choice.name, field):
            raise RecipeError(f"modifiers[{place}]: {choice.name} returns its {field} and takes no parameter {field}")
        algorithm = changed if field == "algorithm" else algorithm._replace(**{field: changed})
    attacks = build_attacks(recipe, graph)
    check_needs(recipe, graph, algorithm, attacks)
    algorithm = pushing(algorithm, graph, build_faults(recipe)) if graph.weights == "push_sum" else algorithm
    return attacked(algorithm, attacks)


def _near(graph: Graph) -> dict[int, list[int]]:
    """Return whom each client may meet; of a neighbourhood, of the one client that it is of."""
    clients = range(graph.clients) if graph.known is None else [graph.known.client]
    return {client: may_meet(graph, client) for client in clients}


def pushing(algorithm: Algorithm, graph: Graph, faults: Sequence[Fault]) -> Algorithm:
    """Return the method with push-sum on this graph, some of whose messages are planned to be lost."""
    lossy: list[set[int]] = [set() for _ in range(graph.clients)]
    for i, j in (fault.edge for fault in faults if fault.edge is not None):
        lossy[i].add(j)
        lossy[j].add(i)
    return pushed(algorithm, graph.clients, partial(lost_messages, graph, faults), [sorted(near) for near in lossy])


def build_faults(recipe: Recipe) -> list[Fault]:
    """Make the recipe's plan of faults. Raises RecipeError for one that names no client or can't be."""
    faults = []
    for number, planned in enumerate(recipe.faults):
        where = f"faults[{number}]"
        named = [*(planned.edge or []), *(client for client in (planned.down, planned.slow) if client is not None)]
        if sum(value is not None for value in (planned.edge, planned.down, planned.slow)) != 1:
            raise RecipeError(f"{where}: give one of edge: [i, j], down: i and slow: i")
        if planned.rounds[0] > planned.rounds[1]:
            raise RecipeError(f"{where}.rounds: {planned.rounds}, the first round comes first")
        if not all(0 <= client < recipe.clients for client in named) or len(set(named)) < len(named):
            raise RecipeError(f"{where}: clients {named}; give different ones from 0 to {recipe.clients - 1}")
        edge = (planned.edge[0], planned.edge[1]) if planned.edge else None
        first, last = planned.rounds
        faults.append(Fault(first, last, edge, planned.down, planned.slow, planned.delay_s))
    starts = {fault.first for fault in faults if fault.down is not None and fault.first < recipe.rounds}
    for t in sorted(starts):  # the only rounds in which the number of those that are down can reach its height
        if len(clients_down(faults, t)) == recipe.clients:
            raise RecipeError(f"faults: all clients are down in round {t}; leave one up")
    return faults


def _are(clients: Sequence[int]) -> str:
    return f"client {clients[0]} is" if len(clients) == 1 else f"clients {', '.join(map(str, clients))} are"


def hostile(recipe: Recipe) -> list[int]:
    """Return the clients that attack in any round, ascending."""
    return sorted({client for planned in recipe.attacks for client in planned.clients})


def build_attacks(recipe: Recipe, graph: Graph) -> list[Planned]:
    """Make the recipe's plan of attacks on this graph. Raises RecipeError for one that can't be, or can't act."""
    plan: list[Planned] = []
    given = _given(recipe, lambda: graph)
    for place, chosen in enumerate(recipe.attacks):
        where = f"attacks[{place}]"
        attack: Attack = _make("attacks", chosen, where, **given)
        if max(chosen.clients) >= recipe.clients or len(set(chosen.clients)) < len(chosen.clients):
            raise RecipeError(f"{where}.clients: {chosen.clients}; give different ones from 0 to {recipe.clients - 1}")
        first, last = chosen.rounds or (0, recipe.rounds - 1)
        if first > last:
            raise RecipeError(f"{where}.rounds: {chosen.rounds}, the first round comes first")
        if first >= recipe.rounds:
            raise RecipeError(f"{where}.rounds: {chosen.rounds}, and the last round is {recipe.rounds - 1}")
        for earlier, other in enumerate(plan):
            both = sorted({*chosen.clients} & {*other.clients})
            if both and other.attack.on == attack.on and first <= other.last and other.first <= last:
                raise RecipeError(
                    f"{where}: client {both[0]} attacks by its {attack.on} in attacks[{earlier}] at the same time; "
                    "give other clients or other rounds"
                )
        plan.append(Planned(attack, tuple(chosen.clients), first, last))
    if plan:
        backdoor(recipe)
        honest, faults = {*range(recipe.clients)} - {*hostile(recipe)}, build_faults(recipe)
        for t in sorted({0, *(fault.first for fault in faults)}):
            if honest <= clients_down(faults, t):
                raise RecipeError(f"attacks: all clients that are up in round {t} are hostile; leave one honest")
    return plan


def backdoor(recipe: Recipe) -> Poison | None:
    """Return the trigger that hostile clients put in their rows, and what they do with it. There is one at most."""
    graph = partial(build_graph, recipe)
    made = (_make("attacks", one, "attacks", **_given(recipe, graph)) for one in recipe.attacks)
    found = [attack.poison for attack in made if attack.poison is not None and attack.poison.word]
    if any(other != found[0] for other in found):
        raise RecipeError("attacks: two backdoors can't be told apart in one score; give them the same settings")
    return found[0] if found else None


def _given(recipe: Recipe, graph: Callable[[], Graph]) -> dict[str, Any]:
    """Return what the program hands to the factories of attacks."""
    return {"seed": recipe.seed, "hostile": hostile(recipe), "slowest": lambda: slowest(graph())}


def _knows_all(recipe: Recipe, plan: Sequence[Planned]) -> str | None:
    """Return the first attack of a plan, by name, that goes by what all clients have."""
    return next((choice.name for choice, one in zip(recipe.attacks, plan, strict=True) if one.attack.knows_all), None)


def build_clock(recipe: Recipe, *, peer: bool = False) -> Clock | None:
    """Make the recipe's virtual clock, or None where nothing has a time, as of a `peer` nothing need have.

    Raises RecipeError for speeds of another number of clients, and for settings that need others.
    """
    time = recipe.time
    given = {key: value for key, value in time if value != Time.model_fields[key].get_default()}
    idle = given.keys() & {"staleness_exponent", "phases", "mixing"}
    if peer and time.mode == "asynchronous":
        if time.mixing == "pairwise":
            raise RecipeError(
                "time.mixing: peers that meet in pairs go by rounds; give time.mode=rounds and graph.name=matching, or "
                "time.mixing=push"
            )
        if time.phases == "common":
            raise RecipeError("time.phases: peers have no common time; give time.phases=own")
        given = {key: value for key, value in given.items() if key not in {"mode", *idle}}
    if time.step_s is None:
        if time.mode == "asynchronous" and not peer:
            raise RecipeError(
                "time.step_s: is missing; clients that wait for nobody need to know how long a step takes"
            )
        if given:
            raise RecipeError(f"time.{next(iter(given))}: without time.step_s nothing has a time; give step_s")
        return None
    if time.mixing == "pairwise" and (odd := given.keys() & {"latency_s", "bandwidth_bytes_s", "staleness_exponent"}):
        raise RecipeError(f"time.{min(odd)}: two that meet average at once, with time.mixing=pairwise; leave it out")
    if time.mode == "asynchronous" and time.deadline_s is not None:
        raise RecipeError("time.deadline_s: where nobody waits for anybody nobody is late; give time.mode=rounds")
    if "late" in given and time.deadline_s is None:
        raise RecipeError("time.late: is of a deadline; give time.deadline_s, or leave it out")
    if peer and time.deadline_s is not None:
        raise RecipeError("time.deadline_s: is of simulations; a peer waits for neighbours for network.patience_s")
    if time.mode == "rounds" and idle:
        raise RecipeError(f"time.{min(idle)}: is of time.mode=asynchronous, and the mode is rounds; leave it out")
    down: dict[int, list[tuple[float, float]]] = {}
    for number, pause in enumerate(time.down):
        if pause.client >= recipe.clients:
            raise RecipeError(f"time.down[{number}]: client {pause.client}; give one from 0 to {recipe.clients - 1}")
        if pause.from_s >= pause.to_s:
            raise RecipeError(f"time.down[{number}]: from_s {pause.from_s:g} is not before to_s {pause.to_s:g}")
        down.setdefault(pause.client, []).append((pause.from_s, pause.to_s))
    bandwidth = inf if time.bandwidth_bytes_s is None else time.bandwidth_bytes_s
    deadline_s = inf if time.deadline_s is None else time.deadline_s
    return Clock(_step_time(recipe), time.latency_s, bandwidth, down, deadline_s, time.late)


def _step_time(recipe: Recipe) -> StepTime:
    asked = recipe.time.step_s
    if isinstance(asked, Choice):
        factory, chosen = _found_step_time(asked)
        given = {"seed": recipe.seed, "clients": recipe.clients}
        return factory(**chosen, **{name: given[name] for name in given.keys() & inspect.signature(factory).parameters})
    assert asked is not None, "who asks for a clock has times"
    seconds = asked if isinstance(asked, list) else [asked] * recipe.clients
    if len(seconds) != recipe.clients:
        raise RecipeError(f"time.step_s: {len(seconds)} speeds for {recipe.clients} clients; give one for each")
    return each(seconds)


def _found_step_time(asked: Choice) -> tuple[Callable[..., StepTime], dict[str, Any]]:
    """Return the factory of this name, and the arguments that the recipe has for it."""
    if asked.name not in STEP_TIMES:
        raise RecipeError(unknown("time.step_s", asked.name, STEP_TIMES))
    factory = STEP_TIMES[asked.name]
    return factory, arguments(factory, asked, "time.step_s", ["seed", "clients"])


def label_counts(task: Task, split: Split, parts: Sequence[NDArray[np.int64]]) -> list[list[int]]:
    """Return how many rows of each class each part of a split holds; of a regression, how many rows."""
    if not task.classes:
        return [[len(part)] for part in parts]
    per_label: list[list[int]] = counts(split, parts, len(task.classes)).tolist()
    return per_label


def describe_data(recipe: Recipe, task: Task | None = None) -> dict[str, Any]:
    """Return what each client trains on and how unlike the clients are, and how many rows validate and test.

    `label_skew` is None where there are no classes, or nobody to differ from: so is each client's `divergence`.
    """
    task = build_task(recipe) if task is None else task
    trained, held_out = hold_out(recipe, dict(enumerate(build_partition(recipe, task))), len(task.train))
    counts = np.array(label_counts(task, task.train, list(trained.values())))
    labels, sizes = task.classes or ("rows",), counts.sum(axis=1)
    skewed = divergences(counts, counts.sum(axis=0)) if task.classes and recipe.clients > 1 else None
    return {
        "clients": [
            {
                "client": client,
                "labels": dict(zip(labels, row, strict=True)),
                "rows": sum(row),
                "divergence": None if skewed is None else float(skewed[client]),
            }
            for client, row in enumerate(counts.tolist())
        ],
        "label_skew": None
        if skewed is None
        else {
            "mean": float(skewed.mean()),
            "min": float(skewed.min()),
            "max": float(skewed.max()),
            "by_chance": divergence_by_chance(counts, recipe.seed),
        },
        "quantity_skew": {
            "effective_clients": effective_clients(sizes),
            "fewest": int(sizes.min()),
            "most": int(sizes.max()),
        },
        "rows": len(task.train),
        "held": int(sizes.sum()),
        "held_out": sum(map(len, held_out.values())),
        "validation": len(validating_rows(recipe, len(task.validation))),
        "test": len(task.test or ()),
    }


def describe_graph(graph: Graph) -> dict[str, Any]:
    """Return a graph's name and settings, its `GraphSummary`, and T* (None where it never mixes).

    Where rounds of different laws follow each other in a period, `one_period` says what the first leaves (see there).
    """
    facts = summary(graph)
    try:
        interval: int | None = switching_interval(facts.rho)
    except RecipeError:  # no pair met in any draw
        interval = None
    settings = {key: getattr(graph, key) for key in ("name", "activation", "weights", "period")}
    settings |= {"directed": True} if graph.directed else {}
    return settings | vars(facts) | {"one_period": one_period(graph), "switching_interval": interval}


def check_choices(recipe: Recipe) -> None:
    """Raise PeertuneError for names, settings, graphs and trackers that can't be; nothing is loaded."""
    trackers.check(recipe.report_to)
    completed(recipe)
    check_privacy(recipe)
    build_faults(recipe)
    build_clock(recipe)
    build_algorithm(recipe, build_graph(recipe), of=lambda graph: 0.0)


def resolved_choices(recipe: Recipe, algorithm: Algorithm) -> dict[str, Any]:
    """Return the choices with every default written out, and what is automatic as it came out for this algorithm."""
    named = {**recipe.algorithm.settings, **algorithm.settings}
    return completed(recipe) | {"algorithm": Choice(name=recipe.algorithm.name, **named)}


def _found(block: str, name: str, where: str = "") -> Found:
    return find(_TABLES[block], name, where or block)


def _chosen(recipe: Recipe, blocks: Iterable[str]) -> Iterator[tuple[str, str, Choice]]:
    """Yield the choices of these blocks: block, where it stands, and the choice."""
    for block in blocks:
        chosen = getattr(recipe, block)
        if isinstance(chosen, Choice):
            yield block, block, chosen
            continue
        for place, choice in enumerate(chosen):
            yield block, f"{block}[{place}]", choice


def completed(recipe: Recipe) -> dict[str, Any]:
    """Return the choices of the recipe, by block, with every default written out."""
    whole: dict[str, Any] = {"modifiers": [], "attacks": []}
    for block, where, choice in _chosen(recipe, _TABLES):
        own, more = _settings(block, choice, where)
        given = choice.model_dump(include={*type(choice).model_fields})
        made = type(choice)(**given, **own, **{key: value for key, value in more.items() if value is not None})
        whole[block] = [*whole[block], made] if block in whole else made
    if isinstance(recipe.time.step_s, Choice):
        _, chosen = _found_step_time(recipe.time.step_s)
        whole["time"] = recipe.time.model_copy(update={"step_s": Choice(name=recipe.time.step_s.name, **chosen)})
    return whole


def _settings(block: str, choice: Choice, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of the choice's factory, and of what is done to all that is made of the block."""
    table, factory = _TABLES[block], _found(block, choice.name, where).factory
    (made, *names) = inspect.signature(table.also).parameters if table.also is not None else ("",)
    more = {name: choice.settings[name] for name in names if name in choice.settings}
    own = {name: value for name, value in choice.settings.items() if name not in more}
    values = arguments(factory, Choice(name=choice.name, **own), where, table.given)
    if table.also is None:
        return values, {}
    return values, arguments(table.also, Choice(name=choice.name, **more), where, [made])


def _make(block: str, choice: Choice, where: str = "", **given: Any) -> Any:
    """Call the factory of the choice's name with the recipe's settings, and what it asks for of `given`."""
    table, where = _TABLES[block], where or block
    factory = _found(block, choice.name, where).factory
    own, more = _settings(block, choice, where)
    asked = inspect.signature(factory).parameters
    made = factory(**own, **{name: value for name, value in given.items() if name in asked})
    types = tuple(wanted for wanted in table.made.values() if isinstance(wanted, type))
    if types and not isinstance(made, types):
        raise RecipeError(f"{where}: {choice.name} made a {type(made).__name__}, which is no {' or '.join(table.made)}")
    return made if table.also is None else table.also(made, **more)
