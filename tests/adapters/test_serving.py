"""Adapters of language models are what vLLM and Text Generation Inference load.

Neither is installed here: these tests state the rules by which they read an adapter. vLLM's are those of `PEFTHelper`
and `LoRAModel.from_local_checkpoint`, TGI's those of `adapters/lora.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType
from safetensors.torch import load_file
from speaking import make_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peertune.adapters.peft_format import find_sites, merge_adapter, save_adapter
from peertune.errors import ModelError

TARGETS = {
    "llama": (["q_proj", "v_proj"], "all-linear", r"model\.layers\.1\..*(k_proj|down_proj)", r".*_proj|lm_head"),
    "gpt2": (["c_attn"], "all-linear"),
    "qwen2": (["up_proj"], "all-linear"),
}
every_choice = pytest.mark.parametrize(
    ("name", "targets"), [(name, targets) for name, tried in TARGETS.items() for targets in tried], ids=str
)


def make_adapter(model: nn.Module, targets: str | list[str], folder: Path, alpha: float = 3.0) -> list[str]:
    """Write an adapter of rank 2 as a run does; return its sites."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    sites = find_sites(model, targets, [name for name, module in model.named_modules() if module is output])
    draw = torch.Generator().manual_seed(1)
    adapter = {}
    for site in sites:
        weight: Any = model.get_submodule(site).weight
        d_out, d_in = weight.T.shape if isinstance(model.get_submodule(site), Conv1D) else weight.shape
        adapter[f"{site}.A"] = torch.randn(2, d_in, generator=draw, dtype=torch.float64)
        adapter[f"{site}.B"] = torch.randn(d_out, 2, generator=draw, dtype=torch.float64)
    lora = LoraConfig(
        r=2,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    )
    folder.mkdir()
    save_adapter(folder, adapter, head={}, lora=lora)
    return sites


@every_choice
def test_vllm_takes_the_configuration_and_finds_every_layer(
    tmp_path: Path, name: str, targets: str | list[str]
) -> None:
    model = make_model(name)
    sites = make_adapter(model, targets, tmp_path / "adapter", alpha=4.0)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    for key in ("r", "lora_alpha"):
        assert type(config[key]) is int
    assert isinstance(config["target_modules"], list)
    assert all(isinstance(target, str) for target in config["target_modules"])
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert not config["use_rslora"]
    linear = {path.rpartition(".")[2] for path, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert key.startswith("base_model.model.")
        *path, factor, weight = key.removeprefix("base_model.model.").split(".")
        assert weight == "weight"
        assert factor in ("lora_A", "lora_B")
        assert path[-1] in linear
        assert value.shape[0 if factor == "lora_A" else 1] == config["r"]
        found.setdefault(".".join(path), {})[factor] = value
    assert sorted(found) == sorted(sites)
    assert all(len(pair) == 2 for pair in found.values())
    assert {site.rpartition(".")[2] for site in sites} == {t.rpartition(".")[2] for t in config["target_modules"]}


def test_tgi_finds_the_factors_by_the_layers_full_names(tmp_path: Path) -> None:
    make_adapter(make_model("llama"), ["q_proj", "v_proj"], tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.model.layers.{layer}.self_attn.{site}.lora_{factor}.weight"
        for layer in range(2)
        for site in ("q_proj", "v_proj")
        for factor in "AB"
    }
    config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))  # TGI reads it by PEFT
    assert (config.r, config.lora_alpha, config.fan_in_fan_out, config.use_rslora) == (2, 3, False, False)


@torch.no_grad()
@every_choice
def test_peft_puts_the_factors_on_the_same_layers_and_a_merged_model_says_the_same(
    tmp_path: Path, name: str, targets: str | list[str]
) -> None:
    sites = make_adapter(make_model(name), targets, tmp_path / "adapter")
    ids = torch.randint(2, 258, (3, 7), generator=torch.Generator().manual_seed(0))
    model = PeftModel.from_pretrained(make_model(name), tmp_path / "adapter")
    expected = model(input_ids=ids).logits
    assert not torch.allclose(make_model(name)(input_ids=ids).logits, expected, rtol=1e-3)
    wrapped = {
        key.removeprefix("base_model.model.").removesuffix(".base_layer")
        for key, layer in model.named_modules()
        if key.endswith(".base_layer")
    }
    assert wrapped == set(sites)
    merged = merge_adapter(make_model(name), tmp_path / "adapter")
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_an_adapter_that_is_not_finite_is_not_merged(tmp_path: Path) -> None:
    make_adapter(make_model("llama"), ["q_proj"], tmp_path / "adapter", alpha=float("inf"))
    with pytest.raises(ModelError, match="--merge: the adapter holds numbers that are not finite"):
        merge_adapter(make_model("llama"), tmp_path / "adapter")
