"""What a run's records say, in words: what went wrong, the numbers behind it, and which keys of the recipe to change.

Each of `CHECKS` looks for one thing and is a pure function of the recipe, its facts and the records; nothing is trained
or drawn. Two things go by the name of phase-state mismatch, and are told apart. `phase_mismatch` is the cause that
ADF-LoRA (arXiv 2511.18291) names: clients average the trained factor while they hold different idle ones, which are not
sent. `oscillation` is an effect, whatever the cause: the loss jumps where the trained factor changes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from statistics import fmean
from typing import Any, Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from peertune.data.scores import LOWER_IS_BETTER
from peertune.report import advice
from peertune.report.evidence import Facts, Floats

Severity = Literal["problem", "notice", "good"]

LEAST_ROUNDS = 10  # below, trends and standard errors mean nothing
WARM_UP = 5  # rounds at the start, whose loss falls steeply whatever else happens
LEAST_EVALUATIONS = 3  # below, nobody can say whether a score still rises
LEAST_SWITCHES = 4  # a standard error over fewer is a guess
JUMP_ERRORS = 2.5  # standard errors; where moments go on over switches at most 2.4 was seen, with a size of 0.15
JUMP_SIZE = 0.25  # of the median loss; where moments start afresh at a high rate 0.35 to 1.1 was seen
JUMP_LEAST = 0.02  # of the first round's loss: where the loss is all but 0, a multiple of it is nothing
IDLE_DISAGREEMENT = 0.25  # of the trained factor's; one exact average by a common graph leaves about 0
LEAST_MIXING = 2.0  # sum over the run of the share of the squared disagreement that a round takes away: e^-2 is left
RHO_ERRORS = 3.0  # standard errors by which the measured contraction must lie above rho
GAP_KEPT = 0.5  # of 1 - rho; a mean above rho by less is what few rounds bring
INTERVAL_FACTOR = 2.0  # T* is a law up to a constant, and flat about its minimum
HARDLY_RHO = 0.1  # below, clients all but agree after each round, and no phase is too short
OUT_OF_PHASE = 0.05  # of client-rounds; a late report now and then does no harm
ONE_CLASS = 0.98  # of the predictions
LEAST_SKEW = 0.08  # by which the predictions' share must exceed the class's own among the rows evaluated
SPIKE = 3.0  # times a client's own running median; after a meeting a skewed client's loss may double
SPIKE_WINDOW = 10  # rounds of the running median
SPIKE_CLIENTS = 1 / 3  # of the clients at once: a meeting throws back one or two, a rate all
SPIKE_ROUNDS = 2  # one such round is an accident
RISEN = 1.1  # of a mean loss over that of the first round, and of a client's over what guessing costs
RISEN_SHARE = 0.25  # of client-rounds after the start that cost more than guessing; at a fit rate there are none
LOST_EDGES = 0.05  # of the edges that peers had; a restart of one of eight costs fewer
LEAST_GAIN = 0.03  # of a score, from one evaluation to the next; of perplexity, the share by which it falls
NORM_GROWTH = 30.0  # over the first round's norms; as the other factor grows, they may become some times as long
NO_GOSSIP = {"decaf", "fedrot_lora"}  # they turn the factors while they mix, so rho does not bound their contraction


@dataclass(frozen=True)
class Finding:
    """One thing that a run's records show."""

    name: str  # short and fixed: "interval"
    severity: Severity
    title: str
    text: str  # a sentence or two, with the numbers
    advice: str  # what to change, by the recipe's keys; "" where there is nothing


