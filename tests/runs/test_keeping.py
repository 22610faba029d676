"""Records and checkpoints where the disk is full or files can't be opened: real limits of the kernel, not a mock."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from playing import starting
from run_directories import in_threads, no_room, share
from safetensors.torch import save

from peertune.errors import RunError
from peertune.rounds.job import Pausing
from peertune.rounds.record import RoundRecord
from peertune.runs import checkpoints, records
from peertune.runs.keeping import Keeper
from peertune.types import Group, State


def state(round: int) -> State:
    return starting({"q.A": torch.full((2, 3, 500), float(round))}, round=round)


def record(round: int) -> RoundRecord:
    return RoundRecord(round, ["A"], ["A"], [0, 1], [1.0, 1.0], [1.0, 1.0], [0, 0], [0, 0], [], [], [], None, {}, {})


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    """Hold this process to a limit."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def next_file() -> int:
    """The number that the next file to be opened has."""
    os.close(number := os.open(os.devnull, os.O_RDONLY))
    return number


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "rounds.jsonl").touch()
    (tmp_path / "facts.json").write_text("{}")
    return tmp_path


def rounds(run: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (run / "rounds.jsonl").read_text().splitlines()]


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def make(keeper: Keeper, *made: int, last: bool = False) -> None:
    for t in made:
        keeper.record(record(t))
        keeper.checkpoint(state(t + 1), last=last)


def of_three(round: int) -> State:
    return starting({"q.A": torch.full((3, 2, 2_500), float(round))}, round=round)


LIMIT = 30_000


def save_file_of(of: State, clients: list[int]) -> bytes:
    return save(of.take(torch.tensor(clients)).adapters)


def keep_parts(run: Path, group: Group, round: int, *, last: bool = False) -> None:
    keeper = Keeper(run, share(group), every=1, keep=2, group=group)
    keeper.checkpoint(of_three(round).take(torch.tensor(share(group))), last=last)


