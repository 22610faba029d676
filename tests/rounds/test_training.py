import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
import transformers
from playing import at_step, every_kind, starting
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from peertune.adapters.stacked import attach, init_adapters
from peertune.assembly.build import build, build_optim
from peertune.assembly.encoding import row_weights
from peertune.assembly.registry import build_parts
from peertune.data.tasks import TASKS
from peertune.errors import DivergedError, ModelError, RecipeError
from peertune.method import At, Local, Memory, Phase
from peertune.methods.locals import turned_back
from peertune.recipe import load_recipe
from peertune.rounds.training import (
    BatchGradient,
    Optim,
    Optimizer,
    Rates,
    Trained,
    adamw,
    clip,
    evaluate,
    hits,
    learning_rate,
    predictions,
    probabilities,
    reset_moments,
    row_losses,
    sgd,
    train_local,
)
from peertune.types import Batch, State, Tensors, kind, select, take

CLIENTS = 3
SHAPES = {"q.A": (2, 5), "q.B": (4, 2), "v.A": (2, 5), "v.B": (4, 2), "out.weight.head": (3, 4), "out.bias.head": (3,)}
PHASES = [frozenset({"B", "head"}), frozenset({"A", "head"}), frozenset({"A", "B"})]


def tensors(generator: torch.Generator, clients: int = CLIENTS) -> Tensors:
    shapes = SHAPES.items()
    return {name: torch.randn(clients, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes}


def each_alone(kind_of: Any, start: Tensors, steps: list[tuple[Tensors, float]], **settings: Any) -> list[Tensors]:
    """Step every client's parameters by a PyTorch optimiser of its own."""
    results = []
    for client in range(len(start["q.A"])):
        params = {name: x[client].clone().requires_grad_() for name, x in start.items()}
        optimizer = kind_of(params.values(), lr=1.0, foreach=False, **settings)
        for grads, rate in steps:
            for name, x in params.items():
                x.grad = grads[name][client].clone() if name in grads else None
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        results.append({name: x.detach() for name, x in params.items()})
    return results


def walk(seed: int, count: int) -> list[tuple[Tensors, float]]:
    """Gradients of alternating phases, and a learning rate for each step."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            {name: x for name, x in tensors(generator).items() if kind(name) in PHASES[step // 3 % 3]},
            0.05 / (1 + step),
        )
        for step in range(count)
    ]


def own_memory(tensors: Tensors) -> Tensors:
    """The same values, no two clients' in one place."""
    return starting(tensors, {}).clone().adapters


def together(optimizer: Optimizer, start: Tensors, steps: list[tuple[Tensors, float]]) -> tuple[Tensors, Tensors]:
    params = {name: x.clone() for name, x in start.items()}
    moments = own_memory(optimizer.init(params))
    for grads, rate in steps:
        optimizer.update(params, grads, moments, every_kind(rate))
    return params, moments


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_over_a_stack_is_adamw_for_each_client(decay: float) -> None:
    start, steps = tensors(torch.Generator().manual_seed(0)), walk(1, 40)
    stepped, moments = together(adamw(0.8, 0.95, 1e-6, decay), start, steps)
    alone = each_alone(torch.optim.AdamW, start, steps, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    for client, expected in enumerate(alone):
        for name, x in expected.items():
            torch.testing.assert_close(stepped[name][client], x, rtol=0, atol=1e-12)
    assert {name: moments[f"steps.{name}"].tolist() for name in ("A", "B", "head")} == {
        "A": [25] * CLIENTS,
        "B": [27] * CLIENTS,
        "head": [28] * CLIENTS,
    }


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1), (0.0, 0.1)])
def test_sgd_over_a_stack_is_sgd_for_each_client(momentum: float, decay: float) -> None:
    start, steps = tensors(torch.Generator().manual_seed(0)), walk(1, 40)
    stepped, _ = together(sgd(momentum, decay), start, steps)
    alone = each_alone(torch.optim.SGD, start, steps, momentum=momentum, weight_decay=decay)
    for client, expected in enumerate(alone):
        for name, x in expected.items():
            torch.testing.assert_close(stepped[name][client], x, rtol=0, atol=1e-12)


def test_by_default_sgd_steps_down_the_gradient_and_remembers_nothing() -> None:
    start, ((grads, rate), *_) = tensors(torch.Generator().manual_seed(0)), walk(1, 1)
    stepped, moments = together(sgd(), start, [(grads, rate)])
    assert moments == {}
    for name, grad in grads.items():
        torch.testing.assert_close(stepped[name], start[name] - rate * grad, rtol=0, atol=1e-15)


