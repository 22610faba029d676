"""The bridge to Hugging Face PEFT, its home: its rules for choosing layers, and its format for one client's adapter."""

import json
import logging
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from difflib import get_close_matches
from math import sqrt
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peertune.errors import ModelError
from peertune.types import Tensors, kind

# Where bitsandbytes is installed, PEFT imports it, and it complains of a CPU kernel that is of no use here.
_complaints = logging.getLogger("bitsandbytes.backends.cpu.ops")
_complaints.disabled = True
from peft import LoraConfig as LoraConfig  # noqa: E402
from peft import PeftModel  # noqa: E402
from peft import TaskType as TaskType  # noqa: E402
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

_complaints.disabled = False

log = logging.getLogger(__name__)

Value = TypeVar("Value", bound=float)

PREFIX = "base_model.model."
"""What PEFT writes before the name of a module of the base."""
FACTORS = {"A": "lora_A.weight", "B": "lora_B.weight"}
"""A factor's kind → its last part in PEFT's names."""
LOADERS = {
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
}
"""What a model is for, in the hub's words → the class of `transformers` that loads its base."""


def find_sites(
    base: nn.Module,
    target_modules: str | Sequence[str],
    head_roots: Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: Sequence[int] | None = None,
) -> list[str]:
    """Return the names of the layers that PEFT's rules choose.

    `target_modules` are last parts of names, a regular expression for whole names, or `all-linear`. Layers of the
    classification head, and a language model's output layer, never become sites. Of those that are chosen,
    `exclude_modules` leaves out some, by names or an expression, and `layers_to_transform` all of other numbers. PEFT
    passes over the numbers where a layer is named whole; here they hold.

    Raises ModelError where an expression is malformed or chooses nothing, and for each name or number without effect.
    """
    sites = _targeted(base, target_modules, head_roots)
    numbered = {name: int(found[1]) for name in sites if (found := re.match(r".*?\.[^.]*\.(\d+)\.", name))}
    for number in layers_to_transform or ():
        if number not in numbered.values():
            there = ", ".join(map(str, sorted(set(numbered.values())))) or "without numbers"
            raise ModelError(f"lora.layers_to_transform: there is no layer {number}; those with adapters are {there}")
    words = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
    out = {word: _left_out(sites, word, expression=isinstance(exclude_modules, str)) for word in words}
    for word, names in out.items():
        if not names:
            raise ModelError(
                f"lora.exclude_modules: {word!r} leaves out none of the layers that target_modules chooses, "
                f"such as {sites[0]}"
            )
    kept = [
        name
        for name in sites
        if (layers_to_transform is None or numbered.get(name) in layers_to_transform)
        and not any(name in names for names in out.values())
    ]
    if not kept:
        raise ModelError("lora: exclude_modules and layers_to_transform leave no layer for adapters; leave out less")
    return kept


def _left_out(sites: Sequence[str], word: str, *, expression: bool) -> list[str]:
    """Return which of these layers PEFT's `exclude_modules` leaves out."""
    config = LoraConfig(target_modules=list(sites), exclude_modules=word if expression else [word])
    try:
        return [name for name in sites if not check_target_module_exists(config, name)]
    except re.error as error:
        raise ModelError(f"lora.exclude_modules: {word!r} is no regular expression ({error})") from None


