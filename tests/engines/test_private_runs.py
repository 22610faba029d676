"""Private local steps in whole runs: against slow twins and Opacus, resumed, made again, and out of budget."""

import json
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playing import run, state
from privately import SECRET, SMALL, made, same
from torch import nn

from peertune.api.running import resume
from peertune.api.running import run as run_recipe
from peertune.api.runs import Run
from peertune.assembly.build import Built, build
from peertune.engines.simulator import simulate
from peertune.errors import RecipeError, RunError, Stopped
from peertune.methods.private import STEPS
from peertune.models.load import MODELS
from peertune.privacy.accountant import epsilon
from peertune.privacy.draws import SECRET_BYTES, of_client
from peertune.recipe import load_recipe
from peertune.rounds.round import turn_of
from peertune.rounds.training import BatchGradient
from peertune.rounds.turns import salts, train
from peertune.types import Tensors, norms


def sums(built: Built, adapters: Tensors, step: int = 0) -> tuple[Tensors, list[Any]]:
    """Return the cut sums of a step of all clients, in which each row has a chance, and its batches."""
    job = built.job
    (batches, *_) = job.steps(job.clients, [step] * len(job.clients), 0, salts(job.state))
    kinds = job.algorithm.phase(0).train
    assert job.private is not None
    return BatchGradient(job.model, batches, kinds).clipped(adapters, job.private.max_grad_norm), batches


def moved(adapters: Tensors, seed: int = 0) -> Tensors:
    """Return adapters of which no B is zero and no two clients' are alike."""
    generator = torch.Generator().manual_seed(seed)
    return {name: x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in adapters.items()}


@pytest.mark.parametrize(
    ("more", "some"),
    [(["privacy.max_grad_norm=12"], True), (["algorithm.name=ffa_lora", "lora.lora_dropout=0.3"], False)],
)
def test_sums_are_those_of_a_loop_over_single_rows(more: Sequence[str], some: bool) -> None:
    built = made(*more)
    job, adapters = built.job, moved(built.job.state.adapters)
    assert job.private is not None
    found, batches = sums(built, adapters)
    expected = {name: torch.zeros_like(x) for name, x in found.items()}
    cut = whole = 0
    for batch in batches:
        for row in range(len(batch.clients)):
            at = torch.tensor([row])
            inputs = {name: x[at] for name, x in batch.inputs.items()}
            fields = {name: getattr(batch, name)[at] for name in ("labels", "clients", "weights", "keys", "shared")}
            alone = replace(batch, inputs=inputs, **fields)
            own = BatchGradient(job.model, [alone], job.algorithm.phase(0).train)(adapters)
            length = norms(own)
            cut, whole = cut + int(length.max() > job.private.max_grad_norm), whole + 1
            for name, x in own.items():
                expected[name] += x * min(1.0, job.private.max_grad_norm / (float(length.max()) + 1e-6))
    assert cut > 0
    assert (cut < whole) == some
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-12)


def test_sums_are_those_of_opacus() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handlers = logging.root.handlers[:]
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForImageClassification

        logging.root.handlers[:] = handlers  # which Opacus sets up for the process
    built = made("head=frozen")
    job, adapters = built.job, moved(built.job.state.adapters)
    assert job.private is not None
    found, batches = sums(built, adapters)
    compared = 0
    for client in job.clients:
        base = AutoModelForImageClassification.from_pretrained(
            MODELS["digits-vit"], num_labels=len(built.labels), ignore_mismatched_sizes=True, dtype=torch.float64
        )
        base.load_state_dict({name: x.double() for name, x in built.head.items()}, strict=False)
        model: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
        for name, parameter in model.named_parameters():
            if match := re.search(r"model\.(.*)\.lora_([AB])\.default\.weight", name):
                parameter.data = adapters[f"{match[1].removeprefix('model.')}.{match[2]}"][client].clone()
        model.double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            watched = GradSampleModule(model, loss_reduction="sum")
            parameters = [x for x in model.parameters() if x.requires_grad]
            optimizer = DPOptimizer(
                torch.optim.SGD(parameters, lr=0.0),
                noise_multiplier=0.0,
                max_grad_norm=job.private.max_grad_norm,
                expected_batch_size=1,
                loss_reduction="sum",
            )
            own = [(x.inputs["pixel_values"][x.clients == client], x.labels[x.clients == client]) for x in batches]
            pixels, labels = (torch.cat(each) for each in zip(*own, strict=True))
            nn.functional.cross_entropy(
                watched(pixel_values=pixels.double()).logits, labels, reduction="sum"
            ).backward()
            optimizer.clip_and_accumulate()
        for name, parameter in model.named_parameters():
            if match := re.search(r"model\.(.*)\.lora_([AB])\.default\.weight", name):
                mine = found[f"{match[1].removeprefix('model.')}.{match[2]}"][client]
                torch.testing.assert_close(mine, parameter.summed_grad, rtol=0, atol=1e-10)
                compared += 1
    assert compared == 3 * len(found)