def test_clients_of_different_step_counts_share_a_stack() -> None:
    optimizer, start = adamw(), tensors(torch.Generator().manual_seed(0), clients=2)
    first, both = walk(1, 7), walk(2, 5)
    old, old_moments = together(optimizer, take(start, slice(0, 1)), [(take(g, slice(0, 1)), lr) for g, lr in first])
    new = take(start, slice(1, 2))
    new_moments = optimizer.init(new)
    params = {name: torch.cat([x, new[name]]) for name, x in old.items()}
    moments = {name: torch.cat([x, new_moments[name]]) for name, x in old_moments.items()}
    for grads, rate in both:
        optimizer.update(params, take(grads, slice(0, 2)), moments, every_kind(rate))
    for client, steps in enumerate(([*first, *both], both)):
        own = [(take(g, slice(client, client + 1)), lr) for g, lr in steps]
        (expected,) = each_alone(torch.optim.AdamW, take(start, slice(client, client + 1)), own, weight_decay=0.0)
        for name, x in expected.items():
            torch.testing.assert_close(params[name][client], x, rtol=0, atol=1e-12)
    assert moments["steps.B"].tolist() == [7, 3]


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 100.0])
def test_clipping_is_pytorchs_for_each_client(max_norm: float) -> None:
    grads = tensors(torch.Generator().manual_seed(0))
    grads["q.A"][1] *= 50
    grads["q.B"][2] = 0
    expected = [[x[client].clone() for x in grads.values()] for client in range(CLIENTS)]
    before = [[x.clone() for x in own] for own in expected]
    for own in expected:
        params = [nn.Parameter(torch.zeros_like(x)) for x in own]
        for param, x in zip(params, own, strict=True):
            param.grad = x
        nn.utils.clip_grad_norm_(params, max_norm, foreach=False)
    norms = [sum(float(x.square().sum()) for x in own) ** 0.5 for own in before]
    torch.testing.assert_close(clip(grads, max_norm), torch.tensor(norms, dtype=torch.float64), rtol=0, atol=1e-12)
    for client, own in enumerate(expected):
        for x, y in zip(grads.values(), own, strict=True):
            torch.testing.assert_close(x[client], y, rtol=0, atol=1e-14)


def test_a_norm_of_zero_leaves_gradients_as_they_are() -> None:
    grads = tensors(torch.Generator().manual_seed(0))
    before = {name: x.clone() for name, x in grads.items()}
    clip(grads, 0.0)
    assert all(torch.equal(grads[name], x) for name, x in before.items())


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "cosine_with_min_lr"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 12), (5, 12), (11, 12), (12, 12), (0, 1)])
def test_learning_rates_are_those_of_transformers(
    shape: Literal["constant", "linear", "cosine", "cosine_with_min_lr"], warmup: int, steps: int
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if shape == "constant" else shape
    least = 0.06 if shape == "cosine_with_min_lr" else 0.0
    kwargs = {"min_lr_rate": 0.2} if least else None
    schedule = cast("Any", transformers.get_scheduler)(name, optimizer, warmup, steps, kwargs)
    rate = learning_rate(shape, 0.3, warmup, steps, least)
    for step in range(steps):
        assert rate(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        schedule.step()
    ends_at = 0.3 if shape == "constant" else least
    assert [rate(step) for step in (steps + (warmup == steps), steps + 5)] == pytest.approx([ends_at] * 2, abs=1e-15)


@pytest.mark.parametrize(
    ("reset", "cleared"),
    [("never", [False] * 5), ("round", [True] * 5), ("phase", [False, False, True, True, False])],
)
def test_moments_start_afresh_as_the_setting_says_by_what_is_trained_whatever_is_sent(
    reset: Literal["never", "round", "phase"], cleared: list[bool]
) -> None:
    a, b, both = (frozenset(x) for x in ("A", "B", "AB"))
    changes = [
        (Phase(b, b), None),
        (Phase(b, b), Phase(b, b)),
        (Phase(a, a), Phase(b, b)),
        (Phase(a, both), Phase(b, both)),
        (Phase(b, both), Phase(b, b)),
    ]
    for (phase, before), clear in zip(changes, cleared, strict=True):
        moments = {"q.A.m": torch.ones(2, 3), "steps.A": torch.tensor([3, 4])}
        expected = {name: x * (not clear) for name, x in moments.items()}
        places = {name: x.data_ptr() for name, x in moments.items()}
        reset_moments(moments, reset, phase, before)
        assert all(torch.equal(x, expected[name]) and x.dtype == expected[name].dtype for name, x in moments.items())
        assert {name: x.data_ptr() for name, x in moments.items()} == places


def rows_of(labels: Tensor) -> Batch:
    zeros = torch.zeros(len(labels), dtype=torch.int64)
    return Batch({}, labels, zeros, zeros.double(), zeros)


def test_a_rows_loss_is_cross_entropy_over_classes() -> None:
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = torch.stack([-row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)])
    torch.testing.assert_close(row_losses(logits, rows_of(labels)), expected, rtol=0, atol=1e-14)


def test_smoothed_labels_are_those_of_the_trainer_and_of_training_alone() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = LabelSmoother(epsilon=0.3)({"logits": logits}, labels)
    torch.testing.assert_close(row_losses(logits, rows_of(labels), 0.3).mean(), expected)

    losses = []
    for smoothing in (0.0, 0.3):
        optim = Optim(sgd(), lambda step: every_kind(0.1), 0.0, "never", smoothing)
        model, state = start_of(Linear(), optim.optimizer)
        both = Phase(frozenset("AB"), frozenset("AB"))
        ((batch,),) = batches(1)
        found = row_losses(model(state.adapters, batch, training=True), batch, smoothing).view(CLIENTS, 4).mean(1)
        losses.append(train_local(model, state, batches(1), both, optim, at_step(state.clients)).loss)
        torch.testing.assert_close(losses[-1], found.detach())
    assert not torch.allclose(losses[0], losses[1])


def test_a_rows_loss_is_the_squared_error_where_labels_are_no_classes() -> None:
    logits, labels = torch.tensor([[1.0], [2.0]]), torch.tensor([0.5, 4.0])
    assert row_losses(logits, rows_of(labels)).tolist() == [0.25, 4.0]


def test_losses_of_a_half_precision_base_are_computed_in_float32() -> None:
    logits = torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16)
    assert row_losses(logits, rows_of(torch.tensor([0]))).dtype == torch.float32
    assert row_losses(logits[:, :1], rows_of(torch.tensor([0.5]))).dtype == torch.float32


