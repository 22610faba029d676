"""Clients that wait for nobody: the course of events against rounds, and against a loop that trains one at a time."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from playing import kept

from peertune.assembly.build import Built, build
from peertune.errors import RecipeError
from peertune.method import standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.randomness import uniforms
from peertune.recipe import load_recipe
from peertune.rounds.job import Job
from peertune.rounds.record import RoundRecord
from peertune.rounds.training import reset_moments, train_local
from peertune.rounds.under_way import dealt
from peertune.runs import checkpoints
from peertune.topology import active_edges
from peertune.types import State, Tensors, payload_bytes, select

SMALL = (
    "model.dtype=float64",
    "clients=5",
    "partition={name: iid}",
    "lora={r: 2, lora_alpha: 4, target_modules: [q_proj]}",
    "graph={name: complete, activation: 0.6}",
    "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 2}",
    "rounds=4",
    "evaluate={every: 2, rows: 10}",
)
UNEVEN = "step_s: {name: lognormal, median_s: 1, sigma: 0.7}, latency_s: 1.3"


def made(*overrides: str) -> Built:
    return build(load_recipe("digits-demo", [*SMALL, *overrides]))


def states(records: list[RoundRecord]) -> list[State]:
    return [record.state for record in records if record.state is not None]


def without_time(record: RoundRecord) -> dict[str, Any]:
    left_out = ("state", "seconds", "diagnostics", "neighbourhood_cross_term")
    return {name: value for name, value in vars(record).items() if name not in left_out}


def assert_rounds_are_the_same(*overrides: str) -> None:
    asynchronous = kept(made(*overrides, "time={mode: asynchronous, step_s: 0.3}").job)
    rounds = kept(made(*overrides, "time={step_s: 0.3}").job)
    for ours, theirs in zip(asynchronous, rounds, strict=True):
        assert without_time(ours) == without_time(theirs)
        for measure, value in ours.diagnostics.items():
            assert value == pytest.approx(theirs.diagnostics[measure], rel=1e-6, abs=1e-12)
    for left, right in zip(states(asynchronous), states(rounds), strict=True):
        for name, x in (left.adapters | left.moments).items():
            assert torch.equal(x, (right.adapters | right.moments)[name])


def test_with_equal_speeds_and_no_latency_it_is_the_round_to_the_bit() -> None:
    assert_rounds_are_the_same("algorithm={name: adf_lora, switch_every: 1}")
    assert_rounds_are_the_same("graph={name: epidemic, fan_out: 2, weights: row}")


@pytest.mark.thorough
@pytest.mark.parametrize("method", sorted(ALGORITHMS.keys() - {"rolora"}))
def test_of_every_method(method: str) -> None:
    assert_rounds_are_the_same(f"algorithm={{name: {method}}}", "head=trained", "rounds=3", "training.local_steps=1")


@pytest.mark.thorough
@pytest.mark.parametrize("modifier", ["fedspeed", "dfed_admm"])
def test_of_modifiers_of_what_local_steps_follow(modifier: str) -> None:
    assert_rounds_are_the_same(f"modifiers=[{{name: {modifier}}}]", "training.optim=sgd")


def one_at_a_time(job: Job, exponent: float, common: bool) -> Iterator[tuple[int, Tensors]]:
    """Yield the trainings so far and all adapters whenever some have mixed: one client trains at a time, as it begins.

    Gossip alone, and edges both ways.
    """
    assert job.clock is not None
    clock, n, size = job.clock, len(job.clients), payload_bytes(job.state.adapters)
    held = [job.state.take(torch.tensor([client])) for client in range(n)]
    ends: list[list[int]] = [[] for _ in range(n)]
    began = [0] * n
    mail: list[dict[int, tuple[int, int, int, Tensors]]] = [{} for _ in range(n)]
    on_the_way: list[tuple[int, int, int, int, int, Tensors]] = []

    def after(client: int, at: int, own: int) -> int:
        return clock.trained(client, at, range(own * job.local_steps, (own + 1) * job.local_steps))

    common_ns = sorted(after(client, 0, 0) for client in range(n))[(n - 1) // 2]

    def trained(client: int) -> State:
        state, own = held[client].clone(), len(ends[client])
        at = standing([client], torch.tensor([own]), job.local_steps)
        number = began[client] // common_ns if common else own
        phase, before = job.algorithm.phase(number), job.algorithm.phase(number - 1) if own else None
        reset_moments(state.moments, job.optim.reset, phase, before)
        train_local(job.model, state, job.steps([client], [own]), phase, job.optim, at)
        return state

    ahead = {client: (after(client, 0, 0), trained(client)) for client in range(n)}
    count = 0
    while True:
        now = min(end for end, _ in ahead.values())
        ending = [client for client in range(n) if ahead[client][0] == now]
        degrees = {}
        for client in ending:
            own = len(ends[client])
            to = [i + j - client for i, j in active_edges(job.graph, own).tolist() if client in (i, j)]
            degrees[client] = len(to)
            for other in to:
                sent = {name: x[0].clone() for name, x in ahead[client][1].adapters.items()}
                on_the_way.append((clock.arrives(now, size), other, client, len(to), began[client], sent))
        for message in sorted((m for m in on_the_way if m[0] <= now), key=lambda m: m[0]):
            _, receiver, sender, *rest = message
            mail[receiver][sender] = (sender, *rest)  # type: ignore[assignment]
        on_the_way = [message for message in on_the_way if message[0] > now]
        for client in ending:
            state, m = ahead[client][1], len(mail[client])
            shares = {}
            for sender, degree, since, _ in mail[client].values():
                old = sum(since < end for end in ends[client])
                shares[sender] = (1 + old) ** -exponent / (1 + max(degrees[client], degree, m))
            for name, x in state.adapters.items():
                others = [share * mail[client][sender][3][name] for sender, share in shares.items()]
                x[0] = (1 - sum(shares.values())) * x[0] + sum(others)
            mail[client] = {}
            held[client] = state
            ends[client].append(now)
            began[client] = now
            ahead[client] = (after(client, now, len(ends[client])), trained(client))
        count += len(ending)
        yield count, {name: torch.cat([state.adapters[name] for state in held]) for name in job.state.adapters}


def assert_same_as(naive: Iterator[tuple[int, Tensors]], job: Job) -> list[RoundRecord]:
    count, adapters, records = 0, dict[str, torch.Tensor](), kept(job)
    for record in records:
        while count < 5 * (record.round + 1):
            count, adapters = next(naive)
        assert record.state is not None
        for name, x in record.state.adapters.items():
            torch.testing.assert_close(x, adapters[name], rtol=0, atol=1e-12)
    return records


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("{name: dec_lora}", "staleness_exponent: 0.5"),
        ("{name: adf_lora, switch_every: 1}", "phases: own"),
        ("{name: adf_lora, switch_every: 1}", "phases: common, staleness_exponent: 1.0"),
        ("{name: dec_lora}", "down: [{client: 1, from_s: 2.5, to_s: 9}], bandwidth_bytes_s: 2000"),
    ],
)
def test_a_loop_that_trains_one_client_at_a_time_comes_to_the_same(method: str, settings: str) -> None:
    job = made(f"algorithm={method}", f"time={{mode: asynchronous, {UNEVEN}, {settings}}}", "rounds=6").job
    assert job.pushing is not None
    naive = one_at_a_time(job, job.pushing.staleness_exponent, job.pushing.common_phases)
    assert len(assert_same_as(naive, job)) == 6


def in_pairs_one_at_a_time(job: Job) -> Iterator[tuple[int, Tensors]]:
    """Yield the trainings so far and all adapters whenever some have met: one client trains at a time, as it begins."""
    assert job.clock is not None
    clock, n = job.clock, len(job.clients)
    held = [job.state.take(torch.tensor([client])) for client in range(n)]
    ends, count = [0] * n, 0

    def begin(client: int, at: int) -> tuple[int, Tensors, State]:
        state, own, steps = held[client].clone(), ends[client], job.local_steps
        stands = standing([client], torch.tensor([own]), steps)
        phase, before = job.algorithm.phase(own), job.algorithm.phase(own - 1) if own else None
        reset_moments(state.moments, job.optim.reset, phase, before)
        train_local(job.model, state, job.steps([client], [own]), phase, job.optim, stands)
        end = clock.trained(client, at, range(own * steps, (own + 1) * steps))
        return end, {name: x.clone() for name, x in held[client].adapters.items()}, state

    ahead = {client: begin(client, 0) for client in range(n)}
    while True:
        now = min(end for end, *_ in ahead.values())
        ending = [client for client in range(n) if ahead[client][0] == now]
        for client in ending:
            _, started, trained = ahead[client]
            own = {name: x + trained.adapters[name] - started[name] for name, x in held[client].adapters.items()}
            held[client] = replace(trained, adapters=own)
        for client in ending:
            t = ends[client]
            near = [i + j - client for i, j in active_edges(job.graph, t).tolist() if client in (i, j)]
            if near:
                other = sorted(near)[int(uniforms(job.graph.seed, "partner", client, t) * len(near))]
                for name, x in select(held[client].adapters, job.algorithm.phase(t).send).items():
                    x[:] = held[other].adapters[name][:] = (x + held[other].adapters[name]) / 2
        for client in ending:
            ends[client] += 1
            ahead[client] = begin(client, now)
        count += len(ending)
        yield count, {name: torch.cat([state.adapters[name] for state in held]) for name in job.state.adapters}


PAIRS = "mode: asynchronous, mixing: pairwise, step_s: {name: lognormal, median_s: 1, sigma: 0.7}"


@pytest.mark.parametrize("method", ["{name: dec_lora}", "{name: adf_lora, switch_every: 1}"])
def test_pairs_that_average_are_those_of_a_loop_that_trains_one_client_at_a_time(method: str) -> None:
    job = made(f"algorithm={method}", f"time={{{PAIRS}}}", "rounds=6").job
    records = assert_same_as(in_pairs_one_at_a_time(job), job)
    edges = [edge for record in records for edge in record.edges]
    assert len(edges) > 15
    assert sum(sum(record.bytes_sent) for record in records) >= 2 * len(edges) * payload_bytes(job.state.adapters) / 5
    assert any(len(state.under_way["started"]) for state in states(records)), "some are met in a training"


def test_pairs_that_average_keep_the_mean_and_agree() -> None:
    still = ("training.learning_rate=1e-300", "training.weight_decay=0", "rounds=8", "graph.activation=1")
    job = made("algorithm={name: dec_lora}", *still, f"time={{{PAIRS}}}").job
    apart = {name: x + torch.arange(5.0).view(-1, *[1] * (x.dim() - 1)) for name, x in job.state.adapters.items()}
    records = kept(replace(job, bound=None, state=replace(job.state, adapters=apart)))
    last = states(records)[-1].adapters
    for name, x in apart.items():
        torch.testing.assert_close(last[name].mean(0), x.mean(0), rtol=0, atol=1e-12)
        assert last[name].std(0).max() < 0.3 * x.std(0).max()
    assert all(record.diagnostics["mean_drift"] == 0 for record in records)


def test_pairs_whose_edge_fails_or_who_are_too_far_apart_do_not_meet(caplog: pytest.LogCaptureFixture) -> None:
    faults = "faults=[{edge: [0, 1], rounds: [0, 99]}]"
    job = made("algorithm={name: dec_lora}", "rounds=8", faults, f"time={{{PAIRS}}}").job
    (name, *_) = job.state.adapters
    far = job.state.adapters[name].clone()
    far[4] *= 1e6
    records = kept(replace(job, state=replace(job.state, adapters=job.state.adapters | {name: far})))
    met, failed = ({edge for record in records for edge in getattr(record, of)} for of in ("edges", "failed_edges"))
    assert (0, 1) in failed
    assert {edge for edge in failed if 4 in edge}
    assert all(4 not in edge and edge != (0, 1) for edge in met)
    assert "they don't meet" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ((f"time={{{PAIRS}, latency_s: 1}}",), r"time\.latency_s: two that meet average at once"),
        ((f"time={{{PAIRS}, staleness_exponent: 1}}",), r"time\.staleness_exponent: two that meet average at once"),
        (("time={step_s: 1, mixing: pairwise}",), r"time\.mixing: is of time\.mode=asynchronous"),
        ((f"time={{{PAIRS}}}", "algorithm.name=decaf"), "time: mixing pairwise needs mixing by entry"),
        (
            (f"time={{{PAIRS}}}", "graph={name: epidemic, fan_out: 1, weights: row}"),
            "time: mixing pairwise needs edges both ways",
        ),
    ],
)
def test_pairs_that_can_not_be_are_refused(overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        made("algorithm={name: dec_lora}", *overrides)


def test_peers_that_meet_in_pairs_go_by_rounds() -> None:
    recipe = load_recipe("digits-demo", [*SMALL, "time={mode: asynchronous, mixing: pairwise}"])
    with pytest.raises(
        RecipeError, match=r"time\.mixing: peers that meet in pairs go by rounds; give time\.mode=rounds"
    ):
        build(recipe, clients=[1])


@pytest.mark.parametrize("mixing", ["push", "pairwise"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits_and_nothing_is_computed_for_a_checkpoint(
    tmp_path: Path, mixing: str
) -> None:
    overrides = ("algorithm={name: adf_lora, switch_every: 1}", "evaluate.load_best=true", "evaluate.every=1")
    time, under_way = (f"mode: asynchronous, {UNEVEN}", "messages") if mixing == "push" else (PAIRS, "started")
    job = made(*overrides, f"time={{{time}}}").job
    whole = kept(job)
    ahead = [len(state.under_way["done"]) for state in states(whole)]
    assert any(0 < count < 5 for count in ahead), "some are computed, and some have only begun"
    assert any(len(state.under_way[under_way]) for state in states(whole))
    for number, state in enumerate(states(whole)[:-1], start=1):
        folder = tmp_path / str(number)
        checkpoints.save(folder, state, 2, job.clients)
        found = checkpoints.load(folder, job.state, job.clients)
        assert found is not None
        rest = kept(replace(job, state=found))
        assert [without_time(record) for record in rest] == [without_time(record) for record in whole[number:]]
        for ours, theirs in zip(states(rest), states(whole)[number:], strict=True):
            for part in ("adapters", "moments", "memory", "under_way"):
                assert getattr(ours, part).keys() == getattr(theirs, part).keys()
                assert all(torch.equal(x, getattr(theirs, part)[name]) for name, x in getattr(ours, part).items())


def test_those_who_have_begun_train_in_one_pass_and_who_is_fast_ends_more_trainings() -> None:
    calls: list[list[int]] = []
    job = made("time={mode: asynchronous, step_s: [1, 1.1, 1.2, 1.3, 10]}", "rounds=8").job

    def counted(clients: Any, rounds: Any, first: int = 0, salts: Any = ()) -> Any:
        calls.append(list(clients))
        return job.steps(clients, rounds, first)

    records = kept(replace(job, steps=counted))
    ended = [span[0] for record in records for span in record.spans]
    assert [ended.count(client) for client in range(5)] == [11, 10, 9, 9, 1]
    assert calls[0] == [0, 1, 2, 3, 4]
    assert len(calls) < len(ended) / 2
    assert all(record.time_s == max(span[3] for span in record.spans) for record in records)
    assert records[-1].time_s is not None
    assert records[-1].time_s < 30, "eight rounds of the slowest are 160 seconds"


def test_a_mailbox_holds_of_each_neighbour_the_newest_message_alone() -> None:
    job = made("graph={name: complete}", "time={mode: asynchronous, step_s: [1, 1.1, 1.2, 1.3, 100]}", "rounds=8").job
    last = states(kept(job))[-1].under_way
    waiting = [sender for (receiver, post, _), sender in _with_senders(last) if receiver == 4]
    assert sorted(waiting) == [0, 1, 2, 3]
    newest = {sender: version for sender, version, *_ in last["posts"].tolist()}
    assert newest[0] > 8


def _with_senders(under_way: Tensors) -> list[tuple[list[int], int]]:
    posts = under_way["posts"].tolist()
    return [(message, posts[message[1]][0]) for message in under_way["messages"].tolist()]


@pytest.mark.parametrize("time", [f"mode: asynchronous, {UNEVEN}", PAIRS])
def test_what_is_under_way_is_dealt_by_client_and_put_together_again(time: str) -> None:
    job = made("algorithm={name: adf_lora, switch_every: 1}", f"time={{{time}}}").job
    whole = kept(job)
    state = next(state for state in states(whole)[:-1] if 0 < len(state.under_way["done"]) < 5)
    shares = [range(2), range(2, 3), range(3, 5)]
    shards = [dealt([state.under_way], share) for share in shares]
    for shard, share in zip(shards, shares, strict=True):
        part = replace(state, under_way=shard).take(slice(share[0], share[-1] + 1))
        assert part.round == state.round, "of all clients"
        held = [*shard["messages"][:, 0].tolist(), *shard["done"].tolist(), *shard["started"].tolist()]
        assert {*held} <= {*share}
        assert {*shard["messages"][:, 1].tolist()} == {*range(len(shard["posts"]))}, "none that nobody is sent"
    again = replace(state, under_way=dealt(shards[::-1], range(5)))
    rest = kept(replace(job, state=again))
    assert [without_time(record) for record in rest] == [without_time(record) for record in whole[state.round :]]
    for name, x in states(rest)[-1].adapters.items():
        assert torch.equal(x, states(whole)[-1].adapters[name])
    assert dealt([{}, {}], range(5)) == {}


def test_what_mixing_moves_the_mean_by_is_told() -> None:
    even = kept(made("time={mode: asynchronous, step_s: 1}", "algorithm={name: dec_lora}").job)
    uneven = kept(made(f"time={{mode: asynchronous, {UNEVEN}}}", "algorithm={name: dec_lora}").job)
    assert max(record.diagnostics["mean_drift"] for record in even) < 1e-12
    assert min(record.diagnostics["mean_drift"] for record in uneven) > 1e-6


def test_an_edge_that_is_planned_to_fail_brings_nothing() -> None:
    job = made(
        "graph={name: ring}",
        "faults=[{edge: [0, 1], rounds: [0, 99]}]",
        f"time={{mode: asynchronous, {UNEVEN}}}",
        "algorithm={name: dec_lora}",
    ).job
    records = kept(job)
    assert all((0, 1) not in record.edges for record in records)
    assert any((0, 1) in record.failed_edges for record in records)
    assert any((1, 2) in record.edges for record in records)


def test_a_message_that_lies_far_beyond_is_refused_by_its_receiver_alone() -> None:
    job = made("graph={name: complete}", "time={mode: asynchronous, step_s: 1}", "algorithm={name: dec_lora}").job
    state = job.state.clone()
    for x in state.adapters.values():
        x[3] = 1e6
    records = kept(replace(job, state=state, rounds=1))
    assert set(records[0].failed_edges) == {(0, 3), (1, 3), (2, 3), (3, 4)}
    for name, x in select(states(records)[0].adapters, {"A"}).items():
        assert x[:3].abs().max() < 10, name


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["time.mode=asynchronous"], "time.step_s: is missing; clients that wait for nobody need to know how long"),
        (["algorithm={name: rolora}"], "time: mode asynchronous needs one sort of message; choose an algorithm that"),
        (["algorithm={name: tad_lora, switch_every: adaptive}"], "time: mode asynchronous needs plain messages"),
        (["modifiers=[{name: int8}]"], "time: mode asynchronous needs plain messages; leave out all modifiers of what"),
        (["training.lr_scheduler_type=cosine"], "needs rate that stays; give training.lr_scheduler_type=constant"),
        (["faults=[{down: 1, rounds: [0, 1]}]"], "needs clients that are up; plan when a client is down by time.down"),
        (["graph.weights=laplacian"], "needs weights by degrees; give graph.weights=metropolis"),
        (["graph={name: epidemic, weights: push_sum, fan_out: 2}"], "needs weights by degrees"),
        (["evaluate.ensemble=true"], "needs unjudged messages; leave out evaluate.ensemble"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(overrides: list[str], said: str) -> None:
    step = [] if overrides == ["time.mode=asynchronous"] else ["time={mode: asynchronous, step_s: 1}"]
    with pytest.raises(RecipeError, match=said) as refused:
        made(*step, *overrides)
    assert "\n" not in str(refused.value)


def test_a_trace_that_ends_says_so_when_a_fast_client_asks_for_more(tmp_path: Path) -> None:
    file = tmp_path / "times.csv"
    file.write_text("".join(f"{client},{1 + client}\n" for client in range(5) for _ in range(12)))
    job = made(f"time={{mode: asynchronous, step_s: {{name: trace, path: '{file}'}}}}", "rounds=8").job
    with pytest.raises(RecipeError, match="ends after 12 steps of client 0, and its step 12 is asked for"):
        kept(job)
