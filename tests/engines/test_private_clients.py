"""What a client changes in a round, cut and noised as a whole: against a slow twin, other rows, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from playing import run, state
from privately import SMALL, made

from peertune.api.running import resume
from peertune.api.running import run as run_recipe
from peertune.assembly.build import Built
from peertune.data.batches import TrainingSteps
from peertune.errors import DivergedError, RecipeError, Stopped
from peertune.method import standing
from peertune.methods.private import STEPS, Own, Private, privately
from peertune.privacy.accountant import epsilon
from peertune.rounds.record import RoundRecord
from peertune.rounds.round import turn_of
from peertune.rounds.turns import train
from peertune.types import Tensors, kind, norms, select

CLIENT = "privacy={unit: client, noise_multiplier: 1.0, delta: 1e-3, max_grad_norm: 0.1}"
QUIET = "privacy={unit: client, noise_multiplier: 1e-12, delta: 1e-3, max_grad_norm: 0.1}"


def by_client(*more: str) -> Built:
    return made(CLIENT, *more)


def test_a_budget_of_rounds_is_spent_where_no_further_round_has_room(caplog: pytest.LogCaptureFixture) -> None:
    room = epsilon(1.0, 1.0, 2, 1e-3)
    run(made(f"privacy={{unit: client, noise_multiplier: 1.0, epsilon: {room + 1e-6}, delta: 1e-3}}", "rounds=4"))
    said = [line for line in caplog.messages if "budget is spent" in line]
    assert said == [
        f"client {k}: its privacy budget is spent after round 1: it only mixes from here on" for k in range(3)
    ]


def after_steps(built: Built, t: int = 0) -> Tensors:
    """Return the adapters after a round's local steps, before anything is mixed."""
    found = built.job.state.clone()
    (came,) = train([turn_of(built.job, found.at(t), built.job.clients)])
    assert not isinstance(came, Exception)
    return found.adapters


def apart(one: Tensors, other: Tensors) -> list[float]:
    """Return by client how far two adapters are apart, over all of their tensors."""
    return norms({name: x - other[name] for name, x in one.items()}).tolist()


def test_a_run_is_that_of_a_slow_twin_that_cuts_by_hand() -> None:
    job = made("privacy=null", "training.max_grad_norm=1.0").job
    found, cut = job.state.clone(), 0
    for t in range(job.rounds):
        start = {name: x.clone() for name, x in found.adapters.items()}
        (came,) = train([turn_of(job, found.at(t), job.clients)])
        assert not isinstance(came, Exception)
        for client in job.clients:
            change = {name: x[client] - start[name][client] for name, x in found.adapters.items()}
            length = float(torch.cat([x.flatten() for x in change.values()]).norm())
            cut += length > 0.1
            for name, x in change.items():
                found.adapters[name][client] = start[name][client] + x * min(1.0, 0.1 / (length + 1e-6))
        for x in found.adapters.values():  # all meet all
            x.copy_(x.mean(0).expand_as(x))
    assert cut > 0
    last = run(made(QUIET, "training.max_grad_norm=1.0"))[-1]
    for name, x in state(last).adapters.items():
        torch.testing.assert_close(x, found.adapters[name], rtol=0, atol=1e-9)
    for name, x in state(last).moments.items():  # which nothing is done to
        torch.testing.assert_close(x, found.moments[name], rtol=0, atol=1e-9)


def test_what_is_added_is_noise_of_the_stated_size_and_never_the_same_for_two_changes() -> None:
    loud, quiet = after_steps(by_client()), after_steps(made(QUIET))
    noise = torch.cat([((x - quiet[name]) / 0.1).flatten() for name, x in loud.items()])
    assert len(noise) > 5_000
    assert abs(float(noise.mean())) < 5 / len(noise) ** 0.5
    assert abs(float(noise.std()) - 1) < 5 / (2 * len(noise)) ** 0.5
    assert all(torch.equal(x, loud[name]) for name, x in after_steps(by_client()).items())
    other = after_steps(by_client("training.learning_rate=5.000001e-3"))
    assert min(apart(loud, other)) > 1
    assert min(apart(loud, after_steps(made(CLIENT, secret=bytes(32))))) > 1


