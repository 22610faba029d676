"""A peer among others: how it greets them and calls them, and what it knows of them. Of rounds it knows its own."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from peertune.allowance import Allowance, Lines, one_line
from peertune.errors import PeertuneError, WireError
from peertune.identity.entries import Member
from peertune.identity.incarnation import Incarnation, clone
from peertune.identity.keys import Identity
from peertune.identity.membership import Membership
from peertune.identity.roster import MAX_ROSTER_BYTES
from peertune.wire import tls
from peertune.wire.codec import CHUNK_BYTES
from peertune.wire.framing import deserialize, field_of, serialize
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict
from peertune.wire.rpc import grpc

log = logging.getLogger(__name__)

PROTOCOL = 2
SERVICE = "peertune.v1.Peer"
METHOD = f"/{SERVICE}/Swap"
MESSAGE_BYTES = MAX_ROSTER_BYTES + 2**16  # the longest is a roster
HELLO_FIELDS = 64  # that must agree, at most
PROBE_S = 2.0  # how long a round waits for a neighbour that could not be reached in the one before
CALLS_BACK = 6  # that a member may ask for in a minute

OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.use_local_subchannel_pool", 1),
]

UNTRIED = {
    "busy": "is calling back already",
    "often": "was asked too often: ask again in a minute",
    "private": "does not call private addresses, since its own is none",
}
"""What is answered to who asks to be called back and is not."""
SILENT = "got no answer from this peer there"
"""What is answered to who was called back and did not answer, whatever came of it."""


@dataclass
class Neighbour:
    """What this peer knows of another."""

    round: int | None = None  # where it was when last heard
    step: int = 0  # local steps done there
    seen_at: float | None = None  # seconds since the epoch
    reached: bool = False  # whether the last attempt came through
    given_up: bool = False  # whether an edge was lost because it did not answer, since it was last heard
    done: bool = False  # whether it has said that it takes nothing any more, since it last asked for something
    problem: str = ""  # what was wrong with the last attempt that failed
    up: int = 0  # edges that counted
    down: int = 0  # edges that did not
    bytes_sent: int = 0
    bytes_received: int = 0
    clock_offset_s: float | None = None  # by how much its clock is ahead of this one
    incarnation: int = 0  # the number of the start that was heard last; 0 where it did not say
    nonce: int = 0  # drawn at that start
    keys: list[str] = field(default_factory=list)  # fingerprints of those that it had then
    clones: int = 0  # times that another process spoke with its key
    unmixed: int = 0  # edges that counted and of which nothing was mixed: too far from what others have
    taken: float | None = None  # what share of its weight a rule took of it when it was last heard


@dataclass(frozen=True)
class Probe:
    """What came of trying to get through to another peer; it did."""

    clock_offset_s: float | None  # by how much its clock is ahead of this one
    roster_serial: int
    own_roster: bool  # which is not passed on
    takes_part: bool  # whether it runs something
    differs: list[tuple[str, str, str]]  # what must be the same and is not: name, here, there
    back: str | None  # why it did not get through to this peer; "" where it did, None where it wasn't asked


class UnusableError(PeertuneError):
    """The other end and this one can't swap, and trying again won't help."""


class CloneError(UnusableError):
    """Another process speaks with the other end's key."""


class SeatError(UnusableError):
    """There is nobody on the other end's seat, or nobody that can be called."""


