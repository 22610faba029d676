"""Payloads of honest clients, changed in every way that we could think of; `benchmarks.mutated` mixes them."""

from collections.abc import Callable
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from peertune.rounds.bounds import FAR, NEAR, SHARE
from peertune.types import Tensors, kind, over_clients, pairs, take

NORM, SCALING = 5.0, 2.0
"""Of the frozen layers that the payloads are for."""


class Draw:
    """Numbers at random, in float64."""

    def __init__(self, *seeds: int) -> None:
        self.generator = torch.Generator().manual_seed(sum(seed * 1_000_003**n for n, seed in enumerate(seeds)) % 2**63)

    def normal(self, *shape: int) -> Tensor:
        """Return numbers of variance 1."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return numbers between these."""
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def power(self, low: float, high: float, *shape: int) -> Tensor:
        """Return powers of ten, their exponents uniform."""
        return 10 ** self.uniform(low, high, *shape)

    def one_of(self, count: int, *shape: int) -> Tensor:
        """Return whole numbers from 0, below `count`."""
        return torch.randint(count, shape, generator=self.generator)

    def order(self, count: int) -> Tensor:
        """Return the numbers below `count`, shuffled."""
        return torch.randperm(count, generator=self.generator)


Mutation = Callable[[Draw, Tensors, Tensors], Tensors]
"""`mutation(draw, sent [L, …], near [L, …])`: what L clients send in its place; `near` is what one who hears each has.

All in float64. What is not returned stays."""

_SMALLEST, _LARGEST = -320, 300


