"""A recipe's plan of attacks: what it says, and what is refused in one line."""

import pytest

from peertune.assembly.registry import build_attacks, build_graph, check_choices, completed, hostile
from peertune.errors import RecipeError
from peertune.recipe import load_recipe
from peertune.recipe.schema import Recipe


def recipe(attacks: str, *more: str) -> Recipe:
    return load_recipe("digits-demo", ["clients=5", "rounds=20", *more, f"attacks={attacks}"])


def test_a_plan_says_who_does_what_in_which_rounds() -> None:
    asked = recipe("[{name: noise, scale: 2.0, clients: [3, 1], rounds: [4, 9]}, {name: sign_flip, clients: [0]}]")
    first, second = build_attacks(asked, build_graph(asked))
    assert (first.clients, first.first, first.last) == ((3, 1), 4, 9)
    assert (second.clients, second.first, second.last) == ((0,), 0, 19)
    assert hostile(asked) == [0, 1, 3]
    resolved = [choice.model_dump() for choice in completed(asked)["attacks"]]
    assert resolved == [
        {"name": "noise", "clients": [3, 1], "rounds": [4, 9], "scale": 2.0},
        {"name": "sign_flip", "clients": [0], "rounds": None, "factor": 1.0},
    ]
    again = load_recipe(asked.model_copy(update=completed(asked)).model_dump(mode="json"))
    assert build_attacks(again, build_graph(again))[0].clients == (3, 1)


REFUSED = {
    "[{name: sign_flop, clients: [1]}]": "attacks[0].name: unknown name 'sign_flop', did you mean sign_flip",
    "[{name: noise, clients: [1], size: 3}]": "attacks[0].size: unknown key 'size' (noise takes scale",
    "[{name: noise, clients: [5]}]": "attacks[0].clients: [5]; give different ones from 0 to 4",
    "[{name: noise, clients: [1, 1]}]": "attacks[0].clients: [1, 1]; give different ones from 0 to 4",
    "[{name: noise, clients: [1], rounds: [3, 2]}]": "attacks[0].rounds: [3, 2], the first round comes first",
    "[{name: noise, clients: [1], rounds: [20, 30]}]": "attacks[0].rounds: [20, 30], and the last round is 19",
    "[{name: noise, clients: [0, 1, 2, 3, 4]}]": "attacks: all clients that are up in round 0 are hostile; leave one",
    "[{name: noise, clients: [1, 2]}, {name: gauge, clients: [3, 2], rounds: [5, 9]}]": (
        "attacks[1]: client 2 attacks by its messages in attacks[0] at the same time; give other clients or other"
    ),
    "[{name: noise, clients: []}]": "attacks[0].clients: list should have at least 1 item",
    "[{name: noise}]": "attacks[0].clients: is missing",
}


@pytest.mark.parametrize("attacks", REFUSED)
def test_what_can_t_be_is_refused_in_one_line(attacks: str) -> None:
    with pytest.raises(RecipeError) as refused:
        check_choices(recipe(attacks))
    assert REFUSED[attacks] in str(refused.value)
    assert "\n" not in str(refused.value)


IDLE = {
    ("noise", "algorithm={name: local}"): "attacks[0]: noise needs exchange",
    ("free_rider", "algorithm={name: local}"): "attacks[0]: free_rider needs exchange",
    ("gauge", "algorithm={name: ffa_lora}"): "attacks[0]: gauge needs both factors",
    ("noise", "modifiers=[{name: choco}]", "graph={name: ring}"): "attacks[0]: noise needs no public copies",
    ("noise", "time={mode: asynchronous, step_s: 1, mixing: pairwise}"): "attacks[0]: noise needs messages",
    ("alie", "time={mode: asynchronous, step_s: 1}"): "attacks[0]: alie needs common rounds",
    ("ipm", "lora.ranks=[1, 2, 3, 4, 5]"): "attacks[0]: ipm needs one rank",
    ("spectral", "graph={name: epidemic, fan_out: 2, weights: row}"): "attacks[0]: spectral needs symmetric weights",
    ("free_rider", "time={step_s: 1, deadline_s: 5}"): "attacks[0]: free_rider needs no deadline",
    ("noise", "faults=[{down: 0, rounds: [3, 4]}]", "clients=2"): (
        "attacks: all clients that are up in round 3 are hostile"
    ),
}


@pytest.mark.parametrize("where", IDLE)
def test_an_attack_that_can_t_act_is_refused_in_one_line(where: tuple[str, ...]) -> None:
    name, *more = where
    with pytest.raises(RecipeError) as refused:
        check_choices(recipe(f"[{{name: {name}, clients: [1]}}]", *more))
    assert IDLE[where] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_client_may_attack_by_one_thing_after_the_other_and_by_two_things_at_once() -> None:
    check_choices(
        recipe(
            "[{name: noise, clients: [1], rounds: [0, 4]}, {name: gauge, clients: [1], rounds: [5, 19]},"
            " {name: free_rider, clients: [1, 2]}]"
        )
    )
