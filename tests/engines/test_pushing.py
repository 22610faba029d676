"""Peers that wait for nobody, as processes over TLS: what they did can be made again, and is what they hold."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from federation import Federation, Played, found, play

from peertune.assembly.build import build
from peertune.engines.replay import replay
from peertune.errors import RecipeError, RunError
from peertune.methods.catalogue import ALGORITHMS
from peertune.recipe import load_recipe
from peertune.rounds.posts import Post, Taken, mixed
from peertune.runs import mixlog
from peertune.types import stacked

pytestmark = pytest.mark.thorough

SMALL = (
    "clients=3",
    "model.dtype=float64",
    "partition={name: iid}",
    "lora={r: 2, lora_alpha: 4, target_modules: [q_proj]}",
    "graph={name: complete, activation: 0.7}",
    "training={learning_rate: 5e-3, local_steps: 1, per_device_train_batch_size: 2}",
    "evaluate={every: 1000, rows: 10}",
    "rounds=5",
    "time={mode: asynchronous, staleness_exponent: 0.5}",
)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return found(tmp_path_factory.mktemp("three"), 3)


def logs(made: Federation, name: str) -> dict[int, list[mixlog.Start]]:
    return {client: mixlog.read(made.folder / "played" / name / f"{client}") for client in range(3)}


def assert_made_again(made: Federation, name: str, overrides: Sequence[str], played: list[Played]) -> int:
    """Hold what peers ended with against the replay of their logs; return how many messages were mixed."""
    job = build(load_recipe("digits-demo", [*overrides, "time.step_s=1"])).job
    written = logs(made, name)
    *_, (trainings, states) = replay(job, written, dict.fromkeys(range(3), job.rounds))
    assert trainings == 3 * job.rounds
    for client, peer in enumerate(played):
        for key, x in states[client].adapters.items():
            torch.testing.assert_close(x, peer.adapters[key], rtol=0, atol=1e-12)
    return sum(len(line.taken) for starts in written.values() for start in starts for line in start.lines)


def test_of_every_method_the_peers_hold_what_the_replay_of_their_logs_comes_to(three: Federation) -> None:
    recipes = {
        method: [*SMALL, f"algorithm={{name: {method}}}"] for method in sorted(ALGORITHMS.keys() - {"rolora", "local"})
    }
    recipes["directed"] = [*SMALL, "graph={name: epidemic, fan_out: 2, weights: row}", "head=trained"]
    recipes["modified"] = [*SMALL, "modifiers=[{name: dfed_admm}]", "training.optim=sgd", "network.bound=false"]
    slow = ", ".join(f"{{slow: {client}, rounds: [0, 99], delay_s: 0.2}}" for client in range(3))
    recipes = {name: [*own, f"faults=[{slow}]"] for name, own in recipes.items()}
    played = play(three, recipes)  # none is done before anything can come
    for name, overrides in recipes.items():
        assert assert_made_again(three, name, overrides, played[name]) > 2, "they mix something"
    for peer in played["dec_lora"]:
        assert [record["round"] for record in peer.records] == list(range(5))
        assert all(edge in ([0, 1], [0, 2], [1, 2]) for record in peer.records for edge in record["edges"])


def test_a_slow_peer_that_shall_not_be_alone_goes_on_where_all_others_are_done(three: Federation) -> None:
    slow = "faults=[{slow: 0, rounds: [0, 99], delay_s: 1.5}]"
    recipe = [*SMALL, "algorithm={name: dec_lora}", "graph.activation=1.0", "network.when_alone=wait", slow]
    played = play(three, {"slow": recipe})["slow"]
    assert [len(peer.records) for peer in played] == [5] * 3
    last = played[0].records[-1]
    assert (last["vacant_edges"], last["failed_edges"]) == ([[0, 1], [0, 2]], []), "who is done is sent nothing"
    assert_made_again(three, "slow", recipe, played)


def test_what_a_peer_takes_of_a_message_is_the_formula() -> None:
    job = build(load_recipe("digits-demo", SMALL), [1]).job
    assert job.pushing is not None
    payload, older, newer = ({"q.A": torch.full((1, 2, 3), float(value))} for value in (1, 2, 3))
    came = [(Taken(Post(0, 5, 7, 1), 3), older), (Taken(Post(2, 5, 9, 2), 0), newer)]
    heard, taken = mixed(job, 1, Post(1, 5, 8, 1), stacked(payload), came, 2, lambda *_: [])
    first, last = (1 + 3) ** -0.5 / 3, 1 / 3  # two are heard: more than the receiver's degree, 1
    torch.testing.assert_close(heard.weights, torch.tensor([[first, 1 - first - last, last]], dtype=torch.float64))
    assert (heard.clients, heard.failed, heard.sent, taken) == ([0, 1, 2], [], [1], [one for one, _ in came])
    assert heard.tensors["q.A"][:, 0, 0].tolist() == [2, 1, 3]


def test_what_peers_can_not_do_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"time\.phases: peers have no common time; give time\.phases=own"):
        build(load_recipe("digits-demo", [*SMALL, "time.phases=common"]), [1])


# ---- logs


def test_a_log_has_a_line_for_each_training_and_one_that_was_cut_off_is_none(tmp_path: Path) -> None:
    log, taken = mixlog.MixLog(tmp_path), Taken(Post(2, 9, 4, 1), 3)
    log.begin(7, 0)
    log.add(0, 2, 1, [(taken, {})])
    with (tmp_path / "mixed.jsonl").open("a") as file:
        file.write('{"round": 1, "mi')
    whole = mixlog.Start(7, 0, [mixlog.Line(2, 1, [taken])])
    assert mixlog.read(tmp_path) == [whole]
    mixlog.MixLog(tmp_path).begin(8, 1)
    assert mixlog.read(tmp_path) == [whole, mixlog.Start(8, 1)]


MIXED = '{"client": 1, "start": 1, "version": 0, "degree": 1, "staleness": 0}'
OLDER = MIXED.replace('"staleness": 0', '"staleness": -1')


@pytest.mark.parametrize(
    "line",
    [
        '{"round": 2, "degree": 0, "heard": 0, "mixed": []}',
        "{",
        "[]",
        '{"round": 1}',
        f'{{"round": 1, "degree": 1, "heard": 0, "mixed": [{MIXED}]}}',
        f'{{"round": 1, "degree": 1, "heard": 2, "mixed": [{MIXED}, {MIXED}]}}',
        f'{{"round": 1, "degree": 1, "heard": 1, "mixed": [{OLDER}]}}',
    ],
)
def test_a_log_whose_lines_are_not_whole_is_not_replayed(tmp_path: Path, line: str) -> None:
    log = mixlog.MixLog(tmp_path)
    log.begin(7, 0)
    log.add(0, 0, 0, [])
    with (tmp_path / "mixed.jsonl").open("a") as file:
        file.write(f'{line}\n{{"start": 8, "round": 0}}\n')
    with pytest.raises(RunError, match=r"mixed\.jsonl: line 3 is damaged or out of order; restore the file"):
        mixlog.read(tmp_path)


def test_a_log_waits_for_room_on_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = mixlog.MixLog(tmp_path / "run", keeps_messages=True)
    log.add(0, 0, 0, [])  # there is no such folder
    log.add(1, 0, 0, [])
    assert caplog.text.count("can't be replayed if it is stopped before there is room") == 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mixed.jsonl").write_text('{"start": 1, "round": 0}\n')
    message = {"q.A": torch.ones(1, 2, 3)}
    log.add(2, 1, 1, [(Taken(Post(2, 9, 4, 1), 3), message)])
    assert [len(line.taken) for line in mixlog.read(tmp_path / "run")[0].lines] == [0, 0, 1]
    assert torch.equal(mixlog.kept(tmp_path / "run", Post(2, 9, 4, 1))["q.A"], message["q.A"])


def test_starts_that_went_back_are_made_again_and_logs_that_contradict_each_other_are_not(three: Federation) -> None:
    """A peer that was killed trains a version again, after which others may have mixed both."""
    job = build(load_recipe("digits-demo", [*SMALL, "time.step_s=1", "rounds=3"])).job

    def line(*taken: tuple[int, int, int]) -> mixlog.Line:
        return mixlog.Line(2, len(taken), [Taken(Post(*post, 2), 0) for post in taken])

    def made(*first: mixlog.Start, last: tuple[int, int, int] = (0, 2, 1)) -> None:
        second = mixlog.Start(1, 0, [line((0, 1, 1)), line(last), line()])
        list(replay(job, {0: first, 1: [second], 2: []}, {0: 3, 1: 3, 2: 0}))

    before = mixlog.Start(1, 0, [line()])  # killed in its training 1, which it had sent
    made(before, mixlog.Start(2, 1, [line((1, 1, 0)), line()]))
    with pytest.raises(RunError, match="client 0, start 2, round 1: it mixed round 2 of client 1, start 1, whose log"):
        made(before, mixlog.Start(2, 1, [line((1, 1, 2)), line()]), last=(0, 2, 2))  # each from what follows from it
    with pytest.raises(RunError, match="mixed round 0 of client 5, start 1, whose run isn't here"):
        made(before, mixlog.Start(2, 1, [line((5, 1, 0)), line()]))
    with pytest.raises(RunError, match="client 0, start 2, round 2: no start before it comes to where this one goes"):
        made(before, mixlog.Start(2, 2, [line()]))
    with pytest.raises(RunError, match="client 0: its log does not come to round 3, as its checkpoint does"):
        made(before, mixlog.Start(2, 1, [line()]))
