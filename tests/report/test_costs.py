"""What scores cost, on records worked out by hand, and against a slow twin that looks at each evaluation by itself."""

from math import inf
from pathlib import Path
from statistics import median, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peertune.errors import RunError
from peertune.report import costs, tables
from peertune.report.runs import RunData
from peertune.report.spending import Spent, judged, spent

Curve = list[float | None]


def made(
    name: str, scores: Curve, seed: int = 0, method: str = "dec_lora", speed: float | None = 2.0, **given: Any
) -> RunData:
    """A run of two clients that send 1 and 3 MB in a round of `speed` seconds; None is a round without evaluation."""
    records = [
        {
            "round": t,
            "clients": [0, 1],
            "evaluation": None if score is None else evaluation(score, **given),
            "diagnostics": {},
            "bytes_sent": [1_000_000, 3_000_000],
            "seconds": {"train": 1.0},
            "time_s": None if speed is None else speed * (t + 1),
        }
        for t, score in enumerate(scores)
    ]
    return RunData(Path(name), name, {"seed": seed, "algorithm": {"name": method}}, {}, {}, records)


def evaluation(score: float, metric: str = "accuracy", also: str | None = None) -> dict[str, Any]:
    others = [] if also is None else [evaluation(score / 2, also)]
    return {
        "metric": metric,
        "clients": [score - 0.1, score + 0.1],
        "average": score + 0.05,
        "rows": 4,
        "also": others,
    }


def to(runs: list[RunData], score: float, paired_with: str | None = None) -> list[dict[str, Any]]:
    rows = costs.reach(tables.grouped(runs, ["algorithm.name"], paired_with), runs, score)
    return [row["to"] for row in rows]


def within(runs: list[RunData], paired_with: str | None = None, **limits: float) -> list[dict[str, Any]]:
    rows = costs.limit(tables.grouped(runs, ["algorithm.name"], paired_with), runs, **limits)
    return [row["within"] for row in rows]


FIVE = [
    made("a0", [None, 0.5, 0.7]),
    made("a1", [None, 0.6, 0.7], seed=1),
    made("a2", [0.2, 0.3, 0.5, 0.6, 0.7], seed=2),
    made("a3", [0.2, 0.3], seed=3),
    made("a4", [0.2, 0.3, 0.4, 0.5, 0.5], seed=4),
]


def test_a_score_is_reached_at_the_first_evaluation_that_has_it() -> None:
    (row,) = to([FIVE[0]], 0.5)
    assert row["each"] == [{"rounds": 2, "megabytes_sent": 4.0, "virtual_seconds": 4.0}]
    assert (row["runs"], row["reached"], row["paired"]) == (1, 1, None)
    (row,) = to([made("a", [None, 0.6])], 0.5)
    assert row["each"][0]["rounds"] == 2, "an evaluation that was not made reaches nothing"


def test_runs_that_never_reach_it_count_as_later_than_those_that_do() -> None:
    (row,) = to(FIVE, 0.6)
    assert [one and one["rounds"] for one in row["each"]] == [3, 2, 4, None, None]
    assert (row["reached"], row["measures"]["rounds"]) == (3, {"median": 4, "least": 2, "most": None})
    assert row["measures"]["virtual_seconds"] == {"median": 8.0, "least": 4.0, "most": None}
    (row,) = to(FIVE, 0.7)
    assert (row["reached"], row["measures"]["rounds"]["median"]) == (3, 5)
    (row,) = to(FIVE[:4], 0.7)
    assert (row["reached"], row["measures"]["rounds"]["median"]) == (3, 4.0), "the middle of 3 and 5"
    (row,) = to(FIVE[2:4], 0.7)
    assert row["measures"]["rounds"] == {"median": None, "least": 5, "most": None}, "half of them is no more than half"
    (row,) = to(FIVE, 0.9)
    assert (row["reached"], row["measures"]["rounds"]["least"]) == (0, None)


