import json
import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from processes import AT_MOST_S
from safetensors.torch import load_file

from peertune.errors import RunError
from peertune.files import write_file
from peertune.runs import tracking
from peertune.types import Evaluation, Group, RoundRecord, State

CLIENTS = 3


def state(round: int, r: int = 2) -> State:
    generator = torch.Generator().manual_seed(round)
    adapters = {
        "enc.q.A": torch.randn(CLIENTS, r, 6, generator=generator),
        "enc.q.B": torch.randn(CLIENTS, 4, r, generator=generator, dtype=torch.float64),
        "out.weight.head": torch.randn(CLIENTS, 5, 4, generator=generator).bfloat16(),
    }
    moments = {f"{name}.m": x * 1e-30 for name, x in adapters.items()} | {"steps.A": torch.tensor([round, 0, 7])}
    signals = {"probe": torch.tensor([[1.0, torch.nan]] * CLIENTS), "client": torch.arange(CLIENTS)}
    return State(adapters, moments, round, signals)


def record(round: int, evaluation: Evaluation | None = None) -> RoundRecord:
    return RoundRecord(
        round=round,
        train=["B"],
        send=["A", "B"],
        clients=[0, 1, 2],
        loss=[0.1, 1 / 3, 2e-9],
        grad_norm=[1.0, 2.0, 3.0],
        bytes_sent=[8, 0, 8],
        neighbours=[1, 0, 1],
        edges=[(0, 2)],
        failed_edges=[(0, 2)],
        out_of_phase=[],
        neighbourhood_cross_term=[0.5, 0.0, 0.5],
        diagnostics={"cross_term": 1e-17},
        seconds={"train": 0.5},
        evaluation=evaluation,
        state=state(round + 1),
    )


def create(folder: Path, **changed: Any) -> Path:
    given: dict[str, Any] = {
        "recipe": "# naïve\nrounds: 3\n",
        "resolved": "rounds: 3\n",
        "environment": {"torch": "2"},
        "facts": {"graph": {"rho": 0.5}},
        "lora": LoraConfig(r=2, lora_alpha=4, target_modules=["q"]),
        "head": {"out.bias": torch.ones(5)},
        "labels": ("no", "yes"),
    }
    tracking.create(folder, **(given | changed))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return create(tmp_path / "runs" / "one")


@contextmanager
def no_room(most_bytes: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def export(run: Path, state: State, client: int | None, to: Path) -> None:
    with tracking.exported(run, state, client, to):
        pass


def assert_same_bits(ours: State | None, theirs: State) -> None:
    assert ours is not None
    assert ours.round == theirs.round
    parts = ((ours.adapters, theirs.adapters), (ours.moments, theirs.moments), (ours.signals, theirs.signals))
    for part, expected in parts:
        assert part.keys() == expected.keys()
        for name, x in expected.items():
            assert part[name].dtype == x.dtype
            torch.testing.assert_close(part[name], x, rtol=0, atol=0, equal_nan=True)


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
    tracking.save_checkpoint(run, state(4), 2, range(CLIENTS))
    loaded = tracking.load_checkpoint(run, like=state(0))
    assert_same_bits(loaded, state(4))
    assert loaded is not None
    assert (list(loaded.adapters), list(loaded.moments)) == (list(state(0).adapters), list(state(0).moments))


class Thread(Group):
    """One of several threads in the place of processes."""

    def __init__(self, rank: int, size: int, together: Barrier, told: list[Any]) -> None:
        self.rank, self.size, self.together, self.told = rank, size, together, told

    def gather(self, value: Any) -> list[Any]:
        self.told[self.rank] = value
        self.together.wait(AT_MOST_S)
        found = list(self.told)
        self.together.wait(AT_MOST_S)
        return found

    def add(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(x)).sum(0)


def share(group: Group) -> list[int]:
    return [int(client) for client in np.array_split(np.arange(CLIENTS), group.size)[group.rank]]


def in_threads(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """Do the work in so many threads; one that fails ends the others, as a process does."""
    together, told = Barrier(size), [None] * size

    def alone(rank: int) -> Any:
        try:
            return work(Thread(rank, size, together, told))
        except BaseException:
            together.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(alone, rank) for rank in range(size)]]


