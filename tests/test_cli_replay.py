"""The command `replay`, on the run of a peer that met nobody, and on what can't be replayed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from federation import found

from peertune.api.peering import Peer, take_part
from peertune.errors import Exit, RecipeError
from peertune.runs import checkpoints

Call = Callable[..., tuple[int, str, str]]
SMALL = [
    "clients=2",
    "rounds=2",
    "partition={name: iid}",
    "graph={name: complete, activation: 1.0}",
    "lora={r: 2, lora_alpha: 4, target_modules: [q_proj]}",
    "training={local_steps: 1, per_device_train_batch_size: 2}",
    "evaluate={every: 2, rows: 4}",
    "network.patience_s=1",
]
WITHOUT_ROUNDS = [*SMALL, "time={mode: asynchronous}"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a peer's run, and `peer` and `roster` with which it was made."""
    folder = tmp_path_factory.mktemp("alone")
    made = found(folder, 2)
    _, end = take_part("digits-demo", WITHOUT_ROUNDS, out=folder / "run", peer=Peer(made.peer(0), made.roster))
    assert end == Exit.ALONE
    return folder


def test_what_a_peer_did_is_compared_with_what_it_holds(peertune: Call, alone: Path) -> None:
    run = alone / "run"
    code, out, err = peertune("replay", run)
    assert (code, err) == (0, "")
    assert out == "peer-0  the same, apart by 0.0e+00 at most; 2 rounds, started once\n"
    state = checkpoints.load(run)
    assert state is not None
    (name, x), *_ = state.adapters.items()
    changed = replace(state, adapters=state.adapters | {name: x + 1e-3})
    checkpoints.save(run, changed, 6, [0])
    code, out, _ = peertune("replay", run, "--json")
    (peer,) = json.loads(out)["peers"]
    assert (code, peer["client"], peer["rounds"], peer["same"]) == (1, 0, 2, False)
    assert peer["apart"] == pytest.approx(1e-3, rel=1e-2)
    code, out, _ = peertune("replay", "--own", run, "--within", "0.01")
    assert (code, out[:16]) == (0, "peer-0  the same")
    assert peertune("replay", run)[1].startswith("peer-0  ANOTHER ADAPTER, apart by 1.0e-03")
    checkpoints.save(run, state, 6, [0])


def test_who_can_only_dial_out_is_pushed_nothing_and_refused(tmp_path: Path) -> None:
    made = found(tmp_path, 2, silent=[0])
    with pytest.raises(RecipeError, match=r"time\.mode: without rounds others push to peer-0, which has no address"):
        take_part("digits-demo", WITHOUT_ROUNDS, out=tmp_path / "run", peer=Peer(made.peer(0), made.roster))
    assert not (tmp_path / "run").exists()


def test_what_can_not_be_replayed_is_said_in_a_line(peertune: Call, alone: Path, tmp_path: Path) -> None:
    run = alone / "run"

    def refused(*words: str | Path) -> str:
        code, out, err = peertune("replay", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    assert "replay: two of these are runs of one client" in refused(run, run)
    assert "replay: --own is for one party's run" in refused(run, run, "--own")
    assert "nowhere: is no run" in refused("nowhere")
    assert peertune("run", "digits-demo", *SMALL, "--out", "simulated")[0] == 0
    assert "simulated: is a simulation, which peertune run makes again" in refused("simulated")
    made = found(tmp_path / "made", 2)
    take_part("digits-demo", SMALL, out="by-rounds", peer=Peer(made.peer(1), made.roster))
    assert "by-rounds: its peers went by rounds" in refused("by-rounds")
    take_part("digits-demo", [*WITHOUT_ROUNDS, "seed=3"], out="other", peer=Peer(made.peer(1), made.roster))
    assert f"differs from {run} in seed; give runs of one recipe" in refused(run, "other")
    facts = Path("other/facts.json")
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"own_rows": True}))
    assert "other: has rows of its own (--data), which nobody else has" in refused("other")
    Path("other/mixed.jsonl").unlink()
    assert "other: has no readable mixed.jsonl" in refused("other", "--own")
    peer = Peer(made.peer(1), made.roster, keep_messages=True)
    with pytest.raises(RecipeError, match=r"--keep-messages: is for time\.mode=asynchronous"):
        take_part("digits-demo", SMALL, out="kept", peer=peer)
    assert not Path("kept").exists()
