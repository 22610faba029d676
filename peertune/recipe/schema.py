"""What a recipe is made of: its blocks, their keys, types, ranges and defaults.

Names are those of PEFT's `LoraConfig` and Hugging Face's `TrainingArguments` where they have one.
"""

from collections.abc import Mapping
from functools import cache
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def _trackers(value: Any) -> Any:
    """Take what the Trainer takes: the name of one tracker, or `none`."""
    return ([] if value == "none" else [value]) if isinstance(value, str) else value


def _fold(value: str) -> str:
    """Check what has the form of a fold."""
    number, _, of = value.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) and int(of) >= 2):
        raise PydanticCustomError("fold", "input should be a fold k/n, k from 1 to n, such as 2/5")
    return value


def _share(value: float | str) -> float | str:
    """Check what is a share of rows, or a fold."""
    if isinstance(value, float) and not 0 < value < 1:
        raise PydanticCustomError("share", "input should be a share above 0 and below 1, or a fold k/n, such as 2/5")
    return _fold(value) if isinstance(value, str) else value


def _optim(value: Any) -> Any:
    """Take the Trainer's name for what is `adamw` here."""
    return "adamw" if value == "adamw_torch" else value


def _by_class(value: Any) -> Any:
    """Take classes that are called by numbers: `{5: 3}` is `{"5": 3}`."""
    if not isinstance(value, Mapping):
        return value
    return {str(name) if type(name) is int else name: weight for name, weight in value.items()}


def _pattern(value: Any) -> Any:
    """Take PEFT's pattern of nothing, `{}`, for none."""
    return None if value == {} else value


def _by_rank(value: Any) -> Any:
    """Take ranks that are texts, as JSON has all keys: `{"4": 5}` is `{4: 5}`."""
    if not isinstance(value, Mapping):
        return value
    return {int(rank) if isinstance(rank, str) and rank.isdecimal() else rank: count for rank, count in value.items()}


def _warmup(value: float) -> float:
    """Check what is a number of steps, or a share of them."""
    if value < 0 or (value > 1 and value != int(value)):
        raise PydanticCustomError("warmup", "input should be a number of steps, or a share of them below 1")
    return value


Fold = Annotated[str, AfterValidator(_fold)]
"""`k/n`: the k-th of n parts of rows (`peertune.data.partition.fold`)."""


Rank = Annotated[int, Field(ge=1)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Choice(BaseModel):
    """What is chosen by name, with the arguments of its factory; an argument that is null has its default."""

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
    # Other values at some layers, by names or expressions; of several that match, the first counts.
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1)]] | None, BeforeValidator(_pattern)] = None
    alpha_pattern: Annotated[dict[str, Annotated[float, Field(gt=0)]] | None, BeforeValidator(_pattern)] = None
    use_rslora: bool = False  # whether the scale is lora_alpha / sqrt(r), in place of lora_alpha / r
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str = ["query", "value"]
    exclude_modules: list[str] | str | None = None  # of the layers that target_modules chooses
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = None  # numbers of the base's layers; null: all
    # How A is drawn, where B is zero; or which part of each layer both are, taken out of it.
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora"] = True
    init: str | None = None  # the folder of an adapter, in PEFT's format, that all clients begin with
    # Ranks that differ: of each client, or how many have each, dealt by the seed; null: all have r.
    ranks: Annotated[list[Rank] | dict[Rank, Annotated[int, Field(ge=1)]] | None, BeforeValidator(_by_rank)] = None
    # Then the scale is that of rank r for all, or each client's own, by its rank.
    scaling: Literal["common", "own"] = "common"


class SchedulerKwargs(_Block):
    """What `cosine_with_min_lr` falls to; one of the two."""

    min_lr: float | None = Field(None, ge=0)
    min_lr_rate: float | None = Field(None, ge=0, le=1)  # a share of the learning rate


