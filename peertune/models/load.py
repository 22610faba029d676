"""Base models: loading a checkpoint, seeding what it lacks. The home of `transformers`."""

import copy
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from peertune.adapters.attention import register_attention
from peertune.errors import ModelError
from peertune.models.heads import head_config, head_roots, put_in_order, seed_parameters
from peertune.models.meta import empty_model
from peertune.models.weights import digests

log = logging.getLogger(__name__)

Purpose = Literal["text", "image", "language", "match"]
"""What a base is for: to classify text or images, to go on from a text, or to match images with texts."""


@dataclass(frozen=True)
class Base:
    """A base model, with a head where the task needs one, and what must be known of it."""

    model: Any  # a `PreTrainedModel`
    tokenizer: Any  # None where there are images alone
    head_roots: tuple[str, ...]  # the modules of the classification head, and what else the checkpoint lacks
    head: Mapping[str, Tensor]  # all that these hold, by name: what must travel with an adapter
    drawn: Mapping[str, Tensor]  # what of it was drawn from the seed
    weights: Mapping[str, str]  # the digests of what the checkpoint brought; none of a planned base
    output_name: str | None  # the layer that a language model's logits come from
    stop: tuple[int, ...]  # the tokens at which a language model ends
    positions: int | None  # tokens that a row may have; None where any number will do
    tokens_per_image: int  # 0 for text
    revision: str | None  # the hub's commit that was loaded; None for a folder


