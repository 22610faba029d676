"""Recipes for language models from a folder on disk to adapters that PEFT loads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Call
from peft import PeftModel
from speaking import CHAT, make_model, make_tokenizer, save
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from peertune.assembly.build import build
from peertune.engines.simulator import simulate
from peertune.recipe import check_recipe

COLOURS = {"sky": "blue", "sun": "red", "leaf": "green", "snow": "white"}


def rows_of(count: int) -> list[dict[str, str]]:
    names = [list(COLOURS)[number % len(COLOURS)] for number in range(count)]
    return [{"prompt": f"{name} is", "completion": f" {COLOURS[name]}", "warm": str(name == "sun")} for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("language")
    save(path / "llama", "llama", CHAT)
    save(path / "gpt2", "gpt2")
    for name, count in (("train", 64), ("validation", 8)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(count)))
    return path


def recipe_of(folder: Path, **changes: Any) -> dict[str, Any]:
    task = {"name": "instructions", "path": str(folder)} | changes.pop("task", {})
    training = {"learning_rate": 0.02, "local_steps": 10, "per_device_train_batch_size": 8} | changes.pop(
        "training", {}
    )
    return {
        "model": {"name": str(folder / "llama"), "dtype": "float32"} | changes.pop("model", {}),
        "lora": {"r": 4, "target_modules": "all-linear"},
        "task": task,
        "clients": 2,
        "algorithm": {"name": "dec_lora"},
        "training": training | changes.pop("training", {}),
        "rounds": 4,
        "evaluate": {"every": 4, "max_new_tokens": 8},
    } | changes


def run(peertune: Call, recipe: dict[str, Any], out: Path) -> tuple[list[dict[str, Any]], str]:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = peertune("run", "recipe.yaml", "--out", out)
    assert code == 0, err
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()], err


COLUMNS = {"prompt": "{prompt}", "completion": "{completion}"}
LIKELY = {"label": "warm", "words": [" no", " yes"], "prompt": "{prompt}"}


@pytest.mark.parametrize(
    ("task", "learnt"),
    [
        ({"metric": ["perplexity", "token_accuracy"]}, {"perplexity": (30, 3), "token_accuracy": (0.2, 0.95)}),
        ({"metric": ["last_number", "exact_match"]}, {"last_number": (0.1, 0.0), "exact_match": (0.1, 0.95)}),
        ({"metric": "exact_match", "chat": True, **COLUMNS}, {"exact_match": (0.1, 0.95)}),
        ({"name": "label_words", "metric": "f1", **LIKELY}, {"f1 of 1": (0.9, 1.0)}),
    ],
    ids=["tokens", "texts", "chat", "words"],
)
def test_what_is_made_to_be_learnt_is_learnt(
    peertune: Call, folder: Path, tmp_path: Path, task: dict[str, Any], learnt: dict[str, tuple[float, float]]
) -> None:
    judged = {"every": 4, "max_new_tokens": 8, "on": "both"}
    records, _ = run(peertune, recipe_of(folder, task=task, evaluate=judged), tmp_path / "run")
    job = build(check_recipe(recipe_of(folder, task=task), "test")).job
    first = job.evaluate(job.state.stacks, job.clients)
    last = records[-1]["evaluation"]
    assert [found["metric"] for found in (last, *last["also"])] == list(learnt)
    for start, found in zip((first, *first.also), (last, *last["also"]), strict=True):
        scores = [*found["clients"], *found["own"], found["average"]]
        assert len(scores) == 5
        assert start.constant == found["constant"]
        before, after = learnt[found["metric"]]
        if found["metric"] == "perplexity":
            assert min(start.clients) > before > found["constant"] > after > max(scores)
        else:
            assert max(start.clients) < before
            assert min(scores) >= after
    constants = {"exact_match": 2 / 8, "last_number": 0.0, "f1 of 1": 2 * 2 / (2 + 8)}  # eight rows, four colours
    assert all(
        found["constant"] == constants.get(found["metric"], found["constant"]) for found in (last, *last["also"])
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_load_and_say_what_they_said(peertune: Call, folder: Path, tmp_path: Path, name: str) -> None:
    base = folder / name
    records, _ = run(peertune, recipe_of(folder, model={"name": str(base)}, rounds=2), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapters" / "client-001" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, tmp_path / "run" / "adapters" / "client-001").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses = []
    for row in rows_of(8):
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        said = torch.where(torch.arange(ids.shape[1]) < len(row["prompt"]), -100, ids)
        losses.append((float(tuned(input_ids=ids, labels=said).loss.detach()), int((said != -100).sum())))
    total, tokens = np.array(losses).T
    assert np.exp((total * tokens).sum() / tokens.sum()) == pytest.approx(
        records[-1]["evaluation"]["clients"][1], rel=1e-4
    )


@pytest.mark.parametrize("long_rows", ["cut", "drop"])
def test_rows_that_are_too_long_are_counted_and_cut_or_left_out(
    peertune: Call, folder: Path, tmp_path: Path, long_rows: str
) -> None:
    for split in ("train", "validation"):
        rows = (folder / f"{split}.jsonl").read_text() + '{"prompt": "sky is"}\n' * (split == "train")
        (tmp_path / f"{split}.jsonl").write_text(rows)
    changes = {"training": {"max_length": 13, "long_rows": long_rows}, "rounds": 1, "missing_cells": "drop"}
    recipe = recipe_of(folder, **changes, task={"path": str(tmp_path)})
    _, err = run(peertune, recipe, tmp_path / "run")  # a token for each letter, and the end
    done = "cut" if long_rows == "cut" else "left out"
    assert f"32 of 64 rows of train have more than 13 tokens and are {done}" in " ".join(err.split())
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert facts["long_rows"] == {"train": 32, "validation": 4}
    assert facts["missing_cells"] == {"train": 1, "validation": 0}
    assert sum(map(sum, facts["partition"]["rows"])) == (64 if long_rows == "cut" else 32)
    assert facts["validation"]["rows"] == (8 if long_rows == "cut" else 4)


def test_a_client_left_without_rows_is_refused(folder: Path) -> None:
    recipe = recipe_of(folder, training={"max_length": 5, "long_rows": "drop"})
    assert "training.long_rows: client 0 has no row of up to 5 tokens" in refusal(recipe)


def refusal(recipe: dict[str, Any]) -> str:
    from peertune.errors import PeertuneError

    with pytest.raises(PeertuneError) as caught:
        build(check_recipe(recipe, "test"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_base_that_sees_what_is_to_come_is_refused(folder: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    BertForMaskedLM(BertConfig(vocab_size=258, **sizes)).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    message = refusal(recipe_of(folder, model={"name": str(tmp_path / "bert")}))
    assert "BertLMHeadModel is no causal language model: it looks at the tokens to come; give one such" in message


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "mute")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "mute")
    message = refusal(recipe_of(folder, model={"name": str(tmp_path / "mute")}))
    assert "its tokenizer has no token to pad with; give it a pad_token" in message


def test_a_word_without_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "deaf")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("!", "")
    tokenizer.save_pretrained(tmp_path / "deaf")
    task = {"name": "label_words", **LIKELY, "words": [" no", "!"]}
    message = refusal(recipe_of(folder, model={"name": str(tmp_path / "deaf")}, task=task))
    assert "'!' has no tokens; give a completion that has some" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"task": {"prompt": "{prompt}", "completion": "{completion}", "chat": True}, "model": {"name": "gpt2"}},
            "messages need a tokenizer with a chat template, and the base's has none",
        ),
        ({"model": {"quantization": "nf4"}}, "model.quantization: nf4 needs a CUDA device and this one is cpu"),
        ({"evaluate": {"temperature": 0.7}}, "evaluate.temperature: nothing is generated for the metric perplexity"),
        ({"head": "trained"}, "head: a language model has no head to train; use head=frozen"),
        ({"task": {"metric": "exact_match"}, "evaluate": {"max_new_tokens": 96}}, "leaves no room for a prompt"),
        (
            {"lora": {"target_modules": ["lm_head"]}},
            "lora.target_modules: 'lm_head' chooses only lm_head, of the head or the output",
        ),
    ],
)
def test_what_can_not_be_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    if "name" in changes.get("model", {}):
        changes = changes | {"model": {"name": str(folder / changes["model"]["name"])}}
    assert said in refusal(recipe_of(folder, **changes))


def test_weights_that_are_not_finite_are_told(folder: Path, tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    message = refusal(recipe_of(folder, model={"name": str(tmp_path / "broken")}))
    assert "what it computes is not finite, its weights are damaged; fetch it again" in message


def test_a_token_that_the_base_does_not_know_does_not_pad_and_is_refused_in_rows(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "wide")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "wide")
    found = build(check_recipe(recipe_of(folder, model={"name": str(tmp_path / "wide")}), "test"))
    assert next(simulate(found.job)).loss
    tokenizer.add_tokens(["blue"])
    tokenizer.save_pretrained(tmp_path / "wide")
    message = refusal(recipe_of(folder, model={"name": str(tmp_path / "wide")}))
    assert "its tokenizer makes tokens that it has no embedding for, such as 'blue'; give" in message


def test_a_templates_own_end_ends_what_is_generated(peertune: Call, folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "chatty")
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}<s>\n{% endfor %}")  # it ends in no end of text
    tokenizer.save_pretrained(tmp_path / "chatty")
    task = {"metric": "exact_match", "chat": True, "prompt": "{prompt}", "completion": "{completion}"}
    records, _ = run(peertune, recipe_of(folder, task=task, model={"name": str(tmp_path / "chatty")}), tmp_path / "run")
    assert min(records[-1]["evaluation"]["clients"]) == 1


def test_a_job_is_the_same_whichever_way_its_rows_travel(folder: Path) -> None:
    """Chunks of clients, micro-batches, checkpointing: the same losses and adapters."""

    def end(**training: Any) -> Any:
        recipe = recipe_of(folder, rounds=1, training=training, model={"dtype": "float64"})
        return list(simulate(build(check_recipe(recipe, "test")).job))[-1]

    expected = end()
    assert expected.state is not None
    for other in ({"clients_per_pass": 1}, {"tokens_per_pass": 40}, {"gradient_checkpointing": True}):
        found = end(**other)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-9)
        for name, x in found.state.adapters.items():
            torch.testing.assert_close(x, expected.state.adapters[name], rtol=1e-6, atol=1e-9)