def test_a_language_models_row_counts_the_loss_and_the_hits_of_all_its_labels() -> None:
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1, 0, 2, 1])
    batch = replace(
        rows_of(torch.zeros(3)),
        inputs={"input_ids": torch.zeros(3, 4, dtype=torch.int64)},
        labels=labels,
        places=torch.tensor([0, 2, 5, 11]),  # two labels in the first row, one in each of the others
    )
    each = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(row_losses(logits, batch), torch.stack([each[0] + each[1], each[2], each[3]]))
    right = (logits.argmax(-1) == labels).double()
    assert hits(logits, batch).tolist() == [float(right[0] + right[1]), float(right[2]), float(right[3])]
    assert hits(nn.functional.one_hot(labels, 3).double(), batch).tolist() == [2, 1, 1]


def test_a_prediction_is_the_likeliest_class_or_the_value() -> None:
    logits = torch.tensor([[0.5, 2.0, 1.0], [3.0, -1.0, 0.0]])
    assert predictions(logits, rows_of(torch.tensor([0, 0]))).tolist() == [1, 0]
    values = predictions(logits[:, :1], rows_of(torch.tensor([0.0, 0.0])))
    assert (values.dtype, values.tolist()) == (torch.float64, [0.5, 3.0])


def test_probabilities_are_of_each_rows_classes_in_float64() -> None:
    found = probabilities(torch.tensor([[0.0, np.log(3.0)], [2.0, 2.0]]), rows_of(torch.tensor([0, 0])))
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64))


class Linear(nn.Module):
    """A base of one linear layer, whose dropout draws from PyTorch's global generator where `draws` says so."""

    def __init__(self, draws: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(5, 3, dtype=torch.float64)
        self.draws = draws

    def forward(self, x: Tensor) -> Any:
        if self.draws:
            x = nn.functional.dropout(x, 0.1, self.training)
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.layer(x))


def batches(steps: int, scale: float = 1.0) -> Iterator[list[Batch]]:
    generator = np.random.default_rng(0)
    for _ in range(steps):
        clients = torch.arange(CLIENTS).repeat_interleave(4)
        x = scale * torch.from_numpy(generator.normal(size=(4 * CLIENTS, 5)))
        labels = torch.from_numpy(generator.integers(0, 3, 4 * CLIENTS))
        yield [Batch({"x": x}, labels, clients, torch.full((4 * CLIENTS,), 0.25), torch.arange(4 * CLIENTS))]


def start_of(base: nn.Module, optimizer: Optimizer) -> tuple[Any, State]:
    model = attach(base, ["layer"], r=2, lora_alpha=2, base_dropout=True)
    adapters = init_adapters(model, CLIENTS, 0)
    return model, starting(adapters, optimizer.init(adapters)).clone()


