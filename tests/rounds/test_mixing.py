"""Mixing of clients of several ranks: one client by itself, as a peer is, gets what it gets among all."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.mutated import Case, World
from benchmarks.mutations import Draw
from peertune.method import standing
from peertune.rounds.job import Heard
from peertune.rounds.mixing import mix
from peertune.topology import weights_at
from peertune.types import State, Tensors, by_client


@pytest.mark.parametrize("method", ["dec_lora", "decaf", "lora_fair"])
def test_a_client_among_others_of_other_ranks_mixes_by_itself_what_it_mixes_among_all(method: str) -> None:
    world = World(Case(method, "ranks"), "dense", 0)
    job, start, W = world.job, world.begun(Draw(0)), torch.from_numpy(weights_at(world.job.graph, 0).toarray())

    def mixed(clients: Sequence[int], weights: Tensor) -> list[Tensors]:
        state: State = start.take(torch.tensor(clients))
        at = standing(clients, state.rounds)._replace(heard=torch.arange(world.n))
        mix(replace(job, clients=clients), state, Heard(start.clone().stacks, weights, range(world.n), []), at, phase)
        return by_client(state.stacks)

    phase = job.algorithm.phase(0)
    together = mixed(range(world.n), W)
    for client in range(6):
        (alone,) = mixed([client], W[client : client + 1])
        for name, x in alone.items():
            assert not torch.equal(x, by_client(start.stacks)[client][name])
            torch.testing.assert_close(x, together[client][name], rtol=1e-5, atol=1e-6)
