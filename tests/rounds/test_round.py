"""The round on a base of one layer, held against its steps written out for one client after the other."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from playing import at_step, begun, every_kind, played, starting
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from peertune.adapters.stacked import attach, init_adapters
from peertune.errors import DivergedError
from peertune.method import Algorithm, At, Gradient, Local, Memory, Message, Mixer, Phase, Schedule, standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.schedules import alternating, both, by_round, silent
from peertune.methods.shares import DENSE_UP_TO, as_weights
from peertune.rounds.bounds import NEAR, Bound, Refusal
from peertune.rounds.job import Exchange, Heard, Job, Refuse
from peertune.rounds.mixing import exchanged
from peertune.rounds.record import Evaluation, RoundRecord
from peertune.rounds.round import run_round, run_rounds
from peertune.rounds.training import Optim, sgd
from peertune.rounds.turns import Came, Turn
from peertune.rounds.turns import train as train_turns
from peertune.topology import Fault, weights_at
from peertune.topology.graphs import complete, epidemic, path, ring
from peertune.types import Batch, Group, Stack, State, Tensors, only, select, stacked, take

CLIENTS = 5
MOMENTUM = 0.9


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return SequenceClassifierOutput(logits=self.layer(x))


def rows(client: int, step: int) -> tuple[Tensor, Tensor]:
    """What a client trains on in a local step, counted from the run's start."""
    draw = np.random.default_rng([client, step])
    return torch.from_numpy(draw.normal(size=(2, 4))), torch.from_numpy(draw.integers(0, 3, 2))


def steps(clients: Sequence[int], rounds: Sequence[int], first: int = 0, salts: Any = ()) -> Iterator[list[Batch]]:
    for step in range(first, 2):
        each = [rows(client, 2 * t + step) for client, t in zip(clients, rounds, strict=True)]
        inputs, labels = (torch.cat(x) for x in zip(*each, strict=True))
        places = torch.arange(len(clients)).repeat_interleave(2)
        yield [Batch({"x": inputs}, labels, places, torch.full_like(places, 0.5, dtype=torch.float64), places)]


def averaged(
    own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
) -> tuple[Tensors, Memory]:
    mixed = {name: (weights.to_dense() @ x.flatten(1)).view_as(own[name]) for name, x in heard.items()}
    return own | mixed, {}


mean = Mixer(averaged)
untouched = Mixer(lambda own, *_: (own, {}))


def score(stacks: Sequence[Stack], clients: Sequence[int]) -> Evaluation:
    adapters = only(stacks)
    return Evaluation("accuracy", (adapters["layer.A"].sum((1, 2)) + torch.tensor(list(clients))).tolist(), None, 1, [])


def made(**changes: Any) -> Job:
    model = attach(Base(), ["layer"], r=2, lora_alpha=4)
    draw = torch.Generator().manual_seed(0)
    clients = changes.get("graph", ring(clients=CLIENTS)).clients
    adapters = {
        name: torch.randn(clients, *x.shape[1:], generator=draw, dtype=torch.float64)
        for name, x in init_adapters(model, 1, 0).items()
    }
    job = Job(
        model,
        ring(clients=CLIENTS),
        Algorithm(alternating(1, "both"), mean),
        Optim(sgd(MOMENTUM), lambda step: every_kind(0.3 / (1 + step)), 0.0, "never"),
        steps,
        score,
        starting(adapters, sgd(MOMENTUM).init(adapters)),
        range(clients),
        rounds=3,
        local_steps=2,
        evaluate_every=2,
        clients_per_pass=99,
    )
    return replace(job, **changes)


def hear(job: Job) -> Any:
    """Let everybody hear everybody, as the simulator does."""

    def exchange(clients: Sequence[int], sent: Sequence[Stack], round: int, refuse: Refuse) -> Heard:
        tensors = only(sent)
        return exchanged(job, clients, clients, stacked(tensors), round, refuse)

    return exchange


def run(job: Job) -> list[RoundRecord]:
    return [replace(record, state=record.state and record.state.clone()) for record in run_rounds(job, hear(job))]


def adapters(record: RoundRecord) -> Tensors:
    assert record.state is not None
    return record.state.adapters


