"""A cluster of one machine: as much of SLURM's commands as a sweep uses, over a folder.

`$SLURM_FOLDER` holds `queue/JOB` for each element that is PENDING or RUNNING, `task/JOB` with the process that srun
started, `starts` with a line for each start, `asked` with one for each squeue, `scripts/ID`, and what tests put there:
`hold` keeps elements pending, `refuse` holds what sbatch answers. Without an array a job is an element.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "srun", "scontrol")


class Cluster:
    """The cluster in a folder, for a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("bin", "queue", "requeue", "scripts", "task"):
            (folder / name).mkdir(parents=True)
        for name in COMMANDS:
            (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {name} "$@"\n')
            (folder / "bin" / name).chmod(0o755)

    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "SLURM_FOLDER": str(self.folder)}

    def hold(self, held: bool = True) -> None:
        (self.folder / "hold").touch() if held else (self.folder / "hold").unlink()

    def refuse(self, answer: str) -> None:
        (self.folder / "refuse").write_text(answer)

    def scripts(self) -> list[str]:
        """What was submitted, in order."""
        return [file.read_text() for file in sorted((self.folder / "scripts").iterdir())]

    def starts(self) -> list[str]:
        """The elements in the order of their starts."""
        file = self.folder / "starts"
        return file.read_text().split() if file.exists() else []

    def asked(self) -> int:
        """How often squeue was."""
        file = self.folder / "asked"
        return file.stat().st_size if file.exists() else 0

    def queue(self) -> list[str]:
        return sorted(file.name for file in (self.folder / "queue").iterdir())

    def warn(self, job: str, number: signal.Signals) -> None:
        """Send a signal to an element's task, as SLURM does before it takes a node."""
        os.kill(int((self.folder / "task" / job).read_text()), number)

    def take(self, job: str, requeue: bool = False) -> None:
        """Kill all processes of an element, or take one out of the queue that has none."""
        if requeue:
            (self.folder / "requeue" / job).touch()
        else:
            (self.folder / "queue" / job).unlink(missing_ok=True)
        _kill(f"FAKE_JOB={job}", f"SLURM_FOLDER={self.folder}")

    def end(self) -> None:
        _kill(f"SLURM_FOLDER={self.folder}", but=os.getpid())


def _kill(*marks: str, but: int = 0) -> None:
    """Kill the processes that have all of this in the environment that they were started with."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            there = set((place / "environ").read_bytes().decode(errors="replace").split("\0"))
            if there.issuperset(marks) and int(place.name) != but:
                os.kill(int(place.name), signal.SIGKILL)
        except OSError:
            continue  # it is another user's, or has ended


def sbatch(folder: Path, script: str) -> None:
    if (folder / "refuse").exists():
        sys.exit((folder / "refuse").read_text())
    number = str(1000 + len(list((folder / "scripts").iterdir())))
    text = Path(script).read_text()
    (folder / "scripts" / number).write_text(text)
    array = re.search(r"^#SBATCH --array=0-(\d+)%(\d+)$", text, re.MULTILINE)
    last, jobs = map(int, array.groups()) if array else (0, 1)
    elements = [f"{number}_{place}" for place in range(last + 1)] if array else [number]
    for job in elements:
        (folder / "queue" / job).write_text("PENDING")
    command = [
        sys.executable,
        "-S",
        __file__,
        "slurmctld",
        str(folder / "scripts" / number),
        json.dumps(elements),
        str(jobs),
    ]
    null = subprocess.DEVNULL
    subprocess.Popen(command, start_new_session=True, stdin=null, stdout=null, stderr=null)
    sys.stdout.write(f"Submitted batch job {number}\n")


def slurmctld(folder: Path, script: str, listed: str, jobs: str) -> None:
    """Run the elements of one submission."""
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", Path(script).read_text(), re.MULTILINE))
    processes: dict[str, subprocess.Popen[bytes]] = {}
    elements = json.loads(listed)
    while elements:
        for job in list(elements):
            state = folder / "queue" / job
            process = processes.get(job)
            if process is not None and process.poll() is not None:
                del processes[job]
                if (folder / "requeue" / job).exists():
                    (folder / "requeue" / job).unlink()
                    state.write_text("PENDING")
                else:
                    state.unlink(missing_ok=True)
            elif process is None and not state.exists():
                elements.remove(job)
            elif process is None and len(processes) < int(jobs) and not (folder / "hold").exists():
                processes[job] = _start(job, script, settings)
                with open(folder / "starts", "a") as starts:
                    starts.write(f"{job}\n")
                state.write_text("RUNNING")
        time.sleep(0.02)


def _start(job: str, script: str, settings: dict[str, str]) -> "subprocess.Popen[bytes]":
    array, _, place = job.partition("_")
    environment = os.environ | {"FAKE_JOB": job, "SLURM_JOB_ID": f"{int(array) + 500 + int(place or 0)}"}
    if place:
        environment |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": place}
    else:
        environment["SLURM_JOB_ID"] = array
    if "cpus-per-task" in settings:
        environment["SLURM_CPUS_PER_TASK"] = settings["cpus-per-task"]
    with open(_named(shlex.split(settings["error"])[0], job), "ab") as errors:
        return subprocess.Popen(["bash", script], env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def _named(pattern: str, job: str) -> str:
    array, _, place = job.partition("_")
    for mark, value in (("%A", array), ("%a", place), ("%j", job), ("%t", "0")):
        pattern = pattern.replace(mark, value)
    return pattern


TASK = """
import runpy, sys
sys.executable, *words = sys.argv[1:]
place = words.index("-m") + 1
sys.argv[1:] = words[place + 1 :]
runpy.run_module(words[place], alter_sys=True, run_name="__main__")
"""


def starting(python: str) -> list[str]:
    """Return what stands for Python where a module runs that is to start others by this one."""
    return [sys.executable, "-P", "-c", TASK, python]


def srun(folder: Path, *words: str) -> None:
    """Start the task of an element, and say how it ended where it did not end well.

    Where the environment has `FORKING`, the task starts others by that Python.
    """
    job, options, rest = os.environ["FAKE_JOB"], {}, list(words)
    while rest[0].startswith("--"):
        option = rest.pop(0)
        options[option] = rest.pop(0) if option in ("--output", "--error") else ""
    if forking := os.environ.get("FORKING"):
        rest = [*starting(forking), *rest[1:]]
    with open(_named(options["--output"], job), "ab") as out, open(_named(options["--error"], job), "ab") as errors:
        process = subprocess.Popen(rest, stdout=out, stderr=errors)
    (folder / "task" / job).write_text(str(process.pid))
    if code := process.wait():
        sys.exit(f"srun: error: node-0: task 0: Exited with exit code {code}")


def scontrol(folder: Path, _: str, job: str) -> None:
    (folder / "requeue" / job).touch()


def squeue(folder: Path, *_: str) -> None:
    with open(folder / "asked", "a") as asked:
        asked.write("\n")
    for file in sorted((folder / "queue").iterdir()):
        with suppress(FileNotFoundError):  # it has just ended
            sys.stdout.write(f"{file.name} {file.read_text()}\n")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(os.environ["SLURM_FOLDER"]), *sys.argv[2:])
