"""The benchmarks run, compare like with like, and what the docs quote of them is what was measured."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from benchmarks import cluster, decaf, language, private, ranks, scale, smaller, studies, which
from benchmarks.against import parts_of_two
from benchmarks.gpu import save_base
from benchmarks.measure import Compared, Figure, figure, interleaved, machine
from benchmarks.peft_loop import PeftLoop, client_rows
from benchmarks.setup import dropout, make, model
from benchmarks.step import compare, useful_operations
from benchmarks.table import compared, table
from peertune import build, load_recipe
from peertune.assembly.registry import build_partition, build_task, check_choices, hold_out
from peertune.method import standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.rounds.training import train_local

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))


@pytest.fixture
def sst2(little_glue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little of SST-2, where the benchmarks look for it."""
    monkeypatch.setenv("SST2", str(little_glue / "sst2"))


def test_a_figure_is_the_median_with_its_spread_and_knows_whether_its_target_is_met() -> None:
    found = figure("speed", [3.0, 1.0, 10.0], "×", "≥ 3")
    assert found == Figure("speed", 3.0, 1.0, 10.0, "×", 3, "≥ 3")
    assert found.met
    assert not figure("share", [5.1], "%", "≤ 5").met
    assert figure("time", [1.0], "s").met is None


def test_actions_are_timed_in_turn_and_the_warm_up_is_not_counted() -> None:
    calls: list[tuple[str, int]] = []
    times = interleaved({name: lambda turn, name=name: calls.append((name, turn)) for name in "ab"}, 2, warmup=1)  # type: ignore[misc]
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_a_table_says_what_was_missed() -> None:
    text = table([figure("speed", [2.5, 1.5, 2.0], "×", "≥ 3", "a note").json(), figure("time", [1234.5], "s").json()])
    assert text.splitlines()[2:] == [
        "| speed | 2 × | 1.5 – 2.5 | ≥ 3 | **missed**; a note |",
        "| time | 1,234 s | one run |  |  |",
    ]


def test_two_builds_are_compared_turn_by_turn() -> None:
    sides = [[Figure("a step", x, x, x, "s", 1) for x in taken] for taken in ((4.0, 6.0, 5.0), (2.0, 2.0, 2.0))]
    assert compared([Compared(*sides)]).splitlines()[2:] == ["| a step | 5 s | 2 s | 2.5 × | 2 – 3 |"]
    assert parts_of_two(["step", "start", "wire", "evaluation"]) == ["step", "start", "evaluation"]


@pytest.mark.parametrize("fold", [1, 5])
def test_no_row_that_scores_a_method_is_in_a_run_that_chooses_its_rate(fold: int) -> None:
    of = studies.STUDIES["digits"]
    parts = {}
    for choosing in (True, False):
        asked = load_recipe(of.recipe, [*of.settings, studies.held_out("digits", fold, choosing)])
        task = build_task(asked)
        dealt = dict(enumerate(build_partition(asked, task)))
        parts[choosing] = hold_out(asked, dealt, len(task.train))
    for client, own in dealt.items():
        scoring = set(parts[False][1][client].tolist())
        assert scoring.isdisjoint([*parts[True][0][client], *parts[True][1][client]])
        assert scoring | set(parts[False][0][client].tolist()) == set(own.tolist())
    assert not set(of.seeds) & set(which.CHOOSING)
    text = [load_recipe("tad-sst2-minilm", [studies.held_out("sst2", 1, choosing)]) for choosing in (True, False)]
    assert [each.evaluate.fold for each in text] == ["1/2", "2/2"]


def test_the_study_has_every_method_and_takes_the_best_rate_that_never_diverged() -> None:
    found = list(which.cells("digits"))
    assert {cell.method for cell in found} == set(ALGORITHMS)
    assert len(found) == len(set(found)) == 2 * len(ALGORITHMS) - 1 + 3

    def rows(*scores: list[float]) -> list[dict[str, list[float]]]:
        return [{"own": each} for each in scores]

    changed = [cell.method for cell in which.cells("changes") if cell not in found]
    assert sorted(changed) == sorted(2 * [*which.CHANGES])
    for setting in which.CHANGES.values():
        check_choices(load_recipe("digits-demo", ["algorithm.name=dec_lora", setting]))

    tried = {0.1: rows([0.9, 0.9], []), 0.02: rows([0.5, 0.7], [0.6, 0.6]), 0.01: rows([0.7, 0.5], [0.6, 0.6])}
    assert which.best("digits", tried) == 0.01


def test_a_paired_difference_says_where_its_interval_is_too_wide() -> None:
    one, other = {0: 0.5, 1: 0.6, 2: 0.7, 9: 0.0}, {0: 0.4, 1: 0.5, 2: 0.6}
    assert studies.paired(one, other) == "+0.100 [+0.100, +0.100]"
    # differences -.09, .01, .11: Student's quantile with two degrees of freedom is 4.303, by sqrt(3) 2.484
    assert studies.paired({0: 0.31, 1: 0.51, 2: 0.71}, other) == "+0.010 [-0.238, +0.258], not enough to tell"
    assert studies.paired({0: 0.402, 1: 0.501, 2: 0.6}, other) == "+0.001 [-0.001, +0.003]"


