import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import numpy as np
import pytest
import torch
from playing import starting
from run_directories import CLIENTS, assert_same_bits, everything, in_threads, no_room, part, share, state

from peertune.errors import RunError
from peertune.runs import checkpoints
from peertune.types import Group, State


def damage(checkpoint: Path, how: str) -> None:
    file = checkpoint / "state-000.safetensors"
    match how:
        case "a flipped bit":
            data = bytearray(file.read_bytes())
            data[-3] ^= 1
            file.write_bytes(data)
        case "a file cut short":
            file.write_bytes(file.read_bytes()[:100])
        case "an empty file":
            file.write_bytes(b"")
        case "no state":
            file.unlink()
        case "no meta":
            (checkpoint / "meta.json").unlink()
        case "meta that is no JSON":
            (checkpoint / "meta.json").write_text("{")
        case "meta that is no object":
            (checkpoint / "meta.json").write_text("[]")
        case "meta that is binary":
            (checkpoint / "meta.json").write_bytes(b"\xff\xfe")


DAMAGES = [
    "a flipped bit",
    "a file cut short",
    "an empty file",
    "no state",
    "no meta",
    "meta that is no JSON",
    "meta that is no object",
    "meta that is binary",
]


def test_a_checkpoint_comes_back_bit_for_bit(run: Path) -> None:
    checkpoints.save(run, state(4), 2, range(CLIENTS))
    loaded = checkpoints.load(run, like=state(0))
    assert_same_bits(loaded, state(4))
    assert loaded is not None
    assert (list(loaded.adapters), list(loaded.moments)) == (list(state(0).adapters), list(state(0).moments))


def save_shards(run: Path, of: State, size: int) -> None:
    in_threads(size, lambda group: checkpoints.save(run, part(of, group), 2, share(group), group))


def load_shards(run: Path, size: int) -> list[Any]:
    return in_threads(size, lambda group: checkpoints.load(run, part(state(0), group), share(group), group))


@pytest.mark.parametrize(("wrote", "read"), [(1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)])
def test_a_checkpoint_of_several_processes_is_read_in_any_number_of_them(run: Path, wrote: int, read: int) -> None:
    save_shards(run, state(4), wrote)
    (checkpoint,) = (run / "checkpoints").iterdir()
    shards = [f"state-{rank:03d}.safetensors" for rank in range(wrote)]
    assert sorted(file.name for file in checkpoint.iterdir()) == ["meta.json", *shards]
    loaded = load_shards(run, read)
    for rank, own in enumerate(loaded):
        assert_same_bits(own, state(4).take(torch.tensor(np.array_split(np.arange(CLIENTS), read)[rank])))
    assert_same_bits(checkpoints.load(run), state(4))


@pytest.mark.parametrize("read", [1, 2, 3])
def test_a_shard_that_is_damaged_makes_all_processes_pass_over_its_checkpoint(run: Path, read: int) -> None:
    for t in (5, 10):
        save_shards(run, state(t), 3)
    file = run / "checkpoints" / "round-000010" / "state-002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert [own.round for own in load_shards(run, read)] == [5] * read
    file.unlink()
    assert [own.round for own in load_shards(run, read)] == [5] * read


def test_a_process_that_fails_leaves_the_checkpoint_before(run: Path) -> None:
    save_shards(run, state(5), 3)

    def fail(group: Group) -> None:
        if group.rank == 1:
            raise ValueError("gone")
        checkpoints.save(run, part(state(10), group), 2, share(group), group)

    with pytest.raises((ValueError, BrokenBarrierError)):
        in_threads(3, fail)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["round-000005"]
    assert [own.round for own in load_shards(run, 3)] == [5] * 3


def within(round: int, step: int) -> State:
    began = {f"start/{name}": x.clone() for name, x in state(99).adapters.items()}
    sums = {name: torch.full((CLIENTS,), step + 0.25, dtype=torch.float64) for name in ("loss", "grad_norm", "seconds")}
    return replace(state(round), step=step, within=sums | began)