def pick_device(name: str, *, planned: bool = False) -> torch.device:
    """Return the device of this name; `auto` is the first GPU, or else the CPU.

    Raises ModelError where the device isn't there, and where it is more than `planned` for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if planned and name.startswith("cuda") and not torch.cuda.is_available():
        return torch.device(name)
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device: {name} isn't there; use device=cpu or device=auto")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise ModelError(f"device: {name} isn't there; the last is cuda:{torch.cuda.device_count() - 1}")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ModelError(f"device: {name!r} is no device; use auto, cpu, cuda or cuda:1") from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; `auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]
    if device.type == "cuda":
        # of one that isn't here it is assumed: all since 2020 have it
        native = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities = torch.cpu.get_capabilities()
        native = bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def load_base(
    name: str,
    *,
    revision: str | None,
    purpose: Purpose,
    classes: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    quantization: str | None = None,
    planned: bool = False,
) -> Base:
    """Load a checkpoint by hub id, folder or built-in name, with a head for these classes (none: for a regression).

    The checkpoint's own head is taken where it has as many outputs, and put in the order of the classes where all names
    agree; where they don't, that is told. A `language` model has its own output layer in the place of a head, and looks
    at what came before alone; a CLIP, to `match` images with texts, has none. With the `quantization` nf4 linear layers
    are held in 4 bits (QLoRA, arXiv 2305.14314), with `dtype` to compute in.

    Only safetensors are read and no code of the checkpoint's is run. What the checkpoint lacks (a head of this size, a
    pooler) is drawn from the seed: weights normal with the model's `initializer_range`, biases zero. A `planned` base
    has no weights: it is made of the checkpoint's config alone, on the meta device.

    Raises ModelError where the model isn't there, has no revisions, is damaged, or lacks more than a head and a pooler,
    where it can't serve the purpose, and where it can't be quantised here.
    """
    quantized = {} if quantization is None or planned else in_four_bits(dtype, device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    register_attention()
    source = str(MODELS.get(name, name))
    if revision is not None and Path(source).is_dir():
        raise ModelError(f"model.revision: {name} is no model of the hub and has no {revision}; leave it out")
    auto, described = _AUTO[purpose]
    headless = purpose in _HEADLESS
    common: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    log.info("loading %s", name)
    try:
        config, own = _read_config(name, source, purpose, classes, common)
        tokenizer = None if purpose == "image" else _load_tokenizer(name, source, common)
        model: Any
        report: Mapping[str, Any]
        if planned:
            model, report = empty_model(auto, config, dtype, quantization), dict.fromkeys(_REPORT, ())
        else:
            model, report = _read_weights(auto, source, config, dtype, quantized | common)
    except ModelError:
        raise
    except Exception as error:  # on a damaged file, parsers raise whatever they stumble over
        raise ModelError(_reason(name, error, described)) from error
    if tokenizer is not None:
        _check_tokenizer(name, tokenizer, model.config.get_text_config().vocab_size)
        model.config.pad_token_id = tokenizer.pad_token_id
    roots = () if headless else head_roots(model)
    lacking, beyond = _fill_in(name, model, report, roots, seed, headless=headless)
    if any(key not in beyond for key, *_ in report["mismatched_keys"]):
        log.warning(
            f"model.name: {name}: its head has {len(own)} outputs and the task asks for {model.config.num_labels}; "
            "a new one is drawn from the seed"
        )
    elif classes and not (headless or planned) and len(beyond) == len(lacking):
        wider = copy.deepcopy(config)
        wider.id2label = dict.fromkeys(range(len(classes) + 1), "")
        put_in_order(name, model, empty_model(auto, wider, dtype, None), own, classes)
    roots = (*roots, *sorted({key.rpartition(".")[0] for key in beyond}))
    weights = {} if planned else digests(model.state_dict(), roots, lacking, quantization or "body")
    if quantization is None and not planned:
        model.to(device)
    output_name, stop = _prepare_language_model(name, model, tokenizer) if purpose == "language" else (None, ())
    commit = getattr(model.config, "_commit_hash", None)
    inside = tuple(f"{root}." for root in roots)
    head = {name: value for name, value in model.state_dict().items() if name.startswith(inside)}
    per_image = _tokens_per_image(model.config) if purpose in ("image", "match") else 0
    positions = usable_positions(model) if purpose in ("text", "language") else None
    drawn = {name: head[name] for name in lacking}
    return Base(model, tokenizer, roots, head, drawn, weights, output_name, stop, positions, per_image, commit)


def load_processor(name: str, *, revision: str | None, config: Any) -> Callable[[Any], Tensor]:
    """Load what turns an RGB image into the `pixel_values [C, H, W]` that the base of this config takes.

    Raises ModelError where a checkpoint says nothing of images, or makes of them what its own base does not take.
    """
    source = str(MODELS.get(name, name))
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None)

    def process(image: Any) -> Tensor:
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    try:
        processor = AutoImageProcessor.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
        made = tuple(process(np.zeros((48, 32, 3), dtype=np.uint8)).shape)
    except Exception as error:
        raise ModelError(
            f"model.name: {name}: what prepares images for it can't be loaded ({_line(error)}); "
            "put its preprocessor_config.json beside the weights"
        ) from error
    taken = (getattr(vision, "num_channels", 3), side, side)
    if isinstance(side, int) and made != taken:
        raise ModelError(
            f"model.name: {name}: its preprocessor_config.json makes images of {made} (channels, height, width) and "
            f"the model takes {taken}; give one that fits"
        )
    return process


_REPORT = ("missing_keys", "mismatched_keys")
"""What `transformers` says of what a checkpoint lacks."""
_AUTO: dict[Purpose, tuple[Any, str]] = {
    "text": (transformers.AutoModelForSequenceClassification, "classification"),
    "image": (transformers.AutoModelForImageClassification, "classification"),
    "language": (transformers.AutoModelForCausalLM, "causal language modelling"),
    "match": (transformers.AutoModel, "matching images with texts"),
}
"""What a base is for → how `transformers` loads it, and how we call that."""
_HEADLESS = ("language", "match")


def _read_config(
    name: str, source: str, purpose: Purpose, classes: Sequence[str], common: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """Return a checkpoint's config, with a head for these classes where it needs one, and the classes it had itself."""
    config = AutoConfig.from_pretrained(source, **common)
    own = list((config.id2label or {}).values())
    for key, value in ({} if purpose in _HEADLESS else head_config(classes)).items():
        setattr(config, key, value)
    if purpose == "match" and not isinstance(config, transformers.CLIPConfig):
        raise ModelError(
            f"model.name: {name} is of the kind {config.model_type}, and a task with templates needs a CLIP, such as "
            "openai/clip-vit-base-patch16; give one, or leave out task.templates"
        )
    return config, own


