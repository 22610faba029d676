"""A whole run of `digits-demo` by the command line: processor seconds of one thread, from start to end."""

import os
import resource
import subprocess
import tempfile

from benchmarks.measure import Figure, figure
from benchmarks.start import COMMAND


def run(repeats: int = 3) -> list[Figure]:
    """Measure whole runs."""
    return [figure("a run of digits-demo, processor time", [_whole() for _ in range(repeats)], "s")]


def turn() -> list[Figure]:
    """Measure one."""
    return run(1)


def _whole() -> float:
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [*COMMAND, "run", "digits-demo", "--out", f"{folder}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
