"""Gradient tracking with local steps, as a method of one's own: K-GT (arXiv 2301.01313), with plain averaging after it.

Each client follows its gradient plus a correction `c_i`. After K local steps `z_i` is the sum of what it followed, and
`c_i ← c_i + (Σ_j W_ij z_j - z_i) / K`. The mean of the corrections stays 0.
"""

import torch

from peertune import Algorithm, At, Gradient, Local, Memory, Message, Phase, Tensors, both, gossip


def gradient_tracking() -> Algorithm:
    """Train, send and average both factors, each corrected by what the neighbours followed; twice Dec-LoRA's bytes."""

    def init(adapters: Tensors, at: At) -> Memory:
        zeros = {f"tracking.{name}.{what}": torch.zeros_like(x) for name, x in adapters.items() for what in "cz"}
        return zeros | {"tracking.steps": torch.zeros(len(at.clients), dtype=torch.int64)}

    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        followed = {name: g + memory[f"tracking.{name}.c"] for name, g in gradient(adapters).items()}
        sums = {f"tracking.{name}.z": memory[f"tracking.{name}.z"] + x for name, x in followed.items()}
        return followed, sums | {"tracking.steps": memory["tracking.steps"] + 1}

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        return adapters | {name: x for name, x in memory.items() if name.endswith(".z")}, {}

    def weigh(
        own: Tensors, heard: Tensors, weights: torch.Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[torch.Tensor, Memory]:
        changed, steps = {"tracking.steps": torch.zeros_like(memory["tracking.steps"])}, memory["tracking.steps"]
        for name, x in own.items():
            c, z = (memory[f"tracking.{name}.{what}"] for what in "cz")
            mixed = (weights.to(x.device, x.dtype) @ heard[f"tracking.{name}.z"].flatten(1)).view_as(z)
            changed[f"tracking.{name}.c"] = c + (mixed - z) / steps.clamp(min=1).view(-1, *[1] * (x.dim() - 1))
            changed[f"tracking.{name}.z"] = torch.zeros_like(z)
        return weights, changed

    local = Local(gradients, init=init, needs=frozenset({"sgd"}))
    return Algorithm(both(), gossip()._replace(weigh=weigh), local, Message(send))