def test_a_step_is_the_cut_sum_with_noise_of_the_stated_size_over_the_expected_rows() -> None:
    built = made("training.optim=sgd", "training.local_steps=1", "rounds=1", "algorithm.name=local")
    job = built.job
    assert job.private is not None
    before, (record,) = job.state.clone(), run(built)
    found, _ = sums(built, before.adapters)
    drawn = []
    for client in job.clients:
        allowed = job.private.allowances[client]
        for name, x in found.items():
            step = (before.adapters[name][client] - state(record).adapters[name][client]) / 5e-3
            noise = step * allowed.rows_per_step - x[client]
            drawn.append((noise / allowed.noise_multiplier / job.private.max_grad_norm).flatten())
    noise = torch.cat(drawn)
    assert len(noise) > 5_000
    assert abs(float(noise.mean())) < 5 / len(noise) ** 0.5
    assert abs(float(noise.std()) - 1) < 5 / (2 * len(noise)) ** 0.5


def test_an_empty_draw_still_adds_noise() -> None:
    built = made("clients=2", "training.per_device_train_batch_size=1", "rounds=1", "training.local_steps=40")
    job = built.job
    sizes = [len(batch) for batch in job.steps(job.clients, [0, 0], 0, salts(job.state))]
    assert 0 in sizes  # a step in which nobody drew a row
    before, (record,) = job.state.clone(), run(built)
    assert all((state(record).adapters[name] != x).any() for name, x in before.adapters.items())
    assert record.loss == []
    assert min(record.grad_norm) > 0


def test_a_run_has_the_same_bits_again_and_other_noise_by_secret_rows_and_state() -> None:
    first, again = run(made())[-1], run(made())[-1]
    assert same(state(first), state(again))
    assert not same(state(first), state(run(made(secret=bytes(SECRET_BYTES)))[-1]))
    job = made().job
    one = run(made())[0]
    nudged = job.state.clone()
    nudged.adapters["head.bias.head" if "head.bias.head" in nudged.adapters else next(iter(nudged.adapters))][0] += 1e-9
    other = next(simulate(replace(job, state=nudged)))
    assert other.state is not None
    apart = {name: (x - state(one).adapters[name])[0].abs().max() for name, x in other.state.adapters.items()}
    assert max(map(float, apart.values())) > 1e-3  # not the same noise with another gradient beneath


@pytest.mark.parametrize(
    ("one", "other", "rounds"),
    [
        (["evaluate.load_best=false"], ["evaluate.load_best=true"], 1),
        (["faults=[]"], ["faults=[{slow: 0, rounds: [0, 0], delay_s: 5}]"], 2),
    ],
)
def test_two_different_sums_never_have_the_same_noise(one: list[str], other: list[str], rounds: int) -> None:
    """Settings that change which rows are drawn, or nothing: what two runs released differs by noise, or not at all."""
    common = ["training.optim=sgd", "algorithm.name=local", "time={step_s: 1.0}", "training.local_steps=1"]
    ended = [state(run(made(*common, f"rounds={rounds}", *more))[-1]).adapters for more in (one, other)]
    apart = torch.cat([(x[0] - ended[1][name][0]).flatten() for name, x in ended[0].items()]) / 5e-3 * 8
    if apart.any():  # else the same was released twice
        assert float(apart.std()) > 1.2  # the noise of two releases, which does not cancel


def test_a_card_says_what_was_spent_in_the_rounds_that_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERTUNE_SECRET", str(tmp_path / "secret"))
    with pytest.raises(Stopped):
        run_recipe("digits-demo", [*SMALL, "evaluate.every=3"], out=tmp_path / "run", each=lambda one: one.round == 1)
    found = Run.open(tmp_path / "run")
    found.export(tmp_path / "exported", 0)
    card = (tmp_path / "exported" / "README.md").read_text()
    clients = found.facts["privacy"]["clients"]
    most = max(epsilon(one["noise_multiplier"], one["rate"], 4, 1e-5) for one in clients)
    assert f"ε {most:.3g} at most" in card
    assert "epsilon" not in found.summary  # since the last round was not evaluated


