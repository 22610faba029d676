"""How far a neighbour's word can move a peer: whatever liars say, no further than honest ones could have come."""

from math import inf

from hypothesis import example, given
from hypothesis import strategies as st

from peertune.wire.pace import furthest_believed, silence_s

ROUNDS = st.integers(0, 10**18)
CLAIMS = st.dictionaries(st.integers(0, 9), ROUNDS, max_size=8)
SECONDS = st.floats(0, 1e6)


@given(st.integers(0, 10**6), CLAIMS, st.dictionaries(st.integers(0, 9), SECONDS), st.just(inf) | st.floats(0, 1e4))
@example(0, {1: 5}, {1: 1.0}, 5e-324)
@example(0, {1: 5}, {1: 1e6}, 1e-310)
def test_nobody_goes_back_nor_further_than_somebody_claims(
    here: int, claims: dict[int, int], silence: dict[int, float], fastest_s: float
) -> None:
    believed = furthest_believed(here, claims, silence, fastest_s)
    assert here <= believed <= max([here, *claims.values()])


@given(st.integers(0, 1000), st.dictionaries(st.integers(0, 9), ROUNDS, min_size=2), SECONDS)
def test_what_two_say_is_believed_and_of_one_alone_what_its_silence_allows(
    here: int, claims: dict[int, int], silent_s: float
) -> None:
    furthest, second = sorted(claims.values())[-1], sorted(claims.values())[-2]
    believed = furthest_believed(here, claims, dict.fromkeys(claims, silent_s), 0.5)
    assert believed == max(here, second, min(furthest, here + int(silent_s / 0.25)))


@given(st.integers(0, 1000), st.dictionaries(st.integers(0, 9), st.integers(0, 50)), ROUNDS, st.floats(0, 1000))
def test_one_liar_among_any_honest_ones_moves_a_peer_by_no_more_than_the_silence_before(
    here: int, honest: dict[int, int], lie: int, silent_s: float
) -> None:
    claims = {client: here + ahead for client, ahead in honest.items()}
    without = furthest_believed(here, claims, dict.fromkeys(claims, silent_s), 2.0)
    with_it = furthest_believed(here, {**claims, 10: lie}, dict.fromkeys([*claims, 10], silent_s), 2.0)
    assert without <= with_it <= max([here + int(silent_s), *claims.values()])


@given(CLAIMS, st.dictionaries(st.integers(0, 9), SECONDS))
def test_before_the_first_round_and_without_a_silence_it_takes_two(
    claims: dict[int, int], silence: dict[int, float]
) -> None:
    second = sorted([0, 0, *claims.values()])[-2]
    assert furthest_believed(0, claims, silence, inf) == second
    assert furthest_believed(0, claims, silence, 0.0) == second
    assert furthest_believed(0, claims, {}, 1.0) == second


def test_a_silence_ends_when_anybody_else_is_heard_and_none_begins_with_who_never_was() -> None:
    claims = {1: 50}
    assert silence_s(claims, {1: 100.0}, {1: 159.9}, 160.0) == {1: 60.0}, "what it says now ends no silence"
    assert silence_s(claims, {1: 100.0, 2: 90.0}, {1: 159.9, 2: 150.0}, 160.0) == {1: 10.0}
    assert silence_s(claims, {2: 90.0}, {2: 90.0}, 160.0) == {1: 70.0}, "this peer was away, whoever claims it"
    assert silence_s(claims, {}, {1: 159.9}, 160.0) == {}
    assert silence_s(claims, {1: 200.0}, {1: 200.0}, 160.0) == {1: 0.0}, "a clock that was set back"
