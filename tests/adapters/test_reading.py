"""What nobody reads of the last layer is not computed, and everything comes out as if it were."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from encoders import PACKED, K, R, answers, each, make_base, make_batch, make_stack
from torch import Tensor, nn

from peertune.adapters.attention import register_attention
from peertune.adapters.peft_format import find_sites
from peertune.adapters.stacked import StackedModel, attach, init_adapters
from peertune.types import Batch, Tensors

WHOLE = ("albert",)  # whose one layer is called again and again


def assert_as_whole(model: StackedModel, adapters: Tensors, batch: Batch) -> None:
    """The logits and gradients are those of the last layer computed for all tokens."""
    assert model.reading is not None
    expected = answers(replace(model, reading=None), adapters, batch)
    assert all(x.any() for x in expected.values())
    for part, x in answers(model, adapters, batch).items():
        torch.testing.assert_close(x, expected[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", each(name for name in PACKED if name not in WHOLE))
def test_the_last_layer_of_the_tokens_that_are_read_gives_the_logits_and_gradients_of_the_whole(
    name: str, packed: bool
) -> None:
    model, adapters = make_stack(name, dropout=0.2, head=True, all_linear=True)
    assert_as_whole(model, adapters, make_batch([5, 3, 20, 1, 7, 2, 9, 4, 6], packed))
    assert_as_whole(model, adapters, make_batch([6] * 9, packed))


def test_a_vit_reads_its_first_token() -> None:
    register_attention()
    size: dict[str, Any] = {"image_size": 8, "patch_size": 2, "hidden_size": 16, "intermediate_size": 24}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_channels": 1, "num_labels": 3}
    config = transformers.ViTConfig(**size)
    config._attn_implementation = "peertune"
    base = transformers.AutoModelForImageClassification.from_config(config).double()
    with torch.no_grad():
        for number, parameter in enumerate(base.parameters()):
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(number))
    model = attach(base, find_sites(base, "all-linear", ["classifier"]), r=R, lora_alpha=3, lora_dropout=0.2)
    assert model.reading is not None
    assert model.reading.queries == ("vit.layers.1.attention.q_proj",)
    like = make_batch([3] * 9, packed=False)
    pixels = torch.randn(9, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    adapters = init_adapters(model, K, seed=0, gaussian=True)
    adapters = {part: x + 0.1 * torch.randn_like(x) for part, x in adapters.items()}
    assert_as_whole(model, adapters, replace(like, inputs={"pixel_values": pixels}))


def test_a_last_token_that_looks_like_padding_is_told_apart_as_the_base_does() -> None:
    model, adapters = make_stack("llama")
    assert model.reading is not None
    assert model.reading.token == "last"
    batch = make_batch([5, 3, 20, 1, 7], packed=True)
    ids = batch.inputs["input_ids"].clone()
    ids[2, 18:20] = model.reading.pad  # type: ignore[assignment]  # which it has
    assert_as_whole(model, adapters, replace(batch, inputs={**batch.inputs, "input_ids": ids}))


class Mean(nn.Module):
    """A classifier that reads all tokens."""

    main_input_name = "input_ids"

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.of, self.config = of, of.config

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.of.get_input_embeddings()
        return embeddings

    def forward(self, **inputs: Tensor) -> Any:
        hidden = self.of.bert(**inputs).last_hidden_state
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.of.classifier(hidden.mean(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_whose_head_reads_all_tokens_is_computed_whole(dtype: torch.dtype) -> None:
    for base, reads in ((make_base("bert"), True), (Mean(make_base("bert")), False), (make_base("albert"), False)):
        sites = find_sites(base, ["query", "value"], ["classifier", "of.classifier"])
        assert (attach(base.to(dtype), sites, r=R, lora_alpha=3).reading is not None) == reads
