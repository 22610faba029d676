"""The methods, one factory each.

A factory's signature is its schema: `{name: adf_lora, switch_every: 3}` in a recipe is
`ALGORITHMS["adf_lora"](switch_every=3)`. All clients start from one A, drawn from the recipe's seed, and B = 0.
"""

from collections.abc import Callable
from math import inf
from typing import Literal

from peertune.errors import RecipeError
from peertune.method import Algorithm
from peertune.methods.adaptive import adaptive
from peertune.methods.locals import by_steps, in_links, turned_back
from peertune.methods.mixers import STEP, corrected, gossip, products
from peertune.methods.schedules import alternating, both, only_b, sharing_a, silent, switching_interval

FIRST_INTERVAL = 5
"""Rounds of a phase before anything is known of the graph: ADF-LoRA's."""
WINDOW = 40
"""Rounds in which clients come to an estimate of the graph's rho, where the recipe leaves it open."""


def local() -> Algorithm:
    """Each client trains both factors alone and sends nothing: what a client reaches without the others."""
    return Algorithm(silent(), gossip())


def dec_lora() -> Algorithm:
    """Dec-LoRA: train, send and average both factors in every round, `X_i ← Σ_j W_ij X_j` for X = A, B.

    Source: arXiv 2501.15361; the DLoRA of arXiv 2505.21382. The paper's W is fixed; ours may change with the round.
    """
    return Algorithm(both(), gossip())


def ffa_lora() -> Algorithm:
    """FFA-LoRA: A stays at its common start, B is trained, sent and averaged. Half the traffic, no cross term.

    Source: arXiv 2403.12313, with a server; without one it is the DLoRA-FA of arXiv 2505.21382.
    """
    return Algorithm(only_b(), gossip())


def rolora() -> Algorithm:
    """RoLoRA: B and A train in turn, each for one round, and the trained one is sent and averaged.

    Source: arXiv 2502.01755. Differs from the paper: there a server keeps the idle factor common to all; without one,
    clients hold different idle factors. The phase follows the global round, never a client's own counter.
    """
    return Algorithm(alternating(1, send="trained"), gossip())


def adf_lora(switch_every: int = FIRST_INTERVAL) -> Algorithm:
    """ADF-LoRA: B and A train in turn, each for `switch_every` rounds; both are sent and averaged in every round.

    Source: arXiv 2511.18291, where pairs of clients meet and take the mean of the two; here W is what the graph gives.
    That B trains first is our choice: A has no gradient while B = 0.

    Raises:
        RecipeError: `switch_every` is below 1.
    """
    return Algorithm(alternating(switch_every, send="both"), gossip(), settings={"switch_every": switch_every})


def tad_lora(
    switch_every: int | Literal["auto", "adaptive"] = "auto",
    window_rounds: int = WINDOW,
    rho: Callable[[], float] | None = None,
    clients: int = 1,
    seed: int = 0,
) -> Algorithm:
    """TAD-LoRA: ADF-LoRA with the length of a phase taken from the graph, `T* = max(1, round(3 / sqrt(1 - rho)))`.

    With "auto" rho is the recipe's graph's. With "adaptive" the clients estimate it in windows of `window_rounds` from
    what they hear, and agree on the length for the next window by themselves (see `adaptive`); they begin with phases
    of 5 rounds. The sparser the graph, the longer the phase.

    `rho`, `clients` and `seed` are no settings: the program hands them in. `rho` is a function that estimates the
    graph's rho, which takes seconds and is called only where `switch_every` is "auto".

    Source: arXiv 2602.00451, whose law is `T* ~ 1 / sqrt(1 - rho)`. Not stated in the paper: the constant, for which
    see `switching_interval`. "adaptive" is ours.

    Raises:
        RecipeError: `switch_every` is below 1, or "auto" without `rho`, or "auto" on a graph that never mixes; or
            `window_rounds` is asked for where nothing is estimated.
    """
    if switch_every == "adaptive":
        settings = {"switch_every": switch_every, "window_rounds": window_rounds}
        schedule, message, mixer = adaptive(window_rounds, FIRST_INTERVAL, clients, seed)
        return Algorithm(schedule, mixer, message=message, settings=settings)
    if window_rounds != WINDOW:
        raise RecipeError(
            f"algorithm.window_rounds: is for switch_every=adaptive, and switch_every is {switch_every}; leave it out"
        )
    if switch_every == "auto":
        if rho is None:
            raise RecipeError("switch_every: auto needs a graph to take it from, give a number of rounds")
        switch_every = switching_interval(rho())
    return Algorithm(alternating(switch_every, send="both"), gossip(), settings={"switch_every": switch_every})


def decaf(unequal: Literal["common_rank", "truncate"] = "common_rank", step: float = STEP) -> Algorithm:
    """DeCAF: train and send both factors; average their products, `B_i A_i ← SVD_r(Σ_j W_ij B_j A_j)`.

    `unequal` and `step` are for clients whose ranks differ; where all ranks are equal they change nothing. With
    "truncate" each client takes the average's r leading directions, r its own rank. It is as simple as it is harmful:
    what only high ranks know fades from round to round. With "common_rank" clients of two ranks mix the difference
    that they have at the lower of the two, by a `step`. The smaller it is, the less fades. See `products`.

    Source: arXiv 2505.21382; "truncate" as FlexLoRA does it, with a server (arXiv 2402.11505); "common_rank" is ours.
    Differs from the paper: it mixes before the local update of a step, a round here mixes after its local steps. Not
    stated in the paper, as far as we know it: how singular values are split between the factors. A public port splits
    them by square roots; `products` says why we don't.

    Raises:
        RecipeError: `step` lies outside (0, 1], or is given where it has no meaning.
    """
    if not 0 < step <= 1:
        raise RecipeError(f"step: {step} is out of range, give a number above 0, up to 1")
    if unequal == "truncate" and step != STEP:
        raise RecipeError("step: is for unequal=common_rank, and unequal is truncate; leave it out")
    return Algorithm(both(), products(unequal, step), settings={"unequal": unequal, "step": step})


