"""Small encoders and their tokenizers, written as checkpoints and loaded as bases."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from peertune.models.load import Base, Purpose, load_base

CPU = torch.device("cpu")
WORDS = ["[PAD]", "[UNK]", "[EOS]", "good", "bad", "film"]
sizes: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
words: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 0, "max_position_embeddings": 12}


NAMES = ["no", "yes", "maybe", "never", "always"]


def load(name: str | Path, *, classes: int = 2, image: bool = False, seed: int = 0) -> Base:
    purpose: Purpose = "image" if image else "text"
    return load_base(
        str(name), revision=None, purpose=purpose, classes=NAMES[:classes], dtype=torch.float32, device=CPU, seed=seed
    )


def save_tokenizer(folder: Path, **special: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(
        folder
    )
