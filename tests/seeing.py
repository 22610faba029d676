"""A tiny CLIP and a tiny ViT as the hub lays them out, and images that they can learn to tell apart."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers

COLOURS = {"blue_iris": (40, 40, 220), "fern": (30, 160, 40), "red_rose": (220, 30, 40)}
SIDE = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz,."
sizes: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "projection_dim": 16,
}


def save_clip(folder: Path) -> Path:
    """Save config, safetensors, tokenizer and preprocessor of a random CLIP that spells names letter by letter."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    config = transformers.CLIPConfig(
        text_config=sizes
        | {"vocab_size": len(words), "max_position_embeddings": 40}
        | {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
        vision_config=sizes | {"image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder)
    _prepare(folder, crop_size=SIDE, do_center_crop=True, feature_extractor_type="CLIPFeatureExtractor", resample=3)
    return folder


def save_vit(folder: Path) -> Path:
    """Save config, safetensors and preprocessor of a random ViT without a head."""
    config = transformers.ViTConfig(**sizes, image_size=SIDE, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ViTModel(config).save_pretrained(folder)
    _prepare(folder)
    return folder


def _prepare(folder: Path, **more: Any) -> None:
    """Write how images are prepared, as the hub's older checkpoints have it."""
    half = [0.5, 0.5, 0.5]
    prepared = {"do_normalize": True, "do_resize": True, "image_mean": half, "image_std": half, "size": SIDE}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared | more))


def save_images(folder: Path, counts: Mapping[str, int], splits: tuple[str, ...] = ("train", "validation")) -> Path:
    """Draw noise around each class's colour, in either orientation, half of it as PNG and half as JPEG."""
    draw = np.random.default_rng(0)
    for split in splits:
        for name, count in counts.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                size = (30, 20, 3) if number % 3 else (20, 30, 3)
                pixels = np.clip(np.array(COLOURS[name]) + draw.normal(0, 30, size), 0, 255).astype(np.uint8)
                suffix = "png" if number % 2 else "jpg"
                PIL.Image.fromarray(pixels).save(folder / split / name / f"{number:03}.{suffix}")
    return folder
