"""`python -m benchmarks.same OLD`: whether the working tree comes to the same bits as a commit, by all methods.

The package as it was at OLD, and as it is here, run side by side in this one environment: every method for a few rounds
of `digits-demo`, with dropout, a sparse graph and faults; in one process, in two, and as four peers over TLS. All
adapters and the tensors of the last checkpoint must be the same to the bit, and in the records all fields that both
sides have, but for the seconds. Where the sides write different formats, of a checkpoint the adapters and the moments
must be the same, and in the records all but the bytes that were sent. Each side is asked by the command line, and
judged by the files that it leaves.
"""

import argparse
import inspect
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
CLIENTS = 4
METHODS = {
    **{name: f"{{name: {name}}}" for name in ("local", "dec_lora", "ffa_lora", "rolora", "decaf", "fedrot_lora")},
    **{name: f"{{name: {name}, switch_every: 2}}" for name in ("adf_lora", "tad_lora")},
    "tad_lora, adaptive": "{name: tad_lora, switch_every: adaptive, window_rounds: 4}",
}
WAYS: dict[str, list[tuple[str, ...]]] = {
    "one process": [("run", "digits-demo")],
    "two processes": [("run", "digits-demo")] * 2,
    "four peers": [("peer", "start", "--recipe", "digits-demo", "--dir", f"peer-{k}") for k in range(CLIENTS)],
}
"""The words of each process; settings and `--out` follow."""
SETTINGS = (
    f"clients={CLIENTS}",
    "rounds=8",  # two windows of the adaptive phases
    "graph={name: complete, activation: 0.5}",
    "faults=[{edge: [0, 1], rounds: [1, 4]}, {down: 3, rounds: [5, 5]}]",
    "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 4}",
    "lora.lora_dropout=0.1",
    "evaluate={every: 4, rows: 40}",
    "network.patience_s=120",
)
Command = tuple[Mapping[str, str], Sequence[str]]  # environment, words