class Training(_Block):
    """Local training; the same for all clients."""

    learning_rate: float = Field(1e-3, gt=0)
    loraplus_lr_ratio: float = Field(1.0, gt=0)  # B's rate is so many times that of A and of a head
    local_steps: int = Field(10, ge=1)  # per round
    per_device_train_batch_size: int = Field(32, ge=1)  # rows of one client in one step
    max_length: int = Field(128, ge=2)  # tokens
    long_rows: Literal["cut", "drop"] = "cut"  # what is done with rows of more; either way they are counted
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    # How much a row of a class counts: "balanced" by each client's own rows, or by the class's name; null: all alike.
    class_weight: Annotated[
        Literal["balanced"] | dict[str, Annotated[float, Field(ge=0)]] | None, BeforeValidator(_by_class)
    ] = None
    optim: Annotated[Literal["adamw", "sgd"], BeforeValidator(_optim)] = "adamw"
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)  # of sgd
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)  # each client's own gradient; 0 leaves it
    lr_scheduler_type: Literal["constant", "linear", "cosine", "cosine_with_min_lr"] = "constant"
    lr_scheduler_kwargs: SchedulerKwargs = SchedulerKwargs()
    lr_scheduler_span: Literal["run", "round"] = "run"  # over which the rate rises and falls
    warmup_steps: Annotated[int | float, AfterValidator(_warmup)] = 0  # below 1 a share of the steps of the span
    reset_optimizer: Literal["never", "round", "phase"] = "never"
    tokens_per_pass: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"  # about so many in one pass
    clients_per_pass: int | None = Field(None, ge=1)  # clients trained at a time; null: 16
    gradient_checkpointing: bool = False  # layers keep their inputs alone and compute twice

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, values: Any) -> Any:
        """Take what `transformers` called `warmup_ratio` up to its version 4."""
        if not isinstance(values, Mapping) or "warmup_ratio" not in values or "warmup_steps" in values:
            return values
        if isinstance(ratio := values["warmup_ratio"], int | float) and ratio >= 1:  # which would be steps
            return values
        return {key: value for key, value in values.items() if key != "warmup_ratio"} | {
            "warmup_steps": values["warmup_ratio"]
        }

    def warmup(self, steps: int) -> int:
        """Return over how many of a span's `steps` the rate rises."""
        return ceil(steps * self.warmup_steps) if self.warmup_steps < 1 else int(self.warmup_steps)


class Evaluate(_Block):
    """When and on what the clients' models are evaluated."""

    every: int = Field(10, ge=1)  # rounds; the last round always
    rows: int | None = Field(None, ge=1)  # a seeded subset of the validation set; null: all of it
    fold: Fold | None = None  # the part of the validation set that is used; null: all of it
    on: Literal["common", "own", "both"] = "common"  # the validation set, rows that each client holds out, or both
    # Of a client's rows those that it does not train on, with own and both: a seeded share, or a fold.
    held_out: Annotated[float | str, AfterValidator(_share)] = 0.2
    set_aside: Fold | None = None  # a fold of the training rows that nobody trains or is judged on
    load_best: bool = False  # whether a client's adapter is in the end the one that scored best
    # after so many evaluations in which the clients' mean score did not improve a simulation ends; null: never
    patience: int | None = Field(None, ge=1)
    ensemble: bool = False  # whether the clients' probabilities are judged too, each client's and all together
    mixing: bool = False  # whether clients judge on rows of their own what they had before mixing, too
    max_new_tokens: int = Field(256, ge=1)  # where the metric generates
    temperature: float = Field(0.0, ge=0)  # 0: always the likeliest token
    top_p: float = Field(1.0, gt=0, le=1)


class Checkpoint(_Block):
    """How often the state is kept, for `--resume`."""

    every: int = Field(10, ge=1)  # rounds; the last round always; where a peer's recipe leaves it open, 1
    keep: int = Field(2, ge=1)  # how many stay on disk: the newest two, then older ones; a peer's 6 where left open
    # local steps, counted over the rounds: one more is kept, within a round where they end there; null: none
    steps: int | None = Field(None, ge=1)


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


class PlannedAttack(Choice):
    """An attack of some clients in the rounds from the first to the last, both included; null: in all."""

    clients: list[Annotated[int, Field(ge=0, strict=True)]] = Field(min_length=1)
    rounds: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=2, max_length=2)] | None = None


