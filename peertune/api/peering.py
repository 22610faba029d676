"""One party's part of a run among peers, over the network."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peertune.api.runs import Run
from peertune.api.training import Each, Engine, Training, begin, check_same, keeper_of, unwatched
from peertune.assembly.build import Built, agreed, build
from peertune.assembly.registry import choice_defaults, graph_settings, hostile, takes
from peertune.data.tasks import hub_settings
from peertune.engines.company import neighbours
from peertune.engines.peer import ended, run_peer
from peertune.engines.pushing import run_pushing_peer
from peertune.errors import Exit, PeertuneError, RecipeError, RunError
from peertune.files import locked
from peertune.identity.certificates import check_address, fingerprint_of
from peertune.identity.entries import need_seats
from peertune.identity.incarnation import next_incarnation
from peertune.identity.membership import Membership
from peertune.identity.secret import FILE, read_secret
from peertune.memory import keep_free
from peertune.privacy.draws import SECRET_BYTES
from peertune.recipe import Recipe, load_recipe
from peertune.rounds.job import Job
from peertune.runs import checkpoints, directory, records
from peertune.runs.budget import Ledger
from peertune.runs.keeping import Keeper
from peertune.runs.mixlog import MixLog
from peertune.types import State
from peertune.wire.doctor import Check, check_disk, check_identity, check_memory, check_network
from peertune.wire.limits import raise_open_files
from peertune.wire.prometheus import served
from peertune.wire.status import kept, known_before, peer_status
from peertune.wire.swap import Swapper

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peer:
    """Who takes part, with which rows, and where it is reached; options of `peer start` under their names there."""

    folder: Path = Path("peer")  # with its key and its certificate
    roster: Path = Path("roster.yaml")  # which a neighbour's newer one replaces, or this peer's own
    data: Path | None = None  # its own rows, as the task reads them; None: the recipe deals them out
    ca_fingerprint: str | None = None  # what the CA's key must have
    listen: str | None = None  # host:port to answer at; None: the roster's port on all addresses
    metrics_port: int | None = None  # of Prometheus metrics, on 127.0.0.1
    insecure_loopback: bool = False  # no TLS, on one machine
    keep_messages: bool = False  # all that is mixed, of a peer that waits for nobody


@dataclass(frozen=True)
class Part:
    """A peer's part of a run, from its newest checkpoint on."""

    training: Training
    swapper: Swapper

    def finish(self, train: Callable[[Training], State]) -> tuple[Exit, bool, list[dict[str, Any]]]:
        """Train, and let neighbours have what they wait for.

        Return how it ended, whether the run is whole, and its records.
        """
        job = self.training.job
        with _stopped(self.swapper):
            whole = train(self.training).round == job.rounds
            done = records.read(self.training.folder)
            return ended(done, whole=whole, refusals=lambda: self.swapper.refusals(neighbours(job))), whole, done


def take_part(
    recipe: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    out: str | Path,
    peer: Peer = Peer(),  # a value
    each: Each = unwatched,
) -> tuple[Run, Exit]:
    """Train on this party's own rows, and swap adapters with the neighbours, as `peertune peer start` does.

    Args:
        recipe: A shipped one's name, or a path. None goes on with the run in `out`.
        overrides: Keys to set, such as `rounds=20`; each value is YAML.
        out: The run directory.
        peer: Who takes part, and with what.
        each: Is told the record of each round. Where it returns what counts as true, the peer stops after that round.

    Returns:
        The run, and how it ended: `Exit.DONE`, or one of `CUT_SHORT`, `ALONE` and `REFUSED`.

    Raises:
        PeertuneError: For a peer that is nobody's, a recipe that can't be run, a directory that is another run's, and
            where neighbours refuse this peer before its last round.
        Stopped: On Ctrl-C, or where `each` asked for it; with None for a recipe the peer goes on.

    """
    with joined_peers(recipe, overrides, Path(out), peer) as part:
        end, whole, _ = part.finish(lambda training: training.finish(each))
        if not whole:
            raise RunError(f"{out}: its neighbours refuse this peer; see what they say with peer doctor")
    return Run.open(out), end


