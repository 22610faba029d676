"""The second step of `build`: a base with sites for the clients' adapters, and how much goes through it together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from peertune.adapters.existing import read_adapter
from peertune.adapters.matching import match_names
from peertune.adapters.peft_format import LoraConfig, TaskType, by_site, checked_pattern, find_sites
from peertune.adapters.stacked import Forward, StackedModel, attach
from peertune.assembly.ranks import ranks_of
from peertune.data.images import prompts
from peertune.errors import DataError, RecipeError
from peertune.memory import map_tensors_alone
from peertune.models.heads import seed_parameters
from peertune.models.load import MODELS, Base, Purpose, load_base, pick_device, pick_dtype
from peertune.recipe import Recipe
from peertune.types import Task, Tensors

GPU_TOKENS = 65536
"""Tokens that go through the base together on a GPU, where the recipe leaves it open: enough to fill it."""
GPU_LANGUAGE_TOKENS = 8192
"""The same for language models, which are larger, and have logits for each token of a completion."""
MOST_TOKENS = 8192
"""The most on a CPU: a small base gains nothing by more."""
BYTES_PER_PASS = 2**26
"""On a CPU, what the base's linear layers put out for the tokens that go through together. What they keep for the
backward pass is most of what a process takes. A small base is bound by calls, and takes more tokens."""
FEWEST_TOKENS = {torch.bfloat16: 1536, torch.float32: 768, torch.float64: 768}
"""On a CPU, tokens with which a large base's products are about as fast as with more."""
RECURRING = 4
"""Blocks of packed rows come in multiples of it in bfloat16 on a CPU. There PyTorch makes code for each shape of a
product, at the cost of several products, and keeps 1,024 of these, of .7 MB each."""
LOGITS_BYTES = 2**33
"""What a language model's logits and their gradients may take: 12 bytes a label and word in training, 10 in evaluation,
which has twice the tokens."""
COLUMNS = 128
"""Clients whose rows share a pass, times the largest rank: a vector meets the factors of all of them (see `Site`)."""


class Loaded(NamedTuple):
    """The base that all clients share, and where it computes."""

    base: Base
    model: StackedModel  # the base with its sites
    lora: LoraConfig  # what PEFT needs to load an adapter
    device: torch.device  # in a plan the one that it is for
    dtype: torch.dtype
    tokens: int  # about how many go through together in training

    @property
    def packed(self) -> int:
        """In multiples of how many blocks rows are packed; 0 where they aren't."""
        recurs = self.dtype == torch.bfloat16 and self.device.type == "cpu"
        return (RECURRING if recurs else 1) if self.model.packs else 0

    @property
    def planned(self) -> bool:
        """Whether the base has sizes and no weights."""
        return bool(self.base.model.device.type == "meta")


def load(recipe: Recipe, task: Task, *, planned: bool = False, by_run: bool = False) -> Loaded:
    """Load the recipe's base for this task; where it is `planned`, without weights.

    With `by_run` it is for several runs, each with what was drawn of the base from its own seed: `of_run` makes each
    one's. Raises what `load_base` raises.
    """
    purpose = _purpose(task)
    if recipe.head == "trained" and purpose in _HEADLESS:
        raise RecipeError(f"head: {_HEADLESS[purpose]} has no head to train; use head=frozen")
    device = pick_device(recipe.device, planned=planned)
    dtype = pick_dtype(recipe.model.dtype, device)
    base = load_base(
        recipe.model.name,
        revision=recipe.model.revision,
        purpose=purpose,
        classes=task.classes,
        dtype=dtype,
        device=device,
        seed=recipe.seed,
        quantization=recipe.model.quantization,
        planned=planned,
    )
    sites = _sites(recipe, base)
    lora = _lora_config(recipe, base, purpose, sites)
    model = _with_sites(recipe, task, base, lora, sites, planned, _drawn_layers(base) if by_run else ())
    if recipe.training.gradient_checkpointing:
        map_tensors_alone()  # who computes twice to save memory has no use for a heap with holes
    return Loaded(base, model, lora, device, dtype, _tokens_per_pass(recipe, base, device, dtype))


def of_run(loaded: Loaded, recipe: Recipe) -> Loaded:
    """Return the base as it is for a run of this seed, for which it was loaded `by_run`; valid until the next one's."""
    base, model = loaded.base, loaded.model
    seed_parameters(base.model, base.drawn, recipe.seed)
    head = {name: x.clone() for name, x in base.head.items()}
    by_run = {name for name in _drawn_layers(base) if name not in model.heads}
    frozen = {f"{name}.frozen": x[None] for name, x in head.items() if name.rpartition(".")[0] in by_run}
    return loaded._replace(base=replace(base, head=head), model=replace(model, frozen=frozen))


def _drawn_layers(base: Base) -> list[str]:
    """Return the layers whose weights were drawn from the seed."""
    return sorted({name.rpartition(".")[0] for name, x in base.drawn.items() if x.dim() > 1})


def begun_with(recipe: Recipe, task: Task, loaded: Loaded, adapters: Tensors) -> Tensors:
    """Return for clients with such adapters the one of `lora.init`, and give the base that one's head, **in place**.

    Raises what `read_adapter` raises.
    """
    folder, name, head = Path(recipe.lora.init or "").expanduser(), recipe.model.name, loaded.base.head
    found = read_adapter(
        folder,
        adapters,
        head,
        base=(name, str(MODELS.get(name, name))),
        lora=loaded.lora,
        classes=task.classes,
    )
    for own in head.keys() & found.keys():
        head[own].copy_(found[own])
    named = {key: key.removesuffix(".head") for key in adapters}
    return {
        key: found[named[key]].to(x.device, x.dtype).expand_as(x) for key, x in adapters.items() if named[key] in found
    }


