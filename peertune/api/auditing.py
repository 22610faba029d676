"""An attempt to break a recipe's privacy: can a neighbour tell from what it receives whether one row was there?

Many shadow clients train in one stack as a client of the recipe would, each by draws of its own. A coin decides for
each whether it has one row more, the canary: another client's row with a wrong label. What each would send in every
round is what a neighbour receives. The neighbour knows everything but the coin: the recipe, all of the client's other
rows, the canary, and where the client began. What it guesses proves a lower bound on epsilon
(`peertune.privacy.guessing`), to be held against the accountant's upper bound.

Shadow clients mix with nobody: what a neighbour adds to a client's adapter, it knows, and can take off again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peertune.api.training import Source
from peertune.assembly.build import build
from peertune.assembly.needs import check_privacy
from peertune.assembly.privacy import drawings, private_of
from peertune.data.batches import Encoded, TrainingSteps, make_batch
from peertune.errors import RecipeError
from peertune.method import standing
from peertune.methods.private import Own, privately, spent
from peertune.privacy.draws import keyed, of_client, uniform_numbers
from peertune.privacy.guessing import Guesses, judge, trained
from peertune.recipe import load_recipe
from peertune.rounds.job import Job
from peertune.rounds.round import turn_of
from peertune.rounds.training import BatchGradient, row_losses
from peertune.rounds.turns import train
from peertune.types import Batch, State, Tensors, norms, select, take

SHADOWS = 400
"""Shadow clients: with so many a perfect test proves an epsilon of 2.5."""
_LEAST_SHADOWS = 40
_DELTA = 1e-5  # where the recipe has none
_TOGETHER = 64  # shadows whose canaries are looked at in one pass


Canary = Callable[[Tensors], Batch]
"""The canary once for each of some adapters."""


class Audit(NamedTuple):
    """What came of it, of one client of the recipe."""

    client: int
    rows: int  # that it has
    shadows: int
    rounds: int
    delta: float
    tests: Sequence[Guesses]  # the one that counts first
    least_epsilon: float  # proved by the tests, with `guessing.CONFIDENCE`
    most_epsilon: float | None  # by the accountant; None where nothing is private

    @property
    def broken(self) -> bool:
        """Whether the tests prove more than the accountant allows."""
        return self.most_epsilon is not None and self.least_epsilon > self.most_epsilon


def audit(
    recipe: Source,
    overrides: Sequence[str] = (),
    *,
    client: int = 0,
    shadows: int = SHADOWS,
    seed: int = 0,
    done: Callable[[int], object] = bool,
) -> Audit:
    """Try to tell from what a client of the recipe sends whether a row was among its own, as `peertune audit` does.

    Args:
        recipe: A shipped one's name, a path, or nested values.
        overrides: Keys to set.
        client: Whose rows the shadow clients have.
        shadows: How many of them.
        seed: Of the coins, of the canary, and of what shadow clients draw.
        done: Is told how many rounds are done.

    Raises:
        PeertuneError: For a recipe that can't be run, and one that can't be audited: one that sends nothing, or whose
            labels are no classes.

    """
    asked = load_recipe(recipe, overrides)
    check_privacy(asked)
    if asked.privacy is not None and asked.privacy.unit == "client":
        raise RecipeError("privacy.unit: a canary is a single row; audit with privacy.unit=record")
    if not 0 <= client < asked.clients:
        raise RecipeError(f"--client: {client}; give one from 0 to {asked.clients - 1}")
    if shadows < _LEAST_SHADOWS:
        raise RecipeError(f"--shadows: {shadows} prove nothing, whatever they find; give {_LEAST_SHADOWS} or more")
    job = build(asked.model_copy(update={"privacy": None})).job
    held = _steps(job).parts[client]
    private = private_of(asked, {client: held})
    canary, members, steps = _canaries(job, client, shadows, seed)
    if private is not None:
        everybody = private._replace(allowances=dict.fromkeys(range(shadows), private.allowances[client]))
        own = {k: Own(of_client(keyed(b"shadows", seed), k), b"") for k in range(shadows)}
        steps = replace(steps, drawings=drawings(everybody, own))
        algorithm, optim = privately(job.algorithm, everybody, own), replace(job.optim, max_grad_norm=0.0)
        job = replace(job, private=everybody, algorithm=algorithm, optim=optim)
    job = replace(job, steps=steps, clients=range(shadows), ranks=())
    delta = _DELTA if private is None else private.delta
    losses, matches = _received(job, client, partial(_batch, steps.encoded, canary), done)
    first = next((one for one in matches.T if one.any()), matches[:, 0])
    scores = {
        "loss": -losses[:, -1],
        "first message": first,
        "all messages": matches.sum(1),
        "shadow model": trained(np.concatenate([losses, matches], 1), members),
    }
    tests = judge(scores, members, delta)
    most = None
    if private is not None:
        (most,) = spent(private, [client], [private.allowances[client].of(job.rounds * private.per_round)])
    return Audit(client, len(held), shadows, job.rounds, delta, tests, tests[0].least_epsilon, most)


def _steps(job: Job) -> TrainingSteps:
    assert isinstance(job.steps, TrainingSteps), "build makes them"
    return job.steps


def _canaries(job: Job, client: int, shadows: int, seed: int) -> tuple[int, NDArray[np.bool_], TrainingSteps]:
    """Return the canary's row, which shadow clients have it, and what they train on; it is the last of their rows.

    Raises RecipeError where there can be no canary, or nothing is sent.
    """
    steps = _steps(job)
    encoded, held = steps.encoded, steps.parts[client]
    phases = [job.algorithm.phase(t) for t in range(job.rounds)]
    if not any(phase.send for phase in phases):
        raise RecipeError("algorithm: sends nothing, so there is nothing to audit; choose another than local")
    if job.algorithm.message.settle is not None:
        raise RecipeError(
            "modifiers: choco sends what depends on who met whom, which shadow clients don't; leave it out"
        )
    if encoded.token_labels or encoded.labels.is_floating_point():
        raise RecipeError("task: a canary is a row with a wrong class, and this task has none; audit one with classes")
    others = np.setdiff1d(np.concatenate([*(steps.parts[k] for k in job.clients)]), held)
    if not len(others):
        raise RecipeError("clients: a canary is another client's row; give two or more")
    secret = keyed(b"audit", seed)
    canary = int(others[int(uniform_numbers(keyed(secret, "canary"), 1)[0] * len(others)) - 1])
    labels = encoded.labels.clone()
    labels[canary] = (labels[canary] + 1) % (int(labels.max()) + 1)
    members = uniform_numbers(keyed(secret, "coins"), shadows) <= 0.5
    with_it = np.append(held, canary)
    parts = {k: with_it if member else held for k, member in enumerate(members.tolist())}
    return canary, members, replace(steps, encoded=replace(encoded, labels=labels), parts=parts, twins={})


def _received(
    job: Job, client: int, canary: Canary, done: Callable[[int], object]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Train the shadow clients, and return what each round's message says of the canary, `[S, rounds]` both.

    The canary's loss on what was received until then; and how far what was received moved down the canary's gradient.
    """
    shadows = len(job.clients)
    start = job.state.take(slice(client, client + 1))
    adapters = {name: x[:1].repeat_interleave(shadows, 0) for name, x in start.stacks[0].tensors.items()}
    rounds = torch.zeros(shadows, dtype=torch.int64)
    memory = job.algorithm.init(adapters, standing(job.clients, rounds))
    state = State(adapters, job.optim.optimizer.init(adapters), rounds, memory).clone()
    seen = {name: x.clone() for name, x in adapters.items()}
    losses, matched = list[Tensor](), list[Tensor]()
    for t in range(job.rounds):
        turn = turn_of(job, state, job.clients)
        (came,) = train([turn])
        if isinstance(came, Exception):
            raise came
        payload, changed = job.algorithm.message.send(state.adapters, state.known, turn.at, turn.phases[0])
        state.remember(changed)
        now = seen | job.read(payload, t) if payload else seen
        sent = turn.phases[0].send
        matched.append(_matches(job, canary, seen, now, sent) if payload else torch.zeros(shadows).double())
        seen = {name: x.clone() for name, x in now.items()}
        losses.append(torch.cat([_losses(job, canary, part) for part in _parts(seen)]))
        state = state.after()
        done(t + 1)
    by_round, moved = (torch.stack(each, 1).cpu().numpy() for each in (losses, matched))
    return by_round, moved


