"""Processes that die within a round, a simulation's and a peer's: how many steps are made again, and to which bits."""

import json
import logging
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from federation import Federation, found, free_ports
from processes import AT_MOST_S, forking

from peertune.api.peering import Peer, joined_peers
from peertune.api.training import Training, training
from peertune.rounds.turns import Steps
from peertune.runs import checkpoints, records
from peertune.types import Batch

STEPS, EVERY, ROUNDS, MADE = 5, 3, 3, 4
RECIPE = [
    f"rounds={ROUNDS}",
    f"checkpoint.steps={EVERY}",
    f"training={{local_steps: {STEPS}, per_device_train_batch_size: 2}}",
    "lora={r: 2, lora_alpha: 4, lora_dropout: 0.1, target_modules: [q_proj]}",
    "algorithm={name: dec_lora}",
    "modifiers=[{name: fedspeed}]",
    "graph={name: complete, activation: 1}",
    "evaluate={every: 2, rows: 8}",
    "partition={name: iid}",
]


def mortal(steps: Steps, made: Path, most: int | None) -> Steps:
    """These steps, each written down; after the `most` that may be made the process dies."""
    left = most

    def each(clients: Sequence[int], rounds: Sequence[int], first: int = 0, salts: Any = ()) -> Iterator[list[Batch]]:
        nonlocal left
        for step, batches in enumerate(steps(clients, rounds, first, salts), start=first):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            with made.open("a") as file:
                file.write(json.dumps([rounds[0], step]) + "\n")
            left = None if left is None else left - 1
            yield batches

    return each


@contextmanager
def written_down(work: Training, folder: Path, most: int | None) -> Iterator[None]:
    work.job = replace(work.job, steps=mortal(work.job.steps, folder / "made", most))
    yield


def simulated(folder: Path, most: int | None, rank: int = 0, port: int | None = None) -> None:
    """Be a simulation, or of the two processes of one that meet at a port this one."""
    torch.set_num_threads(1)
    logging.basicConfig(filename=folder / "log", level=logging.INFO)
    run = folder / "run"
    again = run.exists()
    if port is not None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in place.items()}
    words = () if again else (*RECIPE, "clients=3")
    with training(None if again else "digits-demo", words, run, again=again) as work, written_down(work, folder, most):
        work.finish()


def met(made: Federation, client: int, folder: Path, most: int | None) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(filename=folder / "log", level=logging.INFO)
    run = folder / "run"
    again, peer = run.exists(), Peer(made.peer(client), made.roster)
    words = () if again else (*RECIPE, "clients=2")
    recipe = None if again else "digits-demo"
    with joined_peers(recipe, words, run, peer) as part, written_down(part.training, folder, most):
        part.finish(lambda work: work.finish())


def lives(process: Any, most: int | None) -> int:
    """Start the process until it has come to its end; return how often it died."""
    died = 0
    while True:
        one = process(most)
        one.start()
        try:
            one.join(AT_MOST_S)
            assert one.exitcode in (0, -signal.SIGKILL)
        finally:
            one.kill()
        if one.exitcode == 0:
            return died
        died += 1


def assert_few_made_again(folder: Path, died: int) -> None:
    """It died after every so many steps, said where it goes on, and made few steps again."""
    made = [tuple(json.loads(line)) for line in (folder / "made").read_text().splitlines()]
    starts = range(0, len(made), MADE)
    assert len(starts) == died + 1
    for start in starts[1:]:
        before, after = (t * STEPS + step for t, step in made[start - 1 : start + 1])
        assert 0 <= before + 1 - after <= EVERY
    assert sorted({*made}) == [(t, step) for t in range(ROUNDS) for step in range(STEPS)]
    said = re.findall(r"goes on within round (\d+), after (\d+) of its 5 local steps", (folder / "log").read_text())
    assert [(int(t), int(step)) for t, step in said] == [made[start] for start in starts[1:] if made[start][1]]


def assert_same(ours: Path, theirs: Path) -> None:
    """Two runs have the same bits and the same records, but for seconds."""
    one, other = checkpoints.load(ours), checkpoints.load(theirs)
    assert one is not None
    assert other is not None
    for of in ("adapters", "moments", "memory"):
        own, others = vars(one)[of], vars(other)[of]
        assert own.keys() == others.keys()
        assert all(torch.equal(x, others[name]) for name, x in own.items())
    told = [[{**record, "seconds": None} for record in records.read(run)] for run in (ours, theirs)]
    assert told[0] == told[1]
    assert not [*(ours / "checkpoints").glob("*within*")], "it goes with the round's own"


def test_a_simulation_that_is_killed_within_rounds_makes_few_steps_again_to_the_same_bits(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("killed", "whole")]
    died = []
    for folder, most in zip(folders, (MADE, None), strict=True):
        folder.mkdir()
        died.append(lives(lambda most, folder=folder: forking().Process(target=simulated, args=(folder, most)), most))
    assert died == [4, 0]
    assert_few_made_again(folders[0], died[0])
    assert_same(*(folder / "run" for folder in folders))


def test_two_processes_of_which_one_is_killed_within_a_round_go_on_there_to_the_same_bits(tmp_path: Path) -> None:
    for name, lives_of in (("killed", (8, None)), ("whole", (None,))):
        folder = tmp_path / name
        folder.mkdir()
        for most in lives_of:
            (port,) = free_ports(1)
            both = [
                forking().Process(target=simulated, args=(folder, own, rank, port))
                for rank, own in ((0, None), (1, most))
            ]
            for one in both:
                one.start()
            try:
                for one in both:
                    one.join(AT_MOST_S)
                    assert (one.exitcode == 0) == (most is None)
            finally:
                for one in both:
                    one.kill()
    killed, whole = (tmp_path / name for name in ("killed", "whole"))
    assert "goes on within round 1, after 1 of its 5 local steps" in (killed / "log").read_text()
    assert_same(killed / "run", whole / "run")


def test_a_peer_that_is_killed_within_rounds_makes_few_steps_again_to_the_same_bits(tmp_path: Path) -> None:
    for name, most in (("killed", MADE), ("whole", None)):
        made = found(tmp_path / name, 2)
        folders = [made.folder / f"disk-{client}" for client in range(2)]
        for folder in folders:
            folder.mkdir()
        other = forking().Process(target=met, args=(made, 1, folders[1], None))
        other.start()
        try:
            died = lives(
                lambda most, made=made, folder=folders[0]: forking().Process(target=met, args=(made, 0, folder, most)),
                most,
            )
            other.join(AT_MOST_S)
            assert other.exitcode == 0
        finally:
            other.kill()
        assert died == (4 if most else 0)
    killed, whole = (tmp_path / name / "disk-0" for name in ("killed", "whole"))
    assert_few_made_again(killed, 4)
    assert_same(killed / "run", whole / "run")