@pytest.mark.parametrize(("wrote", "read"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_a_state_within_a_round_is_kept_beside_the_whole_ones_for_those_who_go_on(
    run: Path, wrote: int, read: int
) -> None:
    save_shards(run, state(3), wrote)
    for step in (2, 4):
        of = within(3, step)

        def save(group: Group, of: State = of) -> None:
            checkpoints.save_within(run, part(of, group), share(group), group)

        in_threads(wrote, save)
        names = sorted(folder.name for folder in (run / "checkpoints").iterdir())
        assert names == ["round-000003", f"within-000003-{step:06d}"]
    loaded = in_threads(
        read, lambda group: checkpoints.load(run, part(state(0), group), share(group), group, within=True)
    )
    for rank, own in enumerate(loaded):
        expected = within(3, 4).take(torch.tensor(np.array_split(np.arange(CLIENTS), read)[rank]))
        assert_same_bits(own, expected)
        assert (own.round, own.step, own.within.keys()) == (3, 4, expected.within.keys())
        assert all(torch.equal(own.within[name], x) for name, x in expected.within.items())
    assert_same_bits(checkpoints.load(run), state(3))
    assert checkpoints.load(run, before=3, within=True) is None
    save_shards(run, state(4), wrote)
    assert [folder.name for folder in sorted((run / "checkpoints").iterdir())] == ["round-000003", "round-000004"]


def test_a_state_within_a_round_that_is_damaged_is_passed_over(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints.save(run, state(3), 2, range(CLIENTS))
    checkpoints.save_within(run, within(3, 2), range(CLIENTS))
    damage(run / "checkpoints" / "within-000003-000002", "a flipped bit")
    loaded = checkpoints.load(run, state(0), within=True)
    assert_same_bits(loaded, state(3))
    assert loaded is not None
    assert (loaded.step, loaded.within) == (0, {})
    assert "within-000003-000002 is damaged and passed over" in caplog.text


def test_what_a_process_that_was_killed_left_unfinished_goes_with_the_next(run: Path) -> None:
    (run / "checkpoints" / ".within-000003-000002-0123").mkdir(parents=True)
    checkpoints.save_within(run, within(3, 4), range(CLIENTS))
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["within-000003-000004"]


def test_a_run_without_checkpoints_has_none(run: Path) -> None:
    assert checkpoints.load(run) is None


def test_the_newest_checkpoints_are_kept(run: Path) -> None:
    for t in (1, 2, 10, 11):
        checkpoints.save(run, state(t), 2, range(CLIENTS))
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["round-000010", "round-000011"]
    assert_same_bits(checkpoints.load(run), state(11))


def test_of_older_checkpoints_those_stay_whose_ages_reach_back_over_the_whole_run(run: Path) -> None:
    for keep in (3, 8):
        held: list[int] = []
        for t in range(1, 1001):
            held = sorted(checkpoints._thinned([t, *held], keep), reverse=True)
            assert held[:2] == [t, t - 1][: len(held)]
            assert (len(held), held[-1]) == (min(t, keep), 1)
        ages = [1000 - t for t in held[1:]]
        assert keep == 3 or all(older <= 10 * newer for newer, older in pairwise(ages))
    for t in range(1, 9):
        checkpoints.save(run, state(t), 4, range(CLIENTS))
    assert sorted(folder.name[-1] for folder in (run / "checkpoints").iterdir()) == ["1", "6", "7", "8"]
    assert_same_bits(checkpoints.load(run, before=7), state(6))
    assert checkpoints.load(run, before=1) is None


def test_a_checkpoint_that_a_killed_process_left_unfinished_is_cleared_away(run: Path) -> None:
    (run / "checkpoints" / ".round-000003-x7").mkdir(parents=True)
    (run / "checkpoints" / ".round-000003-x7" / "state-000.safetensors").write_bytes(b"half")
    assert checkpoints.load(run) is None
    checkpoints.save(run, state(4), 2, range(CLIENTS))
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["round-000004"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    run: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    for t in (5, 10):
        checkpoints.save(run, state(t), 2, range(CLIENTS))
    damage(run / "checkpoints" / "round-000010", how)
    with caplog.at_level(logging.WARNING):
        assert_same_bits(checkpoints.load(run, like=state(0)), state(5))
    (warning,) = caplog.messages
    assert "round-000010 is damaged and passed over" in warning


def test_a_run_with_nothing_but_damaged_checkpoints_is_refused(run: Path) -> None:
    for t, how in ((5, "a flipped bit"), (10, "no meta")):
        checkpoints.save(run, state(t), 2, range(CLIENTS))
        damage(run / "checkpoints" / f"round-{t:06d}", how)
    with pytest.raises(RunError, match=r"one/checkpoints: every checkpoint is damaged; restore one, or start again"):
        checkpoints.load(run)
    assert checkpoints.load(run, before=11) is None, "who goes back takes the start instead"


@pytest.mark.parametrize(
    ("like", "complaint"),
    [
        (state(0, r=4), r"enc\.q\.A is \(3, 2, 6\) where the recipe makes \(3, 4, 6\)"),
        (starting(state(0).adapters, {}), r"is \(.*\) where the recipe makes None"),
        (
            starting(state(0).adapters | {"x.A": torch.zeros(3, 1)}, state(0).moments),
            r"x\.A is None where the recipe makes \(3, 1\)",
        ),
    ],
)
def test_a_checkpoint_of_other_shapes_is_refused(run: Path, like: State, complaint: str) -> None:
    checkpoints.save(run, state(4), 2, range(CLIENTS))
    with pytest.raises(RunError, match="resume with the run's own recipe") as caught:
        checkpoints.load(run, like=like)
    caught.match(complaint)


def test_a_disk_that_fills_up_at_a_checkpoint_leaves_the_one_before(run: Path) -> None:
    checkpoints.save(run, state(1), 1, range(CLIENTS))
    before = everything(run)
    with no_room(100), pytest.raises(RunError, match=r"round-000002: can't be written \(File too large\)"):
        checkpoints.save(run, state(2), 1, range(CLIENTS))
    assert everything(run) == before
    assert_same_bits(checkpoints.load(run), state(1))
