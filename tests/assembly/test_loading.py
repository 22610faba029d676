"""How much goes through a base together where a recipe leaves it open."""

import pytest
import torch
from encoders import make_stack
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from peertune import load_recipe
from peertune.adapters.peft_format import LoraConfig
from peertune.adapters.stacked import StackedModel
from peertune.assembly.build import build
from peertune.assembly.loading import Loaded, _tokens_per_pass
from peertune.models.load import Base

RECIPE = load_recipe("digits-demo", [])


def base_of(model: PreTrainedModel, output_name: str | None = None) -> Base:
    return Base(model, None, (), {}, {}, {}, output_name, (), None, 0, None)


def bert(width: int, layers: int) -> Base:
    config = BertConfig(num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=4)
    with torch.device("meta"):
        return base_of(BertForSequenceClassification(config))


def gpt2(words: int) -> Base:
    with torch.device("meta"):
        return base_of(GPT2LMHeadModel(GPT2Config(vocab_size=words, n_embd=384, n_layer=6, n_head=4)), "lm_head")


@pytest.mark.parametrize(
    ("base", "single", "half", "cuda"),
    [
        (bert(32, 2), 8192, 8192, 65536),
        (bert(256, 4), 1728, 3520, 65536),
        (bert(384, 6), 768, 1536, 65536),
        (bert(1024, 24), 768, 1536, 65536),
        (gpt2(1000), 768, 1600, 8192),
        (gpt2(500_000), 715, 715, 715),  # what its logits leave room for
    ],
    ids=["small", "medium", "MiniLM", "large", "language", "many words"],
)
def test_a_pass_has_as_many_tokens_as_the_width_of_the_base_leaves_room_for(
    base: Base, single: int, half: int, cuda: int
) -> None:
    assert _tokens_per_pass(RECIPE, base, torch.device("cpu"), torch.float32) == single
    assert _tokens_per_pass(RECIPE, base, torch.device("cpu"), torch.bfloat16) == half
    assert _tokens_per_pass(RECIPE, base, torch.device("cuda"), torch.bfloat16) == cuda
    asked = load_recipe("digits-demo", ["training.tokens_per_pass=100"])
    assert _tokens_per_pass(asked, base, torch.device("cpu"), torch.float32) == 100


def test_blocks_come_in_multiples_where_each_shape_costs() -> None:
    packing, padding = make_stack("bert")[0], build(load_recipe("digits-demo", ["device=cpu"])).job.model

    def packed(model: StackedModel, dtype: torch.dtype, device: str) -> int:
        return Loaded(bert(32, 2), model, LoraConfig(), torch.device(device), dtype, 0).packed

    assert packed(packing, torch.bfloat16, "cpu") == 4
    assert [packed(packing, torch.float32, "cpu"), packed(packing, torch.bfloat16, "cuda")] == [1, 1]
    assert packed(padding, torch.bfloat16, "cpu") == 0
