"""One private local step of all clients: peertune against a plain step, and against Opacus, one client after the other.

All three train both factors of every site with AdamW, dropout off. A private step takes 32 of a client's rows on
average, and is measured whole: drawing rows, their cut gradients, noise, the optimiser. A plain step takes 32 rows of
each client; since the other's rows vary, the two are compared by row.

Opacus trains the very rows that the private step takes: one PEFT model with an adapter for each client, watched by
`GradSampleModule` and stepped by `DPOptimizer`, rows padded to the longest of a client's batch, by whichever of
transformers' attentions is fastest here. Before anything is timed, both come to the same sums of cut gradients.

    python -m benchmarks private    # as all parts: by the clock
    python -m benchmarks.private    # by one thread's processor time, which others on the machine hardly change
"""

import logging
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Figure, figure, interleaved, processor_seconds, ratios, seconds
from benchmarks.peft_loop import ClientRows, PeftLoop, client_rows
from benchmarks.setup import dropout, make, overrides
from benchmarks.table import table
from peertune import build, load_recipe
from peertune.assembly.build import Built
from peertune.rounds.job import Job
from peertune.rounds.round import turn_of
from peertune.rounds.training import BatchGradient
from peertune.rounds.turns import salts, train
from peertune.types import Batch, State, Tensors

NOISE, MAX_GRAD_NORM = 1.0, 1.0
TARGETS = ("≤ 1.6", "≥ 3")
SETTINGS = ("algorithm.name=dec_lora", "training.local_steps=1", "graph.activation=1", *dropout(False))
PRIVACY = f"privacy={{noise_multiplier: {NOISE}, max_grad_norm: {MAX_GRAD_NORM}, delta: 1e-6}}"
SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far two sums may be apart, in their norm; of shorter numbers a twentieth."""


def run(repeats: int = 5) -> list[Figure]:
    """Measure both comparisons."""
    return compare(SETTINGS, TARGETS, repeats)


def compare(
    settings: Sequence[str],
    targets: tuple[str, str],
    repeats: int,
    timer: Callable[[Callable[[], object]], float] = seconds,
) -> list[Figure]:
    """Time the three turn by turn; targets are of the time over the plain step's, and of the speed over Opacus."""
    plain = make(*settings)
    private = build(load_recipe("tad-sst2-minilm", overrides(*settings, PRIVACY)), secret=lambda: bytes(32))
    job, state, clients = private.job, private.job.state.clone(), private.resolved.clients
    now: list[list[ClientRows]] = [client_rows(_drawn(job, state.at(0)), clients)]
    loop = _fastest(private, now[0], timer)
    check(private, loop, _drawn(job, state.at(0)))
    times = interleaved(
        {
            "draw": lambda turn: now.append(client_rows(_drawn(job, state.at(turn)), clients)),
            "opacus": lambda turn: loop.step(now[-1]),
            "private": step_of(job, state),
            "plain": step_of(plain.job, plain.job.state.clone()),
        },
        repeats,
        timer=timer,
    )
    rows = [sum(len(labels) for _, labels in each) for each in now[-repeats:]]
    size = plain.resolved.training.per_device_train_batch_size
    by_row = [taken / count for taken, count in zip(times["private"], rows, strict=True)]
    plainly = [taken / (clients * size) for taken in times["plain"]]
    return [
        figure(f"step of {clients} × {size} rows, plain", times["plain"], "s"),
        figure("private step", times["private"], "s", note=f"{min(rows)} to {max(rows)} rows"),
        figure("private step over a plain one, by row", ratios(by_row, plainly), "×", targets[0]),
        figure("private step, Opacus one client after the other", times["opacus"], "s", note=f"{loop.how} attention"),
        figure("speed over Opacus", ratios(times["opacus"], times["private"]), "×", targets[1]),
    ]


def step_of(job: Job, state: State) -> Callable[[int], None]:
    """Return what makes the round's local step of a turn, in place."""

    def step(turn: int) -> None:
        (came,) = train([turn_of(job, state.at(turn), job.clients)])
        if isinstance(came, Exception):
            raise came

    return step


def _drawn(job: Job, state: State) -> list[Batch]:
    """Return the rows of the private step that a state comes to next."""
    return next(job.steps(job.clients, state.rounds.tolist(), 0, salts(state)))


