"""Findings about mixing: whether clients meet, swap and come to agree."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from peertune.report.findings import advice
from peertune.report.findings.evidence import Facts
from peertune.report.findings.finding import LEAST_ROUNDS, NO_GOSSIP, Said, called

LEAST_MIXING = 2.0  # sum over the run of the share of the squared disagreement that a round takes away: e^-2 is left
RHO_ERRORS = 3.0  # standard errors by which the measured contraction must lie above rho
GAP_KEPT = 0.5  # of 1 - rho; a mean above rho by less is what few rounds bring
LEAST_EVALUATED = 5  # evaluated rounds in which what high ranks know is looked at
FADED = 0.5  # of its height, at most, is left at the end of what fades
GEOMETRIC = 0.9  # of the variance of its logarithm, at least, is one line's
LOST_EDGES = 0.05  # of the edges that peers had; a restart of one of eight costs fewer


def no_contraction(seen: Facts) -> Said | None:
    """Clients that no chain of meetings joins, or mixing that took away next to nothing in the whole run."""
    rounds = len(seen.records)
    if not seen.exchanges or rounds < LEAST_ROUNDS or len(seen.numbers) < seen.clients:
        return None
    edges = np.array([edge for record in seen.records for edge in record["edges"]], dtype=int).reshape(-1, 2)
    joined = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(seen.clients, seen.clients))
    count, group = connected_components(joined, directed=False)
    alone = f"Clients were alone in {seen.alone.mean():.0%} of all client-rounds"
    rarely = [k for k in range(seen.clients) if (~seen.alone[:, k]).sum() <= rounds * (1 - seen.alone.mean()) / 2]
    alone += f", {called(rarely)} most of all." if 0 < len(rarely) <= seen.clients / 2 else "."
    trend = ""
    if all(record["diagnostics"] for record in seen.records):
        last, first = (_disagreement(seen.records[part]) for part in (slice(-(rounds // 4), None), slice(rounds // 2)))
        trend = f" Their disagreement went from {first:.3g} (first half) to {last:.3g} (last quarter)."
    if count > 1:
        members = [np.flatnonzero(group == number).tolist() for number in range(count)]
        never = sorted(member for part in members if len(part) == 1 for member in part)
        islands = [called(part) for part in members if len(part) > 1]
        apart = [f"{' and '.join(islands)} never reached each other"] if len(islands) > 1 else []
        apart += [f"{called(never)} never met anyone"] if never else []
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
    return Said(
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


def worse_than_rho(seen: Facts) -> Said | None:
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
    return Said(
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


def lost_edges(seen: Facts) -> Said | None:
    """Edges between peers over which nothing came: links, firewalls or processes that fail."""
    failed = [tuple(edge) for record in seen.records for edge in record["failed_edges"]]
    had = len(failed) + sum(len(record["edges"]) for record in seen.records)
    if "peers" not in seen.facts or len(failed) <= LOST_EDGES * had:
        return None
    often = Counter(client for edge in failed for client in edge if len(seen.numbers) > 1 or client not in seen.numbers)
    least = max(often.values()) / 2
    worst = sorted(client for client, times in often.items() if times >= least)
    if seen.recipe.get("time", {}).get("mode") == "asynchronous":
        return Said(
            "Messages don't get through",
            f"Over {len(failed)} of {had} edges nothing came ({len(failed) / had:.0%}) until the next message was, "
            f"most often with {called(worst)}. Who is done with its rounds takes none any more.",
            "Look at what those peers' logs say, and whether they were done before or could be reached.",
        )
    return Said(
        "Swaps fail",
        f"Over {len(failed)} of {had} edges nothing came ({len(failed) / had:.0%}), most often with {called(worst)}. "
        "The mean of the adapters does not suffer, since an edge fails at both ends; mixing does.",
        "Look at what those peers' logs say, and whether they can be reached." + advice.wait_longer(seen),
    )


def no_exchange(seen: Facts) -> Said | None:
    """Say that clients train alone."""
    if not seen.records or seen.exchanges:
        return None
    return Said(
        "Nobody talks to anybody",
        f"{seen.method} with {seen.clients} client{'s' * (seen.clients != 1)} sends nothing: each learns from its own "
        "rows alone, and disagreement is not judged.",
        f"To work together, choose another algorithm.name than {seen.method}." if seen.clients > 1 else "",
    )


def rank_collapse(seen: Facts) -> Said | None:
    """Find what high ranks know to fade by the same share from round to round, until little of it is left."""
    told = [
        (r["round"], r["diagnostics"]["energy_beyond"]) for r in seen.records if "energy_beyond" in r["diagnostics"]
    ]
    if len(told) < LEAST_EVALUATED:
        return None
    rounds, energy = np.array(told).T
    top = int(energy.argmax())
    rounds, energy = rounds[top:], energy[top:]
    if len(energy) < LEAST_EVALUATED or energy[-1] > FADED * energy[0] or not energy[-1] > 0:
        return None
    slope, start = np.polyfit(rounds, np.log(energy), 1)
    error = np.log(energy) - start - slope * rounds
    if error.var() > (1 - GEOMETRIC) * np.log(energy).var():
        return None
    low, high = min(seen.facts["ranks"]["clients"]), max(seen.facts["ranks"]["clients"])
    return Said(
        f"What only clients of rank {high} know fades",
        f"Of the clients' averaged product {energy[0]:.1%} lay beyond rank {low} after round {rounds[0]:.0f}, and "
        f"{energy[-1]:.1%} after round {rounds[-1]:.0f}: {1 - np.exp(slope):.1%} of it went in each round. Who can't "
        "hold a direction is mixed as if it had none of it.",
        "Mix by rank slice, without the modifier zero_padded, or by decaf as it is by default.",
    )