def main() -> None:
    """Run both sides, print a line for each method and way, and end with 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same", description=__doc__)
    parser.add_argument("old", metavar="OLD", help="a commit, such as HEAD or main")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))
    found, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="same-") as place, ExitStack() as stack:
        old, new = Path(place, "old"), Path(place, "new")
        print(f"the working tree against {lay_out(parser.parse_args().old, old, new)}", flush=True)
        sides = [stack.enter_context(Side(folder)) for folder in (old, new)]
        for side in sides:
            if not (runs := side.answer()).startswith(str(side.folder / "code")):
                side.fail(f"would run {runs or 'nothing'}")
        federate(sides)
        for way, method in product(WAYS, METHODS):
            print(f"{time.monotonic() - began:4.0f} s: {method}, {way}", file=sys.stderr, flush=True)
            ports = zip(sides, free_ports(len(sides)), strict=True)
            ask({side: commands(way, method, port) for side, port in ports})
            found[f"{method:<20}{way:<15}"] = difference(old / "runs" / way / method, new / "runs" / way / method)
        kept, told = tensors(new / "runs"), fields(new / "runs")
    for what, said in found.items():
        print(f"{what}{said or 'same'}")
    failed = sum(len(value) for name, value in told.items() if name.endswith(": failed_edges"))
    print(f"compared: {len(kept):,} tensors, {len(told):,} fields of records; {failed} edges failed as planned")
    sys.exit(any(found.values()))


def lay_out(commit: str, old: Path, new: Path) -> str:
    """Put the package as it was, and as it is, into `code` in a side's folder; return what the commit is."""

    def git(*words: str) -> str:
        process = subprocess.run(["git", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if process.returncode:  # git has said why
            sys.exit(2)
        return process.stdout.strip()

    described = git("log", "-1", "--format=%h %s", commit, "--")
    old.mkdir()
    git("archive", "--output", str(old / "code.tar"), commit, "peertune")
    shutil.unpack_archive(old / "code.tar", old / "code", filter="data")
    shutil.copytree(ROOT / "peertune", new / "code" / "peertune", ignore=shutil.ignore_patterns("__pycache__"))
    return described


def commands(way: str, method: str, port: int) -> list[Command]:
    """Return what the processes of a run are asked to do; two of them meet at the port."""
    asked: list[Command] = []
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for k, words in enumerate(WAYS[way]):
        environment = several | {"RANK": str(k), "LOCAL_RANK": str(k)} if way == "two processes" else {}
        out = f"runs/{way}/{method}/{k if way == 'four peers' else 0}"
        asked.append((environment, [*words, *SETTINGS, f"algorithm={METHODS[method]}", "--out", out]))
    return asked


def free_ports(number: int) -> list[int]:
    """Return ports at which nobody listens here, below those that systems give to callers."""
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < number:
            with suppress(OSError):
                port = random.randrange(16_000, 32_000)
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    return found


class Side(subprocess.Popen[str]):
    """One state of the package, in `code` in a folder, and a process that runs command lines with it there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        with self.log.open("w") as log:
            super().__init__(
                [sys.executable, "-c", f"{inspect.getsource(serve)}\nserve()"],
                cwd=folder,  # where no other peertune lies
                env=os.environ | {"PYTHONPATH": str(folder / "code"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def answer(self) -> str:
        """Wait for the process to say a line; return it, or nothing where the process has ended."""
        assert self.stdout is not None
        return self.stdout.readline().strip()

    def fail(self, said: str) -> NoReturn:
        """End, with what the process said last."""
        last = "\n".join(self.log.read_text().splitlines()[-20:])
        sys.exit(f"{last}\nthe {self.folder.name} side: {said}")

    def __exit__(self, *raised: Any) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        super().__exit__(*raised)


def serve() -> None:
    """Run the commands that stand in each line of standard input, and answer with the exit codes.

    They run at the same time, each in a process that is forked from one that has everything imported. This function is
    all that a side's process has of this file.
    """
    import json
    import os
    import runpy
    import sys
    from multiprocessing import get_context
    from multiprocessing.connection import wait

    import peertune

    def run(environment: dict[str, str], words: list[str]) -> None:
        os.environ.update(environment)
        sys.argv = ["peertune", *words]
        runpy.run_module("peertune", run_name="__main__", alter_sys=True)

    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        run({}, ["run", "digits-demo", "clients=2", "rounds=1", "--out", "imported"])
    except SystemExit:
        print(peertune.__file__, file=answers)
    for line in asked:
        processes = [get_context("fork").Process(target=run, args=each) for each in json.loads(line)]
        for process in processes:
            process.start()
        while left := [process for process in processes if process.exitcode is None]:
            wait([process.sentinel for process in left])
            if any(process.exitcode for process in processes):  # the others would wait for it
                for process in left:
                    process.kill()
        print([process.exitcode for process in processes], file=answers)


def ask(commands: Mapping[Side, Sequence[Command]]) -> None:
    """Have all sides run their commands at the same time, and wait; end where one of them fails."""
    for side in commands:
        print(json.dumps(commands[side]), file=side.stdin, flush=True)
    for side in commands:
        if (codes := side.answer()) != str([0] * len(commands[side])):
            said = "\n".join(f"peertune {shlex.join(words)}" for _, words in commands[side])
            side.fail(f"{said}\nended with {codes or 'a crash'}")


def federate(sides: Sequence[Side]) -> None:
    """Have each side make a federation: a CA, the peers' keys and certificates, and the roster."""
    ports = free_ports(CLIENTS * len(sides))
    own = {side: ports[k :: len(sides)] for k, side in enumerate(sides)}
    peers = [f"peer-{k}" for k in range(CLIENTS)]
    made = [f"peer request --name {name} --dir {name} --address 127.0.0.1:{{{k}}}" for k, name in enumerate(peers)]
    approved = [f"ca approve {name}/{name}.request.pem --yes" for name in peers]
    for words in ("ca init --federation same", *made, *approved, "roster"):
        ask({side: [({}, words.format(*own[side]).split())] for side in sides})


def runs(folder: Path) -> list[Path]:
    """Return the run directories in a folder. Raises FileNotFoundError where there is none."""
    if not (found := sorted(file.parent for file in folder.rglob("rounds.jsonl"))):
        raise FileNotFoundError(f"{folder}: holds no run")
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all adapters, and of the last checkpoint, of each run in a folder: by file and name."""
    files = [
        file
        for run in runs(folder)
        for part in (*sorted(run.glob("adapters/*")), max(run.glob("checkpoints/*")))
        for file in sorted(part.glob("*.safetensors"))
    ]
    return {f"{file.relative_to(folder)}: {name}": x for file in files for name, x in sorted(load_file(file).items())}


OWN = ("signals/", "memory/", "clients/")
"""What of a checkpoint is in a format's own words."""


def formats(folder: Path) -> set[int]:
    """Return in which formats the checkpoints in a folder are written."""
    return {json.loads(file.read_text())["format"] for file in folder.rglob("checkpoints/*/meta.json")}


def fields(folder: Path) -> dict[str, Any]:
    """Return how many records each run in a folder has, and their fields without the seconds: by file, round, key."""
    from peertune.recipe import flat  # of the working tree; the sides have their own

    found: dict[str, Any] = {}
    for file in (run / "rounds.jsonl" for run in runs(folder)):
        what, lines = str(file.relative_to(folder)), file.read_text(encoding="utf-8").splitlines()
        found[f"{what}: records"] = len(lines)
        for record in map(json.loads, lines):
            record.pop("seconds", None)
            found |= {f"{what}: round {record['round']}: {key}": x for key, x in flat(record).items()}
    return found


def difference(old: Path, new: Path) -> str:
    """Return what differs first in the runs that two folders hold, and by how much; nothing where nothing does."""
    before, after = tensors(old), tensors(new)
    changed = formats(old) != formats(new)
    for what in {**before, **after}:
        if changed and what.rpartition(": ")[2].startswith(OWN):
            continue
        if what not in before or what not in after:
            return f"{what}: is only in the {'new' if what in after else 'old'}"
        if said := apart(before[what], after[what]):
            return f"{what}: {said}"
    was, became = fields(old), fields(new)
    for what in was:
        if changed and what.endswith(": bytes_sent"):
            continue
        if what in became and was[what] != became[what]:
            return f"{what}: {was[what]} in the old, {became[what]} in the new"
    return ""


def apart(old: Tensor, new: Tensor) -> str:
    """Return in what two tensors differ; nothing where all their bits are the same."""
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return " in the old, ".join(f"{x.dtype} {list(x.shape)}" for x in (old, new)) + " in the new"
    bits = [x.reshape(-1, 1).view(torch.uint8) for x in (old, new)]
    if not (changed := int((bits[0] != bits[1]).any(1).sum())):
        return ""
    return f"{changed} of {old.numel()} values, by {(old.double() - new.double()).abs().max():.2g} at most"


if __name__ == "__main__":
    main()