def part(of: State, group: Group) -> State:
    return of.take(torch.tensor(share(group)))


def save_shards(run: Path, of: State, size: int) -> None:
    in_threads(size, lambda group: tracking.save_checkpoint(run, part(of, group), 2, share(group), group))


def load_shards(run: Path, size: int) -> list[Any]:
    return in_threads(size, lambda group: tracking.load_checkpoint(run, part(state(0), group), share(group), group))


@pytest.mark.parametrize(("wrote", "read"), [(1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)])
def test_a_checkpoint_of_several_processes_is_read_in_any_number_of_them(run: Path, wrote: int, read: int) -> None:
    save_shards(run, state(4), wrote)
    (checkpoint,) = (run / "checkpoints").iterdir()
    shards = [f"state-{rank:03d}.safetensors" for rank in range(wrote)]
    assert sorted(file.name for file in checkpoint.iterdir()) == ["meta.json", *shards]
    loaded = load_shards(run, read)
    for rank, own in enumerate(loaded):
        assert_same_bits(own, state(4).take(torch.tensor(np.array_split(np.arange(CLIENTS), read)[rank])))
    assert_same_bits(tracking.load_checkpoint(run), state(4))


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
            with tracking._written_together(run / "checkpoints" / "round-000010", group):
                raise RunError("no room")
        tracking.save_checkpoint(run, part(state(10), group), 2, share(group), group)

    with pytest.raises((RunError, BrokenBarrierError)):
        in_threads(3, fail)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["round-000005"]
    assert [own.round for own in load_shards(run, 3)] == [5] * 3


def test_processes_write_the_adapters_that_one_would(run: Path, tmp_path: Path) -> None:
    other = create(tmp_path / "other")
    tracking.export_all(run, state(1), range(CLIENTS))
    in_threads(2, lambda group: tracking.export_all(other, part(state(1), group), share(group), group))
    files, theirs = everything(other / "adapters"), everything(run / "adapters")
    assert files.keys() == theirs.keys()
    assert all(data == theirs[name] for name, data in files.items() if "average" not in name)
    name = "average/adapter_model.safetensors"
    for tensor, x in load_file(run / "adapters" / name).items():
        torch.testing.assert_close(load_file(other / "adapters" / name)[tensor], x)


def test_a_run_without_checkpoints_has_none(run: Path) -> None:
    assert tracking.load_checkpoint(run) is None


def test_the_newest_checkpoints_are_kept(run: Path) -> None:
    for t in (1, 2, 10, 11):
        tracking.save_checkpoint(run, state(t), 2, range(CLIENTS))
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["round-000010", "round-000011"]
    assert_same_bits(tracking.load_checkpoint(run), state(11))


def test_of_older_checkpoints_those_stay_whose_ages_reach_back_over_the_whole_run(run: Path) -> None:
    for keep in (3, 8):
        held: list[int] = []
        for t in range(1, 1001):
            held = sorted(tracking._thinned([t, *held], keep), reverse=True)
            assert held[:2] == [t, t - 1][: len(held)]
            assert (len(held), held[-1]) == (min(t, keep), 1)
        ages = [1000 - t for t in held[1:]]
        assert keep == 3 or all(older <= 10 * newer for newer, older in pairwise(ages))
    for t in range(1, 9):
        tracking.save_checkpoint(run, state(t), 4, range(CLIENTS))
    assert sorted(folder.name[-1] for folder in (run / "checkpoints").iterdir()) == ["1", "6", "7", "8"]
    assert_same_bits(tracking.load_checkpoint(run, before=7), state(6))
    assert tracking.load_checkpoint(run, before=1) is None


