import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from processes import PROCESS, finish, start, wait_until

from peertune.assembly.build import build
from peertune.assembly.registry import build_task
from peertune.assembly.scoring import score_test
from peertune.cli import app, main
from peertune.cli.common import asked_to_stop, interruptible, lines, messages
from peertune.errors import RunError
from peertune.recipe import load_recipe, recipe_names
from peertune.runs import checkpoints
from peertune.sweeps.launch import COMMAND
from peertune.topology import spectrum

SMALL = [
    "clients=4",
    "partition={name: iid}",
    "graph={name: complete, activation: 0.5}",
    "algorithm={name: adf_lora, switch_every: 2}",
    "training={local_steps: 1, per_device_train_batch_size: 2}",
    "evaluate={every: 4, rows: 4}",
    "lora.lora_dropout=0.1",
]
TINY = [*SMALL, "rounds=2"]
COMMANDS = [
    "advise",
    "audit",
    "cache",
    "compare",
    "data",
    "diagnose",
    "env",
    "export",
    "graph",
    "recipes",
    "replay",
    "report",
    "roster",
    "run",
    "score",
    "sweep",
]
COMMANDS += [
    "ca approve",
    "ca init",
    "ca list",
    "ca renew",
    "ca revoke",
    "peer doctor",
    "peer request",
    "peer start",
    "peer status",
]
Call = Callable[..., tuple[int, str, str]]


def rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def without_time(run: Path) -> list[dict[str, Any]]:
    return [record | {"seconds": None} for record in rounds(run)]


def contents(file: Path) -> Any:
    """The bytes of a file; PEFT's configuration without the order in which it writes the names of layers."""
    if file.name != "adapter_config.json":
        return file.read_bytes()
    config = json.loads(file.read_text())
    return config | {"target_modules": sorted(config["target_modules"])}


def adapters(run: Path) -> dict[str, Any]:
    return {
        str(file.relative_to(run)): contents(file)
        for folder in ("adapter", "adapters", "checkpoints")
        for file in (run / folder).rglob("*")
        if file.is_file()
    }


STOPS = ("SIGKILL", "SIGINT", "SIGTERM")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["peertune", "run", "digits-demo", *TINY])
        with pytest.raises(SystemExit) as caught:
            main()
    assert not caught.value.code
    return folder / "runs" / "digits-demo"


@pytest.fixture
def mine(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "mine"))


LONG = [*SMALL, "rounds=40", "checkpoint={every: 3, keep: 2}", "evaluate.load_best=true"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, _, err = finish(start(folder, "run", "digits-demo", *LONG, "--out", "run"))
    assert (code, err) == (0, "")
    return folder / "run"


@pytest.mark.parametrize(
    ("how", "after", "every"),  # 13: stopped before any checkpoint was due, most likely within a round
    [(name, random.Random(name).randrange(0, 18), every) for name, every in zip(STOPS, (3, 13, 3), strict=True)],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    uninterrupted: Path, tmp_path: Path, how: str, after: int, every: int
) -> None:
    run = tmp_path / "run"
    process = start(tmp_path, "run", "digits-demo", *LONG, f"checkpoint.every={every}", "--out", "run")
    lines = run / "rounds.jsonl"
    wait_until(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= after, process)
    process.send_signal(signal.Signals[how])
    code, out, err = finish(process)
    reached = len(rounds(run))
    assert after <= reached < 40, "the run must not have ended before the signal"
    assert not (run / "adapters").exists()
    if how == "SIGKILL":
        assert code == -signal.SIGKILL
    else:
        assert (code, out) == (130, "")
        said = re.fullmatch(
            r"peertune: stopping after this round; once more to go back to the last checkpoint\n"
            r"peertune: stopped after (\d+) rounds; go on with: peertune run --resume run\n",
            err,
        )
        assert said is not None
        assert int(said[1]) in (reached, reached - 1)  # a record is written before its round counts as done
    code, _, err = finish(start(tmp_path, "run", "--resume", "run"))
    assert (code, err) == (0, "")
    assert without_time(run) == without_time(uninterrupted)
    assert adapters(run) == adapters(uninterrupted)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in uninterrupted.iterdir())


def test_a_run_that_is_stopped_before_it_begins_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    # Reading the recipe from a pipe holds the process where it is.
    os.mkfifo(tmp_path / "pipe.yaml")
    process = start(tmp_path, "run", "pipe.yaml")
    with (tmp_path / "pipe.yaml").open("w"):  # opens when the process reads
        process.send_signal(signal.SIGTERM)
        assert finish(process) == (130, "", "peertune: stopped before the first round; nothing was kept\n")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.yaml"]


def test_a_finished_run_that_is_resumed_stays_as_it_is(peertune: Call, mine: Path) -> None:
    before = adapters(mine), (mine / "rounds.jsonl").read_text()
    code, out, _ = peertune("run", "--resume", mine)
    assert code == 0
    assert f"records and adapters are in {mine}" in out
    assert (adapters(mine), (mine / "rounds.jsonl").read_text()) == before


