"""Deadlines: what a late client trains and sends, against steps that are made whole and put together by hand."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from peertune.assembly.build import build
from peertune.engines.simulator import simulate
from peertune.errors import RecipeError
from peertune.method import standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.recipe import load_recipe
from peertune.rounds import deadline
from peertune.rounds.clock import Clock, each
from peertune.rounds.job import Job
from peertune.rounds.training import train_local
from peertune.topology import weights_at
from peertune.types import State, Tensors, by_site, payload_bytes

SMALL = (
    "model.dtype=float64",
    "clients=4",
    "partition={name: iid}",
    "lora={r: 2, lora_alpha: 4, target_modules: [q_proj, v_proj]}",
    "graph={name: complete, activation: 0.9}",
    "training={learning_rate: 5e-2, local_steps: 3, per_device_train_batch_size: 2}",
    "rounds=2",
    "evaluate={every: 1000, rows: 10}",
)
SPEEDS = [1.0, 3.1, 5.0, 100.0]
"""In time; in its third step; in its second; in its first forward pass."""


def made(*overrides: str, deadline_s: float = 9.0, late: str = "salf") -> Job:
    time = f"time={{step_s: {SPEEDS}, latency_s: 0.5, deadline_s: {deadline_s}, late: {late}}}"
    return build(load_recipe("digits-demo", [*SMALL, time, *overrides])).job


def test_what_is_reached_is_the_share_of_the_backward_pass() -> None:
    clock = Clock(each([1.0, 3.0, 4.0, 100.0]), deadline_s=9.0)
    found = deadline.reached(clock, range(4), [0] * 4, steps=3, sites=12)
    assert found is not None
    assert found.tolist() == [[12, 12, 12], [12, 12, 12], [12, 12, 0], [0, -1, -1]]
    assert deadline.sent(clock, found, 12).tolist() == [12, 12, 12, 0]
    assert deadline.sent(replace(clock, late="drop"), found, 12).tolist() == [12, 12, 0, 0]
    half = deadline.reached(replace(clock, deadline_s=200 / 3), [3], [5], steps=3, sites=12)
    assert half is not None
    assert half.tolist() == [[6, -1, -1]], "half of two thirds"
    assert deadline.reached(replace(clock, deadline_s=float("inf")), [3], [5], steps=3, sites=12) is None


def steps_made(job: Job, client: int, t: int, state: State, steps: int) -> State:
    """What a client has after so many whole local steps of a round."""
    own = state.take(torch.tensor([client]))
    (phase,), at = [job.algorithm.phase(t)], standing([client], own.rounds, job.local_steps)
    batches = list(job.steps([client], [t]))[:steps]
    train_local(job.model, own, batches, phase, job.optim, at, job.algorithm.local)
    return own


def by_hand(job: Job, t: int, state: State, reached: list[list[int]], sent: list[int]) -> State:
    """A round, client by client and site by site."""
    trained = []
    for client in job.clients:
        whole = sum(count == job.sites for count in reached[client])
        parts = [steps_made(job, client, t, state, steps) for steps in (whole, min(whole + 1, job.local_steps))]
        last = reached[client][min(whole, job.local_steps - 1)]
        both = [parts[0], parts[1] if whole < job.local_steps else parts[0]]
        own: Tensors = {}
        for place, site in enumerate(by_site(state.adapters)):
            there = both[place >= job.sites - last]
            own |= {name: there.adapters[name] for name in site}
        trained.append(own)
    weights, mixed = torch.from_numpy(weights_at(job.graph, t).toarray()), state.clone()
    for place, site in enumerate(by_site(state.adapters)):
        has = [count >= job.sites - place for count in sent]
        for name, (i, own) in product(site.keys() & names_sent(job, t), enumerate(trained)):
            mixed.adapters[name][i] = own[name][0]
            for j, other in enumerate(trained):
                if i != j and has[i] and has[j]:
                    mixed.adapters[name][i] += weights[i, j] * (other[name][0] - own[name][0])
    return mixed


def names_sent(job: Job, t: int) -> set[str]:
    return {name for name in job.state.adapters if name.rpartition(".")[2] in job.algorithm.phase(t).send}


@pytest.mark.parametrize("late", ["salf", "drop"])
def test_a_round_equals_steps_that_are_put_together_by_hand(late: str) -> None:
    job = made("algorithm={name: dec_lora}", "training.optim=sgd", "training.max_grad_norm=0", late=late)
    begun = job.state.clone()
    (first, *_) = (replace(record, state=record.state and record.state.clone()) for record in simulate(job))
    sites = job.sites
    assert sites >= 4
    salf = [[sites] * 3, [sites, sites, first.sites_sent[0] and int(sites * (2.8 / 3.1 - 1 / 3) * 1.5)]]
    salf += [[sites, int(sites * (0.8 - 1 / 3) * 1.5), -1], [0, -1, -1]]
    drop = [[count if count == sites else min(count, 0) for count in row] for row in salf]
    reached, sent = {"salf": (salf, [sites, sites, sites, 0]), "drop": (drop, [sites, 0, 0, 0])}[late]
    assert first.sites_sent == sent
    expected = by_hand(job, 0, begun, reached, sent)
    assert first.state is not None
    for name, x in first.state.adapters.items():
        torch.testing.assert_close(x, expected.adapters[name], rtol=0, atol=1e-12)
    assert all(3 in edge for edge in first.failed_edges) == (late == "salf")
    assert [span[2] for span in first.spans] == [3.0, 9.0, 9.0, 9.0]
    whole = payload_bytes({name: begun.adapters[name] for name in names_sent(job, 0)})
    assert first.bytes_sent == [whole * count for count in first.neighbours]


def test_of_a_first_step_that_is_not_whole_the_last_sites_travel() -> None:
    job = made("algorithm={name: dec_lora}", deadline_s=60.0, late="salf")
    reached = job.reached([3], [0])
    assert reached is not None
    part = int(reached[0, 0])
    assert 0 < part < job.sites
    begun = job.state.clone()
    (first, *_) = (replace(record, state=record.state and record.state.clone()) for record in simulate(job))
    assert (first.sites_sent, first.failed_edges) == ([job.sites] * 3 + [part], [])
    assert first.state is not None
    still = [site for place, site in enumerate(by_site(begun.adapters)) if place < job.sites - part]
    for name, x in first.state.adapters.items():
        stays = any(name in site for site in still)
        assert torch.equal(x[3], begun.adapters[name][3]) == stays, "nothing was trained, sent or heard of it"
        stepped = bool(first.state.moments[f"{name}.v"][3].any())
        assert stepped == (not stays and not name.endswith("A")), "B is 0 at first, and so is A's gradient"
    size = sum(payload_bytes(site) for site in by_site(begun.adapters)[job.sites - part :])
    assert first.bytes_sent[3] == size * first.neighbours[3]


def test_whoever_is_in_time_has_the_bits_of_a_round_without_a_deadline() -> None:
    one, other = (list(simulate(made(deadline_s=limit)))[-1] for limit in (300.0, 1e6))
    assert one.state is not None
    assert other.state is not None
    for name, x in (one.state.adapters | one.state.moments).items():
        assert torch.equal(x, (other.state.adapters | other.state.moments)[name])
    assert (one.spans, one.loss, one.edges) == (other.spans, other.loss, other.edges)


@pytest.mark.thorough
@pytest.mark.parametrize("method", sorted(ALGORITHMS))
def test_every_method_has_one_or_is_refused(method: str) -> None:
    if method in ("fedrot_lora", "rac_lora"):
        with pytest.raises(RecipeError, match="time: deadline_s needs plain local steps; leave out the"):
            made(f"algorithm={{name: {method}}}")
        return
    *_, last = simulate(made(f"algorithm={{name: {method}}}", "head=trained"))
    assert len(last.sites_sent) == 4
    assert last.state is not None
    assert all(x.isfinite().all() for x in last.state.adapters.values())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["time={deadline_s: 3}"], "time.deadline_s: without time.step_s nothing has a time; give step_s"),
        (["time={step_s: 1, late: drop}"], "time.late: is of a deadline; give time.deadline_s, or leave it out"),
        (["time={step_s: 1, deadline_s: 3, mode: asynchronous}"], "where nobody waits for anybody nobody is late"),
        (["graph={name: epidemic, fan_out: 2}"], "time: deadline_s needs edges both ways"),
        (["modifiers=[{name: half}]"], "time: deadline_s needs plain messages"),
        (["modifiers=[{name: fedspeed}]", "training.optim=sgd"], "time: deadline_s needs plain local steps; leave out"),
        (["evaluate.ensemble=true"], "time: deadline_s needs unjudged messages"),
    ],
)
def test_what_can_not_have_a_deadline_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        build(load_recipe("digits-demo", [*SMALL, "time={step_s: 1, deadline_s: 2}", *overrides]))
    assert said in str(error.value)


def test_a_peer_has_no_deadline() -> None:
    with pytest.raises(RecipeError, match=r"time\.deadline_s: is of simulations; a peer waits for"):
        build(load_recipe("digits-demo", [*SMALL, "time={step_s: 1, deadline_s: 2}"]), [1])
