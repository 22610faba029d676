"""How `digits-vit` was made: a small ViT that has learnt the public digits 0–4, and no digit that a client holds.

It has 4 layers of width 64 over 8 × 8 pixels in patches of 2. Its weights come with the package: other processors and
other numbers of threads add floats in another order, and 400 steps later the weights are others. This made them:

    python -m peertune.models.digits peertune/models/digits-vit
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from peertune.data.digits import public_digits


def train(steps: int = 400) -> Any:
    """Return a `ViTModel` in float32, trained on a CPU by one thread; the global generator is as it was."""
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 5
    split = public_digits()
    pixels = torch.from_numpy(np.asarray(split.columns["pixel_values"]))
    labels = torch.from_numpy(np.asarray(split.labels))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = transformers.ViTForImageClassification(config)
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
            for _ in range(steps):
                rows = torch.randint(len(pixels), (64,))
                loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels[rows]).logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    finally:
        torch.set_num_threads(threads)
    return model.vit


def write(model: Any, folder: Path) -> None:
    """Write the weights and the config, as `from_pretrained` reads them; the weights say what made them."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"format": "pt", "made_by": f"python -m peertune.models.digits, PyTorch {torch.__version__}"}
    save_file(model.state_dict(), folder / "model.safetensors", metadata=made)
    model.config.to_json_file(folder / "config.json")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m peertune.models.digits FOLDER")
    write(train(), Path(sys.argv[1]))
