"""Findings about clients that others keep away from: evidence, and no proof."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from peertune.report.findings.evidence import Facts
from peertune.report.findings.finding import LEAST_ROUNDS, Said, called
from peertune.rounds.record import summed

DOUBTED = 0.5  # of what is taken of the median client: others keep away from one of whom less is taken
LEFT_OUT = 3  # messages of a client of which nothing was mixed, at least: one may be a step that went wrong


def shares_taken(taken: Iterable[Sequence[float]]) -> dict[int, float]:
    """Return what share of its weight was taken of each client, by what records call `taken`."""
    return {sender: took / had for sender, had, took in summed(taken)}


def little_taken(shares: Mapping[int, float]) -> set[int]:
    """Return the clients of whom little was taken beside the median client; none where nothing is taken of anybody."""
    least = DOUBTED * median(shares.values()) if shares else 0.0
    return {who for who, share in shares.items() if share < least}


def kept_away(seen: Facts) -> Said | None:
    """Clients of whom a robust rule took little, whose messages were too far off, or after whom peers fell back."""
    if len(seen.records) < LEAST_ROUNDS:
        return None
    took = shares_taken(x for record in seen.records for x in record["taken"])
    little, refused, after = (defaultdict[int, list[int]](list) for _ in range(3))  # client → rounds
    for record in seen.records:
        for rounds, clients in (
            (little, little_taken(shares_taken(record["taken"]))),
            (refused, [sender for _, sender in record["not_mixed"]]),
            (after, {sender for _, sender, _, _ in record["suspects"]}),
        ):
            for who in clients:
                rounds[who].append(record["round"])
    doubted = little_taken(took) | {who for who, rounds in refused.items() if len(rounds) >= LEFT_OUT} | {*after}
    if not doubted:
        return None
    told = []
    for who in sorted(doubted)[:6]:
        parts = [f"{took[who]:.2f} of its weight was taken{_when(', little', little[who])}"] if who in took else []
        if refused[who]:
            parts += [f"{len(refused[who])} of its messages were too far off to be mixed{_when(',', refused[who])}"]
        parts += [f"a peer fell back after it mixed it{_when(' and kept it out', after[who])}"] if who in after else []
        told.append(f"client {who}: {' and '.join(parts)}")
    beside = f" Of the median client {median(took.values()):.2f} of its weight was taken." if took else ""
    return Said(
        f"Others keep away from {called(sorted(doubted))}",
        f"{'; '.join(told)}.{beside} That is evidence and no proof: a client whose rows are unlike the others' is far "
        "from them, too.",
        "look at what these clients train on, and who runs them",
    )


def _when(before: str, rounds: Sequence[int]) -> str:
    """Say in which rounds something was seen, behind these words; "" where in none."""
    if not rounds:
        return ""
    several = f"{len({*rounds})} rounds from {min(rounds)} to {max(rounds)}"
    return f"{before} in {several if len({*rounds}) > 1 else f'round {rounds[0]}'}"