@contextmanager
def joined_peers(recipe: str | Path | None, overrides: Sequence[str], place: Path, peer: Peer) -> Iterator[Part]:
    """Make a peer's part of a run and its directory, or of None what the directory holds, and answer its neighbours."""
    raise_open_files()
    keep_free()
    membership = Membership(peer.folder, peer.roster, peer.ca_fingerprint)
    with ExitStack() as held:
        held.enter_context(locked(peer.folder, "peer"))
        identity, members = membership.current()
        name, client = identity.name, identity.client
        log.info("%s is client %d of %s, roster %d", name, client, members.federation, members.serial)
        log.info("the CA's fingerprint is %s", fingerprint_of(members.ca))
        if recipe is not None:
            directory.check_free(place)
        source = directory.resolved(place) if recipe is None else recipe
        secret = partial(read_secret, peer.folder / FILE)
        built = build_own(source, overrides, peer.data, membership, secret)
        if client in hostile(built.resolved):
            log.warning("attacks: the recipe makes %s, client %d, hostile to the others; it is for tests", name, client)
        if built.job.pushing is not None and identity.address is None:
            raise RecipeError(
                f"time.mode: without rounds others push to {name}, which has no address in the roster; have the CA "
                "approve a request with --address, or go by rounds, in which it only dials out"
            )
        if peer.keep_messages and built.job.pushing is None:
            raise RecipeError(
                "--keep-messages: is for time.mode=asynchronous, whose runs can be replayed; leave it out"
            )
        who = {"client": client, "name": name, "federation": members.federation}
        _begin_or_resume(built, place, recipe, overrides, who, own_rows=peer.data is not None)
        held.enter_context(directory.locked(place))
        job, near = built.job, neighbours(built.job)
        swapper = Swapper(
            membership,
            agreed(built),
            patience_s=built.resolved.network.patience_s,
            faults=job.faults,
            insecure=peer.insecure_loopback,
            seats=job.graph.clients if members.own is None else len(near),
            known=known_before(place),
            incarnation=next_incarnation(peer.folder),
        )
        keeper = keeper_of(built, place)
        held.enter_context(_shown(built, place, swapper, keeper, peer.metrics_port))
        if (address := where_to_listen(identity.address, peer.listen, peer.insecure_loopback)) is not None:
            swapper.start(address)
        yield Part(Training(built, place, _engine(built, place, swapper, peer.keep_messages), keeper), swapper)


def examined(
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    peer: Peer = Peer(),  # a value
    run: Path | None = None,
) -> list[Check]:
    """Check what a peer needs, as `peertune peer doctor` does: nothing is changed.

    Args:
        recipe: What it is to run, a shipped one's name, or a path; None: the run's, or nothing is compared.
        overrides: Keys to set.
        peer: Who is to take part, and with what.
        run: The directory of a run that is to go on.

    Returns:
        What was found, each with its `level`: ok, warning or failed.

    """
    source = recipe if run is None else directory.resolved(run)
    checks, membership = check_identity(peer.folder, peer.roster, peer.ca_fingerprint)
    checks += check_memory()
    same: dict[str, str] = {}
    checkpoint_bytes = 0
    if membership is None:
        checks.append(Check("network", "warning", "not looked at: say who this peer is first"))
    elif source is not None:
        built, same, checkpoint_bytes = _tried(source, overrides, peer.data, membership)
        checks.append(built)
    checks.append(check_disk(run or Path(), checkpoint_bytes))
    if membership is not None:
        address = where_to_listen(membership.current()[0].address, peer.listen, peer.insecure_loopback)
        checks += check_network(membership, same, address, insecure=peer.insecure_loopback)
    return checks


def _begin_or_resume(
    built: Built,
    place: Path,
    recipe: str | Path | None,
    overrides: Sequence[str],
    who: Mapping[str, object],
    *,
    own_rows: bool,
) -> None:
    """Make the run directory of a recipe; without one, see that the directory's run is this peer's own."""
    if recipe is not None:
        begin(built, place, "peer start --recipe", recipe, overrides, peer=who, own_rows=own_rows)
        return
    check_same(built, place)
    if (was := directory.peer(place)) != who:
        raise RunError(f"{place}: is a run of {was or 'a simulation'}, not of {who}; give this peer's own")


@contextmanager
def _shown(built: Built, place: Path, swapper: Swapper, keeper: Keeper, metrics_port: int | None) -> Iterator[None]:
    """Show how this peer stands: in its run directory and, where a port is given, to Prometheus."""
    job, near = built.job, neighbours(built.job)

    def current() -> dict[str, Any]:
        return peer_status(swapper, job.rounds, job.local_steps, near, keeper.failed)

    with kept(place, current), nullcontext() if metrics_port is None else served(metrics_port, current):
        yield


