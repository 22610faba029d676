"""What a check finds, and what several of them go by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Severity = Literal["problem", "notice", "good"]

LEAST_ROUNDS = 10  # below, trends and standard errors mean nothing
WARM_UP = 5  # rounds at the start, whose loss falls steeply whatever else happens
NO_GOSSIP = {"decaf", "lora_fair"}  # they mix products, so rho does not bound how fast their factors contract


class Said(NamedTuple):
    """What a check says; which one that is, and how grave, stands in `CHECKS`."""

    title: str
    text: str  # a sentence or two, with the numbers
    advice: str  # what to change, by the recipe's keys; "" where there is nothing


@dataclass(frozen=True)
class Finding:
    """One thing that a run's records show."""

    name: str  # short and fixed: "interval"
    severity: Severity
    title: str
    text: str
    advice: str


def called(numbers: Sequence[int]) -> str:
    """Name clients, at most six: "client 3", "clients 1, 4, 7"."""
    rest = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
    return f"client{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers[:6]))}{rest}"
