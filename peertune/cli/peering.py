"""The command `peer start`: one party's part of a recipe, over the network."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peertune.cli.common import AsJson, Overrides, Plugins, importing, interruptible, messages
from peertune.cli.federation import need_seats, peer_app
from peertune.cli.running import print_summary, train
from peertune.errors import Exit, RecipeError, RunError

if TYPE_CHECKING:
    from peertune.assembly.build import Built
    from peertune.identity.membership import Membership
    from peertune.recipe import Recipe
    from peertune.rounds.round import Job
    from peertune.runs.keeping import Keeper
    from peertune.types import State
    from peertune.wire.swap import Swapper

log = logging.getLogger(__name__)

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
    with interruptible(), messages(), ExitStack() as held:
        with importing():
            from peertune.api.training import keeper_of
            from peertune.assembly.build import agreed
            from peertune.engines.peer import neighbours
            from peertune.files import locked
            from peertune.identity.certificates import fingerprint_of
            from peertune.identity.incarnation import next_incarnation
            from peertune.identity.membership import Membership
            from peertune.runs import directory
            from peertune.wire.limits import raise_open_files
            from peertune.wire.status import known_before
            from peertune.wire.swap import Swapper

        raise_open_files()
        membership = Membership(folder, roster, ca_fingerprint)
        held.enter_context(locked(folder, "peer"))
        identity, members = membership.current()
        name, client = identity.name, identity.client
        log.info("%s is client %d of %s, roster %d", name, client, members.federation, members.serial)
        log.info("the CA's fingerprint is %s", fingerprint_of(members.ca))
        place = out or resume
        assert place is not None
        if out is not None:
            directory.check_free(out)
        source = directory.resolved(place) if recipe is None else recipe
        run = build_own(source, overrides or [], data, membership)
        who = {"client": client, "name": name, "federation": members.federation}
        _begin_or_resume(run, place, recipe, overrides or [], who)
        with directory.locked(place):
            job, near = run.job, neighbours(run.job)
            swapper = Swapper(
                membership,
                agreed(run),
                patience_s=run.resolved.network.patience_s,
                faults=job.faults,
                insecure=insecure_loopback,
                seats=job.graph.clients if members.own is None else len(near),
                known=known_before(place),
                incarnation=next_incarnation(folder),
            )
            keeps = keeper_of(run, place)
            with _shown(run, place, swapper, keeps, metrics_port):
                if (address := where_to_listen(identity.address, listen, insecure_loopback)) is not None:
                    swapper.start(address)
                done, end, whole = _take_part(run, place, swapper, keeps)
                _tell(place, done, end, job.rounds, as_json)
                if not whole:
                    sys.exit(end)
    if end != Exit.DONE:
        sys.exit(end)


def _begin_or_resume(
    run: "Built", place: Path, recipe: str | None, overrides: list[str], who: Mapping[str, object]
) -> None:
    """Make the run directory of a recipe; without one, see that the directory's run is this peer's own."""
    from peertune.api.training import begin, check_same
    from peertune.runs import directory

    if recipe is not None:
        begin(run, place, "peer start --recipe", recipe, overrides, peer=who)
        return
    check_same(run.resolved, place)
    if (was := directory.peer(place)) != who:
        raise RunError(f"{place}: is a run of {was or 'a simulation'}, not of {who}; give this peer's own")


@contextmanager
def _shown(run: "Built", place: Path, swapper: "Swapper", keeps: "Keeper", metrics_port: int | None) -> Iterator[None]:
    """Show how this peer stands: in its run directory and, where a port is given, to Prometheus."""
    from peertune.engines.peer import neighbours
    from peertune.wire.prometheus import served
    from peertune.wire.status import kept, peer_status

    job, near = run.job, neighbours(run.job)

    def current() -> dict[str, Any]:
        return peer_status(swapper, job.rounds, job.local_steps, near, keeps.failed)

    with kept(place, current), nullcontext() if metrics_port is None else served(metrics_port, current):
        yield


def _take_part(
    run: "Built", place: Path, swapper: "Swapper", keeps: "Keeper"
) -> tuple[Sequence[Mapping[str, Any]], Exit, bool]:
    """Make this peer's rounds; return the records of all, how the run ended, and whether it is whole."""
    from peertune.api.training import Training
    from peertune.engines.peer import ended, neighbours, run_peer
    from peertune.runs import records

    job, network = run.job, run.resolved.network
    kept_rounds = partial(records.read, place)
    engine = partial(
        run_peer,
        swapper=swapper,
        when_alone=network.when_alone,
        when_refused=network.when_refused,
        records=kept_rounds,
        recall=partial(recalled, job, place),
    )
    go_on = f"peertune peer start --resume {place} and the options of before"
    try:
        whole = train(Training(run, place, engine, keeps), go_on, swapper.stop_waiting).round == job.rounds
        done = kept_rounds()
        return done, ended(done, whole=whole, refusals=lambda: swapper.refusals(neighbours(job))), whole
    except BaseException:
        swapper.stop_waiting()
        raise
    finally:
        try:
            swapper.stop()
        except KeyboardInterrupt:  # the run is whole: only others may still wait for a verdict
            swapper.stop_waiting()
            swapper.stop()


