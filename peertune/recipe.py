"""Recipes: what a run is made of, checked before anything is loaded.

A recipe is a YAML file of the blocks below. Parts that are chosen by name (`task`, `partition`, `graph`, `algorithm`)
take the arguments of the factory of that name: its signature is their schema, held against it by `arguments`.
Names are those of PEFT's `LoraConfig` and Hugging Face's `TrainingArguments` where they have one.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from peertune.errors import RecipeError, unknown

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def _trackers(value: Any) -> Any:
    """Take what the Trainer takes: the name of one tracker, or `none`."""
    return ([] if value == "none" else [value]) if isinstance(value, str) else value


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Part(BaseModel):
    """A part chosen by name, with the arguments of its factory; an argument that is null has its default."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that were given."""
        return {key: value for key, value in (self.model_extra or {}).items() if value is not None}


class Model(_Block):
    """The frozen base."""

    name: str  # hub id, folder or built-in name
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bfloat16 where the hardware has it
    quantization: Literal["nf4"] | None = None  # 4-bit NormalFloat with double quantisation, as in QLoRA; CUDA only
    dropout: bool = True  # whether the base's own dropout is on in training


class Lora(_Block):
    """The adapters; PEFT's names and rules."""

    r: int = Field(8, ge=1)
    lora_alpha: float = Field(16, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str = ["query", "value"]


class Training(_Block):
    """Local training; the same for all clients."""

    learning_rate: float = Field(1e-3, gt=0)
    local_steps: int = Field(10, ge=1)  # per round
    per_device_train_batch_size: int = Field(32, ge=1)  # rows of one client in one step
    max_length: int = Field(128, ge=2)  # tokens
    long_rows: Literal["cut", "drop"] = "cut"  # what is done with rows of more; either way they are counted
    optim: Literal["adamw", "sgd"] = "adamw"
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)  # of sgd
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)  # each client's own gradient; 0 leaves it
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    reset_optimizer: Literal["never", "round", "phase"] = "never"
    tokens_per_pass: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"  # about so many in one pass
    clients_per_pass: int | None = Field(None, ge=1)  # clients trained at a time; null: 16
    gradient_checkpointing: bool = False  # layers keep their inputs alone and compute twice


class Evaluate(_Block):
    """When and on what the clients' models are evaluated."""

    every: int = Field(10, ge=1)  # rounds; the last round always
    rows: int | None = Field(None, ge=1)  # a seeded subset of the validation set; null: all of it
    max_new_tokens: int = Field(256, ge=1)  # where the metric generates
    temperature: float = Field(0.0, ge=0)  # 0: always the likeliest token
    top_p: float = Field(1.0, gt=0, le=1)


class Checkpoint(_Block):
    """How often the state is kept, for `--resume`."""

    every: int = Field(10, ge=1)  # rounds; the last round always; where a peer's recipe leaves it open, 1
    keep: int = Field(2, ge=1)  # how many stay on disk: the newest two, then older ones; a peer's 6 where left open


class PlannedFault(_Block):
    """Something that goes wrong in the rounds from the first to the last, both included; one of `edge`, `down`, `slow`.

    An edge over which nothing comes, a client that is down and comes back with what it had, a client that takes
    `delay_s` longer. In a simulation a slow client changes nothing.
    """

    rounds: list[Annotated[int, Field(ge=0)]] = Field(min_length=2, max_length=2)
    edge: list[int] | None = Field(None, min_length=2, max_length=2)
    down: int | None = None
    slow: int | None = None
    delay_s: float = Field(0.0, ge=0)


class Network(_Block):
    """How clients deal with each other; in a simulation there is nobody to wait for."""

    patience_s: float = Field(300.0, gt=0, le=86_400)  # how long a round waits for a neighbour before it does without
    when_alone: Literal["train", "wait"] = "train"  # what a peer does that reaches nobody
    when_refused: Literal["stop", "train"] = "stop"  # what a peer does that its neighbours refuse
    bound: bool = True  # whether what lies far beyond a receiver's own adapter is refused; in simulations, too


class Recipe(_Block):
    """A run, whole."""

    model: Model
    lora: Lora = Lora()
    head: Literal["frozen", "trained"] = "frozen"
    task: Part
    missing_cells: Literal["refuse", "drop", "empty"] = "refuse"  # what is done with rows that lack a cell
    clients: int = Field(ge=1)
    partition: Part = Part(name="iid")
    graph: Part = Part(name="complete")
    algorithm: Part
    training: Training = Training()
    rounds: int = Field(ge=1)
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    network: Network = Network()
    faults: list[PlannedFault] = []  # to study what failures do; real peers follow the same plan
    report_to: Annotated[
        list[Tracker], BeforeValidator(_trackers)
    ] = []  # experiment trackers, where their packages are installed
    seed: int = Field(0, ge=0)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")


NO_SETTINGS = (
    "checkpoint.every",  # a run that is resumed ends in the same bits
    "checkpoint.keep",
    "report_to",
    "training.tokens_per_pass",  # how batches are cut changes the order of sums, and results by rounding
    "training.clients_per_pass",
    "training.gradient_checkpointing",
)
"""Keys that change no result but by rounding: runs that differ only in these are runs of one recipe."""
NO_SETTINGS_OF_A_SIMULATION = ("network.patience_s", "network.when_alone", "network.when_refused")
"""The same where no peers wait for each other; among peers these decide which edges count."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers of JSON, so `2e-3` is one, and `010` and `1:30` are text; no key may stand twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in reversed(node.value):
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number, as well as what other readers would."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9]\d*)$",
    "tag:yaml.org,2002:float": r"[-+]?(((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[-+]?\d+)?|\.inf)$|\.nan$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag not in _NUMBERS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in _NUMBERS.items():
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(_tag, re.compile(_form, re.ASCII | re.IGNORECASE), list("-+.0123456789"))


def as_yaml(values: Mapping[str, Any]) -> str:
    """Write plain values so that they are read as what they are."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(
        file.name.removesuffix(".yaml") for file in files("peertune.recipes").iterdir() if file.name.endswith(".yaml")
    )