def fedrot_lora(strength: float | Literal["hard"] = 0.5) -> Algorithm:
    """FedRot-LoRA: train both factors; turn the pair towards that of the round's start; then send and average it.

    `strength` 0 does not turn, which is Dec-LoRA; 1 turns all the way, "hard" by a reflection where that is nearer. The
    paper finds .4 to .6 best and 1 harmful; the authors' published settings are "hard". See `turned_back`.

    Source: arXiv 2602.23638, and the authors' code. There a round starts with the server's pair, here with what the
    client's own neighbourhood came to. Not stated: what becomes of directions that vanish, and of the optimiser's
    moments, which are not turned here.

    Raises:
        RecipeError: `strength` lies outside [0, 1].
    """
    if strength != "hard" and not 0 <= strength <= 1:
        raise RecipeError(f"strength: {strength} is out of range, give a number from 0 to 1, or hard")
    return Algorithm(both(), gossip(), turned_back(strength), settings={"strength": strength})


def lora_fair(ridge: float = 0.01) -> Algorithm:
    """LoRA-FAIR: train, send and average both factors; correct the averaged B towards the averaged product.

    Source: arXiv 2411.14961, with a server; here each client averages its neighbourhood. Differs from the paper: its
    objective is a cosine between the products, which leaves their scale to its penalty. Ours is the squared distance,
    which has a closed form; see `corrected`. The paper's weight of the penalty is .01, of another objective. However
    near to singular the averaged A is, the correction is bounded; below .01 `ridge` changes only what Ā holds firmly.

    Raises:
        RecipeError: `ridge` is not above 0.
    """
    if not 0 < ridge < inf:
        raise RecipeError(f"ridge: {ridge} is out of range, give a number above 0")
    return Algorithm(both(), corrected(ridge), settings={"ridge": ridge})


def fedsa_lora() -> Algorithm:
    """FedSA-LoRA: train both factors in every round, send and average A; B and the head stay a client's own.

    Source: arXiv 2410.01463, with a server. Each client is to be judged by its own model, best on rows of its
    own (`evaluate.on=both`): the mean of all adapters pairs an A with B's that were not trained for it.
    """
    return Algorithm(sharing_a(), gossip())


def la_lora() -> Algorithm:
    """LA-LoRA: A and B train in turn by local step, both are sent and averaged in every round; a head trains always.

    The authors give B twice the rate of A, and begin each round with fresh moments, weight decay .01 with AdamW and
    r = alpha = 16; below is a run with these. Its base, rows, rates and steps are ours. Source: arXiv 2602.19926 and
    the authors' code, with a server. There each pass over the rows begins with A; here turns go on from step to step,
    so a round begins with A where `training.local_steps` is even. Their private training, and the smoothing of
    gradients that goes with it, are not here.
    """
    return Algorithm(both(), gossip(), by_steps())


def rac_lora(links: int = 2, link_rounds: int = 20) -> Algorithm:
    """RAC-LoRA: a chain of links, each a B that is trained over a random A and added to the sum of those before.

    A link lasts for `link_rounds` rounds, the last of `links` to the end. Its A is drawn from the recipe's seed, the
    same at all clients, and its B starts at 0. So to mix the sum of the products `B_l A_l` is to mix each B_l: exactly,
    without a cross term, as `ffa_lora` within a link. All B are mixed in every round, since clients must come to agree
    on the sum as well.

    Nothing is merged into the base, which would then differ from client to client. The links are blocks of the ranks of
    one adapter: of rank r each has r / links. So the rank of what is learnt grows link by link, the adapter that is
    written is an ordinary one, and a round's bytes are those of all links from the first. A block begins with fresh
    moments, while the paper's optimiser lives on.

    Source: arXiv 2410.08305 and the authors' code, which is for one machine: it draws a factor, merges the product into
    the weights, and starts again. What is mixed without a server is ours. There either factor may be the random one.

    Raises:
        RecipeError: `links` or `link_rounds` is below 1, or a client has fewer ranks than links.
    """
    for name, value in (("links", links), ("link_rounds", link_rounds)):
        if value < 1:
            raise RecipeError(f"algorithm.{name}: {value} is out of range, give at least 1")
    settings = {"links": links, "link_rounds": link_rounds}
    return Algorithm(only_b(), gossip(), in_links(links, link_rounds), settings=settings)


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "adf_lora": adf_lora,
    "decaf": decaf,
    "dec_lora": dec_lora,
    "fedrot_lora": fedrot_lora,
    "fedsa_lora": fedsa_lora,
    "ffa_lora": ffa_lora,
    "la_lora": la_lora,
    "local": local,
    "lora_fair": lora_fair,
    "rac_lora": rac_lora,
    "rolora": rolora,
    "tad_lora": tad_lora,
}
"""Name in a recipe → factory."""
