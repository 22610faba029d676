"""Figures of runs that were made up: what is drawn, what is left out, and that text and sizes do no harm."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peertune.errors import RunError
from peertune.report import judging
from peertune.report.comparisons import by_round
from peertune.report.drawing import METHOD_COLOURS, mean_score
from peertune.report.figures import OF_A_RUN, of_a_run, of_runs, write_figures

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def drawn(run: Any) -> dict[str, Any]:
    return {figure.name: figure.figure for figure in of_a_run(run)}


def compared(runs: Any) -> dict[str, Any]:
    return {figure.name: figure.figure for figure in of_runs(runs)}


def trace(figure: Any, name: str) -> Any:
    return next(trace for trace in figure.data if trace.name == name)


def test_a_whole_run_has_every_figure_each_with_a_title_and_how_to_read_it(make_run: Any) -> None:
    found = of_a_run(make_run())
    assert [figure.name for figure in found] == list(OF_A_RUN)
    for figure in found:
        assert len(figure.title) > 5
        assert figure.reading.endswith(".")
        assert "METRIC" not in figure.title + figure.reading
        assert figure.title[0].isupper()


def test_scores_are_the_records_own(make_run: Any) -> None:
    run = make_run()
    evaluated = [record for record in run.records if record["evaluation"]]
    figure = drawn(run)["score"]
    mean = trace(figure, "mean of clients")
    assert list(mean.x) == [record["round"] for record in evaluated]
    assert list(mean.y) == pytest.approx([np.mean(record["evaluation"]["clients"]) for record in evaluated])
    assert list(trace(figure, "averaged adapter").y) == [record["evaluation"]["average"] for record in evaluated]
    lines = trace(figure, "each client")
    third = lines.y[lines.customdata == 3]
    assert third[:-1] == pytest.approx([record["evaluation"]["clients"][3] for record in evaluated])
    assert np.isnan(third[-1])
    assert trace(figure, "best constant answer").y[0] == 0.5


def test_ensembles_and_certainty_have_curves_where_they_are_judged(make_run: Any) -> None:
    run = make_run()
    judged = [record["evaluation"] for record in run.records if record["evaluation"]]
    shown = {"ensemble of all": "ensemble", "with those heard": "heard_ensemble", "surest client": "route"}
    for name, key in shown.items():
        assert list(trace(drawn(run)["score"], name).y) == pytest.approx([np.mean(one[key]) for one in judged])
    for name, key in {"negative log-likelihood": "nll", "calibration error": "ece"}.items():
        assert list(trace(drawn(run)["certainty"], name).y) == pytest.approx([np.mean(one[key]) for one in judged])
    for one in judged:
        one |= {"ensemble": None, "heard_ensemble": [], "route": None, "nll": [], "ece": []}
    assert shown.keys().isdisjoint(each.name for each in drawn(run)["score"].data)
    assert "certainty" not in drawn(run)


def test_the_constant_answer_has_lines_where_it_is_scored(make_run: Any) -> None:
    run = make_run(rounds=4, every=2)
    for record in run.records:
        if record["evaluation"]:
            record["evaluation"] |= {"own_constant": [0.5, 0.75], "constant": 0.25 if record["round"] == 3 else None}
    assert trace(drawn(run)["score"], "best constant answer").y == (0.25,)
    assert trace(drawn(run)["score"], "best constant answer, own rows").y == (0.625, 0.625)
    run.records[-1]["evaluation"] |= {"own_constant": [], "constant": None}
    assert "best constant answer" not in [each.name for each in drawn(run)["score"].data]


def test_which_class_was_taken_for_which_is_drawn_by_name_as_shares_of_each_class(make_run: Any) -> None:
    run = make_run(labels=("no", "no <b>", "perhaps"))
    (heat,) = drawn(run)["confusion"].data
    counts = np.array(run.records[-1]["evaluation"]["confusion"])
    assert heat.customdata.tolist() == counts.tolist()
    assert heat.z == pytest.approx(counts / counts.sum(1, keepdims=True), abs=1e-4)
    assert list(heat.x) == list(heat.y) == ["no", "no &lt;b&gt;", "perhaps"]
    long = drawn(make_run(labels=(f"{'x' * 80}1", f"{'x' * 80}2", "c")))["confusion"].data[0]
    assert len({*long.x}) == 3, "cut to the same, they would share a row"


def test_other_metrics_have_curves_beside_their_constant_answers(make_run: Any) -> None:
    run = make_run(also=("macro_f1", "f1 of no"))
    for metric in (0, 1):
        for record in run.records:
            if record["evaluation"]:
                record["evaluation"]["also"][metric]["own_constant"] = [0.25, 0.75]
    run.records[-1]["evaluation"]["also"][1]["constant"] = None
    figure, last = drawn(run)["others"], run.records[-1]["evaluation"]["also"]
    for metric, level in zip(last, (0.3, 0.5), strict=True):
        name = metric["metric"].replace("_", " ")
        assert trace(figure, name).y[-1] == pytest.approx(np.mean(metric["clients"]))
        assert trace(figure, f"{name}, constant answer").y[-1] == level


def test_what_was_made_of_each_class_is_told_by_its_name(make_run: Any) -> None:
    run = make_run(clients=1)
    run.records[-1]["evaluation"]["confusion"] = [[8, 2, 0], [0, 5, 5], [0, 0, 0]]
    first, second, third = judging.by_class(run)
    assert first == {
        "class": "no",
        "answers": 10,
        "precision": 1.0,
        "recall": 0.8,
        "f1": pytest.approx(16 / 18),
        "mistaken": "yes",
    }
    assert (second["precision"], second["recall"], second["mistaken"]) == (5 / 7, 0.5, "perhaps")
    assert third == dict.fromkeys(first, 0.0) | {"class": "perhaps", "answers": 0, "mistaken": None}
    run.records[-1]["evaluation"]["confusion"] = []
    assert judging.by_class(run) == []


def test_phases_are_shaded_where_factors_train_in_turn_and_only_there(make_run: Any) -> None:
    shapes = drawn(make_run(rounds=10, switch_every=4))["consensus"].layout.shapes
    assert sorted((shape.x0, shape.x1, shape.name) for shape in shapes) == [
        (-0.5, 3.5, "B trains"),
        (3.5, 7.5, "A trains"),
        (7.5, 9.5, "B trains"),
    ]
    assert sorted(shape.name for shape in shapes if shape.showlegend) == ["A trains", "B trains"]
    assert not drawn(make_run(switch_every=None))["consensus"].layout.shapes


def test_rounding_takes_up_no_room_on_the_logarithmic_axis(make_run: Any) -> None:
    low, high = drawn(make_run())["consensus"].layout.yaxis.range
    assert -3 < low < high < 1


def test_the_graphs_frames_show_the_edges_of_their_round(make_run: Any) -> None:
    run = make_run(rounds=8)
    figure = drawn(run)["graph"]
    assert [frame.name for frame in figure.frames] == [str(t) for t in range(8)]
    for frame, record in zip(figure.frames, run.records, strict=True):
        assert len(frame.data[0].x) == 3 * len(record["edges"])
        assert len(frame.data[1].marker.color) == 6
    assert figure.layout.meta in {str(record["round"]) for record in run.records if record["edges"]}
    assert len(trace(figure, f"active in round {figure.layout.meta}").x) == 3 * len(
        run.records[int(figure.layout.meta)]["edges"]
    )
    assert "rho 0.7" in figure.layout.xaxis.title.text
    assert "T* 5" in figure.layout.xaxis.title.text


def test_the_graph_of_messages_that_go_one_way_has_arrows(make_run: Any) -> None:
    run = make_run(rounds=4)
    run.facts["graph"]["directed"] = True
    for record in run.records:
        record["edges"] = [[1, 0], [0, 1], [2, 3]]
    figure = drawn(run)["graph"]
    for data in (trace(figure, f"active in round {figure.layout.meta}"), figure.frames[0].data[0]):
        assert data.mode == "lines+markers"
        assert (data.marker.symbol, data.marker.angleref) == ("arrow", "previous")
        assert list(data.marker.size) == [0, 12, 0] * 3, "at the receiver's end"
        (x0, x1, gap, *back) = data.x[:6]
        assert gap is None
        assert back == [x1, x0, None]


def test_contraction_tells_idle_factors_from_trained_ones(make_run: Any) -> None:
    run = make_run(rounds=8)
    figure = drawn(run)["contraction"]
    idle = [record["diagnostics"]["contraction_A"] for record in run.records if "A" not in record["train"]]
    assert list(trace(figure, f"A idle, mean {np.mean(idle):.3f}").y) == idle
    assert list(trace(figure, "rho = 0.700").y) == [0.7, 0.7]


def test_traffic_is_cumulative_over_all_rounds(make_run: Any) -> None:
    run = make_run()
    total = sum(np.mean(record["bytes_sent"]) for record in run.records) / 1e6
    assert trace(drawn(run)["traffic"], "mean of clients").x[-1] == pytest.approx(total)


def test_scores_stand_against_the_time_by_which_the_last_client_had_ended_the_round(make_run: Any) -> None:
    run = make_run(rounds=40)
    figure = drawn(run)["time"]
    ends = [record["time_s"] / 60 for record in run.records if record["evaluation"]]
    assert list(trace(figure, "mean of clients").x) == pytest.approx(ends)
    assert figure.layout.xaxis.title.text == "virtual time (min)"
    several = [run, make_run("later", seed=1, rounds=40)]
    ends = [np.mean([each.records[t]["time_s"] for each in several]) / 60 for t in (1, 6, 39)]
    line = trace(compared(several)["score-by-time"], "tad_lora")
    assert [x for x, t in zip(line.x, line.customdata, strict=True) if t in (1, 6, 39)] == pytest.approx(ends)
    assert [record.pop("time_s") for record in several[1].records]  # as an older version wrote it
    assert "score-by-time" not in compared(several)
    assert "time" not in drawn(several[1])


def test_each_span_is_a_bar_of_training_and_one_of_waiting_that_names_whom_it_waited_for(make_run: Any) -> None:
    run = make_run(rounds=3, clients=3, activation=1.0)
    figure = drawn(run)["waiting"]
    trains, waits = figure.data
    spans = [(record["round"], *span) for record in run.records for span in record["spans"]]
    spans.sort(key=lambda span: span[2])
    assert [(at, who) for who, at, *_ in trains.customdata.tolist()] == [span[:2] for span in spans]
    assert list(trains.base) == [span[2] for span in spans]
    assert list(trains.x) == [span[3] - span[2] for span in spans]
    waited = [span for span in spans if span[4] > span[3]]
    assert [(base, x) for base, x in zip(waits.base, waits.x, strict=True)] == [(s[3], s[4] - s[3]) for s in waited]
    assert {span[5] for span in waited} == {2}, "all hear the slowest"
    assert waits.customdata[:, 5].tolist() == [2] * len(waited)
    assert list(figure.layout.xaxis.range) == [0, run.records[-1]["time_s"]]


def test_of_many_rounds_and_clients_the_first_rounds_and_those_that_others_wait_for_are_seen(make_run: Any) -> None:
    run = make_run(rounds=60, clients=200, activation=0.0)
    for record in run.records:
        record["spans"] = [
            [k, 10.0 * record["round"], *[10.0 * record["round"] + x for x in (1, 10)], 77] for k in range(200)
        ]
        record["spans"][77][2:] = [10.0 * record["round"] + 10, 10.0 * record["round"] + 10, -1]
        record["time_s"] = 10.0 * record["round"] + 10
    figure = drawn(run)["waiting"]
    trains, waits = figure.data
    assert len(trains.x) == 2_000
    assert {*waits.customdata[:, 5]} == {77}
    assert 77 in trains.customdata[:, 0]
    assert len({*trains.customdata[:, 0]}) == 100
    assert list(figure.layout.xaxis.range) == [0, pytest.approx(12 * 10 / 60)]


def test_an_asynchronous_run_has_bars_for_whoever_ended_a_training_and_scores_of_all(make_run: Any) -> None:
    run = make_run(rounds=12)
    for t, record in enumerate(run.records):
        here = [0, 1, 2, 3, 4] if t % 2 else [5]
        record |= {key: [record[key][k] for k in here] for key in ("clients", "loss", "grad_norm", "bytes_sent")}
        record["spans"] = [[k, 10.0 * t, 10.0 * t + 5, 10.0 * t + 5, -1] for k in here for _ in range(1 + (k == 0))]
    run.records[2]["spans"] = []
    figures = drawn(run)
    assert set(figures) == set(OF_A_RUN)
    assert len(figures["waiting"].data[1].x) == 0
    assert len(figures["waiting"].data[0].x) == sum(len(record["spans"]) for record in run.records)
    scores = trace(figures["score"], "each client")
    last = run.records[-1]["evaluation"]["clients"]
    assert [scores.y[scores.customdata == k][-2] for k in range(6)] == pytest.approx(last)


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({"rounds": 0}, set(OF_A_RUN) - {"partition"}),
        ({"every": 0}, {"score", "others", "certainty", "ranks", "clients", "confusion", "traffic", "time"}),
        ({"method": "local", "switch_every": None}, {"graph", "traffic", "contraction", "ranks"}),
        ({"metric": "pearson", "also": ()}, {"others", "confusion"}),
        ({"clients": 1}, {"ranks", "clients", "graph", "traffic"}),
    ],
)
def test_what_makes_no_sense_is_left_out(make_run: Any, changed: dict[str, Any], missing: set[str]) -> None:
    assert set(OF_A_RUN) - set(drawn(make_run(**changed))) == missing


def test_a_run_that_diverged_can_be_drawn(make_run: Any) -> None:
    run = make_run()
    for record in run.records[10:]:
        record["loss"] = [float("nan")] * 3 + [float("inf")] * 3
        record["diagnostics"] = dict.fromkeys(record["diagnostics"], float("nan"))
        if record["evaluation"]:
            record["evaluation"]["clients"][2] = float("nan")
    assert set(drawn(run)) == set(OF_A_RUN)
    assert max(trace(drawn(run)["loss"], "mean of clients").x) == 9


def test_text_of_a_run_is_no_html_in_a_figure(make_run: Any) -> None:
    run = make_run(HOSTILE, metric=HOSTILE, labels=(HOSTILE, "b", "c"))
    runs = [run, make_run("other", method=HOSTILE, switch_every=None)]
    for figure in (*of_a_run(run), *of_runs(runs)):
        assert "<img" not in figure.figure.to_json()
        assert "<script" not in figure.figure.to_json()


@pytest.mark.thorough
def test_a_thousand_clients_stay_a_file_that_opens(make_run: Any) -> None:
    run = make_run(rounds=150, clients=1000, every=1, activation=0.002)
    found = drawn(run)
    sizes = {name: len(figure.to_json()) for name, figure in found.items()}
    assert set(found) == set(OF_A_RUN)
    assert sum(sizes.values()) < 3_000_000, sizes
    assert len(found["graph"].frames) == 60
    assert "each client" not in [trace.name for trace in found["score"].data]


def sweep(make_run: Any) -> list[Any]:
    methods = {"tad_lora": 4, "dec_lora": None}
    return [
        make_run(f"{method}-{p}-{seed}", method=method, switch_every=every, activation=p, seed=seed)
        for method, every in methods.items()
        for p in (0.1, 0.5)
        for seed in (0, 1)
    ]


def test_comparisons_are_means_and_deviations_over_seeds(make_run: Any) -> None:
    runs = sweep(make_run)
    found = compared(runs)
    by_method = [
        "scores",
        "averages",
        "score-by-traffic",
        "score-by-time",
        "disagreement-A",
        "disagreement-B",
        "losses",
    ]
    assert list(found) == [*by_method, "score-by-activation", "average-by-activation"]
    line = trace(found["scores"], "dec_lora, activation=0.5")
    last: Any = [mean_score(run.records[-1]) for run in runs if run.name.startswith("dec_lora-0.5")]
    assert line.y[-1] == pytest.approx(np.mean(last))
    assert line.customdata[-1] == pytest.approx(np.std(last, ddof=1))
    curve = trace(found["score-by-activation"], "dec_lora")
    assert list(curve.x) == [0.1, 0.5]
    assert curve.y[1] == pytest.approx(np.mean(last))
    assert curve.error_y.array[1] == pytest.approx(np.std(last, ddof=1))


def test_methods_are_compared_by_their_averaged_adapter_their_disagreement_and_what_they_sent(make_run: Any) -> None:
    runs = sweep(make_run)
    alone = make_run("alone", method="local", switch_every=None, activation=0.5)
    found, mine = compared([*runs, alone]), [run for run in runs if run.name.startswith("dec_lora-0.5")]
    name = "dec_lora, activation=0.5"
    ends = [run.records[-1] for run in mine]
    assert trace(found["averages"], name).y[-1] == pytest.approx(np.mean([r["evaluation"]["average"] for r in ends]))
    errors = [[r["diagnostics"]["consensus_error_A"] for r in run.records[4:]] for run in mine]
    lines = trace(found["disagreement-A"], name)
    assert list(lines.x) == list(range(4, len(mine[0].records))), "before, they differ by rounding alone"
    assert list(lines.y) == pytest.approx(np.mean(errors, axis=0).tolist())
    assert list(trace(found["disagreement-B"], name).x) == list(range(len(mine[0].records)))
    assert found["disagreement-B"].layout.yaxis.type == "log"
    bands = [each for each in found["disagreement-B"].data if each.fill == "toself"]
    assert min(min(each.y) for each in bands) > 0, "no band ends where a logarithm has no place"
    traffic = trace(found["score-by-traffic"], name)
    sent = [sum(np.mean(record["bytes_sent"]) for record in run.records) / 1e6 for run in mine]
    assert (traffic.x[-1], traffic.y[-1]) == pytest.approx((np.mean(sent), np.mean([mean_score(r) for r in ends])))
    (point,) = [each for each in found["score-by-traffic"].data if each.name.startswith("local")]
    assert (list(point.x), list(point.y)) == ([0], [pytest.approx(mean_score(alone.records[-1]))])


def test_a_method_has_one_colour_everywhere(make_run: Any) -> None:
    runs = sweep(make_run)
    for figure in (compared(runs)["scores"], compared(runs)["score-by-activation"], drawn(runs[0])["score"]):
        for each in figure.data:
            for method in ("tad_lora", "dec_lora"):
                if (each.name or "").startswith(method):
                    assert each.line.color == METHOD_COLOURS[method]
    assert trace(drawn(runs[0])["score"], "mean of clients").line.color == METHOD_COLOURS["tad_lora"]


def test_an_interval_that_follows_from_the_graph_does_not_cut_its_curve(make_run: Any) -> None:
    runs = [make_run(f"{p}", activation=p, switch_every=every) for p, every in ((0.02, 9), (0.1, 5), (0.5, 3))]
    (curve,) = compared(runs)["score-by-activation"].data
    assert list(curve.x) == [0.02, 0.1, 0.5]
    assert compared(runs)["score-by-activation"].layout.xaxis.type == "log"


def test_intervals_that_were_chosen_are_curves_of_their_own(make_run: Any) -> None:
    runs = [make_run(f"{p}-{t}", activation=p, switch_every=t) for p in (0.1, 0.5) for t in (2, 8)]
    found = compared(runs)
    assert sorted(curve.name for curve in found["score-by-activation"].data) == ["switch_every=2", "switch_every=8"]
    assert sorted(curve.name for curve in found["score-by-interval"].data) == ["activation=0.1", "activation=0.5"]
    assert list(found["average-by-interval"].data[0].x) == [2, 8]


def test_runs_of_different_lengths_are_compared_where_both_are(make_run: Any) -> None:
    runs = [make_run("a", rounds=9), make_run("b", rounds=9, seed=1)]
    del runs[0].records[4:]
    figure: Any = by_round(runs, lambda record: record["loss"][0], "loss")
    assert list(figure.data[-1].x) == [0, 1, 2, 3]


def test_runs_without_evaluations_are_compared_by_their_losses(make_run: Any) -> None:
    assert list(compared([make_run("a", every=0), make_run("b", every=0, activation=0.7)])) == [
        *("disagreement-A", "disagreement-B", "losses"),
    ]
    assert not compared([make_run("a", rounds=0), make_run("b", rounds=0, activation=0.7)])


browser = pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "google-chrome", "chromium-browser")))
    or not importlib.util.find_spec("kaleido"),
    reason="no Chromium or Chrome, or no kaleido, to draw files with",
)


@pytest.mark.thorough
@browser
def test_figures_are_written_as_files_below_the_folder(make_run: Any, tmp_path: Path) -> None:
    runs = [make_run(name, rounds=3, every=0, method="local", seed=seed) for seed, name in enumerate(("../../a", ".."))]
    files = write_figures(runs, tmp_path / "figures", formats=["png", "svg"])
    assert len(files) == 2 * (len(of_runs(runs)) + sum(len(of_a_run(run)) for run in runs))
    assert set(files) == {file for file in tmp_path.rglob("*") if file.is_file()}
    for file in files:
        start = file.read_bytes()[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if file.suffix == ".png" else start.startswith(b"<svg")
        assert file.stat().st_size > 3000


def test_without_a_browser_one_line_says_what_is_missing(make_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-browser"))
    pytest.importorskip("kaleido")
    with pytest.raises(RunError, match="install Chrome or Chromium"):
        write_figures([make_run(rounds=2)], tmp_path)


def test_without_kaleido_one_line_says_what_to_install(make_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(RunError, match=r"pip install 'peertune\[figures\]'"):
        write_figures([make_run(rounds=2)], tmp_path)
    assert not list(tmp_path.iterdir())
