"""Runs that begin with an adapter that is there already."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from peertune import build, load_recipe
from peertune.assembly.build import Built, agreed
from peertune.errors import ModelError, RecipeError
from peertune.models.load import MODELS
from peertune.runs import directory, exports
from peertune.types import Batch

BASE = str(MODELS["digits-vit"])
LORA = "lora={r: 3, lora_alpha: 6, target_modules: [q_proj, v_proj]}"
WEIGHTS = "adapter_model.safetensors"


def made(folder: Path | None, *more: str) -> Built:
    init = [] if folder is None else [f"lora.init={folder}"]
    words = ["clients=3", "partition={name: iid}", "model.dtype=float32", LORA, *init, *more]
    return build(load_recipe("digits-demo", words))


def batch(pixels: Tensor, client: int) -> Batch:
    whose = torch.full((len(pixels),), client)
    return Batch({"pixel_values": pixels}, whose, whose, torch.ones(len(pixels), dtype=torch.float64), whose)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """An adapter that PEFT saved, images, and what PEFT's model makes of them."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    base = AutoModelForImageClassification.from_pretrained(BASE, num_labels=5, ignore_mismatched_sizes=True)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    for name, x in model.named_parameters():
        if x.requires_grad:
            torch.nn.init.normal_(x, std=0.2 if "lora" in name else 1.0)
    pixels = torch.randn(6, 1, 8, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model.eval()(pixel_values=pixels).logits
        model.save_pretrained(str(folder))
    return folder, pixels, logits


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_all_clients_begin_with_the_adapter_and_the_head_that_peft_saved(
    saved: tuple[Path, Tensor, Tensor], head: str
) -> None:
    folder, pixels, logits = saved
    job = made(folder, f"head={head}", "evaluate.load_best=true").job
    for client in range(3):
        found = job.model(job.state.adapters, batch(pixels, client), training=False)
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    written = load_file(folder / WEIGHTS)
    for name, x in job.state.adapters.items():
        if name.endswith(".A"):
            assert torch.equal(x[2], written[f"base_model.model.{name[:-2]}.lora_A.weight"])
    assert made(None, f"head={head}").job.state.adapters.keys() == job.state.adapters.keys()


def test_a_run_begins_with_what_another_exported_to_the_bit(tmp_path: Path) -> None:
    one = made(None, "seed=5", "head=frozen")
    state = one.job.state.clone()
    for number, x in enumerate(state.adapters.values()):
        torch.nn.init.normal_(x, generator=torch.Generator().manual_seed(number))
    run = tmp_path / "run"
    shared: dict[str, Any] = {"lora": one.lora, "head": one.head, "labels": one.labels, "taken": {}}
    directory.create(run, recipe="", resolved="", environment={}, facts={}, **shared)
    exports.write_all(run, state, range(3))
    folder = run / "adapters" / "client-001"
    other = made(folder, "seed=6", "head=frozen")
    for name, x in other.job.state.adapters.items():
        assert torch.equal(x, state.adapters[name][1].expand_as(x))
    assert all(torch.equal(x, other.head[name]) for name, x in one.head.items())
    assert any(not torch.equal(x, made(None, "seed=6", "head=frozen").head[name]) for name, x in one.head.items())

    shutil.copytree(folder, tmp_path / "elsewhere")
    assert agreed(other) == agreed(made(tmp_path / "elsewhere", "seed=6", "head=frozen")), "peers may have it anywhere"
    there = load_file(tmp_path / "elsewhere" / WEIGHTS)
    there[next(name for name in there if "lora_A" in name)] += 1
    save_file(there, tmp_path / "elsewhere" / WEIGHTS)
    differ = agreed(made(tmp_path / "elsewhere", "seed=6", "head=frozen")).items() ^ agreed(other).items()
    assert {name for name, _ in differ} == {"start"}
    (folder / "labels.json").write_text('["a", "b"]')
    with pytest.raises(ModelError, match=r"its classes are \['a', 'b'\], and the task's \['5',"):
        made(folder)


def test_an_adapter_with_ranks_and_scales_by_layer_fits_a_recipe_with_the_same(
    saved: tuple[Path, Tensor, Tensor], tmp_path: Path
) -> None:
    folder, pixels, _ = saved
    base = AutoModelForImageClassification.from_pretrained(BASE, num_labels=5, ignore_mismatched_sizes=True)
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}, "use_rslora": True}
    head = ["classifier"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=head, **patterns)
    model = get_peft_model(base, config)
    for name, x in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(x, std=0.2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model.eval()(pixel_values=pixels).logits
        model.save_pretrained(str(tmp_path))
    same = ["lora.rank_pattern={'layers.*q_proj': 2}", "lora.alpha_pattern={v_proj: 9}", "lora.use_rslora=true"]
    job = made(tmp_path, *same).job
    found = job.model(job.state.adapters, batch(pixels, 1), training=False)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match=r"its r is 2 at \S+q_proj, and the recipe's 3"):
        made(tmp_path, *same[1:])
    with pytest.raises(ModelError, match=r"its use_rslora is true, and the recipe's false"):
        made(tmp_path, *same[:2])
    with pytest.raises(ModelError, match=r"its r is 3 at \S+q_proj, and the recipe's 2"):
        made(folder, same[0])


