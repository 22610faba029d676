"""An adapter that is there already, in PEFT's format, as the clients' start.

Nothing but JSON and safetensors is read, and no tensor before its name, shape and type are known to fit.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from peertune.adapters.peft_format import FACTORS, PREFIX, LoraConfig, by_site
from peertune.errors import ModelError
from peertune.types import Tensors, kind

_OTHERWISE = {
    "use_dora": "it has DoRA's magnitudes",
    "layer_replication": "it repeats layers of the base",
}
"""What PEFT can make of an adapter that no recipe can → why."""
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of PEFT's that change the base: saved as they are, such adapters fit no base that is published."""


def read_adapter(
    folder: Path,
    like: Tensors,
    head: Mapping[str, Tensor],
    *,
    base: Sequence[str],
    lora: LoraConfig,
    classes: Sequence[str],
) -> Tensors:
    """Return the adapter in a folder: `<site>.A [r, d_in]`, `<site>.B [d_out, r]`, and its part of the head, by name.

    `like` has the tensors of clients, `[K, …]`, whose sites, ranks and sizes must be the same. `head` is the base's,
    by name. `base` are names of the base, of which the adapter must have one; of a folder the last part counts. `lora`
    has the clients' ranks and scales, which must be the adapter's at each site.

    Raises ModelError, with both values, for an adapter of another base, rank, scale or set of layers, for one that is
    more than factors and a head, and for one that is damaged or not finite.
    """
    where = f"lora.init: {folder}"
    config = _read(where, folder, "adapter_config.json")
    _check(where, config, base)
    _check_scales(where, config, lora, [name.removesuffix(".A") for name in like if kind(name) == "A"])
    if (folder / "labels.json").exists() and (said := _read(where, folder, "labels.json")) != list(classes):
        raise ModelError(f"{where}: its classes are {said}, and the task's {list(classes)}; give both in one order")
    factors = {f"{PREFIX}{name[:-1]}{FACTORS[kind(name)]}": name for name in like if kind(name) in FACTORS}
    heads = {f"{PREFIX}{name}": name for name in head}
    shapes = {key: tuple(like[name].shape[1:]) for key, name in factors.items()}
    shapes |= {key: tuple(head[name].shape) for key, name in heads.items()}
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            there = list(file.keys())
            _check_names(where, set(there), set(factors), set(heads))
            for key in there:
                part = file.get_slice(key)
                if tuple(part.get_shape()) != shapes[key]:
                    raise ModelError(f"{where}: {key} is {tuple(part.get_shape())}, and the recipe's {shapes[key]}")
                if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ModelError(f"{where}: {key} is of type {part.get_dtype()}; give one in floating point")
            found = {(factors | heads)[key]: file.get_tensor(key) for key in there}
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{where}: has no readable adapter_model.safetensors ({reason}); give what PEFT saved"
        ) from None
    if odd := next((name for name, x in found.items() if not bool(x.isfinite().all())), None):
        raise ModelError(f"{where}: {odd} holds numbers that are not finite; give another")
    return found


def _read(where: str, folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f"{where}: has no readable {name}; give a folder that PEFT saved") from None


def _check(where: str, config: Any, base: Sequence[str]) -> None:
    """Raise ModelError where the configuration is of an adapter of another base, or of another kind."""
    kind_of = config.get("peft_type") if isinstance(config, dict) else None
    if kind_of != "LORA":
        raise ModelError(f"{where}: is of the kind {kind_of}, and adapters here are LORA; give such a one")
    said = str(config.get("base_model_name_or_path"))
    names = {part for name in base for part in (name, Path(name).name if Path(name).is_dir() else name)}
    if said not in names and Path(said).name not in names:
        raise ModelError(f"{where}: its base is {said}, and model.name is {base[0]}; give an adapter of this base")
    for key, why in _OTHERWISE.items():
        if config.get(key):
            raise ModelError(f"{where}: {why} ({key}), which no recipe can say; give one without")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{where}: it has biases of its own (bias), which no recipe can say; give one without")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASES):
        raise ModelError(
            f"{where}: it is over a base that {start} changed; save it with path_initial_model_for_weight_conversion"
        )


def _check_scales(where: str, config: Mapping[str, Any], lora: LoraConfig, sites: Sequence[str]) -> None:
    """Raise ModelError where the configuration's rank or scale at a site isn't the recipe's."""
    if bool(config.get("use_rslora")) != lora.use_rslora:
        raise ModelError(
            f"{where}: its use_rslora is {str(not lora.use_rslora).lower()}, and the recipe's "
            f"{str(lora.use_rslora).lower()}; give both alike"
        )
    for key, of in {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}.items():
        theirs, own = (_at(f"{where}: its {of}", said, key, of, sites) for said in (config, vars(lora)))
        for site in sites:
            if theirs[site] != own[site]:
                raise ModelError(
                    f"{where}: its {key} is {theirs[site]} at {site}, and the recipe's {own[site]:.17g}; "
                    f"give both alike, in lora.{key} and lora.{of}"
                )


def _at(where: str, config: Mapping[str, Any], key: str, of: str, sites: Sequence[str]) -> dict[str, Any]:
    """Return by site what a configuration says of it, by a key and the pattern of others."""
    pattern = config.get(of) or {}
    if not isinstance(pattern, Mapping):
        raise ModelError(f"{where} is {pattern}, and no mapping of names; give what PEFT saved")
    return dict.fromkeys(sites, config.get(key)) | by_site(where, pattern, sites)


def _check_names(where: str, there: set[str], factors: set[str], heads: set[str]) -> None:
    """Raise ModelError where a file's names are not those of all factors, and of whole modules of the head."""

    def first(names: set[str]) -> str:
        return min(names).removeprefix(PREFIX)

    if lacking := factors - there:
        raise ModelError(f"{where}: lacks {first(lacking)}, which lora.target_modules has; give both the same layers")
    if more := there - factors - heads:
        raise ModelError(f"{where}: has {first(more)}, which lora.target_modules lacks; give both the same layers")
    roots = {_root(key) for key in there & heads}
    if part := {key for key in heads - there if _root(key) in roots}:
        raise ModelError(f"{where}: has a part of the head, and lacks {first(part)}; give all of it, or none")


def _root(key: str) -> str:
    return key.removeprefix(PREFIX).partition(".")[0]