def written_out(job: Job) -> Iterator[tuple[Tensors, list[float], list[float]]]:
    """Yield the adapters after each round, and the loss and the norm of the gradient of each client that was up."""
    layer, x = Base().layer, job.state.clone().adapters
    moments = {name: torch.zeros_like(value) for name, value in x.items()}
    for t in range(job.rounds):
        up = [k for k in job.clients if not any(fault.down == k and fault.at(t) for fault in job.faults)]
        phase, before = job.algorithm.phase(t), job.algorithm.phase(t - 1)
        losses, norms = [], []
        for k in up:
            if job.optim.reset == "round" or (job.optim.reset == "phase" and t > 0 and phase.train != before.train):
                for moment in moments.values():
                    moment[k] = 0
            loss_sum = norm_sum = 0.0
            for step in (2 * t, 2 * t + 1):
                A, B = (x[f"layer.{of}"][k].clone().requires_grad_(of in phase.train) for of in "AB")
                inputs, labels = rows(k, step)
                loss = cross_entropy(inputs @ (layer.weight + 2.0 * B @ A).T + layer.bias, labels)
                loss.backward()
                grads = {f"layer.{of}": f.grad for of, f in (("A", A), ("B", B)) if f.grad is not None}
                for name, grad in grads.items():
                    moments[name][k] = MOMENTUM * moments[name][k] + grad
                    x[name][k] -= job.optim.rates(step)["A"] * moments[name][k]
                loss_sum += loss.item()
                norm_sum += sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
            losses.append(loss_sum / 2)
            norms.append(norm_sum / 2)
        W = weights_at(job.graph, t).toarray()
        for i in range(len(W)):
            for j in range(i):
                if {i, j} - set(up) or any(set(fault.edge or ()) == {i, j} and fault.at(t) for fault in job.faults):
                    W[i, i] += W[i, j]
                    W[j, j] += W[i, j]
                    W[i, j] = W[j, i] = 0
        sent = select(x, phase.send)
        x |= {name: torch.einsum("ij,j...->i...", torch.from_numpy(W), value) for name, value in sent.items()}
        yield {name: value.clone() for name, value in x.items()}, losses, norms


FAULTS = (Fault(1, 1, down=2), Fault(0, 1, edge=(1, 0)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clients_per_pass": 1},
        {"clients_per_pass": 2, "faults": FAULTS},
        {"algorithm": Algorithm(alternating(2, "trained"), mean), "rounds": 4},
        {"algorithm": Algorithm(both(), mean), "graph": complete(clients=4, activation=0.5, seed=3)},
        {"optim": Optim(sgd(MOMENTUM), lambda step: every_kind(0.3), 0.0, "round")},
        {"optim": Optim(sgd(MOMENTUM), lambda step: every_kind(0.3), 0.0, "phase"), "rounds": 4},
    ],
)
def test_rounds_are_local_steps_of_each_client_and_a_mean_of_whom_it_hears(changes: dict[str, Any]) -> None:
    job = made(**changes)
    start = job.state.clone()
    for t, (record, (expected, loss, norm)) in enumerate(zip(run(job), written_out(job), strict=True)):
        assert record.round == t
        assert record.state is not None
        assert record.state.round == t + 1
        assert record.loss == pytest.approx(loss, rel=1e-12)
        assert record.grad_norm == pytest.approx(norm, rel=1e-12)
        for name, x in adapters(record).items():
            torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-12)
    assert all(torch.equal(x, start.adapters[name]) for name, x in job.state.adapters.items())
    middle = run(job)[0].state
    assert middle is not None
    rest = run(replace(job, state=middle))
    for name, x in adapters(rest[-1]).items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-12)


class Third(Group):
    """A process of several; the others hold one client, which is up."""

    rank = 1
    size = 2

    def add(self, x: Tensor) -> Tensor:
        return x + 1


def test_a_process_whose_clients_are_all_down_leaves_them_as_they_were() -> None:
    whole = made(faults=[Fault(0, 0, down=client) for client in (2, 3)], rounds=1)
    job = replace(whole, state=whole.state.take(slice(2, 4)), clients=[2, 3], group=Third())
    (record,) = run(job)
    assert (record.clients, record.loss, record.edges) == ([], [], [])
    assert record.state is not None
    assert record.state.round == 1
    for name, x in adapters(record).items():
        assert torch.equal(x, job.state.adapters[name])


def test_edges_are_told_of_rounds_only_that_send_something() -> None:
    def exchange(clients: Sequence[int], sent: Sequence[Stack], *_: Any) -> Heard:
        tensors = only(sent)
        return Heard(stacked(tensors), torch.eye(CLIENTS, dtype=torch.float64), clients, [(0, 1)], [(1, 2)])

    for schedule, failed, vacant in ((both(), [(0, 1)], [(1, 2)]), (silent(), [], [])):
        (record,) = run_rounds(made(algorithm=Algorithm(schedule, mean), rounds=1), exchange)
        assert (record.failed_edges, record.vacant_edges) == (failed, vacant)


