from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peertune import build, load_recipe
from peertune.assembly.build import agreed
from peertune.errors import ModelError
from peertune.models.weights import check_weights, digest, digests

STATE = {
    "body.weight": torch.linspace(-3, 3, 12).reshape(3, 4),
    "body.places": torch.arange(5),
    "body.nothing": torch.zeros(0),
    "head.weight": torch.ones(2, 3),
    "head.bias": torch.zeros(2),
}


def test_a_base_has_one_digest_in_whatever_order_and_precision_it_is_held() -> None:
    turned = {name: torch.stack([STATE[name]] * 2, -1)[..., 0] for name in reversed(STATE)}
    assert not turned["body.weight"].is_contiguous()
    assert digest(turned) == digest(STATE)
    for dtype in (torch.float64, torch.bfloat16):
        assert digest({name: x.to(dtype) if x.is_floating_point() else x for name, x in STATE.items()}) == digest(STATE)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["body.weight"][2, 3].mul_(1.01),
        lambda state: state["body.places"][4].add_(1),
        lambda state: state.update({"body.weight": state["body.weight"].reshape(4, 3)}),
        lambda state: state.update({"body.other": state.pop("body.weight")}),
        lambda state: state.pop("body.nothing"),
    ],
)
def test_a_value_a_shape_or_a_name_makes_another_digest(change: Callable[[dict[str, Tensor]], object]) -> None:
    state = {name: x.clone() for name, x in STATE.items()}
    change(state)
    assert digest(state) != digest(STATE)


def test_a_head_is_told_apart_from_the_body_and_what_was_drawn_belongs_to_no_checkpoint() -> None:
    whole = digests(STATE, ["head"])
    assert whole.keys() == {"body", "head"}
    assert digests(STATE | {"head.bias": torch.ones(2)}, ["head"])["body"] == whole["body"]
    assert digests(STATE, ["head"], ["head.weight", "head.bias"]) == {"body": whole["body"]}
    assert digests(STATE, ["head"], ["head.bias"])["head"] != whole["head"]
    assert digests(STATE, []).keys() == {"body"}


def test_only_what_both_know_is_compared_and_the_first_that_differs_is_named() -> None:
    check_weights("base", {"body": "b", "head": "h"}, {})
    check_weights("base", {"body": "b"}, {"body": "b", "head": "h"})
    check_weights("base", {"body": "b"}, {"nf4": "q"})
    with pytest.raises(ModelError, match=r"of base are no longer .* \(digest of the head h, then g\); put"):
        check_weights("base", {"body": "b", "head": "h"}, {"body": "b", "head": "g"})


@pytest.mark.parametrize("init", ["true", "pissa"])
def test_a_run_says_the_weights_of_the_checkpoint_whatever_its_seed_takes_out_of_it_and_draws(init: str) -> None:
    found = [
        build(load_recipe("digits-demo", [f"seed={seed}", f"lora.init_lora_weights={start}", "head=frozen", *more]))
        for seed, start, *more in ((0, init), (1, init), (0, "true", "model.dtype=bfloat16"))
    ]
    one, *others = (dict(built.weights) for built in found)
    assert others == [one, one]
    assert one.keys() == {"body"}
    assert agreed(found[0])["base"] != agreed(found[1])["base"], "to peers the head that the seed draws is the base's"
