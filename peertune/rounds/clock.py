"""Virtual time: when each client would have done what, by how long its steps and its messages take.

All times are whole nanoseconds since the run's start. Sums of them are exact, so what happens at one time does so in
every process, on every machine, and after a stop. How long a step takes is a pure function of the client and of the
step's number, never of what was asked before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, inf
from pathlib import Path
from typing import Literal, NamedTuple

from scipy.special import ndtri

from peertune.errors import RecipeError
from peertune.randomness import Draw, uniforms

NS = 10**9
"""Nanoseconds in a second."""

Late = Literal["salf", "drop"]
"""Whether a client that is late sends what it has reached, or nothing: `peertune.rounds.deadline`."""

StepTime = Callable[[int, int], float]
"""`(client, local step from the run's start)` → seconds that the step takes, above 0."""


def lognormal(median_s: float, sigma: float, of: Literal["client", "step"] = "step", seed: int = 0) -> StepTime:
    """Draw times whose logarithm is normal: `median_s · exp(sigma · z)`, one for each `client`, or for each `step`.

    Raises:
        RecipeError: the median is not above 0, or sigma is below 0.
    """
    if not 0 < median_s < inf:
        raise RecipeError(f"time.step_s.median_s: {median_s} is out of range, give seconds above 0")
    if not 0 <= sigma < inf:
        raise RecipeError(f"time.step_s.sigma: {sigma} is out of range, give 0 or more")

    def seconds(client: int, step: int) -> float:
        counters = (client, step) if of == "step" else (client,)
        middle = float(uniforms(seed, Draw.STEP_TIME, *counters)) + 2.0**-54  # of one of 2**53 parts: never 0
        return median_s * exp(sigma * float(ndtri(middle)))

    return seconds


def trace(path: str, clients: int) -> StepTime:
    """Read times from a text file: a line `client,seconds` or `client seconds` for each step of each client, in order.

    `#` starts a comment, and a line of names may come first.

    Raises:
        RecipeError: the file can't be read, a line is none, or a client has no times; and where a step is asked for
            that it doesn't hold.
    """
    found: list[list[float]] = [[] for _ in range(clients)]
    try:
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise RecipeError(f"time.step_s: {path} can't be read ({error.strerror}); give a file of times") from None
    for number, line in enumerate(lines, start=1):
        fields = line.partition("#")[0].replace(",", " ").split()
        if not fields or (number == 1 and all(name.strip('"').isidentifier() for name in fields)):
            continue
        try:
            client, seconds = int(fields[0]), float(fields[1])
            whole = len(fields) == 2 and 0 <= client < clients and 0 < seconds < inf
        except (ValueError, IndexError):
            whole = False
        if not whole:
            raise RecipeError(
                f"time.step_s: {path} line {number}: {line.strip()!r} isn't client,seconds: a client from 0 to "
                f"{clients - 1}, and seconds above 0"
            )
        found[client].append(seconds)

    def seconds_of(client: int, step: int) -> float:
        if step >= len(found[client]):
            raise RecipeError(
                f"time.step_s: {path} ends after {len(found[client])} steps of client {client}, and its step {step} "
                "is asked for; give a longer trace, or fewer rounds"
            )
        return found[client][step]

    return seconds_of


STEP_TIMES: Mapping[str, Callable[..., StepTime]] = {"lognormal": lognormal, "trace": trace}
"""Name in a recipe → factory."""


def each(seconds: Sequence[float]) -> StepTime:
    """Return the same time for all steps of a client, of these times by client."""
    return lambda client, step: seconds[client]


class Span(NamedTuple):
    """What a client did from one training to the next, in virtual seconds."""

    client: int
    began_s: float
    trained_s: float  # then it waits
    ended_s: float  # then it trains again
    waited_for: int  # the client whose message came last, -1 where it did not wait


@dataclass(frozen=True)
class Clock:
    """How long local steps and messages take. Mixing and evaluation take no time."""

    step_s: StepTime
    latency_s: float = 0.0
    bandwidth_bytes_s: float = inf  # of each link by itself
    down: Mapping[int, Sequence[tuple[float, float]]] = field(default_factory=dict)  # client → from, to, in seconds
    deadline_s: float = inf  # of work, for a round's local steps
    late: Late = "salf"

    def trained(self, client: int, begun: int, steps: range, delay_s: float = 0.0) -> int:
        """Return when a client ends local steps that it begins at `begun`; while it is down nothing goes on."""
        needed = sum(_ns(self.step_s(client, step)) for step in steps)
        left = (needed if self.deadline_s == inf else min(needed, _ns(self.deadline_s))) + _ns(delay_s)
        for start, end in sorted((_ns(start), _ns(end)) for start, end in self.down.get(client, ())):
            if end <= begun:
                continue
            if begun + left <= start:
                break
            left -= max(0, start - begun)
            begun = end
        return begun + left

    def until_deadline(self, client: int, steps: range) -> list[float]:
        """Return which share of each step is done at the deadline, of those that are begun before it."""
        found, left = list[float](), _ns(self.deadline_s)
        for needed in (_ns(self.step_s(client, step)) for step in steps):
            if left <= 0:
                break
            found.append(min(1.0, left / needed))
            left -= needed
        return found

    def arrives(self, sent: int, size: float) -> int:
        """Return when a message of so many bytes is there that is sent at `sent`."""
        return sent + _ns(self.latency_s) + _ns(size / self.bandwidth_bytes_s)


class Pushing(NamedTuple):
    """How clients mix that wait for nobody."""

    staleness_exponent: float = 0.0  # a: what is s trainings old weighs `(1 + s)^-a` as much
    common_phases: bool = False  # whether phases change by common time, not by each client's own rounds
    pairwise: bool = False  # whether two that meet average what they hold, and nothing is pushed


def _ns(seconds: float) -> int:
    return round(seconds * NS)


def lockstep(
    begun: Mapping[int, int], trained: Mapping[int, int], came: Sequence[tuple[int, int, int]]
) -> dict[int, tuple[int, Span]]:
    """Return for each client when its synchronous round ends, and what it did until then.

    A client waits for its own neighbours only: the round ends when it has trained and the last of what it mixes has
    come. `begun` and `trained` say when each client began and ended its local steps; `came` lists (receiver, sender,
    when the message came).
    """
    ends = {client: (trained[client], -1) for client in begun}
    for receiver, sender, arrived in came:
        ends[receiver] = max(ends[receiver], (arrived, sender), key=lambda end: end[0])
    return {
        client: (end, Span(client, begun[client] / NS, trained[client] / NS, end / NS, waited_for))
        for client, (end, waited_for) in ends.items()
    }
