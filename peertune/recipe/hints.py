"""What is wrong with a recipe, in one line, and which key was meant."""

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError

from peertune.errors import unknown
from peertune.recipe.schema import Recipe


def explain(error: ValidationError) -> str:
    """Put the gravest of pydantic's complaints in one line: a key that is misspelt is also one that is missing."""
    first = min(error.errors(), key=lambda complaint: complaint["type"] != "extra_forbidden")
    path: list[str] = []
    block: type[BaseModel] = Recipe
    for step in first["loc"]:  # goes on, inside a value, with the alternatives that pydantic tried
        path.append(str(step))
        inner = block.model_fields[step].annotation if step in block.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        block = inner
    key = ".".join(path)
    match first["type"]:
        case "extra_forbidden":
            return unknown_key(key, block.model_fields)
        case "missing":
            return f"{key}: is missing"
        case "model_type" | "model_attributes_type":
            return f"{key}: is a block of keys, not {first['input']!r}"
        case _:
            return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"


def unknown_key(key: str, known: Collection[str]) -> str:
    """Say that a block of the `known` keys has no dotted `key`, and which one was meant, wherever it stands."""
    last = key.rpartition(".")[2]
    ends = {path: path.rpartition(".")[2] for path in _paths(Recipe)}
    meant = list(_OTHER_NAMES.get(last.lower(), ()))
    if not meant:
        meant = get_close_matches(last, known, n=1) + [path for path, end in ends.items() if end == last]
    if not meant:
        near = get_close_matches(last, ends.values(), n=1, cutoff=0.8)
        meant = [path for path, end in ends.items() if end in near]
    if meant:
        return f"{key}: unknown key {last!r}, did you mean {' or '.join(meant)}?"
    return unknown(key, last, known).replace("unknown name", "unknown key")


def _paths(block: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a block and of those in it."""
    for name, field in block.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _paths(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "activation": ("graph.activation",),
    "alpha": ("lora.lora_alpha", "partition.alpha"),
    "batch_size": ("training.per_device_train_batch_size",),
    "bf16": ("model.dtype",),
    "epochs": ("rounds", "training.local_steps"),
    "eval_steps": ("evaluate.every",),
    "fp16": ("model.dtype",),
    "load_in_4bit": ("model.quantization",),
    "lr": ("training.learning_rate",),
    "lr_scheduler": ("training.lr_scheduler_type",),
    "max_seq_length": ("training.max_length",),
    "max_steps": ("rounds", "training.local_steps"),
    "model_name_or_path": ("model.name",),
    "num_train_epochs": ("rounds", "training.local_steps"),
    "optimizer": ("training.optim",),
    "rank": ("lora.r",),
    "save_steps": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "scheduler": ("training.lr_scheduler_type",),
    "torch_dtype": ("model.dtype",),
    "train_batch_size": ("training.per_device_train_batch_size",),
    "warmup": ("training.warmup_steps",),
    "warmup_ratio": ("training.warmup_steps",),
    "wd": ("training.weight_decay",),
}
"""Names that the Trainer, PEFT, TRL or a habit has for a key → the keys here."""
