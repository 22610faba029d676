"""Model cards, from the run directory alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from peertune.errors import RunError
from peertune.report.card import card
from peertune.report.runs import RunData

TRAINING = {"local_steps": 10, "per_device_train_batch_size": 32, "optim": "adamw", "learning_rate": 0.005}

EDGES = {"name": "edges", "path": "/home/someone/edges.txt", "activation": 1}


@pytest.fixture
def run(make_run: Any, tmp_path: Path) -> RunData:
    """A run of twelve rounds and six clients over a base of the hub, on its own folder's data."""
    made: RunData = make_run(rounds=12, every=5)
    (tmp_path / "adapter").mkdir()
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["value", "query"], "task_type": "SEQ_CLS"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "facts.json").write_text(json.dumps(made.facts))
    recipe = made.recipe | {
        "model": {"name": "lab/base", "revision": "abc123"},
        "task": {"name": "text", "path": "/home/someone/secret/films", "id": None, "config": None},
        "head": "frozen",
        "training": TRAINING,
    }
    return replace(made, folder=tmp_path, recipe=recipe)


def read(text: str) -> tuple[dict[str, Any], str]:
    made = ModelCard(text)
    return made.data.to_dict(), made.text  # type: ignore[no-untyped-call]


def test_a_card_says_what_the_records_say(run: RunData) -> None:
    about, text = read(card(run, "me/films", None, 12, None))
    final = run.records[-1]["evaluation"]
    assert "- the best answer that is the same for all rows: 0.500" in text
    assert about["base_model"] == "lab/base"
    assert (about["library_name"], about["pipeline_tag"]) == ("peft", "text-classification")
    assert about["metrics"] == ["accuracy", "macro_f1"]
    assert about["tags"] == ["peertune", "lora", "federated-learning", "tad_lora"]
    assert "datasets" not in about
    (result,) = about["model-index"][0]["results"]
    by_metric = {"accuracy": final["average"], "macro_f1": final["also"][0]["average"]}
    assert result["metrics"] == [{"type": name, "value": score} for name, score in by_metric.items()]
    assert "the average of all clients, trained with peertune by 6 clients in a simulation" in text
    assert "[lab/base](https://huggingface.co/lab/base) at `abc123`" in text
    assert "rank 4, `lora_alpha` 8, in `query`, `value`; 100 parameters, head frozen" in text
    assert "`tad_lora`, switch_every 4" in text
    assert "`complete`, activation 0.3; rho 0.7000 (estimated from 1,000 draws), T\\* 5" in text
    rows = [sum(held) for held in run.facts["partition"]["rows"]]
    assert f"{sum(rows):,} in all; of the clients in order {', '.join(map(str, rows))}" in text
    assert "12 of 12, each of 10 local steps with 32 rows; adamw at 0.005" in text
    mean = sum(final["clients"]) / 6
    spread = (sum((score - mean) ** 2 for score in final["clients"]) / 6) ** 0.5
    assert f"{mean:.3f} ± {spread:.3f} (mean and standard deviation over 6 clients)" in text
    assert f"**this one: {final['average']:.3f}**\n" in text
    assert 'from_pretrained("lab/base", revision="abc123", num_labels=3, ignore_mismatched_sizes=True)' in text
    assert "## What was not checked" in text


def test_ranks_and_scales_that_are_not_the_same_everywhere_are_told(run: RunData) -> None:
    file = run.folder / "adapter" / "adapter_config.json"
    patterns = {"rank_pattern": {"query": 2}, "alpha_pattern": {}, "use_rslora": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | patterns))
    _, text = read(card(run, "me/films", None, 12, None))
    assert (
        'rank 4, `lora_alpha` 8, `rank_pattern` `{"query": 2}`, which PEFT reads and not every server does, scaled by'
        in text
    )
    assert "scaled by `lora_alpha / sqrt(r)`, in `query`, `value`" in text


def test_a_client_has_its_own_score_and_a_merged_model_needs_no_base(run: RunData) -> None:
    about, text = read(card(run, "films", 4, 12, "bfloat16"))
    score = run.records[-1]["evaluation"]["clients"][4]
    assert about["model-index"][0]["results"][0]["metrics"][0]["value"] == score
    assert about["library_name"] == "transformers"
    assert "A model with the LoRA adapter of client 4 merged in, in bfloat16, trained" in text
    assert 'AutoTokenizer.from_pretrained("films")' in text
    assert "peft" not in text