def test_other_rows_change_what_comes_before_the_noise_by_twice_the_norm_at_most_and_none_by_once() -> None:
    built = made(QUIET, "training.learning_rate=0.1")
    steps = built.job.steps
    assert isinstance(steps, TrainingSteps)
    turned = replace(steps, parts={client: steps.parts[(client + 1) % 3][::-1] for client in range(3)})
    start, one = built.job.state.adapters, after_steps(built)
    other = after_steps(replace(built, job=replace(built.job, steps=turned)))
    for change in (apart(one, start), apart(other, start)):
        assert max(change) <= 0.1 + 1e-9
        assert min(change) > 0.099  # all of them are cut
    assert max(apart(one, other)) <= 0.2 + 1e-9
    assert min(apart(one, other)) > 0.05


def test_a_change_that_is_not_finite_counts_as_none_and_its_moments_start_afresh() -> None:
    job = made(QUIET).job
    at, phase = standing(job.clients, job.state.rounds), job.algorithm.phase(0)
    start = {name: x + 1 for name, x in select(job.state.adapters, phase.train).items()}
    ended = {name: x + 1 for name, x in start.items()}
    next(iter(ended.values()))[1, 0] = float("nan")
    known = {name: torch.ones_like(x) for name, x in job.state.known.items()}
    moved, changed = job.algorithm.local.end(start, ended, known, at, phase)
    assert apart(moved, start) == pytest.approx([0.1, 0, 0.1], abs=1e-6)
    assert changed.pop(STEPS).tolist() == [2, 2, 2]
    assert {f"moments.{name}" for name in job.state.moments} == changed.keys()
    assert all(x[0].all() and x[2].all() and not x[1].any() for x in changed.values())


def test_who_diverges_goes_on_as_if_nothing_had_changed_and_nobody_sees_it() -> None:
    huge = ["training.learning_rate=1e300", "training.optim=sgd", "training.local_steps=3"]
    with pytest.raises(DivergedError):
        run(made("privacy=null", *huge))
    job = by_client(*huge).job
    last = state(run(by_client(*huge))[-1])
    assert last.remembered(STEPS).tolist() == [4, 4, 4]
    assert max(apart(last.adapters, job.state.adapters)) < 100  # noise alone


def test_epsilon_is_that_of_the_rounds_and_a_budget_is_kept() -> None:
    records = run(by_client())
    assert [record.epsilon for record in records if record.epsilon] == [
        [epsilon(1.0, 1.0, rounds, 1e-3)] * 3 for rounds in (2, 4)
    ]
    room = epsilon(1.0, 1.0, 2, 1e-3) + 0.1
    asked = f"privacy={{unit: client, epsilon: {room}, noise_multiplier: 1.0, delta: 1e-3}}"
    budget = made(asked, "evaluate.every=1")
    assert budget.job.private is not None
    most = budget.job.private.allowances[0].most_steps
    assert most == 2
    ended = run(budget)
    assert [state(record).remembered(STEPS).tolist()[0] for record in ended] == [1, 2, 2, 2]
    assert max(ended[-1].epsilon) == epsilon(1.0, 1.0, 2, 1e-3)
    chosen = made("privacy={unit: client, epsilon: 6, delta: 1e-3}")
    assert chosen.job.private is not None
    (noise,) = {one.noise_multiplier for one in chosen.job.private.allowances.values()}  # whatever their rows
    assert 5.9 < epsilon(noise, 1.0, 4, 1e-3) <= 6
    assert chosen.facts["privacy"]["unit"] == "client"


def test_a_run_that_is_resumed_has_the_same_bits_and_tells_neither_losses_nor_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERTUNE_SECRET", str(tmp_path / "secret"))
    more = [CLIENT, "checkpoint={every: 1, keep: 2, steps: 3}", "training.local_steps=4"]
    whole = run_recipe("digits-demo", [*SMALL, *more], out=tmp_path / "whole")
    with pytest.raises(Stopped):
        run_recipe("digits-demo", [*SMALL, *more], out=tmp_path / "part", each=lambda record: record.round == 1)
    part = resume(tmp_path / "part")
    assert part.records[-1]["epsilon"] == whole.records[-1]["epsilon"]
    assert all(torch.equal(x, part.adapters[name]) for name, x in whole.adapters.items())
    assert all(record["loss"] == record["grad_norm"] == [] for record in whole.records)
    facts = json.loads((tmp_path / "whole/facts.json").read_text())
    assert all(len(rows) == 1 for rows in facts["partition"]["rows"])
    assert (
        "each client, by all of its rows together"
        in whole.export(tmp_path / "out").folder.joinpath("README.md").read_text()
    )