def _targeted(base: nn.Module, target_modules: str | Sequence[str], head_roots: Sequence[str]) -> list[str]:
    config = LoraConfig(target_modules=target_modules if isinstance(target_modules, str) else list(target_modules))
    _maybe_include_all_linear_layers(config, base)  # writes the names into the config
    in_head = tuple(f"{root}." for root in head_roots)
    layers = {name: layer for name, layer in base.named_modules() if name}
    outside = {name: layer for name, layer in layers.items() if not f"{name}.".startswith(in_head)}
    try:
        chosen = [name for name in layers if check_target_module_exists(config, name)]
    except re.error as error:
        raise ModelError(f"lora.target_modules: {target_modules!r} is no regular expression ({error})") from None
    linear = {name.rpartition(".")[2] for name, layer in outside.items() if isinstance(layer, (nn.Linear, Conv1D))}
    sites = [name for name in chosen if name in outside]
    for word in [target_modules] if isinstance(target_modules, str) else target_modules:
        whole = isinstance(target_modules, str)
        own = [name for name in chosen if whole or f".{name}".endswith(f".{word}")]
        if outside.keys().isdisjoint(own):
            raise ModelError(f"lora.target_modules: {word!r} {_no_site(word, own, linear, expression=whole)}")
    if not sites:
        raise ModelError(f"lora.target_modules: names no layer; the linear layers here are {', '.join(sorted(linear))}")
    left = [name for name in chosen if name not in outside and isinstance(layers[name], (nn.Linear, Conv1D))]
    if left and str(target_modules).lower() != "all-linear":
        log.warning(
            f"lora.target_modules: {left[0]}, of the head or the output layer, carries no adapter, "
            f"though {target_modules!r} chooses it"
        )
    return sites


def _no_site(word: str, own: Sequence[str], linear: Collection[str], *, expression: bool) -> str:
    """Say why a word, or an expression, that chooses its `own` layers chooses no site, and what would be right."""
    known = f"the linear layers here are {', '.join(sorted(linear))}"
    if own:
        return f"chooses only {own[0]}, of the head or the output layer, which carry no adapters; {known}"
    if expression:
        meant = [part for part in re.split(r"[^\w.-]+", word) if part]
        listed = f"; for layers by the last parts of their names write a list, [{', '.join(meant)}]"
        near = get_close_matches(word, ["all-linear"])
        hint = f", did you mean {near[0]}?" if near else listed if set(meant) & set(linear) else f"; {known}"
        return f"is a regular expression, which no layer's whole name matches{hint}"
    if word == "all-linear":
        return "stands by itself and in no list; write lora.target_modules=all-linear"
    near = get_close_matches(word, linear, n=1)
    return f"matches no layer; {f'did you mean {near[0]}? ' if near else ''}{known}"


def by_site(where: str, pattern: Mapping[str, Value], sites: Iterable[str]) -> dict[str, Value]:
    """Return by site the value of the first key that matches it, of PEFT's `rank_pattern` or `alpha_pattern`.

    A key is a regular expression for a whole name, or for the end of one after a dot. Sites that no key matches are
    left out. Raises ModelError, which begins with `where`, for a key that is malformed.
    """
    sites, found = list(sites), dict[str, Value]()
    for key in reversed(list(pattern)):
        found |= dict.fromkeys(_matched(where, key, sites), pattern[key])
    return found


def checked_pattern(where: str, pattern: Mapping[str, Value], sites: Sequence[str]) -> dict[str, Value]:
    """Return a pattern that says the same of these sites, in the order in which PEFT saves its keys: the alphabet's.

    PEFT takes the first key that matches (`findings/peft-pattern-order.sh`). Where another order would change what the
    keys say, whole names stand for them. Raises ModelError, which begins with `where`, for a key that is malformed, and
    for one that is no site's first.
    """
    first: dict[str, str] = {}
    for key in pattern:
        own = _matched(where, key, sites)
        if not own:
            ends = sorted({site.rpartition(".")[2] for site in sites})
            near = " or ".join(get_close_matches(key, [*ends, *sites]))
            hint = f"did you mean {near}? " if near else ""
            raise ModelError(f"{where}: {key!r} matches no layer with an adapter; {hint}those are {', '.join(ends)}")
        if first.keys() >= set(own):
            raise ModelError(
                f"{where}: {key!r} is without effect, since {first[own[0]]!r}, which matches {own[0]} as well, "
                "stands before it; put it first, or leave it out"
            )
        first = dict.fromkeys(own, key) | first
    saved, found = dict(sorted(pattern.items())), by_site(where, pattern, sites)
    return saved if by_site(where, saved, sites) == found else {f"^{re.escape(name)}": x for name, x in found.items()}


def _matched(where: str, key: str, sites: Iterable[str]) -> list[str]:
    try:
        return [site for site in sites if get_pattern_key([key], site) == key]
    except re.error as error:
        raise ModelError(f"{where}: {key!r} is no regular expression ({error.msg})") from None


