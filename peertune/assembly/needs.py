"""What a method or a modifier needs of a recipe, and what is to be done where the recipe has something else."""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from peertune.assembly.ranks import differ
from peertune.errors import RecipeError
from peertune.method import Algorithm, Message, nothing, plain_weights, stay
from peertune.methods.attacks import Planned
from peertune.methods.modifiers import DERIVED_FOR_SGD
from peertune.recipe import Recipe
from peertune.topology import Graph

log = logging.getLogger(__name__)

_ROUNDS = 100  # that are looked at for what is sent


class Need(NamedTuple):
    """A need: whether a recipe meets it, and what would."""

    met: Callable[[Recipe, Graph, Algorithm], bool]
    instead: str


def _sends_both(recipe: Recipe, graph: Graph, algorithm: Algorithm) -> bool:
    sent = {algorithm.phase(t).send & {"A", "B"} for t in range(min(recipe.rounds, _ROUNDS))}
    return sent <= {frozenset(), frozenset({"A", "B"})}


def _sends(recipe: Recipe, graph: Graph, algorithm: Algorithm) -> bool:
    return any(algorithm.phase(t).send for t in range(min(recipe.rounds, _ROUNDS)))


def _sends_alike(recipe: Recipe, graph: Graph, algorithm: Algorithm) -> bool:
    return len({algorithm.phase(t).send for t in range(min(recipe.rounds, _ROUNDS))}) == 1


def _moments(recipe: Recipe, graph: Graph, algorithm: Algorithm) -> bool:
    training = recipe.training
    trains = [algorithm.phase(t).train for t in range(min(recipe.rounds, _ROUNDS) + 1)]
    lasting = {"never": True, "round": False, "phase": any(now == last for last, now in pairwise(trains))}
    return training.optim == "adamw" and lasting[training.reset_optimizer]


def _static(recipe: Recipe, graph: Graph, algorithm: Algorithm) -> bool:
    return graph.activation == 1 and graph.period == 1 and not recipe.faults


def _together_or_apart(recipe: Recipe, graph: Graph, algorithm: Algorithm) -> bool:
    sent = {algorithm.phase(t).send & {"A", "B"} for t in range(min(recipe.rounds, _ROUNDS))} - {frozenset()}
    return frozenset({"A", "B"}) not in sent or len(sent) == 1


def _plain(recipe: Recipe, graph: Graph, algorithm: Algorithm) -> bool:
    return algorithm.message == Message() and algorithm.mixer.weigh is plain_weights


NEEDS: Mapping[str, Need] = {
    "both factors": Need(_sends_both, "choose an algorithm that sends A and B in every round"),
    "edges both ways": Need(lambda recipe, graph, algorithm: not graph.directed, "choose another graph than epidemic"),
    "common rounds": Need(lambda recipe, graph, algorithm: recipe.time.mode == "rounds", "give time.mode=rounds"),
    "exchange": Need(_sends, "choose an algorithm that sends something"),
    "head": Need(lambda recipe, graph, algorithm: recipe.head == "trained", "give head=trained"),
    "kept basis": Need(
        lambda recipe, graph, algorithm: algorithm.mixer.keeps_basis,
        "choose an algorithm whose mixing leaves each row of A what it was, as all but decaf do",
    ),
    "messages": Need(
        lambda recipe, graph, algorithm: recipe.time.mixing != "pairwise",
        "give time.mixing=push: two that meet average what they hold, and send no message",
    ),
    "mixing by entry": Need(
        lambda recipe, graph, algorithm: algorithm.mixer.by_entry,
        "choose an algorithm that mixes each entry by itself, as all but decaf and lora_fair do",
    ),
    "moments": Need(_moments, "give training.optim=adamw and training.reset_optimizer=never"),
    "no deadline": Need(lambda recipe, graph, algorithm: recipe.time.deadline_s is None, "leave out time.deadline_s"),
    "no public copies": Need(
        lambda recipe, graph, algorithm: algorithm.message.edgewise is None,
        "leave out choco: what a client has lied once stays in its neighbours' copies, and in its own",
    ),
    "factors together or apart": Need(
        _together_or_apart, "choose an algorithm that sends A and B always in one round, or never"
    ),
    "plain messages": Need(
        _plain,
        "leave out all modifiers of what is sent and switch_every=adaptive, which send or weigh otherwise",
    ),
    "one rank": Need(
        lambda recipe, graph, algorithm: not differ(recipe),
        "leave out lora.ranks, which it can't mix",
    ),
    "ranks that differ": Need(
        lambda recipe, graph, algorithm: differ(recipe),
        "give lora.ranks, or leave it out: where all have one rank it changes nothing",
    ),
    "sgd": Need(lambda recipe, graph, algorithm: recipe.training.optim == "sgd", "give training.optim=sgd"),
    "unjudged messages": Need(
        lambda recipe, graph, algorithm: not (recipe.evaluate.ensemble or recipe.evaluate.mixing),
        "leave out evaluate.ensemble and evaluate.mixing, which judge whole adapters of others",
    ),
    "one sort of message": Need(
        _sends_alike, "choose an algorithm that sends the same factors in every round, as all but rolora do"
    ),
    "whole messages": Need(
        lambda recipe, graph, algorithm: algorithm.message.whole,
        "leave out shared_mask, of which a receiver gets some entries only",
    ),
    "plain local steps": Need(
        lambda recipe, graph, algorithm: algorithm.local.init is nothing and algorithm.local.end is stay,
        "leave out the modifiers of local steps, which count on all steps of a round",
    ),
    "clients that need not be private": Need(
        lambda recipe, graph, algorithm: recipe.privacy is None or recipe.privacy.unit == "record",
        "leave out privacy.unit=client: what it keeps of a client's steps has no noise",
    ),
    "rows that need not be private": Need(
        lambda recipe, graph, algorithm: recipe.privacy is None,
        "leave out privacy: a second gradient of a step's rows is not counted",
    ),
    "rate that stays": Need(
        lambda recipe, graph, algorithm: (
            recipe.training.lr_scheduler_type == "constant" or recipe.training.lr_scheduler_span == "round"
        ),
        "give training.lr_scheduler_type=constant or training.lr_scheduler_span=round: who is fast makes more steps",
    ),
    "clients that are up": Need(
        lambda recipe, graph, algorithm: all(fault.down is None for fault in recipe.faults),
        "plan when a client is down by time.down, in seconds; faults are by rounds, which clients have none in common",
    ),
    "symmetric weights": Need(
        lambda recipe, graph, algorithm: not graph.directed and graph.rows is None,
        "choose a graph whose edges go both ways, and other weights than rows",
    ),
    "weights by degrees": Need(
        lambda recipe, graph, algorithm: graph.weights in ("metropolis", "row"),
        "give graph.weights=metropolis, or row on a directed graph",
    ),
    "static graph": Need(_static, "give a graph whose edges stay, graph.activation=1 and no faults"),
}
"""What `needs` of a method's values may hold."""