def recipe_text(recipe: str | Path) -> str:
    """Return the text of a recipe, by path or by the name of a shipped one. Raises RecipeError where there is none."""
    path = Path(recipe)
    if str(recipe) in recipe_names():
        return files("peertune.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
    try:
        if path.suffix not in (".yaml", ".yml") and not path.exists():
            raise RecipeError(unknown("recipe", recipe, recipe_names()))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise RecipeError(
            f"{recipe}: can't be read ({reason}); give a recipe's path or a name that `peertune recipes` lists"
        ) from None


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by path or shipped name and apply overrides such as `graph.activation=0.02`.

    An override's value is YAML. Raises RecipeError, in one line, for a file that isn't there or isn't YAML, for unknown
    keys (with the nearest match), wrong types and values out of range. Parts chosen by name are checked by `build`.
    """
    values = _parse(recipe_text(recipe), str(recipe))
    for override in overrides:
        _override(values, override)
    return check_recipe(values, str(recipe))


def check_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe of plain values; errors name the key and begin with `where`."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from None
    if (idle := _without_effect(recipe)) is not None:
        raise RecipeError(f"{where}: {idle}")
    return recipe


def _without_effect(recipe: Recipe) -> str | None:
    """Return what is wrong where a setting is asked for that another one leaves without effect."""
    optim = recipe.training.optim
    for other, keys in {"adamw": ("adam_beta1", "adam_beta2", "adam_epsilon"), "sgd": ("momentum",)}.items():
        for key in keys:
            if other != optim and getattr(recipe.training, key) != Training.model_fields[key].default:
                return (
                    f"training.{key}: is a setting of {other}, and training.optim is {optim}; "
                    f"leave it out, or use training.optim={other}"
                )
    steps = recipe.rounds * recipe.training.local_steps
    if recipe.training.warmup_steps >= steps:
        return (
            f"training.warmup_steps: {recipe.training.warmup_steps} steps of warm-up leave none of the run's {steps} "
            f"(rounds · training.local_steps) at the full rate; give at most {steps - 1}"
        )
    if recipe.evaluate.top_p < 1 and not recipe.evaluate.temperature:
        return "evaluate.top_p: at evaluate.temperature 0 nothing is sampled; give a temperature, or leave top_p out"
    return None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key: `{"graph": {"activation": 1}}` → `{"graph.activation": 1}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


@cache
def block_defaults() -> Mapping[str, Any]:
    """Return the defaults of what a recipe may leave out, by dotted key, as `resolved.yaml` has them."""
    needed = {"model": {"name": ""}, "task": {"name": ""}, "clients": 1, "algorithm": {"name": ""}, "rounds": 1}
    found = flat(Recipe.model_validate(needed).model_dump(mode="json"))
    return {key: value for key, value in found.items() if key not in flat(needed)}


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader: plain values only
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that doesn't exist is a ValueError
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"{where}:{line} not YAML ({reason})") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of blocks, such as `model:` and `task:`")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: write key=value, such as graph.activation=0.02")
    *blocks, last = key.split(".")
    for block in blocks:
        inner = values.setdefault(block, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {block} is no block, it has the value {inner!r}")
        values = inner
    try:
        values[last] = yaml.load(text, _Loader)  # a SafeLoader: plain values only
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"override {override!r}: the value is not YAML; quote it") from None


def _explain(error: ValidationError) -> str:
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


def arguments(table: Mapping[str, Callable[..., Any]], part: Part, where: str, given: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `table[part.name]` that the recipe sets or leaves at their defaults.

    `given` are the parameters that the program supplies, which are no settings. Raises RecipeError for an unknown name,
    an unknown, missing or wrongly typed argument.
    """
    if part.name not in table:
        raise RecipeError(unknown(f"{where}.name", part.name, table))
    factory = table[part.name]
    hints = get_type_hints(factory)
    parameters = {name: p for name, p in inspect.signature(factory).parameters.items() if name not in given}
    for key in part.settings:
        if key not in parameters:
            takes = f"takes {', '.join(sorted(parameters))}" if parameters else "takes no settings"
            problem = unknown_key(f"{where}.{key}", parameters)
            if "did you mean" in problem:
                raise RecipeError(f"{problem} ({part.name} {takes})")
            problem = problem.split(", choose")[0].rstrip(", ")
            raise RecipeError(f"{problem} ({part.name} {takes}; {where}.{key}=null leaves out what the recipe sets)")
    values = {}
    for name, parameter in parameters.items():
        if name not in part.settings:
            if parameter.default is parameter.empty:
                raise RecipeError(f"{where}.{name}: is missing, {part.name} needs it")
            values[name] = parameter.default
            continue
        try:
            values[name] = TypeAdapter(hints[name]).validate_python(part.settings[name], strict=True)
        except ValidationError as error:
            first = max(error.errors(), key=lambda complaint: len(complaint["loc"]))  # of what came nearest
            said = f"{first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
            if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
                said += "; put it in quotes"
            raise RecipeError(f"{where}.{name}: {said}") from None
    return values