def test_a_smaller_message_meets_its_target_by_the_intervals_upper_end() -> None:
    whole, row = {0: 0.5, 1: 0.6, 2: 0.7, 9: 0.0}, {0: 0.49, 1: 0.59, 2: 0.69}
    assert smaller.lost(whole, row) == pytest.approx((0.01, 0.01, 0.01))
    told = [
        smaller.verdict(times, upper) for times, upper in ((3.9, 0.0), (4, 0.01), (7.9, 0.011), (8, 0.02), (9, 0.021))
    ]
    assert told == [
        "–",
        "≥ 4 ×, ≤ 0.01: met",
        "≥ 4 ×, ≤ 0.01: **missed**",
        "≥ 8 ×, ≤ 0.02: met",
        "≥ 8 ×, ≤ 0.02: **missed**",
    ]


def test_every_row_of_smaller_messages_is_a_recipe_and_counts_a_message_with_its_header() -> None:
    of, sizes = studies.STUDIES["digits"], {}
    for name, modifiers in smaller.ROWS.items():
        asked = [*of.settings, "algorithm.name=dec_lora", f"modifiers=[{modifiers}]"]
        sizes[name] = smaller.message_bytes(build(load_recipe(of.recipe, asked)).job)["message_bytes"]
    assert sizes["whole"] == max(sizes.values())
    assert sizes["int4 quarter"] == min(sizes.values())


def test_ranks_come_to_what_is_kept() -> None:
    way = "factors, slices, one frame"
    found, kept = ranks.come_to("complete", ranks.WAYS[way]), studies.Kept("ranks").rows[f"complete; {way}"]
    for r, far in found["far"].items():
        assert far == pytest.approx(kept["far"][r], rel=1e-6)


def test_a_round_of_ranks_is_the_same_in_slices_and_whole_where_nobody_lacks_anything() -> None:
    draw = torch.Generator().manual_seed(0)
    n, sizes = len(ranks.RANKS), {"site.A": (16, 5), "site.B": (7, 16)}
    pairs = {name: torch.randn(n, *size, generator=draw, dtype=torch.float64) for name, size in sizes.items()}
    has = torch.arange(16) < ranks.RANKS[:, None]
    pairs = {"site.A": pairs["site.A"] * has[..., None], "site.B": pairs["site.B"] * has[:, None]}
    alike = (ranks.RANKS[:, None] == ranks.RANKS).double()
    weights = alike / alike.sum(1, keepdim=True)  # each hears those of its own rank
    slices, whole, divided = (ranks.mixed(mixer, pairs, weights, 0) for mixer in ranks.AVERAGES.values())
    for name, x in slices.items():
        torch.testing.assert_close(whole[name], x)
        torch.testing.assert_close(divided[name], x)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_docs_quote_the_figures_that_were_measured(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    text = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("performance.md", "scale.md"))
    assert path.name in text
    for figures in results["figures"].values():
        for line in table(figures).splitlines()[2:]:
            assert line in text
    assert {"cpu", "cores", "threads", "torch"} <= set(results["machine"])


@pytest.mark.usefixtures("sst2")
@pytest.mark.thorough
def test_the_benchmark_of_many_clients_and_processes_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    figures = {found.name: found for found in cluster.run(repeats=1, sizes=(9, 12), shared=[(9, 1, 2)])}
    assert figures["a client's step of 2 rows, 12 clients"].value > 0
    assert figures["a round of 18 clients in 2 processes, 1 × 2 rows"].value > 0
    assert 0 < figures["the exchange's share of a round of 18 clients in 2 processes, 1 × 2 rows"].value < 100


def test_the_machine_is_described() -> None:
    found = machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["torch"] == torch.__version__


@pytest.mark.thorough
@pytest.mark.parametrize("name", scale.SIMULATED)
def test_the_benchmark_of_scale_measures_and_finds_what_rho_says(name: str) -> None:
    settings = scale.SIMULATED[name][1]
    found = {one.name.partition(" (")[0]: one for one in scale.simulate(name, 64, settings, 6)}
    assert found["left by a later round"].met is (None if name == "exponential" else True)  # rho bounds its period
    assert found["change of the mean in 6 rounds"].met
    if name == "ring":
        slowest = found["1 - what a round leaves of the slowest disagreement"]
        assert slowest.low == pytest.approx(slowest.high)
        assert slowest.value == pytest.approx(found["1 - rho"].value)
    if name == "exponential":
        assert found["1 - rho"].value == pytest.approx(1)
        assert found["rounds to 1 % of the disagreement, by rho"].value == 6
    if name == "erdos_renyi":
        assert found["1 - rho at most, by one peer's row"].value >= found["1 - rho"].value
    one, *_ = scale.row("complete", 64, {"mean_degree": 5}, 3)
    assert one.runs == 3