_ENDS = {
    Exit.CUT_SHORT: "cut short: it passed over rounds, since others were further or said so",
    Exit.ALONE: "alone: no edge ever counted; see peertune peer status and peertune peer doctor",
    Exit.REFUSED: "refused by its neighbours; see peertune peer status and peertune peer doctor",
}
"""What is said of a run that ended otherwise than well."""


def _tell(place: Path, records: "Sequence[Mapping[str, Any]]", end: Exit, rounds: int, as_json: bool) -> None:
    """Print what came of a peer's run."""
    made = len(records)
    up = made + sum(record["skipped"] for record in records)
    print_summary(place, as_json, rounds_up=up, exit=end)
    if not as_json:
        print(f"made {made:,} of the {up:,} rounds in which this peer was up; the run has {rounds:,}")
    if end in _ENDS:
        print(f"peertune: {_ENDS[end]}", file=sys.stderr)


def recalled(job: "Job", folder: Path, before: int) -> "State | None":
    """Return the newest state that is kept with fewer rounds behind it; the start is kept for ever."""
    from peertune.runs import checkpoints

    kept = checkpoints.load(folder, job.state, job.clients, before=before)
    if kept is not None:
        return kept.to(job.device)
    return job.state if before > 0 else None


def build_own(recipe: str | Path, overrides: list[str], data: Path | None, membership: "Membership") -> "Built":
    """Make this party's part of a recipe. Raises PeertuneError where it can't be run."""
    from peertune.assembly.build import build
    from peertune.assembly.registry import graph_settings
    from peertune.recipe import load_recipe

    identity, roster = membership.current()
    loaded = load_recipe(recipe, overrides)
    if roster.own is not None:
        _check_graph(roster.own.recipe, graph_settings(loaded))
    need_seats(loaded.clients, roster.members)
    if data is not None:
        loaded = _with_data(loaded, data)
    known = None if roster.own is None else roster.own.known
    return build(loaded, [identity.client], own_data=data is not None, known=known)


def _check_graph(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise RecipeError where the roster is for another graph than the recipe's, and say in what."""
    from peertune.assembly.registry import choice_defaults

    defaults = choice_defaults("graph", here["name"]) if here["name"] == there.get("name") else {}
    there, here = (defaults | dict(said) for said in (there, here))
    differ = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    if differ:
        asked, issued = (", ".join(f"{key} {said[key]}" for key in differ if key in said) for said in (here, there))
        raise RecipeError(
            f"graph: the roster is for {issued or 'fewer settings'}, the recipe says {asked or 'less'}; "
            "use the recipe that it was issued for, or ask the CA for another roster"
        )


def _with_data(recipe: "Recipe", data: Path) -> "Recipe":
    """Return the recipe with this party's rows in the place of the task's."""
    from peertune.assembly.registry import takes
    from peertune.data.tasks import hub_settings

    if not takes("task", recipe.task.name, "path"):
        raise RecipeError(f"--data: the task {recipe.task.name} takes no path, so it reads no files; leave --data out")
    own = dict.fromkeys(recipe.task.settings.keys() & hub_settings(recipe.task.name)) | {"path": str(data)}
    return recipe.model_copy(update={"task": recipe.task.model_copy(update=own)})


def where_to_listen(address: str | None, listen: str | None, insecure: bool) -> str | None:
    """Return where to answer those who call this address: on all of this machine's, or loopback; None: nowhere."""
    from peertune.identity.certificates import check_address

    if listen is not None:
        return check_address(listen)
    if address is None:
        return None
    return address if insecure else f"[::]:{address.rpartition(':')[2]}"
