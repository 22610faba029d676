"""Both ends of an edge and the streams between them, in all orders of what can happen; hypothesis plays longer lives.

Inside a stream nothing is lost, repeated or overtaken. A stream may break at any point: each end then has what came
until it notices. What is held in every state is the promise of docs/wire.md, Verdicts: both ends count the edge, or
neither does, or the one that does not has given up what it had pledged.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peertune.errors import WireError
from peertune.wire.edge import Ask, Cancel, Edge, Offer, Say, Step, Wait
from peertune.wire.peer_pb2 import Hello, Verdict

SWAP, SETTLE, TOTAL, DATA = "swap", "settle", "total", "data"  # what is sent, beside verdicts
HAVE, COUNTED, PASSED, REFUSED = Verdict.HAVE, Verdict.COUNTED, Verdict.PASSED, Verdict.REFUSED


class Wire(NamedTuple):
    """A stream between the two; its number is even where end 0 made the call."""

    to: tuple[Any, Any] = ((), ())  # what is on its way to each end; None where that end is done with it
    whole: bool = True


class World(NamedTuple):
    """The two ends, and what is between them."""

    edges: tuple[Edge, ...] = (Edge(), Edge())
    wires: tuple[Wire | None, ...] = (None,) * 4
    ready: tuple[bool, ...] = (False, False)  # an end has its payload of the round
    left: tuple[bool, ...] = (False, False)  # an end is beyond the round
    broke: tuple[bool, ...] = (False, False)  # an end gave up what it had pledged, or fell back behind it
    refuses: tuple[bool, ...] = (False, False)  # an end won't mix what the other sends
    calls: tuple[int, ...] = (2, 2)  # that an end may still make
    cuts: int = 2  # that may still be
    crashes: int = 1
    deadlines: bool = True  # an end may give up


def put(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def sent(world: World, stream: int, end: int, *parts: Any) -> World:
    """What is after parts were sent to an end."""
    wire = world.wires[stream]
    if wire is None or wire.to[end] is None:
        return world
    wire = wire._replace(to=put(wire.to, end, wire.to[end] + parts))
    return world._replace(wires=put(world.wires, stream, wire))


def carried(world: World, end: int, step: Step) -> World:
    """What is after an end did what its edge says."""
    edge, actions = step
    world = world._replace(edges=put(world.edges, end, edge))
    for action in actions:
        match action:
            case Cancel(stream):
                world = cut(world, stream)
            case Ask(stream, purpose):
                world = sent(world, stream, 1 - end, SETTLE if purpose == Hello.SETTLE else SWAP)
            case Offer(stream) if stream % 2 != end:  # what the caller sends matters once it is whole: with HAVE
                world = sent(world, stream, 1 - end, TOTAL, DATA)
            case Say(stream, outcome):
                world = sent(world, stream, 1 - end, outcome)
    return world


def cut(world: World, stream: int) -> World:
    wire = world.wires[stream]
    return world if wire is None else world._replace(wires=put(world.wires, stream, wire._replace(whole=False)))


def done(world: World, stream: int, end: int) -> World:
    """What is after an end is done with a stream."""
    wire = world.wires[stream]
    assert wire is not None
    over = wire.to[1 - end] is None
    wire = None if over else wire._replace(to=put(wire.to, end, None))
    return carried(world._replace(wires=put(world.wires, stream, wire)), end, world.edges[end].ended(stream))


def read(world: World, stream: int, end: int) -> World | None:
    """What is after an end read what came next in a stream; None where it has to wait."""
    edge, wire, refused = world.edges[end], world.wires[stream], world.refuses[end]
    assert wire is not None
    (part, *rest) = wire.to[end]
    world = world._replace(wires=put(world.wires, stream, wire._replace(to=put(wire.to, end, tuple(rest)))))
    if stream % 2 == end:
        if part == TOTAL:
            return carried(world, end, edge.offered(stream))
        if part == DATA:
            return carried(world, end, edge.came(stream, "payload", refused))
        return done(carried(world, end, edge.told(stream, part)), stream, end)
    if part == REFUSED:
        return done(sent(carried(world, end, edge.declined()), stream, 1 - end, REFUSED), stream, end)
    if part == SWAP:
        step = edge.called(stream, world.ready[end], world.left[end])
    elif part == SETTLE:
        step = edge.asked(stream, world.left[end])
    else:
        step = edge.had(stream, "payload", refused)
    match step[1][-1]:
        case Wait():
            return None
        case Say():  # which ends it
            return done(carried(world, end, (step[0].heard()[0], step[1])), stream, end)
    return carried(world, end, step)


def crashed(world: World, end: int, back: bool) -> World:
    """What is after an end was killed, and came `back` to before the round, or else to after it."""
    edge = world.edges[end]
    lost = back and (edge.pledged or edge.verdict == COUNTED)
    for stream, wire in enumerate(world.wires):
        if wire is not None and wire.to[end] is not None:
            world = cut(done(world, stream, end), stream)
    return world._replace(
        edges=put(world.edges, end, type(edge)(verdict=None if back else edge.verdict)),
        ready=put(world.ready, end, False),
        left=put(world.left, end, not back),
        broke=put(world.broke, end, world.broke[end] or lost),
        crashes=world.crashes - 1,
    )


def nexts(world: World) -> Iterator[World]:
    """All that can come next; nothing once both ends know, since then nothing changes."""
    if all(map(is_over, world.edges, world.left)) and not world.crashes:
        return
    for stream, wire in enumerate(world.wires):
        for end in (0, 1):
            if wire is None or wire.to[end] is None:
                continue
            if wire.to[end] and (after := read(world, stream, end)) is not None:
                yield after
            if world.cuts or not wire.whole:  # who notices it first has cut it
                yield done(cut(world, stream)._replace(cuts=world.cuts - wire.whole), stream, end)
    for end in (0, 1):
        if world.crashes:
            yield crashed(world, end, back=True)
            if world.edges[end].verdict is not None:
                yield crashed(world, end, back=False)
        if not world.left[end]:
            yield from by_itself(world, end)


def by_itself(world: World, end: int) -> Iterator[World]:
    """All that an end can do next of itself."""
    edge = world.edges[end]
    if not world.ready[end]:
        yield world._replace(ready=put(world.ready, end, True))
        if not world.crashes and world.deadlines:  # it may find others beyond the round, and resume there
            yield world._replace(left=put(world.left, end, True))
    elif edge.verdict is None:
        if world.deadlines or edge.final:
            broke = put(world.broke, end, world.broke[end] or edge.pledged)
            yield carried(world._replace(broke=broke), end, edge.given_up())
        mine = range(end, len(world.wires), 2)
        calling = any(wire is not None and wire.to[end] is not None for wire in world.wires[end::2])
        free = [stream for stream in mine if world.wires[stream] is None]
        if world.calls[end] and free and not calling and not edge.final:
            calls, wires = put(world.calls, end, world.calls[end] - 1), put(world.wires, free[0], Wire())
            yield carried(world._replace(calls=calls, wires=wires), end, edge.dialled(free[0]))


def is_over(edge: Edge, left: bool) -> bool:
    return left or edge.verdict is not None


def fault(before: World, world: World) -> str:
    """Say what is wrong with a state that came after another; "" where nothing is."""
    for old, new, left in zip(before.edges, world.edges, world.left, strict=True):
        if new.verdict != old.verdict is not None and before.crashes == world.crashes:
            return "what was decided is decided anew"
        if new.verdict == COUNTED and new.brought is None and not left:
            return "an edge counts of which nothing came"
    counts = [edge.verdict == COUNTED for edge in world.edges]
    if all(map(is_over, world.edges, world.left)) and counts[0] != counts[1] and not world.broke[counts.index(False)]:
        return "one end counts the edge, and the other had pledged nothing and does not"
    return ""


class Search(NamedTuple):
    """All states that can come after one."""

    states: list[World]
    nexts: list[list[int]]  # of each state, by place
    faults: set[str]

    def ends(self) -> list[World]:
        """Return the states after which nothing comes."""
        return [world for world, nexts in zip(self.states, self.nexts, strict=True) if not nexts]

    def orders(self) -> int:
        """How many orders of events there are, each to its end."""
        before = Counter(after for nexts in self.nexts for after in nexts)
        paths, free = [0] * len(self.states), deque([0])
        paths[0] = 1
        while free:
            at = free.popleft()
            for after in self.nexts[at]:
                paths[after] += paths[at]
                before[after] -= 1
                if not before[after]:
                    free.append(after)
        assert not any(before.values()), "events that go round in a circle"
        return sum(number for number, nexts in zip(paths, self.nexts, strict=True) if not nexts)


def search(start: World) -> Search:
    """Go through all states that can come after this one, breadth first."""
    states, places, found = [start], {start: 0}, []
    faults: set[str] = set()
    for world in states:  # which grows meanwhile
        afters: list[World] = []
        try:
            afters = list(dict.fromkeys(nexts(world)))
        except WireError as error:  # an end says what it must not
            faults.add(str(error))
        faults.update(filter(None, (fault(world, after) for after in afters)))
        states += (new := [after for after in afters if after not in places])
        places.update(zip(new, range(len(places), len(states)), strict=True))
        found.append([places[after] for after in afters])
    return Search(states, found, faults)


CUT_TWICE, KILLED, CUT_AND_KILLED = World(crashes=0), World(cuts=0), World(cuts=1, calls=(1, 1))


@pytest.mark.thorough
def test_in_all_orders_of_calls_that_break_and_are_made_again_both_ends_agree_unless_a_pledge_is_given_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    began, states, orders, ends = time.process_time(), 0, 0, Counter[tuple[Any, ...]]()
    for start in (CUT_TWICE, CUT_TWICE._replace(refuses=(True, False)), KILLED, CUT_AND_KILLED):
        found = search(start)
        assert found.faults == set()
        states += len(found.states)
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


@pytest.mark.parametrize(
    "rule",
    [CountsBeforeItsVerdict, CountsWithoutAVerdict, ForgetsItsPledge, AnswersTooSoon, DecidesAnew, CountsWhatItRefuses],
)
def test_an_edge_with_one_wrong_rule_is_found_out(rule: type[Edge]) -> None:
    for refuses in ((False, False), (False, True)):
        start = World(edges=(rule(), rule()), cuts=1, calls=(2, 1), crashes=0, refuses=refuses)
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
    assert all(map(is_over, world.edges, world.left))
