"""What a recipe's `privacy` comes to: how many steps each client may make, and with how much noise.

The noise of a step, and which rows it takes, follow from the client's secret and from all by which the step's sum comes
to something else: the state, the rows, and what the recipe says of them. So no two different sums share a noise.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from importlib.metadata import version
from secrets import token_hex

import numpy as np
import torch
from numpy.typing import NDArray

from peertune.assembly.encoding import EncodedTask
from peertune.data.batches import Drawing, Encoded, in_rows
from peertune.errors import RecipeError
from peertune.methods.private import Allowance, Own, Private
from peertune.privacy.accountant import noise_multiplier, steps_within
from peertune.privacy.draws import digest, keyed
from peertune.recipe import Privacy, Recipe

log = logging.getLogger(__name__)

_NOT_OF_A_STEP = ("rounds", "evaluate", "checkpoint", "network", "faults", "report_to", "keep_tokens")
"""Blocks by which no step's sum comes to something else."""
MADE_AGAIN = 2
"""So many times a run's steps are looked at for how many a budget has room for: peers may make rounds again."""


def private_of(recipe: Recipe, held: Mapping[int, NDArray[np.int64]]) -> Private | None:
    """Return what the local steps of clients with these rows are held to; None where the recipe asks for nothing.

    Raises RecipeError for a delta that is not below one over a client's rows, or by client over the clients, and for a
    budget too small for a round.
    """
    asked = recipe.privacy
    if asked is None:
        return None
    assert asked.delta is not None, "it has been checked"
    if asked.epsilon is not None:
        log.info("privacy: finding out what noise %d clients need, a second or so each", len(held))
    per_round = recipe.training.local_steps if asked.unit == "record" else 1
    allowances = {
        client: _allowance(recipe, asked, asked.delta, client, len(rows), per_round) for client, rows in held.items()
    }
    return Private(asked.unit, asked.max_grad_norm, asked.delta, per_round, allowances)


def _allowance(recipe: Recipe, asked: Privacy, delta: float, client: int, rows: int, per_round: int) -> Allowance:
    many, of = (rows, f"rows of client {client}") if asked.unit == "record" else (recipe.clients, "clients")
    if delta * many >= 1:
        raise RecipeError(
            f"privacy.delta: {delta:g} is no less than one over the {many} {of}, so that it would allow to publish "
            f"one of them; give at most {0.1 / many:.1g}"
        )
    rows_per_step = min(recipe.training.per_device_train_batch_size, rows) if asked.unit == "record" else 1
    rate = rows_per_step / rows if asked.unit == "record" else 1.0
    steps = recipe.rounds * per_round
    noise = asked.noise_multiplier
    if noise is None:
        assert asked.epsilon is not None, "it has been checked"
        return Allowance(rate, noise_multiplier(asked.epsilon, rate, steps, delta), rows_per_step, steps)
    if asked.epsilon is None:
        return Allowance(rate, noise, rows_per_step, None)
    most = steps_within(asked.epsilon, noise, rate, delta, MADE_AGAIN * steps)
    if most < per_round:
        room, instead = "no round", "give more noise_multiplier"
        if asked.unit == "record":
            room = f"{most} steps of client {client}, and a round has {per_round}"
            instead += ", or fewer local_steps"
        raise RecipeError(f"privacy.epsilon: {asked.epsilon:g} has room for {room}; {instead}")
    return Allowance(rate, noise, rows_per_step, most)


def owned(
    resolved: Recipe, encoded: EncodedTask, weights: Mapping[str, str], secrets: Mapping[int, bytes]
) -> dict[int, Own]:
    """Return what each client alone knows: its secret, with a digest of what a step's sum follows from.

    That is also what sums are rounded by: the base's `weights`, PyTorch and its threads. A GPU may add in another order
    each time, so what is made again there is new.
    """
    said = resolved.model_dump(mode="json", exclude=set(_NOT_OF_A_STEP))
    made_by = [version("peertune"), version("torch"), torch.get_num_threads(), dict(weights)]
    made_by += [token_hex()] if resolved.device.startswith("cuda") else []
    context = json.dumps([made_by, said], sort_keys=True).encode()
    rows = {client: (own, *(one.rows for one in encoded.twins.get(client, ()))) for client, own in encoded.held.items()}
    return {
        client: Own(
            secrets[client], keyed(secrets[client], "step", client, context, _digest(encoded.train, rows[client]))
        )
        for client in encoded.held
    }


def drawings(private: Private, own: Mapping[int, Own]) -> dict[int, Drawing]:
    """Return how each client draws its rows."""
    return {
        client: Drawing(keyed(one.secret, "draw", one.told), private.allowances[client].rate)
        for client, one in own.items()
    }


def _digest(encoded: Encoded, parts: Sequence[NDArray[np.int64]]) -> bytes:
    """Return a digest of these rows as a base reads them, in their order."""
    found = blake2b(digest_size=32)
    for rows in parts:
        lengths = encoded.lengths[rows]
        found.update(lengths.tobytes())
        places = np.repeat(encoded.starts[rows], lengths) + in_rows(lengths)
        tokens = {name: x[places] for name, x in encoded.tokens.items()}
        labels = encoded.labels[places if encoded.token_labels else rows]
        arrays = {name: x[rows] for name, x in encoded.arrays.items()}
        found.update(digest({**tokens, **arrays, "labels": labels}))
    return found.digest()
