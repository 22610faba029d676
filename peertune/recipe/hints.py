"""What is wrong with a recipe, in one line, and which key was meant."""

from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from functools import reduce
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from peertune.errors import unknown
from peertune.recipe.schema import Recipe, block_defaults, flat

ELSEWHERE_PAGE = "docs/recipe.md, Names that recipes lack"


def explain(error: ValidationError, values: Mapping[str, Any]) -> str:
    """Put the gravest of pydantic's complaints in one line: a key that is misspelt is also one that is missing.

    `values` are what was complained of.
    """
    first = min(error.errors(), key=lambda one: (one["type"] != "extra_forbidden", -len(one["loc"])))  # the nearest
    path: list[str] = []
    block: type[BaseModel] = Recipe
    for step in first["loc"]:  # goes on, inside a value, with the alternatives that pydantic tried
        if isinstance(step, int):
            path[-1] += f"[{step}]"
            continue
        path.append(str(step))
        inner = block.model_fields[step].annotation if step in block.model_fields else None
        if get_origin(inner) is list:
            (inner,) = get_args(inner)
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        block = inner
    key = ".".join(path)
    match first["type"]:
        case "extra_forbidden" if (instead := ELSEWHERE.get(path[-1])) is not None:
            try:
                said = instead(first["input"], {**block_defaults(), **flat(values)})
            except (KeyError, TypeError, ValueError):  # what the numbers would come from is wrong itself
                said = instead(1, {**block_defaults(), "rounds": 1})
            return f"{key}: {said} ({ELSEWHERE_PAGE})"
        case "extra_forbidden":
            return unknown_key(key, block.model_fields)
        case "missing":
            return f"{key}: is missing"
        case "model_type" | "model_attributes_type":
            return f"{key}: is a block of keys, not {first['input']!r}"
        case _:
            page = f" ({ELSEWHERE_PAGE})" if path[-1] == "init_lora_weights" else ""
            value, entry = reduce(_within, path, values), first["loc"][-1]
            key += f".{entry}" if isinstance(value, Mapping) and entry in value else ""
            return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}{page}"


def _within(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


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
    "early_stopping_patience": ("evaluate.patience",),
    "eval_steps": ("evaluate.every",),
    "fp16": ("model.dtype",),
    "load_best_model_at_end": ("evaluate.load_best",),
    "load_in_4bit": ("model.quantization",),
    "lr": ("training.learning_rate",),
    "lr_scheduler": ("training.lr_scheduler_type",),
    "max_seq_length": ("training.max_length",),
    "max_steps": ("rounds", "training.local_steps"),
    "model_name_or_path": ("model.name",),
    "optimizer": ("training.optim",),
    "rank": ("lora.r",),
    "rslora": ("lora.use_rslora",),
    "save_steps": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "scheduler": ("training.lr_scheduler_type",),
    "torch_dtype": ("model.dtype",),
    "train_batch_size": ("training.per_device_train_batch_size",),
    "warmup": ("training.warmup_steps",),
    "wd": ("training.weight_decay",),
}
"""Names that the Trainer, PEFT, TRL or a habit has for a key → the keys here."""

_SIZE = "training.per_device_train_batch_size"


def _epochs(given: Any, of: Mapping[str, Any]) -> str:
    steps, rows = of["rounds"] * of["training.local_steps"], of[_SIZE]
    return (
        f"a run has rounds · training.local_steps = {steps:,} steps of {rows:,} rows, so that each client passes over "
        f"{steps * rows:,} rows; give rounds, or training.local_steps, for {given} times those that a client holds"
    )


def _accumulation(given: Any, of: Mapping[str, Any]) -> str:
    times = given if isinstance(given, int) else 1
    return (
        "a step is one batch, cut for the device by training.tokens_per_pass; "
        f"for {times} times {of[_SIZE]} rows give {_SIZE}={times * of[_SIZE]}"
    )


def _metric(given: Any, of: Mapping[str, Any]) -> str:
    return "the best is by the score of the task's metric, whose better side is known; leave it out"


def _threshold(given: Any, of: Mapping[str, Any]) -> str:
    return "any improvement counts for evaluate.patience, however small; leave it out"


ELSEWHERE: Mapping[str, Callable[[Any, Mapping[str, Any]], str]] = {
    "bias": lambda given, of: "biases stay the base's own, since no method says how to mix them; leave it out",
    "early_stopping_threshold": _threshold,
    "epochs": _epochs,
    "fan_in_fan_out": lambda given, of: "how a layer's weight lies is known from the layer; leave it out",
    "gradient_accumulation_steps": _accumulation,
    "greater_is_better": _metric,
    "layers_pattern": lambda given, of: "where a base's layers lie is found out; leave it out",
    "loftq_config": lambda given, of: "no factors are made for what quantisation loses; leave it out",
    "lora_bias": lambda given, of: "no method says how biases are mixed; leave it out",
    "metric_for_best_model": _metric,
    "modules_to_save": lambda given, of: "the head trains and is mixed with head=trained, and nothing else can be",
    "num_train_epochs": _epochs,
    "task_type": lambda given, of: "it is the task's, by task.name; leave it out",
    "use_dora": lambda given, of: "no method says how DoRA's magnitudes are mixed; leave it out",
    "warmup_ratio": lambda given, of: (
        "is training.warmup_steps, which below 1 is a share of the steps; give one of the two, and that"
    ),
}
"""Names of PEFT and the Trainer that no key has → what is right instead, by the value given and the recipe's values."""