def _engine(built: Built, place: Path, swapper: Swapper, keep_messages: bool) -> Engine:
    network = built.resolved.network
    if built.job.pushing is not None:
        return partial(
            run_pushing_peer,
            swapper=swapper,
            kept=MixLog(place, keeps_messages=keep_messages),
            when_alone=network.when_alone,
            when_refused=network.when_refused,
        )
    return partial(
        run_peer,
        swapper=swapper,
        when_alone=network.when_alone,
        when_refused=network.when_refused,
        records=partial(records.read, place),
        recall=partial(recalled, built.job, place),
        ledger=None if built.job.private is None else Ledger(place),
    )


@contextmanager
def _stopped(swapper: Swapper) -> Iterator[None]:
    """Let neighbours have what they wait for at the end, and don't wait for them where it is no good end."""
    try:
        yield
    except BaseException:
        swapper.stop_waiting()
        raise
    finally:
        try:
            swapper.stop()
        except KeyboardInterrupt:  # the run is whole: only others may still wait for a verdict
            swapper.stop_waiting()
            swapper.stop()


def recalled(job: Job, folder: Path, before: int) -> State | None:
    """Return the newest state that is kept with fewer rounds behind it; the start is kept for ever."""
    kept = checkpoints.load(folder, job.state, job.clients, before=before)
    if kept is not None:
        return kept.to(job.device)
    return job.state if before > 0 else None


def build_own(
    recipe: str | Path,
    overrides: Sequence[str],
    data: Path | None,
    membership: Membership,
    secret: Callable[[], bytes] = lambda: bytes(SECRET_BYTES),
) -> Built:
    """Make this party's part of a recipe, which is not to train without its `secret`.

    Raises PeertuneError where it can't be run.
    """
    identity, roster = membership.current()
    loaded = load_recipe(recipe, overrides)
    if roster.own is not None:
        _check_graph(roster.own.recipe, graph_settings(loaded))
    need_seats(loaded.clients, roster.members)
    if data is not None:
        loaded = _with_data(loaded, data)
    known = None if roster.own is None else roster.own.known
    return build(loaded, [identity.client], own_data=data is not None, known=known, secret=secret)


def _check_graph(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise RecipeError where the roster is for another graph than the recipe's, and say in what."""
    defaults = choice_defaults("graph", here["name"]) if here["name"] == there.get("name") else {}
    there, here = (defaults | dict(said) for said in (there, here))
    differ = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    if differ:
        asked, issued = (", ".join(f"{key} {said[key]}" for key in differ if key in said) for said in (here, there))
        raise RecipeError(
            f"graph: the roster is for {issued or 'fewer settings'}, the recipe says {asked or 'less'}; "
            "use the recipe that it was issued for, or ask the CA for another roster"
        )


def _with_data(recipe: Recipe, data: Path) -> Recipe:
    """Return the recipe with this party's rows in the place of the task's."""
    if not takes("task", recipe.task.name, "path"):
        raise RecipeError(f"--data: the task {recipe.task.name} takes no path, so it reads no files; leave --data out")
    own = dict.fromkeys(recipe.task.settings.keys() & hub_settings(recipe.task.name)) | {"path": str(data)}
    return recipe.model_copy(update={"task": recipe.task.model_copy(update=own)})


def where_to_listen(address: str | None, listen: str | None, insecure: bool) -> str | None:
    """Return where to answer those who call this address: on all of this machine's, or loopback; None: nowhere."""
    if listen is not None:
        return check_address(listen)
    if address is None:
        return None
    return address if insecure else f"[::]:{address.rpartition(':')[2]}"


def _tried(
    source: str | Path, overrides: Sequence[str], data: Path | None, membership: Membership
) -> tuple[Check, dict[str, str], int]:
    """Make what the recipe says, as `peer start` does: how that went, what must be the same, a checkpoint's bytes."""
    try:
        run = build_own(source, overrides, data, membership)
    except PeertuneError as error:
        return Check("recipe", "failed", str(error)), {}, 0
    state = run.job.state
    size = sum(x.nbytes for part in (state.adapters, state.moments, state.memory) for x in part.values())
    return Check("recipe", "ok", f"{source}: loads, with {sum(run.held[0]):,} rows of this peer's"), agreed(run), size