@pytest.mark.parametrize("trained", ["A", "B"])
def test_training_steps_the_state_where_it_lies_and_no_kind_that_does_not_train(trained: str) -> None:
    optim = Optim(adamw(weight_decay=0.1), lambda step: every_kind(0.1), 1.0, "never")
    model, state = start_of(Linear(), optim.optimizer)
    state.adapters["layer.B"].fill_(0.1)
    everything = state.adapters | state.moments
    before, places = starting(everything, {}).clone().adapters, {name: x.data_ptr() for name, x in everything.items()}
    phase = Phase(frozenset({trained}), frozenset({trained}))
    came = train_local(model, state, batches(3), phase, optim, at_step(state.clients))
    loss, grad_norm = came.loss, came.grad_norm
    changed = {name for name, x in everything.items() if not torch.equal(x, before[name])}
    assert changed == {f"layer.{trained}", f"layer.{trained}.m", f"layer.{trained}.v", f"steps.{trained}"}
    assert {name: x.data_ptr() for name, x in (state.adapters | state.moments).items()} == places
    assert state.moments[f"steps.{trained}"].tolist() == [3] * CLIENTS
    assert not any(x.requires_grad or x.grad is not None for x in everything.values())
    assert loss.shape == grad_norm.shape == (CLIENTS,)
    assert (grad_norm > 0).all()
    assert math.isclose(loss.mean().item(), math.log(3), rel_tol=0.5)