def save_config(folder: Path, lora: LoraConfig) -> None:
    """Write PEFT's `adapter_config.json` into a folder, the same each time."""
    lora.save_pretrained(str(folder))
    # PEFT keeps the names in a set and writes them in any order: the same run should give the same file.
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    config["lora_alpha"] = _whole(config["lora_alpha"])
    config["alpha_pattern"] = {key: _whole(alpha) for key, alpha in config["alpha_pattern"].items()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _whole(alpha: float) -> float:
    """Return a whole number as one: readers declare it so, as PEFT itself does."""
    return int(alpha) if float(alpha).is_integer() else alpha


def save_adapter(
    folder: Path,
    adapter: Tensors,
    *,
    head: Mapping[str, Tensor],
    lora: LoraConfig,
    taken: Tensors | None = None,
) -> None:
    """Write one client's adapter into a folder so that `PeftModel.from_pretrained` loads it.

    `adapter` holds tensors without a client axis: `<site>.A [r, d_in]`, `<site>.B [d_out, r]`, `<parameter>.head`.
    `head` holds the head's parameters by name, and what else the base's checkpoint lacks: what was drawn from the seed
    and frozen must travel with the adapter, or a reader would draw another, and PEFT reads a head whole or not at all.
    A trained head takes precedence over it. What was `taken` out of the base as the clients' start, `<site>.A` and
    `<site>.B`, is added with the other sign, so that the adapter fits the base as it is published: at twice the rank.

    In the place of a regular expression, `all-linear` or a choice among layers these stand one by one: not every
    program that serves adapters knows PEFT's rules, and none has to guess which layers there were.
    """
    tensors = {f"{PREFIX}{name}": value for name, value in head.items()}
    if taken:
        lora = _doubled(lora)
        a = {name: torch.cat([adapter[name].cpu(), x]) for name, x in taken.items() if kind(name) == "A"}
        b = {name: torch.cat([adapter[name].cpu(), -x], 1) for name, x in taken.items() if kind(name) == "B"}
        adapter = adapter | a | b
    for name, value in adapter.items():
        path, what = name.rpartition(".")[0], kind(name)
        tensors[f"{PREFIX}{path}" + (f".{FACTORS[what]}" if what in FACTORS else "")] = value
    if isinstance(lora.target_modules, str) or lora.exclude_modules or lora.layers_to_transform is not None:
        lora = copy(lora)
        lora.exclude_modules = lora.layers_to_transform = None
        lora.target_modules = [name.removesuffix(".A") for name in adapter if kind(name) == "A"]
    save_config(folder, lora)
    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    (folder / "adapter_model.safetensors").write_bytes(data)


def _doubled(lora: LoraConfig) -> LoraConfig:
    """Return the same with twice the rank at each site, and the same scale."""
    lora = at_rank(lora, 2 * lora.r, own_scaling=False)
    lora.rank_pattern = {key: 2 * r for key, r in (lora.rank_pattern or {}).items()}
    return lora


def at_rank(lora: LoraConfig, r: int, *, own_scaling: bool) -> LoraConfig:
    """Return the same for a client of another rank, with the same scale, or the scale of its own rank."""
    times = 1.0 if own_scaling else sqrt(r / lora.r) if lora.use_rslora else r / lora.r
    lora = copy(lora)
    lora.r, lora.lora_alpha = r, times * lora.lora_alpha  # type: ignore[assignment]  # PEFT annotates int
    lora.alpha_pattern = {key: times * alpha for key, alpha in (lora.alpha_pattern or {}).items()}
    return lora


def merge_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """Return the base with the adapter in `folder` added to its weights, and with the head that travels with it.

    The sum is rounded to the base's own precision. The base is used up. Raises ModelError where a weight comes out that
    is not finite.
    """
    with warnings.catch_warnings():  # PEFT asks every model for what transformers will drop
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = PeftModel.from_pretrained(base, str(folder))
    try:
        merged: nn.Module = model.merge_and_unload(safe_merge=True)  # else a weight that is tied would change twice
    except ValueError as error:
        raise ModelError(f"--merge: the adapter holds numbers that are not finite ({error}); take another") from None
    return merged