def test_with_all_rows_in_each_step_and_next_to_no_noise_clients_are_in_one_pass_what_they_are_alone() -> None:
    """States differ by how many share a pass, in their last bits, and so noise differs wholly: here it is too small."""
    tiny = "privacy={noise_multiplier: 1e-9, delta: 1e-5}"
    more = ["training.per_device_train_batch_size=2000", "algorithm.name=local", "training.optim=sgd", "rounds=1", tiny]
    together = state(run(made(*more))[-1])
    for client in range(3):
        recipe, own = load_recipe("digits-demo", [*SMALL, *more]), of_client(SECRET, client)
        built = build(recipe, [client], secret=lambda own=own: own)  # type: ignore[misc]
        assert built.job.private is not None
        assert built.job.private.allowances[client].rate == 1
        assert salts(built.job.state) == salts(made(*more).job.state)[client : client + 1]
        alone = built.job.state.clone()
        job = built.job
        for t in range(job.rounds):
            (turn,) = [turn_of(job, alone.at(t), [client])]
            (came,) = train([turn])
            assert not isinstance(came, Exception)
        for name, x in together.adapters.items():
            torch.testing.assert_close(alone.adapters[name][0], x[client], rtol=0, atol=1e-9)


def test_a_budget_is_kept_and_who_has_spent_it_goes_on_mixing(caplog: pytest.LogCaptureFixture) -> None:
    built = made("rounds=8", "privacy={epsilon: 0.9, noise_multiplier: 1.0, delta: 1e-5}", "evaluate.every=1")
    private = built.job.private
    assert private is not None
    records = run(built)
    most = {client: (one.most_steps or 0) // 2 * 2 for client, one in private.allowances.items()}
    assert 0 < min(most.values()) < 16
    for record in records:
        assert max(record.epsilon) <= 0.9
        over = [client for client in range(3) if 2 * record.round >= most[client]]
        assert sorted(record.out_of_phase) == over or len(over) == 3
        made_steps = [min(2 * (record.round + 1), most[client]) for client in range(3)]
        assert state(record).memory[STEPS].tolist() == made_steps
        for client, steps, spent in zip(range(3), made_steps, record.epsilon, strict=True):
            one = private.allowances[client]
            assert spent == epsilon(one.noise_multiplier, one.rate, steps, 1e-5)
    for client, steps in most.items():
        said = f"client {client}: its privacy budget is spent after round {steps // 2 - 1}: it only mixes from here on"
        assert caplog.messages.count(said) == 1
    last, before = state(records[-1]), state(records[-2])
    assert records[-1].edges
    for name, x in last.adapters.items():  # nobody trains any more, and all have the same by now
        torch.testing.assert_close(x, before.adapters[name], rtol=0, atol=1e-12)
        torch.testing.assert_close(x, x[:1].expand_as(x), rtol=0, atol=1e-12)


def test_noise_is_what_the_budget_asks_for_by_each_client_s_rows() -> None:
    built = made("partition={name: dirichlet, alpha: 0.5}", "privacy={epsilon: 4, delta: 1e-4}")
    private = built.job.private
    assert private is not None
    noises = [one.noise_multiplier for one in private.allowances.values()]
    assert len(set(noises)) == 3
    rates = [one.rate for one in private.allowances.values()]
    assert np.argsort(noises).tolist() == np.argsort(rates).tolist()
    for one in private.allowances.values():
        assert 3.9 < epsilon(one.noise_multiplier, one.rate, 8, 1e-4) <= 4
    told = built.facts["privacy"]
    assert [one["noise_multiplier"] for one in told["clients"]] == noises
    assert max(one["epsilon"] for one in told["clients"]) <= 4


def test_what_would_tell_of_rows_is_withheld(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERTUNE_SECRET", str(tmp_path / "secret"))
    found = run_recipe("digits-demo", SMALL, out=tmp_path / "run")
    assert all(record["loss"] == [] for record in found.records)
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert all(len(rows) == 1 for rows in facts["partition"]["rows"])  # how many, and not of which class
    assert "train" not in facts["long_rows"] | facts["missing_cells"]
    assert found.summary["epsilon"] == max(found.records[-1]["epsilon"])
    assert "loss is withheld" in " ".join(finding.text for finding in found.findings) or found.findings
    written = b"".join(file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert (tmp_path / "secret").read_bytes() not in written


def test_a_run_that_is_resumed_goes_on_with_what_it_spent_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERTUNE_SECRET", str(tmp_path / "secret"))
    more = ["checkpoint={every: 1, keep: 2, steps: 3}", "training.local_steps=4"]
    whole = run_recipe("digits-demo", [*SMALL, *more], out=tmp_path / "whole")
    with pytest.raises(Stopped):
        run_recipe("digits-demo", [*SMALL, *more], out=tmp_path / "part", each=lambda record: record.round == 1)
    part = resume(tmp_path / "part")
    assert part.records[-1]["epsilon"] == whole.records[-1]["epsilon"]
    assert whole.adapters.keys() == part.adapters.keys()
    assert all(torch.equal(x, part.adapters[name]) for name, x in whole.adapters.items())


REFUSED = {
    "privacy.delta: is missing": ["privacy={epsilon: 8}"],
    "privacy: says neither": ["privacy={delta: 1e-5}"],
    "privacy.delta: 0.5 is no less than one over": ["privacy={epsilon: 8, delta: 0.5}"],
    "privacy.epsilon: .* has room for 0 steps": ["privacy={epsilon: 0.5, noise_multiplier: 0.5, delta: 1e-5}"],
    "training.max_grad_norm: cuts": ["training.max_grad_norm=1.0"],
    "training.class_weight: balanced": ["training.class_weight=balanced"],
    "task.validation_split: scores": ["task={name: digits, validation_split: 0.2}"],
    "evaluate.on: scores": ["evaluate={on: own, rows: null}"],
    "evaluate.mixing: scores": ["evaluate={on: both, mixing: true}"],
    "fedspeed needs rows that need not be private": ["modifiers=[{name: fedspeed}]", "training.optim=sgd"],
    "time.mode: private steps": ["time={mode: asynchronous, step_s: 1.0}"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_goes_against_privacy_is_refused(message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        made(*REFUSED[message])


@pytest.mark.parametrize(
    "more",
    [
        ["modifiers=[{name: dfed_admm}]", "training.optim=sgd"],
        ["modifiers=[{name: nested}, {name: int8}]"],
        ["algorithm.name=la_lora"],
        ["algorithm={name: tad_lora, switch_every: 1}"],
        ["algorithm.name=decaf"],
        ["algorithm={name: rac_lora, links: 3, link_rounds: 1}"],
        ["lora.ranks=[2, 3, 3]"],
        ["algorithm.name=fedrot_lora", "faults=[{down: 1, rounds: [1, 2]}]"],
    ],
)
def test_every_method_trains_privately_and_the_bound_on_messages_never_fires(more: list[str]) -> None:
    built = made(*more, "privacy={epsilon: 1, delta: 1e-5}")
    records = run(built)
    assert not any(record.not_mixed for record in records)
    assert not any(record.failed_edges for record in records if "faults" not in "".join(more))
    steps = state(records[-1]).remembered(STEPS).tolist()
    assert max(steps) == 8
    assert max(records[-1].epsilon) <= 1


def test_diagnose_names_who_has_spent_its_budget_and_a_run_whose_noise_was_chosen_has_no_more_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERTUNE_SECRET", str(tmp_path / "secret"))
    budget = "privacy={epsilon: 0.9, noise_multiplier: 1.0, delta: 1e-5}"
    spent = run_recipe("digits-demo", [*SMALL, "rounds=8", budget], out=tmp_path / "spent")
    (finding,) = (one for one in spent.findings if one.name == "budget_spent")
    assert finding.text.startswith("Clients 0, 1, 2 of 3 had no room for another round of local steps, client 0 after")
    chosen = run_recipe("digits-demo", [*SMALL, "privacy={epsilon: 8, delta: 1e-5}"], out=tmp_path / "chosen")
    assert not [one for one in chosen.findings if one.name == "budget_spent"]
    with pytest.raises(RunError, match="its noise was chosen for 4 rounds"):
        resume(tmp_path / "chosen", ["rounds=8"])
    longer = resume(tmp_path / "spent", ["rounds=9"])
    assert longer.records[-1]["epsilon"] == spent.records[-1]["epsilon"]
