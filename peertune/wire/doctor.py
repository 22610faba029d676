"""What stands in a peer's way: checks before a run, or when neighbours stay away, each with what would be right.

Nothing is changed here or at the neighbours. Where no `peer start` answers at this peer's port, doctor does so for the
while, and only to those who try whether they get through.
"""

import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

from cryptography import x509

from peertune.errors import PeertuneError
from peertune.identity.certificates import federation_of, fingerprint_of
from peertune.identity.entries import Member
from peertune.identity.keys import load_ca, load_keys
from peertune.identity.membership import Membership
from peertune.identity.roster import Roster
from peertune.memory import told_bytes
from peertune.wire import tls
from peertune.wire.node import UNTRIED, Probe
from peertune.wire.swap import Swapper

RENEW_DAYS = 14
CLOCK_S = 300.0
CHECKPOINTS = 20  # for which there should be room
GIB = 2**30
WAIT_S = 8.0  # for a neighbour's answer, its own call back included


@dataclass(frozen=True)
class Check:
    """What was looked at, and what was found."""

    what: str
    level: Literal["ok", "warning", "failed"]
    finding: str  # where it isn't ok, with what would be right
    member: str | None = None  # whom it is about, where that is another


def check_identity(folder: Path, roster: Path, ca: str | None = None) -> tuple[list[Check], Membership | None]:
    """Check who this peer is: keys, certificate, roster; return with it who is who, where that can be told."""
    found = [_tried("key", lambda: _keys(folder)), _tried("certificate", lambda: _issued(folder))]
    try:
        membership = Membership(folder, roster, ca, looks=True)
    except PeertuneError as error:
        return [*found, Check("roster", "failed", str(error))], None
    identity, known = membership.current()
    kind = "roster" if known.own is None else "its own roster"
    listed = f"{identity.name} is client {identity.client} of {known.federation}, {kind} {known.serial}"
    return [*found, Check("roster", "ok", listed), _expiry(identity.certificate)], membership


def _tried(what: str, look: Callable[[], str]) -> Check:
    try:
        return Check(what, "ok", look())
    except PeertuneError as error:
        return Check(what, "failed", str(error))


def _keys(folder: Path) -> str:
    return f"{', '.join(map(str, load_keys(folder)))}: only its owner can read it"


def _issued(folder: Path) -> str:
    ca = load_ca(folder)
    printed = fingerprint_of(ca)
    return f"issued by the CA of {federation_of(ca)} with the fingerprint {printed}; is it the one that was read out?"


def _expiry(certificate: bytes) -> Check:
    until = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    days = (until - datetime.now(UTC)).days
    if days >= RENEW_DAYS:
        return Check("expiry", "ok", f"the certificate is valid until {until:%Y-%m-%d}")
    left = f"the certificate ends on {until:%Y-%m-%d}, in {days} day{'s' * (days != 1)}"
    return Check("expiry", "warning", f"{left}; renew it with peertune peer request")


# ---- this machine


def check_memory() -> list[Check]:
    """Check that there is memory to start with; on Linux only."""
    free = told_bytes("/proc/meminfo", "MemAvailable")
    if free is None:
        return []
    said = f"{free / GIB:.1f} GiB of memory are free"
    return [Check("memory", "warning", f"{said}; have 1 GiB or more") if free < GIB else Check("memory", "ok", said)]


def check_disk(folder: Path, checkpoint_bytes: int = 0) -> Check:
    """Check that the disk of a folder has room for checkpoints of this size, and for 1 GiB."""
    free, need = shutil.disk_usage(folder).free, max(GIB, CHECKPOINTS * checkpoint_bytes)
    said = f"{free / GIB:.1f} GiB are free"
    if free < need:
        return Check("disk", "warning", f"{said}; have {need / GIB:.1f} GiB, for {CHECKPOINTS} checkpoints and records")
    return Check("disk", "ok", said)


# ---- the network


def check_network(
    membership: Membership, agreed: Mapping[str, str], listen: str | None, *, insecure: bool = False
) -> list[Check]:
    """Check how this peer and each other member get through to each other, and whether they run the same.

    `agreed` is what must be the same at all, {} where no run is asked about; `listen` is where this peer answers.
    """
    identity, roster = membership.current()
    others = [m for m in roster.members if m.client != identity.client and m.certificates]
    swapper = Swapper(membership, agreed, patience_s=WAIT_S, insecure=insecure)
    try:
        port = [] if listen is None else [_listening(swapper, listen)]
        with ThreadPoolExecutor(16, thread_name_prefix="doctor") as pool:
            visits = list(pool.map(lambda member: _visit(swapper, member, identity.address is not None), others))
    finally:
        swapper.stop()
    found = [check for checks, _ in visits for check in checks]
    met = [(member, probe) for member, (_, probe) in zip(others, visits, strict=True) if probe is not None]
    for member, probe in met:
        found += _compared(member, probe, roster, bool(agreed))
    return [*port, *found, *_inwards(identity.address, met)]