def config(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return change


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return write


def first(found: dict[str, Tensor], part: str) -> str:
    return min(name for name in found if part in name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            config(r=4),
            r"its r is 4 at vit\.\S+, and the recipe's 3; give both alike, in lora\.r and lora\.rank_pattern",
        ),
        (config(lora_alpha=7), r"its lora_alpha is 7 at vit\.\S+, and the recipe's 6; give both alike"),
        (config(base_model_name_or_path="bert"), "its base is bert, and model.name is digits-vit"),
        (config(peft_type="IA3"), "is of the kind IA3, and adapters here are LORA"),
        (config(use_rslora=True), "its use_rslora is true, and the recipe's false; give both alike"),
        (config(rank_pattern={"q_proj": 2}), r"its r is 2 at vit\.\S+q_proj, and the recipe's 3"),
        (
            config(alpha_pattern={"layers.1.*v_proj": 2}),
            r"its lora_alpha is 2 at vit\.layers\.1\.\S+v_proj, and the re",
        ),
        (config(rank_pattern={"q(": 2}), r"its rank_pattern: 'q\(' is no regular expression"),
        (config(rank_pattern=[2]), r"its rank_pattern is \[2\], and no mapping of names; give what PEFT saved"),
        (config(bias="all"), "it has biases of its own"),
        (config(init_lora_weights="pissa_niter_4"), "it is over a base that pissa_niter_4 changed"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "no readable adapter_config.json"),
        (lambda folder: (folder / "labels.json").write_text("{"), "no readable labels.json"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), f"no readable {WEIGHTS}"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), f"no readable {WEIGHTS}"),
        (tensors(lambda x: x.pop(first(x, "lora_A"))), r"lacks vit\..*lora_A\.weight, which lora\.target_modules has"),
        (tensors(lambda x: x.update(odd=torch.ones(1))), "has odd, which lora.target_modules lacks"),
        (tensors(lambda x: x.pop(first(x, "bias"))), "has a part of the head, and lacks classifier.bias"),
        (
            tensors(lambda x: x.update({first(x, "lora_B"): torch.ones(2, 3)})),
            r"lora_B.weight is \(2, 3\), and the recipe's \(\d+, 3\)",
        ),
        (
            tensors(lambda x: x.update({first(x, "lora_A"): x[first(x, "lora_A")].int()})),
            "is of type I32; give one in floating point",
        ),
        (tensors(lambda x: x[first(x, "lora_A")].fill_(torch.nan)), "holds numbers that are not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(
    saved: tuple[Path, Tensor, Tensor], tmp_path: Path, change: Callable[[Path], Any], said: str
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "adapter"))
    change(folder)
    with pytest.raises(ModelError, match=said) as caught:
        made(folder)
    assert str(caught.value).startswith(f"lora.init: {folder}: ")
    assert "\n" not in str(caught.value)


def test_one_start_is_enough(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gaussian is one start, and lora\.init another; leave one out"):
        load_recipe("digits-demo", [f"lora.init={tmp_path}", "lora.init_lora_weights=gaussian"])
