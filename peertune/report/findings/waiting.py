"""Findings about virtual time: whether clients wait for a few that are slow."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median

from peertune.report.findings.evidence import Facts
from peertune.report.findings.finding import LEAST_ROUNDS, Said, called

LEAST_WAITING = 0.25  # of all clients' time
HELD_UP = 0.5  # of the run's time that hung on the slow ones
FEW = 0.25  # of the clients: more of them are no stragglers
SLOWER = 1.5  # times the median of all, to train for a round

Span = Sequence[float]  # client, began, trained, ended, whom it waited for last or -1


def stragglers(seen: Facts) -> Said | None:
    """Find few clients on whose trainings most of the run's time hung, while the others waited."""
    spans = [{int(span[0]): span for span in record.get("spans", ())} for record in seen.records]
    each = [span for record in spans for span in record.values()]
    there = sum(ended - began for _, began, _, ended, _ in each)
    waited = sum(ended - trained for _, _, trained, ended, _ in each)
    if len(spans) < LEAST_ROUNDS or not there or waited < LEAST_WAITING * there:
        return None
    rounds: dict[int, list[float]] = {}
    for client, began, trained, _, _ in each:
        rounds.setdefault(int(client), []).append(trained - began)
    trains = {client: fmean(seconds) for client, seconds in rounds.items()}
    middle = median(trains.values())
    slow = sorted(k for k, seconds in trains.items() if seconds >= SLOWER * middle)
    path, end = critical_path(spans), max(ended for _, _, _, ended, _ in each)
    held_up = sum(path.get(client, 0.0) for client in slow) / end
    if held_up < HELD_UP or len(slow) > max(1, FEW * len(trains)):
        return None
    usual = median(seconds for client, seconds in trains.items() if client not in slow)
    own = fmean(trains[client] for client in slow)
    one = len(slow) == 1
    return Said(
        f"Clients wait for {'one that is' if one else 'a few that are'} slow",
        f"Clients spent {waited / there:.0%} of their virtual time waiting. {called(slow).capitalize()} "
        f"train{'s' if one else ''} for {own:.3g} s in a round, the median of the others for {usual:.3g} s. "
        f"{held_up:.0%} of the {end:.4g} s that the run took hung on "
        f"{'its' if one else 'their'} trainings: others wait for {'it' if one else 'them'}, or for those who do.",
        f"Run without {'it' if one else 'them'}, end rounds earlier by time.deadline_s, or let nobody wait: time.mode "
        "can be asynchronous.",
    )


def critical_path(rounds: Sequence[Mapping[int, Span]]) -> dict[int, float]:
    """Return how much of the time that a run took hung on whose trainings, in seconds; what is left were messages.

    From the end of the run back: a client that waited hung on the training of the one whose message came last, one
    that did not on its own, and either on its round before. `rounds` maps each round's clients to their spans. Kelley
    and Walker, "Critical-Path Planning and Scheduling", 1959.
    """
    took: dict[int, float] = {}
    ends = [max((span[3] for span in record.values()), default=0.0) for record in rounds]
    until, client = max(ends, default=0.0), -1
    last = ends.index(until) if ends else -1
    for record in reversed(rounds[: last + 1]):
        if not record:
            continue
        if client not in record:  # the last to end; or, of one that was down, from whose end on it was there again
            client = min(record, key=lambda k: abs(record[k][3] - until))
        waited_for = int(record[client][4])
        client = waited_for if waited_for in record else client
        _, began, trained, _, _ = record[client]
        took[client] = took.get(client, 0.0) + trained - began
        until = began
    return took
