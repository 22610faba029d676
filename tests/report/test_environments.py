"""Where runs that are put side by side differ in what their numbers depend on."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peertune.api.runs import Runs
from peertune.report import tables
from peertune.report.environments import differences, known
from peertune.report.html import page
from peertune.report.runs import RunData, find_runs

HERE: dict[str, Any] = {
    "peertune": "0.2.0",
    "torch": "2.13.0",
    "numpy": "2.4.6",
    "python": "3.11.7",
    "platform": "Linux-6.1",
    "processor": "AMD EPYC",
    "cpu_capability": "AVX2",
    "threads": 1,
    "processes": 1,
    "device": "cpu",
    "gpus": [],
    "dtype": "float32",
    "onednn": True,
    "settings": {},
    "weights": {"body": "b0d7"},
}
SECONDS = "their last digits may differ, and their seconds can't be compared"


@pytest.fixture
def made(make_run: Any) -> Any:
    """What makes runs with environments, each `HERE` but for what is said, None for what is not known."""

    def runs(*changed: Mapping[str, Any], **recipe: Any) -> list[RunData]:
        return [
            replace(
                make_run(f"run {seed}", seed=seed, rounds=2, every=1, **recipe),
                environment={key: value for key, value in (HERE | dict(change)).items() if value is not None},
            )
            for seed, change in enumerate(changed)
        ]

    return runs


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            ({}, {"cpu_capability": "AVX512"}, {"cpu_capability": "AVX512"}),
            f"CPU capability: AVX512 in 2, AVX2 in 1; {SECONDS}",
        ),
        (
            ({}, {}, {"cpu_capability": "AVX512", "processor": "Intel Xeon"}),
            f"processor and CPU capability: AMD EPYC / AVX2 in 2, Intel Xeon / AVX512 in 1; {SECONDS}",
        ),
        (({}, {"threads": 2}, {"threads": None}), f"threads: 1 in 1, 2 in 1, not known of 1; {SECONDS}"),
        (
            tuple({"threads": number} for number in (1, 1, 2, 3, 4, 5, 6)),
            f"threads: 1 in 2, 2 in 1, 3 in 1, 4 in 1, 2 others in 2; {SECONDS}",
        ),
        (
            ({}, {"settings": {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "onednn": False}),
            "oneDNN and settings of libraries: off / ONEDNN_MAX_CPU_ISA=AVX2 in 1, on / none in 1; "
            "their last digits may differ",
        ),
        (
            ({}, {"torch": "2.14.0", "numpy": "2.5.0", "peertune": "0.3.0"}),
            "peertune, torch and numpy: 0.2.0 / 2.13.0 / 2.4.6 in 1, 0.3.0 / 2.14.0 / 2.5.0 in 1; "
            "their scores may differ by more than the last digits",
        ),
        (
            ({}, {"dtype": "bfloat16"}),
            "dtype: bfloat16 in 1, float32 in 1; their scores may differ by more than the last digits",
        ),
        (
            ({}, {"weights": {"body": "0dd0"}}),
            "the base's weights: 0dd0 in 1, b0d7 in 1; their scores are of different models",
        ),
        (
            ({"weights": {"body": "b0d7", "head": "1"}}, {"weights": {"body": "b0d7", "head": "2"}}),
            "the base's head: 1 in 1, 2 in 1; their scores are of different models",
        ),
    ],
)
def test_what_differs_is_a_line_with_what_it_means(
    changed: tuple[dict[str, Any], ...], line: str, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runs = made(*changed)
    assert [str(found) for found in differences(runs)] == [f"runs differ in {line}"]
    tables.compare(runs)
    assert caplog.messages == [f"runs differ in {line}"]


@pytest.mark.parametrize(
    "changed",
    [
        ({}, {}),
        ({}, dict.fromkeys(HERE)),
        ({"weights": {"body": "b0d7"}}, {"weights": {"nf4": "0dd0"}}),  # a setting tells these apart
        ({}, {"python": "3.14.0", "platform": "Linux-6.18", "gpus": ["H200"]}),
        tuple({"device": "cuda:0", "gpus": ["H200"], "processor": name, "threads": len(name)} for name in ("a", "bc")),
    ],
)
def test_no_line_where_nothing_differs_that_is_known_and_counts(
    changed: tuple[dict[str, Any], ...], made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runs = made(*changed)
    assert differences(runs) == []
    assert [row["environment"] for row in tables.compare(runs)] == [{}]
    assert caplog.messages == []


def test_the_gravest_comes_first_and_what_settings_tell_apart_is_no_difference(made: Any) -> None:
    runs = made({}, {"weights": {"body": "0dd0"}, "dtype": "bfloat16", "device": "cuda", "threads": 2})
    assert [[*found.keys] for found in differences(runs)] == [["weights.body"], ["dtype"], ["device"]]
    assert [found.grave for found in differences(runs)] == [True, False, False]
    assert [[*found.keys] for found in differences(runs, ["model.dtype", "device"])] == [["weights.body"]]


def test_bases_of_different_names_that_make_rows_may_have_different_weights(made: Any) -> None:
    runs = made({}, {"weights": {"body": "0dd0"}}, {"weights": {"body": "0dd0"}}, {"weights": {"body": "d1d1"}})
    runs = [replace(run, recipe=run.recipe | {"model": {"name": name}}) for run, name in zip(runs, "abbb", strict=True)]
    assert list(differences(runs[:3], ["model.name"])) == []
    (found,) = differences(runs, ["model.name"])
    assert found.values == {"run 1": "0dd0", "run 2": "0dd0", "run 3": "d1d1"}
    (found,) = differences(runs, ["algorithm.name"])
    assert len(found.values) == 4


def test_rows_and_values_and_pages_say_it_too(made: Any) -> None:
    runs = made({}, {"threads": 2}, {"threads": None})
    (row,) = tables.compare(runs)
    assert row["environment"] == {"threads": ["1", "2", None]}
    found = Runs(runs).differences()
    assert [*map(str, found)] == [f"runs differ in threads: 1 in 1, 2 in 1, not known of 1; {SECONDS}"]
    assert "<li>runs differ in threads: 1 in 1, 2 in 1, not known of 1; their last digits" in page(runs, {})
    assert "runs differ" not in page(runs[::2], {})


def test_a_run_of_an_earlier_version_has_the_device_and_dtype_that_it_was_run_with(tmp_path: Path) -> None:
    for name, device in (("a", "cpu"), ("b", "cuda")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "resolved.yaml").write_text("device: cpu\nmodel: {dtype: float64}\nseed: 0\n")
        (tmp_path / name / "facts.json").write_text("{}")
        picked = {"device": device, "dtype": "bfloat16"}  # by `auto`, which no one asked for
        (tmp_path / name / "environment.json").write_text(json.dumps(picked))
        (tmp_path / name / "rounds.jsonl").touch()
    runs = find_runs([tmp_path])
    assert [(known(run, "device"), known(run, "dtype")) for run in runs] == [("cpu", "float64")] * 2


def test_of_peers_that_differ_all_values_are_one(made: Any) -> None:
    first, second = made({}, {})
    mixed = {"h1": HERE, "h2": HERE | {"threads": 2}}
    peers = {"peers": [{"name": name, "client": n, "federation": "f"} for n, name in enumerate(mixed)]}
    together = replace(first, environment=mixed, facts=first.facts | peers)
    assert known(together, "threads") == "1 + 2"
    assert [str(found) for found in differences([together, second])] == [
        f"runs differ in threads: 1 in 1, 1 + 2 in 1; {SECONDS}"
    ]
    alike = replace(second, environment=mixed, facts=second.facts | peers)
    assert differences([together, alike]) == []


def test_a_run_that_was_resumed_elsewhere_has_both_values(made: Any) -> None:
    resumed = [{"round": 3, "threads": 2, "cpu_capability": "AVX512"}, {"round": 5, "threads": 4}]
    runs = made({"resumed": resumed}, {})
    assert (known(runs[0], "threads"), known(runs[0], "cpu_capability")) == ("1 + 2 + 4", "AVX2 + AVX512")
    assert [[*found.keys] for found in differences(runs)] == [["cpu_capability"], ["threads"]]


def test_the_commands_say_it_once_and_runs_of_before_it_was_told_differ_in_nothing(
    peertune: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    old = Path(__file__).parents[1] / "data" / "formats" / "1" / "simulation"
    for seed in range(3):
        run = shutil.copytree(old, tmp_path / "runs" / f"{seed}")
        for name in ("resolved.yaml", "recipe.yaml"):
            (run / name).write_text((run / name).read_text().replace("seed: 0", f"seed: {seed}"))
    assert peertune("compare", "runs", "--json")[2] == ""
    file = tmp_path / "runs" / "1" / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"threads": 8, "cpu_capability": "AVX2"}))
    line = f"peertune: runs differ in threads: 1 in 2, 8 in 1; {SECONDS}\n"
    code, out, err = peertune("compare", "runs", "--json")
    assert (code, err) == (0, line)
    assert [row["environment"] for row in json.loads(out)] == [{"threads": ["1", "8", "1"]}]
    for words in (["compare", "runs"], ["report", "runs"]):
        code, out, err = peertune(*words)
        assert (code, err) == (0, line), words