_WITHOUT_ROUNDS = (
    "clients that are up",
    "one sort of message",
    "plain messages",
    "rate that stays",
    "unjudged messages",
    "weights by degrees",
    "one rank",
)


_WITH_RANKS = ("unjudged messages",)


_WITH_A_DEADLINE = ("edges both ways", "one rank", "plain local steps", "plain messages", "unjudged messages")


def check_needs(recipe: Recipe, graph: Graph, algorithm: Algorithm, attacks: Sequence[Planned] = ()) -> None:
    """Raise RecipeError, in one line, for the first need that a recipe doesn't meet; warn of what seldom goes well."""
    names = " with ".join([recipe.algorithm.name, *(modifier.name for modifier in recipe.modifiers)])
    needed = [(f"algorithm: {names}", name) for name in sorted(algorithm.needs)]
    for place, (planned, choice) in enumerate(zip(attacks, recipe.attacks, strict=True)):
        needed += [(f"attacks[{place}]: {choice.name}", name) for name in sorted(planned.attack.needs)]
    if recipe.time.mode == "asynchronous":
        needed += [("time: mode asynchronous", name) for name in _WITHOUT_ROUNDS]
    if recipe.time.deadline_s is not None:
        needed += [("time: deadline_s", name) for name in _WITH_A_DEADLINE]
    if recipe.time.mixing == "pairwise":
        needed += [("time: mixing pairwise", name) for name in ("edges both ways", "mixing by entry")]
    if differ(recipe):
        needed += [("lora: ranks", name) for name in _WITH_RANKS]
    if graph.weights == "push_sum":
        needed += [
            ("graph: weights push_sum", name) for name in ("factors together or apart", "one rank", "plain messages")
        ]
    for who, name in needed:
        if name not in NEEDS:
            raise RecipeError(f"{who} needs {name!r}, which nobody knows; choose from {', '.join(NEEDS)}")
        if not NEEDS[name].met(recipe, graph, algorithm):
            raise RecipeError(f"{who} needs {name}; {NEEDS[name].instead}")
    derived = [modifier.name for modifier in recipe.modifiers if modifier.name in DERIVED_FOR_SGD]
    if derived and recipe.training.optim != "sgd":
        log.warning(
            "modifiers: %s is derived for SGD, and %s learnt far less with it where it was tried (docs/results.md); "
            "give training.optim=sgd, with a rate for that",
            *(derived[0], recipe.training.optim),
        )


def check_privacy(recipe: Recipe) -> None:
    """Raise RecipeError where what a recipe asks for goes against the privacy that it asks for."""
    asked, training, evaluate = recipe.privacy, recipe.training, recipe.evaluate
    if asked is None:
        return
    if asked.epsilon is None and asked.noise_multiplier is None:
        raise RecipeError("privacy: says neither how much nor how; give epsilon, such as 8, or noise_multiplier")
    by_record = asked.unit == "record"
    if asked.delta is None:
        raise RecipeError(
            "privacy.delta: is missing, and without it epsilon says nothing; give less than one over "
            + ("a client's rows, such as 1e-5" if by_record else "the clients, such as 1e-5")
        )
    if by_record and "max_grad_norm" in training.model_fields_set and training.max_grad_norm:
        raise RecipeError(
            "training.max_grad_norm: cuts what is noised already; leave it out, and give privacy.max_grad_norm"
        )
    if by_record and training.class_weight == "balanced":
        raise RecipeError(
            "training.class_weight: balanced weighs a row by how many others there are of its class, which privacy "
            "can't count; give weights by class"
        )
    if evaluate.on != "common" or evaluate.mixing:
        key = "evaluate.mixing" if evaluate.mixing else "evaluate.on"
        raise RecipeError(f"{key}: scores on clients' own rows would tell of them; judge on common rows with privacy")
    if recipe.task.settings.get("validation_split") is not None:
        raise RecipeError(
            "task.validation_split: scores would be on clients' own rows, chosen by how many there are; give rows for "
            "validation that may be known"
        )
    if recipe.lora.init is not None:
        log.warning(
            "lora.init: what %s was trained on is in none of these budgets; give one that saw no row of these clients, "
            "or count what it spent",
            recipe.lora.init,
        )
    if not by_record and recipe.time.deadline_s is not None:
        raise RecipeError(
            "time.deadline_s: a round's noise goes to all sites, late or not; leave it out with privacy.unit=client"
        )
    if recipe.time.mode == "asynchronous":
        raise RecipeError("time.mode: private steps are counted by rounds; give time.mode=rounds with privacy")
