"""One edge in one round, as one of its ends sees it: a state machine without clock, lock, thread or socket.

Events go in, actions come out, and whoever carries an edge does what they say: `calling` and `answering`, with gRPC,
or a test that goes through all orders of events. The rules are those of a commit between two. HAVE says that the caller
is prepared, and pledges it; COUNTED commits, and PASSED aborts. The called end alone decides, and its word is final.

An end has two roles at a time, since both may call. It stands in one `Edge`, so that the first verdict settles both.
"""

from typing import Any, NamedTuple

from peertune.errors import WireError
from peertune.wire.peer_pb2 import Hello, Verdict

Stream = Any
"""A call, either way: anything that can be hashed and tells it from the others."""


class Ask(NamedTuple):
    """Greet, for this purpose: SWAP, or SETTLE where the verdict alone is needed."""

    stream: Stream
    purpose: "Hello.Purpose"


class Offer(NamedTuple):
    """Send this end's payload."""

    stream: Stream


class Say(NamedTuple):
    """Send a verdict."""

    stream: Stream
    outcome: "Verdict.Outcome"


class Wait(NamedTuple):
    """Say that this end isn't there yet, and bring the event again once something changed."""

    stream: Stream


class Cancel(NamedTuple):
    """End a call of this end."""

    stream: Stream


Action = Ask | Offer | Say | Wait | Cancel
Step = tuple["Edge", tuple[Action, ...]]


class Edge(NamedTuple):
    """One end of an edge in one round. Each method is an event: what the end is after it, and what is to be done."""

    verdict: "Verdict.Outcome | None" = None  # COUNTED or PASSED, once; None while it is open
    pledged: bool = False  # the other end may have counted it: only its verdict can tell
    final: bool = False  # there is no use in calling again
    missed: bool = False  # the other end went on without this one
    unheard: bool = False  # the caller may not have the verdict of this end
    calls: frozenset[Stream] = frozenset()  # of this end, which are cancelled once it is settled
    streams: frozenset[Stream] = frozenset()  # through which payloads may be travelling now
    brought: Any = None  # what the other end sent, as long as it may count

    # ---- here

    def dialled(self, stream: Stream) -> Step:
        """This end has begun a call."""
        if self.verdict is not None:
            return self, (Cancel(stream),)
        purpose = Hello.SETTLE if self.pledged else Hello.SWAP
        return self._replace(calls=self.calls | {stream}), (Ask(stream, purpose),)

    def stopped_waiting(self) -> Step:
        """This end waits for nobody any more, but for the verdict on what it pledged."""
        return self, () if self.pledged or self.verdict is not None else _cancel(self.calls)

    def given_up(self) -> Step:
        """The deadline is over, or there is nobody to call."""
        return self._settled(Verdict.PASSED)

    def unusable(self) -> Step:
        """What the other end says or is can't be used, and trying again won't help."""
        return self._replace(final=True), ()

    def called_off(self) -> Step:
        """The other end doesn't count the edge, as was planned."""
        return self._replace(final=True, pledged=False), ()

    def ended(self, stream: Stream) -> Step:
        """A stream is over, or broken."""
        return self._replace(calls=self.calls - {stream}, streams=self.streams - {stream}), ()

    # ---- in a call of this end

    def offered(self, stream: Stream) -> Step:
        """The other end's payload begins."""
        return self._replace(streams=self.streams | {stream}), (Offer(stream),)

    def came(self, stream: Stream, payload: Any, refused: bool) -> Step:
        """The other end's payload is whole, and `refused` if it is not to be mixed."""
        if self.verdict is not None:
            return self, (Cancel(stream),)
        if refused:  # over this call the other end is told
            edge, actions = self._replace(final=True, calls=self.calls - {stream})._settled(Verdict.PASSED)
            return edge, (*actions, Say(stream, Verdict.REFUSED))
        return self._replace(pledged=True, brought=payload), (Say(stream, Verdict.HAVE),)

    def told(self, stream: Stream, outcome: "Verdict.Outcome") -> Step:
        """The called end's verdict came. Raises WireError where it can't be."""
        edge = self._replace(calls=self.calls - {stream})
        if edge.verdict is not None:
            return edge, ()
        if outcome == Verdict.COUNTED:
            if not edge.pledged:
                raise WireError("counts an edge of which this end has nothing")
            return edge._settled(Verdict.COUNTED)
        edge = edge._replace(pledged=False)  # UNKNOWN: it has forgotten, and the swap is made again
        if outcome == Verdict.PASSED:
            return edge._replace(final=True, missed=True)._settled(Verdict.PASSED)
        return edge._replace(final=outcome == Verdict.REFUSED), ()

    # ---- in a call of the other end

    def called(self, stream: Stream, ready: bool, left: bool) -> Step:
        """The other end calls to swap; this one has its payload if `ready`, and is beyond the round if `left`."""
        if ready and self.verdict != Verdict.PASSED:
            return self._replace(streams=self.streams | {stream}), (Offer(stream),)
        if left or self.verdict is not None:
            return self, (Say(stream, Verdict.PASSED),)
        return self, (Wait(stream),)

    def had(self, stream: Stream, payload: Any, refused: bool) -> Step:
        """The caller has this end's payload, and its own came whole; `refused` if that is not to be mixed."""
        if self.verdict is not None:
            return self, (Say(stream, self.verdict),)
        if refused:
            edge, actions = self._replace(final=True)._settled(Verdict.PASSED)
            return edge, (*actions, Say(stream, Verdict.REFUSED))
        edge, actions = self._replace(brought=payload, unheard=True)._settled(Verdict.COUNTED)
        return edge, (*actions, Say(stream, Verdict.COUNTED))

    def declined(self) -> Step:
        """The caller won't mix what it was sent, nor in another call; only what it counts itself may still count."""
        return (self, ()) if self.pledged else self._replace(final=True)._settled(Verdict.PASSED)

    def asked(self, stream: Stream, left: bool) -> Step:
        """The other end asks for the verdict; this one is beyond the round if `left`."""
        if self.verdict is not None:
            return self, (Say(stream, self.verdict),)
        if self.streams:  # through which it may still be decided
            return self, (Wait(stream),)
        return self, (Say(stream, Verdict.PASSED if left else Verdict.UNKNOWN),)

    def heard(self) -> Step:
        """The caller has this end's verdict."""
        return self._replace(unheard=False), ()

    def _settled(self, verdict: "Verdict.Outcome") -> Step:
        """Decide, unless it is decided."""
        if self.verdict is not None:
            return self, ()
        brought = self.brought if verdict == Verdict.COUNTED else None
        edge = self._replace(verdict=verdict, pledged=False, brought=brought, calls=frozenset())
        return edge, _cancel(self.calls)


def _cancel(calls: frozenset[Stream]) -> tuple[Action, ...]:
    return tuple(map(Cancel, calls))
