"""What memory a run would take, found out without any of its tensors: for a 7 B base on a laptop, before it is loaded.

The run is built on the meta device, where tensors have sizes and no numbers. Its own local steps, its own measuring
and its own evaluation then run there, with the largest micro-batches of its own rows, while `LiveBytes` counts.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from peertune.adapters.rows import Rows, bound_rows
from peertune.assembly.build import build
from peertune.assembly.loading import clients_together
from peertune.data.scores import ANSWERS
from peertune.errors import PeertuneError, RunError
from peertune.memory import LiveBytes, Most, available_bytes, meta_stands_for, resident_bytes
from peertune.method import Local, Phase, standing
from peertune.models.generation import cached_tokens
from peertune.models.load import pick_device
from peertune.recipe import Recipe
from peertune.rounds.job import Job
from peertune.rounds.metrics import before_mixing, diagnostics
from peertune.rounds.training import train_local
from peertune.types import Batch, State, select

STEPS = 10
"""Local steps whose micro-batches are looked through for the largest."""
ROWS_ENOUGH = {"cpu": 768, "cuda": 32768}
"""Rows that fill a batch of evaluation, where the recipe leaves open how many tokens one has."""
HOLES = 0.8
"""What glibc's heap leaves unused, over the activations in it: measured in docs/performance.md. It looks for a little
more than a tensor's size, so the place of one that was freed does not do for the next of that size. With gradient
checkpointing there are none, since large tensors are mapped one by one."""


@dataclass(frozen=True)
class Plan:
    """What a run takes at its peak, in bytes."""

    device: str
    dtype: str
    tokens_per_pass: int
    clients_per_pass: int
    base: int
    adapters: int  # of all clients
    moments: int  # the optimiser's, of all clients
    under_way: int  # where nobody waits: what is computed ahead, and a message of each client
    starts: int  # where checkpoints lie within rounds: what a round began with, if the method asks for it
    gradients: int  # of the clients that train at a time
    activations: int  # the most that a micro-batch takes beyond all these
    mixing: int  # the most that measuring a round takes beyond base, adapters and moments
    evaluation: int  # likewise evaluation
    process: int  # on a CPU: the interpreter, its libraries and the data
    holes: int  # on a CPU: what the heap leaves unused
    available: int | None  # None where the device can't be asked

    @property
    def total(self) -> int:
        """The peak: training, mixing and evaluation come one after the other."""
        held = self.base + self.adapters + self.moments + self.under_way + self.starts + self.process
        return held + max(self.gradients + self.activations + self.holes, self.mixing, self.evaluation)

    @property
    def lacking(self) -> int:
        """How much more it takes than there is."""
        return 0 if self.available is None else max(0, self.total - self.available)


def plan(recipe: Recipe) -> Plan:
    """Plan a recipe, for a device that need not be there. Raises what `build` raises."""
    device = pick_device(recipe.device, planned=True)
    on_cpu = device.type == "cpu"
    with meta_stands_for(device.type), LiveBytes("meta") as live:
        run = build(_with(recipe, "evaluate.rows", _rows_enough(recipe, device)), planned=True)
        job, resolved = run.job, run.resolved
        assert isinstance(resolved.training.tokens_per_pass, int), "what is automatic is resolved"
        process = resident_bytes() if on_cpu else 0
        base = _storage_bytes([*job.model.base.parameters(), *job.model.base.buffers()])
        state = job.state.clone()
        parts = [part for _, part in state.parts]
        held, moments = live.now, _storage_bytes(x for part in parts for x in part.moments.values())
        adapters = _storage_bytes(x for part in parts for x in part.adapters.values())
        local = _BY_ROW if recipe.privacy else job.algorithm.local
        training = [_training(live, job, local, state, t, phase) for t, phase in _phases(job)]
        mixing = live.most(lambda: _mixing(job, state)).taken
        evaluate: Callable[[], object] = partial(job.evaluate, parts[-1].take(slice(0, 1)).stacks, job.clients[:1])
        if run.asked["metric"] in ANSWERS:
            evaluate = partial(_generate, job, state, resolved, recipe.evaluate.rows or sys.maxsize)
        evaluation = live.most(evaluate).taken
    most, gradients = max(training)
    within = recipe.checkpoint.steps is not None
    return Plan(
        device=resolved.device,
        dtype=resolved.model.dtype,
        tokens_per_pass=resolved.training.tokens_per_pass,
        clients_per_pass=job.clients_per_pass,
        base=base,
        adapters=held - base - moments,
        moments=moments,
        under_way=0 if job.pushing is None else held - base + adapters,
        starts=adapters if within and job.algorithm.local.keeps_start else 0,
        gradients=gradients,
        activations=most.taken - gradients,
        mixing=mixing,
        evaluation=evaluation,
        process=process,
        holes=int(HOLES * most.small) if on_cpu and not recipe.training.gradient_checkpointing else 0,
        available=available_bytes(device),
    )


def _rows_enough(recipe: Recipe, device: torch.device) -> int:
    """Return how many rows fill a batch of evaluation and do not take long."""
    tokens = recipe.training.tokens_per_pass
    rows = ROWS_ENOUGH[device.type] if tokens == "auto" else tokens // 2
    return max(1, min(rows, recipe.evaluate.rows or rows))


def _phases(job: Job) -> Iterable[tuple[int, Phase]]:
    """Return the first phase of each sort among the first rounds, and its round."""
    phases = [(t, job.algorithm.phase(t)) for t in range(min(job.rounds, 100))]
    return {phase.train: (t, phase) for t, phase in reversed(phases)}.values()


def _mixing(job: Job, state: State) -> None:
    """Do of a round what takes memory beyond adapters: send, read, and measure."""
    phase, heard = job.algorithm.phase(0), []
    for rows, part in state.parts:
        clients = [job.clients[row] for row in rows.tolist()]
        payload, _ = job.algorithm.message.send(part.adapters, part.known, standing(clients, part.rounds), phase)
        heard.append(job.read(payload, 0, clients[0]))
    diagnostics(before_mixing(state.stacks, cuts=job.cuts), state.stacks, cuts=job.cuts)
    del heard


_BY_ROW = Local(lambda gradient, adapters, *_: (gradient.clipped(adapters, 1.0), {}))
"""What takes as much as private local steps do: each row has a gradient of its own."""


def _training(live: LiveBytes, job: Job, local: Local, state: State, t: int, phase: Phase) -> tuple[Most, int]:
    """Return what local steps take, and what of it their gradients do."""
    rows, part = state.parts[-1]  # of the highest rank
    part, rows = part.take(slice(0, job.clients_per_pass)), rows[: job.clients_per_pass]
    clients = [job.clients[row] for row in rows.tolist()]
    steps, at = islice(job.steps(clients, [t] * len(clients)), STEPS), standing(clients, part.at(t).rounds)
    batches = _largest([batch for step in steps for batch in step])
    # Twice: in the second step the gradients of the first still lie there.
    most = live.most(lambda: train_local(job.model, part, [batches, batches], phase, job.optim, at, local))
    gradients = _storage_bytes([torch.empty_like(x) for x in select(part.adapters, phase.train).values()])
    return most, gradients


def _largest(batches: list[Batch]) -> list[Batch]:
    """Return the largest batches: by places in the blocks that layers see, with padding, and by what is predicted."""

    def sizes(batch: Batch) -> tuple[int, int, int]:
        padded = max(x.numel() for x in batch.inputs.values())
        return padded if batch.packing is None else batch.packing.rows.numel(), padded, batch.labels.numel()

    return list({id(batch): batch for i in range(3) for batch in [max(batches, key=lambda b: sizes(b)[i])]}.values())


@torch.no_grad()
def _generate(job: Job, state: State, recipe: Recipe, prompts: int) -> None:
    """Fill the cache of keys and values at once, as far as generation fills it in the end."""
    base: Any = job.model.base
    width = recipe.training.max_length + recipe.evaluate.max_new_tokens
    width = min(width, getattr(base.config, "max_position_embeddings", None) or width)
    clients = min(state.clients + 1, clients_together(recipe))
    rows = clients * max(1, min(prompts, cached_tokens(base) // (width * clients)))
    adapters = {name: x[:1].repeat_interleave(clients, 0) for name, x in state.parts[-1][1].adapters.items()}
    whose = torch.zeros(rows, dtype=torch.int64, device="meta")
    ids = torch.zeros(rows, width, dtype=torch.int64, device="meta")
    with bound_rows(Rows(adapters, whose, whose, False, job.model.streams)):
        base.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def check_fits(recipe: Recipe, planned: Plan) -> None:
    """Raise RunError, with what would fit, where a run takes more memory than there is."""
    if not planned.lacking:
        return
    assert planned.available is not None, "something lacks of it"
    problem = f"memory: {_gib(planned.total)} are needed and {planned.device} has {_gib(planned.available)}"
    found, least, together = [], planned, recipe
    settings: list[str] = []
    for key, value in _remedies(recipe, planned):
        other = _try(_with(recipe, key, value))
        if other is not None and not other.lacking:
            found.append(f"{key}={_yaml(value)} ({_gib(other.total)})")
    if found:
        raise RunError(f"{problem}; give {' or '.join(found)}")
    for key, _ in list(_remedies(recipe, planned)):
        remedy = dict(_remedies(together, least)).get(key)
        if remedy is not None and (other := _try(_with(together, key, remedy))) and other.total < least.total:
            together, least = _with(together, key, remedy), other
            settings.append(f"{key}={_yaml(remedy)}")
            if not least.lacking:
                raise RunError(f"{problem}; give {' '.join(settings)} ({_gib(least.total)})")
    but = f"even {' '.join(settings)} needs {_gib(least.total)}" if settings else "no setting takes less"
    raise RunError(f"{problem}; {but}: give a smaller base, or another device")


def _remedies(recipe: Recipe, planned: Plan) -> Iterator[tuple[str, Any]]:
    """Yield settings that take less, the harmless first, sized by what lacks."""
    lacking, training = planned.lacking * 1.05, planned.gradients + planned.activations + planned.holes
    if not recipe.training.gradient_checkpointing:
        yield "training.gradient_checkpointing", True
    busy = max(training - planned.gradients, planned.evaluation)
    tokens = int(planned.tokens_per_pass * (1 - lacking / busy)) // 64 * 64 if busy else 0
    yield "training.tokens_per_pass", max(64, tokens)
    each = max(1, planned.gradients // planned.clients_per_pass)
    if planned.clients_per_pass > 1:
        yield "training.clients_per_pass", max(1, planned.clients_per_pass - int(lacking // each) - 1)
    if planned.dtype != "bfloat16":
        yield "model.dtype", "bfloat16"
    if recipe.model.quantization is None and planned.device.startswith("cuda"):
        yield "model.quantization", "nf4"
    each = max(1, (planned.adapters + planned.moments) // recipe.clients)
    if recipe.clients > 1:
        yield "clients", max(1, recipe.clients - int(lacking // each) - 1)


def _try(recipe: Recipe) -> Plan | None:
    try:
        return plan(recipe)
    except PeertuneError:  # such as a graph of fewer clients than its own settings speak of
        return None


def _with(recipe: Recipe, key: str, value: Any) -> Recipe:
    block, _, name = key.rpartition(".")
    if not block:
        return recipe.model_copy(update={name: value})
    return recipe.model_copy(update={block: getattr(recipe, block).model_copy(update={name: value})})


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
