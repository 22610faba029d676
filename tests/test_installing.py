"""What people install: the wheel and the sdist, and what CI installs by make."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import peertune

ROOT = Path(__file__).parents[1]
OF_THE_REPOSITORY = {".ci/run", ".github/workflows/ci.yaml", ".pre-commit-config.yaml"}
"""What serves those who work in the repository; an sdist is without it."""


def build(here: Path, there: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", there, *words], cwd=here, check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist."""
    pytest.importorskip("hatchling", reason="needs the development extra")
    there = tmp_path_factory.mktemp("dist")
    build(ROOT, there)
    name = f"peertune-{peertune.__version__}"
    return there / f"{name}-py3-none-any.whl", there / f"{name}.tar.gz"


def test_the_wheel_holds_every_file_of_the_package_and_tells_that_it_is_typed(built: tuple[Path, Path]) -> None:
    held = {name for name in ZipFile(built[0]).namelist() if ".dist-info/" not in name}
    there = {str(file.relative_to(ROOT)) for file in (ROOT / "peertune").rglob("*") if file.is_file()}
    assert held == {name for name in there if "__pycache__" not in name}
    assert "peertune/py.typed" in held


def test_the_sdist_holds_what_the_repository_does_and_builds_the_same_wheel(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    held = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    if (ROOT / ".git").exists():
        words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        there = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        assert held == {*there, "PKG-INFO"} - OF_THE_REPOSITORY
    build(unpacked, tmp_path / "again", "-t", "wheel")
    assert (tmp_path / "again" / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_wheel_runs_in_an_environment_that_has_it_and_its_dependencies_only(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh"
    venv.create(fresh)
    pip = [sys.executable, "-m", "pip", "--python", str(fresh / "bin/python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", built[0]], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(fresh)}))
    # Whose .pth files are not read again, so that an editable install there is none here.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def called(*words: str) -> str:
        command = [str(fresh / "bin" / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    facts = "import importlib.metadata, peertune; print(importlib.metadata.version('peertune'), peertune.__file__)"
    assert called("python", "-c", facts).split() == [peertune.__version__, str(packages / "peertune" / "__init__.py")]
    little = ["clients=2", "training.local_steps=1", "evaluate.rows=4"]
    called("peertune", "run", "digits-demo", "rounds=1", *little, "--out", "run")
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 1


def test_a_scheduled_run_of_ci_installs_the_newest_of_every_dependency() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())
    assert workflow[True]["schedule"]  # `on`, in YAML 1.1
    asked = workflow["jobs"]["test"]["env"]["CONSTRAINTS"]
    found = re.fullmatch(r"\$\{\{ github.event_name == 'schedule' && '(.*)' \|\| '(.*)' \}\}", asked)
    assert found
    newest, held = found.groups()
    assert (newest, held) == ("/dev/null", "constraints.txt")
    for constraints in (newest, held):
        words = ["make", "--dry-run", "--always-make", "test"]
        environment = os.environ | {"CONSTRAINTS": constraints}
        told = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        assert f"--constraint {constraints} --editable '.[dev]'" in told
