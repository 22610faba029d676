"""Layers that read one input are multiplied together; one client's update is merged where no gradient is wanted."""

from dataclasses import replace

import pytest
import torch
from encoders import answers, make_batch, make_stack

from peertune import build, load_recipe
from peertune.adapters.sites import Site, Together
from peertune.types import take


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("name", "alike"), [("bert", 3), ("llama", 3), ("gpt2", 1)])
def test_layers_that_read_one_input_make_together_what_each_makes_alone(name: str, alike: int, dropout: float) -> None:
    model, adapters = make_stack(name, dropout=dropout)
    batch = make_batch([5, 3, 20, 1, 7, 2, 9, 4, 6], packed=True)
    made = answers(model, adapters, batch)
    sites = [module for module in model.base.modules() if isinstance(module, Site)]
    assert max(len(site.together.members) for site in sites) == alike
    for site in sites:
        Together([site])
    for part, x in answers(model, adapters, batch).items():
        torch.testing.assert_close(made[part], x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_rows_that_lie_client_by_client_meet_their_own_clients_factors_alone(name: str, dropout: float) -> None:
    model, adapters = make_stack(name, dropout=dropout)
    clients = len(next(iter(adapters.values())))
    batch = replace(make_batch([7] * 2 * clients, packed=False), clients=torch.arange(clients).repeat_interleave(2))
    expected = answers(model, adapters, batch)
    for part, x in answers(model, adapters, replace(batch, each=2)).items():
        torch.testing.assert_close(x, expected[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "merged"), [(torch.float64, True), (torch.float32, True), (torch.bfloat16, False)])
def test_without_a_gradient_one_clients_update_is_merged_where_that_rounds_no_more(
    dtype: torch.dtype, merged: bool
) -> None:
    model, adapters = make_stack("bert")
    model.base.to(dtype)
    single, batch = take(adapters, slice(0, 1)), make_batch([5, 3, 20] * 7, packed=False)
    batch.clients.zero_()
    passed: list[torch.nn.Module] = []
    for site in model.sites.values():
        site.layer.register_forward_hook(lambda module, *_: passed.append(module))
    expected = model(single, batch, training=False).detach()
    assert len(passed) == len(model.sites)
    with torch.no_grad():
        found = model(single, batch, training=False)
    assert (len(passed) == len(model.sites)) == merged
    close = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps * 100
    torch.testing.assert_close(found, expected, rtol=close, atol=close)


def test_a_layer_without_factors_keeps_its_name_among_the_weights_by_which_peers_compare_bases() -> None:
    base = build(load_recipe("digits-demo", ["rounds=1"])).job.model.base
    names = {name for name in base.state_dict() if name.startswith("vit.layers.0.attention") and "weight" in name}
    at = {name.split(".attention.")[1] for name in names}
    assert at >= {"q_proj.layer.weight", "k_proj.weight", "v_proj.layer.weight"}