def _scaled(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    factor = draw.power(_SMALLEST, _LARGEST, len(next(iter(x.values()))))
    return {name: y * over_clients(factor, y) for name, y in x.items()}


def _scaled_by(key: Callable[[str], str], draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    factors: dict[str, Tensor] = {}
    for name, y in x.items():
        factors.setdefault(key(name), draw.power(_SMALLEST, _LARGEST, len(y)))
    return {name: y * over_clients(factors[key(name)], y) for name, y in x.items()}


def _scaled_by_direction(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """Each row of A, column of B and row of a head by itself."""
    found = {}
    for name, y in x.items():
        shape = (len(y), 1, y.shape[-1]) if kind(name) == "B" else (*y.shape[:2], *[1] * (y.dim() - 2))
        found[name] = y * draw.power(_SMALLEST, _LARGEST, *shape)
    return found


def _rows_permuted(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """Rows of A and of heads, but not the columns of B that go with them."""
    return {name: y[:, draw.order(y.shape[1])] for name, y in x.items() if kind(name) != "B"}


def _sites_swapped(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    other = {"q": "k", "k": "q"}
    return {name: x[f"{other[site]}.{of}"] for name in x for site, _, of in [name.partition(".")] if site in other}


def _clients_permuted(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    return {name: y[draw.order(len(y))] for name, y in x.items()}


def _transposed(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """A in B's place and the other way around, where a layer is square."""
    square = [(a, b) for a, b in pairs(x) if x[a].shape[2] == x[b].shape[1]]
    return {name: y for a, b in square for name, y in ((a, x[b].mT), (b, x[a].mT))}


def _repeated(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """One direction r times."""
    return {name: y[:, :1].expand_as(y) if kind(name) == "A" else y for name, y in x.items()}


def _zeroed(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """Some rows of A, and some columns of B, maybe all."""
    found = {}
    for name, y in x.items():
        shape = (len(y), 1, y.shape[-1]) if kind(name) == "B" else (*y.shape[:2], *[1] * (y.dim() - 2))
        found[name] = y * (draw.uniform(0, 1, *shape) < draw.uniform(0, 1, len(y), *[1] * (y.dim() - 1)))
    return found


def _one_direction(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    return {
        name: draw.normal(*y.shape[:2], 1) * draw.normal(len(y), 1, y.shape[2])
        for name, y in x.items()
        if kind(name) in "AB"
    }


def _all_of_one_size(low: float, high: float, draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    return {name: y.sign() * draw.power(low, high, len(y), *[1] * (y.dim() - 1)) for name, y in x.items()}


def _near_singular(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """A of condition 1e12 and far above, its strongest direction as long as it was."""
    found = {}
    for name, y in x.items():
        if kind(name) == "A":
            U, _, Vh = torch.linalg.svd(draw.normal(*y.shape), full_matrices=False)
            fall = torch.linspace(0, 1, y.shape[1], dtype=torch.float64) * draw.uniform(12, 300, len(y), 1)
            found[name] = norms(y)[:, None, None] * (U * (10**-fall)[:, None]) @ Vh
    return found


def _opposed(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """What cancels the A of one who hears it, nearly, at some weight; B large."""
    found = {}
    for name, y in near.items():
        if kind(name) == "A":
            times = [1.0, 2.0, 3.0, 1 / 2][int(draw.one_of(4))]
            found[name] = -times * y * (1 + draw.power(-17, -1, len(y), 1, 1) * draw.normal(*y.shape))
        elif kind(name) == "B":
            found[name] = draw.power(0, 2, len(y), 1, 1) * draw.normal(*y.shape)
    return found


def _no_numbers(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """NaN or infinity, in one entry or in all."""
    found = {}
    for name, y in x.items():
        what = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)[draw.one_of(3, len(y))]
        flat = y.flatten(1).clone()
        where = torch.zeros_like(flat, dtype=torch.bool)
        where[torch.arange(len(y)), draw.one_of(flat.shape[1], len(y))] = True
        where |= draw.uniform(0, 1, len(y), 1) < 0.3
        where &= draw.uniform(0, 1, len(y), 1) < 0.5  # of half of the tensors
        found[name] = torch.where(where, what[:, None], flat).view_as(y)
    return found


def _constant(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    return {
        name: torch.tensor([0.0, 1.0, -1.0, 1e-8, 0.1], dtype=torch.float64)[draw.one_of(5, len(y))][
            (..., *[None] * (y.dim() - 1))
        ].expand_as(y)
        for name, y in x.items()
    }


def _signs(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """Signs by row, by column or by chance."""
    found = {}
    for name, y in x.items():
        some = [
            (len(y), *[1] * (y.dim() - 1)),
            (*y.shape[:-1], 1),
            (len(y), *[1] * (y.dim() - 2), y.shape[-1]),
            y.shape,
        ]
        found[name] = y * draw.normal(*some[int(draw.one_of(4))]).sign()
    return found


def _other_coordinates(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """`(B M, M⁻¹ A)`, M of condition up to 1e8."""
    found = {}
    for a, b in pairs(x):
        L, r, _ = x[a].shape
        left, right = (torch.linalg.qr(draw.normal(L, r, r)).Q for _ in range(2))
        S = 10 ** (draw.uniform(-1, 1, L, r) * draw.uniform(0, 4, L, 1))
        found[a] = right.mT / S[:, None] @ left.mT @ x[a]
        found[b] = x[b] @ (left * S[:, None]) @ right
    return found


def _one_factor(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """A beside B = 0 or B beside A = 0: two such make a product that neither has."""
    rest = draw.one_of(2, len(next(iter(x.values()))))
    return {name: y * over_clients(rest == (kind(name) == "A"), y) for name, y in x.items() if kind(name) in "AB"}


def _within(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """As much as passes, or a little more: by kind so many times what one who hears it has, or the floor."""
    found, share = {}, draw.power(-1.5, 0.02, len(next(iter(x.values()))))
    for name, y in x.items():
        most = norms(near[name]).clamp(min=floor(name, near[name]))
        times = torch.tensor([NEAR, FAR, sqrt(FAR), 1.0], dtype=torch.float64)[draw.one_of(4, len(y))]
        found[name] = y * over_clients((share * times * most / norms(y)).nan_to_num(), y)
    return found


def _together(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """All in one direction, as much as passes, A from some and B from others: each has no product, and two have one."""
    found, has = {}, draw.one_of(2, len(next(iter(x.values()))))
    times = [NEAR, FAR][int(draw.one_of(2))] * draw.uniform(0.9, 1, len(has))
    for name, y in x.items():
        one = torch.zeros_like(y)
        one.view(len(y), -1)[:, 0] = 1
        most = norms(near[name]).clamp(min=floor(name, near[name]))
        found[name] = one * over_clients(times * most * (has == (kind(name) == "A")), y)
    return found


MUTATIONS: dict[str, Mutation] = {
    "as it is": lambda draw, x, near: {},
    "scaled": _scaled,
    "scaled by kind": partial(_scaled_by, kind),
    "scaled by site": partial(_scaled_by, lambda name: name.partition(".")[0]),
    "scaled by direction": _scaled_by_direction,
    "rows permuted": _rows_permuted,
    "sites swapped": _sites_swapped,
    "clients permuted": _clients_permuted,
    "transposed": _transposed,
    "rows repeated": _repeated,
    "rows zeroed": _zeroed,
    "one direction": _one_direction,
    "denormal": partial(_all_of_one_size, -324, -36),
    "huge": partial(_all_of_one_size, 20, 308),
    "near singular": _near_singular,
    "near singular with the others": _opposed,
    "no numbers": _no_numbers,
    "constant": _constant,
    "signs": _signs,
    "other coordinates": _other_coordinates,
    "one factor": _one_factor,
    "as much as passes": _within,
}


def mutated(draw: Draw, x: Tensors, near: Tensors) -> Tensors:
    """Return what L clients send in the place of x `[L, …]`: up to three mutations of each, or all one thing."""
    dtypes = {name: y.dtype for name, y in x.items()}
    x, near = ({name: y.double() for name, y in of.items()} for of in (x, near))
    L = len(next(iter(x.values())))
    if not int(draw.one_of(4)):
        return {name: y.to(dtypes[name]) for name, y in _together(draw, x, near).items()}
    every = [*MUTATIONS.values()]
    asked = [draw.one_of(len(every), L), draw.one_of(len(every), L) * draw.one_of(2, L)]
    for chosen in (*asked, torch.where(draw.one_of(3, L) > 0, len(every) - 1, 0)):
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0]
            for name, y in every[number](draw, take(x, rows), take(near, rows)).items():
                x[name] = x[name].index_copy(0, rows, y)
    return {name: y.to(dtypes[name]) for name, y in x.items()}


def beside(draw: Draw, x: Tensor, clients: int) -> Tensor:
    """Return what L clients send in the place of x `[L, …]`, bytes or what travels beside adapters: some of it."""
    flat = x.reshape(len(x), -1)
    chosen = draw.uniform(0, 1, *flat.shape) < draw.power(-2, 0, len(x), 1)
    chosen &= draw.uniform(0, 1, len(x), 1) < 0.5
    if x.dtype is torch.bool:
        return (flat ^ chosen).view_as(x)
    if x.dtype is torch.uint8:
        other = draw.one_of(256, *flat.shape).to(torch.uint8)
    else:
        odd = [
            0.0,
            -0.0,
            1.0,
            -1.0,
            torch.nan,
            torch.inf,
            -torch.inf,
            1e-320,
            5e-324,
            1e30,
            1e300,
            clients,
            0.5 * clients,
        ]
        some = torch.tensor(odd, dtype=torch.float64)[draw.one_of(len(odd), *flat.shape)]
        times = flat.double() * draw.power(-10, 10, *flat.shape) ** draw.one_of(2, len(x), 1)
        other = torch.where(draw.uniform(0, 1, len(x), 1) < 0.5, some, times).to(x.dtype)
    return torch.where(chosen, other, flat).view_as(x)


def norms(x: Tensor) -> Tensor:
    """Return the norms `[K]` of x `[K, …]`, which overflow only where they can't be said."""
    flat = x.flatten(1)
    largest = flat.abs().amax(1).clamp(min=1e-300)
    found: Tensor = largest * torch.linalg.vector_norm(flat / largest[:, None], dim=1)
    return found


def floor(name: str, x: Tensor) -> float:
    """Return the least norm of which a receiver takes FAR times as much: `peertune.rounds.bounds`."""
    match kind(name):
        case "A":
            return sqrt(x.shape[1] / 3)
        case "B":
            return sqrt(3) * SHARE * NORM / SCALING
        case _:
            return NORM
