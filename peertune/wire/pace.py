"""How far others can have come: the only rule by which a neighbour's word moves this peer's round."""

from collections.abc import Mapping


def furthest_believed(here: int, claims: Mapping[int, int], silence_s: Mapping[int, float], fastest_s: float) -> int:
    """Return the furthest round in which others are believed to be, `here` or later.

    `claims` is client → the round in which it says to be. Two that say at least a round are believed. A single one is
    believed as far as it can have come in the time of its silence, at twice the pace of this peer's own fastest round:
    `silence_s[client] / (fastest_s / 2)` rounds beyond `here`. Where no round was made yet (`fastest_s` is infinite, or
    0), a single one is not believed at all; nor is one without a silence.
    """
    believed = sorted([here, here, *claims.values()])[-2]
    if not fastest_s:
        return believed
    possible = [
        here + int(min(there - here, 2 * max(0.0, silence_s.get(client, 0.0)) / fastest_s))
        for client, there in claims.items()
    ]
    return max([believed, *possible])


def silence_s(
    claims: Mapping[int, int], before: Mapping[int, float], heard: Mapping[int, float], now: float
) -> dict[int, float]:
    """Return for how long each of those who claim a round had not been heard, nor anybody else, before it spoke.

    `before` says when each was last heard when the round began, `heard` when it was heard by now, in seconds of one
    clock. Others who were heard meanwhile bear witness that this peer was not away. Who was never heard has no silence.
    """
    found = {}
    for client in claims:
        times = [time for other, time in heard.items() if other != client]
        if client in before:
            times.append(before[client])
        if times:
            found[client] = max(0.0, now - max(times))
    return found
