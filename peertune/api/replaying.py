"""What peers that waited for nobody did, made again from their logs: do they end in the adapters that they have?"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from peertune.assembly.build import build
from peertune.engines.replay import replay
from peertune.errors import RunError
from peertune.recipe import Recipe, load_recipe
from peertune.runs import checkpoints, directory, mixlog
from peertune.types import State


class Replayed(NamedTuple):
    """What became of one peer's run."""

    run: str
    client: int
    name: str
    rounds: int  # behind its newest checkpoint
    starts: int  # times that it was started
    apart: float  # the largest difference between a value of its adapter and of the replay's


class Replay:
    """What peers did, ready to be made again."""

    def __init__(self, runs: Sequence[str | Path], *, own: bool = False) -> None:
        """Read the logs and the newest checkpoints, and make what the recipe says.

        Args:
            runs: Directories of peers' runs of one recipe with `time.mode=asynchronous`. All whose messages one of
                them mixed must be among them, unless it is its `own` run alone.
            own: One party's run, from the messages that it kept (`peer start --keep-messages`).

        Raises:
            RunError: a directory is none of such a run, two are of one client or of different recipes, or one has rows
                of its own.

        """
        if own and len(runs) != 1:
            raise RunError("replay: --own is for one party's run; give its directory alone")
        folders = {_client(Path(run)): Path(run) for run in runs}
        if len(folders) < len(runs):
            raise RunError("replay: two of these are runs of one client; give each client's once")
        self._folders = dict(sorted(folders.items()))
        clients, places = list(self._folders), list(self._folders.values())
        recipe = _recipe(places, own=own)
        if clients[-1] >= recipe.clients:
            raise RunError(f"{places[-1]}: is of client {clients[-1]}, and its recipe has {recipe.clients}; restore it")
        self._logs = {client: mixlog.read(run) for client, run in self._folders.items()}
        self._job = build(recipe, clients, own_data=own and directory.has_own_rows(places[0])).job
        self._outside = partial(mixlog.kept, places[0]) if own else None
        self._held = {
            client: _checkpoint(run, self._job.state.take(slice(row, row + 1)), client)
            for row, (client, run) in enumerate(self._folders.items())
        }

    @property
    def trainings(self) -> int:
        """How many there are to make, but for those that were cut off and whose messages others mixed."""
        return sum(len(start.lines) for log in self._logs.values() for start in log)

    def finish(self, each: Callable[[int], object] = lambda made: None) -> list[Replayed]:
        """Make all trainings again, of which `each` is told how many are made, and return what became of each peer.

        Raises RunError where the logs contradict each other.
        """
        asked = {client: state.round for client, state in self._held.items()}
        states: Mapping[int, State] = {}
        for made, found in replay(self._job, self._logs, asked, self._outside):
            each(made)
            states = found
        return [
            Replayed(
                str(run),
                client,
                str((directory.peer(run) or {})["name"]),
                self._held[client].round,
                len(self._logs[client]),
                _apart(states[client], self._held[client]),
            )
            for client, run in self._folders.items()
        ]


def _client(run: Path) -> int:
    directory.resolved(run)
    who = directory.peer(run)
    if who is None:
        raise RunError(f"{run}: is a simulation, which peertune run makes again; give the runs of peers")
    return int(who["client"])


def _recipe(runs: Sequence[Path], *, own: bool) -> Recipe:
    """Return the recipe that all of these are runs of. Raises RunError where they differ."""
    recipes = [load_recipe(directory.resolved(run)) for run in runs]
    first = _settings(recipes[0])
    for run, recipe in zip(runs, recipes, strict=True):
        if recipe.time.mode != "asynchronous":
            raise RunError(f"{run}: its peers went by rounds; what is replayed is time.mode=asynchronous")
        if not own and directory.has_own_rows(run):
            raise RunError(
                f"{run}: has rows of its own (--data), which nobody else has; where it was started with "
                "--keep-messages, its party can replay it alone, with --own"
            )
        if differ := [key for key, value in _settings(recipe).items() if value != first[key]]:
            raise RunError(f"{run}: differs from {runs[0]} in {', '.join(differ)}; give runs of one recipe")
    (recipe, *_) = recipes
    checkpoint, time = recipe.checkpoint.model_copy(update={"steps": None}), recipe.time  # simulations have no steps
    if len(runs) == recipe.clients and time.step_s is None:  # which simulations need, and nothing goes by here
        time = time.model_copy(update={"step_s": 1.0})
    return recipe.model_copy(update={"checkpoint": checkpoint, "time": time})


def _settings(recipe: Recipe) -> dict[str, object]:
    left_out = {"network", "checkpoint", "evaluate", "device", "report_to"}
    return recipe.model_dump(mode="json", exclude=left_out)


def _checkpoint(run: Path, like: State, client: int) -> State:
    found = checkpoints.load(run, like, [client])
    if found is None:
        raise RunError(f"{run}: has no checkpoint yet; wait until one is kept")
    return found


def _apart(one: State, other: State) -> float:
    """Return the largest difference of two clients' adapters."""
    there = other.to(next(iter(one.adapters.values())).device).adapters
    return max(float((x - there[name]).abs().max()) for name, x in one.adapters.items())
