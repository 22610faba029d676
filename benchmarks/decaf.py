"""DeCAF's truncation by thin factorisations and a small core, against the SVD of the averaged product itself."""

import torch
from torch import Tensor

from benchmarks.measure import Figure, figure, interleaved, ratios
from peertune.method import Phase, standing
from peertune.methods.mixers import products
from peertune.types import Tensors

WIDTH, RANK, HEARD = 1024, 8, 11  # ten neighbours and oneself
BOTH = frozenset({"A", "B"})


def run(repeats: int = 7) -> list[Figure]:
    """Measure one receiver."""
    generator = torch.Generator().manual_seed(0)
    heard: Tensors = {
        "site.A": torch.randn(HEARD, RANK, WIDTH, generator=generator),
        "site.B": torch.randn(HEARD, WIDTH, RANK, generator=generator),
    }
    own = {name: x[:1] for name, x in heard.items()}
    weights = torch.full((1, HEARD), 1 / HEARD)
    phase = Phase(BOTH, BOTH)

    def dense() -> Tensor:
        product = torch.einsum("j,jor,jri->oi", weights[0], heard["site.B"], heard["site.A"])
        u, s, vh = torch.linalg.svd(product, full_matrices=False)
        truncated: Tensor = u[:, :RANK] * s[:RANK] @ vh[:RANK]
        return truncated

    at = standing([0], torch.zeros(1, dtype=torch.int64))

    def core() -> Tensors:
        return products().receive(own, heard, weights, {}, at, phase)[0]

    mixed = core()
    torch.testing.assert_close(mixed["site.B"][0] @ mixed["site.A"][0], dense(), rtol=1e-3, atol=1e-2)
    times = interleaved({"core": lambda _: core(), "dense": lambda _: dense()}, repeats)
    what = f"a site of {WIDTH} × {WIDTH}, rank {RANK}, {HEARD - 1} neighbours"
    return [
        figure(f"decaf for one receiver, {what}", [1e3 * x for x in times["core"]], "ms"),
        figure("the same by a dense SVD", [1e3 * x for x in times["dense"]], "ms"),
        figure("decaf over a dense SVD", ratios(times["dense"], times["core"]), "×", "≥ 20"),
    ]
