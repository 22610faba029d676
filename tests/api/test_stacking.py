"""Runs of a stack in their directories, held against `peertune.run`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sweeping import assert_same

import peertune
from peertune.api.stacking import Asked, run_together
from peertune.recipe import load_recipe
from peertune.rounds.record import RoundRecord

WORDS = (
    "model.dtype=float64",
    "clients=4",
    "rounds=6",
    "training={local_steps: 1, per_device_train_batch_size: 2, learning_rate: 1e-2}",
    "evaluate={every: 2, rows: 8}",
    "checkpoint={every: 2, keep: 2}",
    "partition={name: iid}",
)
SEEDS = ("seed=0", "seed=3")


def asked(folder: Path, *runs: str, **more: tuple[str, ...]) -> dict[str, Asked]:
    named = {word: (*WORDS, word) for word in runs} | {name: (*WORDS, *words) for name, words in more.items()}
    return {
        name: Asked("digits-demo", words, load_recipe("digits-demo", words), folder / name)
        for name, words in named.items()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for seed in SEEDS:
        peertune.run("digits-demo", (*WORDS, seed), out=folder / seed)
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, alone: Path) -> None:
    """A run's directory has the files of the run alone, and the same in them, up to rounding."""
    files = sorted(str(path.relative_to(alone)) for path in alone.rglob("*"))
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == files
    for name in files:
        ours, theirs = run / name, alone / name
        if ours.suffix == ".safetensors":
            tensors, expected = load_file(ours), load_file(theirs)
            assert tensors.keys() == expected.keys()
            for key, x in expected.items():
                assert tensors[key].numpy() == pytest.approx(x.numpy(), rel=1e-6, abs=1e-9), (name, key)
        elif ours.name == "rounds.jsonl":
            assert_same(lines(run), lines(alone))
        elif ours.is_file() and ours.name not in ("meta.json", "environment.json", ".lock"):
            assert ours.read_bytes() == theirs.read_bytes(), name


def test_each_run_of_a_stack_leaves_the_directory_of_the_run_alone_and_goes_on_as_one(
    alone: Path, tmp_path: Path
) -> None:
    told: list[int] = []
    assert run_together(asked(tmp_path, *SEEDS), lambda record: told.append(record.round)) == {}
    assert sorted(told) == sorted([*range(6)] * 2)
    for seed in SEEDS:
        assert_same_run(tmp_path / seed, alone / seed)
    assert len(peertune.resume(tmp_path / SEEDS[1], ["rounds=7"]).records) == 7


def test_a_stack_that_was_stopped_or_killed_midway_goes_on_to_the_same(alone: Path, tmp_path: Path) -> None:
    told: list[RoundRecord] = []
    with pytest.raises(KeyboardInterrupt):
        run_together(asked(tmp_path, *SEEDS), told.append, lambda: len(told) >= 2 * 3)
    assert {len(lines(tmp_path / seed)) for seed in SEEDS} == {3}
    assert {path.name for path in (tmp_path / SEEDS[0] / "checkpoints").iterdir()} == {"round-000002", "round-000003"}
    shutil.rmtree(tmp_path / SEEDS[1] / "checkpoints" / "round-000003")  # as if it had been killed before the second's
    assert run_together(asked(tmp_path, *SEEDS)) == {}
    for seed in SEEDS:
        assert_same(lines(tmp_path / seed), lines(alone / seed))
        shutil.rmtree(tmp_path / seed / "adapters")  # as if it had been killed before it wrote them
    assert run_together(asked(tmp_path, *SEEDS)) == {}
    for seed in SEEDS:
        assert (tmp_path / seed / "adapters" / "average").is_dir()


def test_a_run_that_fails_at_any_time_leaves_the_stack_and_the_others_end_as_alone(alone: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    runs = asked(
        tmp_path,
        *SEEDS,
        diverging=("training.learning_rate=1e300",),
        unmade=("partition={name: shards, per_client: 10000}",),
        taken=("seed=7",),
    )
    failed = run_together(runs)
    assert {name: str(error).partition(":")[0] for name, error in failed.items()} == {
        "diverging": "training",
        "unmade": "partition shards",
        "taken": str(tmp_path / "taken"),
    }
    assert not (tmp_path / "unmade").exists()
    for seed in SEEDS:
        assert_same_run(tmp_path / seed, alone / seed)


def test_what_was_begun_with_other_settings_is_gone_on_with_alone(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(peertune.Stopped):
        peertune.run("digits-demo", (*WORDS, SEEDS[0], "lora.r=2"), out=tmp_path / SEEDS[0], each=lambda _: True)
    assert run_together(asked(tmp_path, *SEEDS)) == {}
    assert peertune.Run.open(tmp_path / SEEDS[0]).recipe["lora"]["r"] == 2
    assert_same_run(tmp_path / SEEDS[1], alone / SEEDS[1])
