"""Virtual time: of steps, of pauses, of rounds that wait for neighbours."""

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peertune.assembly.build import Built, build
from peertune.engines.simulator import simulate
from peertune.errors import RecipeError
from peertune.recipe import load_recipe
from peertune.rounds.clock import NS, Clock, Span, each, lognormal, trace
from peertune.rounds.record import RoundRecord

SMALL = (
    "model.dtype=float64",
    "clients=5",
    "graph={name: ring}",
    "training={local_steps: 2, per_device_train_batch_size: 2}",
    "rounds=3",
    "evaluate={every: 100, rows: 5}",
)


def made(*overrides: str) -> Built:
    return build(load_recipe("digits-demo", [*SMALL, *overrides]))


def run(*overrides: str) -> list[RoundRecord]:
    return [replace(record, state=record.state and record.state.clone()) for record in simulate(made(*overrides).job)]


@given(
    begun=st.integers(0, 60),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    pauses=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=4),
)
def test_while_a_client_is_down_its_steps_stand_still(begun: int, lengths: list[int], pauses: Any) -> None:
    down = [(float(start), float(start + length)) for start, length in pauses]
    clock = Clock(lambda client, step: lengths[step], down={3: down})
    now, left = begun, sum(lengths)
    while left:  # second by second
        left -= not any(start <= now < end for start, end in down)
        now += 1
    assert clock.trained(3, begun * NS, range(len(lengths))) == now * NS
    assert clock.trained(0, begun * NS, range(len(lengths))) == (begun + sum(lengths)) * NS


def test_a_client_waits_for_its_own_neighbours_and_a_slow_one_reaches_one_more_client_each_round() -> None:
    records = run("time={step_s: [1, 1, 1, 1, 10], latency_s: 0.5}")
    first, second, third = (
        {span.client: span for span in (Span(*values) for values in record.spans)} for record in records
    )
    assert first[4] == Span(4, 0, 20, 20, -1)
    assert first[0] == Span(0, 0, 2, 20.5, 4)
    assert first[1].ended_s == first[2].ended_s == 2.5
    assert second[1] == Span(1, 2.5, 4.5, 23, 0)  # which itself waited for client 4
    assert third[1].began_s == 23
    assert [record.time_s for record in records] == [20.5, 40.5, 60.5]


def test_a_message_takes_its_bytes_over_the_bandwidth() -> None:
    (record, *_) = run("time={step_s: 1, bandwidth_bytes_s: 1000}")
    size = record.bytes_sent[0] / record.neighbours[0]
    assert record.time_s == pytest.approx(2 + size / 1000, abs=1e-9)


def test_who_sends_nothing_waits_for_nobody() -> None:
    records = run("time={step_s: [1, 2, 3, 4, 5]}", "algorithm.name=local")
    assert [span[3] for span in records[-1].spans] == [6, 12, 18, 24, 30]


def test_time_changes_no_adapter_and_goes_on_where_a_run_was_stopped() -> None:
    timed = (
        "time={step_s: {name: lognormal, median_s: 1, sigma: 0.5}, latency_s: 0.1}",
        "faults=[{down: 2, rounds: [1, 1]}]",
    )
    whole, plain = run(*timed), run(timed[1])
    for name, x in whole[-1].state.adapters.items():  # type: ignore[union-attr]
        assert torch.equal(x, plain[-1].state.adapters[name])  # type: ignore[union-attr]
    assert plain[-1].time_s is None
    assert plain[-1].spans == []
    job = made(*timed).job
    rest = list(simulate(replace(job, state=whole[0].state)))  # type: ignore[arg-type]
    assert [record.spans for record in rest] == [record.spans for record in whole[1:]]
    ended = {span[0]: span[3] for span in whole[0].spans}
    assert all(span[1] == ended[span[0]] for span in whole[1].spans), "a round begins where the last one ended"
    rejoins = next(span for span in whole[2].spans if span[0] == 2)
    assert rejoins[1] == max(ended[2], min(span[3] for span in whole[1].spans))


def test_a_slow_fault_takes_its_delay() -> None:
    records = run("time={step_s: 1}", "faults=[{slow: 1, rounds: [1, 1], delay_s: 7}]", "rounds=2")
    assert [record.time_s for record in records] == [2, 11]


def test_lognormal_times_have_their_median_and_are_the_same_whenever_they_are_asked_for() -> None:
    by_step, by_client = lognormal(3.0, 0.5, seed=1), lognormal(3.0, 0.5, "client", seed=1)
    assert median(by_step(client, step) for client in range(20) for step in range(50)) == pytest.approx(3, rel=0.05)
    assert by_step(4, 7) == lognormal(3.0, 0.5, seed=1)(4, 7) != by_step(4, 8)
    assert by_client(4, 7) == by_client(4, 8) != by_client(5, 7)
    assert lognormal(3.0, 0.0)(0, 0) == 3
    assert each([1, 2])(1, 99) == 2


def test_a_trace_says_each_step_of_each_client(tmp_path: Path) -> None:
    file = tmp_path / "times.csv"
    file.write_text("client,seconds\n0,1.5\n1 2  # in any order of clients\n\n0,2.5\n")
    seconds = trace(str(file), 2)
    assert [seconds(0, 0), seconds(1, 0), seconds(0, 1)] == [1.5, 2, 2.5]
    with pytest.raises(RecipeError, match=r"times\.csv ends after 1 steps of client 1, and its step 1 is asked for"):
        seconds(1, 1)
    for line, said in (("2,1", "line 1: '2,1' isn't"), ("0,-1", "'0,-1' isn't"), ("0,nan", "isn't"), ("0", "isn't")):
        file.write_text(line)
        with pytest.raises(RecipeError, match=said):
            trace(str(file), 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("time={step_s: [1, 2]}", "time.step_s: 2 speeds for 5 clients; give one for each"),
        ("time={step_s: -1}", "time.step_s: input should be greater than 0, not -1"),
        ("time={step_s: [1, 0, 1, 1, 1]}", "time.step_s: input should be greater than 0"),
        ("time={step_s: {name: lognormal, median_s: 0.0, sigma: 1.0}}", "time.step_s.median_s: 0.0 is out of range"),
        ("time={step_s: {name: normal}}", "time.step_s: unknown name 'normal'"),
        ("time={step_s: {name: trace, path: nowhere.csv}}", "time.step_s: nowhere.csv can't be read"),
        ("time={latency_s: 1}", "time.latency_s: without time.step_s nothing has a time; give step_s"),
        ("time={step_s: 1, phases: common}", "time.phases: is of time.mode=asynchronous, and the mode is rounds"),
        (
            "time={step_s: 1, down: [{client: 5, from_s: 0, to_s: 1}]}",
            r"time.down\[0\]: client 5; give one from 0 to 4",
        ),
        ("time={step_s: 1, down: [{client: 1, from_s: 2, to_s: 1}]}", r"time.down\[0\]: from_s 2 is not before to_s 1"),
    ],
)
def test_what_is_no_time_is_refused_in_one_line(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        made(override)
    assert "\n" not in str(refused.value)