def test_a_score_of_some_rounds_before_is_told_as_one_and_a_later_one_is_not(run: RunData) -> None:
    about, text = read(card(run, "films", None, 9, None))  # evaluated after rounds 2, 7 and 12
    assert "model-index" not in about
    assert "after 7 rounds:" in text
    assert f"**this one: {run.records[6]['evaluation']['average']:.3f}**, some rounds before" in text
    about, text = read(card(run, "films", None, 1, None))
    assert "metrics" not in about
    assert "None of its rounds was evaluated." in text


def test_no_path_of_this_machine_is_told(run: RunData) -> None:
    folders = replace(
        run, recipe=run.recipe | {"model": {"name": "/home/someone/base", "revision": None}, "graph": EDGES}
    )
    about, text = read(card(folders, "films", None, 12, None))
    assert "base_model" not in about
    assert "`base`, a folder" in text
    assert '`text`, path `"films"`' in text
    assert "someone" not in text


def test_the_hubs_data_are_named(run: RunData) -> None:
    glue = replace(run, recipe=run.recipe | {"task": {"name": "glue", "config": "sst2", "path": None}})
    about, text = read(card(glue, "films", None, 12, None))
    assert about["datasets"] == "nyu-mll/glue"
    assert '**task**: `glue`, config `"sst2"`\n' in text


def test_a_peer_tells_of_itself_alone(run: RunData) -> None:
    (run.folder / "facts.json").write_text(json.dumps(run.facts | {"peer": {"client": 2}}))
    partition = run.facts["partition"] | {"rows": [[5, 6, 7]]}
    evaluation = run.records[-1]["evaluation"] | {"clients": [0.75], "average": None, "also": []}
    record = run.records[-1] | {"clients": [2], "evaluation": evaluation, "bytes_sent": [1]}
    own = replace(run, facts=run.facts | {"partition": partition, "peer": {"client": 2}}, records=[record])
    _, text = read(card(own, "films", 2, 12, None))
    assert "by 6 parties, each on its own rows and with no server between them" in text
    assert "18 at this client" in text
    assert "**this one: 0.750**" in text
    assert "average" not in text
    assert "over 1 clients" not in text


def test_many_clients_are_told_by_their_range(run: RunData) -> None:
    partition = run.facts["partition"] | {"rows": [[n] for n in range(1, 202)]}
    _, text = read(card(replace(run, facts=run.facts | {"partition": partition}), "films", None, 12, None))
    assert "20,301 in all, a client has 1 to 201, the median 101" in text


def test_a_card_does_not_tell_the_others_numbers_of_rows(run: RunData) -> None:
    graph = {"name": "ring", "activation": 0.3, "weights": "rows", "row_counts": [70001, 2, 3]}
    _, text = read(card(replace(run, recipe=run.recipe | {"graph": graph}), "me/films", None, 12, None))
    assert "`ring`, activation 0.3, weights" in text
    assert "70001" not in text


@pytest.mark.parametrize(
    ("task", "form", "pipeline", "loader"),
    [
        ("CAUSAL_LM", "complete", "text-generation", "AutoModelForCausalLM"),
        (None, "classify", "image-classification", "AutoModelForImageClassification"),
        (None, "match", "zero-shot-image-classification", "AutoModelForZeroShotImageClassification"),
    ],
)
def test_a_card_knows_what_the_model_is_for(run: RunData, task: str, form: str, pipeline: str, loader: str) -> None:
    file = run.folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": task}))
    (run.folder / "facts.json").write_text(json.dumps(run.facts | {"task": {"form": form}}))
    about, text = read(card(run, "films", None, 12, None))
    assert about["pipeline_tag"] == pipeline
    assert f"base = {loader}.from_pretrained(" in text
    assert ("num_labels" in text) == (form == "classify")


@pytest.mark.parametrize("lost", ["adapter", "facts.json"])
def test_a_run_that_does_not_say_what_it_is_for_has_no_card(run: RunData, lost: str) -> None:
    shutil.rmtree(run.folder / lost) if lost == "adapter" else (run.folder / lost).unlink()
    with pytest.raises(RunError, match="missing or damaged"):
        card(run, "films", None, 12, None)
