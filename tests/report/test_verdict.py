"""What is said of which setting is best, against intervals worked out by hand."""

from math import sqrt
from statistics import stdev
from typing import Any

import pytest
from scipy.stats import t

from peertune.report import tables
from peertune.report.runs import RunData
from peertune.report.verdict import ordered, verdicts

from .test_tables import METHODS, made


def said(runs: list[RunData]) -> list[str]:
    return [str(verdict) for verdict in verdicts(tables.grouped(runs))]


def test_a_lead_within_the_seeds_noise_says_how_many_more_would_tell() -> None:
    by_mean, by_average = verdicts(tables.grouped(METHODS))
    assert (by_mean.best, by_mean.next) == ("tad_lora", "dec_lora")
    assert by_mean.score == pytest.approx(0.76)
    differences = [0.05, 0.02, 0.11]
    half = t.ppf(0.975, 2) * stdev(differences) / sqrt(3)
    assert by_mean.lead == pytest.approx({"difference": 0.06, "low": 0.06 - half, "high": 0.06 + half, "seeds": 3})
    needed = next(n for n in range(4, 99) if t.ppf(0.975, n - 1) * stdev(differences) / sqrt(n) < 0.06)
    assert by_mean.seeds_needed == needed
    assert not by_mean.sure
    assert str(by_mean) == (
        f"the clients' own models: tad_lora is best, 0.76, by 0.060 before dec_lora [-0.054, 0.174]: not enough seeds "
        f"to tell, about {needed - 3} more would"
    )
    assert by_average.seeds_needed is None, "no number of seeds tells equals apart"
    assert str(by_average).endswith("not enough seeds to tell")


def test_a_lead_beyond_the_noise_is_one() -> None:
    better = [
        made(f"c{seed}", [(score, 0.9)], algorithm__name="decaf", seed=seed)
        for seed, score in enumerate((0.71, 0.82, 0.9))
    ]
    (line, _) = said([*METHODS[:3], *better])
    assert line.startswith("the clients' own models: decaf is best, 0.81, by 0.110 before dec_lora [0.0")
    assert line.endswith(": more than the noise of 3 seeds")


def test_one_seed_and_seeds_of_their_own_can_not_tell() -> None:
    (line, _) = said([METHODS[0], METHODS[3]])
    assert line.endswith("tad_lora is best, 0.650, by 0.050 before dec_lora; one seed can't tell whether that is noise")
    (line, _) = said([METHODS[0], METHODS[4]])
    assert line.endswith("dec_lora is next, and has no seed in common with it")


def test_methods_are_judged_on_each_graph_by_itself_and_settings_of_one_method_together() -> None:
    sparse = [
        made(f"{name}-sparse", [(score, score)], graph__activation=0.02, algorithm__name=name)
        for name, score in (("dec_lora", 0.3), ("tad_lora", 0.2))
    ]
    lines = said([METHODS[0], METHODS[3], *sparse])
    assert [line.partition(" is best")[0] for line in lines] == [
        "activation 0.5, the clients' own models: tad_lora",
        "activation 0.5, the averaged adapter: dec_lora",
        "activation 0.02, the clients' own models: dec_lora",
        "activation 0.02, the averaged adapter: dec_lora",
    ]
    (line, _) = said([METHODS[0], sparse[0]])
    assert line.startswith("the clients' own models: 0.5 is best, 0.600, by 0.300 before 0.02")
    assert said([METHODS[0]]) == []


def test_a_loss_is_best_where_it_is_least_and_rows_stand_so() -> None:
    runs = [
        made(f"{name}{seed}", [(score + seed / 9, 0.5)], algorithm__name=name, seed=seed)
        for name, score in (("decaf", 3.0), ("local", 2.0))
        for seed in (0, 1)
    ]
    for run in runs:
        for record in run.records:
            record["evaluation"]["metric"] = "perplexity"
    rows = tables.grouped(runs)
    assert [row["by"]["algorithm.name"] for row in ordered(rows)] == ["local", "decaf"]
    assert [row["by"]["algorithm.name"] for row in ordered(tables.grouped(METHODS))] == ["tad_lora", "dec_lora"]
    best = verdicts(rows)[0]
    assert (best.best, best.lead["difference"], best.sure) == ("local", pytest.approx(1.0), True)


def test_how_unlike_clients_are_is_shown_where_it_is_asked_for() -> None:
    records = made("x", [(0.5, 0.5)]).records
    records[0]["evaluation"]["clients"] = [0.1, 0.2, *[0.9] * 18, 0.8]
    row = tables.summarise(records)
    assert row["worst_tenth"] == pytest.approx((0.1 + 0.2 + 0.8) / 3)
    records[0]["evaluation"]["metric"] = "perplexity"
    assert tables.summarise(records)["worst_tenth"] == pytest.approx(0.9)
    assert not {"spread", "worst_tenth"} & set(tables.measured(tables.grouped(METHODS)))


def test_each_metric_is_judged_by_itself_and_named_where_there_are_several(make_run: Any) -> None:
    runs = [make_run(f"{m}{seed}", method=m, seed=seed, also=("macro_f1",)) for m in "ab" for seed in (0, 1)]
    for run in runs[:2]:  # a is the better one by the second metric alone
        (also,) = run.records[-1]["evaluation"]["also"]
        run.records[-1]["evaluation"]["also"] = [also | {"clients": [0.9 for _ in also["clients"]]}]
    judged = [one for one in verdicts(tables.grouped(runs)) if one.measure == "mean"]
    assert [one.metric for one in judged] == ["accuracy", "macro_f1"]
    by_first, by_second = judged
    assert by_second.best == "a"
    assert by_second.score == pytest.approx(0.9)
    assert by_second.lead["difference"] > 0 == by_first.lead["difference"]
    assert str(by_second).startswith("macro_f1, the clients' own models: a is best, 0.90, by ")