def test_bytes_of_an_adapter_are_those_of_its_shapes() -> None:
    config = AutoConfig.from_pretrained(model())
    assert scale.ADAPTERS["MiniLM-L6"] == (config.num_hidden_layers, config.hidden_size)
    assert scale.adapter_bytes(*scale.ADAPTERS["MiniLM-L6"]) == 6 * 2 * 8 * (384 + 384) * 4


@pytest.mark.thorough
def test_decafs_benchmark_checks_and_beats_the_dense_svd() -> None:
    *_, speed = decaf.run(repeats=1)
    assert speed.value > 1


@pytest.mark.thorough
def test_the_benchmark_of_language_models_checks_and_measures(tmp_path: Path) -> None:
    language.save_base(tmp_path, language.Shape(32, 48, layers=2, heads=4, groups=2))
    setup = language.make(tmp_path, 32, "model.dtype=float32", "training.gradient_checkpointing=true")
    loop, ours, speed = language.compare(setup, "tiny", 1)
    assert min(loop.value, ours.value, speed.value) > 0
    assert ours.note == "320 tokens a step"


@pytest.mark.usefixtures("sst2")
@pytest.mark.thorough
class TestStep:
    """The comparison, on a tiny base."""

    @pytest.fixture
    def settings(self, tmp_path: Path) -> list[str]:
        save_base(tmp_path, hidden_size=32, layers=2, heads=2)
        return [
            f"model.name={tmp_path}",
            "model.dtype=float32",
            "clients=3",
            "partition={name: iid}",
            "algorithm.name=dec_lora",
            "training.local_steps=1",
        ]

    @pytest.mark.parametrize("on", [False, True])
    def test_it_measures_all_three_and_the_hardware(self, settings: list[str], on: bool) -> None:
        figures = compare(make(*settings, *dropout(on)), "here", ("≥ 0", "≥ 0"), 1)
        assert len(figures) == (8 if on else 10)
        assert all(found.value > 0 for found in figures)

    def test_the_loop_and_peertune_train_the_same(self, settings: list[str]) -> None:
        setup = make(*settings, "training.learning_rate=0.01", "training.max_grad_norm=0", *dropout(False))
        job, state = setup.job, setup.job.state.clone()
        loop = PeftLoop(setup, dtype=torch.float32, attention="eager")
        with torch.no_grad():
            for name, x in loop.model.named_parameters():
                if "lora_A" in name:  # ours start alike for all clients; PEFT draws
                    site = name.removeprefix("base_model.model.").partition(".lora_A")[0]
                    x.copy_(state.adapters[f"{site}.A"][0])
        for step in range(3):
            (batches,) = job.steps(range(3), [step] * 3)
            theirs = loop.step(client_rows(batches, 3))
            ours = train_local(
                job.model,
                state,
                [batches],
                job.algorithm.phase(0),
                job.optim,
                standing(job.clients, state.at(step).rounds),
            ).loss
            torch.testing.assert_close(ours, torch.tensor(theirs).double(), rtol=1e-4, atol=1e-5)

    def test_the_loop_that_packs_trains_what_the_loop_that_pads_does(self, settings: list[str]) -> None:
        setup = make(*settings, *dropout(False))
        (batches,) = setup.job.steps(range(3), [0] * 3)
        losses = []
        for packed in (False, True):
            torch.manual_seed(0)  # for PEFT's own draws
            loop = PeftLoop(setup, dtype=torch.float32, attention="eager", packed=packed)
            losses.append([loop.step(client_rows(batches, 3)) for _ in range(3)])
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)

    def test_useful_operations_are_those_of_a_count_by_hand(self, settings: list[str]) -> None:
        setup = make(*settings, *dropout(False))
        (batches,) = setup.job.steps(range(3), [0] * 3)
        lengths = torch.cat([batch.inputs["attention_mask"].sum(1) for batch in batches]).double()
        tokens, rows = float(lengths.sum()), len(lengths)
        block = 4 * 32 * 32 + 2 * 32 * 128  # weights of an attention and a feed-forward part
        frozen = 2 * tokens * (2 * 2 * block - 3 * 32 * 32)  # two layers, both ways, but for the first block's q, k, v
        head = 2 * 2 * rows * (32 * 32 + 32 * 2)
        factors = 3 * 2 * tokens * 4 * 8 * (32 + 32)
        attention = 2 * 3 * 2 * 2 * float(lengths.square().sum()) * 32
        assert useful_operations(setup.job.model, batches) == pytest.approx(frozen + head + factors + attention)


@pytest.mark.usefixtures("sst2")
@pytest.mark.thorough
def test_the_benchmark_of_private_steps_holds_its_sums_against_opacus_and_measures(tmp_path: Path) -> None:
    save_base(tmp_path, hidden_size=32, layers=2, heads=2)
    settings = [*private.SETTINGS, f"model.name={tmp_path}", "clients=3", "partition={name: iid}"]
    handlers = logging.root.handlers[:]
    figures = private.compare(settings, ("≥ 0", "≥ 0"), 1)
    assert logging.root.handlers == handlers
    assert len(figures) == 5
    assert all(found.value > 0 for found in figures)
