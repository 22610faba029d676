"""What a base makes of rows, against a plain model's, one row at a time; and which rows are looked at."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoding import save_tokenizer, sizes, words
from seeing import COLOURS, save_clip, save_images
from speaking import save

from peertune import load_recipe
from peertune.assembly import probing
from peertune.assembly.probing import describe_shift, probed_rows, read_features
from peertune.assembly.registry import build_task
from peertune.errors import DataError
from peertune.models.load import MODELS
from peertune.recipe import Recipe

LENGTHS = (1, 7, 3, 9, 4, 2, 8, 5, 6, 3, 1, 7)


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def features(recipe: Recipe, rows: list[int]) -> np.ndarray[Any, Any]:
    done = list[int]()
    found = read_features(recipe, build_task(recipe), np.array(rows), done.append)
    assert done[-1] == len(rows)
    assert found.dtype == np.float32
    return found


@torch.no_grad()
def plain(model: Any, **inputs: torch.Tensor) -> np.ndarray[Any, Any]:
    """The mean over one row's last hidden states."""
    hidden: torch.Tensor = model.eval()(**inputs).last_hidden_state
    return hidden[0].mean(0).numpy()


def test_features_are_the_means_of_the_last_hidden_states_of_images() -> None:
    recipe = load_recipe("digits-demo")
    pixels = np.asarray(build_task(recipe).train.columns["pixel_values"])
    model = transformers.AutoModel.from_pretrained(MODELS["digits-vit"])
    wanted = [plain(model, pixel_values=torch.tensor(pixels[row])[None]) for row in (3, 20, 100)]
    assert features(recipe, [3, 20, 100]) == pytest.approx(np.stack(wanted), abs=1e-5)


def test_features_of_a_convolutional_base_are_means_over_places(tmp_path: Path) -> None:
    size: dict[str, Any] = {"num_channels": 1, "image_size": 8, "patch_size": 2, "num_stages": 2}
    config = transformers.ConvNextConfig(**size, hidden_sizes=[8, 12], depths=[1, 1])
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path)
    recipe = load_recipe("digits-demo", [f"model.name={tmp_path}", "lora={r: 2, target_modules: [pwconv1]}"])
    pixels = np.asarray(build_task(recipe).train.columns["pixel_values"])
    model: Any = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        hidden = model(pixel_values=torch.tensor(pixels[[1, 5]])).last_hidden_state
    assert hidden.shape == (2, 12, 2, 2)
    assert features(recipe, [1, 5]) == pytest.approx(hidden.mean((2, 3)).numpy(), abs=1e-5)


@pytest.mark.parametrize("init", ["true", "pissa"])
def test_features_of_texts_are_those_of_each_row_by_itself_whatever_clients_begin_with(
    tmp_path: Path, init: str
) -> None:
    transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **words)).save_pretrained(
        tmp_path / "bert"
    )
    save_tokenizer(tmp_path / "bert", pad_token="[PAD]")
    texts = [
        " ".join(["good", "bad", "film", "bad"][(row + n) % 4] for n in range(size)) for row, size in enumerate(LENGTHS)
    ]
    data = write(tmp_path / "data", [{"text": text, "label": row % 2} for row, text in enumerate(texts)])
    task = f"task={{name: text, path: '{data}', inputs: [text], label: label}}"
    base = [f"model={{name: '{tmp_path / 'bert'}', dtype: float32}}", "lora={r: 2, target_modules: [query, value]}"]
    base += [f"lora.init_lora_weights={init}", "partition={name: iid}", "clients=2"]
    model = transformers.AutoModel.from_pretrained(tmp_path / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    rows = [row for row in range(len(texts)) if row != 4]
    wanted = [plain(model, **tokenizer(texts[row], return_tensors="pt")) for row in rows]
    assert features(load_recipe("digits-demo", [*base, task]), rows) == pytest.approx(np.stack(wanted), abs=1e-5)


def test_a_language_task_without_classes_has_features_and_no_labels(tmp_path: Path) -> None:
    base = save(tmp_path / "llama")
    rows = [{"prompt": "a" * size, "completion": " yes"} for size in LENGTHS]
    data = write(tmp_path / "data", rows)
    recipe = load_recipe(
        "digits-demo",
        [
            f"model={{name: '{base}', dtype: float32}}",
            "lora.target_modules=[q_proj]",
            "head=frozen",
            f"task={{name: instructions, path: '{data}'}}",
            "partition={name: iid}",
            "clients=2",
        ],
    )
    probed = probed_rows(recipe, build_task(recipe))
    assert probed.labels is None
    model = transformers.AutoModel.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    texts = ["a" * size + " yes" + tokenizer.eos_token for size in LENGTHS]
    wanted = [plain(model, **tokenizer(text, return_tensors="pt")) for text in texts]
    assert features(recipe, [*range(len(rows))]) == pytest.approx(np.stack(wanted), abs=1e-4)


def test_of_a_clip_the_images_are_looked_at(tmp_path: Path) -> None:
    base = save_clip(tmp_path / "clip")
    data = save_images(tmp_path / "images", dict.fromkeys(COLOURS, 6))
    recipe = load_recipe(
        "decaf-clip-flowers",
        [
            f"model={{name: '{base}', dtype: float32}}",
            *("task.id=null", f"task.path={data}", "task.train=train", "task.shots=null", "clients=2"),
        ],
    )
    probed = probed_rows(recipe, build_task(recipe))
    found = features(recipe, probed.rows.tolist())
    assert found.shape == (18, 32)
    facts = describe_shift(probed, found)
    assert (facts["rows"], facts["left_out"], len(facts["clients"])) == (18, [], 2)


def test_rows_are_drawn_from_what_clients_train_on_and_clients_with_few_of_them_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe(
        "digits-demo", ["evaluate={on: own, held_out: 0.2}", "partition={name: quantity_skew, alpha: 0.5}"]
    )
    task = build_task(recipe)
    whole = probed_rows(recipe, task)
    kept = np.setdiff1d(np.arange(10), whole.left_out)
    assert whole.left_out
    assert np.unique(whole.owners).tolist() == kept.tolist()
    assert (np.diff(whole.rows) > 0).all()
    assert whole.labels is not None
    assert np.array_equal(whole.labels, task.train.labels[whole.rows])
    monkeypatch.setattr(probing, "MOST_ROWS", 100)
    some = probed_rows(recipe, task)
    assert len(some.rows) <= 100
    assert set(some.rows) <= set(whole.rows) | set(range(716))
    assert len(some.left_out) >= len(whole.left_out)
    facts = describe_shift(some, np.random.default_rng(0).normal(size=(len(some.rows), 3)).astype(np.float32))
    assert [client for client, share in enumerate(facts["clients"]) if share is None] == some.left_out


@pytest.mark.parametrize(
    ("settings", "said"),
    [(["clients=1"], "1 of 1 have 5 or more of the 716 rows"), (["clients=300"], "0 of 300 have 5 or more")],
)
def test_where_no_two_clients_can_be_told_apart_it_is_refused_before_a_base_is_loaded(
    settings: list[str], said: str
) -> None:
    recipe = load_recipe("digits-demo", ["partition={name: iid}", "model.name=nowhere", *settings])
    with pytest.raises(DataError, match=f"probe: it tells clients apart, and {said}"):
        probed_rows(recipe, build_task(recipe))
