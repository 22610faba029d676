"""The atlas of methods: its runs are what its protocol says, and its analysis finds what was put in."""

import json
import re
from math import log10
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
import torch

from benchmarks import atlas, studies
from benchmarks.atlas import METHODS, OF, Cell, cell_rho
from benchmarks.evidence import as_text, gathered
from peertune import load_recipe
from peertune.assembly.registry import build_partition, build_task, hold_out
from peertune.planning import evidence
from peertune.planning.advice import advise
from peertune.planning.evidence import PREDICTORS
from peertune.rounds.metrics import product_norm

GAIN = {"tad_lora": 0.0, "ffa_lora": -0.05, "fedrot_lora": 0.0, "dec_lora": 0.0, "local": -0.3, "server": 0.1}


def law(cell: Cell) -> tuple[float, float]:
    """The cross term of a cell, and by how much `tad_lora` is ahead there."""
    cross = cell.rate * cell.steps * (1.1 - cell.p)
    return cross, 0.1 * (log10(cross) + 1.5)


def keep(noise: float, seeds: int = 10) -> None:
    draw = Random(1)
    with (studies.KEPT / "atlas.jsonl").open("w") as file:
        for cell in atlas.cells():
            cross, gain = law(cell)
            for method in atlas.methods(cell):
                for seed in range(seeds):
                    score = 0.7 + GAIN[method] + gain * (method == "tad_lora") + draw.gauss(0, noise)
                    row = {"new": [score] * 10, "own": [], "probe": {"cross": cross, "A": cross**0.5, "B": cross**0.4}}
                    file.write(json.dumps({"run": atlas.named(cell, method, seed), **row}) + "\n")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "KEPT", tmp_path)


@pytest.mark.parametrize("skew", atlas.SKEWS)
def test_nobody_trains_on_what_scores_and_methods_differ_in_nothing_else(skew: str) -> None:
    scoring = []
    for seed in range(5):
        recipes = [
            load_recipe(OF.recipe, [*OF.settings, *atlas.settings(Cell(skew, p, 5, 0.01), method, seed)])
            for p, methods in ((0.1, METHODS), (0.0, tuple(atlas.ENDS)))
            for method in methods
        ]
        assert len({repr(one.model_copy(update={"algorithm": None, "graph": None})) for one in recipes}) == 1
        assert {one.clients for one in recipes} == {atlas.clients(skew)}
        task = build_task(recipes[0])
        dealt = dict(enumerate(build_partition(recipes[0], task)))
        trained, held_out = hold_out(recipes[0], dealt, len(task.train))
        if skew == "writers":
            assert all({*trained[k].tolist()}.isdisjoint(held_out[k].tolist()) for k in dealt)
            scoring.append({row for own in held_out.values() for row in own.tolist()})
        else:
            rows = {x.tobytes() for x in task.train.columns["pixel_values"]}
            scored = {x.tobytes() for x in task.validation.columns["pixel_values"]}
            assert len(rows & scored) <= 2  # two forms have a digit in common, drawn alike
            scoring.append(scored)
    assert not set.intersection(*scoring)
    assert len(set.union(*scoring)) > 4 * fmean(map(len, scoring))


def test_the_analysis_finds_the_law_that_was_put_in_and_nothing_where_there_is_none() -> None:
    keep(0.005)
    base = atlas.scores("dec_lora")
    assert len(base) == sum(cell.p > 0 for cell in atlas.cells())
    tad, none, all_of = (atlas.ahead(atlas.scores(method), base) for method in ("tad_lora", "fedrot_lora", "ffa_lora"))
    assert not atlas.discovered(none)
    assert atlas.discovered(all_of) == {*base}
    clear = {cell for cell in base if abs(law(cell)[1]) > 0.02}
    assert clear <= atlas.discovered(tad) < {*base}
    expected = atlas.foretold(tad, PREDICTORS["least squares"])
    assert expected.keys() == base.keys()
    assert max(abs(x - law(cell)[1]) for cell in base for x in expected[cell].values()) < 0.03
    server = atlas.ahead(atlas.scores("server"), base)
    assert server.keys() == base.keys()
    assert fmean(fmean(each.values()) for each in server.values()) == pytest.approx(0.1, abs=0.01)