def test_edges_of_a_directed_graph_say_who_sent_and_who_heard() -> None:
    graph = epidemic(clients=CLIENTS, fan_out=1)
    (record,) = run(made(graph=graph, rounds=1))
    receivers, senders = weights_at(graph, 0).nonzero()
    pairs = zip(senders.tolist(), receivers.tolist(), strict=True)
    assert record.edges == sorted(pair for pair in pairs if pair[0] != pair[1])
    assert any(sender > receiver for sender, receiver in record.edges)


def test_what_a_client_sends_at_the_start_and_how_it_is_read_are_the_messages() -> None:
    seen = []

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        seen.append((at.clients.tolist(), at.round.tolist(), phase))
        return {name: x.bfloat16() for name, x in select(adapters, phase.send).items()}, {}

    def read(like: Tensors, heard: Tensors, round: int) -> Tensors:
        return {name: x.to(like[name].dtype) for name, x in heard.items()}

    job = made(algorithm=Algorithm(both(), mean, message=Message(send, read)), clients=[3, 4, 0, 1, 2])
    sent = job.sent(frozenset("A"))
    assert seen == [([3], [0], Phase(frozenset("A"), frozenset("A")))]
    assert sent.keys() == {"layer.A"}
    assert torch.equal(sent["layer.A"], job.state.adapters["layer.A"][:1].bfloat16())
    assert job.read(sent, 0)["layer.A"].dtype == torch.float64


def test_neighbouring_clients_train_where_the_stack_lies() -> None:
    seen = []

    def gradients(gradient: Gradient, adapters: Tensors, *_: Any) -> tuple[Tensors, Memory]:
        seen.append(adapters["layer.A"].data_ptr())
        return gradient(adapters), {}

    job = made(algorithm=Algorithm(both(), mean, Local(gradients)), clients_per_pass=2, rounds=1)
    state = job.state.clone()
    run_round(job, state, job.clients, 0, lambda *given: hear(job)(job.clients, *given))
    assert seen == [state.adapters["layer.A"][place].data_ptr() for place in (0, 0, 2, 2, 4, 4)]


def test_a_record_says_what_was_sent_between_whom_and_evaluates_where_that_is_due() -> None:
    first, second, third = run(made(graph=path(clients=4), faults=FAULTS))
    assert [(one.train, one.send) for one in (first, second, third)] == [
        ([k, "head"], ["A", "B", "head"]) for k in "BAB"
    ]
    assert (first.edges, second.edges, third.edges) == ([(1, 2), (2, 3)], [], [(0, 1), (1, 2), (2, 3)])
    assert (first.failed_edges, third.failed_edges) == ([(0, 1)], [])
    assert second.failed_edges == [(0, 1), (1, 2), (2, 3)]
    assert (first.clients, second.clients) == ([0, 1, 2, 3], [0, 1, 3])
    assert (first.neighbours, second.neighbours, third.neighbours) == ([0, 1, 2, 1], [0, 0, 0], [1, 2, 2, 1])
    size = (2 * 4 + 3 * 2) * 8
    assert third.bytes_sent == [size, 2 * size, 2 * size, size]
    assert [one.evaluation is not None for one in (first, second, third)] == [False, True, True]
    assert [one.neighbourhood_cross_term is not None for one in (first, second, third)] == [False, True, True]
    assert [("evaluate" in one.seconds) for one in (first, second, third)] == [False, True, True]
    assert third.evaluation == score(stacked(adapters(third)), range(4))
    assert second.evaluation == score(stacked(take(adapters(second), torch.tensor([0, 1, 3]))), [0, 1, 3])
    assert third.neighbourhood_cross_term is not None
    assert min(third.neighbourhood_cross_term) > 0
    assert third.diagnostics["mean_drift"] < 1e-12
    assert 0 < third.diagnostics["contraction_A"] < 1
    assert (third.not_mixed, third.vacant_edges, third.out_of_phase) == ([], [], [])


def test_rounds_that_send_nothing_have_no_edges() -> None:
    for record in run(made(algorithm=Algorithm(silent(), mean), faults=FAULTS)):
        assert record.neighbours == record.bytes_sent == [0] * len(record.clients)
        assert record.edges == record.failed_edges == []


def test_what_an_exchange_says_of_edges_and_empty_seats_is_recorded() -> None:
    job = made()

    def exchange(sent: Sequence[Stack], round: int, refuse: Refuse) -> Heard:
        tensors = only(sent)
        assert refuse(sent, torch.tensor([0]), torch.tensor([1])) == []
        weights = torch.eye(CLIENTS, dtype=torch.float64)
        return Heard(stacked(tensors), weights, range(CLIENTS), [(0, 1)], [(2, 3)])

    _, record = run_round(job, job.state.clone(), job.clients, 0, exchange)
    assert (record.failed_edges, record.vacant_edges) == ([(0, 1)], [(2, 3)])


