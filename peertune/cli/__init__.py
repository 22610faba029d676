"""The command `peertune`. Heavy imports stand inside the commands, so that `--help` answers at once."""

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from peertune import __version__
from peertune.cli import checking, peering  # noqa: F401  # they add their commands to `peer`
from peertune.cli.advising import advise
from peertune.cli.auditing import audit
from peertune.cli.caching import cache
from peertune.cli.common import leads
from peertune.cli.facts import data, env, graph, recipes
from peertune.cli.federation import ca_app, peer_app, roster
from peertune.cli.replaying import replay
from peertune.cli.results import compare, diagnose, export, report
from peertune.cli.running import run
from peertune.cli.scoring import score
from peertune.cli.sweeping import sweep
from peertune.errors import Exit, PeertuneError

app = typer.Typer(
    help="Fine-tune a foundation model across parties that keep their data, with no server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: peertune run digits-demo",
)


def _say_version(asked: bool) -> None:
    if asked:
        print("peertune", __version__)
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    pass


for command in (
    run,
    sweep,
    compare,
    report,
    diagnose,
    score,
    recipes,
    graph,
    data,
    advise,
    audit,
    export,
    replay,
    cache,
    env,
    roster,
):
    app.command()(command)
app.add_typer(ca_app, name="ca")
app.add_typer(peer_app, name="peer")


def main() -> None:
    """Run the command line, alone or as one of several processes."""
    try:
        _main()
    except SystemExit as end:
        if "RANK" not in os.environ:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)  # threads of Gloo may abort one that ends as others do


def _main() -> None:
    """Run the command line; a user's mistake ends in one line and `Exit.INPUT`."""
    if isinstance(sys.stdout, TextIOWrapper):
        # A terminal without a Δ shows a ?, and a line shows in a file or a pipe as soon as it is said.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        app()
    except MemoryError:
        print("peertune: out of memory; lower training.tokens_per_pass or training.clients_per_pass", file=sys.stderr)
        sys.exit(Exit.INPUT)
    except (PeertuneError, OSError) as error:
        if leads():
            print("peertune:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(Exit.INPUT)
