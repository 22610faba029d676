"""The step on a GPU: RoBERTa-large's shape with random weights, bfloat16, 10 and 100 clients, beside the PEFT loop."""

import tempfile
from pathlib import Path

import torch
import transformers

from benchmarks.measure import Figure
from benchmarks.setup import dropout, make, model
from benchmarks.step import compare


def run(repeats: int = 5) -> list[Figure]:
    """Measure with dropout off; without a GPU there is nothing to measure."""
    if not torch.cuda.is_available():
        return []
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder), hidden_size=1024, layers=24, heads=16)
        for clients in (10, 100):
            setup = make(
                f"model.name={folder}",
                f"clients={clients}",
                "partition={name: iid}",
                "algorithm.name=dec_lora",
                "training.local_steps=1",
                *dropout(False),
            )
            label = f"RoBERTa-large's shape, {clients} clients"
            figures += compare(setup, label, ("", "≥ 3"), repeats, rate="≥ 45")
    return figures


def save_base(folder: Path, *, hidden_size: int, layers: int, heads: int) -> None:
    """Write a RoBERTa with random weights, and MiniLM's tokenizer, which serves as well for speed."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model())
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=514,
        type_vocab_size=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