class Privacy(_Block):
    """What anybody can learn of one row of a client's, or of all of them. Give epsilon, noise, or both."""

    unit: Literal["record", "client"] = (
        "record"  # one row, by noise in each local step; or a client, by noise in a round
    )
    epsilon: float | None = Field(None, gt=0)  # each client's budget, for the whole run
    # the chance that the budget does not hold; below one over a client's rows, or over the clients
    delta: float | None = Field(None, gt=0, lt=1)
    noise_multiplier: float | None = Field(None, gt=0)  # null: of each client what its budget asks for
    # what each row's own gradient is cut to; by client, what its adapters change in a round
    max_grad_norm: float = Field(1.0, gt=0)


class Network(_Block):
    """How clients deal with each other; in a simulation there is nobody to wait for."""

    patience_s: float = Field(300.0, gt=0, le=86_400)  # how long a round waits for a neighbour before it does without
    when_alone: Literal["train", "wait"] = "train"  # what a peer does that reaches nobody
    when_refused: Literal["stop", "train"] = "stop"  # what a peer does that its neighbours refuse
    bound: bool = True  # whether what lies far beyond a receiver's own adapter is refused; in simulations, too


class Down(_Block):
    """A time in which a client does nothing."""

    client: int = Field(ge=0)
    from_s: float = Field(ge=0)
    to_s: float = Field(gt=0)


class Time(_Block):
    """How long everything would take: virtual time, of simulations."""

    mode: Literal["rounds", "asynchronous"] = "rounds"
    # A local step: for all clients, for each, or by a name; null: nothing has a time.
    step_s: Annotated[float, Field(gt=0)] | list[Annotated[float, Field(gt=0)]] | Choice | None = None
    latency_s: float = Field(0.0, ge=0)  # of a message
    bandwidth_bytes_s: float | None = Field(None, gt=0)  # of each link; null: without end
    down: list[Down] = []
    deadline_s: float | None = Field(None, gt=0)  # of a round's local steps; null: all wait until they are made
    late: Literal["salf", "drop"] = "salf"  # whether who is late sends the sites that it has reached, or nothing
    mixing: Literal["push", "pairwise"] = "push"  # whether clients mix what has come, or average with one they meet
    staleness_exponent: float = Field(0.0, ge=0)  # a: what is s trainings old weighs (1 + s)^-a as much
    phases: Literal["own", "common"] = "own"  # whether clients change phases by their own rounds, or by common time


class Recipe(_Block):
    """A run, whole."""

    model: Model
    lora: Lora = Lora()
    head: Literal["frozen", "trained"] = "frozen"
    task: Choice
    missing_cells: Literal["refuse", "drop", "empty"] = "refuse"  # what is done with rows that lack a cell
    keep_tokens: bool | None = None  # in the cache, for the next run; null: those of all rows but a peer's
    clients: int = Field(ge=1)
    partition: Choice = Choice(name="iid")
    graph: Choice = Choice(name="complete")
    algorithm: Choice
    modifiers: list[Choice] = []  # of the algorithm
    training: Training = Training()
    privacy: Privacy | None = None  # null: what a client sends may tell of its rows
    rounds: int = Field(ge=1)
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    network: Network = Network()
    time: Time = Time()
    faults: list[PlannedFault] = []  # to study what failures do; real peers follow the same plan
    attacks: list[PlannedAttack] = []  # to study what hostile clients do
    # Experiment trackers, where their packages are installed.
    report_to: Annotated[list[Tracker], BeforeValidator(_trackers)] = []
    seed: int = Field(0, ge=0)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")


NO_SETTINGS = (
    "checkpoint.every",  # a run that is resumed ends in the same bits
    "checkpoint.keep",
    "checkpoint.steps",
    "keep_tokens",
    "report_to",
    "training.tokens_per_pass",  # how batches are cut changes the order of sums, and results by rounding
    "training.clients_per_pass",
    "training.gradient_checkpointing",
)
"""Keys that change no result but by rounding: runs that differ only in these are runs of one recipe."""
NO_SETTINGS_OF_A_SIMULATION = ("network.patience_s", "network.when_alone", "network.when_refused")
"""The same where no peers wait for each other; among peers these decide which edges count."""


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
