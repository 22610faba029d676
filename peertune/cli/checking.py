"""The commands `peer status` and `peer doctor`: how a peer stands, and what stands in its way."""

import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peertune.cli.common import AsJson, Overrides, Plugins, duration, interruptible, messages, print_json
from peertune.cli.federation import peer_app
from peertune.cli.peering import (
    CAFingerprint,
    Data,
    Folder,
    Insecure,
    Listen,
    RecipeOption,
    RosterFile,
)
from peertune.errors import Exit, RunError

if TYPE_CHECKING:
    from peertune.wire.doctor import Check

SILENT_S = 15.0  # after which a peer that runs should have written again


@peer_app.command()
def status(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN_DIR]", help="The run directory; the newest in runs/ if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a peer is doing, and what it knows of its neighbours.

    Example:

      peertune peer status runs/x
    """
    from peertune.wire.status import read

    folder = run or _newest()
    found = read(folder)
    if as_json:
        print_json({"run": str(folder), **found})
        return
    until = datetime.fromtimestamp(found["valid_until"], UTC)
    print(f"run          {folder}")
    print(f"peer         {found['name']}, client {found['client']} of {found['federation']}, roster {found['roster']}")
    print(f"certificate  until {until:%Y-%m-%d}")
    behind = found["rounds" if found["doing"] == "finished" else "round"]  # in round t there are t behind it
    print(f"rounds       {behind} of {found['rounds']} behind it, {_doing(found)}")
    if failed := found.get("failed_writes"):
        print(f"disk         {failed} writes failed since the start; see that it has room, and can be written")
    print(_table(found["neighbours"]))
    for known in found["neighbours"]:
        if known.get("clones"):
            print(f"{known['name']}: another process spoke with its key, {known['clones']:,} times")
        if known.get("unmixed"):
            print(f"{known['name']}: nothing was mixed of {known['unmixed']:,} messages, too far from what others have")
        if known.get("taken") is not None:
            print(f"{known['name']}: the rule took {known['taken']:.2f} of its weight when it was last heard")


def _newest() -> Path:
    found = sorted(Path("runs").glob("*/status.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise RunError("peer status: no peer has run in runs/ here; give its RUN_DIR")
    return found[-1].parent


def _doing(found: dict[str, Any]) -> str:
    """Say what a peer does, or that it is no more."""
    ago = duration(found["age_s"])
    if found["doing"] in ("finished", "stopped"):
        return f"{found['doing']} {ago} ago"
    if not found["running"]:
        return f"NOT RUNNING: it ended without a word, {ago} ago it was {found['doing']}"
    said = f"{found['doing']}, step {found['step']} of {found['local_steps']}"
    if found["train"]:
        said += f"; trains {', '.join(found['train'])}, sends {', '.join(found['send']) or 'nothing'}"
    return said if found["age_s"] < SILENT_S else f"{said}; SILENT for {ago}: it hangs, or its disk is full"


def _table(neighbours: list[dict[str, Any]]) -> str:
    """Return a row for each neighbour."""
    rows = [("client", "name", "round", "step", "seen", "reached", "up", "down", "sent", "received", "problem")]
    now = time.time()
    for known in neighbours:
        seen = "never" if known["seen_at"] is None else f"{duration(max(0.0, now - known['seen_at']))} ago"
        heard = ("", "") if known["round"] is None else (known["round"], known["step"])
        sizes = [f"{known[key] / 1e6:,.1f} MB" for key in ("bytes_sent", "bytes_received")]
        reached = "yes" if known["reached"] else "no"
        edges = known["up"], known["down"]
        rows.append((known["client"], known["name"] or "", *heard, seen, reached, *edges, *sizes, known["problem"]))
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{value!s:<{width}}" for value, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


@peer_app.command()
def doctor(
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    roster: RosterFile = Path("roster.yaml"),
    data: Data = None,
    folder: Folder = Path("peer"),
    ca_fingerprint: CAFingerprint = None,
    resume: Annotated[Path | None, typer.Option(help="Compare the run in this directory.")] = None,
    listen: Listen = None,
    insecure_loopback: Insecure = False,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Check what a peer needs: who it is, whether neighbours are reached and reach it, whether all run the same.

    Nothing is changed. Exit code 0 where no check failed, else 1.

    Examples:

      peertune peer doctor --roster roster.yaml

      peertune peer doctor --recipe r.yaml --data ./mine --roster roster.yaml
    """
    if recipe is not None and resume is not None:
        raise RunError("peer doctor: give one of --recipe and --resume")
    if recipe is None and resume is None and (overrides or data is not None):
        raise RunError("peer doctor: overrides and --data go with --recipe or --resume")
    with interruptible(), messages():
        from peertune.api.peering import Peer, examined

        peer = Peer(folder, roster, data, ca_fingerprint, listen, insecure_loopback=insecure_loopback)
        checks = examined(recipe, overrides or [], peer, resume)
    failed = sum(check.level == "failed" for check in checks)
    warnings = sum(check.level == "warning" for check in checks)
    if as_json:
        print_json({"failed": failed, "warnings": warnings, "checks": [asdict(check) for check in checks]})
    else:
        width = max(len(_about(check)) for check in checks)
        for check in checks:
            print(f"{check.level:<7}  {_about(check):<{width}}  {check.finding}")
        print(f"{len(checks)} checks: {failed} failed, {warnings} with a warning")
    sys.exit(Exit.FAULT if failed else Exit.DONE)


def _about(check: "Check") -> str:
    return check.what if check.member is None else f"{check.member}: {check.what}"
