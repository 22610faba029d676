"""The command `replay`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from peertune.cli.common import AsJson, Plugins, importing, messages, print_json, progress
from peertune.errors import Exit


def replay(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The run directories of all peers.")],
    own: Annotated[
        bool, typer.Option("--own", help="One party's run alone, from the messages that it kept (--keep-messages).")
    ] = False,
    within: Annotated[
        float, typer.Option(min=0.0, help="The difference of a value up to which two adapters count as the same.")
    ] = 1e-5,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Make again what peers without rounds did, from their logs, and compare with the adapters that they have.

    Each peer with time.mode=asynchronous notes what it mixed when. The simulator goes through these notes; where a peer
    ends in another adapter than its newest checkpoint's, the exit code is 1. Rounding grows with local steps: about
    1e-5 after 50 in float32.

    Examples:

      peertune replay peer-*/runs/x

      peertune replay --own runs/x
    """
    with messages():
        with importing():
            from peertune.api.replaying import Replay
        replayed = Replay(runs, own=own)
        with progress("trainings", replayed.trainings) as show:
            found = replayed.finish(lambda made: show(made, ""))
    if as_json:
        told = [one._asdict() | {"same": one.apart <= within} for one in found]
        print_json({"within": within, "peers": told})
    else:
        for one in found:
            verdict = "the same" if one.apart <= within else "ANOTHER ADAPTER"
            started = f"started {one.starts:,} times" if one.starts > 1 else "started once"
            print(f"{one.name}  {verdict}, apart by {one.apart:.1e} at most; {one.rounds:,} rounds, {started}")
    if any(one.apart > within for one in found):
        sys.exit(Exit.FAULT)
