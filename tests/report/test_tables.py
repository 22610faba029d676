"""Tables of runs, against means and intervals worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from peertune.errors import RunError
from peertune.report import tables
from peertune.report.runs import RunData


def made(name: str, scores: list[tuple[float, float]], **settings: Any) -> RunData:
    """A run of two clients; `scores` are their mean accuracy and that of the average at each evaluation."""
    recipe: dict[str, Any] = {
        "seed": settings.pop("seed", 0),
        "task": {"name": "glue", "config": "sst2"},
        "algorithm": {"name": "dec_lora"},
        "graph": {"activation": 0.5},
    }
    for key, value in settings.items():
        block, _, last = key.partition("__")
        recipe[block] = recipe[block] | {last: value} if last else value
    records = [
        {
            "round": t,
            "clients": [0, 1],
            "evaluation": {"metric": "accuracy", "clients": [own - 0.1, own + 0.1], "average": average, "rows": 4},
            "diagnostics": {"consensus_error_A": 1.0, "consensus_error_B": 2.0, "cross_term": 0.25},
            "bytes_sent": [1_000_000, 3_000_000],
            "seconds": {"train": 2.0},
        }
        for t, (own, average) in enumerate(scores)
    ]
    return RunData(Path(name), name, recipe, {}, {}, records)


METHODS = [
    made("a0", [(0.9, 0.7), (0.6, 0.8)]),
    made("a1", [(0.5, 0.7), (0.7, 0.9)], seed=1),
    made("a2", [(0.5, 0.7), (0.8, 0.7)], seed=2),
    made("b0", [(0.5, 0.7), (0.65, 0.8)], algorithm__name="tad_lora", algorithm__switch_every=5),
    made("b1", [(0.5, 0.7), (0.72, 0.9)], algorithm__name="tad_lora", algorithm__switch_every=5, seed=1),
    made("b2", [(0.5, 0.7), (0.91, 0.7)], algorithm__name="tad_lora", algorithm__switch_every=5, seed=2),
]


def test_seeds_come_together_and_settings_make_rows() -> None:
    first, second = tables.compare(METHODS)
    assert first["by"] == {"algorithm.name": "dec_lora"}
    assert second["by"] == {"algorithm.name": "tad_lora"}
    assert (first["seeds"], first["runs"], first["metric"]) == ([0, 1, 2], ["a0", "a1", "a2"], "accuracy")
    assert first["measures"]["mean"] == {"mean": pytest.approx(0.7), "std": pytest.approx(0.1)}
    assert first["measures"]["best"] == {"mean": pytest.approx(0.8), "std": pytest.approx(0.1)}
    assert first["measures"]["min"]["mean"] == pytest.approx(0.6)
    assert first["measures"]["average"]["mean"] == pytest.approx(0.8)
    assert first["measures"]["best_average"] == {"mean": pytest.approx(0.8), "std": pytest.approx(0.1)}
    assert first["measures"]["megabytes_sent"] == {"mean": 4.0, "std": 0.0}
    assert first["measures"]["seconds"]["mean"] == 4.0


def test_paired_differences_are_taken_seed_by_seed_with_students_interval() -> None:
    first, second = tables.compare(METHODS, by=["algorithm.name"], paired_with="dec_lora")
    assert first["paired"] is None
    # differences .05, .02, .11: mean .06, standard deviation .0458, t(.975, 2) = 4.303
    found = second["paired"]["mean"]
    assert found["difference"] == pytest.approx(0.06)
    assert found["high"] - found["difference"] == pytest.approx(4.30265 * 0.0458258 / 3**0.5, rel=1e-4)
    assert found["difference"] - found["low"] == pytest.approx(found["high"] - found["difference"])
    assert second["paired"]["average"] == {"difference": 0, "low": 0, "high": 0, "seeds": 3}


def test_only_seeds_that_both_have_are_paired() -> None:
    _, second = tables.compare(METHODS[1:], by=["algorithm.name"], paired_with="dec_lora")
    assert second["paired"]["mean"]["seeds"] == 2
    assert second["paired"]["mean"]["difference"] == pytest.approx(0.065)
    _, second = tables.compare([METHODS[0], METHODS[3]], paired_with="dec_lora")
    assert second["paired"]["mean"] == {"difference": pytest.approx(0.05), "low": None, "high": None, "seeds": 1}


def test_a_partner_agrees_in_all_other_blocks() -> None:
    sparse = [
        made("c0", [(0.3, 0.5)], graph__activation=0.1),
        made("d0", [(0.4, 0.5)], graph__activation=0.1, algorithm__name="tad_lora"),
    ]
    rows = tables.compare([*METHODS, *sparse], by=["algorithm.name", "graph.activation"], paired_with="dec_lora")
    found = {(row["by"]["algorithm.name"], row["by"]["graph.activation"]): row["paired"] for row in rows}
    assert found["dec_lora", 0.5] is found["dec_lora", 0.1] is None
    assert found["tad_lora", 0.1]["mean"]["difference"] == pytest.approx(0.1)
    assert found["tad_lora", 0.5]["mean"]["difference"] == pytest.approx(0.06)


def test_traffic_and_time_are_of_the_whole_run_and_disagreement_is_the_last() -> None:
    run = made("a", [(0.5, 0.5), (0.6, 0.6), (0.7, 0.7)])
    for record, sent, seconds, error in zip(run.records, (1, 2, 6), (1.0, 2.0, 6.0), (4.0, 3.0, 0.5), strict=True):
        record["bytes_sent"] = [sent * 1_000_000, sent * 3_000_000]
        record["seconds"] = {"train": seconds, "mix": 0.5}
        record["diagnostics"]["consensus_error_A"] = error
    row = tables.summarise(run.records)
    assert (row["rounds"], row["megabytes_sent"], row["seconds"]) == (3, 18.0, 10.5)
    assert (row["consensus_error_A"], row["cross_term"]) == (0.5, 0.25)
    assert (row["mean"], row["min"], row["max"], row["spread"]) == pytest.approx((0.7, 0.6, 0.8, 0.1))


def test_a_client_that_was_there_in_some_rounds_counts_among_those_that_sent() -> None:
    run = made("a", [(0.5, 0.5), (0.6, 0.6)])
    run.records[1] |= {"clients": [1], "bytes_sent": [2_000_000]}
    assert tables.summarise(run.records)["megabytes_sent"] == 3.0


def test_one_seed_has_no_spread_and_a_run_without_evaluation_no_score() -> None:
    (row,) = tables.compare([METHODS[0]])
    assert row["by"] == {"algorithm.name": "dec_lora"}
    assert row["measures"]["mean"] == {"mean": pytest.approx(0.6), "std": None}
    (empty,) = tables.compare([made("begun", [])])
    assert empty["measures"]["mean"] == {"mean": None, "std": None}
    assert tables.compared([empty], ["mean", "seconds"])[1] == ["dec_lora", "-", "-"]


def test_a_run_that_is_not_finished_is_named(caplog: pytest.LogCaptureFixture) -> None:
    tables.compare([made("half", [(0.5, 0.5)], rounds=2), made("whole", [(0.5, 0.5)], rounds=1, seed=1)], by=["seed"])
    assert caplog.messages == ["half is not finished: it has 1 of 2 rounds"]


def test_lines_say_mean_and_spread_and_intervals() -> None:
    rows = tables.compare(METHODS, by=["algorithm.name"], paired_with="dec_lora")
    assert tables.compared(rows, ["mean", "average"]) == [
        ["algorithm", "seeds", "mean", "average"],
        ["dec_lora", "3", "0.70 ± 0.10", "0.80 ± 0.10"],
        ["tad_lora", "3", "0.76 ± 0.13", "0.80 ± 0.10"],
    ]
    assert tables.paired(rows, ["mean"]) == [
        ["algorithm", "seeds", "mean"],
        ["tad_lora", "3", "+0.060 [-0.054, +0.174]"],
    ]
    rows = tables.compare([METHODS[0], METHODS[3]], by=["algorithm.name", "algorithm.switch_every"])
    assert tables.compared(rows, ["mean"])[0] == ["algorithm", "switch_every", "mean"]


def test_markdown_and_latex_hold_the_same_cells() -> None:
    lines = [["algorithm", "mean"], ["dec_lora", "0.7 ± 0.1"]]
    assert tables.markdown(lines) == "| algorithm | mean |\n| --- | ---: |\n| dec_lora | 0.7 ± 0.1 |"
    assert tables.latex(lines).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"algorithm & mean \\",
        r"\midrule",
        r"dec\_lora & 0.7 $\pm$ 0.1 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize(
    ("runs", "by", "paired_with", "complaint"),
    [
        (
            [METHODS[0], made("m", [], task__config="mnli")],
            None,
            None,
            "these runs can't be compared: a0 has task.config=sst2 and m has task.config=mnli; give runs of one task",
        ),
        (METHODS, ["graph.activation"], None, "a0 and b0 have the same seed, 0; they differ in algorithm.name, "),
        ([METHODS[0], made("again", [])], None, None, "a0 and again have the same seed, 0; give each run once"),
        (METHODS, ["graph.activaton"], None, "--by: unknown key 'graph.activaton', did you mean graph.activation?"),
        (METHODS, None, "rolora", "--paired-with: no run has rolora; choose from "),
    ],
)
def test_what_can_not_be_compared_is_refused(
    runs: list[RunData], by: list[str] | None, paired_with: str | None, complaint: str
) -> None:
    with pytest.raises(RunError) as caught:
        tables.compare(runs, by, paired_with)
    assert complaint in str(caught.value)


def test_runs_of_two_tasks_are_compared_where_the_task_makes_rows() -> None:
    rows = tables.compare([METHODS[0], made("m", [(0.3, 0.3)], task__config="mnli")], by=["task.config"])
    assert [row["by"]["task.config"] for row in rows] == ["sst2", "mnli"]


def test_a_partner_agrees_in_the_other_settings_of_its_block() -> None:
    grid = [
        made(f"{rate}-{steps}", [(rate + steps, 0.5)], training={"learning_rate": rate, "local_steps": steps})
        for rate in (0.1, 0.2)
        for steps in (0.3, 0.6)
    ]
    rows = tables.compare(grid, paired_with="0.1")
    found = {tuple(row["by"].values()): row["paired"] for row in rows}
    assert found[0.1, 0.3] is found[0.1, 0.6] is None
    assert [found[0.2, steps]["mean"]["difference"] for steps in (0.3, 0.6)] == pytest.approx([0.1, 0.1])


def test_a_reference_that_is_several_rows_is_refused() -> None:
    adf = [made(f"t{t}", [(0.5, 0.5)], algorithm={"name": "adf_lora", "switch_every": t}) for t in (3, 5)]
    with pytest.raises(RunError, match="--paired-with: adf_lora stands in 2 rows that"):
        tables.compare([METHODS[0], *adf], paired_with="adf_lora")


@pytest.mark.parametrize(
    "settings",
    [
        {"report_to": ["wandb"]},
        {"checkpoint": {"every": 1, "keep": 9}},
        {"network": {"patience_s": 1.0, "when_alone": "wait", "when_refused": "train"}},
        {"training": {"tokens_per_pass": 99, "clients_per_pass": 2, "gradient_checkpointing": True}},
    ],
)
def test_what_can_not_change_a_number_tears_no_seeds_apart(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    alike = made("other", [(0.5, 0.5)], seed=1, **settings)
    (row,) = tables.compare([METHODS[0], alike])
    assert row["seeds"] == [0, 1]
    rows = tables.compare([METHODS[0], alike, METHODS[3]], paired_with="dec_lora")
    assert rows[1]["paired"]["mean"]["seeds"] == 1
    assert caplog.messages == []
    assert [row["by"] for row in tables.compare([METHODS[0], alike], by=["seed"])] == [{"seed": 0}, {"seed": 1}]


def test_how_long_peers_wait_is_a_setting_of_theirs() -> None:
    waited = [made(f"{s}", [(0.5, 0.5)], network={"patience_s": s, "bound": s > 1}) for s in (1.0, 9.0)]
    assert [row["by"] for row in tables.compare(waited)] == [{"network.bound": False}, {"network.bound": True}]
    for run in waited:
        run.facts["peers"] = [{"client": 0, "name": "a", "federation": "f"}]
    assert tables.compare(waited)[0]["by"] == {"network.bound": False, "network.patience_s": 1.0}


def test_a_pairing_that_finds_no_pair_says_what_stands_in_the_way(caplog: pytest.LogCaptureFixture) -> None:
    sparse = made("s", [(0.5, 0.5)], graph__activation=0.1, algorithm__name="tad_lora")
    with pytest.raises(RunError) as caught:
        tables.compare([METHODS[0], sparse], paired_with="dec_lora")
    assert str(caught.value) == (
        "--paired-with: nothing pairs with dec_lora: s and a0 differ: graph.activation is 0.1 here and 0.5 there"
    )
    rows = tables.compare([METHODS[0], METHODS[3], sparse], paired_with="dec_lora")
    assert [row["paired"] is None for row in rows] == [True, False, True]
    assert caplog.messages == [
        "--paired-with: s and a0 differ: graph.activation is 0.1 here and 0.5 there; it is left out"
    ]
    with pytest.raises(RunError, match=r"nothing pairs with dec_lora: b1 has seeds \[1\], and a0 \[0\]"):
        tables.compare([METHODS[0], METHODS[4]], paired_with="dec_lora")
    with pytest.raises(RunError, match=r"all rows have algorithm\.name=dec_lora; give runs of another value as well"):
        tables.compare(METHODS[:3], paired_with="dec_lora")


def test_a_row_that_holds_more_than_seeds_is_named(caplog: pytest.LogCaptureFixture) -> None:
    tables.compare([METHODS[0], made("x", [(0.5, 0.5)], seed=1, graph__activation=0.1)], by=["algorithm.name"])
    assert caplog.messages == ["a0 and 1 more make one row, though they differ in graph.activation; put that into --by"]


def test_an_interval_that_follows_from_the_rest_tears_no_seeds_apart() -> None:
    auto = [made(f"s{t}", [(0.5, 0.5)], algorithm={"name": "tad_lora", "switch_every": t}, seed=t) for t in (5, 6)]
    (row,) = tables.compare(auto)
    assert (row["by"], row["seeds"]) == ({"algorithm.name": "tad_lora"}, [5, 6])
    alike = made("t7", [(0.5, 0.5)], algorithm={"name": "tad_lora", "switch_every": 7}, seed=5)
    assert [row["by"] for row in tables.compare([auto[0], alike])] == [{"algorithm.switch_every": t} for t in (5, 7)]


def test_of_perplexity_the_lowest_is_the_best() -> None:
    run = made("a", [(9.0, 8.0), (4.0, 5.0), (6.0, 7.0)])
    for record in run.records:
        record["evaluation"]["metric"] = "perplexity"
    row = tables.summarise(run.records)
    assert (row["mean"], row["best"], row["best_round"], row["best_average"]) == (6.0, 4.0, 1, 5.0)


def test_other_metrics_have_the_measures_that_are_scores_and_choose_nothing(make_run: Any) -> None:
    runs = [make_run(f"{m}{seed}", method=m, seed=seed, also=("macro_f1", "f1 of no")) for m in "ab" for seed in (0, 1)]
    final = runs[0].records[-1]["evaluation"]
    row = tables.summarise(runs[0].records)
    assert [also["metric"] for also in row["also"]] == ["macro_f1", "f1 of no"]
    for also in row["also"]:
        assert also["mean"] == pytest.approx(row["mean"] - 0.2)
        assert also["average"] == pytest.approx(final["average"] - 0.2)
        assert (also["constant"], row["constant"]) == (0.3, 0.5)
    rows = tables.grouped(runs)
    for name, alike in tables.by_metric(rows):
        assert [each["by"] for each in alike] == [each["by"] for each in rows]
        for first, other in zip(rows, alike, strict=True):
            assert other["metric"] == name
            assert other["measures"]["mean"]["mean"] == pytest.approx(first["measures"]["mean"]["mean"] - 0.2)
            assert other["measures"]["mean"]["std"] == pytest.approx(first["measures"]["mean"]["std"])
        shown = tables.measured(alike)
        assert {"mean", "constant", "average"} <= set(shown)
        assert not {"seconds", "megabytes_sent", "cross_term", "nll"} & set(shown)
        assert len(tables.compared(alike, shown)) == 3


def test_differences_are_paired_by_each_metric(make_run: Any) -> None:
    runs = [make_run(f"{m}{seed}", method=m, seed=seed, also=("macro_f1",)) for m in "ab" for seed in (0, 1)]
    for run, gain in zip(runs[:2], (0.1, 0.3), strict=True):
        (also,) = run.records[-1]["evaluation"]["also"]
        run.records[-1]["evaluation"]["also"] = [also | {"clients": [score + gain for score in also["clients"]]}]
    held, reference = tables.compare(runs, paired_with="b")
    assert held["paired"]["mean"]["difference"] == pytest.approx(0)
    assert held["also"][0]["paired"]["mean"] == pytest.approx(
        {
            "difference": 0.2,
            "low": 0.2 - student.ppf(0.975, 1) * 0.1,
            "high": 0.2 + student.ppf(0.975, 1) * 0.1,
            "seeds": 2,
        }
    )
    assert (reference["paired"], reference["also"][0]["paired"]) == (None, None)
    assert not any("_summaries" in each for row in (held, reference) for each in (row, *row["also"]))