class OpacusLoop(PeftLoop):
    """Trains all clients for a private step, one after the other."""

    how: str  # which attention

    def __init__(self, run: Built, attention: str) -> None:
        """Take all from the recipe of `run`, whose clients' steps are private."""
        super().__init__(run, dtype=next(run.job.model.base.parameters()).dtype, attention=attention)
        GradSampleModule, DPOptimizer = _opacus()
        self.how = attention
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)  # what isn't, when it begins to watch, is never watched
        self.watched = GradSampleModule(self.model, loss_reduction="sum")
        self.noising: dict[str, Any] = {
            name: DPOptimizer(
                optimizer,
                noise_multiplier=NOISE,
                max_grad_norm=MAX_GRAD_NORM,
                expected_batch_size=run.resolved.training.per_device_train_batch_size,
            )
            for name, optimizer in self.optimizers.items()
        }

    def step(self, rows: Sequence[ClientRows]) -> list[float]:
        """Train every client on its rows and return the sums of their losses."""
        losses = []
        for name, own in zip(self.noising, rows, strict=True):
            losses.append(self._backward(name, own))
            self.noising[name].step()
            self.noising[name].zero_grad()
        return torch.stack(losses).tolist()

    def sums(self, rows: Sequence[ClientRows], adapters: Tensors) -> Tensors:
        """Return the sums `[K, …]` of the clients' cut gradients at these adapters."""
        places, parameters = dict[str, tuple[str, int]](), dict[str, Any](self.model.named_parameters())
        for name, parameter in parameters.items():
            if found := re.search(r"base_model\.model\.(.*)\.lora_([AB])\.client-(\d+)\.weight", name):
                places[name] = f"{found[1]}.{found[2]}", int(found[3])
                parameter.data.copy_(adapters[places[name][0]][places[name][1]])
        summed = {adapter: torch.zeros_like(adapters[adapter]) for adapter, _ in places.values()}
        for client, (name, own) in enumerate(zip(self.noising, rows, strict=True)):
            self._backward(name, own)
            self.noising[name].clip_and_accumulate()
            for of, (adapter, whose) in places.items():
                if whose == client:
                    summed[adapter][client] = parameters[of].summed_grad
            self.noising[name].zero_grad()
        return summed

    def _backward(self, name: str, rows: ClientRows) -> Tensor:
        self.model.set_adapter(name)
        loss = nn.functional.cross_entropy(self._padded(rows[0]).float(), rows[1].to(self.device), reduction="sum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, that the first block's sites read what has no gradient
            loss.backward()
        return loss.detach()


def check(run: Built, loop: OpacusLoop, batches: Sequence[Batch]) -> None:
    """See that both come to the same sums of cut gradients, at adapters of which no B is zero; RuntimeError if not."""
    job, draw = run.job, torch.Generator().manual_seed(0)
    adapters = {
        name: x + 0.05 * torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)
        for name, x in job.state.adapters.items()
    }
    ours = BatchGradient(job.model, batches, job.algorithm.phase(0).train).clipped(adapters, MAX_GRAD_NORM)
    theirs = loop.sums(client_rows(batches, run.resolved.clients), adapters)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"the sums are of other tensors: {sorted(ours.keys() ^ theirs.keys())}")
    for name, x in ours.items():
        apart = float((x - theirs[name]).norm() / theirs[name].norm())
        if not apart <= SAME.get(next(job.model.base.parameters()).dtype, 0.05):
            raise RuntimeError(f"the sums of cut gradients differ by {apart:.2g} of their norm: {name}")


def _fastest(run: Built, rows: Sequence[ClientRows], timer: Callable[[Callable[[], object]], float]) -> OpacusLoop:
    """Try both attentions for a step, and return what is fastest."""
    tried = [OpacusLoop(run, attention) for attention in ("eager", "sdpa")]
    taken = [timer(partial(loop.step, rows)) for loop in tried]
    return tried[taken.index(min(taken))]


def _opacus() -> tuple[Any, Any]:
    """Return Opacus' module and optimiser; importing it sets up handlers for the process, which are put back."""
    handlers = logging.root.handlers[:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
    logging.root.handlers[:] = handlers
    return GradSampleModule, DPOptimizer


def main() -> None:
    """Measure by one thread's processor time."""
    torch.set_num_threads(1)
    print(table(found.json() for found in compare(SETTINGS, TARGETS, 5, processor_seconds)))


if __name__ == "__main__":
    main()
