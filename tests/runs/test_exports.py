import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from run_directories import CLIENTS, create, everything, in_threads, no_room, part, share, state
from safetensors.torch import load_file

from peertune.errors import RunError
from peertune.rounds import best
from peertune.rounds.record import Evaluation
from peertune.runs import exports
from peertune.types import State


def export(run: Path, state: State, client: int | None, to: Path) -> None:
    with exports.written(run, state, client, to):
        pass


def test_processes_write_the_adapters_that_one_would(run: Path, tmp_path: Path) -> None:
    other = create(tmp_path / "other")
    exports.write_all(run, state(1), range(CLIENTS))
    in_threads(2, lambda group: exports.write_all(other, part(state(1), group), share(group), group))
    files, theirs = everything(other / "adapters"), everything(run / "adapters")
    assert files.keys() == theirs.keys()
    assert all(data == theirs[name] for name, data in files.items() if "average" not in name)
    name = "average/adapter_model.safetensors"
    for tensor, x in load_file(run / "adapters" / name).items():
        torch.testing.assert_close(load_file(other / "adapters" / name)[tensor], x)


def test_a_disk_that_fills_up_while_adapters_are_written_leaves_those_before(run: Path) -> None:
    exports.write_all(run, state(1), range(CLIENTS))
    before = everything(run)
    with no_room(200), pytest.raises(RunError, match=r"adapters: can't be written"):
        exports.write_all(run, state(2), range(CLIENTS))
    assert everything(run) == before
    with no_room(200), pytest.raises(RunError, match=r"mine: can't be written"):
        export(run, state(2), 0, run / "mine")
    assert everything(run) == before


def test_all_adapters_are_written_in_pefts_format(run: Path) -> None:
    exports.write_all(run, state(1), range(CLIENTS))
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


def test_of_a_run_that_kept_them_clients_best_adapters_are_written_with_their_rounds(run: Path, tmp_path: Path) -> None:
    early, late = state(1), state(5)
    kept = replace(early, memory=best.begun({name: x.clone() for name, x in early.adapters.items()}))
    best.keep(kept, range(CLIENTS), Evaluation("accuracy", [0.5] * CLIENTS, None, 1, []), 0)
    now = replace(late, memory=kept.memory)
    best.keep(now, range(CLIENTS), Evaluation("accuracy", [0.4, 0.5, 0.6], None, 1, []), 4)
    exports.write_all(run, now, range(CLIENTS))
    for client, (of, t) in enumerate([(early, 0), (early, 0), (late, 4)]):
        folder = run / "adapters" / f"client-{client:03d}"
        written = load_file(folder / "adapter_model.safetensors")["base_model.model.enc.q.lora_A.weight"]
        assert torch.equal(written, of.adapters["enc.q.A"][client])
        assert json.loads((folder / "best.json").read_text()) == {"round": t}
        assert exports.rounds_behind(folder, now) == t + 1
    average = load_file(run / "adapters" / "average" / "adapter_model.safetensors")
    assert torch.equal(average["base_model.model.enc.q.lora_A.weight"], late.adapters["enc.q.A"].mean(0))
    export(run, now, 0, tmp_path / "best")
    assert everything(tmp_path / "best") == everything(run / "adapters" / "client-000")
    with exports.written(run, now, 0, tmp_path / "last", last=True) as (folder, _):
        assert exports.rounds_behind(folder, now) == 5
    last = load_file(tmp_path / "last" / "adapter_model.safetensors")
    assert torch.equal(last["base_model.model.enc.q.lora_A.weight"], late.adapters["enc.q.A"][0])


def test_exporting_one_client_gives_what_the_run_wrote(run: Path, tmp_path: Path) -> None:
    exports.write_all(run, state(1), range(CLIENTS))
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
