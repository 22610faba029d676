"""What `make same` finds in the runs of two sides, and what `make slower` makes of their seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import slower
from benchmarks.same import difference

Keep = Callable[..., Path]
A = torch.linspace(-1, 1, 6).view(1, 2, 3)


@pytest.fixture
def keep(tmp_path: Path) -> Keep:
    def keep(side: str, adapter: Tensor = A, last: Tensor = A, **fields: object) -> Path:
        """Keep a run of two records: an adapter, an older checkpoint, the last one."""
        parts = {
            "adapters/client-000": adapter,
            "checkpoints/round-000009": A + len(side),
            "checkpoints/round-000010": last,
        }
        for part, x in parts.items():
            (tmp_path / side / "0" / part).mkdir(parents=True)
            save_file({"q.A": x, "q.B": A + 1}, tmp_path / side / "0" / part / "it.safetensors")
        records = [{"round": 0, "loss": [2.5]}, {"round": 1, "loss": [1.5], "seconds": len(side), **fields}]
        (tmp_path / side / "0/rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path / side

    return keep


def test_runs_that_differ_only_in_seconds_new_fields_and_older_checkpoints_are_the_same(keep: Keep) -> None:
    told = {"clients": [0.5], "average": None}
    assert difference(keep("old", gone=1, evaluation=told), keep("newer", come=2, evaluation={**told, "own": []})) == ""
    assert difference(keep("a", evaluation=told), keep("b", evaluation={**told, "clients": [1.0]})) == (
        "0/rounds.jsonl: round 1: evaluation.clients: [0.5] in the old, [1.0] in the new"
    )


def test_one_bit_of_one_value_is_a_difference(keep: Keep) -> None:
    bits = A.clone().view(torch.int32)
    bits[0, 1, 2] ^= 1
    assert difference(keep("old"), keep("new", bits.view(torch.float32))) == (
        "0/adapters/client-000/it.safetensors: q.A: 1 of 6 values, by 1.2e-07 at most"
    )


def test_the_sign_of_zero_and_what_is_no_number_are_compared_by_their_bits(keep: Keep) -> None:
    zero, nan = torch.zeros(2), torch.full((2,), torch.nan)
    assert difference(keep("old", zero), keep("new", -zero)).endswith(": 2 of 2 values, by 0 at most")
    assert difference(keep("a", nan), keep("b", nan)) == ""


def test_tensors_of_another_form_or_name_and_another_checkpoint_are_told(keep: Keep, tmp_path: Path) -> None:
    old, new = keep("old"), keep("new", last=A[0].double())
    assert difference(old, new) == (
        "0/checkpoints/round-000010/it.safetensors: q.A: "
        "torch.float32 [1, 2, 3] in the old, torch.float64 [2, 3] in the new"
    )
    (new / "0/checkpoints/round-000010").rename(new / "0/checkpoints/round-000011")
    assert difference(old, new) == "0/checkpoints/round-000010/it.safetensors: q.A: is only in the old"
    assert difference(new, old) == "0/checkpoints/round-000011/it.safetensors: q.A: is only in the old"


def test_a_field_that_both_have_and_a_record_that_one_lacks_are_told(keep: Keep) -> None:
    old, new = keep("old"), keep("new", loss=[1.25])
    assert difference(old, new) == "0/rounds.jsonl: round 1: loss: [1.5] in the old, [1.25] in the new"
    records = new / "0/rounds.jsonl"
    records.write_text(records.read_text().splitlines(keepends=True)[0])
    assert difference(old, new) == "0/rounds.jsonl: records: 2 in the old, 1 in the new"


def test_where_there_is_no_run_nothing_is_called_the_same(keep: Keep, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: holds no run"):
        difference(tmp_path / "empty", keep("new"))
    with pytest.raises(FileNotFoundError, match="empty: holds no run"):
        difference(keep("old"), tmp_path / "empty")


@pytest.mark.parametrize(("count", "places"), [(20, (5, 14)), (10, (1, 8)), (6, (0, 5)), (2, (0, 1))])
def test_the_interval_of_a_median_has_the_ranks_of_the_binomial_table(count: int, places: tuple[int, int]) -> None:
    assert slower.interval(count) == places


@pytest.mark.parametrize(("times", "found"), [(1.0, False), (1.02, False), (1.1, True)])
def test_what_takes_longer_in_most_turns_is_slower(
    times: float, found: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sides: list[Any] = ["old", "new"]

    def action(side: Any, turn: int) -> float:
        if turn == 0:
            return 100.0 if side == "new" else 1.0  # warming up, which doesn't count
        return (2.0 + turn / 10) * (times if side == "new" and turn not in (3, 7) else 1.0)

    assert slower.judged("a step", sides, action, 20) == found
    assert capsys.readouterr().out.startswith(f"a step                    {times:.3f} (")