def test_a_rate_is_chosen_by_seeds_that_do_not_score_it() -> None:
    low, high = (dict.fromkeys(OF.seeds, score) for score in (0.1, 0.5))
    cell = Cell("writers", 0.1, 1, 0.0)
    rates = sorted(OF.rates)
    first = dict.fromkeys(OF.seeds, 0.4) | dict.fromkeys(OF.seeds[:5], 0.6)  # best, by the first half alone
    found = {cell._replace(rate=rate): each for rate, each in zip(rates, (low, first, high), strict=True)}
    chosen = atlas.at_best_rate(found)
    assert chosen == {cell: dict.fromkeys(OF.seeds[:5], 0.5) | dict.fromkeys(OF.seeds[5:], 0.4)}
    del found[cell._replace(rate=rates[0])]
    assert not atlas.at_best_rate(found)


def test_the_atlas_says_of_how_many_runs_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keep(0.005, seeds=2)
    atlas.table()
    said = capsys.readouterr().out
    assert "108 of 540 seeds and cells" in said
    assert said.count("| 2 |") == 54
    assert not re.search(r"\| best \| \d+ \|", said)  # not all seeds are there
    atlas.draw(str(tmp_path / "map.svg"))
    assert len(re.findall(r"<!-- [+-]\d+\.\d -->", (tmp_path / "map.svg").read_text())) == 3 * 54


def test_where_there_is_a_law_it_is_found_and_advised_by_and_where_there_is_none_nothing_beats_the_mean() -> None:
    keep(0.005)
    found = gathered()
    assert found.laws["tad_lora"].by == "least squares"
    assert found.laws["tad_lora"].errors["least squares"] < found.laws["tad_lora"].errors["mean"] / 2
    assert found.laws["fedrot_lora"].by == "mean"
    for cell in {cell for cell in atlas.cells() if cell.p}:
        cross, gain = law(cell)
        seen = {"cross": cross, "A": cross**0.5, "B": cross**0.4}
        said = advise(found, [], cell_rho(cell), seen)
        assert said.method in (None, "tad_lora" if gain > 0 else "dec_lora")
        assert (said.method is not None) == (abs(said.foretold[0].difference) > found.laws["tad_lora"].within)
        if abs(gain) > 0.05:
            assert said.method is not None
        where = f"p={cell.p:g} steps={cell.steps} rate={cell.rate:g}"  # of two skews with as many clients
        assert said.near[0].name.endswith(where)
    assert advise(found, [], 0.5, {"cross": 0.9, "A": 0.1, "B": 0.1}).method is None


def test_a_law_is_judged_by_skews_that_it_was_not_fitted_to() -> None:
    keep(0.005)
    base = atlas.scores("dec_lora")
    tad = atlas.ahead(atlas.scores("tad_lora"), base)
    other = {cell: {seed: x + 1 for seed, x in each.items()} for cell, each in tad.items() if cell.skew == "writers"}
    for by in PREDICTORS.values():
        before, after = atlas.foretold(tad, by), atlas.foretold(tad | other, by)
        assert all(after[cell] == each for cell, each in before.items() if cell.skew == "writers")
        assert all(after[cell] != each for cell, each in before.items() if cell.skew != "writers")


def test_evidence_comes_back_from_its_file(tmp_path: Path) -> None:
    keep(0.005, seeds=2)
    (tmp_path / "evidence.json").write_text(as_text(gathered()))
    read = evidence.read(tmp_path / "evidence.json")
    assert as_text(read) == (tmp_path / "evidence.json").read_text()
    assert (read.runs, read.of, len(read.cells)) == (2520 // 5, 2520, 54)
    assert read.settings["training.learning_rate"] == sorted(OF.rates)
    assert {x.seeds for cell in read.cells for x in cell.differences.values()} == {2}


def test_too_few_runs_are_no_evidence() -> None:
    keep(0.005)
    file = studies.KEPT / "atlas.jsonl"
    lines = [line for line in file.read_text().splitlines() if "writers" in line]
    file.write_text("\n".join(lines) + "\n")
    said = advise(gathered(), [], 0.6, {"cross": 0.01, "A": 0.1, "B": 0.16})
    assert (said.method, said.foretold) == (None, [])


def test_the_norm_of_the_mean_product_is_that_of_the_products() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.A": (4, 2, 7), "q.B": (4, 5, 2), "v.A": (4, 2, 3), "v.B": (4, 40, 2), "classifier.head": (4, 3)}
    adapters = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    means = [(adapters[f"{site}.B"] @ adapters[f"{site}.A"]).mean(0) for site in "qv"]
    assert product_norm(adapters) == pytest.approx(float(torch.cat([x.flatten() for x in means]).norm()), rel=1e-5)
