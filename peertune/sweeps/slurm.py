"""The runs of a sweep in SLURM's queue: one array, by submitit, and its elements as processes on the nodes."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peertune.errors import RunError, unknown
from peertune.files import locked, write_file
from peertune.sweeps.launch import COMMAND, Command, Launcher, Look, Looks, Queued, last_words

if TYPE_CHECKING:
    from submitit import AutoExecutor
    from submitit.helpers import DelayedSubmission

LOOK_S = 5.0
"""How often the queue is asked for: all users ask the same daemon."""
REQUEUES = 20
"""Time limits after which an element goes back to the queue by itself; then the sweep must be asked for again."""
PREEMPTION_S = 600.0
"""How long an element that got SIGTERM waits to be killed or requeued, as SLURM does after its time of grace."""
SETTINGS: dict[str, type] = {
    "account": str,
    "comment": str,
    "constraint": str,
    "cpus_per_gpu": int,
    "cpus_per_task": int,
    "dependency": str,
    "exclude": str,
    "gpus_per_node": int,
    "gpus_per_task": int,
    "gres": str,
    "mail_type": str,
    "mail_user": str,
    "mem_gb": float,
    "mem_per_cpu": str,
    "mem_per_gpu": str,
    "name": str,
    "nodelist": str,
    "partition": str,
    "qos": str,
    "setup": list,
    "signal_delay_s": int,
    "timeout_min": int,
    "wckey": str,
}
"""What `--slurm` sets, by submitit's names: those that a run in one process has a use for."""
DEFAULTS: dict[str, Any] = {"name": "peertune", "timeout_min": 60, "signal_delay_s": 90}


def slurm(folder: Path, jobs: int, settings: Sequence[str]) -> Launcher:
    """Return the launcher of one array in SLURM's queue, of which `jobs` elements run at a time.

    `folder` is for what submitit writes (scripts, logs, pickled tasks) and for which element runs what, on a disk that
    this machine and the nodes share. `settings` are words `key=value` for SLURM, keys as in `SETTINGS`.

    What is in the queue from an earlier time is followed, the rest submitted. At a request to stop all of it stays in
    the queue and the generator ends. Raises RunError without submitit, off a cluster, for a setting that can't be, and
    where sbatch refuses.
    """
    if "%" in str(folder.absolute()):
        raise RunError(f"--launcher slurm: {folder}: SLURM reads % in a path as a mark; give another --out")
    values = DEFAULTS | {"array_parallelism": jobs} | _values(settings)
    executor = _executor(folder, values)

    def launch(tasks: Mapping[str, Command], stopping: Callable[[], int]) -> Looks:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "sweep's queue"):
            ids = _still_there(folder, tasks)
            if fresh := {name: task for name, task in tasks.items() if name not in ids}:
                ids |= _submit(executor, folder, fresh, values["signal_delay_s"])
        gone: set[str] = set()
        while True:
            try:
                queue = _queue()
            except RunError:  # the daemon is busy, or is started anew; the queue is as it was
                queue = dict.fromkeys(ids.values(), "UNKNOWN")
            left = {name for name, job in ids.items() if job not in queue}
            # An element that ends well leaves a result. It may show later here than that the queue is without it.
            over = {name for name, job in ids.items() if (folder / f"{job}_0_result.pkl").exists()} | (left & gone)
            gone = left
            for name in over:
                _look_again(tasks[name].folder)
            ended = {name: _last_words(folder, ids.pop(name)) for name in over}
            yield Look(ended, {name: Queued(job, queue.get(job, "COMPLETING")) for name, job in ids.items()})
            if not ids or stopping():
                return
            until = time.monotonic() + LOOK_S
            while time.monotonic() < until and not stopping():
                time.sleep(0.05)

    return Launcher(launch)


def _values(settings: Sequence[str]) -> dict[str, Any]:
    """Read words `key=value`; `setup`, a line of the script before the run, may stand several times."""
    values: dict[str, Any] = {}
    for word in settings:
        key, equals, text = word.partition("=")
        if not equals or not text:
            raise RunError(f"--slurm: {word!r} sets nothing; write key=value, such as partition=gpu")
        if key not in SETTINGS:
            raise RunError(unknown("--slurm", key, SETTINGS))
        if SETTINGS[key] is list:
            values[key] = [*values.get(key, []), text]
            continue
        if key in values:
            raise RunError(f"--slurm: {key} stands twice; give it once")
        try:
            values[key] = SETTINGS[key](text)
        except ValueError:
            raise RunError(f"--slurm: {key}: {text!r} is no number") from None
        if SETTINGS[key] is not str and not 0 < values[key] < float("inf"):
            raise RunError(f"--slurm: {key}: {text} can't be, give more than 0")
    return values


def _executor(folder: Path, values: Mapping[str, Any]) -> "AutoExecutor":
    """Return submitit's executor with these settings."""
    try:
        from submitit import AutoExecutor
    except ImportError:
        raise RunError("--launcher slurm: needs submitit; pip install 'peertune[slurm]'") from None
    for program in ("sbatch", "squeue", "srun"):
        if shutil.which(program) is None:
            raise RunError(
                f"--launcher slurm: there is no {program} on this machine; give the command where the cluster's jobs "
                "are submitted, or leave out --launcher"
            )
    executor = AutoExecutor(
        folder, cluster="slurm", slurm_python=f"{shlex.quote(sys.executable)} -P", slurm_max_num_timeout=REQUEUES
    )
    # From 22.05 to 23.11 srun doesn't take over what sbatch was asked for, and gives its task one core.
    cores = [f"--cpus-per-task={values['cpus_per_task']}"] if "cpus_per_task" in values else []
    executor.update_parameters(**{f"slurm_{key}": value for key, value in values.items()}, slurm_srun_args=cores)
    return executor