def test_differences_are_over_the_seeds_in_which_both_reached_it() -> None:
    others = [
        made("b0", [0.6], method="tad_lora"),
        made("b1", [0.1, 0.2, 0.3, 0.6], seed=1, method="tad_lora"),
        made("b3", [0.6], seed=3, method="tad_lora"),
        made("b9", [0.6], seed=9, method="tad_lora"),
    ]
    first, second = to([*FIVE, *others], 0.6, "dec_lora")
    assert first["paired"] is None
    found = second["paired"]
    assert found["seeds"] == 3, "seeds 0, 1 and 3 were run by both, and 3 was never reached by one"
    assert found["rounds"]["seeds"] == found["megabytes_sent"]["seeds"] == 2
    assert found["rounds"]["difference"] == 0.0, "1 - 3 and 4 - 2"
    assert found["rounds"]["high"] == pytest.approx(12.7062 * stdev([-2, 2]) / 2**0.5, rel=1e-4)
    titles, lines = zip(
        *costs.tabled(costs.reach(rows_of([*FIVE, *others]), [*FIVE, *others], 0.6), "dec_lora"), strict=True
    )
    assert titles[0] == "until accuracy is at least 0.6: median over seeds [least, most]"
    assert lines[0] == [
        ["algorithm", "reached", "rounds", "MB", "virtual s"],
        ["dec_lora", "3 of 5", "4 [2, never]", "8.00 [4.00, never]", "8.00 [4.00, never]"],
        ["tad_lora", "4 of 4", "1 [1, 4]", "2.00 [2.00, 8.00]", "2.00 [2.00, 8.00]"],
    ]
    assert lines[1][0] == ["algorithm", "both reached", "rounds", "MB", "virtual s"]
    assert lines[1][1][:3] == ["tad_lora", "2 of 3", "+0.0 [-25.4, +25.4]"]


def rows_of(runs: list[RunData]) -> list[dict[str, Any]]:
    return tables.grouped(runs, ["algorithm.name"], "dec_lora")


def test_of_perplexity_at_most_is_reached() -> None:
    run = made("a", [9.0, 4.0, 2.0], metric="perplexity")
    rows = costs.reach(tables.grouped([run]), [run], 4.0)
    assert rows[0]["to"]["each"][0]["rounds"] == 2
    assert costs.tabled(rows)[0][0] == "until perplexity is at most 4"
    (best,) = within([run], megabytes_sent=4.0)
    assert best["measures"]["best"]["mean"] == 4.0


def test_runs_without_times_have_rounds_and_traffic() -> None:
    runs = [made("old", [0.5, 0.6], speed=None), made("new", [0.5, 0.6], method="tad_lora")]
    del runs[0].records[1]["time_s"]  # as peers' parts that are put together
    old, new = to(runs, 0.6)
    assert (old["measures"].keys(), old["each"]) == (
        {"rounds", "megabytes_sent"},
        [{"rounds": 2, "megabytes_sent": 4.0}],
    )
    assert new["measures"]["virtual_seconds"]["median"] == 4.0
    ((_, lines),) = costs.tabled(costs.reach(tables.grouped(runs), runs, 0.6))
    assert [line[-1] for line in lines] == ["virtual s", "-", "4.00"]
    ((_, lines),) = costs.tabled(costs.reach(tables.grouped(runs), runs, 0.9))
    assert [line[2:] for line in lines[1:]] == [["not reached", "not reached", "-"], ["not reached"] * 3]
    with pytest.raises(RunError, match=r"^--within: old has no virtual times, and new has some; give runs"):
        within(runs, virtual_seconds=9.0)
    with pytest.raises(RunError, match=r"^--within: old has no virtual times; give runs of recipes with time\.step_s$"):
        within(runs[:1], virtual_seconds=9.0)


@pytest.mark.parametrize(
    "limits", [{"megabytes_sent": 0.0}, {"virtual_seconds": -1.0}, {"megabytes_sent": float("nan")}]
)
def test_what_is_no_limit_is_refused(limits: dict[str, float]) -> None:
    with pytest.raises(RunError, match="is out of range; give a number above 0"):
        within(FIVE, None, **limits)
    with pytest.raises(RunError, match=r"^--to: nan is no score"):
        to(FIVE, float("nan"))


def test_the_best_is_of_the_evaluations_within(caplog: pytest.LogCaptureFixture) -> None:
    curves: list[Curve] = [[0.5, 0.9, 0.6, 0.95], [0.7, 0.5, 0.4], [None, None, None, 0.9]]
    runs = [made(f"a{seed}", curve, seed=seed) for seed, curve in enumerate(curves)]
    (row,) = within(runs, megabytes_sent=6.0)
    assert (row["runs"], row["evaluated"], row["each"][2]) == (3, 2, None)
    assert row["measures"]["best"] == {"mean": pytest.approx(0.8), "std": pytest.approx(stdev([0.9, 0.7]))}
    assert row["measures"]["best_average"]["mean"] == pytest.approx(0.85)
    assert row["measures"]["megabytes_sent"] == {"mean": 6.0, "std": 0.0}
    assert caplog.messages == ["a2 has no evaluation within 6 MB sent by a client"]
    (row,) = within(runs, megabytes_sent=6.0, virtual_seconds=3.9)
    assert [one and one["best"] for one in row["each"]] == [pytest.approx(0.5), pytest.approx(0.7), None]
    (row,) = within(runs, virtual_seconds=1.0)
    assert (row["evaluated"], row["measures"]) == (0, {})
    assert caplog.messages[-1] == "a0 and 2 more have no evaluation within 1 virtual seconds"
    (row,) = within(runs, virtual_seconds=1e9)
    assert [one["best"] for one in row["each"]] == pytest.approx([0.95, 0.7, 0.9])
    assert [one["virtual_seconds"] for one in row["each"]] == [8.0, 6.0, 8.0], "what was spent, not what might be"


