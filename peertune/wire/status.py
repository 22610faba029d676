"""What a peer is and what it knows of the others: one plain dict, which `peer status` shows and metrics count.

    federation, name, client, roster, valid_until   who it is, the roster's serial, when its certificate ends
    doing                                           one of DOING
    round, rounds, step, local_steps                where it is, and of how many
    train, send                                     the kinds that the round trains and sends
    failed_writes                                   of records and checkpoints, since the start
    written_at                                      when all this held
    neighbours                                      for each: client, name, and what `node.Neighbour` says of it

A running peer keeps it in `status.json` in its run directory. Times are seconds since the epoch.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509

from peertune.errors import RunError
from peertune.files import is_locked, write_file

if TYPE_CHECKING:  # PyTorch takes seconds to import, and `peer status` only reads
    from peertune.wire.node import Neighbour
    from peertune.wire.swap import Swapper

log = logging.getLogger(__name__)

DOING = ("starting", "training", "swapping", "waiting", "mixing", "finished", "stopped")
EVERY_S = 1.0
_FILE = "status.json"

ReadStatus = Callable[[], dict[str, Any]]


def peer_status(
    swapper: "Swapper", rounds: int, local_steps: int, neighbours: Sequence[int], failed_writes: int = 0
) -> dict[str, Any]:
    """Return how a peer stands, and each of its `neighbours`, heard or not."""
    from peertune.wire.node import Neighbour

    identity, roster = swapper.membership.current()
    progress = swapper.progress()
    known = dict(swapper.neighbours)
    names = {member.client: member.name for member in roster.members}
    return {
        "federation": roster.federation,
        "name": identity.name,
        "client": identity.client,
        "roster": roster.serial,
        "valid_until": x509.load_pem_x509_certificate(identity.certificate).not_valid_after_utc.timestamp(),
        "doing": progress.doing,
        "round": progress.round,
        "rounds": rounds,
        "step": progress.step,
        "local_steps": local_steps,
        "train": sorted(progress.phase.train) if progress.phase else [],
        "send": sorted(progress.phase.send) if progress.phase else [],
        "failed_writes": failed_writes,
        "written_at": time.time(),
        "neighbours": [
            {"client": client, "name": names.get(client), **asdict(known.get(client, Neighbour()))}
            for client in sorted({*neighbours, *known})
        ],
    }


@contextmanager
def kept(run: Path, current: ReadStatus) -> Iterator[None]:
    """Keep `status.json` in a run directory, written anew each second; at the end it says how the peer ended.

    Raises RunError where it can't be written at first; later that is a warning.
    """
    ended = threading.Event()

    def write(**end: str) -> None:
        write_file(run / _FILE, json.dumps(current() | end).encode() + b"\n", lasting=False)

    def keep() -> None:
        said = ""
        while not ended.wait(EVERY_S):
            try:
                write()
            except RunError as error:
                if said != str(error):
                    log.warning("%s", error)
                said = str(error)

    write()
    thread = threading.Thread(target=keep, name="status", daemon=True)
    thread.start()
    how = "stopped"
    try:
        yield
        how = "finished"
    finally:
        ended.set()
        thread.join()
        try:
            write(doing=how)
        except RunError as error:
            log.warning("%s", error)


def known_before(run: Path) -> dict[int, "Neighbour"]:
    """Return what a run's peer knew of its neighbours when it last ran; nothing where it has not said it."""
    from peertune.wire.node import Neighbour

    try:
        found = json.loads((run / _FILE).read_bytes())["neighbours"]
        return {
            int(one["client"]): Neighbour(
                seen_at=float(one["seen_at"]),
                incarnation=int(one.get("incarnation", 0)),
                nonce=int(one.get("nonce", 0)),
                keys=list(map(str, one.get("keys", ()))),
                done=bool(one.get("done", False)),
            )
            for one in found
            if one["seen_at"] is not None and isfinite(one["seen_at"])
        }
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def read(run: Path) -> dict[str, Any]:
    """Return what a run's peer last said of itself; `running` is whether its process is at work, `age_s` how long ago.

    Raises RunError where it has said nothing.
    """
    file = run / _FILE
    try:
        found = json.loads(file.read_bytes())
        running = found["doing"] not in ("finished", "stopped") and is_locked(run)
        return {**found, "running": running, "age_s": max(0.0, time.time() - found["written_at"])}
    except OSError as error:
        raise RunError(f"{file}: can't be read ({error.strerror}); give the run directory of a peer") from None
    except (ValueError, TypeError, KeyError):
        raise RunError(f"{file}: is damaged; a running peer writes it anew within seconds") from None
