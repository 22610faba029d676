"""A peer whose training diverges right after it mixed goes on with what it was before."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf

import pytest
import torch
from federation import Federation, found
from playing import starting

from peertune.assembly.build import build
from peertune.data.batches import TrainingSteps
from peertune.engines.fallback import EXPLODED, LEFT_OUT_ROUNDS, SUSPECTED_ROUNDS, Past
from peertune.engines.peer import run_peer
from peertune.errors import DivergedError
from peertune.identity.membership import Membership
from peertune.recipe import load_recipe
from peertune.rounds.job import Job, Pausing
from peertune.rounds.round import run_round
from peertune.types import State
from peertune.wire.swap import Swapper

ERROR = DivergedError("training: the loss is 100 in round 9; a hint")


def kept(*rounds: int) -> Callable[[int], State | None]:
    states = {t: starting({"q.A": torch.full((1, 2), float(t))}, round=t) for t in rounds}
    return lambda before: states.get(max((t for t in rounds if t < before), default=-1))


def name(client: int) -> str:
    return f"hospital-{client}"


def test_a_loss_far_above_all_before_has_exploded_only_right_after_mixing_and_once_in_a_round() -> None:
    past = Past(kept(0), name)
    assert (past.most_loss(0), past.left_out(1, 0)) == (inf, "")
    past.add(0, [0.5], {1})
    assert past.most_loss(1) == EXPLODED * 0.5
    past.add(0, [2.0], {1})
    assert past.most_loss(1) == EXPLODED * 2.0
    past.add(1, [0.5], set())
    assert past.most_loss(2) == inf
    past.add(2, [0.1], {1})
    assert past.most_loss(7) == EXPLODED * 2.0, "whatever rounds it was down in between"
    past.fall_back(7, ERROR)
    assert past.most_loss(7) == inf, "once in a round"
    without = Past(None, name)
    without.add(0, [2.0], {1})
    assert without.most_loss(1) == inf


def test_it_goes_back_step_by_step_and_takes_nothing_from_whom_it_mixed_since(caplog: pytest.LogCaptureFixture) -> None:
    past = Past(kept(0, 4, 8), name)
    for t, mixed in enumerate([{5}, {5}, set(), set(), {2}, set(), {2}, set(), {1}]):
        past.add(t, [1.0], mixed)
    first = past.fall_back(9, ERROR)
    assert (first.round, float(first.adapters["q.A"][0, 0])) == (9, 8.0)
    assert past.left_out(1, 9 + LEFT_OUT_ROUNDS - 1)
    assert not past.left_out(1, 9 + LEFT_OUT_ROUNDS)
    assert not past.left_out(2, 9)
    second = past.fall_back(9, ERROR)
    assert float(second.adapters["q.A"][0, 0]) == 4.0
    assert past.left_out(2, 9)
    assert not past.left_out(5, 9)
    assert float(past.fall_back(9, ERROR).adapters["q.A"][0, 0]) == 0.0
    assert past.left_out(5, 9)
    with pytest.raises(DivergedError):
        past.fall_back(9, ERROR)
    assert caplog.messages[0] == (
        "round 9: training: the loss is 100 in round 9; goes on from what it was before round 8, and for now takes "
        "nothing from hospital-1 until round 19"
    )
    past.add(9, [1.0], set())
    past.add(19, [1.0], {1})
    past.fall_back(20, ERROR)
    assert past.left_out(1, 20 + 2 * LEFT_OUT_ROUNDS - 1), "twice as long the second time"
    assert not past.left_out(1, 20 + 2 * LEFT_OUT_ROUNDS)


def test_whom_it_left_out_until_this_round_it_leaves_out_again_if_it_goes_back_before_it_mixed_that(
    caplog: pytest.LogCaptureFixture,
) -> None:
    past = Past(kept(4, 8), name)
    for t, mixed in enumerate([set(), set(), set(), set(), set(), {1}, set(), set(), {1}]):
        past.add(t, [1.0], mixed)
    past.fall_back(9, ERROR)
    past.add(9, [1.0], set())
    past.add(18, [1.0], {2})
    past.fall_back(19, DivergedError("no hint"))
    assert not past.left_out(1, 19)
    past.fall_back(19, DivergedError("no hint"))
    assert past.left_out(1, 19)
    assert caplog.messages[-1] == (
        "round 19: no hint; goes on from what it was before round 4, and for now takes nothing from "
        "hospital-1 until round 39, hospital-2 until round 29"
    )


def test_one_that_passed_over_rounds_goes_back_to_before_the_last_that_it_made() -> None:
    past = Past(kept(0, 4, 5), name)
    for t in range(5):
        past.add(t, [1.0], {1})
    assert float(past.fall_back(22, ERROR).adapters["q.A"][0, 0]) == 4.0, "what it has kept of round 5 is what diverged"


def test_one_that_spoils_all_that_it_is_mixed_into_parts_a_peer_from_itself_and_not_from_the_others() -> None:
    past = Past(lambda before: starting({}, round=before - 1), name)
    spoiler, met, spoilt, t = 1, dict.fromkeys(range(4), 0), 0, 0
    while t < 1000:
        mixed = {client for client in range(4) if not past.left_out(client, t)}
        if spoiler in past._mixed.get(t - 1, ()) and past._last[0] != t:
            past.fall_back(t, ERROR)
            spoilt += 1
            continue
        past.add(t, [1.0], mixed)
        met = {client: count + (client in mixed) for client, count in met.items()}
        t += 1
    assert 5 < spoilt < 9
    assert met[spoiler] == spoilt + (spoiler in mixed)
    assert min(count for client, count in met.items() if client != spoiler) > 800


def test_what_turns_out_rounds_after_it_was_mixed_is_suspected_still_and_later_it_is_training_itself() -> None:
    for alone in (1, SUSPECTED_ROUNDS - 1, SUSPECTED_ROUNDS):
        past = Past(kept(0, 4, 5, 6), name)
        for t, mixed in enumerate([set(), set(), {2}, set(), {1}, *[set[int]()] * alone]):
            past.add(t, [1.0], mixed)
        if alone == SUSPECTED_ROUNDS:
            with pytest.raises(DivergedError, match="the loss is 100"):
                past.fall_back(5 + alone, ERROR)
            continue
        assert float(past.fall_back(5 + alone, ERROR).adapters["q.A"][0, 0]) == 4.0
        assert [client for client, *_ in past.suspects] == [1]


def test_what_was_undone_is_suspected_no_more() -> None:
    past = Past(kept(0, 2), name)
    for t, mixed in enumerate([{1}, set(), {2}]):
        past.add(t, [1.0], mixed)
    assert float(past.fall_back(3, ERROR).adapters["q.A"][0, 0]) == 2.0
    past.add(3, [1.0], set())
    assert float(past.fall_back(4, ERROR).adapters["q.A"][0, 0]) == 0.0, "of round 0, the last that it has mixed in"
    past.add(4, [1.0], set())
    with pytest.raises(DivergedError, match="the loss is 100"):
        past.fall_back(5, ERROR)


def test_after_a_restart_it_knows_whom_it_left_out_and_for_how_long_the_next_time() -> None:
    past = Past(kept(0), name)
    past.add(1, [1.0], {1, 3})
    past.fall_back(2, ERROR)
    again = Past(kept(0), name)
    again.suspect(json.loads(json.dumps(past.suspects)))
    for t in (2, 2 + LEFT_OUT_ROUNDS - 1, 2 + LEFT_OUT_ROUNDS, 2 + LEFT_OUT_ROUNDS + 1):
        assert [again.left_out(client, t) for client in range(4)] == [past.left_out(client, t) for client in range(4)]
    assert again.suspects == past.suspects == [(1, 2 + LEFT_OUT_ROUNDS, 1), (3, 2 + LEFT_OUT_ROUNDS + 1, 1)]
    for one in (past, again):
        one.add(2, [1.0], set())
        one.add(20, [1.0], {1})
        one.fall_back(21, ERROR)
        assert one.suspects[0] == (1, 21 + 2 * LEFT_OUT_ROUNDS, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return found(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture
def job() -> Job:
    settings = ("clients=2", "rounds=5", "evaluate={every: 100, rows: 5}", "algorithm={name: local}")
    small = "training={local_steps: 1, per_device_train_batch_size: 2}"
    return build(load_recipe("digits-demo", [*settings, small]), [0]).job


@pytest.fixture
def swapper(made: Federation) -> Iterator[Swapper]:
    one = Swapper(Membership(made.peer(0), made.roster), {}, patience_s=1.0)
    yield one
    one.stop()


def spoilt(job: Job, value: float) -> Job:
    """Return the job as it would be resumed in round 3 from what a neighbour has spoilt."""
    draw = torch.Generator().manual_seed(0)
    adapters = {name: value * torch.randn(x.shape, generator=draw) for name, x in job.state.adapters.items()}
    return replace(job, state=starting(adapters, job.state.clone().moments, round=3))


def before(*mixed: int) -> list[dict[str, object]]:
    """Return records of three rounds, of which the last mixed."""
    edges = [[[0, client] for client in mixed] if t == 2 else [] for t in range(3)]
    common = {"loss": [1.0], "failed_edges": [], "not_mixed": [], "suspects": [], "seconds": {"train": 1.0}}
    return [{"round": t, "edges": edges[t], **common} for t in range(3)]


@pytest.mark.parametrize("value", [1e30, 30.0])
def test_a_peer_that_is_resumed_from_a_spoilt_checkpoint_goes_on_from_an_older_one(
    job: Job, swapper: Swapper, value: float
) -> None:
    asked = []

    def recall(rounds: int) -> State:
        asked.append(rounds)
        return job.state.at(2)

    records = list(run_peer(spoilt(job, value), swapper, records=lambda: before(1), recall=recall))
    assert [record.round for record in records] == [3, 4]
    assert max(loss for record in records for loss in record.loss) < 5
    assert asked == [3]
    assert records[-1].suspects == [(0, 1, 3 + LEFT_OUT_ROUNDS, 1)]


def test_a_round_that_is_made_again_from_an_older_state_is_kept_whole_or_not_at_all(job: Job, swapper: Swapper) -> None:
    assert isinstance(job.steps, TrainingSteps)
    kept = list[tuple[int, int]]()
    three = replace(
        spoilt(job, 30.0),
        local_steps=3,
        steps=replace(job.steps, local_steps=3),
        pausing=Pausing(1, lambda state: kept.append((state.round, state.step))),
    )
    records = list(run_peer(three, swapper, records=lambda: before(1), recall=lambda _: job.state.at(2)))
    assert [record.round for record in records] == [3, 4]
    assert kept == [(3, 1), (3, 2), (4, 1), (4, 2)], "the second time round 3 is made it isn't"


def test_a_peer_that_is_resumed_still_takes_nothing_from_whom_it_left_out(job: Job, swapper: Swapper) -> None:
    made = [*before()[:2], {**before()[2], "suspects": [[0, 1, 99, 2]]}]
    (record, *_) = run_peer(replace(job, state=job.state.at(3)), swapper, records=lambda: made)
    assert record.suspects == [(0, 1, 99, 2)]


def test_a_peer_that_mixed_nothing_says_that_training_diverges(job: Job, swapper: Swapper) -> None:
    with pytest.raises(DivergedError, match="no longer finite after round 3; lower training"):
        list(run_peer(spoilt(job, 1e30), swapper, records=before, recall=lambda _: job.state))


def test_what_exploded_is_not_sent(job: Job) -> None:
    def exchange(*_: object) -> None:
        raise AssertionError("something was sent")

    with pytest.raises(DivergedError, match=r"the loss is .* in round 0"):
        run_round(replace(job, most_loss=0.01), job.state.clone(), job.clients, 0, exchange)  # type: ignore[arg-type]
