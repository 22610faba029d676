"""Small private runs, as tests of several levels make them."""

import torch

from peertune.assembly.build import Built, build
from peertune.privacy.draws import SECRET_BYTES
from peertune.recipe import load_recipe
from peertune.types import State

SECRET = bytes(range(SECRET_BYTES))
SMALL = [
    "clients=3",
    "rounds=4",
    "model.dtype=float64",
    "head=trained",
    "lora={r: 3, lora_alpha: 6, target_modules: [q_proj, v_proj]}",
    "partition={name: iid}",
    "graph={name: complete}",
    "algorithm={name: dec_lora}",
    "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 8}",
    "evaluate={every: 2, rows: 20}",
    "privacy={noise_multiplier: 1.0, delta: 1e-5}",
]


def made(*more: str, secret: bytes = SECRET) -> Built:
    return build(load_recipe("digits-demo", [*SMALL, *more]), secret=lambda: secret)


def same(one: State, other: State) -> bool:
    left, right = (x.adapters | x.memory | x.moments for x in (one, other))
    return left.keys() == right.keys() and all(torch.equal(x, right[name]) for name, x in left.items())