def _parts(tensors: Tensors) -> Iterator[Tensors]:
    """Yield the tensors of some shadow clients after the others."""
    for start in range(0, len(next(iter(tensors.values()))), _TOGETHER):
        yield take(tensors, slice(start, start + _TOGETHER))


def _matches(job: Job, canary: Canary, before: Tensors, after: Tensors, kinds: frozenset[str]) -> Tensor:
    """Return how far each adapter moved down the canary's gradient, `[S]`: along it, in its own length."""
    found = []
    for old, new in zip(_parts(before), _parts(after), strict=True):
        moved = {name: x - new[name] for name, x in select(old, kinds).items()}
        slope = BatchGradient(job.model, [canary(old)], kinds).clipped(old, 1.0)
        along = torch.stack([(moved[name] * x).flatten(1).sum(1) for name, x in slope.items()]).sum(0)
        found.append(along.double() / norms(slope).double().clamp(min=1e-12))
    return torch.cat(found)


@torch.no_grad()
def _losses(job: Job, canary: Canary, adapters: Tensors) -> Tensor:
    """Return the canary's loss on each adapter, `[S]`."""
    batch = canary(adapters)
    frozen = {name: x.expand(len(batch.clients), *x.shape[1:]) for name, x in job.model.frozen.items()}
    batch = batch.to(next(iter(adapters.values())).device)
    return row_losses(job.model(adapters | frozen, batch, training=False), batch).double()


def _batch(encoded: Encoded, canary: int, adapters: Tensors) -> Batch:
    """Return the canary, a row, once for each of these adapters."""
    shadows = len(next(iter(adapters.values())))
    zeros = torch.zeros(shadows, dtype=torch.int64)
    rows, each = np.full(shadows, canary), torch.arange(shadows)
    weights = torch.ones(shadows, dtype=torch.float64)
    return make_batch(encoded, rows, clients=each, weights=weights, keys=zeros, shared=zeros, packed=0, each=1)
