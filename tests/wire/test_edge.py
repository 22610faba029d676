"""Both ends of an edge agree, in all orders of what can happen (`worlds`); hypothesis plays longer lives."""

import time
from collections import Counter
from itertools import cycle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import COUNTED, PASSED, World, are_over, fault, nexts, search

from peertune.wire.edge import Edge, Offer, Say, Step

SEARCHED = {
    "two calls of each end, cut twice": World(crashes=0),
    "and one end won't mix what it hears": World(crashes=0, refuses=(True, False)),
    "cut once, and one end is killed": World(cuts=1),
    "cut once, and one end has no dealings with the other any more": World(cuts=1, crashes=0, shut=1),
}


@pytest.mark.thorough
def test_in_all_orders_of_calls_that_break_and_are_made_again_both_ends_agree_unless_a_pledge_is_given_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    began, states, orders, ends = time.process_time(), 0, 0, Counter[tuple[Any, ...]]()
    for what, start in SEARCHED.items():
        found = search(start)
        assert found.faults == set(), what
        states += len(found.nexts)
        orders += found.orders()
        ends.update(tuple(edge.verdict for edge in world.edges) for world in found.ends())
    with capsys.disabled():
        print(f"\n{states} states, {orders} orders, {time.process_time() - began:.1f} s of one core")  # noqa: T201
    assert orders >= 100_000
    assert {(COUNTED, COUNTED), (PASSED, PASSED), (COUNTED, PASSED), (PASSED, COUNTED)} <= ends.keys()


@pytest.mark.parametrize("refuses", [(False, False), (True, False), (False, True), (True, True)])
def test_where_nothing_breaks_and_nobody_gives_up_an_edge_counts_unless_an_end_refuses_what_came(
    refuses: tuple[bool, bool],
) -> None:
    found = search(World(cuts=0, crashes=0, deadlines=False, refuses=refuses))
    assert found.faults == set()
    verdict = PASSED if any(refuses) else COUNTED
    assert all([edge.verdict for edge in world.edges] == [verdict, verdict] for world in found.ends())


class CountsBeforeItsVerdict(Edge):
    def called(self, stream: Any, ready: bool, left: bool) -> Step:
        edge, actions = super().called(stream, ready, left)
        counts = isinstance(actions[-1], Offer) and edge.verdict is None
        return (edge._replace(verdict=COUNTED, brought="payload") if counts else edge), actions


class CountsWithoutAVerdict(Edge):
    def came(self, stream: Any, payload: Any, refused: bool) -> Step:
        edge, actions = super().came(stream, payload, refused)
        return (edge._replace(verdict=COUNTED) if edge.pledged else edge), actions


class ForgetsItsPledge(Edge):
    def ended(self, stream: Any) -> Step:
        return super().ended(stream)[0]._replace(pledged=False), ()


class AnswersTooSoon(Edge):
    def asked(self, stream: Any, left: bool) -> Step:
        return self._replace(streams=frozenset()), Edge.asked(self._replace(streams=frozenset()), stream, left)[1]


class DecidesAnew(Edge):
    def had(self, stream: Any, payload: Any, refused: bool) -> Step:
        return Edge.had(self._replace(verdict=None), stream, payload, refused)


class CountsWhatItRefuses(Edge):
    def had(self, stream: Any, payload: Any, refused: bool) -> Step:
        edge, actions = super().had(stream, payload, refused)
        return edge, (*actions[:-1], Say(stream, COUNTED))


class DropsItsPledgeIfRefused(Edge):
    def unusable(self) -> Step:
        return self._replace(final=True, pledged=False), ()


@pytest.mark.parametrize(
    "rule",
    [
        CountsBeforeItsVerdict,
        CountsWithoutAVerdict,
        ForgetsItsPledge,
        AnswersTooSoon,
        DecidesAnew,
        CountsWhatItRefuses,
        DropsItsPledgeIfRefused,
    ],
)
def test_an_edge_with_one_wrong_rule_is_found_out(rule: type[Edge]) -> None:
    for refuses in ((False, False), (False, True)):
        start = World(edges=(rule(), rule()), cuts=1, calls=(2, 1), crashes=0, shut=1, refuses=refuses)
        if search(start).faults:
            return
    pytest.fail("nothing is wrong in any state")


@given(
    choices=st.lists(st.integers(0, 1000), min_size=1, max_size=100), refuses=st.tuples(st.booleans(), st.booleans())
)
@settings(max_examples=300, deadline=None)
def test_longer_lives_with_many_calls_and_several_crashes_keep_the_promise(
    choices: list[int], refuses: tuple[bool, bool]
) -> None:
    world = World(wires=(None,) * 8, calls=(6, 6), cuts=6, crashes=3, refuses=refuses)
    for choice in cycle(choices):
        afters = list(nexts(world))
        if not afters:
            break
        after = afters[choice % len(afters)]
        assert fault(world, after) == ""
        world = after
    assert are_over(world)