def from_others(heard: Sequence[int], weights: Sequence[float], job: Job) -> Exchange:
    """What a peer hears: its own, and what others started with."""

    def exchange(sent: Sequence[Stack], round: int, refuse: Refuse) -> Heard:
        tensors = only(sent)
        came = {name: made().state.adapters[name][list(heard)] for name in tensors}
        for name, x in tensors.items():
            came[name][heard.index(job.clients[0])] = x[0]
        return Heard(stacked(came), torch.tensor([weights], dtype=torch.float64), heard, [])

    return exchange


def peer(client: int, **changes: Any) -> Job:
    return replace(made(**changes), clients=[client], state=made().state.take(slice(client, client + 1)))


def test_a_peer_takes_what_it_hears_and_diagnoses_no_disagreement() -> None:
    job = peer(3)
    state, record = run_round(job, job.state.clone(), [3], 0, from_others([1, 3, 4], [0.25, 0.5, 0.25], job))
    assert (record.clients, record.edges, record.neighbours) == ([3], [(1, 3), (3, 4)], [2])
    assert record.diagnostics == {}
    start = made().state.adapters["layer.A"]
    torch.testing.assert_close(state.adapters["layer.A"][0], start[1] / 4 + start[3] / 2 + start[4] / 4)
    assert made().alone is False
    assert peer(3).alone is True
    assert replace(made(graph=complete(clients=1)), clients=[0]).alone is False, "there are no others"


def test_a_loss_above_the_most_counts_as_diverged_before_anything_is_sent() -> None:
    job = made(most_loss=0.01)

    def exchange(*_: object) -> Heard:
        raise AssertionError("something was sent")

    (first, *_) = run(made())
    with pytest.raises(DivergedError, match=f"^training: the loss is {max(first.loss):.3g} in round 0$"):
        run_round(job, job.state.clone(), job.clients, 0, exchange)
    with pytest.raises(AssertionError, match="something was sent"):
        run_round(replace(job, most_loss=max(first.loss)), job.state.clone(), job.clients, 0, exchange)


BOUND = Bound({"layer": (1.0, 2.0)})


def alike(**changes: Any) -> Job:
    """Clients that have almost the same adapters."""
    job = made(**changes)
    adapters = {name: x[:1] + 0.01 * x for name, x in job.state.adapters.items()}
    return replace(job, state=replace(job.state, adapters=adapters))


def lying(job: Job, liar: int, times: float) -> Any:
    """What everybody hears, where one client sends so many times what it has."""

    def exchange(clients: Sequence[int], sent: Sequence[Stack], round: int, refuse: Refuse) -> Heard:
        tensors = only(sent)
        told = {name: x.clone() for name, x in tensors.items()}
        told["layer.A"][list(clients).index(liar)] *= times
        return exchanged(job, clients, clients, stacked(told), round, refuse)

    return exchange


@pytest.mark.parametrize("dense_up_to", [DENSE_UP_TO, 1])
def test_what_counts_and_is_too_far_from_the_others_is_left_out_at_the_receivers_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dense_up_to: int
) -> None:
    monkeypatch.setattr("peertune.methods.shares.DENSE_UP_TO", dense_up_to)
    liar, faults = 3, [Fault(0, 0, down=1)]
    judged: list[list[int]] = []

    def ensembles(own: Tensors, came: Heard, clients: Sequence[int]) -> list[list[float]]:
        assert torch.equal(own["layer.A"][0], came.tensors["layer.A"][0]), "before mixing"
        judged.extend(torch.tensor(came.clients)[row != 0].tolist() for row in came.weights.to_dense())
        return [[0.5] * len(clients)]

    job = alike(graph=complete(clients=6), bound=BOUND, rounds=1, faults=faults, ensembles=ensembles)
    (record,) = run_rounds(job, lying(job, liar, 2 * NEAR))
    assert judged == [[0, 2, 3, 4, 5] if client == liar else [0, 2, 4, 5] for client in (0, 2, 3, 4, 5)]
    assert record.evaluation is not None
    assert record.evaluation.heard_ensemble == [0.5] * 5
    assert record.not_mixed == [(client, liar) for client in (0, 2, 4, 5)]
    assert (3, 4) in record.edges
    assert record.neighbours == [4] * 5
    (trained,) = run(replace(job, bound=None, algorithm=job.algorithm._replace(mixer=untouched)))
    for name, x in adapters(trained).items():
        for client in (0, 2, 4, 5):
            others = sum(x[other] for other in (0, 2, 4, 5) if other != client)
            expected = (others + 3 * x[client]) / 6  # of six, with one that is down and one that is left out
            torch.testing.assert_close(adapters(record)[name][client], expected, rtol=0, atol=1e-12)
        assert torch.equal(adapters(record)[name][1], x[1])
    assert caplog.messages[0].startswith("client 3: round 0: what it sent client 0 isn't mixed: layer.A is ")
    assert caplog.messages[0].endswith("; the edge counts, and this end mixes nothing of it")


