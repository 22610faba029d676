"""Tiny random language models, and a tokenizer for them, as a snapshot of the hub has them."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

POSITIONS = 96
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@cache
def _bytes() -> str:
    """A tokenizer of bytes, in the form that it is saved in."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: number + 2 for number, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def make_tokenizer(chat: str | None = None) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bytes()), bos_token="<s>", eos_token="</s>", model_max_length=POSITIONS
    )
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = chat
    return tokenizer


def make_model(name: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Any:
    """Llama with grouped queries, GPT-2 with its transposed layers, or Qwen 2 with its biases."""
    common: dict[str, Any] = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped: dict[str, Any] = {**common, **llama, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
    grouped["attention_dropout"] = dropout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        match name:
            case "llama":
                model: Any = LlamaForCausalLM(LlamaConfig(**grouped))
            case "qwen2":
                model = Qwen2ForCausalLM(Qwen2Config(**grouped, tie_word_embeddings=True))
            case _:
                common |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
                common |= {"attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout}
                model = GPT2LMHeadModel(GPT2Config(**common))
    return model.to(dtype).eval()


def save(folder: Path, name: str = "llama", chat: str | None = None) -> Path:
    """Write a model and its tokenizer into a folder."""
    make_model(name, torch.float32).save_pretrained(folder)
    make_tokenizer(chat).save_pretrained(folder)
    return folder
