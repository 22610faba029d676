"""States to begin from, rounds without training as an engine makes them, and whole simulations."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from peertune.assembly.build import Built
from peertune.engines.simulator import simulate
from peertune.method import Algorithm, At, Mixer, Phase, standing
from peertune.rounds.bounds import Bound
from peertune.rounds.job import Heard, Job
from peertune.rounds.record import Evaluation, RoundRecord
from peertune.rounds.round import run_round
from peertune.rounds.training import Optim, adamw, sgd
from peertune.topology import GRAPHS
from peertune.types import Batch, Stack, State, Tensors, norms, only, over_clients, stacked, take


def starting(adapters: Tensors, moments: Tensors | None = None, round: int = 0, **memory: Tensor) -> State:
    """Return the state of clients with these adapters before a round."""
    clients = len(next(iter(adapters.values()))) if adapters else 1
    return State(adapters, {} if moments is None else moments, torch.full((clients,), round), memory)


def at_step(clients: int, step: int = 0) -> At:
    """Return where the first so many clients stand before a local step."""
    return standing(range(clients), torch.full((clients,), step))


def every_kind(rate: float) -> dict[str, float]:
    """Return one learning rate for all kinds."""
    return dict.fromkeys(("A", "B", "head"), rate)


BOTH = Phase(frozenset({"A", "B", "head"}), frozenset({"A", "B", "head"}))


def kept(job: Job) -> list[RoundRecord]:
    """Return all records of a simulation, each with a state of its own."""
    return [replace(record, state=record.state and record.state.clone()) for record in simulate(job)]


def run(built: Built) -> list[RoundRecord]:
    """Return the same of what was built."""
    return kept(built.job)


def state(record: RoundRecord) -> State:
    """Return the state that a round left."""
    assert record.state is not None
    return record.state


class Quadratic:
    """The gradient of `curvature / 2 · ‖x - centre‖²`, centres `[K, …]` and curvatures `[K]`: a row for each client."""

    def __init__(self, centres: Tensors, curvature: Tensor) -> None:
        self.centres, self.curvature = centres, curvature

    def __call__(self, adapters: Tensors) -> Tensors:
        return {
            name: over_clients(self.curvature, centre) * (adapters[name] - centre)
            for name, centre in self.centres.items()
        }

    def clipped(self, adapters: Tensors, max_norm: float) -> Tensors:
        found = self(adapters)
        scale = max_norm / norms(found).clamp(min=max_norm)
        return {name: over_clients(scale, x) * x for name, x in found.items()}


def received(mixer: Mixer, own: Tensors, heard: Tensors, weights: Tensor, round: int = 0) -> Tensors:
    """Return what a mixer that remembers nothing makes of all sites at once, in a round that sends everything."""
    clients = len(next(iter(own.values())))
    mixed, memory = mixer.receive(own, heard, weights, {}, at_step(clients, round), BOTH)
    assert not memory
    return mixed


def begun(algorithm: Algorithm, adapters: Tensors, round: int = 0, clients: Sequence[int] | None = None) -> State:
    """Return the state of clients that begin with these adapters."""
    numbers = clients or range(len(next(iter(adapters.values()))))
    state = starting(adapters, moments_like(adapters, numbers), round)
    state.remember(algorithm.init(adapters, standing(numbers, state.rounds)))
    return state


def moments_like(adapters: Tensors, clients: Sequence[int]) -> Tensors:
    """Return moments as AdamW may have them, which differ by client."""
    moments = {name: x.clone() for name, x in adamw().init(adapters).items()}
    for name, x in moments.items():
        if name.endswith((".m", ".v")):
            size = over_clients(torch.tensor(clients).to(x.dtype), x) + 1
            x += size if name.endswith(".m") else size**2
    return moments


def played(algorithm: Algorithm, state: State, weights: Tensor, steps: int = 0, bound: Bound | None = None) -> State:
    """Return what a round of so many local steps leaves of a state in which all hear all, by `weights [K, K]`."""
    return played_and_sent(algorithm, state, weights, steps, bound)[0]


def played_and_sent(
    algorithm: Algorithm, state: State, weights: Tensor, steps: int = 0, bound: Bound | None = None
) -> tuple[State, Tensors]:
    """Return what such a round leaves, and what all have sent."""
    clients, sent = range(state.clients), dict[str, Tensor]()

    def exchange(told: Sequence[Stack], *_: Any) -> Heard:
        payload = only(told)
        sent.update({name: x.clone() for name, x in payload.items()})
        return Heard(stacked(job.read(payload, state.round)), weights, clients, [])

    job = replace(_job(algorithm, state, clients, steps), bound=bound)
    after, _ = run_round(job, state.clone(), clients, state.round, exchange)
    return after, sent


def played_alone(
    algorithm: Algorithm, state: State, weights: Tensor, client: int, sent: Tensors, steps: int = 0
) -> State:
    """Return what such a round leaves of one client, which gets of what is `sent` its closed neighbourhood's."""
    near = sorted({client, *weights.to_dense()[client].nonzero()[:, 0].tolist()})

    def exchange(*_: Any) -> Heard:
        told = take(sent, torch.tensor(near))
        return Heard(stacked(job.read(told, state.round)), weights.to_dense()[client : client + 1, near], near, [])

    job = _job(algorithm, state, [client], steps)
    after, _ = run_round(job, state.take(torch.tensor([client])), [client], state.round, exchange)
    return after


class Drawn:
    """A model whose output for a row is the inner product of its client's adapters with directions drawn for it."""

    frozen: ClassVar[Tensors] = {}

    def __call__(self, params: Tensors, batch: Batch, training: bool) -> Tensor:
        outputs = []
        for place, key in zip(batch.clients.tolist(), batch.keys.tolist(), strict=True):
            draw = torch.Generator().manual_seed(key)
            own = [x[place] for x in params.values()]
            outputs.append(sum((x * 0.1 * torch.randn(x.shape, generator=draw, dtype=x.dtype)).sum() for x in own))
        return torch.stack(outputs)[:, None]  # type: ignore[arg-type]


def _rows(clients: Sequence[int], steps: int) -> Iterator[list[Batch]]:
    """Yield a row of each client for each of so many local steps."""
    for step in range(steps):
        places, numbers = torch.arange(len(clients)), torch.tensor(list(clients))
        ones = torch.ones(len(clients), dtype=torch.float64)
        yield [Batch({}, ones, places, ones, 100 * numbers + step)]


def _job(algorithm: Algorithm, state: State, clients: Sequence[int], steps: int) -> Job:
    model: Any = Drawn()
    return Job(
        model=model,
        graph=GRAPHS["complete"](clients=max(clients) + 1, activation=1.0),
        algorithm=algorithm,
        optim=Optim(sgd(), lambda step: every_kind(0.1), 0.0, "never"),
        steps=lambda clients, t, first=0, salts=(): _rows(clients, steps),
        evaluate=lambda adapters, clients: Evaluation("accuracy", [], None, 1, []),
        state=state,
        clients=clients,
        rounds=state.round + 2,
        local_steps=max(1, steps),
        evaluate_every=1000,  # never
        clients_per_pass=2,
    )
