import ast
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peertune import randomness
from peertune.topology import pairs


def test_a_draw_depends_on_its_seed_purpose_and_counters_and_nothing_else() -> None:
    alone = randomness.uniforms(3, "edge", 7, 2, 5)
    randomness.uniforms(3, "edge", 1, 1, 1)
    together = randomness.uniforms(3, "edge", 7, np.array([0, 2, 4]), np.array([1, 5, 9]))
    assert alone == together[1]
    others = [
        randomness.uniforms(4, "edge", 7, 2, 5),
        randomness.uniforms(3, "epoch", 7, 2, 5),
        randomness.uniforms(3, "edge", 8, 2, 5),
        randomness.uniforms(3, "edge", 7, 5, 2),
        randomness.uniforms(3, "edge", 7, 2),
    ]
    assert len({float(x) for x in [alone, *others]}) == 6


def test_uniforms_are_uniform_and_neighbouring_counters_are_unrelated() -> None:
    u = randomness.uniforms(0, "test", np.arange(1000)[:, None], np.arange(200))
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    expected = u.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 90  # chi-squared with 49 degrees, p about 3e-4
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:]), (u[0::2], u[1::2])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


@pytest.mark.parametrize("chance", [1e-300, 1e-9, 0.1, 0.5, np.nextafter(0.5, 1), np.nextafter(1, 0), 1.0])
def test_what_happens_is_what_the_uniforms_say(chance: float) -> None:
    counters = 7, np.arange(300)[:, None], np.arange(200)
    expected = randomness.uniforms(3, "edge", *counters) < chance
    np.testing.assert_array_equal(randomness.happens(chance, 3, "edge", *counters), expected)
    one = float(randomness.uniforms(3, "edge", 7, 2, 5))
    assert not randomness.happens(one, 3, "edge", 7, 2, 5)
    assert randomness.happens(float(np.nextafter(one, 1)), 3, "edge", 7, 2, 5)


def test_fractions_are_the_middles_of_equal_parts_and_a_longer_draw_begins_like_a_shorter_one() -> None:
    drawn = randomness.fractions(3, "test", 10_001, 7)
    assert drawn.dtype == np.float32
    assert 0 < drawn.min() < 1e-3 < 0.999 < drawn.max() < 1
    np.testing.assert_array_equal(drawn * 2**16 % 1, 0.5)
    np.testing.assert_array_equal(randomness.fractions(3, "test", 5, 7), drawn[:5])
    counts = np.histogram(drawn, bins=50, range=(0, 1))[0]
    assert ((counts - 200.02) ** 2 / 200.02).sum() < 90


def test_words_broadcast_their_counters_and_accept_any_seed() -> None:
    assert randomness.words(-1, "x", np.zeros((4, 1)), np.zeros(3)).shape == (4, 3)
    assert randomness.words(10**30, "x").shape == ()


def test_a_generator_gives_the_same_stream_each_time_it_is_made() -> None:
    first, again = (randomness.generator(5, "epoch", 1, 2).permutation(100) for _ in range(2))
    other = randomness.generator(5, "epoch", 1, 3).permutation(100)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("counter", [0, 1, 2**31, 2**63 - 1])
def test_large_counters_are_told_apart(counter: int) -> None:
    assert randomness.words(0, "x", counter) != randomness.words(0, "x", counter - 1 if counter else 1)


def test_the_package_draws_for_the_purposes_of_the_table_and_for_each_of_them() -> None:
    drawing: list[Any] = [randomness.words, randomness.uniforms, randomness.happens, randomness.generator]
    drawing += [randomness.fractions, pairs.drawn_pairs, pairs.drawn_partners, pairs.drawn_receivers]
    places = {draws.__name__: [*signature(draws).parameters].index("purpose") for draws in drawing}
    passed = set()
    for file in Path(randomness.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(call.func).rpartition(".")[2] if isinstance(call, ast.Call) else ""
            if isinstance(call, ast.Call) and name in places:
                passed.add(ast.unparse(call.args[places[name]]).removesuffix(".of(name)"))
    assert passed == {"purpose", *(f"Draw.{purpose.name}" for purpose in randomness.Draw)}


def test_no_two_purposes_have_the_same_text() -> None:
    texts = [randomness.Draw[name] for name in randomness.Draw.__members__]
    assert len({*texts, *(text.of("x") for text in texts)}) == 2 * len(texts)
    assert not any("/" in text for text in texts), "which stands before a name"
