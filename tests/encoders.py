"""Tiny bases of many architectures in float64, stacks over them, batches, and what a pass answers."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from peertune.adapters.attention import register_attention
from peertune.adapters.peft_format import find_sites
from peertune.adapters.stacked import StackedModel, attach, init_adapters
from peertune.data.batches import pack_rows
from peertune.rounds.training import row_losses
from peertune.types import Batch, Tensors

# PEFT asks every model whether it checkpoints gradients, in a way that transformers will drop.
K, R, CLASSES, PAD, EOS, VOCAB = 3, 2, 3, 1, 29, 30
ROWS = (4, 2, 3)  # rows of each client

sizes: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "num_labels": CLASSES,
    "max_position_embeddings": 24,
}
grouped: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 4}


def bert_like(p: float) -> dict[str, Any]:
    return {**sizes, "hidden_dropout_prob": p, "attention_probs_dropout_prob": p}


PACKED = (
    *("bert", "roberta", "electra", "camembert", "albert", "distilbert", "modernbert"),
    *("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2"),
)
PADDED = ("deberta_v2", "convbert", "fnet", "mpnet", "bloom")
FEW = {"bert", "modernbert", "gpt2", "llama"}
"""The bases of which the quick tests are: both ways to attend, both kinds of heads, and GPT-2's transposed layers."""
HEADS = ("classifier", "score", "pre_classifier")
CONFIGS: dict[str, tuple[Callable[[float], Any], list[str]]] = {  # dropout → config, and the layers that become sites
    "bert": (lambda p: transformers.BertConfig(**bert_like(p)), ["query", "value"]),
    "roberta": (lambda p: transformers.RobertaConfig(**bert_like(p)), ["query", "value"]),
    "electra": (lambda p: transformers.ElectraConfig(**bert_like(p), embedding_size=8), ["query", "value"]),
    "camembert": (lambda p: transformers.CamembertConfig(**bert_like(p)), ["query", "value"]),
    "albert": (lambda p: transformers.AlbertConfig(**bert_like(p), embedding_size=8), ["query", "value"]),
    "distilbert": (
        lambda p: transformers.DistilBertConfig(
            **sizes, dim=16, n_layers=2, n_heads=4, hidden_dim=24, dropout=p, attention_dropout=p
        ),
        ["q_lin", "v_lin"],
    ),
    "modernbert": (
        lambda p: transformers.ModernBertConfig(
            **sizes,
            attention_dropout=p,
            mlp_dropout=p,
            local_attention=4,
            layer_types=["full_attention", "sliding_attention"],
        ),
        ["Wqkv", "Wo"],
    ),
    "deberta_v2": (
        lambda p: transformers.DebertaV2Config(**bert_like(p), relative_attention=True, pos_att_type=["p2c", "c2p"]),
        ["query_proj", "value_proj"],
    ),
    "convbert": (
        lambda p: transformers.ConvBertConfig(**bert_like(p), embedding_size=8, conv_kernel_size=3),
        ["query", "value"],
    ),
    "fnet": (lambda p: transformers.FNetConfig(**sizes, hidden_dropout_prob=p), ["dense"]),
    "mpnet": (lambda p: transformers.MPNetConfig(**bert_like(p)), ["q", "v"]),
    "gpt2": (
        lambda p: transformers.GPT2Config(**sizes, n_inner=24, embd_pdrop=p, resid_pdrop=p, attn_pdrop=p),
        ["c_attn", "c_fc"],
    ),
    "gpt_neox": (
        lambda p: transformers.GPTNeoXConfig(**sizes, hidden_dropout=p, attention_dropout=p),
        ["query_key_value"],
    ),
    "bloom": (
        lambda p: transformers.BloomConfig(**sizes, n_layer=2, n_head=4, hidden_dropout=p, attention_dropout=p),
        ["query_key_value"],
    ),
    "llama": (lambda p: transformers.LlamaConfig(**sizes, **grouped, attention_dropout=p), ["q_proj", "down_proj"]),
    "mistral": (
        lambda p: transformers.MistralConfig(**sizes, **grouped, attention_dropout=p, sliding_window=3),
        ["q_proj", "v_proj"],
    ),
    "qwen2": (lambda p: transformers.Qwen2Config(**sizes, **grouped, attention_dropout=p), ["q_proj", "v_proj"]),
    "qwen3": (lambda p: transformers.Qwen3Config(**sizes, **grouped, attention_dropout=p), ["q_proj", "v_proj"]),
    "gemma2": (
        lambda p: transformers.Gemma2Config(**sizes, **grouped, attention_dropout=p, sliding_window=3),
        ["q_proj", "v_proj"],
    ),
}


def make_base(name: str, dropout: float = 0.0) -> nn.Module:
    """A tiny base in float64, with weights large enough for every part to matter."""
    register_attention()
    config = CONFIGS[name][0](dropout)
    if name in PACKED:
        config._attn_implementation = "peertune"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config).double()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.normal_(0.0, 0.3)
    return base.eval()


def disagreeing(model: StackedModel) -> Tensors:
    """Adapters of K clients in which no two agree, and B is not 0."""
    generator = torch.Generator().manual_seed(1)
    return {
        part: x + 0.2 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        for part, x in init_adapters(model, K, seed=0).items()
    }


def make_stack(
    name: str, *, dropout: float = 0.0, head: bool = False, all_linear: bool = False
) -> tuple[StackedModel, Tensors]:
    """A stack over a base, and adapters in which no two clients agree and B is not 0."""
    base = make_base(name, dropout)
    heads = [layer for layer, x in base.named_modules() if layer.startswith(HEADS) and isinstance(x, nn.Linear)]
    model = attach(
        base,
        find_sites(base, "all-linear" if all_linear else CONFIGS[name][1], HEADS),
        r=R,
        lora_alpha=3,
        lora_dropout=dropout,
        head_names=heads if head else (),
        base_dropout=True,
    )
    return model, disagreeing(model)


def make_batch(lengths: list[int], packed: int) -> Batch:
    """Rows of these lengths, of K clients in turn; where `packed`, in multiples of so many blocks."""
    generator, count = torch.Generator().manual_seed(2), len(lengths)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, EOS, mask.shape, generator=generator).where(mask, PAD)
    return Batch(
        {"input_ids": ids, "attention_mask": mask.long()},
        torch.arange(count) % CLASSES,
        torch.arange(count) % K,
        torch.ones(count, dtype=torch.float64),
        torch.arange(count) + 7_000_000_000,
        pack_rows(np.array(lengths), packed) if packed else None,
    )


def answers(model: StackedModel, adapters: Tensors, batch: Batch) -> Tensors:
    """The logits of training, and the gradient of every adapter."""
    params = {name: x.clone().requires_grad_() for name, x in adapters.items()}
    logits = model(params, batch, training=True)
    losses = row_losses(logits, batch) * batch.weights
    grads = torch.autograd.grad(losses.sum(), list(params.values()))
    return {"logits": logits.detach(), **dict(zip(params, grads, strict=True))}


def each(names: Iterable[str]) -> list[Any]:
    """Return parameters for tests of these bases; the quick tests are of a few."""
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.thorough) for name in names]