def _listening(swapper: Swapper, listen: str) -> Check:
    try:
        swapper.start(listen)
        return Check("port", "ok", f"{listen} is free; doctor answers there meanwhile")
    except PeertuneError as error:
        host, _, number = listen.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(number)), timeout=1).close()
        except OSError:
            return Check("port", "failed", str(error))
        return Check("port", "ok", f"{listen} is in use: by this peer's own peer start, if that runs")


def _visit(swapper: Swapper, member: Member, call_back: bool) -> tuple[list[Check], Probe | None]:
    """Try to get through to a member; return what was found, and what it says where it answers."""
    about = partial(Check, member=member.name)
    if member.address is None:
        return [about("outwards", "ok", "has no address: it is the one that calls")], None
    host, _, port = member.address.rpartition(":")
    try:
        places = sorted(map(str, tls.places(member.address)))
    except OSError as error:
        mend = f"mend this machine's DNS, or have {member.name} correct it"
        return [about("name", "failed", f"{host}: can't be resolved ({error.strerror}); {mend}")], None
    checks = [] if [host.strip("[]")] == places else [about("name", "ok", f"{host} is {', '.join(places)}")]
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        probe = swapper.probe(member.client, WAIT_S, call_back=call_back)
    except ConnectionRefusedError:
        gone = f"nobody answers at {member.address}; ask again when {member.name} runs peer start or peer doctor"
        return [*checks, about("outwards", "warning", gone)], None
    except OSError as error:
        shut = f"{member.address}: no way through ({error.strerror or error}); open TCP port {port} outwards here, "
        return [*checks, about("outwards", "failed", f"{shut}inwards at {member.name}")], None
    except PeertuneError as error:
        mend = "see that both have the newest roster, and that neither is revoked"
        other = f"{member.address}: answers, but not to this peer ({error}); {mend}"
        return [*checks, about("outwards", "failed", other)], None
    return [*checks, about("outwards", "ok", f"answers at {member.address}")], probe


def _compared(member: Member, probe: Probe, roster: Roster, have_run: bool) -> Iterator[Check]:
    """Say how a member's clock, roster and run differ from those here."""
    about, offset = partial(Check, member=member.name), probe.clock_offset_s
    if offset is not None and abs(offset) > CLOCK_S:
        side = "ahead of" if offset > 0 else "behind"
        finding = f"its clock is {abs(offset) / 60:.0f} minutes {side} this one; set the one that is wrong"
        yield about("clock", "warning", finding)
    elif offset is not None:
        yield about("clock", "ok", f"within {abs(offset) + 1:.0f} s of this one")
    passed_on = roster.own is None and not probe.own_roster
    has = f"has roster {probe.roster_serial}, here is {roster.serial}"
    if probe.roster_serial > roster.serial:
        mend = "get that one, or start: peers pass it on" if passed_on else "ask the CA for the newest"
        yield about("roster", "warning", f"{has}; {mend}")
    elif probe.roster_serial < roster.serial and passed_on:
        yield about("roster", "ok", f"{has}; it takes up that in the next swap")
    elif probe.roster_serial < roster.serial:
        yield about("roster", "warning", f"{has}; have the CA hand it its newest")
    if probe.differs:
        what = "; ".join(f"{name}: {here} here, {there} there" for name, here, there in probe.differs)
        yield about("run", "failed", f"differs in {what}; give all peers one recipe and one base")
    elif not probe.takes_part:
        yield about("run", "ok", "takes no part in a run now")
    elif not have_run:
        yield about("run", "ok", "takes part in a run; give --recipe or --resume to compare")
    else:
        yield about("run", "ok", "nothing that must be the same differs")


def _inwards(address: str | None, met: list[tuple[Member, Probe]]) -> Iterator[Check]:
    """Say who gets through to this peer."""
    if address is None:
        yield Check("inwards", "ok", "this peer has no address: it is the one that calls")
        return
    asked = [(member, probe.back) for member, probe in met if probe.back is not None]
    if not asked:
        yield Check("inwards", "warning", f"nobody answers who could call {address}; ask again when a neighbour runs")
    port = address.rpartition(":")[2]
    tried = [back for _, back in asked if back not in UNTRIED.values()]
    none = bool(tried) and all(tried)
    for member, back in asked:
        if back in UNTRIED.values():
            yield Check("inwards", "warning", f"did not call {address}: it {back}", member.name)
        elif back:
            mend = f"open TCP port {port} inwards, or correct the address with peertune peer request"
            finding = f"can't call {address} ({back}); {mend}"
            yield Check("inwards", "failed" if none else "warning", finding, member.name)
        else:
            yield Check("inwards", "ok", f"gets through to {address}", member.name)