def _queue() -> dict[str, str]:
    """Return the state of each of the user's elements in the queue, by its id."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i %T"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SQUEUE_")}  # its filters
    asked = subprocess.run(command, capture_output=True, env=environment)
    if asked.returncode:
        words = last_words(asked.stderr, f"ended with exit code {asked.returncode}").removeprefix("squeue: error: ")
        raise RunError(f"--launcher slurm: squeue: {words}; try again when it answers")
    pairs = (line.partition(" ") for line in asked.stdout.decode(errors="replace").splitlines())
    return {job.strip(): state.strip() for job, _, state in pairs}


def _still_there(folder: Path, tasks: Mapping[str, Command]) -> dict[str, str]:
    """Return the ids of those tasks that are in the queue from an earlier time."""
    queue, there = _queue(), {}
    for file in folder.glob("*.json"):
        try:
            submitted = dict(json.loads(file.read_bytes()))
        except (ValueError, TypeError):
            raise RunError(f"{file}: is no list of elements; move it away if its job is not in the queue") from None
        there.update({name: job for name, job in submitted.items() if name in tasks and job in queue})
    return there


def _submit(executor: "AutoExecutor", folder: Path, tasks: Mapping[str, Command], delay_s: float) -> dict[str, str]:
    """Submit one array of these tasks and keep its elements' ids, by the tasks' names."""
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises
            submitted = executor.submit_array([Element(task, delay_s) for task in tasks.values()])
    except RuntimeError as error:
        words = last_words(str(error).encode(), "said nothing").removeprefix("sbatch: error: ")
        raise RunError(f"--launcher slurm: sbatch refuses: {words}") from None
    finally:
        for pattern in (".submission_file_*", "[0-9a-f]" * 32 + ".pkl"):  # what it leaves on its way
            for left in folder.glob(pattern):
                left.unlink()
    ids = {name: job.job_id for name, job in zip(tasks, submitted, strict=True)}
    array = submitted[0].job_id.partition("_")[0]
    write_file(folder / f"{array}.json", json.dumps(ids, indent=2).encode())
    return ids


def _look_again(folder: Path) -> None:
    """List a run directory, so that a network file system shows what a node has written into it."""
    for place in (folder.parent, folder):
        with suppress(OSError):
            os.listdir(place)


def _last_words(folder: Path, job: str) -> str:
    """Return what an element of the queue said last."""
    silent = f"job {job} left the queue and said nothing; was it cancelled?"
    try:
        return last_words((folder / f"{job}_0_log.err").read_bytes(), silent)
    except OSError:
        return silent


@dataclass
class Element:
    """A task as submitit runs it on a node: in a process of its own, which is stopped before SLURM takes the node.

    SLURM sends SIGUSR2 `delay_s` before the time limit and, where its administrators chose so, at preemption; submitit
    then calls `checkpoint` and puts the element back into the queue. Elsewhere preemption is SIGTERM, a time of grace,
    and SLURM's own requeue, which an element that has ended would miss: so it waits. `scancel` sends SIGTERM as well.
    """

    task: Command
    delay_s: float
    where: str = field(default_factory=os.getcwd)  # what the task's paths are relative to
    process: subprocess.Popen[bytes] | None = None
    asked: bool = False  # to stop

    def __call__(self) -> None:
        """Run the task to its end; end this process as the task's did where that did not end well."""
        signal.signal(signal.SIGTERM, self.stop)
        threads = {"OMP_NUM_THREADS": cores} if (cores := os.environ.get("SLURM_CPUS_PER_TASK")) else {}
        # Blocked signals stay blocked in the process: some clusters send to all of a job, and SIGUSR2 would end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        os.chdir(self.where)
        self.process = subprocess.Popen([*COMMAND, *self.task.now()], env=threads | os.environ, start_new_session=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self.asked:
            self.process.terminate()
        code = self.process.wait()
        if code and self.asked:
            time.sleep(PREEMPTION_S)
        if code < 0:
            sys.stderr.write(f"killed by {signal.Signals(-code).name}\n")  # which is the element's log
        if code:
            sys.exit(abs(code))

    def stop(self, *_: object) -> None:
        """Ask the process, once, to finish its round and to keep it."""
        if self.process is not None and not self.asked:
            self.process.terminate()
        self.asked = True

    def checkpoint(self) -> "DelayedSubmission":
        """Stop the process, at the latest by four fifths of the delay; return what to do at the next start."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        until = time.monotonic() + 0.8 * self.delay_s
        while self.process is not None and not _has_ended(self.process):
            if time.monotonic() > until:
                self.process.kill()
            time.sleep(0.05)
        return DelayedSubmission(Element(self.task, self.delay_s, self.where))


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a child has ended, from within a signal's handler: `poll` may be what the signal interrupted."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