def test_a_run_says_where_it_is_and_how_it_went_and_takes_the_next_free_name(peertune: Call, tmp_path: Path) -> None:
    code, out, err = peertune("run", "digits-demo", *TINY)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "records and adapters are in runs/digits-demo"
    code, out, err = peertune("run", "digits-demo", *TINY, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["folder"] == "runs/digits-demo-2"
    records = rounds(tmp_path / "runs" / "digits-demo-2")
    final = records[-1]["evaluation"]
    assert (said["run"], said["rounds"], said["metric"]) == ("digits-demo-2", 2, "accuracy")
    assert (said["min"], said["max"], said["average"]) == (
        min(final["clients"]),
        max(final["clients"]),
        final["average"],
    )
    assert said["mean"] == pytest.approx(sum(final["clients"]) / 4)
    assert said["cross_term"] == records[-1]["diagnostics"]["cross_term"]
    assert said["megabytes_sent"] == pytest.approx(sum(sum(r["bytes_sent"]) for r in records) / 4e6)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits-demo", "digits-demo-2"]
    first, second = (without_time(tmp_path / "runs" / name) for name in ("digits-demo", "digits-demo-2"))
    assert first == second


def test_a_run_keeps_what_was_asked_so_that_it_can_be_typed_again(done: Path) -> None:
    asked = (done / "recipe.yaml").read_text().splitlines()[0]
    assert asked.startswith("# asked for: peertune run digits-demo clients=4 'partition={name: iid}' ")


def test_recipes_are_listed_and_printed(peertune: Call, tmp_path: Path) -> None:
    _, out, _ = peertune("recipes")
    assert [line.split()[0] for line in out.splitlines()] == recipe_names()
    _, out, _ = peertune("recipes", "--json")
    assert sorted(json.loads(out)) == recipe_names()
    _, out, _ = peertune("recipes", "digits-demo")
    (tmp_path / "mine.yaml").write_text(out)
    _, theirs, _ = peertune("recipes", "digits-demo", "--json")
    code, ours, _ = peertune("data", "mine.yaml", "--json")
    assert code == 0
    assert json.loads(theirs)["clients"] == len(json.loads(ours)["clients"])


def test_graph_describes_and_draws(peertune: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "DRAWING_NS", 1e8)
    ring = ("digits-demo", "graph={name: ring}", "clients=4")
    code, out, _ = peertune("graph", *ring)
    assert code == 0
    assert "rho                              0.1111 (exact)" in out
    code, out, _ = peertune("graph", *ring, "--json", "--png", "ring.png")
    assert code == 0
    facts = json.loads(out)
    assert (facts["clients"], facts["edges"], facts["switching_interval"]) == (4, 4, 3)
    assert facts["rho"] == pytest.approx(1 / 9)
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    told = {
        "name: epidemic, fan_out: 1": "epidemic, 4 clients, 4 possible edges a round, one way",
        "name: epidemic, fan_out: 1, weights: push_sum": " (measured on probes in ",
        "name: ring, weights: rows, row_counts: [1, 2, 3, 4]": " (exact, weighted by rows)",
    }
    for graph, said in told.items():
        code, out, _ = peertune("graph", "digits-demo", f"graph={{{graph}}}", "clients=4", "--png", "it.svg")
        assert (code, said in out) == (0, True), out


def test_data_counts_the_rows_of_every_client(peertune: Call) -> None:
    _, out, _ = peertune("data", "digits-demo", "--json")
    facts = json.loads(out)
    assert (facts["rows"], facts["validation"], len(facts["clients"])) == (716, 180, 10)
    assert facts["held"] == sum(client["rows"] for client in facts["clients"])
    assert all(client["rows"] == sum(client["labels"][digit] for digit in "56789") for client in facts["clients"])
    _, out, _ = peertune("data", "digits-demo", "clients=2")
    assert "training rows are held; 180 rows validate" in out


def test_data_measures_how_unlike_the_clients_are_and_draws_it(peertune: Call, tmp_path: Path) -> None:
    disjoint = ("digits-demo", "partition={name: disjoint_labels}", "clients=5")
    code, out, _ = peertune("data", *disjoint, "--probe", "--png", "apart.png", "--json")
    assert code == 0
    assert (tmp_path / "apart.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    facts = json.loads(out)
    labels, amounts, shift = facts["label_skew"], facts["quantity_skew"], facts["feature_shift"]
    assert labels["by_chance"] < 0.02 < 0.5 < labels["min"] <= labels["mean"] <= labels["max"] < 0.7
    assert labels["mean"] == pytest.approx(sum(client["divergence"] for client in facts["clients"]) / 5)
    assert 4.9 < amounts["effective_clients"] <= 5
    assert (amounts["fewest"], amounts["most"]) == (min(c["rows"] for c in facts["clients"]), 145)
    assert (shift["rows"], shift["by_label"], shift["left_out"]) == (716, 1.0, []), "whose a row is the label says"
    assert shift["chance"] == pytest.approx(145 / 716)
    assert shift["chance"] + 0.3 < shift["share"] < 1


def test_data_says_in_words_what_it_leaves_out(peertune: Call, tmp_path: Path) -> None:
    _, out, _ = peertune("data", "digits-demo", "clients=1", "--png", "one.svg")
    assert "label skew     left out: one client has all rows" in out
    assert "quantity skew  1.0 effective clients of 1, 716 to 716 rows" in out
    assert "feature shift  not measured; --probe loads the base and measures it\npicture        one.svg" in out
    rows = [{"text": "good", "score": row / 10} for row in range(12)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    values = ("task={name: text, path: ., inputs: [text], label: score, metric: pearson}", "partition={name: iid}")
    code, out, _ = peertune("data", "digits-demo", *values, "clients=3", "--png", "values.pdf")
    assert code == 0
    assert "label skew     left out: the task has no classes\nquantity skew  3.0 effective clients of 3, 4 to 4" in out
    _, out, _ = peertune("data", "digits-demo", "partition={name: quantity_skew, alpha: 0.1}", "clients=5", "--probe")
    assert re.search(r"^client +5 +6 +7 +8 +9 +all +divergence +told apart$", out, re.MULTILINE)
    assert re.search(r"label skew     0\.\d{3} mean Jensen-Shannon divergence in bits, 0\.", out)
    assert re.search(r"held-out rows told whose they are; 0\.\d{3} by the label alone, 0\.\d{3} by chance", out)
    assert re.search(r"^3 .* –$", out, re.MULTILINE), "a client of few rows is not told apart"
    assert "               left out for too few rows: client 3" in out


def test_env_says_what_a_bug_report_needs(peertune: Call) -> None:
    _, out, _ = peertune("env", "--json")
    facts = json.loads(out)
    assert facts.keys() >= {"peertune", "torch", "python", "device", "dtype", "processor"}
    _, out, _ = peertune("env")
    assert [line.split()[0] for line in out.splitlines()] == list(facts)


def test_compare_puts_runs_side_by_side(peertune: Call, done: Path, mine: Path) -> None:
    resolved = (mine / "resolved.yaml").read_text()
    (mine / "resolved.yaml").write_text(resolved.replace("activation: 0.5", "activation: 0.4"))
    code, out, err = peertune("compare", done, mine)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["activation", "0.5", "0.4"]
    assert "accuracy mean, min, max: the clients' own models" in out
    _, out, _ = peertune("compare", done, mine, "--json")
    first, second = json.loads(out)
    assert (first["by"], second["by"]) == ({"graph.activation": 0.5}, {"graph.activation": 0.4})
    assert first["measures"] == second["measures"]
    _, out, _ = peertune("compare", done, mine, "--markdown", "--metric", "mean,cross_term")
    lines = out.splitlines()
    assert lines[:2] == ["| activation | mean | cross |", "| --- | ---: | ---: |"]
    assert len(lines) == 4
    _, out, _ = peertune("compare", done, mine, "--latex", "--metric", "mean")
    assert out.startswith(r"\begin{tabular}{lr}")
    _, out, _ = peertune("compare", done, mine, "--csv")
    head, *rows = [line.split(",") for line in out.splitlines()]
    assert len(rows) == 2
    assert float(dict(zip(head, rows[1], strict=True))["cross_term.mean"]) == first["measures"]["cross_term"]["mean"]


def test_compare_pairs_seeds_with_those_of_another_setting(peertune: Call, done: Path, mine: Path) -> None:
    resolved = (mine / "resolved.yaml").read_text()
    (mine / "resolved.yaml").write_text(resolved.replace("name: adf_lora", "name: dec_lora"))
    code, out, _ = peertune("compare", done, mine, "--by", "algorithm.name", "--paired-with", "dec_lora", "--markdown")
    assert code == 0
    assert out.splitlines()[-4:-2] == ["", "| algorithm | seeds | mean | best | average | best average |"]
    assert out.splitlines()[-1] == "| adf_lora | 1 | +0.000 | +0.000 | +0.000 | +0.000 |"
    assert "difference from dec_lora, seed by seed, with its 95 % interval" in out


def test_compare_says_what_a_score_costs_and_what_is_had_for_a_budget(peertune: Call, done: Path) -> None:
    timed = [*SMALL, "rounds=3", "evaluate={every: 1, rows: 60}", "time={step_s: [1, 2, 3, 40], latency_s: 0.5}"]
    for method in ("dec_lora", "local"):
        assert (
            peertune("run", "digits-demo", *timed, f"algorithm={{name: {method}}}", "--out", f"runs/{method}")[0] == 0
        )
    asked = [
        "--by",
        "algorithm.name",
        "--paired-with",
        "local",
        "--to",
        "0.01",
        "--budget",
        "1 GB",
        "--within",
        "1.5min",
    ]
    code, out, _ = peertune("compare", "runs", *asked, "--json")
    found = {row["by"]["algorithm.name"]: row for row in json.loads(out)}
    assert code == 0
    records = {method: rounds(Path("runs") / method) for method in found}
    assert found["local"]["measures"]["virtual_seconds"]["mean"] == 120.0, "nobody waits: three steps of 40 s"
    assert found["local"]["to"]["each"] == [{"rounds": 1, "megabytes_sent": 0.0, "virtual_seconds": 40.0}]
    assert found["local"]["within"]["measures"]["virtual_seconds"]["mean"] == 80.0
    scores = [sum(record["evaluation"]["clients"]) / 4 for record in records["dec_lora"]]
    assert found["dec_lora"]["within"]["measures"]["best"]["mean"] == pytest.approx(max(scores[:2]))
    first = found["dec_lora"]["to"]["each"][0]
    assert first["megabytes_sent"] == sum(records["dec_lora"][0]["bytes_sent"]) / 4e6
    assert found["dec_lora"]["to"]["paired"]["virtual_seconds"]["difference"] == first["virtual_seconds"] - 40.0
    _, out, _ = peertune("compare", "runs", *asked, "--csv")
    head, *lines = [line.split(",") for line in out.splitlines()]
    in_cells = [dict(zip(head, line, strict=True)) for line in lines]
    assert {cells["algorithm.name"]: cells["to.measures.rounds.median"] for cells in in_cells} == dict.fromkeys(
        found, "1"
    )
    _, out, _ = peertune("compare", "runs", *asked, "--markdown")
    assert "| algorithm | reached | rounds | MB | virtual s |" in out
    assert "best within 1000 MB sent by a client and 90 virtual seconds" in out
    _, out, _ = peertune("compare", "runs", *asked, "--latex")
    assert out.count(r"\begin{tabular}") == 6
    code, out, err = peertune("compare", "runs", done, "--within", "1h")
    assert (code, out) == (2, "")
    assert (
        "--within: digits-demo has no virtual times, and dec_lora has some; give runs of recipes with time.step_s"
        in err
    )


def test_compare_takes_a_run_that_has_only_begun(peertune: Call, mine: Path) -> None:
    (mine / "rounds.jsonl").write_text("")
    code, out, _ = peertune("compare", mine)
    assert code == 0
    assert out.splitlines()[1].split()[:2] == ["adf_lora", "-"]


def test_a_damaged_record_is_reported_and_the_others_compared(peertune: Call, mine: Path) -> None:
    lines = (mine / "rounds.jsonl").read_text().splitlines()
    (mine / "rounds.jsonl").write_text("\n".join(["{", *lines[1:]]) + "\n")
    code, out, err = peertune("compare", mine, "--json")
    assert code == 0
    assert err.splitlines() == [
        f"peertune: {mine}/rounds.jsonl: line 1 is damaged and left out; restore the file",
        "peertune: mine is not finished: it has 1 of 2 rounds",
    ]
    assert json.loads(out)[0]["measures"]["mean"]["mean"] is not None


def test_diagnose_says_what_it_found(peertune: Call, done: Path) -> None:
    code, out, err = peertune("diagnose", done)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "digits-demo"
    assert all(re.match(r"  (good|notice|problem): ", line) for line in out.splitlines()[1:])
    _, out, _ = peertune("diagnose", done, "--json")
    (findings,) = json.loads(out).values()
    assert all(finding.keys() == {"name", "severity", "title", "text", "advice"} for finding in findings)


def test_a_run_is_scored_on_rows_that_it_has_not_seen_as_its_rounds_score(
    peertune: Call, done: Path, mine: Path
) -> None:
    code, _, err = peertune("score", done)
    assert code == 2
    assert "task digits: has no test rows; name a split that neither trains nor validates, as in task.test=test" in err
    code, _, err = peertune("score", done, "seed=1")
    assert (code, err) == (
        2,
        "peertune: seed=1: a run is scored as it was run; what may be given is task.test, task.path, device, "
        "training.tokens_per_pass\n",
    )
    kept = (mine / "resolved.yaml").read_text()
    kept = kept.replace("test: null", "test: validation").replace("validation_split: null", "validation_split: 0.2")
    kept = kept.replace("metric: accuracy", "metric: [accuracy, macro_f1]")
    (mine / "resolved.yaml").write_text(kept)
    code, out, err = peertune("score", mine, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    asked = load_recipe(done / "resolved.yaml", ["evaluate.rows=null"])
    state = checkpoints.load(done)
    assert state is not None
    expected = build(asked).job.evaluate(state.stacks, range(4))
    assert (said["scores"], said["average"], said["rows"]) == (expected.clients, expected.average, 180)
    assert (said["clients"], said["mean"]) == ([0, 1, 2, 3], pytest.approx(sum(expected.clients) / 4))
    labels = Counter(build_task(asked).validation.labels.tolist())
    assert said["constant"] == pytest.approx(max(labels.values()) / 180)
    found = score_test(load_recipe(mine / "resolved.yaml"), state.take(slice(2, 3)).stacks, [2])
    assert (found.clients, found.average) == ([expected.clients[2]], None)
    assert found.also[0].clients == said["also"][0]["scores"][2:3]
    for words in (["score", mine, "--last"], ["export", mine, "--client", "0", "--to", "out", "--last"]):
        code, _, err = peertune(*words)
        assert (code, err.count("\n")) == (2, 1)
        assert "kept no best adapters, so all that it has are its last ones; leave out --last" in err
    assert not Path("out").exists()
    code, out, _ = peertune("score", mine)
    heads = [f"{metric} on 180 test rows, after 2 rounds" for metric in ("accuracy", "macro_f1")]
    assert [line for line in out.splitlines() if "test rows" in line] == heads
    assert f"constant answer      {said['constant']:.3f}\n" in out
    (mine / "resolved.yaml").write_text(kept.replace("rounds: 2", "rounds: 5"))
    code, _, err = peertune("score", mine)
    assert code == 2
    assert f"{mine}: has made 2 of its 5 rounds, and a test is for the end; go on with peertune run --resume" in err


def test_report_writes_one_file_beside_the_runs_or_where_it_is_told(peertune: Call, mine: Path, tmp_path: Path) -> None:
    code, out, err = peertune("report", mine)
    assert (code, err, out) == (0, "", f"the report on 1 run is in {mine / 'report.html'}\n")
    code, out, _ = peertune("report", mine, "--out", tmp_path / "it.html", "--json")
    told = json.loads(out)
    assert [row["class"] for row in told.pop("classes")["mine"]] == list("56789")
    assert told == {"runs": ["mine"], "written": [str(tmp_path / "it.html")]}
    assert (tmp_path / "it.html").read_bytes() == (mine / "report.html").read_bytes()


def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(peertune: Call, tmp_path: Path) -> None:
    code, out, err = peertune("run", "digits-demo", *TINY, "--dry-run")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line[0] != " "] == ["memory", "time", "sent"]
    _, out, _ = peertune("run", "digits-demo", *TINY, "--dry-run", "--json")
    assert json.loads(out).keys() == {"seconds", "memory_bytes", "sent_bytes", "plan", "trial"}
    assert list(tmp_path.iterdir()) == []


def test_a_run_tells_the_trackers_that_are_asked_for(peertune: Call, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    assert peertune("run", "digits-demo", *TINY, "report_to=[tensorboard]", "--out", "run")[0] == 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_terminal_without_greek_letters_is_no_reason_to_fail(
    peertune: Call, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="ascii", write_through=True))
    assert peertune("compare", done) == (0, "", "")
    assert b"?_A" in written.getvalue()


def test_an_exported_adapter_is_the_runs_own(peertune: Call, done: Path, tmp_path: Path) -> None:
    for client, name in (("1", "client-001"), ("average", "average")):
        code, out, _ = peertune("export", done, "--client", client, "--to", tmp_path / "to" / client)
        assert (code, out.rpartition(" is in ")[2]) == (0, f"{tmp_path / 'to' / client}\n")
        assert json.loads((tmp_path / "to" / client / "labels.json").read_text()) == list("56789")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert contents(tmp_path / "to" / client / file) == contents(done / "adapters" / name / file)


def commands() -> Iterator[tuple[str, Any]]:
    """Yield all commands with their names, those of a group by both words."""
    import typer

    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        yield from [(f"{name} {word}", one) for word, one in inner.items()] if inner else [(name, command)]


def test_the_commands_are_these() -> None:
    assert sorted(name for name, _ in commands()) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_argument_and_option_and_says_what_each_does(peertune: Call, command: str) -> None:
    code, out, _ = peertune(*command.split(), "--help")
    assert code == 0
    for param in dict(commands())[command].params:
        if getattr(param, "hidden", False):  # which the program gives itself
            continue
        if param.param_type_name == "option":
            assert all(option in out for option in param.opts)
        assert param.help
        assert param.help.split()[0] in out
    assert "--help" in out
    assert command == "env" or "Example" in out


def test_help_comes_at_once_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = """
import sys
from peertune.cli import main
sys.argv = ["peertune", "--help"]
try:
    main()
except SystemExit:
    print(*sys.modules, file=sys.stderr)
"""
    seconds = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of a processor, which others may have had meanwhile
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert "Start with: peertune run digits-demo" in run.stdout
        heavy = {"torch", "transformers", "pydantic", "peft", "datasets", "numpy", "scipy", "sklearn", "matplotlib"}
        assert not heavy & set(run.stderr.split())
        if seconds[-1] < 0.3:
            return
    raise AssertionError(f"the fastest of {len(seconds)} calls took {min(seconds):.2f} s")


def test_what_looks_at_runs_loads_no_torch(tmp_path: Path) -> None:
    run = Path(__file__).parent / "data" / "formats" / "0" / "simulation"
    code = """
import sys
from peertune.cli import main
run = sys.argv[1]
for words in (["compare"], ["diagnose"], ["report", "--out", "x.html"]):
    sys.argv = ["peertune", words[0], run, *words[1:]]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True, check=True, cwd=tmp_path)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "peertune.report.html" in loaded
    assert not {"torch", "transformers", "peft", "datasets"} & loaded


@pytest.mark.parametrize(
    "words",
    [
        ["run", "digits-demo"],
        ["run", "digits-demo", "--dry-run"],
        ["sweep", "digits-demo", "seed=0,1", "--out", "x", "--dry-run"],
        ["compare", "DONE"],
        ["diagnose", "DONE"],
        ["report", "DONE", "--out", "x.html"],
        ["data", "digits-demo"],
        ["advise", "digits-demo"],
        ["graph", "digits-demo"],
        ["env"],
        ["export", "DONE", "--client", "0", "--to", "x"],
    ],
    ids=" ".join,
)
def test_every_command_says_a_line_at_once(done: Path, tmp_path: Path, words: list[str]) -> None:
    limited = ["sh", "-c", 'ulimit -t 2; exec "$@"', "sh"]  # two seconds of a processor, and it is killed
    words = [str(done) if word == "DONE" else word for word in words]
    with subprocess.Popen(
        [*limited, *COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.kill()
    assert re.fullmatch(r"peertune: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO starting\n", said)


def test_after_a_command_a_program_that_imports_peertune_hears_as_much_of_it_as_before() -> None:
    logger = logging.getLogger("peertune")
    before = logger.level, list(logger.handlers)
    with messages():
        assert logger.level == logging.INFO
    assert (logger.level, list(logger.handlers)) == before


def test_where_there_is_no_terminal_progress_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    caplog.set_level("INFO", "peertune")
    show = lines("rounds", 1_000, done=400, clock=lambda: now)
    for done in range(401, 1_001):
        now += 0.1
        show(done, f"loss {done}")
    show(1_000, "loss 1000")
    assert caplog.messages == [
        "rounds 401 of 1,000, loss 401, 60 s left",
        "rounds 701 of 1,000, loss 701, 30 s left",
        "rounds 1,000 of 1,000, loss 1000",
    ]


def test_a_run_into_a_file_tells_how_far_it_is(tmp_path: Path) -> None:
    process = start(tmp_path, "run", "digits-demo", *TINY)
    _, err = process.communicate(120)
    told = [line.split(" INFO ")[1] for line in err.splitlines()]
    assert told[0] == "starting"
    assert told[-2].startswith("rounds 1 of 2, loss ")
    assert re.fullmatch(r"rounds 2 of 2, loss \d\.\d{3}  accuracy \d\.\d{3}", told[-1])


def refused(called: tuple[int, str, str]) -> str:
    code, out, err = called
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("peertune: ")
    return line.removeprefix("peertune: ")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """What a user could have got wrong, beside the run."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [f"{'good' if n % 2 else 'bad'} film,{n % 2}" for n in range(8)]
        (folder / f"{split}.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    unlabelled = folder / "unlabelled"
    unlabelled.mkdir()
    for split in ("train", "validation"):
        (unlabelled / f"{split}.csv").write_text("sentence\ngood film\nbad film\n")
    (folder / "edges.txt").write_text("0,1\n2,3\n")
    (folder / "file").write_text("mine")
    (folder / "broken.yaml").write_text("model: {name: digits-vit}\nlora: {r: 1\nseed: 0\n")
    (folder / "twice.yaml").write_text("seed: 1\nmodel: {name: digits-vit}\nseed: 2\n")
    return folder


GLUE = "task={name: glue, config: sst2, path: inputs}"
BAD = {
    "an unknown key": (["sed=1"], "digits-demo: sed: unknown key 'sed', did you mean seed?"),
    "an unknown key of a block": (["lora.rank=1"], "lora.rank: unknown key 'rank', did you mean lora.r?"),
    "an unknown key of a task": (
        ["task.confg=x"],
        "task.confg: unknown key 'confg' (digits takes held_out_writers, metric, test, validation_split; ",
    ),
    "an unknown key of a graph": (
        ["graph.activaton=1"],
        "graph.activaton: unknown key 'activaton', did you mean activation?",
    ),
    "an unknown key of a method": (
        ["algorithm.switch_evry=1"],
        "algorithm.switch_evry: unknown key 'switch_evry', did you mean switch_every? (tad_lora takes switch_every",
    ),
    "an unknown key of a partition": (["partition.alfa=1"], "partition.alfa: unknown key 'alfa', did you mean alpha?"),
    "an unknown method": (["algorithm.name=tadlora"], "algorithm.name: unknown name 'tadlora', did you mean tad_lora?"),
    "an unknown graph": (["graph.name=rng"], "graph.name: unknown name 'rng', did you mean ring?"),
    "an unknown block": (["grph.activation=1"], "digits-demo: grph: unknown key 'grph', did you mean graph?"),
    "a wrong type": (["rounds=ten"], "digits-demo: rounds: input should be a valid integer, not 'ten'"),
    "a wrong type in a part": (["partition.alpha=a"], "partition.alpha: input should be a valid number, not 'a'"),
    "a missing setting": (["graph={name: erdos_renyi}"], "graph.probability: is missing, erdos_renyi needs it"),
    "out of range": (["training.learning_rate=-1"], "training.learning_rate: input should be greater than 0, not -1"),
    "activation 0": (["graph.activation=0"], "graph complete: activation is 0.0; choose a number above 0, at most 1"),
    "activation 1.5": (
        ["graph.activation=1.5"],
        "graph complete: activation is 1.5; choose a number above 0, at most 1",
    ),
    "switching after 0 rounds": (["algorithm.switch_every=0"], "switch_every"),
    "no equals sign": (["rounds"], "override 'rounds': write key=value, such as graph.activation=0.02"),
    "rank too high": (["lora.r=65"], "lora.r: 65 is above the size of "),
    "no such layer": (
        ["lora.target_modules=[query]"],
        "lora.target_modules: 'query' matches no layer; the linear layers",
    ),
    "a graph in two parts": (
        ["clients=4", "graph={name: edges, path: inputs/edges.txt}"],
        "graph edges (inputs/edges.txt): clients 2, 3 can never reach client 0; add edges between them",
    ),
    "no file of edges": (
        ["graph={name: edges, path: no.txt}"],
        "can't be read, No such file or directory; give a file of",
    ),
    "more clients than rows": (["clients=717"], "717 clients for 716 rows, give 1 to 716"),
    "no labels": (
        [GLUE.replace("inputs", "inputs/unlabelled"), "partition={name: iid}"],
        "task glue/sst2: train: column: unknown name 'label', choose from sentence",
    ),
    "no data": ([GLUE.replace("inputs", "nowhere")], "task glue/sst2: nowhere is not there, give the folder that"),
    "no such model": (
        [GLUE, "model.name=nobody/nothing", "clients=2", "partition={name: iid}"],
        "model.name: nobody/nothing is no folder, is not in the local cache and can't be had from the hub; check",
    ),
    "a folder without a model": (
        [GLUE, "model.name=inputs", "clients=2", "partition={name: iid}"],
        "model.name: inputs can't be loaded (",
    ),
    "steps that clients don't have in common": (
        ["time={mode: asynchronous, step_s: 1}", "algorithm.name=dec_lora", "checkpoint.steps=2"],
        "checkpoint.steps: clients that wait for nobody have no step in common, so that no state lies within a round; "
        "leave it out in a simulation with time.mode=asynchronous",
    ),
    "no such device": (["device=tpu"], "digits-demo: device: string should match pattern"),
    "an unwritable place": (["--out", "inputs/file/run", *TINY], "inputs/file/run: can't be written (File exists)"),
    "no file system": (["--out", "/proc/x", *TINY], "/proc/x: can't be written (No such file or directory); give one"),
    "a file in the way": (["--out", "inputs/file", *TINY], "inputs/file: is there already; give another --out"),
    "a name too long": (["--out", "x" * 300, *TINY], "can't be written (File name too long)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_run_that_cannot_be_is_one_line_and_leaves_nothing(
    peertune: Call, inputs: Path, tmp_path: Path, name: str
) -> None:
    words, expected = BAD[name]
    before = sorted(tmp_path.rglob("*"))
    assert expected in refused(peertune("run", "digits-demo", *words))
    assert sorted(tmp_path.rglob("*")) == before
    assert (inputs / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "digits-dmo"], "recipe: unknown name 'digits-dmo', did you mean digits-demo?"),
        (["run", "no.yaml"], "no.yaml: can't be read (No such file or directory); give a recipe's path or a name"),
        (["run", "inputs/broken.yaml"], "inputs/broken.yaml: line 3: not YAML ("),
        (["run", "inputs/twice.yaml"], "inputs/twice.yaml: line 3: not YAML (key seed stands twice)"),
        (["run"], "run: give a RECIPE, or --resume DIR"),
        (["run", "--resume", "inputs", "--out", "x"], "--resume and --out: give one of them"),
        (["run", "--resume", "inputs"], "inputs: is no run, it holds no resolved.yaml; give the folder of one"),
        (["run", "--resume", "nowhere"], "nowhere: is no run, it holds no resolved.yaml; give the folder of one"),
        (["graph", "digits-dmo"], "recipe: unknown name 'digits-dmo', did you mean digits-demo?"),
        (["graph", "digits-demo", "graph.activation=2"], "graph complete: activation is 2"),
        (["graph", "digits-demo", "clients=3", "--png", "inputs/file/x.png"], "inputs/file/x.png: can't be written"),
        (["graph", "digits-demo", "clients=3", "--png", "x.doc"], "x.doc: pictures are written as .png, .svg or .pdf"),
        (["data", "digits-demo", "clients=999"], "999 clients for 716 rows"),
        (["data", "digits-demo", "clients=1", "--probe"], "probe: it tells clients apart, and 1 of 1 have 5 or more"),
        (["data", "digits-demo", "model.name=nowhere", "--probe"], "model.name: nowhere is no folder"),
        (["data", "digits-demo", "--png", "x.doc"], "x.doc: pictures are written as .png, .svg or .pdf"),
        (["data", "digits-demo", "--png", "nowhere/x.png"], "nowhere/x.png: can't be written (no such folder); choose"),
        (["recipes", "digits"], "recipe: unknown name 'digits', did you mean digits-demo?"),
        (["compare", "inputs"], "inputs: holds no run; give the folder of a run, or one that holds some"),
        (["diagnose", "nowhere"], "nowhere: holds no run; give the folder of a run, or one that holds some"),
        (["report", "inputs", "--out", "x.html"], "inputs: holds no run; give the folder of a run, or one that holds"),
        (["compare", "inputs", "--metric", "meen"], "--metric: unknown name 'meen', did you mean mean?"),
        (["compare", "inputs", "--to", "abc"], "--to: 'abc' is no score; give a number such as 0.8"),
        (["compare", "inputs", "--to", "inf"], "--to: 'inf' is no score; give a number such as 0.8"),
        (
            ["compare", "inputs", "--budget", "5 apples"],
            "--budget: '5 apples' is not a size; give a number above 0 with",
        ),
        (
            ["compare", "inputs", "--budget", "100"],
            "--budget: '100' is not a size; give a number above 0 with kB, MB or",
        ),
        (
            ["compare", "inputs", "--within", "-1h"],
            "--within: '-1h' is not a time; give a number above 0 with s, min or",
        ),
        (["compare", "inputs", "--within", "0s"], "--within: '0s' is not a time; give a number above 0 with s, min or"),
        (["compare", "inputs", "--csv", "--json"], "compare: give one of --json, --csv, --markdown and --latex"),
        (["sweep", "digits-demo", "sed=0,1", "--out", "x"], "digits-demo: sed: unknown key 'sed', did you mean seed?"),
        (["sweep", "digits-demo", "seed=", "--out", "x"], "sweep: 'seed=' gives no values; write key=a,b,c"),
        (["sweep", "digits-demo", "seed=0,1", "--out", "x", "--shard", "3/2"], "--shard: '3/2' is no part; write i/k"),
        (["sweep", "digits-demo", "seed=0,1", "--out", "inputs/file/x"], "inputs/file/x"),
        (["run", "digits-demo", "report_to=[wandb]"], "report_to: wandb is not installed; pip install wandb, or take"),
        (["run", "digits-demo", "--dry-run", "--out", "x"], "run: --dry-run goes with a RECIPE and overrides alone"),
        (["export", "inputs", "--client", "0", "--to", "x"], "inputs: is no run, it holds no resolved.yaml"),
        (
            ["export", "inputs", "--client", "first", "--to", "x"],
            "--client: 'first' is no client; give a number, or average",
        ),
        (["export", "inputs", "--client", "-1", "--to", "x"], "--client: '-1' is no client; give a number, or average"),
    ],
)
def test_a_command_that_cannot_be_is_one_line_and_leaves_nothing(
    peertune: Call, inputs: Path, tmp_path: Path, words: Sequence[str], expected: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert expected in refused(peertune(*words))
    assert sorted(tmp_path.rglob("*")) == before
    assert inputs.is_dir()


def test_a_client_that_is_not_there_or_a_folder_that_is_cannot_be_exported(
    peertune: Call, done: Path, inputs: Path
) -> None:
    assert refused(peertune("export", done, "--client", "4", "--to", "x")) == "client 4: the run has clients 0 to 3"
    assert "inputs: is there already; give another folder" in refused(
        peertune("export", done, "--client", "0", "--to", "inputs")
    )
    assert "can't be written" in refused(peertune("export", done, "--client", "0", "--to", "inputs/file/x"))
    assert (inputs / "file").read_text() == "mine"


@pytest.mark.parametrize("words", [["rounds=1"], ["digits-demo", *SMALL, "rounds=2", "seed=1"]])
def test_a_run_is_not_resumed_with_other_settings(peertune: Call, mine: Path, words: list[str]) -> None:
    before = adapters(mine), (mine / "rounds.jsonl").read_text()
    line = refused(peertune("run", "--resume", mine, *words))
    assert line.startswith(f"{mine}: was run with ")
    assert line.endswith("; resume without a recipe, or start anew")
    assert (adapters(mine), (mine / "rounds.jsonl").read_text()) == before


def test_a_run_is_resumed_with_the_settings_it_had(peertune: Call, mine: Path) -> None:
    assert peertune("run", "--resume", mine, "digits-demo", *TINY)[0] == 0
    assert peertune("run", "--resume", mine, "rounds=2")[0] == 0


def test_a_run_that_is_given_more_rounds_comes_to_what_it_had_come_to_with_these_from_the_start(
    peertune: Call, mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert peertune("run", "--resume", mine, "rounds=4")[0] == 0
    assert f"{mine}: goes on to 4 rounds, where it had 2" in caplog.text
    assert peertune("run", "digits-demo", *SMALL, "rounds=4", "--out", tmp_path / "whole")[0] == 0
    ended, whole = (
        {name: data for name, data in adapters(run).items() if name.startswith("adapters/")}
        for run in (mine, tmp_path / "whole")
    )
    assert len(ended) > 4
    assert ended == whole
    lines = (mine / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]
    assert (mine / "resolved.yaml").read_text() == (tmp_path / "whole" / "resolved.yaml").read_text()
    assert peertune("run", "--resume", mine)[0] == 0, "it has four rounds"


def test_more_rounds_of_a_rate_that_falls_are_told_from_a_longer_run(
    peertune: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    falls = ["training.lr_scheduler_type=linear", "training.learning_rate=0.01", "training.local_steps=2"]
    assert peertune("run", "digits-demo", *SMALL, "rounds=1", *falls, "--out", tmp_path / "run")[0] == 0
    assert peertune("run", "--resume", tmp_path / "run", "rounds=2")[0] == 0
    assert "linear over 1 rounds had come to 0.005 after these, and goes on at 0.0075, as over 2" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_is_not_resumed(peertune: Call, mine: Path) -> None:
    for file in (mine / "checkpoints").glob("*/state-*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    before = adapters(mine), (mine / "rounds.jsonl").read_text()
    code, _, err = peertune("run", "--resume", mine)
    *warnings, line = err.splitlines()
    assert code == 2
    assert line.endswith(
        "mine/checkpoints: every checkpoint is damaged; restore one, or start again with another --out"
    )
    assert all("is damaged and passed over" in warning for warning in warnings)
    assert (adapters(mine), (mine / "rounds.jsonl").read_text()) == before


def test_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-c", PROCESS, "recipes", "digits-demo"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
    assert (process.returncode, process.stderr) == (2, "peertune: [Errno 28] No space left on device\n")


def test_an_error_is_told_though_a_signal_comes_while_it_is_on_its_way() -> None:
    def end() -> None:
        try:
            raise RunError("another process is gone")
        finally:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunError, match="another process is gone"), interruptible():
        end()
    with pytest.raises(SystemExit) as stopped, interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 130


def test_a_stop_that_comes_from_two_sides_at_once_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with asked_to_stop("stopping") as asked:
        for _ in range(2):  # by a cluster to all of a job, and by what the process runs under
            signal.raise_signal(signal.SIGTERM)
        assert len(asked) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err == "peertune: stopping\n"


@pytest.mark.parametrize(
    "settings",
    [["learning_rate=1e300"], ["learning_rate=1e300", "optim=sgd"], ["weight_decay=1e300", "optim=sgd"]],
    ids=" ".join,
)
def test_a_number_beyond_float32_is_training_that_diverges(peertune: Call, settings: list[str]) -> None:
    words = [f"training.{setting}" for setting in settings]
    code, _, err = peertune("run", "digits-demo", *SMALL, "rounds=2", *words, "--out", "beyond")
    assert (code, err.count("\n")) == (2, 1)
    assert "no longer finite" in err
    assert "lower training.learning_rate" in err
