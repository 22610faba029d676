"""Which tests are quick: those that start no process, no browser and no whole run, and are not marked `thorough`."""

import sys
from collections.abc import Collection, Mapping
from functools import cache
from types import ModuleType
from typing import Any

STARTERS = {
    *("elastic", "federation", "multiprocessing", "peertune.engines.distributed", "processes", "slurm", "subprocess"),
}
"""Modules by which tests start processes: whoever has something of theirs is taken to do so."""
TRAINERS = {"peertune.api.stacking", "peertune.engines.simulator"}
"""Modules by which they train whole runs."""
STARTS = {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}

started: list[str] = []
"""What this process has started, but for `uname`, by which Python finds out what processor there is."""


@cache
def watch() -> None:
    """From here on, see what is started: once, though tests that import `conftest` run it a second time."""

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS and "uname" not in str(arguments[:1]):
            started.append(f"{(*arguments, event)[0]}")  # a fork says nothing more

    sys.addaudithook(see)


def is_thorough(names: Mapping[str, Any], fixtures: Collection[str]) -> bool:
    """Whether a test of a module that has these names, and with these fixtures, starts what takes long."""
    homes = {x.__name__ if isinstance(x, ModuleType) else getattr(x, "__module__", None) for x in names.values()}
    return bool(homes & (STARTERS | TRAINERS)) or "browser" in fixtures
