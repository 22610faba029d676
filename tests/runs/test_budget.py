"""What a peer has spent of its privacy, whatever it makes again."""

import json
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, found

from peertune.api.peering import Peer, take_part
from peertune.errors import RunError, Stopped
from peertune.privacy.accountant import epsilon
from peertune.runs import records
from peertune.runs.budget import FILE, Ledger

ALONE = [
    "clients=2",
    "rounds=4",
    "lora={r: 2, target_modules: [q_proj]}",
    "training={local_steps: 2, per_device_train_batch_size: 4}",
    "evaluate={every: 1, rows: 10}",
    "network.patience_s=0.1",
    "privacy={epsilon: 40, noise_multiplier: 1.0, delta: 1e-4}",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return found(tmp_path_factory.mktemp("two"), 2)


def take(made: Federation, out: Path, recipe: str | None = "digits-demo", **how: Any) -> list[dict[str, Any]]:
    peer = Peer(made.peer(0), made.roster, insecure_loopback=True)
    take_part(recipe, ALONE if recipe else [], out=out, peer=peer, **how)
    return records.read(out)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / FILE).read_text().splitlines()]


def of_steps(record: dict[str, Any], out: Path, steps: int) -> bool:
    (allowed,) = json.loads((out / "facts.json").read_text())["privacy"]["clients"]
    spent: list[float] = record["epsilon"]
    return spent == [epsilon(allowed["noise_multiplier"], allowed["rate"], steps, 1e-4)]


def test_a_round_that_is_made_again_from_the_same_state_is_spent_once_and_from_another_twice(
    made: Federation, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        take(made, out, each=lambda record: record.round == 1)
    secret = made.peer(0) / "secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert [line["round"] for line in lines(out)] == [0, 1]
    told = take(made, out, recipe=None)
    assert [line["round"] for line in lines(out)] == [0, 1, 2, 3]
    assert [of_steps(record, out, 2 * (record["round"] + 1)) for record in told] == [True] * 4
    before = lines(out)
    (out / "checkpoints" / "round-000004").rename(tmp_path / "lost")
    again = take(made, out, recipe=None)
    assert lines(out) == before
    assert again[-1]["epsilon"] == told[-1]["epsilon"]
    assert again[-1]["grad_norm"] == told[-1]["grad_norm"]  # the same noise, to the bit
    (out / "checkpoints" / "round-000004").rename(tmp_path / "lost-too")
    kept = secret.read_bytes()
    with (out / FILE).open("a") as file:
        file.write(json.dumps({"round": 3, "state": "00" * 16}) + "\n")  # a state that came to nothing
    other = take(made, out, recipe=None)
    assert of_steps(other[-1], out, 10)
    assert secret.read_bytes() == kept
    (out / "checkpoints" / "round-000004").rename(tmp_path / "lost-again")
    secret.unlink()
    with_another = take(made, out, recipe=None)
    assert of_steps(with_another[-1], out, 12)  # the last round has other noise, and so is spent again
    (out / "checkpoints" / "round-000004").rename(tmp_path / "lost-at-last")
    (out / FILE).unlink()
    with pytest.raises(RunError, match="is missing, so what was spent is not known"):
        take(made, out, recipe=None)


def test_a_peer_whose_ledger_is_damaged_or_can_t_be_written_does_not_train(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"round": 0}\n')
    with pytest.raises(RunError, match="what was spent is not known"):
        Ledger(tmp_path)
    (tmp_path / FILE).unlink()
    ledger = Ledger(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(RunError, match="can't be written"):
        ledger.begin(0, bytes(16))
    assert ledger.before(1, bytes(16)) == 0


def test_a_line_that_was_cut_off_is_of_a_round_that_was_not_begun(tmp_path: Path) -> None:
    Ledger(tmp_path).begin(0, bytes(16))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"round": 1, "sta')
    again = Ledger(tmp_path)
    assert (again.before(0, bytes(16)), again.before(0, bytes(15)), again.before(1, bytes(16))) == (0, 1, 1)
    again.begin(0, bytes(16))
    assert len(lines(tmp_path)) == 1