def test_the_best_within_is_paired_seed_by_seed_and_by_each_metric() -> None:
    runs = [
        made(f"{method}{seed}", [0.5, score, 0.9], seed, method, also="macro_f1")
        for method, scores in (("dec_lora", (0.6, 0.7)), ("tad_lora", (0.7, 0.9)))
        for seed, score in enumerate(scores)
    ]
    rows = costs.limit(rows_of(runs), runs, megabytes_sent=4.0)
    assert rows[1]["within"]["paired"]["best"]["difference"] == pytest.approx(0.15)
    assert rows[1]["also"][0]["within"]["paired"]["best"]["difference"] == pytest.approx(0.075)
    assert rows[1]["also"][0]["within"]["measures"]["best"]["mean"] == pytest.approx(0.4)
    tabled = costs.tabled(rows, "dec_lora")
    assert [title.partition(" within")[0] for title, _ in tabled] == ["accuracy, best"] * 2 + ["macro_f1, best"] * 2
    assert tabled[1][1] == [
        ["algorithm", "both evaluated", "best", "best average"],
        ["tad_lora", "2 of 2", *["+0.150 [-0.485, +0.785]"] * 2],
    ]
    (told,) = tables.told([rows[1]])
    assert "_partner" not in told


curves = st.lists(st.one_of(st.none(), st.integers(0, 10).map(lambda tenths: tenths / 10)), max_size=8)


@given(each=st.lists(curves, min_size=1, max_size=6), goal=st.integers(0, 10), most=st.integers(1, 20))
def test_both_questions_have_the_answers_of_a_look_at_each_evaluation(each: list[Curve], goal: int, most: int) -> None:
    runs = [made(f"a{seed}", curve, seed=seed) for seed, curve in enumerate(each)]
    first = [next((t + 1 for t, s in enumerate(curve) if s is not None and s >= goal / 10), inf) for curve in each]
    (row,) = to(runs, goal / 10)
    assert [one["rounds"] if one else inf for one in row["each"]] == first
    assert row["reached"] == sum(t < inf for t in first)
    middle = row["measures"]["rounds"]["median"]
    assert (inf if middle is None else middle) == median(first)
    assert (middle is not None) == (row["reached"] > len(each) / 2)
    (row,) = within(runs, megabytes_sent=most)
    assert [one and one["best"] for one in row["each"]] == [
        pytest.approx(max(there)) if (there := [s for s in curve[: most // 2] if s is not None]) else None
        for curve in each
    ]
    (timed,) = within(runs, virtual_seconds=most)
    assert timed["each"] == row["each"], "a round takes 2 s, and a client sends 2 MB in it"


def test_time_never_runs_back_and_all_clients_share_the_traffic() -> None:
    run = made("a", [None, 0.5, 0.6])
    for record, seconds in zip(run.records, (9.0, 4.0, 10.0), strict=True):
        record["time_s"] = seconds
    run.records[1] |= {"clients": [1], "bytes_sent": [3_000_000]}  # client 0, the slow one, was down
    run.records[1]["evaluation"]["clients"] = [0.5]
    assert spent(run.records) == [Spent(1, 2.0, 9.0), Spent(2, 3.5, 9.0), Spent(3, 5.5, 10.0)]
    assert spent([]) == []


def test_an_asynchronous_record_is_of_those_who_ended_a_training_and_judges_all() -> None:
    run = made("a", [0.4, 0.6])
    for record in run.records:
        record |= {"clients": [1], "bytes_sent": [8_000_000], "spans": [[1, 0.0, 1.0, 1.0, -1], [1, 1.0, 2.0, 2.0, -1]]}
    assert [*judged(run.records[0])] == [0, 1]
    assert spent(run.records) == [Spent(1, 4.0, 2.0), Spent(2, 8.0, 4.0)]
    assert to([run], 0.6)[0]["each"] == [{"rounds": 2, "megabytes_sent": 8.0, "virtual_seconds": 4.0}]