class Node:
    """What a peer is to others, whatever they swap.

    `agreed` is what must be the same at all peers. Without TLS (`insecure`) only this machine is called. `known` is
    what this peer knew of others when it last ran, `incarnation` which of its starts this is.
    """

    def __init__(
        self,
        membership: Membership,
        agreed: Mapping[str, str],
        *,
        insecure: bool = False,
        known: Mapping[int, Neighbour] | None = None,
        incarnation: Incarnation | None = None,
    ) -> None:
        self.membership = membership
        self.me = membership.current()[0].client
        self.neighbours: dict[int, Neighbour] = dict(known or {})
        self.lines = Lines(self.name)
        self._agreed, self.insecure = dict(agreed), insecure
        self._incarnation = incarnation or Incarnation()
        self.changed = threading.Condition()  # guards all that follows
        self.round = self.step = 0  # where this peer is
        self._channels: dict[int, tuple[Any, Any]] = {}
        self._calling_back: set[int] = set()
        self._calls_back = Allowance(CALLS_BACK)
        self._outdated = 0  # serial of the roster of which it was said that the CA has a newer one

    def probe(
        self, client: int, wait_s: float = PROBE_S, *, call_back: bool = False, address: str | None = None
    ) -> Probe:
        """Try whether this peer gets through to another and, with `call_back`, the other to this one.

        At its address in the roster if no other is given. Nothing else changes at either end. Runs are compared where
        both ends have one. Raises PeertuneError where it does not get through.
        """
        identity, roster = self.membership.current()
        member = roster.by_client(client)
        if member is not None and address is not None:
            member = replace(member, address=address)
        theirs, back, offset = None, None, None
        try:
            with self._dial(identity, member) as channel:
                hello = self.hello(0, Hello.CALL_BACK if call_back else Hello.ECHO)
                for chunk in swap_on(channel)(iter([Chunk(hello=hello)]), timeout=wait_s, metadata=self.claim()):
                    if field_of(chunk) == "hello":
                        theirs, offset = chunk.hello, _clock_offset_s(chunk.hello)
                    elif field_of(chunk) == "verdict":
                        through = chunk.verdict.outcome == Verdict.HAVE
                        back = "" if through else one_line(chunk.verdict.reason) or "it does not say why"
        except grpc.RpcError as error:
            raise PeertuneError(one_line(error.details() or str(error.code()))) from None
        if theirs is None:
            raise WireError("does not begin with a greeting")
        differs = self._differences(theirs)
        if not (theirs.agreed and self._agreed):
            differs = [found for found in differs if found[0] in ("protocol", "federation")]
        return Probe(offset, theirs.roster_serial, theirs.own_roster, bool(theirs.agreed), differs, back)

    def in_touch(self, clients: Iterable[int]) -> bool:
        """Whether one of these was reached at the last attempt, and lost no edge by not answering since."""
        known = dict(self.neighbours)
        return any(known[client].reached and not known[client].given_up for client in clients if client in known)

    def name(self, client: int) -> str:
        """Return what a client is called in all that is said of it."""
        member = self.membership.current()[1].by_client(client)
        return f"client {client}" if member is None else member.name

    def last_heard(self) -> dict[int, float]:
        """Return when each that ever was heard was heard last, in seconds since the epoch."""
        return {client: known.seen_at for client, known in dict(self.neighbours).items() if known.seen_at is not None}

    def call_back(self, client: int) -> Verdict:
        """Try whether this peer gets through to the caller at its address in the roster, once at a time.

        The answer is one of few: what else there is within this peer's network is nobody's business.
        """
        with self.changed:
            if client in self._calling_back:
                return Verdict(outcome=Verdict.REFUSED, reason=UNTRIED["busy"])
            self._calling_back.add(client)
        try:
            why = self._why_silent(client) if self._calls_back.take(client) else UNTRIED["often"]
            return Verdict(outcome=Verdict.REFUSED, reason=why) if why else Verdict(outcome=Verdict.HAVE)
        finally:
            with self.changed:
                self._calling_back.discard(client)

    def _why_silent(self, client: int) -> str:
        """Call a member at the places of its address that this peer may call; return "" where it answers at one."""
        identity, roster = self.membership.current()
        member = roster.by_client(client)
        try:
            if member is None or member.address is None or identity.address is None:
                return SILENT
            port, found = member.address.rpartition(":")[2], tls.places(member.address)
            if not all(place.is_global for place in found) and all(x.is_global for x in tls.places(identity.address)):
                return UNTRIED["private"]
        except OSError:
            return SILENT
        for place in found[:3]:
            try:
                self.probe(client, address=f"[{place}]:{port}" if place.version == 6 else f"{place}:{port}")
                return ""
            except PeertuneError as error:
                log.debug("%s: called back at %s: %s", member.name, place, error)
        return SILENT

    def identify(self, context: Any) -> Member:
        """Return who calls, by its certificate."""
        roster = self.membership.current()[1]
        if self.insecure:
            claimed = dict(context.invocation_metadata()).get("peertune-client", "")
            member = roster.by_client(int(claimed)) if claimed.isdecimal() and len(claimed) < 8 else None
        else:
            member = tls.caller(context, roster)
        if member is None or member.client == self.me:
            said = f"refuses this peer, which is not in its roster {roster.serial}: revoked, or one roster is old"
            context.abort(grpc.StatusCode.UNAUTHENTICATED, said)
        assert member is not None
        return member

    def claim(self) -> list[tuple[str, str]]:
        """Return what says who calls, where no certificate does."""
        return [("peertune-client", str(self.me))] if self.insecure else []

    def hello(self, round: int, purpose: "Hello.Purpose") -> Hello:
        """Return this end's greeting."""
        roster = self.membership.current()[1]
        own = Incarnation() if purpose in (Hello.CALL_BACK, Hello.ECHO) else self._incarnation
        return Hello(
            protocol=PROTOCOL,
            federation=roster.federation,
            agreed=self._agreed,
            round=round,
            roster_serial=roster.serial,
            purpose=purpose,
            clock=time.time(),
            own_roster=roster.own is not None,
            incarnation=own.number,
            nonce=own.nonce,
            chunk_bytes=CHUNK_BYTES,
        )

    def greeted(self, client: int, hello: Hello) -> None:
        """Take up the greeting of one that was called. Raises UnusableError where it can't be swapped with."""
        self.check_hello(client, hello)
        self.check_incarnation(client, hello)
        self.saw(client, hello.round)

    def check_hello(self, client: int, hello: Hello) -> None:
        """Raise UnusableError where the other end differs in what must be the same, and name it."""
        if len(hello.agreed) > HELLO_FIELDS:
            raise WireError(f"names {len(hello.agreed)} fields that must agree, where {HELLO_FIELDS} are enough")
        self.known(client).clock_offset_s = _clock_offset_s(hello)
        roster = self.membership.current()[1]
        stays = hello.own_roster or roster.own is not None
        if stays and hello.roster_serial > roster.serial != self._outdated:
            self._outdated = roster.serial  # said once, whatever others claim
            has = f"has roster {hello.roster_serial}, which is not passed on, and this peer {roster.serial}"
            self.lines.say(client, f"{has}; ask the CA for the newest")
        for name, here, there in self._differences(hello):
            alike = next((at for at, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), 0)
            start = max(0, alike - 20)  # so that a line shows where they part
            here, there = (f"{'…' * bool(start)}{text[start : start + 80]}" for text in (here, there))
            raise UnusableError(f"{name[:40]} differs: {here} at {self.name(self.me)}, {there} at {self.name(client)}")

    def check_incarnation(self, client: int, hello: Hello) -> None:
        """Take up which start of the other end speaks; raise CloneError where that proves that two do."""
        said = Incarnation(hello.incarnation, hello.nonce)
        member = self.membership.current()[1].by_client(client)
        keys = () if member is None else member.fingerprints
        with self.changed:
            known = self.known(client)
            before = Incarnation(known.incarnation, known.nonce)
            if set(known.keys).isdisjoint(keys):  # what other keys said, as a thief's may have, proves nothing
                before = Incarnation()
            proof = clone(before, said)
            if said.number and not proof:
                known.incarnation, known.nonce, known.keys = said.number, said.nonce, list(keys)
        if proof:
            self.refuse_clone(client, proof)

    def refuse_clone(self, client: int, proof: str) -> NoReturn:
        """Count and tell a clone, and raise CloneError."""
        with self.changed:
            known = self.known(client)
            known.clones += 1
            first = known.clones == 1
        if first:  # said once, whatever else was said of it: status and metrics count the others
            mend = "one is refused; have its owner stop the one that should not run, or revoke it"
            log.warning("%s: %s; %s", self.name(client), proof, mend)
        raise CloneError(proof)

    def _differences(self, hello: Hello) -> list[tuple[str, str, str]]:
        """Return what must be the same and is not: name, here, there."""
        own = {"protocol": str(PROTOCOL), "federation": self.membership.current()[1].federation} | self._agreed
        theirs = {"protocol": str(hello.protocol), "federation": hello.federation} | dict(hello.agreed)
        names = sorted(own.keys() | theirs.keys(), key=lambda name: (name not in ("protocol", "federation"), name))
        return [
            (one_line(name), one_line(own.get(name, "nothing")), one_line(theirs.get(name, "nothing")))
            for name in names
            if own.get(name) != theirs.get(name)
        ]

    def newer(self, hello: Hello) -> Iterator[Chunk]:
        """Pass on this end's roster where it is newer than the other's, and neither is a member's own."""
        roster = self.membership.current()[1]
        if hello.roster_serial < roster.serial and roster.own is None and not hello.own_roster:
            yield Chunk(roster=roster.raw)

    def adopt(self, client: int, raw: bytes) -> None:
        """Take a newer roster, if the CA signed it."""
        try:
            if self.membership.adopt(raw):
                self.lines.say(client, f"sent roster {self.membership.current()[1].serial}, which is in use")
        except PeertuneError as error:
            raise WireError(f"sends a roster that can't be used ({error})") from None

    def known(self, client: int) -> Neighbour:
        """Return what is known of a client."""
        return self.neighbours.setdefault(client, Neighbour())

    def saw(self, client: int, round: int, step: int = 0) -> None:
        """Note that a client was heard, and where it is."""
        known = self.known(client)
        if known.given_up and round >= self.round - 1:
            self.lines.say(client, f"is back, in round {round}")
        known.round, known.step, known.seen_at = round, step, time.time()
        known.reached, known.problem = True, ""
        if round >= self.round - 1:  # one that lags behind is not waited for, until it is where the others are
            known.given_up = False

    def failed(self, client: int, error: Exception) -> None:
        """Note why a client could not be reached or used, and tell it where it is new."""
        known = self.known(client)
        details = error.details() if isinstance(error, grpc.RpcError) else None
        problem = one_line(details or str(error))
        planned = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.CANCELLED)
        if isinstance(error, CloneError) or (isinstance(error, grpc.RpcError) and error.code() in planned):
            known.problem = problem
            return
        if known.reached or known.problem != problem:
            wrong = isinstance(error, PeertuneError) and known.problem != problem and not isinstance(error, SeatError)
            self.lines.say(client, problem, logging.WARNING if wrong else logging.INFO)
        known.reached, known.problem = False, problem

    def count_bytes(self, client: int, sent: int, received: int) -> None:
        """Count a payload each way."""
        known = self.known(client)
        with self.changed:
            known.bytes_sent += sent
            known.bytes_received += received

    def stub(self, client: int) -> Any:
        """Return how to call the client, over a channel that is made anew when certificates change."""
        identity, roster = self.membership.current()
        key = identity, roster.by_client(client)
        with self.changed:
            channel, made_with = self._channels.get(client, (None, None))
            if made_with != key:
                self._channels[client] = self._dial(*key), key
                if channel is not None:
                    channel.close()
            return swap_on(self._channels[client][0])

    def close(self) -> None:
        """Close all channels."""
        for channel, _ in self._channels.values():
            channel.close()

    def _dial(self, identity: Identity, member: Member | None) -> Any:
        missing = nobody(member)
        if member is None or missing:
            raise SeatError(missing)
        if member.address is None:
            raise SeatError("has no address in the roster")
        if self.insecure:
            return grpc.insecure_channel(tls.check_loopback(member.address), OPTIONS)
        return tls.secure_channel(identity, member, OPTIONS)


def nobody(member: Member | None) -> str:
    """Say why there is nobody on a seat; "" where there is somebody."""
    if member is None:
        return "nobody has this seat in the roster"
    return "" if member.valid() else "is revoked in the roster, or its certificates have expired"


def swap_on(channel: Any) -> Any:
    """Return the one method that peers have, on this channel."""
    return channel.stream_stream(METHOD, request_serializer=serialize, response_deserializer=deserialize)


def _clock_offset_s(hello: Hello) -> float | None:
    """Return by how much the other end's clock is ahead of this one's."""
    return hello.clock - time.time() if 0 < hello.clock < 1e11 else None  # a time of these thousand years
