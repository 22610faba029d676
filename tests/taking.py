"""What a process takes, and what is planned for it: for processes that begin alike, forked from one that is warm."""

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest


def planned(file: Path, recipes: Sequence[Path]) -> None:
    """Write the plans of these recipes."""
    from peertune.planning.memory_plan import plan
    from peertune.recipe import load_recipe

    file.write_text(json.dumps([vars(plan(load_recipe(str(recipe)))) for recipe in recipes]))


def taken(file: Path, recipe: Path, out: Path) -> None:
    """Run a recipe, and write how many bytes the process took at most."""
    from peertune.cli import main

    sys.argv = ["peertune", "run", str(recipe), "--out", str(out)]
    said = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(said), pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code, said.getvalue()
    # Not ru_maxrss, which begins with what the process took that this one was started by.
    lines = Path("/proc/self/status").read_text().splitlines()
    file.write_text(next(str(1024 * int(line.split()[1])) for line in lines if line.startswith("VmHWM")))
