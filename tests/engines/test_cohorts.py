"""Clients whose ranks differ: trained as if alone, mixed by what they have in common."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification

import peertune
from peertune.assembly.build import Built, build
from peertune.engines.simulator import _exchange, simulate
from peertune.errors import PeertuneError
from peertune.memory import LiveBytes
from peertune.methods.catalogue import ALGORITHMS
from peertune.models.load import MODELS
from peertune.recipe import load_recipe
from peertune.rounds.bounds import Bound
from peertune.rounds.job import Pausing
from peertune.rounds.record import RoundRecord
from peertune.rounds.round import Begun, end, turn_of
from peertune.rounds.training import adamw
from peertune.rounds.turns import Came
from peertune.runs import checkpoints
from peertune.topology import weights_at
from peertune.types import State, Tensors, by_client, kind, payload_bytes

RANKS = (4, 2, 6, 4, 2)
SMALL = (
    "model.dtype=float64",
    "clients=5",
    "algorithm={name: dec_lora}",
    "head=trained",
    "lora={r: 3, lora_alpha: 6, lora_dropout: 0.2, target_modules: [q_proj, v_proj]}",
    "partition={name: iid}",
    "graph={name: complete, activation: 0.6}",
    "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 3}",
    "rounds=3",
    "evaluate={every: 2, rows: 10}",
)
DIFFERENT = f"lora.ranks={[*RANKS]}"


def made(*overrides: str) -> Built:
    return build(load_recipe("digits-demo", [*SMALL, *overrides]))


def run(*overrides: str) -> list[RoundRecord]:
    return [replace(record, state=record.state and record.state.clone()) for record in simulate(made(*overrides).job)]


def of_clients(records: Sequence[RoundRecord]) -> list[Tensors]:
    state = records[-1].state
    assert state is not None
    return by_client(state.stacks)


def assert_same(one: Tensors, other: Tensors, tolerance: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=tolerance, atol=tolerance)


def test_clients_of_several_ranks_train_as_they_would_if_all_had_theirs() -> None:
    alone = "algorithm={name: local}"
    records = run(DIFFERENT, alone)
    for rank in set(RANKS):
        scale = f"lora={{r: {rank}, lora_alpha: {2 * rank}, lora_dropout: 0.2, target_modules: [q_proj, v_proj]}}"
        uniform = run(alone, scale)
        for client in (client for client, own in enumerate(RANKS) if own == rank):
            assert_same(of_clients(records)[client], of_clients(uniform)[client])
            for one, other in zip(records, uniform, strict=True):
                assert one.loss[client] == pytest.approx(other.loss[client], abs=1e-12)
                assert one.grad_norm[client] == pytest.approx(other.grad_norm[client], abs=1e-12)
                if one.evaluation is not None:
                    assert other.evaluation is not None
                    assert one.evaluation.clients[client] == other.evaluation.clients[client]


def test_each_may_have_the_scale_of_its_own_rank() -> None:
    records = run(DIFFERENT, "algorithm={name: local}", "lora.scaling=own")
    for rank in set(RANKS):
        uniform = run("algorithm={name: local}", f"lora.r={rank}")
        for client in (client for client, own in enumerate(RANKS) if own == rank):
            assert_same(of_clients(records)[client], of_clients(uniform)[client])


def in_common(adapters: Sequence[Tensors], weights: Tensor, kinds: set[str]) -> list[Tensors]:
    """Mix row by row of A, and column by column of B, those who have it: the slow twin of mixing by slice."""
    found = [{name: x.clone() for name, x in own.items()} for own in adapters]
    for i, own in enumerate(found):
        for name, x in own.items():
            if kind(name) not in kinds:
                continue
            axis = {"A": 1, "B": -1}.get(kind(name), 0)
            for row in range(x.shape[axis]):
                mine = adapters[i][name].narrow(axis, row, 1)
                who = [j for j, other in enumerate(adapters) if other[name].shape[axis] > row]
                took = [weights[i, j] * (adapters[j][name].narrow(axis, row, 1) - mine) for j in who]
                x.narrow(axis, row, 1).copy_(mine + torch.stack(took).sum(0))
    return found


@pytest.mark.parametrize(("method", "kinds"), [("dec_lora", "A B head"), ("fedsa_lora", "A"), ("ffa_lora", "B head")])
def test_a_rank_slice_is_mixed_among_those_who_have_it(method: str, kinds: str) -> None:
    method = f"algorithm={{name: {method}}}"
    lost = [f"{{edge: [{i}, {j}], rounds: [0, 9]}}" for i, j in combinations(range(5), 2)]
    alone, record = run(DIFFERENT, method, f"faults=[{', '.join(lost)}]")[0], run(DIFFERENT, method)[0]
    weights = torch.from_numpy(weights_at(made(DIFFERENT, method).job.graph, 0).toarray())
    assert record.edges, "somebody meets somebody"
    expected = in_common(of_clients([alone]), weights, set(kinds.split()))
    for own, other in zip(of_clients([record]), expected, strict=True):
        assert_same(own, other)
    assert record.diagnostics["mean_drift"] < 1e-12, "of every slice the mean stays"
    size = [payload_bytes({n: x for n, x in own.items() if kind(n) in kinds.split()}) for own in expected]
    assert record.bytes_sent == [one * count for one, count in zip(size, record.neighbours, strict=True)]


def test_divided_averages_a_slice_over_those_who_have_it() -> None:
    method = ("algorithm={name: dec_lora}", "graph={name: complete, activation: 1.0}")
    lost = [f"{{edge: [{i}, {j}], rounds: [0, 9]}}" for i, j in combinations(range(5), 2)]
    before = of_clients(run(DIFFERENT, *method, f"faults=[{', '.join(lost)}]")[:1])
    after = of_clients(run(DIFFERENT, *method, "modifiers=[{name: divided}]")[:1])
    for own in after:
        for name, x in own.items():
            axis = {"A": 1, "B": -1}.get(kind(name), 0)
            for row in range(x.shape[axis]):
                there = [other[name].narrow(axis, row, 1) for other in before if other[name].shape[axis] > row]
                torch.testing.assert_close(x.narrow(axis, row, 1), torch.stack(there).mean(0), rtol=1e-12, atol=1e-12)


def test_ranks_that_are_equal_give_the_bits_of_one_rank() -> None:
    same, one = run("lora.ranks=[3, 3, 3, 3, 3]"), run()
    for ours, theirs in zip(same, one, strict=True):
        assert replace(ours, seconds={}, state=None) == replace(theirs, seconds={}, state=None)
    for mine, other in zip(of_clients(same), of_clients(one), strict=True):
        assert all(torch.equal(x, other[name]) for name, x in mine.items())


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((method, "modifiers=[]") for method in ALGORITHMS),
        ("decaf", "modifiers=[{name: half}]"),
        ("dec_lora", "modifiers=[{name: int8}, {name: zero_padded, weights: norms}, {name: nested}, {name: fedspeed}]"),
        ("tad_lora", "algorithm={name: tad_lora, switch_every: adaptive, window_rounds: 4}"),
    ],
)
def test_every_method_takes_ranks(method: str, more: str) -> None:
    records = run(DIFFERENT, f"algorithm={{name: {method}}}", "rounds=5", more)
    for own, rank in zip(of_clients(records), RANKS, strict=True):
        assert {x.shape[1 if kind(name) == "A" else -1] for name, x in own.items() if kind(name) in "AB"} == {rank}
    found = records[-1].evaluation
    assert found is not None
    assert len(found.clients) == 5
    assert found.average is not None
    assert {"energy_beyond", "highest_apart"} <= records[-1].diagnostics.keys()


@pytest.mark.parametrize("more", [(), ("modifiers=[{name: int8}]",), ("evaluate.load_best=true", "time.step_s=2.0")])
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path, more: tuple[str, ...]) -> None:
    job = made(DIFFERENT, "algorithm={name: tad_lora}", "faults=[{down: 2, rounds: [1, 1]}]", *more).job
    whole = list(simulate(job))[-1].state
    for record in simulate(job):
        assert record.state is not None
        checkpoints.save(tmp_path, record.state, 9, job.clients)
    loaded = checkpoints.load(tmp_path, job.state, job.clients, before=3)
    assert loaded is not None
    assert whole is not None
    assert loaded.round == 2
    again = list(simulate(replace(job, state=loaded)))[-1].state
    assert again is not None
    for (rows, ours), (others, theirs) in zip(whole.parts, again.parts, strict=True):
        assert torch.equal(rows, others)
        for of in ("adapters", "moments", "memory"):
            for name, x in vars(ours)[of].items():
                assert torch.equal(x.nan_to_num(), vars(theirs)[of][name].nan_to_num()), name


def test_a_state_within_a_round_is_of_all_ranks_at_one_step(tmp_path: Path) -> None:
    told: list[State] = []
    down = "faults=[{down: 2, rounds: [1, 1]}]"
    job = made(DIFFERENT, down, "training.local_steps=3").job
    paused = replace(job, pausing=Pausing(2, lambda state: told.append(state.clone())))
    whole, kept = list(simulate(job))[-1], list(simulate(paused))[-1]
    assert [(state.round, state.step) for state in told] == [(0, 2), (1, 1), (2, 2)]
    for state in told:
        checkpoints.save_within(tmp_path, state, job.clients)
        loaded = checkpoints.load(tmp_path, job.state, job.clients, within=True)
        assert loaded is not None
        again = list(simulate(replace(job, state=loaded)))[-1]
        for own, one, other in zip(of_clients([whole]), of_clients([again]), of_clients([kept]), strict=True):
            assert all(torch.equal(x, one[name]) and torch.equal(x, other[name]) for name, x in own.items())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["lora.ranks=[4, 2]"], "lora.ranks: 2 ranks for 5 clients; give one for each"),
        (["lora.ranks={4: 2, 2: 2}"], "lora.ranks: 4 ranks for 5 clients; give one for each"),
        (["lora.ranks=[4, 2, 900, 4, 4]"], "lora.ranks: client 2's rank: 900 is above the size of "),
        ([DIFFERENT, "lora.rank_pattern={q_proj: 2}"], "lora.rank_pattern: is of ranks that all clients have alike"),
        (["lora.scaling=own"], "lora.scaling: is of ranks that differ; give lora.ranks, or leave it out"),
        ([DIFFERENT, "lora.init_lora_weights=pissa"], "lora.init_lora_weights: is a start of one rank"),
        ([DIFFERENT, "modifiers=[{name: shared_mask}]"], "algorithm: dec_lora with shared_mask needs one rank"),
        (["modifiers=[{name: zero_padded}]"], "algorithm: dec_lora with zero_padded needs ranks that differ"),
        (["modifiers=[{name: divided}]"], "algorithm: dec_lora with divided needs ranks that differ"),
        ([DIFFERENT, "evaluate.ensemble=true"], "lora: ranks needs unjudged messages"),
        ([DIFFERENT, "time={step_s: 1.0, deadline_s: 1.5}"], "time: deadline_s needs one rank"),
        ([DIFFERENT, "time={step_s: 1.0, mode: asynchronous}"], "time: mode asynchronous needs one rank"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(settings: list[str], line: str) -> None:
    with pytest.raises(PeertuneError) as error:
        made(*settings)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_ranks_are_dealt_by_the_seed() -> None:
    table = "lora.ranks={2: 2, 4: 3}"
    dealt = [made(table, f"seed={seed}").job.ranks for seed in (0, 0, 1, 2)]
    assert dealt[0] == dealt[1]
    assert len({tuple(ranks) for ranks in dealt}) > 1
    assert all(sorted(ranks) == [2, 2, 4, 4, 4] for ranks in dealt)
    run = made(table)
    assert run.resolved.lora.ranks == run.job.ranks, "a run that goes on has those that were dealt"
    values = json.loads(json.dumps({"lora": {"ranks": {2: 2, 4: 3}}}))
    assert load_recipe("digits-demo", [*SMALL, f"lora={json.dumps(values['lora'])}"]).lora.ranks == {2: 2, 4: 3}


def test_few_of_high_rank_cost_the_many_of_low_rank_nothing() -> None:
    clients, high, sites = 400, 4, 12
    ranks = [64] * high + [4] * (clients - high)
    optimizer, cohorts = adamw(0.9, 0.999, 1e-8, 0.0), []
    for rank in (4, 64):
        rows = (torch.tensor(ranks) == rank).nonzero()[:, 0]
        adapters = {f"{n}.A": torch.randn(len(rows), rank, 64) for n in range(sites)}
        adapters |= {f"{n}.B": torch.randn(len(rows), 64, rank) for n in range(sites)}
        own = State(adapters, optimizer.init(adapters), torch.zeros(len(rows), dtype=torch.int64))
        cohorts.append((rows, own.clone()))
    state = State.together(cohorts)
    given = made("clients=400", "graph={name: ring, activation: 0.6}", "partition={name: iid}").job
    bound = Bound({f"{n}": (8.0, 2.0) for n in range(sites)})
    job = replace(given, state=state, ranks=ranks, bound=bound, evaluate_every=99, rounds=99)
    turns = [turn_of(job, part, rows.tolist()) for rows, part in state.parts]
    begun = Begun(state, turns, range(clients), 0, job.algorithm.phase(0))
    came = [Came(*torch.zeros(2, part.clients)) for _, part in state.parts]
    with LiveBytes("cpu") as live:
        live.hold([[part.adapters, part.moments] for _, part in state.parts])
        held = live.now
        most = live.most(lambda: end(job, begun, came, partial(_exchange, job, range(clients))))
    least = 3 * sites * 4 * 2 * 64 * sum(ranks)
    assert least <= held <= 1.001 * least, "factors and moments, and AdamW's counts"
    assert most.taken <= 0.3 * held


@pytest.mark.parametrize("more", [("lora.scaling=own",), ("lora.use_rslora=true", "lora.alpha_pattern={v_proj: 5.0}")])
def test_each_adapter_is_written_with_its_own_rank_and_the_average_with_the_highest(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    settings = [*SMALL, DIFFERENT, *more]
    done = peertune.run("digits-demo", settings, out=tmp_path / "run")
    state, job = checkpoints.load(tmp_path / "run"), build(load_recipe("digits-demo", settings)).job
    assert state is not None
    folders = [*(f"client-{client:03d}" for client in range(5)), "average"]
    for name, own, rank in zip(folders, [*by_client(state.stacks), None], [*RANKS, 6], strict=True):
        folder = tmp_path / "run" / "adapters" / name
        base = AutoModelForImageClassification.from_pretrained(MODELS["digits-vit"], num_labels=5)
        peft = PeftModel.from_pretrained(base, str(folder))
        for site, layer in job.model.sites.items():
            told: Any = peft.get_submodule(f"base_model.model.{site}")
            assert told.r["default"] == rank
            assert told.scaling["default"] == pytest.approx(layer.scalings[rank])
            if own is not None:
                torch.testing.assert_close(told.lora_A["default"].weight.double(), own[f"{site}.A"][0].float().double())
    exported = done.export(tmp_path / "low", rank=2)
    assert 0 < exported.lost < 1
    whole, low = (load_file(at / "adapter_model.safetensors") for at in (folder, tmp_path / "low"))
    configs = [LoraConfig.from_pretrained(str(at)) for at in (folder, tmp_path / "low")]
    ratios = [config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r) for config in configs]
    assert ratios[0] == pytest.approx(ratios[1]), "the scale stays"
    lost, norm = 0.0, 0.0
    for a in (name for name in whole if "lora_A" in name):
        first, last = (at[a.replace("lora_A", "lora_B")] @ at[a] for at in (whole, low))
        best = torch.linalg.svd(first.double())
        torch.testing.assert_close(last.double(), (best.U[:, :2] * best.S[:2]) @ best.Vh[:2], rtol=1e-6, atol=1e-9)
        lost += float((first - last).square().sum())
        norm += float(first.square().sum())
    assert exported.lost == pytest.approx((lost / norm) ** 0.5, rel=1e-6)
    with pytest.raises(PeertuneError, match=r"^--rank: 9 is above the adapter's rank, 6; give at most that$"):
        done.export(tmp_path / "high", rank=9)
    assert not (tmp_path / "high").exists()
