"""Both ends of an edge and the streams between them, in all orders of what can happen.

Inside a stream nothing is lost, repeated or overtaken. A stream may break at any point: each end then has what came
until it notices. What is held in every state is the promise of docs/wire.md, Verdicts: both ends count the edge, or
neither does, or the one that does not has given up what it had pledged.

Of two states that mirror each other only one is looked into, since what can come after them mirrors each other, too.
"""

from collections import Counter, deque
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from peertune.errors import WireError
from peertune.wire.edge import Ask, Cancel, Edge, Offer, Say, Step, Wait
from peertune.wire.peer_pb2 import Hello, Verdict

SWAP, SETTLE, TOTAL, DATA, SHUT = "swap", "settle", "total", "data", "shut"  # what is sent, beside verdicts
HAVE, COUNTED, PASSED, REFUSED = Verdict.HAVE, Verdict.COUNTED, Verdict.PASSED, Verdict.REFUSED


class Wire(NamedTuple):
    """A stream between the two; its number is even where end 0 made the call."""

    to: tuple[Any, Any] = ((), ())  # what is on its way to each end; None where that end is done with it
    whole: bool = True

    def holds(self, end: int, parts: tuple[Any, ...] | None) -> "Wire":
        return Wire(put(self.to, end, parts), self.whole)


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
    shut: int = 0  # greetings to which an end may answer that it has no dealings with the other


def put(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def wired(world: World, stream: int, wire: Wire | None) -> World:
    """What is with another wire in the place of a stream."""
    return World._make((world.edges, put(world.wires, stream, wire), *world[2:]))  # a search has no time for `_replace`


def sent(world: World, stream: int, end: int, *parts: Any) -> World:
    """What is after parts were sent to an end."""
    wire = world.wires[stream]
    if wire is None or wire.to[end] is None:
        return world
    return wired(world, stream, wire.holds(end, wire.to[end] + parts))


def carried(world: World, end: int, step: Step) -> World:
    """What is after an end did what its edge says."""
    edge, actions = step
    if edge is not world.edges[end]:
        world = World._make((put(world.edges, end, edge), *world[1:]))
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
    return world if wire is None else wired(world, stream, Wire(wire.to, whole=False))


def done(world: World, stream: int, end: int) -> World:
    """What is after an end is done with a stream."""
    wire = world.wires[stream]
    assert wire is not None
    world = wired(world, stream, None if wire.to[1 - end] is None else wire.holds(end, None))
    return carried(world, end, world.edges[end].ended(stream))


def read(world: World, stream: int, end: int) -> World | None:
    """What is after an end read what came next in a stream; None where it has to wait."""
    edge, wire, refused = world.edges[end], world.wires[stream], world.refuses[end]
    assert wire is not None
    (part, *rest) = wire.to[end]
    world = wired(world, stream, wire.holds(end, tuple(rest)))
    if stream % 2 == end:
        if part == TOTAL:
            return carried(world, end, edge.offered(stream))
        if part == DATA:
            return carried(world, end, edge.came(stream, "payload", refused))
        if part == SHUT:
            return done(carried(world, end, edge.unusable()), stream, end)
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


def shut(world: World, stream: int, end: int) -> World:
    """What is after an end answered a greeting by refusing all dealings with the other."""
    wire = world.wires[stream]
    assert wire is not None
    world = sent(wired(world, stream, wire.holds(end, ())), stream, 1 - end, SHUT)
    return done(world._replace(shut=world.shut - 1), stream, end)


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
    if not world.crashes and are_over(world):
        return
    for stream, wire in enumerate(world.wires):
        for end in (0, 1):
            if wire is None or wire.to[end] is None:
                continue
            if wire.to[end] and (after := read(world, stream, end)) is not None:
                yield after
            if world.shut and wire.to[end] and wire.to[end][0] in (SWAP, SETTLE):
                yield shut(world, stream, end)
            if world.cuts or not wire.whole:  # who notices it first has cut it
                yield done(cut(world._replace(cuts=world.cuts - wire.whole), stream), stream, end)
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


def are_over(world: World) -> bool:
    """Whether both ends know what became of the edge, or are beyond the round."""
    (first, second), (left, gone) = world.edges, world.left
    return (left or first.verdict is not None) and (gone or second.verdict is not None)


def fault(before: World, world: World) -> str:
    """Say what is wrong with a state that came after another; "" where nothing is."""
    for old, new, left in zip(before.edges, world.edges, world.left, strict=True):
        if new is old:
            continue
        if new.verdict != old.verdict is not None and before.crashes == world.crashes:
            return "what was decided is decided anew"
        if new.verdict == COUNTED and new.brought is None and not left:
            return "an edge counts of which nothing came"
    if not are_over(world):
        return ""
    counts = [edge.verdict == COUNTED for edge in world.edges]
    if counts[0] != counts[1] and not world.broke[counts.index(False)]:
        return "one end counts the edge, and the other had pledged nothing and does not"
    return ""


@cache
def turned(edge: Edge) -> Edge:
    """What is the same with the calls of one end for those of the other."""
    calls, streams = (frozenset(stream ^ 1 for stream in of) for of in (edge.calls, edge.streams))
    return edge._replace(calls=calls, streams=streams)


@cache
def crossed(wires: tuple[Wire | None, ...]) -> tuple[Wire | None, ...]:
    """What is the same with what either end called for what the other did."""
    seen = [wire and Wire(wire.to[::-1], wire.whole) for wire in wires]
    return tuple(seen[stream ^ 1] for stream in range(len(seen)))


def mirrored(world: World) -> World:
    """What is the same but for which end is which."""
    first, second = world.edges
    return world._replace(
        edges=(turned(second), turned(first)),
        wires=crossed(world.wires),
        ready=world.ready[::-1],
        left=world.left[::-1],
        broke=world.broke[::-1],
        refuses=world.refuses[::-1],
        calls=world.calls[::-1],
    )


class Search(NamedTuple):
    """All states that can come after one. Of two that mirror each other, one's place is that of both."""

    places: dict[World, int]
    nexts: list[list[int]]  # of what stands at a place: one for each state that can come next
    faults: set[str]

    def ends(self) -> list[World]:
        """Return the states after which nothing comes."""
        return [world for world, place in self.places.items() if not self.nexts[place]]

    def orders(self) -> int:
        """How many orders of events there are, each to its end."""
        before = Counter(after for nexts in self.nexts for after in nexts)
        paths, free = [0] * len(self.nexts), deque([0])
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
    states, places = [start], {start: 0}
    found: list[list[int]] = []
    faults: set[str] = set()
    for world in states:  # which grows meanwhile
        afters: list[World] = []
        try:
            afters = list(dict.fromkeys(nexts(world)))
        except WireError as error:  # an end says what it must not
            faults.add(str(error))
        found.append([])
        for after in afters:
            faults.add(fault(world, after))
            place = places.get(after)
            if place is None:
                place = places[after] = places.get(mirrored(after), len(states))
                if place == len(states):
                    states.append(after)
            found[-1].append(place)
    return Search(places, found, faults - {""})
