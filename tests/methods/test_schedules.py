"""Tables of what each round trains and sends."""

from math import nan

import pytest
import torch

from peertune.errors import RecipeError
from peertune.method import Algorithm, Phase, Schedule, standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.schedules import alternating, both, only_b, silent, switching_interval


def factors(kinds: frozenset[str]) -> str:
    return "".join(sorted(kinds - {"head"}))


def phases(schedule: Schedule, *rounds: int) -> list[Phase]:
    """Return the phases of clients that are in these rounds."""
    return schedule.phases({}, standing(range(len(rounds)), torch.tensor(rounds)))


def trained(algorithm: Algorithm) -> list[str]:
    return [factors(algorithm.phase(t).train) for t in range(12)]


def sent(algorithm: Algorithm) -> list[str]:
    return [factors(algorithm.phase(t).send) for t in range(12)]


@pytest.mark.parametrize(
    ("name", "arguments", "trains", "sends"),
    [
        ("local", {}, ["AB"] * 12, [""] * 12),
        ("dec_lora", {}, ["AB"] * 12, ["AB"] * 12),
        ("ffa_lora", {}, ["B"] * 12, ["B"] * 12),
        ("rolora", {}, ["B", "A"] * 6, ["B", "A"] * 6),
        ("adf_lora", {}, ["B"] * 5 + ["A"] * 5 + ["B"] * 2, ["AB"] * 12),
        ("adf_lora", {"switch_every": 1}, ["B", "A"] * 6, ["AB"] * 12),
        ("tad_lora", {"switch_every": 3}, (["B"] * 3 + ["A"] * 3) * 2, ["AB"] * 12),
        ("tad_lora", {"rho": lambda: 0.646}, ["B"] * 5 + ["A"] * 5 + ["B"] * 2, ["AB"] * 12),
        ("tad_lora", {"rho": lambda: 0.913}, ["B"] * 10 + ["A"] * 2, ["AB"] * 12),
        ("decaf", {}, ["AB"] * 12, ["AB"] * 12),
        ("fedrot_lora", {}, ["AB"] * 12, ["AB"] * 12),
        ("fedsa_lora", {}, ["AB"] * 12, ["A"] * 12),
        ("la_lora", {}, ["AB"] * 12, ["AB"] * 12),
        ("lora_fair", {}, ["AB"] * 12, ["AB"] * 12),
    ],
)
def test_each_method_trains_and_sends_what_its_table_says(
    name: str, arguments: dict[str, object], trains: list[str], sends: list[str]
) -> None:
    algorithm = ALGORITHMS[name](**arguments)
    assert trained(algorithm) == trains
    assert sent(algorithm) == sends


@pytest.mark.parametrize("schedule", [both(), only_b(), alternating(2, send="trained"), alternating(2, send="both")])
def test_the_head_trains_and_travels_in_every_round(schedule: Schedule) -> None:
    assert all("head" in phase.train & phase.send for phase in phases(schedule, *range(12)))


def test_a_silent_round_trains_the_head_and_sends_nothing() -> None:
    (phase,) = phases(silent(), 0)
    assert phase.train == {"A", "B", "head"}
    assert phase.send == frozenset()


def test_clients_in_rounds_of_their_own_have_the_phases_of_these() -> None:
    schedule = alternating(3, send="trained")
    assert [factors(phase.train) for phase in phases(schedule, 7, 2, 3, 7)] == ["B", "B", "A", "B"]


@pytest.mark.parametrize(
    ("rho", "rounds"), [(0.0, 3), (0.155, 3), (0.3, 4), (0.646, 5), (0.74, 6), (0.913, 10), (0.955, 14)]
)
def test_the_sparser_the_graph_the_longer_the_phase(rho: float, rounds: int) -> None:
    assert switching_interval(rho) == rounds


def test_a_graph_that_never_mixes_has_no_switching_interval() -> None:
    with pytest.raises(RecipeError, match="clients hardly ever meet"):
        switching_interval(1.0)


def test_settings_hold_what_was_resolved() -> None:
    assert ALGORITHMS["tad_lora"](rho=lambda: 0.646).settings == {"switch_every": 5}
    assert ALGORITHMS["tad_lora"](switch_every=7).settings == {"switch_every": 7}
    assert ALGORITHMS["adf_lora"]().settings == {"switch_every": 5}
    assert ALGORITHMS["fedrot_lora"]().settings == {"strength": 0.5}
    assert ALGORITHMS["lora_fair"](ridge=0.5).settings == {"ridge": 0.5}
    assert ALGORITHMS["decaf"]().settings == {"unequal": "common_rank", "step": 0.3}
    for name in ("dec_lora", "fedsa_lora", "ffa_lora", "la_lora", "local", "rolora"):
        assert ALGORITHMS[name]().settings == {}


def test_rho_is_estimated_only_where_it_is_needed() -> None:
    def rho() -> float:
        raise AssertionError("estimated for nothing")

    assert ALGORITHMS["tad_lora"](switch_every=2, rho=rho).settings == {"switch_every": 2}


def test_auto_without_a_graph_asks_for_a_number() -> None:
    with pytest.raises(RecipeError, match="give a number"):
        ALGORITHMS["tad_lora"]()


@pytest.mark.parametrize("name", ["adf_lora", "tad_lora"])
@pytest.mark.parametrize("rounds", [0, -3])
def test_a_phase_shorter_than_a_round_is_refused(name: str, rounds: int) -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        ALGORITHMS[name](switch_every=rounds)


@pytest.mark.parametrize("strength", [-0.1, 1.1, nan])
def test_a_rotation_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(RecipeError, match="from 0 to 1"):
        ALGORITHMS["fedrot_lora"](strength=strength)


@pytest.mark.parametrize("step", [0.0, -0.1, 1.1, nan])
def test_a_step_between_ranks_outside_its_range_is_refused(step: float) -> None:
    with pytest.raises(RecipeError, match=r"^step: .* is out of range, give a number above 0, up to 1$"):
        ALGORITHMS["decaf"](step=step)


def test_a_step_between_ranks_where_there_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^step: is for unequal=common_rank, and unequal is truncate; leave it out$"):
        ALGORITHMS["decaf"](unequal="truncate", step=0.5)
    assert ALGORITHMS["decaf"](unequal="truncate").settings["unequal"] == "truncate"


@pytest.mark.parametrize("ridge", [0.0, -1.0, nan])
def test_a_penalty_that_is_none_is_refused(ridge: float) -> None:
    with pytest.raises(RecipeError, match=r"^ridge: .* is out of range, give a number above 0$"):
        ALGORITHMS["lora_fair"](ridge=ridge)