def _read_weights(
    auto: Any, source: str, config: Any, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """Return the model of a checkpoint, and what `transformers` says of what the checkpoint lacks."""
    with torch.random.fork_rng(devices=[]):  # from_pretrained initialises what it will overwrite
        model, report = auto.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation="peertune",
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    return model, report


def _fill_in(
    name: str, model: Any, report: Mapping[str, Any], roots: Sequence[str], seed: int, *, headless: bool
) -> tuple[set[str], list[str]]:
    """Draw what the checkpoint lacks; return its parameters, and those of them beyond the head's `roots`.

    Raises ModelError where that is more than a head and a pooler.
    """
    lacking = {key if isinstance(key, str) else key[0] for part in _REPORT for key in report[part]}
    beyond = [key for key in lacking if not key.startswith(tuple(f"{root}." for root in roots))]
    odd = [key for key in beyond if "pooler" not in key or headless]
    if odd:
        raise ModelError(
            f"model.name: {name}: its weights don't fit {type(model).__name__}: {len(odd)} are missing or of "
            f"another size, such as {min(odd)}; give a checkpoint of this architecture"
        )
    seed_parameters(model, {key: model.get_parameter(key) for key in lacking}, seed)
    return lacking, beyond


def in_four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what makes `from_pretrained` hold a base in 4 bits. Raises ModelError where that can't be."""
    if device.type != "cuda":
        raise ModelError(f"model.quantization: nf4 needs a CUDA device and this one is {device}; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("model.quantization: nf4 needs bitsandbytes; pip install 'peertune[quantized]'")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _prepare_language_model(name: str, model: Any, tokenizer: Any) -> tuple[str, tuple[int, ...]]:
    """Return the name of the output layer, and the tokens that end a text; what is generated is the recipe's to say."""
    output = model.get_output_embeddings()
    paths = [path for path, module in model.named_modules() if module is output]
    said = torch.zeros(2, 1) if model.device.type == "meta" else _said_before(model)
    if not said.isfinite().all():
        raise ModelError(f"model.name: {name}: what it computes is not finite, its weights are damaged; fetch it again")
    if output is None or not torch.equal(*said):
        raise ModelError(
            f"model.name: {name}: {type(model).__name__} is no causal language model: it looks at the tokens to come; "
            "give one such as Llama, Qwen, Gemma, Mistral or GPT-2"
        )
    ends = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config = transformers.GenerationConfig()
    return paths[0], tuple(sorted(stop))


@torch.no_grad()
def _said_before(model: Any) -> Tensor:
    """Return the logits before the last token of two texts that differ in it alone, `[2, s, vocabulary]`."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device)
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits


def _load_tokenizer(name: str, source: str, common: Mapping[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, **common)
    except OSError:
        raise
    except Exception as error:  # on a damaged file, parsers raise whatever they stumble over
        reason = f"its tokenizer is damaged ({type(error).__name__}: {_line(error)})"
        raise ModelError(f"model.name: {name}: {reason}; fetch it again") from error


def _check_tokenizer(name: str, tokenizer: Any, words: int) -> None:
    """See to it that there are words, and a token to pad with among the `words` that the base knows."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of no files at all
        raise ModelError(f"model.name: {name}: it has no tokenizer; put its tokenizer's files beside the weights")
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= words:  # some have one that the base does not know
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"model.name: {name}: its tokenizer has no token to pad with; give it a pad_token")


def usable_positions(model: Any) -> int | None:
    """Return how many tokens a row may have for this base; None where any number will do.

    That is the config's `max_position_embeddings`, for tables of learnt positions, for rotations and for distances. A
    table that knows a token to pad with (RoBERTa's, XLM-R's, MPNet's, ESM's) counts positions from the one after it.
    """
    most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    words = model.get_input_embeddings()
    tables = [x for x in model.modules() if x is not words and getattr(x, "padding_idx", None) is not None]
    skipped = [
        x.padding_idx + 1 for x in tables if isinstance(getattr(x, "weight", None), Tensor) and len(x.weight) == most
    ]
    return most - max(skipped, default=0)


def _tokens_per_image(config: Any) -> int:
    vision = getattr(config, "vision_config", config)
    try:
        return int((vision.image_size // vision.patch_size) ** 2 + 1)
    except (AttributeError, TypeError):
        return 256  # no patches to count: a guess that only sets how many rows share a pass


def _reason(name: str, error: Exception, purpose: str) -> str:
    if isinstance(error, SafetensorError):
        return f"model.name: {name}: its safetensors file is damaged ({_line(error)}); fetch it again"
    if isinstance(error, OSError) and Path(name).is_dir():
        return f"model.name: folder {name} holds no whole checkpoint with safetensors and config.json ({_line(error)})"
    if isinstance(error, OSError):
        return (
            f"model.name: {name} is no folder, is not in the local cache and can't be had from the hub; "
            "check the name, the network and HF_HUB_OFFLINE, or give model.name=FOLDER"
        )
    return f"model.name: {name} can't be loaded ({_line(error)}); give a transformers checkpoint for {purpose}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


MODELS = {"digits-vit": Path(__file__).parent / "digits-vit"}
"""Bases that come with the package → their folders."""
