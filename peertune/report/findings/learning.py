"""Findings about learning: whether losses fall and scores rise, and whether that can be told."""

from math import log
from statistics import fmean

import numpy as np

from peertune.data.scores import LOWER_IS_BETTER
from peertune.report.findings import advice
from peertune.report.findings.evidence import Facts, Floats
from peertune.report.findings.finding import LEAST_ROUNDS, NO_GOSSIP, WARM_UP, Said, called
from peertune.report.spending import judged
from peertune.rounds.patience import ended_early

LEAST_EVALUATIONS = 3  # below, nobody can say whether a score still rises
ONE_CLASS = 0.98  # of the predictions
LEAST_SKEW = 0.08  # by which the predictions' share must exceed the class's own among the rows evaluated
SPIKE = 3.0  # times a client's own running median; after a meeting a skewed client's loss may double
SPIKE_WINDOW = 10  # rounds of the running median
SPIKE_CLIENTS = 1 / 3  # of the clients at once: a meeting throws back one or two, a rate all
SPIKE_ROUNDS = 2  # one such round is an accident
RISEN = 1.1  # of a mean loss over that of the first round, and of a client's over what guessing costs
RISEN_SHARE = 0.25  # of client-rounds after the start that cost more than guessing; at a fit rate there are none
LEAST_GAIN = 0.03  # of a score, from one evaluation to the next; of perplexity, the share by which it falls
NORM_GROWTH = 30.0  # over the first round's norms; as the other factor grows, they may become some times as long


def one_class(seen: Facts) -> Said | None:
    """Clients whose model answers with one class."""
    expected, names = seen.commonest, seen.facts["partition"]["labels"]
    if not seen.evaluated or not seen.evaluated[-1]["evaluation"]["top_share"] or expected is None:
        return None
    shares = dict(zip(judged(seen.evaluated[-1]), seen.evaluated[-1]["evaluation"]["top_share"], strict=False))
    stuck = [k for k, share in shares.items() if share >= ONE_CLASS and share - expected >= LEAST_SKEW]
    if not stuck:
        return None
    title = "Some clients answer with one class"
    text = (
        f"{called(stuck).capitalize()} of {len(shares)} gave {min(shares[k] for k in stuck):.0%} or more of their "
        f"answers to one class, which is at most {expected:.0%} of the rows evaluated."
    )
    if seen.private:
        return Said(title, f"{text} What classes their own rows are of is private.", advice.hear_others(seen))
    own = {k: (max(rows) / max(1, sum(rows)), names[int(np.argmax(rows))]) for k, rows in seen.held.items()}
    named = ", ".join(f"{own[k][0]:.0%} {own[k][1]} for client {k}" for k in stuck[:3])
    skewed = float(np.mean([own[k][0] for k in stuck])) >= max(0.5, expected + LEAST_SKEW)
    return Said(
        title,
        f"{text} Their own rows: {named}{', …' if len(stuck) > 3 else ''}.",
        advice.hear_others(seen)
        if skewed
        else "Their rows are not that skewed: lower training.learning_rate, or train for more rounds.",
    )


def learning_rate(seen: Facts) -> Said | None:
    """Spikes of the loss in many clients at once, a loss that ends above its start, or exploding gradients."""
    loss, means, rounds = seen.loss, seen.mean_loss, len(seen.records)
    if rounds < LEAST_ROUNDS or np.isnan(means).any():
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
    return Said(
        "The learning rate is too high",
        f"{text[0].upper()}{text[1:]}.",
        f"Lower training.learning_rate from {seen.recipe['training']['learning_rate']:g} by a factor of 3 to 10"
        + (", or clip, training.max_grad_norm=1." if not seen.recipe["training"]["max_grad_norm"] else "."),
    )


def _median(values: Floats) -> Floats:
    """Return each client's median over the rounds it was there in, NaN where it never was."""
    return np.array([np.median(own[~np.isnan(own)]) if not np.isnan(own).all() else np.nan for own in values.T])


def too_short(seen: Facts) -> Said | None:
    """Say what can't be judged."""
    rounds, evaluations = len(seen.records), len(seen.evaluated)
    if rounds >= LEAST_ROUNDS and evaluations:
        return None
    advice = "Run it again: most of its rounds, or their evaluations, are not in its records."
    if ended_early(seen.records, seen.recipe.get("evaluate", {})):
        advice = "Its evaluate.patience ran out: give it more, or none."
    elif seen.ended < seen.recipe["rounds"]:
        advice = "Let the run go on."
    elif seen.recipe["rounds"] < LEAST_ROUNDS:
        advice = f"Set rounds={LEAST_ROUNDS} or more."
    return Said(
        "Too little to judge",
        f"There are {rounds} rounds and {evaluations} evaluations; trends need {LEAST_ROUNDS} rounds, and what the "
        "clients have learnt an evaluation.",
        advice,
    )


def still_learning(seen: Facts) -> Said | None:
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
    return Said(
        "The clients were still learning when the run ended",
        f"Their {metric} went from {first:.3f} by {before:.3f} to {final:.3f} in the last three evaluations, after the "
        f"rounds {', '.join(str(record['round']) for record in last)}."
        + ("" if seen.constant is None else f" {_constant(seen.constant)}"),
        f"Run for more rounds, such as rounds={2 * rounds}.",
    )


def nothing_learnt(seen: Facts) -> Said | None:
    """Clients that score no better than whoever always gives the same answer."""
    if not seen.evaluated or len(seen.records) < LEAST_ROUNDS or seen.constant is None or one_class(seen):
        return None
    final = seen.evaluated[-1]["evaluation"]
    score = fmean(final["clients"])
    if score < seen.constant if final["metric"] in LOWER_IS_BETTER else score > seen.constant:
        return None
    return Said(
        "The clients know no more than one answer for all",
        f"Their {final['metric']} is {score:.3f} on average. {_constant(seen.constant)}",
        "Run for more rounds, or with another training.learning_rate.",
    )


def _constant(score: float) -> str:
    return f"The best answer that is the same for all rows would score {score:.3f} on them."


def healthy(seen: Facts) -> Said:
    """Give the key numbers of a run in which nothing is wrong, and say where that takes more evaluations to tell."""
    final, evaluations = seen.evaluated[-1]["evaluation"], len(seen.evaluated)
    scores = np.array(final["clients"])
    loss = "The loss is withheld" if seen.private else "The loss went from {:.3g} to {:.3g}"
    text = (
        f"{loss.format(seen.mean_loss[0], seen.mean_loss[-1])}; the clients' {final['metric']} is "
        f"{scores.mean():.3f} on average, from {scores.min():.3f} to {scores.max():.3f}"
    )
    text += "." if final["average"] is None else f", the averaged adapter's {final['average']:.3f}."
    if seen.constant is not None:
        text += f" {_constant(seen.constant)}"
    if len(seen.contraction) and seen.method not in NO_GOSSIP:
        text += f" A round leaves {seen.contraction.mean():.3f} of the squared disagreement; rho is {seen.rho:.3f}."
    if evaluations >= LEAST_EVALUATIONS:
        return Said("Nothing is wrong", text, "")
    text += f" Whether they still learn can't be told from {evaluations} evaluation{'s' * (evaluations > 1)}."
    return Said("Nothing wrong is seen", text, f"Lower evaluate.every, so that there are {LEAST_EVALUATIONS} or more.")
