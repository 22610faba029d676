"""A few thousand of the mutated payloads of `benchmarks.mutated`: every method, and all that is sent."""

from dataclasses import replace
from itertools import cycle, islice

import pytest

from benchmarks.mutated import MESSAGES, METHODS, SIZES, Case, World, cases, played

pytestmark = pytest.mark.thorough
ALL = list(cases())
SOME = {case for case in ALL if case.message == "whole"}
for method, message in zip(
    cycle(reversed(METHODS)), MESSAGES, strict=False
):  # each message with one method that has it
    SOME.add(next(case for case in [Case(method, message), *ALL] if case in ALL and case.message == message))


@pytest.mark.parametrize("case", sorted(SOME), ids=str)
def test_no_payload_ends_a_run_or_takes_an_honest_client_beyond_the_bound(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "sparse", 90)
    found = played(case, 100, seed=1)
    assert found["broken"] == []
    assert found["payloads"] >= 100
    assert found["failed"] + found["left_out"] < found["edges"], "something is mixed"


def test_what_does_not_hold_is_found() -> None:
    world = World(Case("dec_lora", "whole"), "dense", 0)
    world.job = replace(world.job, bound=None)
    broken = [line for came in islice(world.rounds(), 4) for line in came.broken]
    assert any("is not finite" in line for line in broken)
    assert any("times what the bound allows" in line for line in broken)