def written_out(x: Tensor, labels: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return the losses of a client's rows, by the layer as it is."""
    layer = Linear().layer
    return torch.nn.functional.cross_entropy(x @ (layer.weight + B @ A).T + layer.bias, labels, reduction="none")


def one_step(local: Local, optim: Optim, steps: int = 1) -> tuple[State, State, Trained, list[list[Batch]]]:
    """Return the state before and after local steps of both factors, in micro-batches, and the step's batches."""
    model, state = start_of(Linear(), optim.optimizer)
    state.adapters["layer.B"].normal_(generator=torch.Generator().manual_seed(1))
    before, made = state.clone(), list(batches(steps))
    parts = [[rows_at(batch, torch.tensor(at)) for at in ROWS] for (batch,) in made]
    phase = Phase(frozenset("AB"), frozenset("AB"))
    trained = train_local(model, state, parts, phase, optim, at_step(CLIENTS, 4), local)
    return before, state, trained, parts


def of_client(client: int, parts: list[Batch]) -> tuple[Tensor, Tensor]:
    rows = [(batch.inputs["x"][mine], batch.labels[mine]) for batch in parts for mine in [batch.clients == client]]
    x, labels = (torch.cat(each) for each in zip(*rows, strict=True))
    return x, labels


PLAIN = Optim(sgd(), lambda step: every_kind(0.1), 0.0, "never")


def test_a_gradient_may_be_taken_twice_and_the_loss_is_that_of_the_first() -> None:
    def ahead(gradient: Any, adapters: Tensors, *_: Any) -> tuple[Tensors, Memory]:
        first = gradient(adapters)
        return gradient({name: x + 0.5 * first[name] for name, x in adapters.items()}), {}

    before, after, trained, (parts,) = one_step(Local(ahead), PLAIN)
    for client in range(CLIENTS):
        x, labels = of_client(client, parts)
        factors = [before.adapters[f"layer.{of}"][client].clone().requires_grad_() for of in "AB"]
        loss = written_out(x, labels, *factors).mean()
        first = torch.autograd.grad(loss, factors)
        moved = [(f + 0.5 * g).detach().requires_grad_() for f, g in zip(factors, first, strict=True)]
        second = torch.autograd.grad(written_out(x, labels, *moved).mean(), moved)
        torch.testing.assert_close(trained.loss[client], loss.detach().double())
        for of, f, g in zip("AB", factors, second, strict=True):
            torch.testing.assert_close(after.adapters[f"layer.{of}"][client], f.detach() - 0.1 * g)


def test_each_row_s_own_gradient_is_cut_before_they_are_summed() -> None:
    most, seen = 0.3, []

    def by_row(gradient: Any, adapters: Tensors, *_: Any) -> tuple[Tensors, Memory]:
        found = gradient.clipped(adapters, most)
        seen.append({name: x.clone() for name, x in found.items()})
        return found, {}

    before, _, trained, (parts,) = one_step(Local(by_row), PLAIN)
    (sums,), cut = seen, 0
    assert trained.loss.tolist() == [0] * CLIENTS  # a loss would tell of the rows
    for client in range(CLIENTS):
        x, labels = of_client(client, parts)
        factors = [before.adapters[f"layer.{of}"][client].clone().requires_grad_() for of in "AB"]
        total = [torch.zeros_like(f) for f in factors]
        for loss in written_out(x, labels, *factors) / 4:
            own = torch.autograd.grad(loss, factors, retain_graph=True)
            norm = float(torch.sqrt(sum(g.square().sum() for g in own)))  # type: ignore[arg-type]
            cut += norm > most
            total = [t + g * min(1.0, most / norm) for t, g in zip(total, own, strict=True)]
        for of, t in zip("AB", total, strict=True):
            torch.testing.assert_close(sums[f"layer.{of}"][client], t, rtol=0, atol=1e-6)
    assert 0 < cut < 4 * CLIENTS


def test_a_row_whose_gradient_is_not_finite_counts_as_none_and_no_rows_make_zeros() -> None:
    model, state = start_of(Linear(), PLAIN.optimizer)
    state.adapters["layer.B"].normal_(generator=torch.Generator().manual_seed(1))
    (batch,) = next(iter(batches(1)))
    spoilt = replace(batch, inputs={"x": batch.inputs["x"].clone()})
    spoilt.inputs["x"][0] = torch.nan
    whole, part = (
        BatchGradient(model, [one], frozenset("AB")).clipped(state.adapters, 1.0)
        for one in (spoilt, rows_at(batch, torch.arange(1, len(batch.clients))))
    )
    for name, x in whole.items():
        torch.testing.assert_close(x, part[name])
    none = BatchGradient(model, [], frozenset("A")).clipped(state.adapters, 1.0)
    assert {name: (x.shape, bool(x.any())) for name, x in none.items()} == {
        "layer.A": (state.adapters["layer.A"].shape, False)
    }


def test_a_phase_that_trains_nothing_makes_no_step() -> None:
    optim = Optim(adamw(), lambda step: every_kind(0.1), 1.0, "never")
    model, state = start_of(Linear(), optim.optimizer)
    before = state.clone()
    phase = Phase(frozenset(), frozenset("AB"))
    came = train_local(model, state, batches(3), phase, optim, at_step(CLIENTS))
    assert came.loss.tolist() == [0] * CLIENTS
    assert all(torch.equal(x, before.adapters[name]) for name, x in state.adapters.items())
    assert all(torch.equal(x, before.moments[name]) for name, x in state.moments.items())


def test_a_local_sees_the_start_each_step_and_its_memory_and_steps_what_it_returns_gradients_of() -> None:
    seen: list[int] = []

    def in_turn(
        gradient: Any, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        seen.append(int(at.step[0]))
        assert start.keys() == {"layer.A", "layer.B"}
        assert memory.get("me.steps", torch.zeros(CLIENTS)).tolist() == [len(seen) - 1.0] * CLIENTS
        of = "A" if at.step[0] % 2 else "B"
        first = {"me.first": at.step.clone()} if len(seen) == 1 else {}
        return select(gradient(adapters), {of}), first | {"me.steps": torch.full((CLIENTS,), float(len(seen)))}

    def halfway(start: Tensors, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        assert torch.equal(start["layer.A"], adapters["layer.A"]) == (len(seen) == 1)
        return {"layer.B": (start["layer.B"] + adapters["layer.B"]) / 2}, {"me.ended": at.step.clone()}

    for steps in (1, 2):
        seen.clear()
        before, after, trained, _ = one_step(Local(in_turn, halfway, keeps_start=True), PLAIN, steps)
        _, plain, _, _ = one_step(Local(lambda g, x, *_: (select(g(x), {"B"}), {})), PLAIN, 1)
        assert seen == [4, 5][:steps]
        assert torch.equal(after.adapters["layer.A"], before.adapters["layer.A"]) == (steps == 1)
        half = (before.adapters["layer.B"] + plain.adapters["layer.B"]) / 2
        torch.testing.assert_close(after.adapters["layer.B"], half)
        assert trained.memory["me.first"].tolist() == [4] * CLIENTS
        assert trained.memory["me.steps"].tolist() == [float(steps)] * CLIENTS
        assert trained.memory["me.ended"].tolist() == [4 + steps] * CLIENTS


def test_every_adapter_is_evaluated_on_every_row_without_dropout_and_in_the_rows_places() -> None:
    base, generator = Linear(draws=True), torch.Generator().manual_seed(0)
    plain = base.layer  # which a site wraps
    model, state = start_of(base, sgd())
    singles = [
        {name: torch.randn(1, *x.shape[1:], generator=generator, dtype=x.dtype) for name, x in state.adapters.items()}
        for _ in range(2)
    ]
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    order = np.array([6, 2, 0, 5, 1, 3, 4])
    parts = [
        (replace(rows_of(torch.zeros(len(numbers), dtype=torch.int64)), inputs={"x": x[numbers]}), numbers)
        for numbers in (order[:4], order[4:])
    ]
    found = evaluate(model, singles, parts, rows=7, read=lambda logits, batch: logits.sum(-1))
    for row, single in zip(found, singles, strict=True):
        update = single["layer.B"][0] @ single["layer.A"][0]
        expected = x @ (plain.weight + update).T + plain.bias
        np.testing.assert_allclose(row, expected.sum(-1).detach().numpy(), rtol=1e-12)


def test_b_and_heads_learn_at_rates_of_their_own_that_fall_over_a_run_or_a_round() -> None:
    rate = "{learning_rate: 0.2, local_steps: 4, lr_scheduler_type: cosine, loraplus_lr_ratio: 8}"
    whole, each = (
        build_optim(
            load_recipe("digits-demo", ["rounds=3", f"training={rate}", f"training.lr_scheduler_span={span}"])
        ).rates
        for span in ("run", "round")
    )
    for step in range(12):
        for rates, share in ((whole(step), step / 12), (each(step), step % 4 / 4)):
            peak = 0.1 * (1 + math.cos(math.pi * share))
            assert rates == pytest.approx({"A": peak, "B": 8 * peak, "head": peak})


def test_a_warm_up_and_a_least_rate_are_numbers_or_shares_as_the_trainer_has_them() -> None:
    def at(step: int, *settings: str) -> float:
        recipe = load_recipe("digits-demo", ["rounds=3", "training.local_steps=7", *settings])
        return float(build_optim(recipe).rates(step)["A"])

    for share in ("training.warmup_steps=0.1", "training.warmup_ratio=0.1"):  # of 21 steps, rounded up
        assert [at(step, share, "training.learning_rate=0.3") for step in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])
    falls = ["training.lr_scheduler_type=cosine_with_min_lr", "training.learning_rate=0.5"]
    for least in ("min_lr: 0.1", "min_lr_rate: 0.2"):
        assert at(21, *falls, f"training.lr_scheduler_kwargs={{{least}}}") == pytest.approx(0.1)
    assert load_recipe("digits-demo", ["training.optim=adamw_torch"]) == load_recipe("digits-demo")


SKEWED = ["clients=3", "partition={name: dirichlet, alpha: 1}", "training.local_steps=1", "lora.lora_dropout=0"]


@pytest.mark.parametrize("weights", ["balanced", "{'5': 3.0, 7: 0.5}"])
def test_a_clients_loss_is_pytorchs_weighted_mean_with_its_own_or_given_weights_of_classes(weights: str) -> None:
    job = build(load_recipe("digits-demo", [*SKEWED, f"training.class_weight={weights}"])).job
    task, asked = TASKS["digits"](), load_recipe("digits-demo", SKEWED)
    parts = build_parts(asked).rows
    ((batch,),) = job.steps([0, 1, 2], [0] * 3)
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(len(batch.labels), 5, generator=draw, dtype=torch.float64)
    found = row_losses(logits, batch) * batch.weights
    for client, rows in parts.items():
        own = batch.clients == client
        by_class = torch.tensor([3.0, 1.0, 0.5, 1.0, 1.0], dtype=torch.float64)
        if weights == "balanced":
            labels = task.train.labels[rows]
            there = np.unique(labels)
            by_class = torch.zeros(5, dtype=torch.float64)
            by_class[there] = torch.from_numpy(compute_class_weight("balanced", classes=there, y=labels))
        expected = nn.functional.cross_entropy(logits[own], batch.labels[own], weight=by_class)
        torch.testing.assert_close(found[own].sum(), expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["training.class_weight={cat: 2}"], "training.class_weight: unknown name 'cat', choose from 5, 6, 7, 8, 9"),
        (["training.class_weight={'5': -1}"], "training.class_weight"),
        (["training.class_weight=even"], "training.class_weight"),
    ],
)
def test_class_weights_that_can_not_be_are_refused(settings: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build(load_recipe("digits-demo", settings))


@pytest.mark.parametrize("setting", ["class_weight=balanced", "label_smoothing_factor=0.1"])
def test_a_regression_has_no_classes_to_weigh_or_to_smooth(setting: str) -> None:
    values = replace(TASKS["digits"](), classes=())
    with pytest.raises(RecipeError, match=rf"^training\.{setting.partition('=')[0]}: needs classes, and this task has"):
        row_weights(load_recipe("digits-demo", [f"training.{setting}"]), values, {})


@pytest.mark.parametrize("optimizer", [adamw(weight_decay=0.1), sgd(0.5, 0.1)], ids=["adamw", "sgd"])
def test_each_kind_steps_as_an_optimizer_at_its_rate_would(optimizer: Optimizer) -> None:
    names, steps = ("x.A", "x.B", "x.head"), torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    rates = {"A": 0.1, "B": 0.3, "head": 0.05}
    together = {name: torch.ones(2, 4) for name in names}
    moments = State(together, optimizer.init(together), torch.zeros(2)).clone().moments
    for grad in steps:
        optimizer.update(together, dict.fromkeys(names, grad), moments, rates)
    for name in names:
        alone = {name: torch.ones(2, 4)}
        own = State(alone, optimizer.init(alone), torch.zeros(2)).clone().moments
        for grad in steps:
            optimizer.update(alone, {name: grad}, own, every_kind(rates[kind(name)]))
        assert torch.equal(together[name], alone[name])


def test_only_the_kinds_that_train_reach_the_optimizer() -> None:
    seen: list[set[str]] = []

    def update(params: Tensors, grads: Tensors, moments: Tensors, rates: Rates) -> None:
        seen.append({kind(name) for name in grads})

    optim = Optim(Optimizer(lambda _: {}, update), lambda step: every_kind(0.1), 1.0, "never")
    model, state = start_of(Linear(), optim.optimizer)
    for kinds in ({"A"}, {"B"}, {"A", "B"}):
        train_local(model, state, batches(2), Phase(frozenset(kinds), frozenset()), optim, at_step(state.clients))
        assert seen[-2:] == [kinds, kinds]


def test_a_chunk_is_trained_in_the_memory_of_the_whole_stack() -> None:
    optim = Optim(adamw(), lambda step: every_kind(0.1), 1.0, "never")
    model, whole = start_of(Linear(), optim.optimizer)
    phase = Phase(frozenset("AB"), frozenset("AB"))
    chunked = whole.clone()
    together = train_local(model, whole, batches(3), phase, optim, at_step(whole.clients))
    for clients in (slice(0, 1), slice(1, 3)):
        parts = [[only(clients, batch) for batch in step] for step in batches(3)]
        own = train_local(model, chunked.take(clients), parts, phase, optim, at_step(len(range(CLIENTS)[clients])))
        for ours, theirs in zip(own[1:3], together[1:3], strict=True):
            torch.testing.assert_close(ours, theirs[clients], rtol=0, atol=1e-12)
    for name, x in (chunked.adapters | chunked.moments).items():
        torch.testing.assert_close(x, (whole.adapters | whole.moments)[name], rtol=0, atol=1e-12)


def test_micro_batches_of_a_step_add_up_whoevers_rows_they_hold() -> None:
    optim = Optim(adamw(), lambda step: every_kind(0.1), 0.5, "never")
    model, whole = start_of(Linear(), optim.optimizer)
    phase, cut = Phase(frozenset("AB"), frozenset("AB")), whole.clone()
    expected = train_local(model, whole, batches(3), phase, optim, at_step(whole.clients))
    parts = [[rows_at(batch, torch.tensor(at)) for at in ROWS] for (batch,) in batches(3)]
    found = train_local(model, cut, parts, phase, optim, at_step(cut.clients))
    for ours, theirs in zip(found[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for name, x in (cut.adapters | cut.moments).items():
        torch.testing.assert_close(x, (whole.adapters | whole.moments)[name], rtol=0, atol=1e-12)


ROWS = [[5], [8, 9, 4, 10], [0, 1, 6, 7], [2, 11], [3]]
"""Rows of three clients with four each."""


def rows_at(batch: Batch, rows: Tensor) -> Batch:
    inputs = {name: x[rows] for name, x in batch.inputs.items()}
    return Batch(inputs, batch.labels[rows], batch.clients[rows], batch.weights[rows], batch.keys[rows])


def test_no_steps_come_to_nothing() -> None:
    optim = Optim(sgd(), lambda step: every_kind(0.1), 0.0, "never")
    model, state = start_of(Linear(), optim.optimizer)
    trained = train_local(model, state, [], Phase(frozenset("B"), frozenset("B")), optim, at_step(state.clients, 0))
    assert trained.loss.tolist() == trained.grad_norm.tolist() == [0.0] * CLIENTS


def only(clients: slice, batch: Batch) -> Batch:
    """These clients' rows of a batch."""
    own = (batch.clients >= clients.start) & (batch.clients < clients.stop)
    inputs = {name: x[own] for name, x in batch.inputs.items()}
    places = batch.clients[own] - clients.start
    return Batch(inputs, batch.labels[own], places, batch.weights[own], batch.keys[own])


@pytest.mark.parametrize("optimizer", [adamw(), sgd(momentum=0.9)], ids=["adamw", "sgd"])
def test_a_start_that_clients_share_is_never_trained_before_it_is_cloned(optimizer: Optimizer) -> None:
    model, _ = start_of(Linear(), optimizer)
    adapters = init_adapters(model, CLIENTS, 0)
    shared = starting(adapters, optimizer.init(adapters))
    for name, x in (shared.adapters | shared.moments).items():
        assert x.untyped_storage().nbytes() * CLIENTS == x.numel() * x.element_size() or name.startswith("steps.")
    optim = Optim(optimizer, lambda step: every_kind(0.1), 0.0, "never")
    with pytest.raises(RuntimeError, match="single memory location"):
        train_local(model, shared, batches(1), Phase(frozenset("B"), frozenset("B")), optim, at_step(shared.clients))


def test_steps_are_counted_from_the_runs_start() -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return 0.0

    optim = Optim(sgd(), lambda step: every_kind(rate(step)), 0.0, "never")
    model, state = start_of(Linear(), optim.optimizer)
    train_local(model, state, batches(3), Phase(frozenset("B"), frozenset("B")), optim, at_step(state.clients, 21))
    assert asked == [21, 22, 23]


def test_a_base_that_draws_from_the_global_generator_is_refused() -> None:
    optim = Optim(sgd(), lambda step: every_kind(0.1), 0.0, "never")
    model, state = start_of(Linear(draws=True), optim.optimizer)
    with pytest.raises(ModelError, match=r"history; use model\.dropout=false$"):
        train_local(model, state, batches(1), Phase(frozenset("B"), frozenset("B")), optim, at_step(state.clients))


def test_training_that_diverges_stops_with_a_hint() -> None:
    optim = Optim(sgd(), lambda step: every_kind(1e200), 0.0, "never")
    model, state = start_of(Linear(), optim.optimizer)
    with pytest.raises(ModelError, match=r"no longer finite after round 0; lower training\.learning_rate"):
        train_local(
            model, state, batches(4, 1e200), Phase(frozenset("AB"), frozenset("AB")), optim, at_step(state.clients, 0)
        )


def test_an_adapter_that_the_last_step_spoils_is_seen_before_a_loss_says_so() -> None:
    optim = Optim(sgd(), lambda step: every_kind(math.inf), 0.0, "never")
    model, state = start_of(Linear(), optim.optimizer)
    with pytest.raises(DivergedError, match="after round 0"):
        train_local(model, state, batches(1), Phase(frozenset("B"), frozenset("B")), optim, at_step(state.clients))


@pytest.mark.parametrize("rate", [1e200, math.inf])
def test_training_that_diverges_says_so_before_a_method_turns_what_it_came_to(rate: float) -> None:
    optim = Optim(sgd(), lambda step: every_kind(rate), 0.0, "never")
    model, state = start_of(Linear(), optim.optimizer)
    phase = Phase(frozenset("AB"), frozenset("AB"))
    with pytest.raises(DivergedError, match="after round 1"):  # and not that there are no singular vectors
        train_local(model, state, batches(4, 1e200), phase, optim, at_step(state.clients, 1), turned_back(0.5))


def test_what_a_method_makes_of_a_rounds_end_is_finite_too() -> None:
    def end(start: Tensors, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        return {name: x / 0 for name, x in adapters.items()}, {}

    optim = Optim(sgd(), lambda step: every_kind(0.1), 0.0, "never")
    model, state = start_of(Linear(), optim.optimizer)
    phase = Phase(frozenset("AB"), frozenset("AB"))
    with pytest.raises(DivergedError, match="after round 0"):
        train_local(model, state, batches(1), phase, optim, at_step(state.clients), Local(end=end))


def test_adamw_in_float32_takes_the_steps_of_torch_from_the_first() -> None:
    start = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    optimizer, ours = adamw(), {"x.A": start.clone()}
    theirs = start.clone().requires_grad_()
    reference = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    moments = own_memory(optimizer.init(ours))
    for step in range(5):
        grad = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(step))
        optimizer.update(ours, {"x.A": grad}, moments, every_kind(1e-3))
        theirs.grad = grad.clone()
        reference.step()
        # A correction computed in float32 would be off by 1e-5 of a step at first; a float's own rounding is 6e-8.
        torch.testing.assert_close(ours["x.A"], theirs.detach(), rtol=2e-7, atol=2e-9)
