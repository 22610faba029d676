"""A release's version and what is said of it, and how the project's habits are carried out: CI, the hook."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from conftest import Call

import peertune as package

ROOT = Path(__file__).parents[1]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_the_command_tells_the_packages_version(peertune: Call) -> None:
    assert peertune("--version") == (0, f"peertune {package.__version__}\n", "")


def test_the_changelog_begins_with_this_version_and_dates_every_older_one() -> None:
    entries = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    read = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (unreleased|\d{4}-\d\d-\d\d)", entry) for entry in entries]
    assert all(read), entries
    versions = [tuple(map(int, entry.groups()[:3])) for entry in read if entry]
    assert ".".join(map(str, versions[0])) == package.__version__
    assert versions == sorted(set(versions), reverse=True)
    assert "unreleased" not in "".join(entries[1:])


def test_a_citation_names_this_version_title_and_licence() -> None:
    said = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= said.keys()  # which the format asks for
    assert (said["title"], said["license"]) == (project()["name"], project()["license"])
    assert said["version"] == package.__version__
    assert said["authors"] == project()["authors"]


def test_ci_runs_what_people_run_on_every_python_that_the_package_says_it_is_for() -> None:
    workflow = read(".github/workflows/ci.yaml")
    (job,) = workflow["jobs"].values()
    pythons = job["strategy"]["matrix"]["python"]
    said = project()["classifiers"]
    assert [f"Programming Language :: Python :: {python}" for python in pythons] == [
        classifier for classifier in said if "Python ::" in classifier
    ]
    assert project()["requires-python"] == f">={pythons[0]}"
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets" not in (ROOT / ".github/workflows/ci.yaml").read_text()


def test_the_hook_before_a_commit_is_make_check() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    (hook,) = repository["hooks"]
    assert (repository["repo"], hook["entry"], hook["pass_filenames"]) == ("local", "make check", False)