def test_a_checkpoint_that_a_killed_process_left_unfinished_is_cleared_away(run: Path) -> None:
    (run / "checkpoints" / ".round-000003-x7").mkdir(parents=True)
    (run / "checkpoints" / ".round-000003-x7" / "state-000.safetensors").write_bytes(b"half")
    assert tracking.load_checkpoint(run) is None
    tracking.save_checkpoint(run, state(4), 2, range(CLIENTS))
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["round-000004"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    run: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    for t in (5, 10):
        tracking.save_checkpoint(run, state(t), 2, range(CLIENTS))
    damage(run / "checkpoints" / "round-000010", how)
    with caplog.at_level(logging.WARNING):
        assert_same_bits(tracking.load_checkpoint(run, like=state(0)), state(5))
    (warning,) = caplog.messages
    assert "round-000010 is damaged and passed over" in warning


def test_a_run_with_nothing_but_damaged_checkpoints_is_refused(run: Path) -> None:
    for t, how in ((5, "a flipped bit"), (10, "no meta")):
        tracking.save_checkpoint(run, state(t), 2, range(CLIENTS))
        damage(run / "checkpoints" / f"round-{t:06d}", how)
    with pytest.raises(RunError, match=r"one/checkpoints: every checkpoint is damaged; restore one, or start again"):
        tracking.load_checkpoint(run)
    assert tracking.load_checkpoint(run, before=11) is None, "who goes back takes the start instead"


@pytest.mark.parametrize(
    ("like", "complaint"),
    [
        (state(0, r=4), r"enc\.q\.A is \(3, 2, 6\) where the recipe makes \(3, 4, 6\)"),
        (State(state(0).adapters, {}, 0), r"is \(.*\) where the recipe makes None"),
        (
            State(state(0).adapters | {"x.A": torch.zeros(3, 1)}, state(0).moments, 0),
            r"x\.A is None where the recipe makes \(3, 1\)",
        ),
    ],
)
def test_a_checkpoint_of_other_shapes_is_refused(run: Path, like: State, complaint: str) -> None:
    tracking.save_checkpoint(run, state(4), 2, range(CLIENTS))
    with pytest.raises(RunError, match="resume with the run's own recipe") as caught:
        tracking.load_checkpoint(run, like=like)
    caught.match(complaint)


def test_records_come_back_as_they_were(run: Path) -> None:
    evaluated = record(1, Evaluation("accuracy", [0.5, 0.25, 1.0], 0.75, 4, [0.5, 0.5, 1.0]))
    tracking.append(run, record(0))
    tracking.append(run, evaluated)
    first, second = tracking.records(run)
    assert first["loss"] == [0.1, 1 / 3, 2e-9]
    assert first["failed_edges"] == [[0, 2]]
    assert first["evaluation"] is None
    assert "state" not in first
    assert second["evaluation"] == {
        "metric": "accuracy",
        "clients": [0.5, 0.25, 1.0],
        "average": 0.75,
        "rows": 4,
        "top_share": [0.5, 0.5, 1.0],
    }


def crowded(round: int) -> RoundRecord:
    """Return a record of 1,500 clients."""
    draw = np.random.default_rng(round)
    clients = list(range(1500))
    values: list[list[float]] = draw.random((5, 1500)).tolist()
    return replace(
        record(round, Evaluation("accuracy", values[0], 0.75, 4, values[1])),
        clients=clients,
        loss=values[2],
        grad_norm=values[3],
        bytes_sent=[8] * 1500,
        neighbours=draw.integers(9, size=1500).tolist(),
        edges=[(i, i + 1) for i in range(1499)],
        out_of_phase=[4, 1203],
        neighbourhood_cross_term=values[4],
    )


def test_long_lists_of_a_record_lie_beside_its_line_and_come_back_as_they_were(run: Path) -> None:
    for t in range(3):
        tracking.append(run, crowded(t))
    whole = [json.loads(json.dumps({**asdict(replace(crowded(t), state=None))})) for t in range(3)]
    assert tracking.records(run) == [{name: x for name, x in one.items() if name != "state"} for one in whole]
    lines = (run / "rounds.jsonl").read_text().splitlines()
    assert max(map(len, lines)) < 1500
    said = json.loads(lines[2])
    assert (said["clients"], said["edges"], said["out_of_phase"]) == (1500, 1499, [4, 1203])
    assert said["loss"] == pytest.approx(np.mean(crowded(2).loss))
    assert said["evaluation"]["clients"] == pytest.approx(np.mean(whole[2]["evaluation"]["clients"]))
    part = tracking.records(run, ["evaluation.clients"])[1]
    assert (part["loss"], part["evaluation"]["clients"]) == (
        pytest.approx(np.mean(crowded(1).loss)),
        whole[1]["evaluation"]["clients"],
    )
    tracking.rewind(run, 2)
    assert (run / "rounds.jsonl").read_text().splitlines() == lines[:2]
    tracking.append(run, crowded(2))
    assert (run / "rounds.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("damage", [None, b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_round_whose_long_lists_are_damaged_is_left_out_with_a_warning(
    run: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    for t in range(3):
        tracking.append(run, crowded(t))
    file = run / "rounds" / "round-000001.safetensors"
    file.unlink()
    if damage is not None:
        file.write_bytes(damage)
    assert [found["round"] for found in tracking.records(run)] == [0, 2]
    assert caplog.messages == [f"{run}/rounds: round 1 is missing or damaged and left out; restore it"]


def test_a_disk_that_fills_up_at_long_lists_leaves_no_line(run: Path) -> None:
    tracking.append(run, crowded(0))
    before = everything(run)
    with no_room(1000), pytest.raises(RunError, match=r"round-000001\.safetensors: can't be written"):
        tracking.append(run, crowded(1))
    assert everything(run) == before


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_a_last_line_that_was_cut_off_is_no_record(run: Path, cut: int) -> None:
    tracking.append(run, record(0))
    with (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": 1, "loss": [0.5] * 20})[:cut])
    assert [found["round"] for found in tracking.records(run)] == [0]
    tracking.rewind(run, 1)
    tracking.append(run, record(1))
    assert [found["round"] for found in tracking.records(run)] == [0, 1]


@pytest.mark.parametrize(
    "damaged", ['{"round": 1, "lo', "", "5", "null", "{}", "[[1, 2]]", '{"round": 7}', '{"round": 1}', "\0\0\0"]
)
def test_a_damaged_line_is_left_out_with_a_warning_and_nothing_goes_on_from_it(
    run: Path, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    for t in range(3):
        tracking.append(run, record(t))
    lines = (run / "rounds.jsonl").read_text().splitlines()
    (run / "rounds.jsonl").write_text("\n".join([lines[0], damaged, lines[2]]) + "\n")
    with caplog.at_level(logging.WARNING):
        found = tracking.records(run)
    assert [record["round"] for record in found] == [0, 2]
    (warning,) = caplog.messages
    assert warning.endswith("rounds.jsonl: line 2 is damaged and left out; restore the file")
    with pytest.raises(RunError, match=r"rounds\.jsonl: has no record of round 1, which the checkpoint round-000003"):
        tracking.rewind(run, 3)
    tracking.rewind(run, 1)
    assert [record["round"] for record in tracking.records(run)] == [0]


def test_a_line_of_a_version_with_fewer_fields_has_their_defaults_and_one_with_more_keeps_them(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking.append(run, record(0, Evaluation("accuracy", [0.5] * CLIENTS, 0.5, 9, [0.4] * CLIENTS)))
    line = json.loads((run / "rounds.jsonl").read_text())
    fewer = {key: value for key, value in line.items() if key != "evaluation"} | {"round": 1}
    more = line | {"round": 2, "weather": ["fair"], "evaluation": line["evaluation"] | {"error": [0.1]}}
    (run / "rounds.jsonl").write_text("".join(json.dumps(values) + "\n" for values in (line, fewer, more)))
    assert tracking.records(run) == [line, fewer | {"evaluation": None}, more]
    before = (run / "rounds.jsonl").read_text()
    tracking.rewind(run, 3)
    assert (run / "rounds.jsonl").read_text() == before
    assert not caplog.messages


@pytest.mark.parametrize(
    ("of", "first"),
    [
        (
            RoundRecord,
            "round train send clients loss grad_norm bytes_sent neighbours edges failed_edges out_of_phase "
            "neighbourhood_cross_term diagnostics seconds",
        ),
        (Evaluation, "metric clients average rows top_share"),
    ],
)
def test_a_field_of_a_record_that_the_first_version_lacked_has_a_default(of: Any, first: str) -> None:
    needed = [field.name for field in fields(of) if field.default is field.default_factory is MISSING]
    assert needed == first.split()


def test_what_is_no_run_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(RunError, match=r"no readable rounds\.jsonl; give the folder of a run"):
            tracking.records(folder)


@pytest.mark.parametrize("to", [0, 1, 3, 5])
def test_rewinding_forgets_the_rounds_that_will_be_made_again(run: Path, to: int) -> None:
    for t in range(5):
        tracking.append(run, record(t))
    before = (run / "rounds.jsonl").read_text().splitlines()
    tracking.rewind(run, to)
    assert (run / "rounds.jsonl").read_text().splitlines() == before[:to]
    assert sorted(file.name for file in run.iterdir() if file.name.startswith(".")) == []


def test_rewinding_to_a_round_whose_records_are_lost_is_refused(run: Path) -> None:
    tracking.append(run, record(0))
    with pytest.raises(
        RunError, match=r"rounds\.jsonl: has no record of round 1, which the checkpoint round-000003 follows; restore"
    ):
        tracking.rewind(run, 3)


def test_a_new_run_holds_what_was_asked_and_where_it_runs(run: Path) -> None:
    assert (run / "recipe.yaml").read_text(encoding="utf-8") == "# naïve\nrounds: 3\n"
    assert (run / "resolved.yaml").read_text() == "rounds: 3\n"
    assert json.loads((run / "environment.json").read_text()) == {"torch": "2"}
    assert json.loads((run / "facts.json").read_text()) == {"format": tracking.FORMAT, "graph": {"rho": 0.5}}
    assert tracking.records(run) == []
    assert [path.name for path in run.parent.iterdir()] == ["one"]


def test_only_one_process_at_a_time_works_on_a_run(run: Path) -> None:
    code = f"""
from pathlib import Path
from peertune.runs import tracking
with tracking.locked(Path({str(run)!r})):
    print("in")
"""
    with tracking.locked(run):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.stdout == ""
        assert other.stderr.splitlines()[-1].endswith(
            f"{run}: another process is at work on this run; wait for it, or stop it"
        )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "in\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_file(file, b"before")
    with no_room(100), pytest.raises(RunError, match=r"report\.html: can't be written \(File too large\)"):
        write_file(file, b"x" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert file.read_bytes() == b"before"


def test_an_empty_folder_may_become_a_run_and_a_used_one_may_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    create(tmp_path / "empty")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("used", "file", "empty"):
        with pytest.raises(RunError, match=f"{name}: is there already; give another --out, or go on with --resume"):
            create(tmp_path / name)
    assert (tmp_path / "used" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", tmp_path / "file" / "deep" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(RunError, match=r"can't be written \(.*\); give one you can write to, with room") as caught:
            create(folder)
        assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_that_fails_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        create(tmp_path / "run", environment={"what JSON can't hold": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_a_run_is_made_leaves_nothing(tmp_path: Path) -> None:
    with no_room(2000), pytest.raises(RunError, match=r"run: can't be written \(.*\); give one .* with room"):
        create(tmp_path / "run", head={"out.weight": torch.ones(5000)})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_at_a_checkpoint_leaves_the_one_before(run: Path) -> None:
    tracking.save_checkpoint(run, state(1), 1, range(CLIENTS))
    before = everything(run)
    with no_room(100), pytest.raises(RunError, match=r"round-000002: can't be written \(File too large\)"):
        tracking.save_checkpoint(run, state(2), 1, range(CLIENTS))
    assert everything(run) == before
    assert_same_bits(tracking.load_checkpoint(run), state(1))


def test_a_disk_that_fills_up_at_a_record_leaves_a_run_that_goes_on(run: Path) -> None:
    tracking.append(run, record(0))
    size = (run / "rounds.jsonl").stat().st_size
    with no_room(size + 20), pytest.raises(RunError, match=r"rounds\.jsonl: can't be written \(File too large\)"):
        tracking.append(run, record(1))
    assert [found["round"] for found in tracking.records(run)] == [0]
    before = everything(run)
    with no_room(10), pytest.raises(RunError, match=r"rounds\.jsonl: can't be written"):
        tracking.rewind(run, 1)
    assert everything(run) == before
    tracking.rewind(run, 1)
    tracking.append(run, record(1))
    assert [found["round"] for found in tracking.records(run)] == [0, 1]


def test_a_disk_that_fills_up_while_adapters_are_written_leaves_those_before(run: Path) -> None:
    tracking.export_all(run, state(1), range(CLIENTS))
    before = everything(run)
    with no_room(200), pytest.raises(RunError, match=r"adapters: can't be written"):
        tracking.export_all(run, state(2), range(CLIENTS))
    assert everything(run) == before
    with no_room(200), pytest.raises(RunError, match=r"mine: can't be written"):
        export(run, state(2), 0, run / "mine")
    assert everything(run) == before


def test_all_adapters_are_written_in_pefts_format(run: Path) -> None:
    tracking.export_all(run, state(1), range(CLIENTS))
    names = [f"client-{client:03d}" for client in range(CLIENTS)]
    assert sorted(folder.name for folder in (run / "adapters").iterdir()) == ["average", *names]
    expected = state(1).adapters
    for client, name in enumerate(names):
        tensors = load_file(run / "adapters" / name / "adapter_model.safetensors")
        assert torch.equal(tensors["base_model.model.enc.q.lora_A.weight"], expected["enc.q.A"][client])
        assert torch.equal(tensors["base_model.model.enc.q.lora_B.weight"], expected["enc.q.B"][client])
        assert torch.equal(tensors["base_model.model.out.weight"], expected["out.weight.head"][client])
        assert torch.equal(tensors["base_model.model.out.bias"], torch.ones(5))
    average = load_file(run / "adapters" / "average" / "adapter_model.safetensors")
    assert torch.equal(average["base_model.model.enc.q.lora_A.weight"], expected["enc.q.A"].mean(0))
    assert LoraConfig.from_pretrained(str(run / "adapters" / "average")).r == 2


def test_exporting_one_client_gives_what_the_run_wrote(run: Path, tmp_path: Path) -> None:
    tracking.export_all(run, state(1), range(CLIENTS))
    for client, name in ((2, "client-002"), (None, "average")):
        export(run, state(1), client, tmp_path / "to" / name)
        assert everything(tmp_path / "to" / name) == everything(run / "adapters" / name)


def test_a_client_that_is_not_there_and_a_folder_that_is_are_refused(run: Path, tmp_path: Path) -> None:
    for client in (3, -1):
        with pytest.raises(RunError, match=f"client {client}: the run has clients 0 to 2"):
            export(run, state(1), client, tmp_path / "to")
    for name in ("folder", "file"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "file").write_text("mine")
        with pytest.raises(RunError, match=f"{name}: is there already; give another folder"):
            export(run, state(1), 0, tmp_path / name)
    with pytest.raises(RunError, match="can't be written"):
        export(run, state(1), 0, tmp_path / "file" / "to")
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("lost", ["head.safetensors", "adapter_config.json", "."])
def test_a_run_without_what_its_adapters_share_cannot_export(run: Path, tmp_path: Path, lost: str) -> None:
    target = run / "adapter" / lost
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(RunError, match=r"one/adapter: is missing or damaged; give the folder of a run"):
        export(run, state(1), 0, tmp_path / "to")
    assert not (tmp_path / "to").exists()