def clients_together(recipe: Recipe) -> int:
    """Return how many clients' rows may share a pass."""
    ranks = [recipe.lora.r, *(recipe.lora.rank_pattern or {}).values(), *ranks_of(recipe)]
    return max(1, COLUMNS // max(ranks))


_HEADLESS = {"language": "a language model", "match": "a task with templates"}


_PURPOSES: Mapping[str, Purpose] = {"match": "match", "complete": "language", "choose": "language"}


def _purpose(task: Task) -> Purpose:
    """Return what the task needs a base for."""
    classifies: Purpose = "image" if task.inputs == ("pixel_values",) else "text"
    return _PURPOSES.get(task.form, classifies)


def _sites(recipe: Recipe, base: Base) -> list[str]:
    """Return the names of the layers that carry adapters."""
    without = (base.output_name,) if base.output_name else base.head_roots
    lora = recipe.lora
    return find_sites(base.model, lora.target_modules, without, lora.exclude_modules, lora.layers_to_transform)


def _lora_config(recipe: Recipe, base: Base, purpose: Purpose, sites: Sequence[str]) -> LoraConfig:
    """Say in PEFT's words what the adapters are; heads and what else the checkpoint lacks travel with them."""
    return LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.lora_alpha,  # type: ignore[arg-type]  # PEFT annotates int and divides
        rank_pattern=checked_pattern("lora.rank_pattern", recipe.lora.rank_pattern or {}, sites),
        alpha_pattern=checked_pattern("lora.alpha_pattern", recipe.lora.alpha_pattern or {}, sites),
        use_rslora=recipe.lora.use_rslora,
        lora_dropout=recipe.lora.lora_dropout,
        target_modules=recipe.lora.target_modules,
        exclude_modules=recipe.lora.exclude_modules,
        layers_to_transform=recipe.lora.layers_to_transform,
        modules_to_save=list(base.head_roots) or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in base.model.modules()),
        base_model_name_or_path=recipe.model.name,
        revision=recipe.model.revision or base.revision,
        task_type={"language": TaskType.CAUSAL_LM, "text": TaskType.SEQ_CLS}.get(purpose),
        inference_mode=True,
    )


def _with_sites(
    recipe: Recipe,
    task: Task,
    base: Base,
    lora: LoraConfig,
    sites: Sequence[str],
    planned: bool,
    by_run: Sequence[str],
) -> StackedModel:
    """Put these sites into the base, heads of the clients' own where these are trained, and layers `by_run`."""
    init = recipe.lora.init_lora_weights
    return attach(
        base.model,
        sites,
        r=recipe.lora.r,
        lora_alpha=recipe.lora.lora_alpha,
        rank_at=by_site("lora.rank_pattern", lora.rank_pattern or {}, sites),
        alpha_at=by_site("lora.alpha_pattern", lora.alpha_pattern or {}, sites),
        use_rslora=recipe.lora.use_rslora,
        ranks=ranks_of(recipe),
        own_scaling=recipe.lora.scaling == "own",
        lora_dropout=recipe.lora.lora_dropout,
        head_names=_head_layers(base) if recipe.head == "trained" else (),
        frozen_names=by_run,
        base_dropout=recipe.model.dropout,
        output_name=base.output_name,
        checkpointing=recipe.training.gradient_checkpointing,
        forward=_matching(task, base) if task.form == "match" else None,
        principal=init if init in ("pissa", "olora") and not planned else None,
    )


def _head_layers(base: Base) -> list[str]:
    """Return the layers of the head; attach() refuses those that aren't linear."""
    return [
        name
        for root in base.head_roots
        for name, layer in base.model.get_submodule(root).named_modules(prefix=root)
        if any(True for _ in layer.parameters(recurse=False))
    ]


def _matching(task: Task, base: Base) -> Forward:
    """Return what matches images with the names of the classes. Raises DataError where these are too long."""
    tokens = base.tokenizer(prompts(task), padding=True, return_tensors="pt")
    config: Any = base.model.config
    longest, most = tokens["input_ids"].shape[1], config.text_config.max_position_embeddings
    if longest > most:
        raise DataError(
            f"task.templates: {longest} tokens with the longest name, and the base takes {most}; shorten them"
        )
    return match_names(tokens["input_ids"], tokens["attention_mask"], len(task.templates))


def _tokens_per_pass(recipe: Recipe, base: Base, device: torch.device, dtype: torch.dtype) -> int:
    """Return about how many tokens go through the base together: by the recipe, or what the device has room for."""
    if recipe.training.tokens_per_pass != "auto":
        return recipe.training.tokens_per_pass
    last = None if base.output_name is None else base.model.get_output_embeddings()
    if device.type == "cpu":
        layers = [layer for layer in base.model.modules() if layer is not last]
        width: int = sum(getattr(layer, "out_features", getattr(layer, "nf", 0)) for layer in layers)  # nf: of a Conv1D
        room = BYTES_PER_PASS // max(1, width * dtype.itemsize) // 64 * 64
        tokens = max(FEWEST_TOKENS[dtype], min(MOST_TOKENS, room))
    else:
        tokens = GPU_TOKENS if last is None else GPU_LANGUAGE_TOKENS
    return tokens if last is None else max(1, min(tokens, LOGITS_BYTES // (24 * last.out_features)))
