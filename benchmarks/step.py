"""One local step of all clients: peertune against a PEFT loop, and against the rate of a large matrix product.

All four train both factors of every site on the same rows, with the same dropout, and both are AdamW:

- `loop`: PEFT, one client after the other, rows padded to 128 tokens, float32: what the papers' scripts do;
- `best loop`: PEFT as good as it gets by hand: padded to the longest row of a client's batch, bfloat16, and whichever
  of transformers' attentions and of PEFT's adapter precisions is fastest here;
- `packed loop`: the best loop with the rows of a client packed instead of padded;
- `peertune`: all clients in one pass.
"""

from collections.abc import Callable
from functools import partial
from itertools import count, product
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.measure import Figure, figure, interleaved, matrix_product, processor, ratios, seconds
from benchmarks.peft_loop import PeftLoop, client_rows
from benchmarks.setup import dropout, make
from peertune.adapters.stacked import StackedModel
from peertune.assembly.build import Built
from peertune.method import standing
from peertune.rounds.job import Job
from peertune.rounds.training import train_local
from peertune.types import Batch

PAPERS_LENGTH = 128
TARGETS = {False: ("≥ 15", "≥ 3"), True: ("≥ 10", "≥ 2")}


def run(repeats: int = 7) -> list[Figure]:
    """Measure with dropout off and on."""
    figures = []
    for on in (False, True):
        setup = make("algorithm.name=dec_lora", "training.local_steps=1", *dropout(on))
        figures += compare(setup, "dropout on" if on else "dropout off", TARGETS[on], repeats)
    return figures


def turn() -> list[Figure]:
    """Measure peertune's steps alone, by one thread's processor time, in float32 and in what the machine has."""
    torch.set_num_threads(1)
    figures = []
    for dtype, on in product(dict.fromkeys(("float32", "auto")), (False, True)):
        job = make("algorithm.name=dec_lora", "training.local_steps=1", f"model.dtype={dtype}", *dropout(on)).job
        name = f"a step, {job.model.base.dtype}, dropout {'on' if on else 'off'}".replace("torch.", "")
        figures.append(figure(name, processor(step_of(job)), "s"))
    return figures


def step_of(job: Job) -> Callable[[], None]:
    """Return what makes a local step of all of a job's clients, on other rows each time."""
    state, turns = job.state.clone(), count()

    def step() -> None:
        number = next(turns)
        at = standing(job.clients, state.at(number).rounds)
        steps = job.steps(job.clients, [number] * len(job.clients))
        train_local(job.model, state, steps, job.algorithm.phase(0), job.optim, at)

    return step


