"""Runs that end early."""

import json
from math import nan
from pathlib import Path
from typing import Any

import pytest

from peertune import build, load_recipe, resume, run
from peertune.cli.running import print_summary
from peertune.errors import RecipeError, RunError, Stopped
from peertune.rounds.patience import RanOut, ended_early
from peertune.runs import checkpoints
from peertune.sweeps.grid import finished


def records(scores: dict[int, list[float]], metric: str = "accuracy") -> list[dict[str, Any]]:
    """Records of the rounds up to the last that was evaluated."""
    said = {t: {"metric": metric, "clients": clients} for t, clients in scores.items()}
    return [{"round": t, "evaluation": said.get(t)} for t in range(max(scores) + 1)]


@pytest.mark.parametrize(
    ("scores", "patience", "found"),
    [
        ({1: [0.5], 3: [0.5], 5: [0.4]}, 2, RanOut(5, 1)),
        ({1: [0.5], 3: [0.5], 5: [0.4]}, 3, None),
        ({1: [0.5], 3: [0.5], 5: [0.4]}, None, None),
        ({1: [0.5], 3: [0.4], 5: [0.51]}, 2, None),
        ({1: [0.2, 0.6], 3: [0.9, 0.0], 5: [0.3, 0.5]}, 1, RanOut(5, 3)),
        ({1: [0.5], 3: [0.4], 4: [0.4]}, 2, None),  # 4 was evaluated as the last round alone
        ({1: [nan], 3: [0.1], 5: [nan]}, 1, RanOut(5, 3)),
    ],
)
def test_patience_runs_out_after_so_many_evaluations_without_a_better_mean(
    scores: dict[int, list[float]], patience: int | None, found: RanOut | None
) -> None:
    assert ended_early(records(scores), {"every": 2, "patience": patience}) == found


def test_of_perplexity_less_is_better() -> None:
    falls = records({1: [9.0], 3: [8.0], 5: [7.0]}, "perplexity")
    assert ended_early(falls, {"every": 2, "patience": 1}) is None
    assert ended_early(records({1: [9.0], 3: [9.5]}, "perplexity"), {"every": 2, "patience": 1}) == RanOut(3, 1)


IDLE = [  # nothing is learnt, so no score improves
    "clients=3",
    "partition={name: iid}",
    "training={learning_rate: 1e-12, local_steps: 1, per_device_train_batch_size: 2}",
    "evaluate={every: 2, rows: 20, patience: 2}",
    "checkpoint.every=4",
]


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [record | {"seconds": None} for record in found]


@pytest.mark.thorough
def test_a_run_ends_early_stays_so_and_goes_on_where_it_is_given_patience(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = run("digits-demo", [*IDLE, "rounds=12"], out=tmp_path / "early").folder
    assert [record["round"] for record in lines(early)] == list(range(6))
    assert (early / "adapters" / "client-002").is_dir()
    print_summary(early, as_json=False)
    assert "ended early, after 6 rounds: no evaluation since that after 2 had a better mean" in capsys.readouterr().out
    assert finished(early, load_recipe("digits-demo", [*IDLE, "rounds=12"]))
    before = lines(early), (early / "adapters" / "average" / "adapter_model.safetensors").read_bytes()
    for more in ([], ["rounds=16"]):
        resume(early, more)
        assert (lines(early), (early / "adapters" / "average" / "adapter_model.safetensors").read_bytes()) == before
    with pytest.raises(RunError, match=r"was run with evaluate\.every: 2, not 3; resume"):
        resume(early, ["evaluate.every=3"])
    resume(early, ["evaluate.patience=null"])
    whole = run("digits-demo", [*IDLE, "rounds=16", "evaluate.patience=null"], out=tmp_path / "whole").folder
    assert lines(early) == lines(whole)
    states = [checkpoints.load(folder) for folder in (early, whole)]
    assert states[0] is not None
    assert states[1] is not None
    assert all((x == states[1].adapters[name]).all() for name, x in states[0].adapters.items())


@pytest.mark.thorough
def test_a_run_that_was_stopped_counts_on_when_it_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run("digits-demo", [*IDLE, "rounds=12"], out=tmp_path / "run", each=lambda record: record.round == 4)
    resume(tmp_path / "run")
    assert len(lines(tmp_path / "run")) == 6


def test_peers_refuse_patience() -> None:
    with pytest.raises(RecipeError, match="a peer that stops early leaves its neighbours' edges to fail"):
        build(load_recipe("digits-demo", [*IDLE, "rounds=2"]), [1])
