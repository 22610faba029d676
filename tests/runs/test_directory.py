import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_directories import create, no_room

from peertune.errors import RunError
from peertune.runs import directory, records


def test_a_new_run_holds_what_was_asked_and_where_it_runs(run: Path) -> None:
    assert (run / "recipe.yaml").read_text(encoding="utf-8") == "# naïve\nrounds: 3\n"
    assert (run / "resolved.yaml").read_text() == "rounds: 3\n"
    assert json.loads((run / "environment.json").read_text()) == {"torch": "2"}
    assert json.loads((run / "facts.json").read_text()) == {"format": directory.FORMAT, "graph": {"rho": 0.5}}
    assert records.read(run) == []
    assert [path.name for path in run.parent.iterdir()] == ["one"]


def test_only_one_process_at_a_time_works_on_a_run(run: Path) -> None:
    code = f"""
from pathlib import Path
from peertune.runs import directory
with directory.locked(Path({str(run)!r})):
    print("in")
"""
    with directory.locked(run):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.stdout == ""
        assert other.stderr.splitlines()[-1].endswith(
            f"{run}: another process is at work on this run; wait for it, or stop it"
        )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "in\n"


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


def test_what_changed_where_a_run_goes_on_is_written_down_each_time_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    began = {"threads": 1, "torch": "2", "launch": "a"}
    file.write_text(json.dumps(began))
    assert directory.note_environment(tmp_path, 1, began | {"launch": "b", "cpu_capability": "AVX2"}) == {}
    assert json.loads(file.read_text()) == began
    assert directory.note_environment(tmp_path, 2, began | {"threads": 2}) == {"threads": 2}
    assert directory.note_environment(tmp_path, 3, began | {"threads": 2}) == {}
    assert directory.note_environment(tmp_path, 4, began) == {"threads": 1}
    assert json.loads(file.read_text()) == began | {"resumed": [{"round": 2, "threads": 2}, {"round": 4, "threads": 1}]}