@pytest.mark.parametrize(
    "more",
    [
        ["modifiers=[{name: nested}, {name: int8}]"],
        ["modifiers=[{name: choco}]"],
        ["algorithm.name=la_lora"],
        ["algorithm.name=local"],
        ["algorithm.name=rolora"],
        ["algorithm={name: tad_lora, switch_every: 1}"],
        ["algorithm.name=decaf", "modifiers=[]"],
        ["algorithm.name=fedsa_lora"],
        ["algorithm.name=lora_fair"],
        ["algorithm={name: rac_lora, links: 3, link_rounds: 1}"],
        ["algorithm.name=ffa_lora", "training.class_weight=balanced"],
        ["lora.ranks=[2, 3, 3]"],
        ["algorithm.name=fedrot_lora", "faults=[{down: 1, rounds: [1, 2]}]"],
    ],
)
def test_every_method_trains_so_and_what_its_steps_leave_alone_stays(more: list[str]) -> None:
    built = by_client(*more)
    job = built.job
    records: list[RoundRecord] = run(built)
    assert not any(record.not_mixed for record in records)
    assert max(state(records[-1]).remembered(STEPS).tolist()) == 4
    if not job.ranks:
        found, trains = after_steps(made(QUIET, *more)), job.algorithm.phase(0).train
        start = job.state.adapters
        idle = {name for name in start if kind(name) not in trains}
        assert all(torch.equal(found[name], start[name]) for name in idle)
        assert max(apart(select(found, trains), start)) <= 0.1 + 1e-9


def test_a_method_that_changes_what_a_round_does_not_train_is_refused() -> None:
    job = made("privacy=null", "algorithm.name=ffa_lora").job
    local = job.algorithm.local

    def end(*arguments: object) -> tuple[Tensors, Tensors]:
        adapters: Tensors = arguments[1]  # type: ignore[assignment]
        return {name: x + 1 for name, x in adapters.items() if kind(name) == "A"}, {}

    private = Private("client", 1.0, 1e-3, 1, {})
    bounded = privately(job.algorithm._replace(local=local._replace(end=end)), private, {0: Own(b"", b"")})
    at, phase = standing(job.clients, job.state.rounds), job.algorithm.phase(0)
    with pytest.raises(RecipeError, match=r"privacy.unit: client can't bound .*\.A; choose another method"):
        bounded.local.end(select(job.state.adapters, phase.train), job.state.adapters, {}, at, phase)


REFUSED = {
    "privacy.delta: is missing.* less than one over the clients": ["privacy={unit: client, epsilon: 8}"],
    "privacy.delta: 0.4 is no less than one over the 3 clients": ["privacy={unit: client, epsilon: 8, delta: 0.4}"],
    "privacy.epsilon: 1 has room for no round; give more noise_multiplier$": [
        "privacy={unit: client, epsilon: 1, noise_multiplier: 0.5, delta: 1e-3}"
    ],
    "mix_moments needs clients that need not be private; leave out privacy.unit=client": [
        "modifiers=[{name: mix_moments}]"
    ],
    "fedspeed needs clients that need not be private": ["modifiers=[{name: fedspeed}]", "training.optim=sgd"],
    "dfed_admm needs clients that need not be private": ["modifiers=[{name: dfed_admm}]", "training.optim=sgd"],
    "evaluate.on: scores": ["evaluate={on: own, rows: null}"],
    "time.deadline_s: a round's noise": ["time={step_s: 1.0, deadline_s: 3.0}"],
    "time.mode: private steps": ["time={mode: asynchronous, step_s: 1.0}"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_tell_of_a_client_beside_it_is_refused(message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        by_client(*REFUSED[message])
