"""`python tests/cards.py > docs/methods.md`: what the docstrings say, and what a few rounds show."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from playing import begun, played

from peertune import ALGORITHMS, MODIFIERS
from peertune.method import Algorithm, standing
from peertune.types import State, payload_bytes

INTRO = """# Methods and modifiers

Each card is the docstring of its function, and below it what a few rounds show. This page is made by
`python tests/cards.py > docs/methods.md`, and a test holds it. **Bytes** are what a client sends in a round, on
average, as a share of `dec_lora`'s. They are of one site whose factors are equally large, in float32 and with AdamW. A
method that **keeps the mean** mixes without moving the clients' mean adapter. Settings, with their defaults, go beside
the name: `algorithm: {name: fedrot_lora, strength: 0.4}`.

Several come from papers with a **server**. That is the complete graph, always active: `graph={name: complete}`. There
every client takes the mean of all, each counting alike, as from a server that hears everybody in every round. So
`dec_lora` is FedAvg of both factors, and `ffa_lora`, `rolora` or `fedsa_lora` have their papers' server.
[Studies](studies.md#baselines) need such a baseline.

Not here, and why:

- RW-LoRA: only one client works at a time.
- AirComp: it adds signals in the air, which a network can't.
- FLood and FedAgg: their formulas are not known to us.
- SD-LoRA, SoRA and PRISM: we know of no rule that mixes them without a server.
- FedHL's weights are not known to us. SALF is `time.deadline_s`.
"""
ROUNDS, CLIENTS, INTERVAL = 12, 4, 5
GIVEN = {
    "rho",
    "clients",
    "seed",
    "near",
    "algorithm",
    "local",
    "message",
    "mixer",
    "rounds",
}  # what the program hands in


def page() -> str:
    """Return docs/methods.md."""
    methods = [card(name, make, made(make), command(name)) for name, make in ALGORITHMS.items()]
    plain = ALGORITHMS["dec_lora"]()
    modifiers = [
        card(name, change, changed(plain, change), command("dec_lora", name)) for name, change in MODIFIERS.items()
    ]
    return (
        "\n".join([INTRO, "## Methods\n", *methods, "## Modifiers\n\nShown with `dec_lora`.\n", *modifiers]).rstrip()
        + "\n"
    )


AUTHORS = {
    "la_lora": [
        "lora.r=16",
        "lora.lora_alpha=16",
        "training.loraplus_lr_ratio=2",
        "training.reset_optimizer=round",
        "training.weight_decay=0.01",
        "graph.activation=1",
    ]
}
"""Method → settings of its authors that are more than a name."""
_RANKS = ["lora.ranks={2: 4, 4: 4, 8: 2}"]
GOES_WITH = {"choco": ["graph={name: ring}"], "divided": _RANKS, "zero_padded": _RANKS}
"""Modifier → settings that it goes with, where the demo has others."""


def command(method: str, *modifiers: str) -> list[str]:
    """Return the words of the run that a card names."""
    changes = [f"modifiers=[{', '.join(f'{{name: {name}}}' for name in modifiers)}]"] if modifiers else []
    more = [setting for name in modifiers for setting in GOES_WITH.get(name, [])]
    return ["peertune", "run", "digits-demo", f"algorithm.name={method}", *AUTHORS.get(method, []), *changes, *more]


def made(make: Callable[..., Algorithm]) -> Algorithm:
    """Return the method as on a graph for which its phases have five rounds."""
    wants = inspect.signature(make).parameters
    return make(**{"switch_every": INTERVAL} if "switch_every" in wants else {})


def changed(algorithm: Algorithm, change: Callable[..., Any]) -> Algorithm:
    """Return the method with a modifier, by its defaults."""
    (field, *others) = inspect.signature(change).parameters
    if "rounds" in others:
        change = partial(change, rounds=ROUNDS)
    if field == "algorithm":
        whole: Algorithm = change(algorithm)
        return whole
    return algorithm._replace(**{field: change(getattr(algorithm, field))})


def card(name: str, factory: Callable[..., Any], algorithm: Algorithm, words: list[str]) -> str:
    """Return one card."""
    text = (inspect.getdoc(factory) or "").partition("\n\nRaises:")[0]
    wants = inspect.signature(factory).parameters.values()
    settings = ", ".join(f"`{p.name}` ({p.default})" for p in wants if p.name not in GIVEN)
    quoted = " ".join(f'"{word}"' if "{" in word else word for word in words)
    facts = [
        f"- Rounds: {phases(algorithm)}.",
        f"- Bytes: {sent_bytes(algorithm) / sent_bytes(ALGORITHMS['dec_lora']()):.3g}. "
        f"Keeps the mean: {'yes' if keeps_the_mean(algorithm) else 'no'}.",
        *([f"- Settings: {settings}."] if settings else []),
        f"- Try: `{quoted}`",
    ]
    return "\n".join([f"### `{name}`\n", text, "", *facts, ""])


def phases(algorithm: Algorithm) -> str:
    """Say what the first rounds train and send, each kind of round once."""
    told: dict[str, list[int]] = {}
    for t in range(ROUNDS):
        train, send = (", ".join(sorted(kinds)) or "nothing" for kinds in algorithm.phase(t))
        told.setdefault(f"train {train}; send {send}", []).append(t)
    if len(told) == 1:
        return f"all {next(iter(told))}"
    return "; ".join(f"{', '.join(map(str, rounds[:INTERVAL]))} … {what}" for what, rounds in told.items())


def start(algorithm: Algorithm, *, head: bool = True) -> State:
    """Return clients before their first round, with adapters drawn at random."""
    draw = torch.Generator().manual_seed(0)
    adapters = {
        "site.A": torch.randn(CLIENTS, 4, 32, generator=draw),
        "site.B": torch.randn(CLIENTS, 32, 4, generator=draw),
    }
    adapters |= {"out.head": torch.randn(CLIENTS, 2, 32, generator=draw)} if head else {}
    return begun(algorithm, adapters)


def sent_bytes(algorithm: Algorithm) -> float:
    """Return what a client sends in a round for the site's two factors, on average."""
    state, total = start(algorithm, head=False), 0
    for t in range(ROUNDS):
        at = standing(range(CLIENTS), torch.full((CLIENTS,), t))
        sent, _ = algorithm.message.send(state.adapters, state.known, at, algorithm.phase(t))
        edgewise = algorithm.message.edgewise
        total += payload_bytes(sent) if edgewise is None else edgewise.packed_bytes(sent, state.known)
    return total / ROUNDS


def keeps_the_mean(algorithm: Algorithm) -> bool:
    """Whether rounds of mixing on a ring leave the mean adapter as it was."""
    ring = torch.tensor([[2, 1, 0, 1], [1, 2, 1, 0], [0, 1, 2, 1], [1, 0, 1, 2]], dtype=torch.float64) / 4
    state = start(algorithm)
    means = {name: x.mean(0) for name, x in state.adapters.items()}
    for _ in range(3):
        state = played(algorithm, state, ring)
    return all(torch.allclose(x.mean(0), means[name], atol=1e-5) for name, x in state.adapters.items())


if __name__ == "__main__":
    sys.stdout.write(page())
