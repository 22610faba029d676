"""Running a recipe from Python, as the command `run` does."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from peertune.api.runs import Run
from peertune.api.training import Each, Source, training, unwatched
from peertune.errors import RunError


def run(
    recipe: Source,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    each: Each = unwatched,
) -> Run:
    """Run a recipe: train all clients, keep checkpoints, write their adapters, as `peertune run` does.

    In the processes that torchrun started each has its share of the clients, and all get the run.

    Args:
        recipe: A shipped one's name, a path, or nested values.
        overrides: Keys to set, such as `graph.activation=0.02`; each value is YAML.
        out: The run directory. Without one the run is in a temporary folder, which goes with the value that is
            returned: `Run.save` keeps it.
        each: Is told the record of each round. Where it returns what counts as true, the run stops after that round.

    Returns:
        The run, read from its directory.

    Raises:
        PeertuneError: For a recipe that can't be run, and a directory that holds something, in one line.
        Stopped: On Ctrl-C, or where `each` asked for it; `resume` goes on with what `out` holds.

    """
    if out is not None:
        return _finished(recipe, overrides, Path(out), each)
    if "RANK" in os.environ:
        raise RunError("run: of several processes each needs the same out; give one")
    held = tempfile.mkdtemp(prefix="peertune-")
    try:
        name = "run" if isinstance(recipe, Mapping) else Path(recipe).stem
        made = _finished(recipe, overrides, Path(held, name), each)
    except BaseException:
        shutil.rmtree(held, ignore_errors=True)
        raise
    weakref.finalize(made, shutil.rmtree, held, ignore_errors=True)
    return made


def resume(folder: str | Path, overrides: Sequence[str] = (), *, each: Each = unwatched) -> Run:
    """Go on with a run that was stopped, to the same bits as if it had not been; or with more rounds.

    Args:
        folder: The run directory.
        overrides: None, or `rounds=N` with more than the run had, or another `evaluate.patience`.
        each: As for `run`.

    Returns:
        The run, read from its directory.

    Raises:
        PeertuneError: Where the folder holds no run, or the overrides make another run of it.
        Stopped: As for `run`.

    """
    return _finished(None, overrides, Path(folder), each)


def _finished(recipe: Source | None, overrides: Sequence[str], folder: Path, each: Each) -> Run:
    with training(recipe, overrides, folder, again=recipe is None) as work:
        work.finish(each)
    return Run.open(work.folder)
