"""The command `peer start`: one party's part of a recipe, over the network."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from peertune.cli.common import AsJson, Overrides, Plugins, importing, interruptible, messages
from peertune.cli.federation import peer_app
from peertune.cli.running import print_summary, train
from peertune.errors import Exit, RunError

Folder = Annotated[Path, typer.Option("--dir", help="The peer's folder, with its key and its certificate.")]
RosterFile = Annotated[
    Path, typer.Option(help="The roster, which a neighbour's newer one replaces, or this peer's own.")
]
RecipeOption = Annotated[str | None, typer.Option(help="A recipe's path, or the name of a shipped one.")]
CAFingerprint = Annotated[
    str | None, typer.Option(help="What the CA's key must have, as it was read out; where not, nothing starts.")
]
Data = Annotated[
    Path | None,
    typer.Option(help="This party's own rows, as the task reads them; where not given, the recipe deals them out."),
]
Listen = Annotated[
    str | None, typer.Option(help="host:port to answer at; where not given, the roster's port on all addresses.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure-loopback", help="No TLS, for trials on one machine; refused on other addresses.")
]


@peer_app.command()
def start(
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    roster: RosterFile = Path("roster.yaml"),
    data: Data = None,
    folder: Folder = Path("peer"),
    ca_fingerprint: CAFingerprint = None,
    out: Annotated[Path | None, typer.Option(help="The run directory.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
    listen: Listen = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Serve Prometheus metrics at this port, on 127.0.0.1 only.")
    ] = None,
    insecure_loopback: Insecure = False,
    keep_messages: Annotated[
        bool, typer.Option("--keep-messages", help="Keep all that is mixed without rounds, for peertune replay --own.")
    ] = False,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Train on this party's own rows, and swap adapters with the neighbours that the recipe's graph gives it.

    The peers need not be started together, and none leads. One that was stopped or cut off goes on with --resume from
    where the others are. SIGTERM and Ctrl-C finish the round and keep it.

    Examples:

      peertune peer start --recipe r.yaml --data ./mine --roster roster.yaml --out runs/x

      peertune peer start --resume runs/x --data ./mine --roster roster.yaml
    """
    if (resume is None) == (out is None):
        raise RunError("peer start: give --out for a new run, or --resume for one that was begun")
    if (recipe is None) == (resume is None):
        raise RunError("peer start: give --recipe with --out; a resumed run has its own recipe")
    with interruptible(), messages():
        with importing():
            from peertune.api.peering import Peer, joined_peers

        peer = Peer(folder, roster, data, ca_fingerprint, listen, metrics_port, insecure_loopback, keep_messages)
        place = out or resume
        assert place is not None
        with joined_peers(recipe, overrides or [], place, peer) as part:
            go_on = f"peertune peer start --resume {place} and the options of before"
            end, whole, done = part.finish(lambda training: train(training, go_on, part.swapper.stop_waiting))
            _tell(place, done, end, part.training.job.rounds, as_json)
            if not whole:
                sys.exit(end)
    if end != Exit.DONE:
        sys.exit(end)


_ENDS = {
    Exit.CUT_SHORT: "cut short: it passed over rounds, since others were further or said so",
    Exit.ALONE: "alone: no edge ever counted; see peertune peer status and peertune peer doctor",
    Exit.REFUSED: "refused by its neighbours; see peertune peer status and peertune peer doctor",
}
"""What is said of a run that ended otherwise than well."""


def _tell(place: Path, done: Sequence[Mapping[str, Any]], end: Exit, rounds: int, as_json: bool) -> None:
    """Print what came of a peer's run, whose records are `done`."""
    made = len(done)
    up = made + sum(record["skipped"] for record in done)
    print_summary(place, as_json, rounds_up=up, exit=end)
    if not as_json:
        print(f"made {made:,} of the {up:,} rounds in which this peer was up; the run has {rounds:,}")
    if end in _ENDS:
        print(f"peertune: {_ENDS[end]}", file=sys.stderr)
