"""Both ends of an edge agree, in all orders of what can happen (`worlds`); hypothesis plays longer lives."""

import time
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import COUNTED, HAVE, PASSED, REFUSED, World, are_over, fault, nexts, search

from peertune.errors import WireError
from peertune.wire.edge import Action, Ask, Cancel, Edge, Offer, Say, Step, Wait
from peertune.wire.peer_pb2 import Hello, Verdict

UNKNOWN = Verdict.UNKNOWN
OPEN, DIALLED = Edge(), Edge(calls=frozenset({0}))
PLEDGED = DIALLED._replace(pledged=True, brought="payload")
OFFERED = Edge(streams=frozenset({0}))
WON = Edge(COUNTED, brought="payload")
LOST = Edge(PASSED)

EVENTS: dict[str, tuple[Edge, Callable[[Edge], Step], Edge, tuple[Action, ...]]] = {
    "a call swaps": (OPEN, lambda x: x.dialled(0), DIALLED, (Ask(0, Hello.SWAP),)),
    "of who pledged it asks": (
        PLEDGED,
        lambda x: x.dialled(2),
        PLEDGED._replace(calls=frozenset({0, 2})),
        (Ask(2, Hello.SETTLE),),
    ),
    "after the verdict none is made": (WON, lambda x: x.dialled(0), WON, (Cancel(0),)),
    "who stops waiting waits in no call": (
        DIALLED,
        Edge.stopped_waiting,
        DIALLED,
        (Cancel(0),),
    ),
    "but for a verdict": (PLEDGED, Edge.stopped_waiting, PLEDGED, ()),
    "that it has not": (
        Edge(PASSED, calls=frozenset({0})),
        Edge.stopped_waiting,
        Edge(PASSED, calls=frozenset({0})),
        (),
    ),
    "who gives up has nothing": (PLEDGED, Edge.given_up, LOST, (Cancel(0),)),
    "what counts is not given up": (WON, Edge.given_up, WON, ()),
    "what is of no use is not tried again": (PLEDGED, Edge.unusable, PLEDGED._replace(final=True), ()),
    "a planned fault is no pledge": (PLEDGED, Edge.called_off, PLEDGED._replace(final=True, pledged=False), ()),
    "a stream ends": (
        Edge(calls=frozenset({0, 2}), streams=frozenset({0, 1})),
        lambda x: x.ended(0),
        Edge(calls=frozenset({2}), streams=frozenset({1})),
        (),
    ),
    "a payload begins": (OPEN, lambda x: x.offered(0), OFFERED, (Offer(0),)),
    "it came": (OPEN, lambda x: x.came(0, "payload", False), Edge(pledged=True, brought="payload"), (Say(0, HAVE),)),
    "it came late": (LOST, lambda x: x.came(0, "payload", False), LOST, (Cancel(0),)),
    "it came, and won't be mixed": (
        Edge(calls=frozenset({0, 2})),
        lambda x: x.came(0, "payload", True),
        Edge(PASSED, final=True),
        (Cancel(2), Say(0, REFUSED)),
    ),
    "it counts": (
        PLEDGED._replace(calls=frozenset({0, 2})),
        lambda x: x.told(0, COUNTED),
        WON,
        (Cancel(2),),
    ),
    "it counted before": (WON._replace(calls=frozenset({0})), lambda x: x.told(0, PASSED), WON, ()),
    "the other went on": (PLEDGED, lambda x: x.told(0, PASSED), Edge(PASSED, final=True, missed=True), ()),
    "the other forgot": (PLEDGED, lambda x: x.told(0, UNKNOWN), Edge(brought="payload"), ()),
    "the other won't mix it": (PLEDGED, lambda x: x.told(0, REFUSED), Edge(brought="payload", final=True), ()),
    "a call is answered": (OPEN, lambda x: x.called(1, True, False), Edge(streams=frozenset({1})), (Offer(1),)),
    "also for what counts": (WON, lambda x: x.called(1, True, True), WON._replace(streams=frozenset({1})), (Offer(1),)),
    "but not what is lost": (LOST, lambda x: x.called(1, True, False), LOST, (Say(1, PASSED),)),
    "a call comes early": (OPEN, lambda x: x.called(1, False, False), OPEN, (Wait(1),)),
    "a call comes late": (OPEN, lambda x: x.called(1, False, True), OPEN, (Say(1, PASSED),)),
    "a call comes after a restart": (WON, lambda x: x.called(1, False, False), WON, (Say(1, PASSED),)),
    "both have it": (
        DIALLED,
        lambda x: x.had(1, "payload", False),
        WON._replace(unheard=True),
        (Cancel(0), Say(1, COUNTED)),
    ),
    "both had it": (WON, lambda x: x.had(1, "another", False), WON, (Say(1, COUNTED),)),
    "this end won't mix it": (
        DIALLED,
        lambda x: x.had(1, "payload", True),
        Edge(PASSED, final=True),
        (Cancel(0), Say(1, REFUSED)),
    ),
    "the caller won't mix it": (
        DIALLED,
        Edge.declined,
        Edge(PASSED, final=True),
        (Cancel(0),),
    ),
    "this end may count it all the same": (PLEDGED, Edge.declined, PLEDGED, ()),
    "what counts is told": (WON, lambda x: x.asked(1, False), WON, (Say(1, COUNTED),)),
    "what is on its way is waited for": (
        OFFERED,
        lambda x: x.asked(1, True),
        OFFERED,
        (Wait(1),),
    ),
    "what was never decided is unknown": (OPEN, lambda x: x.asked(1, False), OPEN, (Say(1, UNKNOWN),)),
    "and lost once this end is beyond it": (OPEN, lambda x: x.asked(1, True), OPEN, (Say(1, PASSED),)),
    "the verdict arrived": (WON._replace(unheard=True), Edge.heard, WON, ()),
}


@pytest.mark.parametrize("what", EVENTS)
def test_an_edge_does_at_each_event_what_the_protocol_says_and_no_more(what: str) -> None:
    before, event, after, actions = EVENTS[what]
    found, does = event(before)
    assert found == after
    assert [(type(action), *action) for action in does] == [(type(action), *action) for action in actions]


def test_who_counts_an_edge_of_which_this_end_has_nothing_is_told_so() -> None:
    with pytest.raises(WireError, match=r"^counts an edge of which this end has nothing$"):
        OPEN.told(0, COUNTED)


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


@pytest.mark.thorough
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


@pytest.mark.thorough
@given(
    choices=st.lists(st.integers(0, 1000), min_size=1, max_size=100), refuses=st.tuples(st.booleans(), st.booleans())
)
@settings(max_examples=300)
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