LIMITS = {
    "no room for a checkpoint": lambda run: limited(resource.RLIMIT_FSIZE, 8_000),
    "no room for half a record": lambda run: limited(resource.RLIMIT_FSIZE, (run / "rounds.jsonl").stat().st_size + 99),
    "no file can be opened": lambda run: limited(resource.RLIMIT_NOFILE, next_file()),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_can_t_be_written_is_warned_of_once_and_made_up_for(
    run: Path, limit: str, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = Keeper(run, range(2), every=1, keep=2)
    make(keeper, 0)
    with LIMITS[limit](run):
        make(keeper, 1, 2)
    assert keeper.failed == (2 if "checkpoint" in limit else 4)
    assert kept(run) == ["round-000001"]
    assert rounds(run) == ([0, 1, 2] if "checkpoint" in limit else [0])
    problem = "can't be written (File too large)" if "room" in limit else "can't be written (Too many open files)"
    (said,) = caplog.messages
    assert problem in said
    assert said.endswith("; the run goes on, and tries again: rounds in the newest checkpoint: 1")
    failed = keeper.failed
    make(keeper, 3)
    assert kept(run) == ["round-000001", "round-000004"]
    assert rounds(run) == [0, 1, 2, 3]
    assert caplog.messages[-1] == f"{run} can be written again: 4 rounds are kept"
    counts = [line["failed_writes"] for line in records.read(run)]
    assert counts[0] == 0
    assert counts[-1] == keeper.failed == failed
    loaded = checkpoints.load(run)
    assert loaded is not None
    assert loaded.round == 4
    with LIMITS[limit](run):
        make(keeper, 4)
    assert problem in caplog.messages[-1], "each time that it begins to fail"


def test_a_checkpoint_waits_for_the_records_before_it(run: Path) -> None:
    keeper = Keeper(run, range(2), every=1, keep=2)
    (run / "rounds.jsonl").unlink()
    (run / "rounds.jsonl").mkdir()  # a place that can't be written
    make(keeper, 0)
    assert kept(run) == []


def test_only_a_last_state_that_can_t_be_written_ends_the_run(run: Path) -> None:
    keeper = Keeper(run, range(2), every=10, keep=2)
    with limited(resource.RLIMIT_FSIZE, 8_000):
        make(keeper, *range(5))
        assert keeper.failed == 0, "none was due"
        with pytest.raises(RunError, match=r"round-000006: can't be written \(File too large\)"):
            make(keeper, 5, last=True)
    assert rounds(run) == list(range(6))
    make(keeper, 6, last=True)
    assert kept(run) == ["round-000007"]


def test_of_so_many_steps_of_the_run_one_state_is_kept_within_a_round_or_between_two(run: Path) -> None:
    keeper = Keeper(run, range(2), every=10, keep=2, steps=4, local_steps=6)
    held = []
    for t in range(4):
        for step in Pausing(4, bool).after(t, 6):
            keeper.checkpoint(replace(state(t), step=step), last=False)
            held.append(kept(run))
        make(keeper, t)
        held.append(kept(run))
    names = ["000000-000004", "000000-000004", "000001-000002", "000002-000000"]
    names += ["000002-000004", "000002-000004", "000003-000002", "000004-000000"]
    assert held == [[f"within-{name}"] for name in names]
    make(keeper, 4, last=True)
    assert kept(run) == ["round-000005"]
    keeper.checkpoint(replace(state(5), step=3), last=True)
    assert kept(run) == ["round-000005", "within-000005-000003"], "what is half of a round is no whole one"


def test_a_state_within_a_round_that_can_t_be_written_is_left_out(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    keeper = Keeper(run, range(2), every=10, keep=2, steps=2, local_steps=6)
    with limited(resource.RLIMIT_FSIZE, 8_000):
        keeper.checkpoint(replace(state(0), step=2), last=False)
    assert (kept(run), keeper.failed) == ([], 1)
    keeper.checkpoint(replace(state(0), step=4), last=False)
    assert kept(run) == ["within-000000-000004"]
    assert "can be written again" in caplog.text


def test_a_checkpoint_that_is_due_is_tried_again_after_the_next_round(run: Path) -> None:
    keeper = Keeper(run, range(2), every=5, keep=2)
    make(keeper, *range(4))
    with limited(resource.RLIMIT_FSIZE, 8_000):
        make(keeper, 4, 5, 6)
    make(keeper, *range(7, 12))
    assert kept(run) == ["round-000008", "round-000010"]


def test_of_several_processes_a_checkpoint_names_the_part_of_each(run: Path) -> None:
    in_threads(2, lambda group: keep_parts(run, group, 1))
    meta = json.loads((run / "checkpoints" / "round-000001" / "meta.json").read_text())
    assert [shard["clients"] for shard in meta["shards"]] == [[0, 1], [2]]


def test_what_one_of_several_processes_can_t_write_none_keeps_and_all_go_on(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(group: Group) -> list[int]:
        keeper = Keeper(run, share(group), every=1, keep=3, group=group)
        found = []
        for t in range(4):
            if group.rank == 0:
                keeper.record(record(t))
            if t == 1 and group.gather("") and group.rank == 0:  # the first part, of two clients, is the larger
                resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            if t == 3 and group.gather("") and group.rank == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            group.gather("")
            keeper.checkpoint(of_three(t + 1).take(torch.tensor(share(group))), last=False)
            found.append(keeper.failed)
        return found

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [len(save_file_of(of_three(1), clients)) for clients in ([0, 1], [2])]
    assert sizes[1] < LIMIT < sizes[0]
    assert in_threads(2, work) == [[0, 1, 2, 2]] * 2
    assert kept(run) == ["round-000001", "round-000004"]
    assert rounds(run) == [0, 1, 2, 3]
    assert "round-000002: can't be written (File too large)" in caplog.messages[0]
    assert caplog.messages[1:] == [f"{run} can be written again: 4 rounds are kept"]

    def end(group: Group) -> str:
        with pytest.raises(RunError) as raised:
            keep_parts(run, group, 9, last=True)
        group.gather("")
        return str(raised.value)

    with no_room(8_000):
        first, second = in_threads(2, end)
    assert "round-000009: can't be written (File too large)" in first
    assert first == second
