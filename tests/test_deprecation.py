"""What is to go does what it did, and says once since when, and what to use."""

import pytest

import peertune
from peertune import deprecation
from peertune.deprecation import Going
from peertune.errors import RecipeError
from peertune.recipe import load_recipe


def test_a_key_of_the_recipe_that_is_to_go_has_its_effect_and_one_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(deprecation.KEYS, "training.lr", Going("0.2.0", "training.learning_rate"))
    values = load_recipe("digits-demo").model_dump(mode="json")
    older = {key: value for key, value in values["training"].items() if key != "learning_rate"}
    with caplog.at_level("WARNING", "peertune"):
        assert load_recipe("digits-demo", ["training.lr=0.25"]).training.learning_rate == 0.25
        assert load_recipe("digits-demo", ["training.lr=0.5"]).training.learning_rate == 0.5
        assert load_recipe(values | {"training": older | {"lr": 0.75}}).training.learning_rate == 0.75
    line = "training.lr: is deprecated since 0.2.0 and goes in the release after; use training.learning_rate"
    assert caplog.messages == [line, f"recipe: {line}"]
    with pytest.raises(RecipeError, match=r"^recipe: training\.lr: is the older name of training\.learning_rate"):
        load_recipe(values | {"training": older | {"lr": 0.75, "learning_rate": 0.5}})


def test_a_method_that_is_to_have_another_name_is_chosen_by_both(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(deprecation.CHOICES, ("algorithm", "gossip_lora"), Going("0.2.0", "dec_lora"))
    monkeypatch.setitem(deprecation.CHOICES, ("modifiers", "speed"), Going("0.2.0", "fedspeed"))
    words = ["algorithm={name: gossip_lora}", "modifiers=[{name: speed}]"]
    with caplog.at_level("WARNING", "peertune"):
        recipe = load_recipe("digits-demo", words)
    assert (recipe.algorithm.name, [one.name for one in recipe.modifiers]) == ("dec_lora", ["fedspeed"])
    assert [line.partition(" is ")[0] for line in caplog.messages] == [
        "digits-demo: algorithm.name: gossip_lora:",
        "digits-demo: modifiers.name: speed:",
    ]


def test_a_name_of_the_package_that_is_to_go_warns_at_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deprecation.NAMES, "construct", Going("0.2.0", "build"))
    with pytest.warns(DeprecationWarning, match=r"^peertune\.construct: is deprecated since 0\.2\.0") as caught:
        assert peertune.construct is peertune.build
    assert [warning.filename for warning in caught] == [__file__]


def test_what_is_deprecated_leads_to_what_is_there() -> None:
    for going in deprecation.NAMES.values():
        assert hasattr(peertune, going.instead)
    for key, going in deprecation.KEYS.items():
        assert key.rpartition(".")[0] == going.instead.rpartition(".")[0], "a key stays in its block"