def compare(setup: Built, label: str, targets: tuple[str, str], repeats: int, rate: str = "≥ 60") -> list[Figure]:
    """Time the four on the same rows, turn by turn, beside a large matrix product.

    `targets` are those of the speed over the two loops, `rate` that of the share of the product's rate, in %.
    """
    job = setup.job
    clients = setup.resolved.clients
    steps = [next(iter(job.steps(range(clients), [turn] * clients))) for turn in range(repeats + 2)]
    rows = [client_rows(batches, clients) for batches in steps]
    dtype = next(job.model.base.parameters()).dtype
    state = job.state.clone()

    def stacked(turn: int) -> Tensor:
        steps = job.steps(range(clients), [turn] * clients)
        return train_local(
            job.model, state, steps, job.algorithm.phase(0), job.optim, standing(job.clients, state.at(turn).rounds)
        ).loss

    loop = PeftLoop(setup, dtype=torch.float32, pad_to=PAPERS_LENGTH)
    best, how = _best_loop(setup, dtype, lambda loop: loop.step(rows[0]))
    packed, packed_how = _best_loop(setup, dtype, lambda loop: loop.step(rows[0]), packed=True)
    _check([stacked(0).tolist(), loop.step(rows[0])])
    product, operations = matrix_product(dtype, job.device)
    times = interleaved(
        {
            "loop": lambda turn: loop.step(rows[turn]),
            "best loop": lambda turn: best.step(rows[turn]),
            "packed loop": lambda turn: packed.step(rows[turn]),
            "peertune": stacked,
            "product": product,
        },
        repeats,
    )
    useful = [useful_operations(job.model, batches) for batches in steps[1 : repeats + 1]]
    speed = [operations / taken for taken in times["product"]]
    reached = [done / taken for done, taken in zip(useful, times["peertune"], strict=True)]
    tokens = [sum(len(ids) for own, _ in client for ids in own) for client in rows[1 : repeats + 1]]
    padding = [
        sum(len(own) * max(map(len, own)) for own, _ in client) / count
        for client, count in zip(rows[1 : repeats + 1], tokens, strict=True)
    ]
    figures = [
        figure(f"step, PEFT loop padded to {PAPERS_LENGTH}, float32 ({label})", times["loop"], "s"),
        figure(f"step, best PEFT loop ({label})", times["best loop"], "s", note=how),
        figure(f"step, packed PEFT loop ({label})", times["packed loop"], "s", note=packed_how),
        figure(f"step, peertune ({label})", times["peertune"], "s", note=f"{sum(tokens) // len(tokens):,} tokens"),
        figure(f"speed over the PEFT loop ({label})", ratios(times["loop"], times["peertune"]), "×", targets[0]),
        figure(
            f"speed over the best PEFT loop ({label})", ratios(times["best loop"], times["peertune"]), "×", targets[1]
        ),
        figure(f"speed over the packed PEFT loop ({label})", ratios(times["packed loop"], times["peertune"]), "×"),
        figure(f"tokens that the best loop computes over those of the rows ({label})", padding, "×"),
    ]
    if not setup.resolved.model.dropout:
        figures += [
            figure(f"a large matrix product, {dtype}".replace("torch.", ""), [x / 1e9 for x in speed], "GFLOP/s"),
            figure(f"useful share of that rate ({label})", [100 * x for x in ratios(reached, speed)], "%", rate),
        ]
    return figures


def _best_loop(
    setup: Built, dtype: torch.dtype, step: Callable[[PeftLoop], object], packed: bool = False
) -> tuple[PeftLoop, str]:
    """Try attentions and adapter precisions, and return the fastest of two timed steps each, with its description."""
    tried: list[tuple[float, PeftLoop, str]] = []
    for attention in ("eager", "sdpa"):
        for in_float32 in (True, False):
            loop = PeftLoop(setup, dtype=dtype, attention=attention, adapters_in_float32=in_float32, packed=packed)
            step(loop)
            taken = min(seconds(partial(step, loop)) for _ in range(2))
            precision = "float32" if in_float32 else str(dtype).removeprefix("torch.")
            tried.append((taken, loop, f"{attention} attention, adapters in {precision}"))
    _, loop, how = min(tried, key=lambda found: found[0])
    return loop, how


def _check(losses: list[list[float]]) -> None:
    """See that both train the same thing: before the first step, the losses are those of the base, whatever dropout."""
    ours, theirs = (torch.tensor(x) for x in losses)
    if not torch.allclose(ours, theirs, rtol=0.2, atol=0.05):
        raise RuntimeError(f"the losses differ: {ours.tolist()} and {theirs.tolist()}")


def useful_operations(model: StackedModel, batches: list[Batch]) -> float:
    """Count the floating-point operations that a step of both factors can't do without; only real tokens count.

    A frozen layer multiplies once forward and once backward, for the gradient of its input, but for the layers that
    read what has no gradient: of the first block, those that stand beside its sites. A site's factors cost one product
    each forward, two backward. Attention costs two products forward and four backward. Heads count for one token a row.
    """
    lengths = torch.cat([batch.inputs["attention_mask"].sum(1) for batch in batches]).double()
    tokens, rows, squares = float(lengths.sum()), len(lengths), float(lengths.square().sum())
    config: Any = model.base.config
    first = next(iter(model.sites)).rpartition(".")[0]  # the attention module of the first block
    total = 0.0
    for name, layer in model.base.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        passes = 1 if name.startswith(first) else 2
        total += passes * 2 * layer.weight.numel() * (tokens if ".layer." in name else rows)
    for site in model.sites.values():
        d_out, d_in = cast(nn.Linear, site.layer).weight.shape
        total += 3 * 2 * site.r * (d_in + d_out) * tokens
    return total + 3 * 2 * 2 * squares * int(config.num_hidden_layers) * int(config.hidden_size)