def test_what_is_refused_fails_at_both_ends_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    job = alike(graph=complete(clients=4), bound=BOUND, rounds=1)
    (record,) = run_rounds(job, lying(job, 2, 1e6))
    assert record.failed_edges == [(0, 2), (1, 2), (2, 3)]
    assert record.edges == [(0, 1), (0, 3), (1, 3)]
    assert record.not_mixed == []
    assert caplog.messages[0].startswith("client 2: round 0: what it sent client 0 isn't mixed: layer: B_")
    assert caplog.messages[0].endswith("; the edge is dropped")


def sending(job: Job, told: Mapping[int, Callable[[Tensors], object]]) -> Any:
    """What everybody hears, where these clients change what they send, in place."""

    def exchange(clients: Sequence[int], sent: Sequence[Stack], round: int, refuse: Refuse) -> Heard:
        (stack,) = sent
        tensors = {name: x.clone() for name, x in stack.tensors.items()}
        for client, lie in told.items():
            lie(take(tensors, slice(client, client + 1)))
        return exchanged(job, clients, clients, [Stack(stack.rows, tensors)], round, refuse)

    return exchange


@pytest.mark.parametrize("dense_up_to", [DENSE_UP_TO, 1])
@pytest.mark.parametrize("method", ["dec_lora", "decaf", "lora_fair"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_no_number_costs_its_sender_its_edges_and_nobody_else_anything(
    monkeypatch: pytest.MonkeyPatch, method: str, number: float, dense_up_to: int
) -> None:
    monkeypatch.setattr("peertune.methods.shares.DENSE_UP_TO", dense_up_to)
    job = alike(graph=complete(clients=5), bound=BOUND, rounds=1, algorithm=ALGORITHMS[method]())
    (record,) = run_rounds(job, sending(job, {2: lambda x: x["layer.A"].fill_(number)}))
    assert record.failed_edges == [(0, 2), (1, 2), (2, 3), (2, 4)]
    without = [Fault(0, 0, edge=edge) for edge in record.failed_edges]  # as if it had not been there
    (expected,) = run(replace(job, faults=without))
    for name, x in adapters(record).items():
        for client in (0, 1, 3, 4):
            torch.testing.assert_close(x[client], adapters(expected)[name][client], rtol=0, atol=1e-12)


def test_of_two_that_pass_by_themselves_nothing_is_mixed_where_their_mix_would_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = alike(graph=complete(clients=3), bound=BOUND, rounds=1)
    small = {name: 0.01 * x for name, x in job.state.adapters.items()}
    optim = replace(job.optim, rates=lambda step: every_kind(1e-3))
    job = replace(job, state=replace(job.state, adapters=small), optim=optim)
    job = replace(job, algorithm=job.algorithm._replace(schedule=both()))

    def alone(kind: str) -> Callable[[Tensors], object]:
        """One entry of this factor, 29 times its floor, and nothing of the other."""

        def lie(x: Tensors) -> None:
            floors = {"A": (2 / 3) ** 0.5, "B": 3**0.5 / 2}
            for of, least in floors.items():
                x[f"layer.{of}"].zero_()[0, 0, 0] = 29 * least * (of == kind)

        return lie

    (record,) = run_rounds(job, sending(job, {1: alone("A"), 2: alone("B")}))
    (trained,) = run(replace(job, algorithm=job.algorithm._replace(mixer=untouched)))
    assert record.failed_edges == []
    assert (0, 1) not in record.not_mixed
    assert (0, 2) not in record.not_mixed
    for name, x in adapters(record).items():
        assert torch.equal(x[0], adapters(trained)[name][0])
    mine = [line for line in caplog.messages if line.startswith("client 0: ")]
    assert mine[0].startswith(
        "client 0: round 0: what mixing came to isn't taken, of those whom it heard together: layer"
    )
    assert mine[0].endswith("; it keeps what it had of this site")


def test_a_mixer_that_makes_too_much_of_what_it_hears_changes_nothing() -> None:
    def boundless(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        return {name: x * torch.tensor([1.0, 1e3, torch.nan])[:, None, None] for name, x in own.items()}, {}

    job = alike(graph=complete(clients=3), bound=BOUND, rounds=1)
    job = replace(job, algorithm=Algorithm(both(), Mixer(boundless)))
    (record,) = run(job)
    (trained,) = run(replace(job, algorithm=job.algorithm._replace(mixer=untouched)))
    for name, x in adapters(record).items():
        assert torch.equal(x, adapters(trained)[name])
    (spoilt,) = run(replace(job, bound=None))
    assert float(adapters(spoilt)["layer.A"][1].norm()) > 100


def test_without_a_bound_everything_is_mixed() -> None:
    job = made(rounds=1)
    (record,) = run_rounds(job, lying(job, 3, 1e9))
    assert (record.failed_edges, record.not_mixed) == ([], [])
    assert float(adapters(record)["layer.A"].abs().max()) > 1e8


class Halves(Group):
    """The second of two processes, which is told what the first gives."""

    rank = 1
    size = 2

    def __init__(self, other: object) -> None:
        self.other = other

    def gather(self, value: object) -> list[object]:
        return [self.other, value]


def refusing(*pairs: tuple[int, int]) -> Refuse:
    """Refuse these pairs of places, and hold whom it is asked about."""

    def refuse(heard: Sequence[Stack], receivers: Tensor, senders: Tensor) -> list[Refusal]:
        asked = list(zip(receivers.tolist(), senders.tolist(), strict=True))
        assert set(pairs) <= set(asked)
        return [Refusal(*pair, "of something") for pair in pairs]

    return refuse


@pytest.mark.parametrize("among", [[1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
def test_a_process_takes_its_rows_of_the_mixing_matrix_without_the_edges_that_any_process_refuses(
    caplog: pytest.LogCaptureFixture, among: list[int]
) -> None:
    faults = [Fault(0, 9, edge=(4, 5)), Fault(0, 9, edge=(2, 3)), Fault(0, 0, edge=(0, 5))]
    job = replace(made(graph=ring(clients=6), faults=faults, group=Halves([[1, 2], [0, 1]])), clients=[2, 3])
    tensors = {"layer.A": torch.zeros(len(among), 2, 4, dtype=torch.float64)}
    heard = exchanged(job, [2, 3], among, stacked(tensors), 0, refusing((1, among.index(4))))
    expected = torch.zeros(6, 6, dtype=torch.float64)
    expected[2, 2] = expected[3, 3] = 1
    torch.testing.assert_close(heard.weights, expected[[2, 3]][:, among])
    assert heard.failed == [(1, 2), (2, 3), (3, 4)]
    assert heard.clients == among
    assert heard.tensors is tensors
    assert caplog.messages == [
        "client 4: round 0: what it sent client 3 isn't mixed: of something; the edge is dropped"
    ]


def test_each_receiver_is_asked_about_the_others_that_it_hears_and_nobody_where_nothing_is_sent() -> None:
    asked = []

    def refuse(heard: Sequence[Stack], receivers: Tensor, senders: Tensor) -> list[Refusal]:
        asked.append(list(zip(receivers.tolist(), senders.tolist(), strict=True)))
        return []

    job = made(graph=path(clients=4))
    exchanged(job, [1, 3], [0, 1, 2, 3], stacked({"layer.A": torch.zeros(4, 1)}), 0, refuse)
    assert [sorted(pairs) for pairs in asked] == [[(0, 0), (0, 2), (1, 2)]]
    assert exchanged(job, range(4), range(4), stacked({}), 0, refuse).failed == []
    assert len(asked) == 1


def test_of_one_process_all_edges_that_fail_are_its_own() -> None:
    heard = exchanged(made(faults=FAULTS), [3, 4], range(CLIENTS), stacked({}), 0, refusing())
    assert heard.failed == [(0, 1)]


def test_weights_are_dense_where_few_are_heard_and_sparse_elsewhere() -> None:
    for clients, sparse in ((DENSE_UP_TO, False), (DENSE_UP_TO + 1, True)):
        matrix = weights_at(ring(clients=clients), 0)[[3, 5]]
        weights = as_weights(matrix, torch.device("cpu"))
        assert weights.is_sparse == sparse
        assert weights.dtype == torch.float64
        assert (weights.to_dense().numpy() == matrix.toarray()).all()
        assert not sparse or weights.is_coalesced()


def agreeing(trained: Sequence[str]) -> Algorithm:
    """Each client trains a factor of its own; memory counts the rounds, and who was heard."""

    def init(adapters: Tensors, at: At) -> Memory:
        return {"me.id": at.clients.double(), "me.sum": torch.zeros(len(at.clients), dtype=torch.float64)}

    def phases(memory: Memory, at: At) -> list[Phase]:
        return [Phase(frozenset(trained[int(k)]), frozenset("AB")) for k in memory["me.id"].tolist()]

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        return select(adapters, phase.send) | {name: memory[name] for name in ("me.id", "me.sum")}, {}

    def weigh(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensor, Memory]:
        return weights, {"me.sum": memory["me.sum"] + (1 + at.round) * (weights.to_dense() @ heard["me.id"])}

    return Algorithm(Schedule(phases, init), untouched._replace(weigh=weigh), message=Message(send))


def told(algorithm: Algorithm, **changes: Any) -> Job:
    job = made(algorithm=algorithm, **changes)
    memory = algorithm.init(job.state.adapters, at_step(CLIENTS))
    return replace(job, state=replace(job.state, memory=memory))


@pytest.mark.parametrize("per_pass", [1, 2, 99])
def test_clients_train_what_they_agreed_on_by_memory_that_travels_in_every_round(per_pass: int) -> None:
    trained = ["B", "A", "B", "A", "B"]
    job = told(agreeing(trained), clients_per_pass=per_pass)
    for t, record in enumerate(run(job)):
        assert (record.train, record.send, record.out_of_phase) == (["B"], ["A", "B"], [1, 3])
        assert record.bytes_sent == [2 * ((2 * 4 + 3 * 2) * 8 + 2 * 8)] * CLIENTS
        assert record.state is not None
        heard = weights_at(job.graph, 0) @ np.arange(5)
        assert record.state.memory["me.sum"].tolist() == pytest.approx(heard * sum(range(1, t + 2)))
    for of in "AB":
        alone = Algorithm(by_round(lambda t, of=of: Phase(frozenset(of), frozenset())), mean)  # type: ignore[misc]
        *_, (expected, _, _) = written_out(replace(job, algorithm=alone))
        for client in (k for k in range(CLIENTS) if trained[k] == of):
            for name, x in adapters(record).items():
                torch.testing.assert_close(x[client], expected[name][client], rtol=0, atol=1e-12)


def test_a_message_is_settled_by_the_edges_that_counted_and_what_failed_is_sent_again() -> None:
    """Memory by edge: what a client still owes each neighbour, of a ring's two, as error feedback would."""
    near = torch.tensor([[(k - 1) % CLIENTS, (k + 1) % CLIENTS] for k in range(CLIENTS)])

    def init(adapters: Tensors, at: At) -> Memory:
        return {"me.near": near[at.clients], "me.owed": torch.zeros(len(at.clients), 2)}

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        return select(adapters, phase.send), {"me.owed": memory["me.owed"] + 1}

    def settle(memory: Memory, heard: Tensors, weights: Tensor, at: At, phase: Phase) -> Memory:
        assert at.heard is not None
        places = torch.searchsorted(at.heard, memory["me.near"]).clamp(max=len(at.heard) - 1)
        there = at.heard[places] == memory["me.near"]  # who is down was not heard at all
        counted = there & (weights.to_dense().gather(1, places) != 0)
        return {"me.owed": memory["me.owed"].masked_fill(counted, 0)}

    algorithm = Algorithm(both(), mean, message=Message(send, settle=settle, init=init))
    owed = [record.state.memory["me.owed"].tolist() for record in run(told(algorithm, faults=FAULTS)) if record.state]
    expected = torch.zeros(CLIENTS, 2)
    for t, found in enumerate(owed):
        down = {fault.down for fault in FAULTS if fault.at(t)}
        cut = [set(fault.edge) for fault in FAULTS if fault.at(t) and fault.edge]
        for k in {*range(CLIENTS)} - down:
            for place, other in enumerate(near[k].tolist()):
                failed = other in down or {k, other} in cut
                expected[k, place] = expected[k, place] + 1 if failed else 0
        assert found == expected.tolist(), t
    assert sum(map(sum, owed[1])) > 0, "an edge failed"


def test_weights_may_differ_by_site_and_depend_on_whole_adapters() -> None:
    mine = {f"{site}.A": made().state.adapters["layer.A"].clone() for site in ("layer", "other")}
    alone = torch.eye(CLIENTS, dtype=torch.float64)

    def weigh(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[dict[str, Tensor], Memory]:
        assert own.keys() == heard.keys() == mine.keys()
        return {"layer": weights, "other": torch.full_like(weights, 1 / CLIENTS)}, {}

    algorithm = Algorithm(both(), mean._replace(weigh=weigh))
    after = played(algorithm, begun(algorithm, mine), alone).adapters
    torch.testing.assert_close(after["layer.A"], mine["layer.A"])
    torch.testing.assert_close(after["other.A"], mine["other.A"].mean(0, keepdim=True).expand(CLIENTS, -1, -1))


def trained(job: Job, state: State, at: At) -> Tensor:
    schedule = job.algorithm.schedule
    phases, before = (schedule.phases({}, at._replace(round=at.round - back)) for back in (0, 1))
    local, per_pass = job.algorithm.local, job.clients_per_pass
    (came,) = train_turns([Turn(job.model, job.optim, local, job.steps, state, at, phases, before, per_pass)])
    assert isinstance(came, Came)
    return came.loss


def test_clients_in_rounds_of_their_own_train_by_these() -> None:
    """Two clients in round 2 and three in round 0 do what they do in those rounds."""
    job = made(algorithm=Algorithm(alternating(1, "both"), untouched))
    rounds = torch.tensor([2, 0, 0, 2, 0])
    state = replace(job.state.clone(), rounds=rounds.clone())
    at = standing(range(CLIENTS), rounds, job.local_steps)
    loss = trained(job, state, at)
    for t in (0, 2):
        alike = job.state.clone().at(t)
        here = standing(range(CLIENTS), alike.rounds, job.local_steps)
        expected = trained(job, alike, here)
        for client in (rounds == t).nonzero()[:, 0].tolist():
            assert loss[client] == expected[client]
            for name, x in state.adapters.items():
                torch.testing.assert_close(x[client], alike.adapters[name][client], rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_pass", [1, 2, 99])
def test_what_local_steps_remember_is_each_clients_own_however_they_are_passed_through(per_pass: int) -> None:
    zeros = torch.zeros(CLIENTS, dtype=torch.float64)

    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        return gradient(adapters), {"its.sum": memory["its.sum"] + at.clients + 10 * at.step}

    local = Local(gradients, init=lambda adapters, at: {"its.sum": zeros[at.clients]})
    method = agreeing(["B", "A", "B", "A", "B"])._replace(local=local)
    for record in run(told(method, clients_per_pass=per_pass)):
        steps = range(2 * record.round + 2)
        assert record.state is not None
        assert record.state.memory["its.sum"].tolist() == [sum(k + 10 * s for s in steps) for k in range(CLIENTS)]
    assert not zeros.any(), "what a method made is not written to"


def test_the_phase_of_a_round_is_that_of_most_clients_of_all_processes() -> None:
    class Told(Halves):
        def add(self, x: Tensor) -> Tensor:
            return x

    for more, train in ((0, "B"), (1, "A"), (2, "A")):
        job = told(agreeing(["B", "A", "B", "A", "B"]), rounds=1, group=Told([[["A"], ["A", "B"], more]]))
        (record,) = run_rounds(job, lambda _, sent, *__: everything(sent))
        assert record.train == [train]
        assert record.out_of_phase == ([1, 3] if train == "B" else [0, 2, 4])


def everything(sent: Sequence[Stack]) -> Heard:
    return Heard(sent, torch.eye(CLIENTS, dtype=torch.float64), range(CLIENTS), [])


def test_the_seconds_of_a_round_are_told_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: Counter[str] = Counter()
    monkeypatch.setattr(time, "perf_counter", lambda: float(sum(spent.values())))

    class Slow(Group):
        def add(self, x: Tensor) -> Tensor:
            spent["metrics"] += 1000
            return x

    def mix(*args: Any) -> tuple[Tensors, Memory]:
        spent["mix"] += 100
        return averaged(*args)

    def evaluate(state: Sequence[Stack], clients: Sequence[int]) -> Evaluation:
        spent["evaluate"] += 10_000
        return score(state, clients)

    def slow_steps(
        clients: Sequence[int], rounds: Sequence[int], first: int = 0, salts: Any = ()
    ) -> Iterator[list[Batch]]:
        spent["train"] += 1
        return steps(clients, rounds, first)

    def exchange(clients: Sequence[int], sent: Sequence[Stack], round: int, refuse: Refuse) -> Heard:
        spent["exchange"] += 10
        return everything(sent)

    job = made(
        algorithm=Algorithm(both(), Mixer(mix)),
        steps=slow_steps,
        evaluate=evaluate,
        group=Slow(),
        rounds=1,
        bound=BOUND,
    )
    (record,) = run_rounds(job, exchange)
    assert record.seconds == dict(spent)
