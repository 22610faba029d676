import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from peertune.errors import RunError
from peertune.report.runs import find_runs, settings, varying


def write(folder: Path, **changed: object) -> Path:
    folder.mkdir(parents=True)
    recipe = {"seed": 0, "graph": {"name": "ring", "activation": 0.5}, "rounds": 3} | changed
    (folder / "resolved.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "facts.json").write_text(json.dumps({"graph": {"rho": 0.5}}))
    (folder / "environment.json").write_text("{}")
    (folder / "rounds.jsonl").touch()
    return folder


def test_a_folder_is_a_run_or_holds_some_at_any_depth(tmp_path: Path) -> None:
    for name in ("a", "deep/b", "deep/er/c", "deep/.half-written"):
        write(tmp_path / name)
    assert [run.name for run in find_runs([tmp_path])] == ["a", "b", "c"]
    assert [run.folder for run in find_runs([tmp_path / "deep" / "b", tmp_path / "a"])] == [
        tmp_path / "deep" / "b",
        tmp_path / "a",
    ]
    assert len(find_runs([tmp_path, tmp_path / "a"])) == 3


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path: Path) -> None:
    for name in ("sst2/seed=0", "mnli/seed=0", "mnli/seed=1"):
        write(tmp_path / name)
    assert [run.name for run in find_runs([tmp_path])] == ["mnli/seed=0", "mnli/seed=1", "sst2/seed=0"]


def test_settings_are_flat_and_those_that_vary_are_found_without_the_seed(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", seed=1)
    write(tmp_path / "c", graph={"name": "ring", "activation": 0.1, "weights": "uniform"})
    first, second, third = find_runs([tmp_path])
    assert settings(first).items() >= {"seed": 0, "graph.name": "ring", "graph.activation": 0.5, "rounds": 3}.items()
    assert varying([first, second]) == []
    write(tmp_path / "d", training={"optim": "adamw"}, head="frozen")  # by a version that knows more, in the same way
    assert varying([first, find_runs([tmp_path / "d"])[0]]) == []
    assert varying([first, third]) == ["graph.activation", "graph.weights"]


@pytest.mark.parametrize(("rows", "level"), [(None, 90 / 180), (180, 90 / 180), (60, None)])
def test_runs_that_do_not_say_what_the_constant_answer_scores_have_its_accuracy_from_their_labels(
    make_run: Any, tmp_path: Path, rows: int | None, level: float | None
) -> None:
    run, folder = make_run(rounds=2, every=1), write(tmp_path / "old", evaluate={"rows": rows})
    for record in run.records:
        for name in ("constant", "own_constant", "confusion", "also") if record["evaluation"] else ():
            del record["evaluation"][name]
    (folder / "facts.json").write_text(json.dumps(run.facts))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run.records))
    (found,) = find_runs([folder])
    assert found.records[-1]["evaluation"]["constant"] == level


@pytest.mark.parametrize("file", ["resolved.yaml", "facts.json", "environment.json"])
@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"5", b"\xff\xfe", None])
def test_a_run_that_is_damaged_is_named(tmp_path: Path, file: str, contents: bytes | None) -> None:
    run = write(tmp_path / "run")
    if contents is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(contents)
    with pytest.raises(
        RunError, match=r"run: (its resolved\.yaml, facts\.json or|holds no run; give the folder of a run)"
    ):
        find_runs([run])


def test_what_in_a_recipe_would_be_executed_is_refused(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    (run / "resolved.yaml").write_text(f"x: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    with pytest.raises(RunError, match="damaged; restore it"):
        find_runs([run])
    assert not (tmp_path / "made").exists()


def test_a_damaged_line_is_reported_and_the_rest_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write(tmp_path / "run")
    (run / "rounds.jsonl").write_text("{}\n{}\n")
    with caplog.at_level(logging.WARNING):
        (found,) = find_runs([run])
    assert found.records == []
    assert "line 1 is damaged and left out" in caplog.text


def test_one_of_several_that_cannot_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "good")
    (write(tmp_path / "bad") / "facts.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert [run.name for run in find_runs([tmp_path])] == ["good"]
    assert "bad: its resolved.yaml, facts.json or environment.json is missing or damaged" in caplog.text
    (tmp_path / "good" / "facts.json").unlink()
    with pytest.raises(RunError, match="none of its runs can be read; restore one"):
        find_runs([tmp_path])


def test_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match="holds no run; give the folder of a run, or one that holds some"):
            find_runs([folder])
