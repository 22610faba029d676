"""Findings about phases: which factor is trained when, and by whom.

Two things go by the name of phase-state mismatch, and are told apart. `phase_mismatch` is the cause that ADF-LoRA
(arXiv 2511.18291) names: clients average the trained factor while they hold different idle ones, which are not sent.
`oscillation` is an effect, whatever the cause: the loss jumps where the trained factor changes.
"""

from collections.abc import Iterator
from math import sqrt

import numpy as np

from peertune.report.findings import advice
from peertune.report.findings.evidence import Facts
from peertune.report.findings.finding import LEAST_ROUNDS, WARM_UP, Said, called

LEAST_SWITCHES = 4  # a standard error over fewer is a guess
JUMP_ERRORS = 2.5  # standard errors; where moments go on over switches at most 2.4 was seen, with a size of 0.15
JUMP_SIZE = 0.25  # of the median loss; where moments start afresh at a high rate 0.35 to 1.1 was seen
JUMP_LEAST = 0.02  # of the first round's loss: where the loss is all but 0, a multiple of it is nothing
IDLE_DISAGREEMENT = 0.25  # of the trained factor's; one exact average by a common graph leaves about 0
INTERVAL_FACTOR = 2.0  # T* is a law up to a constant, and flat about its minimum
HARDLY_RHO = 0.1  # below, clients all but agree after each round, and no phase is too short
OUT_OF_PHASE = 0.05  # of client-rounds; a late report now and then does no harm


def oscillation(seen: Facts) -> Said | None:
    """Loss jumps at switches: its change there less its mean change within the two phases about it, over switches."""
    jumps = np.array(list(_jumps(seen)))
    if len(jumps) < LEAST_SWITCHES or np.isnan(jumps).any():
        return None
    level = float(np.median(seen.mean_loss[WARM_UP:]))
    jump, error = float(jumps.mean()), float(jumps.std(ddof=1)) / sqrt(len(jumps))
    if jump <= max(0, JUMP_ERRORS * error, JUMP_SIZE * level, JUMP_LEAST * float(seen.mean_loss[0])):
        return None
    reset = seen.recipe["training"]["reset_optimizer"] == "phase"
    return Said(
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


def phase_mismatch(seen: Facts) -> Said | None:
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
    return Said(
        "Clients average one factor over different idle ones",
        f"In {len(idle)} of {len(seen.records)} rounds the idle factor was not sent, though clients disagreed about it "
        f"by {held:.3g}, against {mixed:.3g} about the one trained and averaged: what is averaged fits nobody's.",
        advice.either([advice.send_both(seen), *advice.meet_more(seen)]),
    )


def interval(seen: Facts) -> Said | None:
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
    return Said(
        f"Phases are far {'shorter' if short else 'longer'} than T*",
        f"A phase lasts {length} round{'s' * (length > 1)}, where T* is {best} (rho = {seen.rho:.3f}): {why}."
        + (f" Factor {never[0]} was never trained." if never else ""),
        advice.take_turns(seen, best),
    )


def out_of_phase(seen: Facts) -> Said | None:
    """Clients that trained another factor than most."""
    total = sum(len(record["clients"]) for record in seen.records)
    missed = [client for record in seen.records for client in record["out_of_phase"]]
    if not total or len(missed) <= OUT_OF_PHASE * total:
        return None
    often = sorted(set(missed), key=lambda client: (-missed.count(client), client))[:3]
    return Said(
        "Clients train different factors at the same time",
        f"In {len(missed) / total:.1%} of client-rounds a client trained another factor than most, most often "
        f"{called(sorted(often))}: its reports on the graph had not arrived.",
        advice.either(advice.flood(seen)),
    )