def diagnose(
    recipe: Mapping[str, Any], facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Return what the records show, gravest first; one finding of severity good where there is nothing else.

    `recipe` is the resolved one, `facts` what `facts.json` holds, `records` the lines of `rounds.jsonl`.
    """
    seen = Facts(recipe, facts, records)
    found = [finding for check in CHECKS if (finding := check(seen))]
    return sorted(found, key=lambda finding: finding.severity != "problem") or [healthy(seen)]


def oscillation(seen: Facts) -> Finding | None:
    """Loss jumps at switches: its change there less its mean change within the two phases about it, over switches."""
    jumps = np.array(list(_jumps(seen)))
    if len(jumps) < LEAST_SWITCHES:
        return None
    level = float(np.median(seen.mean_loss[WARM_UP:]))
    jump, error = float(jumps.mean()), float(jumps.std(ddof=1)) / sqrt(len(jumps))
    if jump <= max(0, JUMP_ERRORS * error, JUMP_SIZE * level, JUMP_LEAST * float(seen.mean_loss[0])):
        return None
    reset = seen.recipe["training"]["reset_optimizer"] == "phase"
    return Finding(
        "oscillation",
        "problem",
        "The loss jumps when the trained factor changes",
        f"At {len(jumps)} switches the loss rose by {jump:.3g} ± {error:.1g} more than between rounds of the phases "
        f"about them, {jump / level:.0%} of its median of {level:.3g}.",
        advice.either(
            [
                *(["keep the moments with training.reset_optimizer=never"] if reset else []),
                "lower training.learning_rate",
                *advice.last_longer(seen),
            ]
        ),
    )


def _jumps(seen: Facts) -> Iterator[float]:
    """Yield each switch's jump of the loss, where the phases about it have at least two changes to compare it with."""
    changes = np.diff(seen.mean_loss, prepend=np.nan)
    switches = [t for t in range(1, len(changes)) if seen.trained[t] != seen.trained[t - 1]]
    for before, t, after in zip([0, *switches], switches, [*switches[1:], len(changes)], strict=False):
        within = [*changes[max(before + 1, WARM_UP) : t], *changes[t + 1 : after]]
        if len(within) >= 2 and t >= WARM_UP:
            yield float(changes[t] - np.mean(within))


def phase_mismatch(seen: Facts) -> Finding | None:
    """The idle factor, trained before, is not sent, and clients hold different ones while they average the other."""
    idle: list[tuple[float, float]] = []
    for t, (record, trained) in enumerate(zip(seen.records, seen.trained, strict=True)):
        other = {"A": "B", "B": "A"}.get(trained)
        if other and trained in record["send"] and other not in record["send"] and other in seen.trained[:t]:
            diagnostics = record["diagnostics"]
            left = diagnostics.get(f"contraction_{trained}", 0.0)  # 0 where there was nothing to disagree about
            if left > 0:
                before = diagnostics[f"consensus_error_{trained}"] / sqrt(left)
                idle.append((diagnostics[f"consensus_error_{other}"], before))
    if len(seen.records) < LEAST_ROUNDS or len(idle) < LEAST_SWITCHES:
        return None
    held, mixed = np.mean(idle, axis=0)
    if held < IDLE_DISAGREEMENT * mixed:
        return None
    return Finding(
        "phase_mismatch",
        "problem",
        "Clients average one factor over different idle ones",
        f"In {len(idle)} of {len(seen.records)} rounds the idle factor was not sent, though clients disagreed about it "
        f"by {held:.3g}, against {mixed:.3g} about the one trained and averaged: what is averaged fits nobody's.",
        advice.either([advice.send_both(seen), *advice.meet_more(seen)]),
    )


def no_contraction(seen: Facts) -> Finding | None:
    """Clients that no chain of meetings joins, or mixing that took away next to nothing in the whole run."""
    rounds = len(seen.records)
    if not seen.exchanges or rounds < LEAST_ROUNDS or len(seen.numbers) < seen.clients:
        return None
    edges = np.array([edge for record in seen.records for edge in record["edges"]], dtype=int).reshape(-1, 2)
    joined = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(seen.clients, seen.clients))
    count, group = connected_components(joined, directed=False)
    alone = f"Clients were alone in {seen.alone.mean():.0%} of all client-rounds"
    rarely = [k for k in range(seen.clients) if (~seen.alone[:, k]).sum() <= rounds * (1 - seen.alone.mean()) / 2]
    alone += f", {_clients(rarely)} most of all." if 0 < len(rarely) <= seen.clients / 2 else "."
    trend = ""
    if all(record["diagnostics"] for record in seen.records):
        last, first = (_disagreement(seen.records[part]) for part in (slice(-(rounds // 4), None), slice(rounds // 2)))
        trend = f" Their disagreement went from {first:.3g} (first half) to {last:.3g} (last quarter)."
    if count > 1:
        members = [np.flatnonzero(group == number).tolist() for number in range(count)]
        never = sorted(member for part in members if len(part) == 1 for member in part)
        islands = [_clients(part) for part in members if len(part) > 1]
        apart = [f"{' and '.join(islands)} never reached each other"] if len(islands) > 1 else []
        apart += [f"{_clients(never)} never met anyone"] if never else []
        what, title = f"In {rounds} rounds {', and '.join(apart)}.", "The clients fall apart into groups that never met"
    else:
        predicted = rounds * (1 - seen.rho)
        mixing = predicted if seen.method in NO_GOSSIP else float((1 - seen.contraction).sum())
        if mixing >= LEAST_MIXING or not (len(seen.contraction) or seen.method in NO_GOSSIP):
            return None
        what, title = (
            f"A round took {mixing / rounds:.1%} off the clients' squared disagreement, all {rounds} rounds together "
            f"left {np.exp(-mixing):.0%} of it (rho = {seen.rho:.3f} lets expect {np.exp(-predicted):.0%}).",
            "Clients meet too rarely to agree",
        )
    return Finding(
        "no_contraction",
        "problem",
        title,
        f"{what} {alone}{trend}",
        advice.either(
            [
                *(["look for failing links"] if any(record["failed_edges"] for record in seen.records) else []),
                *advice.meet_more(seen),
                "run for more rounds",
            ]
        ),
    )


def _disagreement(records: Sequence[Mapping[str, Any]]) -> float:
    errors = [[record["diagnostics"][f"consensus_error_{kind}"] for kind in "AB"] for record in records]
    return float(np.hypot(*np.mean(errors, axis=0)))


def worse_than_rho(seen: Facts) -> Finding | None:
    """Measured contraction clearly above rho, its bound on average: edges fail, or the graph is not what was said.

    Where different rounds follow each other in a period, rho bounds none of them.
    """
    if seen.facts["graph"].get("period") not in (None, 1):
        return None
    left, failed = seen.contraction, sum(len(record["failed_edges"]) for record in seen.records)
    if not seen.exchanges or len(left) < LEAST_ROUNDS or seen.method in NO_GOSSIP:
        return None
    mean, error = float(left.mean()), float(left.std(ddof=1)) / sqrt(len(left))
    if mean < seen.rho + RHO_ERRORS * error or 1 - mean > GAP_KEPT * (1 - seen.rho):
        return None
    used = sum(len(record["edges"]) for record in seen.records)
    return Finding(
        "worse_than_rho",
        "problem",
        "Mixing is weaker than the graph promises",
        f"A round left {mean:.3f} ± {error:.1g} of the squared disagreement on average, at most {seen.rho:.3f} is "
        f"predicted (rho). {failed} edges failed and {used} were used, {used / len(seen.records):.3g} a round.",
        advice.either(["look for failing links", *_real_activation(seen, used)]),
    )


def _real_activation(seen: Facts, used: int) -> list[str]:
    """Say with what activation the edges that were used are those that the graph promises."""
    real = used / len(seen.records) / max(seen.facts["graph"]["edges"], 1e-9)
    if not 0 < real < seen.recipe["graph"].get("activation", 1.0):
        return []
    follows = ", so that T* follows" if seen.method == "tad_lora" else ""
    return [f"set graph.activation={real:.2g}, what the links really gave{follows}"]


def lost_edges(seen: Facts) -> Finding | None:
    """Edges between peers over which nothing came: links, firewalls or processes that fail."""
    failed = [tuple(edge) for record in seen.records for edge in record["failed_edges"]]
    had = len(failed) + sum(len(record["edges"]) for record in seen.records)
    if "peers" not in seen.facts or len(failed) <= LOST_EDGES * had:
        return None
    often = Counter(client for edge in failed for client in edge if len(seen.numbers) > 1 or client not in seen.numbers)
    least = max(often.values()) / 2
    worst = sorted(client for client, times in often.items() if times >= least)
    return Finding(
        "lost_edges",
        "notice",
        "Swaps fail",
        f"Over {len(failed)} of {had} edges nothing came ({len(failed) / had:.0%}), most often with {_clients(worst)}. "
        "The mean of the adapters does not suffer, since an edge fails at both ends; mixing does.",
        "Look at what those peers' logs say, and whether they can be reached." + advice.wait_longer(seen),
    )


def interval(seen: Facts) -> Finding | None:
    """Phases much longer or shorter than T*."""
    best = seen.facts["graph"]["switching_interval"]
    length = 1 if seen.method == "rolora" else seen.recipe["algorithm"].get("switch_every")
    if not isinstance(length, int) or best is None or not seen.exchanges:
        return None
    short = length * INTERVAL_FACTOR < best
    if (not short and length <= INTERVAL_FACTOR * best) or (short and seen.rho < HARDLY_RHO):
        return None
    why = (
        "idle factors are mixed too briefly before they are trained again"
        if short
        else "each factor is trained for long against a frozen partner"
    )
    never = [kind for kind in "AB" if kind not in "".join(seen.trained)]
    return Finding(
        "interval",
        "notice",
        f"Phases are far {'shorter' if short else 'longer'} than T*",
        f"A phase lasts {length} round{'s' * (length > 1)}, where T* is {best} (rho = {seen.rho:.3f}): {why}."
        + (f" Factor {never[0]} was never trained." if never else ""),
        advice.take_turns(seen, best),
    )


def out_of_phase(seen: Facts) -> Finding | None:
    """Clients that trained another factor than most."""
    total = sum(len(record["clients"]) for record in seen.records)
    missed = [client for record in seen.records for client in record["out_of_phase"]]
    if not total or len(missed) <= OUT_OF_PHASE * total:
        return None
    often = sorted(set(missed), key=lambda client: (-missed.count(client), client))[:3]
    return Finding(
        "out_of_phase",
        "problem",
        "Clients train different factors at the same time",
        f"In {len(missed) / total:.1%} of client-rounds a client trained another factor than most, most often "
        f"{_clients(sorted(often))}: its reports on the graph had not arrived.",
        advice.either(advice.flood(seen)),
    )


def one_class(seen: Facts) -> Finding | None:
    """Clients whose model answers with one class."""
    expected, names = seen.constant, seen.facts["partition"]["labels"]
    if not seen.evaluated or not seen.evaluated[-1]["evaluation"]["top_share"] or expected is None:
        return None
    shares = dict(zip(seen.evaluated[-1]["clients"], seen.evaluated[-1]["evaluation"]["top_share"], strict=False))
    stuck = [k for k, share in shares.items() if share >= ONE_CLASS and share - expected >= LEAST_SKEW]
    if not stuck:
        return None
    own = {k: (max(rows) / max(1, sum(rows)), names[int(np.argmax(rows))]) for k, rows in seen.held.items()}
    named = ", ".join(f"{own[k][0]:.0%} {own[k][1]} for client {k}" for k in stuck[:3])
    skewed = float(np.mean([own[k][0] for k in stuck])) >= max(0.5, expected + LEAST_SKEW)
    return Finding(
        "one_class",
        "problem",
        "Some clients answer with one class",
        f"{_clients(stuck).capitalize()} of {len(shares)} gave {min(shares[k] for k in stuck):.0%} or more of their "
        f"answers to one class, which is at most {expected:.0%} of the rows evaluated. Their own rows: {named}"
        f"{', …' if len(stuck) > 3 else ''}.",
        advice.hear_others(seen)
        if skewed
        else "Their rows are not that skewed: lower training.learning_rate, or train for more rounds.",
    )


def learning_rate(seen: Facts) -> Finding | None:
    """Spikes of the loss in many clients at once, a loss that ends above its start, or exploding gradients."""
    loss, means, rounds = seen.loss, seen.mean_loss, len(seen.records)
    if rounds < LEAST_ROUNDS:
        return None
    classes = int(np.count_nonzero(seen.facts["validation"]["labels"]))
    clueless = np.full(len(seen.numbers), log(classes)) if classes > 1 else loss[0]
    running = np.array([_median(loss[max(0, t - SPIKE_WINDOW) : t]) for t in range(WARM_UP, rounds)])
    spikes = (loss[WARM_UP:] > SPIKE * running) & (loss[WARM_UP:] > clueless)
    together = np.flatnonzero(spikes.mean(axis=1) >= SPIKE_CLIENTS)
    above = float((np.array([_median(loss[t - 2 : t + 1]) for t in range(WARM_UP, rounds)]) > RISEN * clueless).mean())
    norms = [float(np.median(record["grad_norm"])) for record in seen.records]
    signs = []
    if len(together) >= SPIKE_ROUNDS:
        numbers = ", ".join(str(seen.records[t + WARM_UP]["round"]) for t in together[:3])
        signs.append(
            f"in {len(together)} rounds ({numbers}{', …' if len(together) > 3 else ''}) the loss of "
            f"{spikes[together].mean():.0%} of the clients leapt to over {SPIKE:g} times its own median"
        )
    if means[1:].max() > RISEN * means[0] and (above >= RISEN_SHARE or means[-3:].mean() > RISEN * means[0]):
        signs.append(
            f"the mean loss rose from {means[0]:.3g} to {means.max():.3g}, and ended at {means[-1]:.3g}"
            + (f"; guessing costs {log(classes):.3g}" if classes > 1 else "")
        )
    if max(norms) > NORM_GROWTH * norms[0]:
        signs.append(f"the median gradient grew from {norms[0]:.3g} to {max(norms):.3g}")
    if not signs:
        return None
    text = "; ".join(signs)
    return Finding(
        "learning_rate",
        "problem",
        "The learning rate is too high",
        f"{text[0].upper()}{text[1:]}.",
        f"Lower training.learning_rate from {seen.recipe['training']['learning_rate']:g} by a factor of 3 to 10"
        + (", or clip, training.max_grad_norm=1." if not seen.recipe["training"]["max_grad_norm"] else "."),
    )


def _median(values: Floats) -> Floats:
    """Return each client's median over the rounds it was there in, NaN where it never was."""
    return np.array([np.median(own[~np.isnan(own)]) if not np.isnan(own).all() else np.nan for own in values.T])


def too_short(seen: Facts) -> Finding | None:
    """Say what can't be judged."""
    rounds, evaluations = len(seen.records), len(seen.evaluated)
    if rounds >= LEAST_ROUNDS and evaluations:
        return None
    advice = "Run it again: most of its rounds, or their evaluations, are not in its records."
    if seen.ended < seen.recipe["rounds"]:
        advice = "Let the run go on."
    elif seen.recipe["rounds"] < LEAST_ROUNDS:
        advice = f"Set rounds={LEAST_ROUNDS} or more."
    return Finding(
        "too_short",
        "notice",
        "Too little to judge",
        f"There are {rounds} rounds and {evaluations} evaluations; trends need {LEAST_ROUNDS} rounds, and what the "
        "clients have learnt an evaluation.",
        advice,
    )


def still_learning(seen: Facts) -> Finding | None:
    """A score that still rose from evaluation to evaluation when the run ended."""
    last = seen.evaluated[-LEAST_EVALUATIONS:]
    rounds = seen.recipe["rounds"]
    if len(last) < LEAST_EVALUATIONS or len(seen.records) < LEAST_ROUNDS or seen.ended < rounds:
        return None
    metric = last[-1]["evaluation"]["metric"]
    first, before, final = (fmean(record["evaluation"]["clients"]) for record in last)
    lower = metric in LOWER_IS_BETTER
    gains = [(a - b) / a if lower else b - a for a, b in ((first, before), (before, final))]
    if min(gains) <= 0 or gains[1] < LEAST_GAIN:
        return None
    return Finding(
        "still_learning",
        "notice",
        "The clients were still learning when the run ended",
        f"Their {metric} went from {first:.3f} by {before:.3f} to {final:.3f} in the last three evaluations, after the "
        f"rounds {', '.join(str(record['round']) for record in last)}."
        + ("" if seen.constant is None or metric != "accuracy" else f" {_constant(seen.constant)}"),
        f"Run for more rounds, such as rounds={2 * rounds}.",
    )


def nothing_learnt(seen: Facts) -> Finding | None:
    """Clients that are right no more often than whoever always gives the same answer."""
    if not seen.evaluated or len(seen.records) < LEAST_ROUNDS or seen.constant is None or one_class(seen):
        return None
    final = seen.evaluated[-1]["evaluation"]
    if final["metric"] != "accuracy" or fmean(final["clients"]) > seen.constant:
        return None
    return Finding(
        "nothing_learnt",
        "problem",
        "The clients know no more than one answer for all",
        f"Their accuracy is {fmean(final['clients']):.3f} on average. {_constant(seen.constant)}",
        "Run for more rounds, or with another training.learning_rate.",
    )


def _constant(score: float) -> str:
    return f"Always the commonest class would score {score:.3f} on the same rows."


def no_exchange(seen: Facts) -> Finding | None:
    """Say that clients train alone."""
    if not seen.records or seen.exchanges:
        return None
    return Finding(
        "no_exchange",
        "notice",
        "Nobody talks to anybody",
        f"{seen.method} with {seen.clients} client{'s' * (seen.clients != 1)} sends nothing: each learns from its own "
        "rows alone, and disagreement is not judged.",
        f"To work together, choose another algorithm.name than {seen.method}." if seen.clients > 1 else "",
    )


def healthy(seen: Facts) -> Finding:
    """Give the key numbers of a run in which nothing is wrong, and say where that takes more evaluations to tell."""
    final, evaluations = seen.evaluated[-1]["evaluation"], len(seen.evaluated)
    scores = np.array(final["clients"])
    text = (
        f"The loss went from {seen.mean_loss[0]:.3g} to {seen.mean_loss[-1]:.3g}; the clients' {final['metric']} is "
        f"{scores.mean():.3f} on average, from {scores.min():.3f} to {scores.max():.3f}"
    )
    text += "." if final["average"] is None else f", the averaged adapter's {final['average']:.3f}."
    if seen.constant is not None and final["metric"] == "accuracy":
        text += f" {_constant(seen.constant)}"
    if len(seen.contraction) and seen.method not in NO_GOSSIP:
        text += f" A round leaves {seen.contraction.mean():.3f} of the squared disagreement; rho is {seen.rho:.3f}."
    if evaluations >= LEAST_EVALUATIONS:
        return Finding("healthy", "good", "Nothing is wrong", text, "")
    return Finding(
        "healthy",
        "good",
        "Nothing wrong is seen",
        f"{text} Whether they still learn can't be told from {evaluations} evaluation{'s' * (evaluations > 1)}.",
        f"Lower evaluate.every, so that there are {LEAST_EVALUATIONS} or more.",
    )


def _clients(numbers: Sequence[int]) -> str:
    """Name clients, at most six: "client 3", "clients 1, 4, 7"."""
    rest = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
    return f"client{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers[:6]))}{rest}"


CHECKS: tuple[Callable[[Facts], Finding | None], ...] = (
    oscillation,
    phase_mismatch,
    no_contraction,
    worse_than_rho,
    out_of_phase,
    one_class,
    learning_rate,
    lost_edges,
    interval,
    nothing_learnt,
    still_learning,
    too_short,
    no_exchange,
)
"""What is looked for, the gravest first."""
