"""The page in a real browser without a network: it draws, moves, follows the theme and runs nothing else."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from peertune.report.drawing import theme
from peertune.report.figures import OF_A_RUN, OF_RUNS
from peertune.report.findings.finding import Finding
from peertune.report.html import page

HOSTILE = """</script></style><script>document.title = "hit"</script><img src=x onerror='document.title="hit"'>"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if program is None:
        pytest.skip("no Chromium or Chrome is installed to look at pages with")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Seen:
    """A page that is open, and what it said and asked for."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, dark: bool = False):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", offline=True
        )
        self.context.set_default_timeout(0)  # however long a slow machine takes; what hangs, pytest ends
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.settle()

    def settle(self) -> None:
        """Wait until all that is shown is drawn."""
        self.page.locator("body[aria-busy=false]").wait_for()

    def until(self, condition: str) -> None:
        """Wait until a condition holds. The page itself looks, as its policy keeps playwright from doing so."""
        look = f"const look = () => ({condition}) ? resolve() : requestAnimationFrame(look); look();"
        self.page.evaluate(f"() => new Promise((resolve) => {{ {look} }})")

    def colours(self) -> dict[str, int]:
        """Count the colours of each figure that is shown, by its name."""
        whole = Image.open(BytesIO(self.page.screenshot(full_page=True))).convert("RGB")
        found = {}
        for figure in self.page.locator("figure:visible").all():
            box = figure.locator(".plot").bounding_box()
            left, top = box["x"], box["y"] + self.page.evaluate("scrollY")
            part = whole.crop((round(left), round(top), round(left + box["width"]), round(top + box["height"])))
            found[figure.get_attribute("data-name")] = len(part.getcolors(1 << 24) or [])
        return found

    def figure(self, name: str) -> Any:
        return self.page.locator(f'figure[data-name="{name}"]:visible')


@pytest.fixture
def look(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Open a page; at the end it must have said nothing and asked for nothing but itself."""
    opened: list[tuple[Seen, str]] = []

    def open_page(text: str, **how: Any) -> Seen:
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8")
        opened.append((Seen(browser, file, **how), file.as_uri()))
        return opened[-1][0]

    yield open_page
    for seen, address in opened:
        assert seen.said == []
        assert seen.asked == [address]
        seen.context.close()


FINDINGS = {
    "a run": [
        Finding(name="made", title="Fine", text="All is well.", severity="good", advice="Go on."),
        Finding(
            name="made",
            title="Split",
            text="Two clients never met.",
            severity="problem",
            advice="Raise graph.activation.",
        ),
    ]
}


def test_text_of_runs_and_findings_is_escaped_and_plotly_is_there_once(make_run: Any) -> None:
    run = make_run(HOSTILE, method=HOSTILE, metric=HOSTILE, labels=(HOSTILE, "b", "c"))
    run.recipe["note"] = HOSTILE
    run.environment["note"] = HOSTILE
    finding = Finding(HOSTILE, "notice", HOSTILE, HOSTILE, HOSTILE)
    for runs in ([run], [run, make_run("other", seed=1)]):
        text = page(runs, {HOSTILE: [finding]})
        assert "<img" not in text.replace(
            text[text.index("plotly.js v") : text.index('"use strict";\n\nconst dark')], ""
        )
        assert text.count("plotly.js v") == 1
        scripts = re.findall(r"<script(?: [^>]*)?>", text[: text.index("plotly.js v")])
        assert all("application/json" in script for script in scripts[:-1])


def test_findings_stand_before_figures_the_gravest_first(make_run: Any) -> None:
    text = page([make_run()], FINDINGS)
    places = [
        text.index(part) for part in ("Problem</b> <b>Split", "Two clients never met.", "Good</b> <b>Fine", "<figure")
    ]
    assert places == sorted(places)


SCHEMES = [(name, theme(dark=name == "dark")["layout"]["font"]["color"]) for name in ("dark", "light")]


@pytest.mark.parametrize(("width", "columns", "dark"), [(1280, 2, False), (400, 1, True)])
def test_every_figure_is_drawn_fits_and_follows_the_scheme(
    look: Any, make_run: Any, width: int, columns: int, dark: bool
) -> None:
    seen = look(page([make_run()], FINDINGS), width=width, dark=dark)
    for scheme, ink in SCHEMES[:1] if dark else reversed(SCHEMES):  # the wide page changes to the other
        seen.page.emulate_media(color_scheme=scheme)
        seen.until(f"document.querySelector('.plot')._fullLayout.font.color === '{ink}'")
        seen.settle()
        found = seen.colours()
        assert list(found) == list(OF_A_RUN)
        assert min(found.values()) > 50, found
    assert all(len(plot.get_attribute("aria-label")) > 30 for plot in seen.page.locator(".plot").all())
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    assert len({round(figure.bounding_box()["x"]) for figure in seen.page.locator("figure").all()}) == columns


def test_the_slider_moves_the_graph_through_the_rounds(look: Any, make_run: Any) -> None:
    run = make_run(rounds=9)
    seen = look(page([run], {}))
    figure = seen.figure("graph")
    slider, output = figure.locator("input[type=range]"), figure.locator("output")

    def shows(round: int) -> None:
        assert output.inner_text() == f"round {round}"
        ends = 3 * len(run.records[round]["edges"])
        seen.until(f"document.querySelector('[data-name=graph] .plot')._fullData[1].x.length === {ends}")
        legends = "[...document.querySelectorAll('[data-name=graph] .legend')]"
        seen.until(f"{legends}.some((legend) => legend.textContent.includes('active in round {round}'))")

    slider.focus()
    slider.press("Home")
    shows(0)
    before = figure.locator(".plot").screenshot()
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    shows(2)
    assert figure.locator(".plot").screenshot() != before
    slider.press("End")
    shows(8)
    box = slider.bounding_box()
    seen.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    shows(4)


def test_a_page_that_is_printed_is_light(look: Any, make_run: Any) -> None:
    seen = look(page([make_run()], {}), dark=True)
    assert seen.page.pdf().startswith(b"%PDF")
    seen.page.emulate_media(media="print")
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_sweep_compares_first_and_shows_the_run_that_is_chosen(look: Any, make_run: Any) -> None:
    runs = [
        make_run(f"{t}/{p}/{seed}", switch_every=t, activation=p, seed=seed, rounds=6)
        for t in (2, 3)
        for p in (0.1, 0.5)
        for seed in (0, 1)
    ]
    seen = look(page(runs, {runs[3].name: FINDINGS["a run"]}))
    found = seen.colours()
    assert list(found)[: len(OF_RUNS)] == list(OF_RUNS)
    assert min(found.values()) > 50, found
    for label in ("All settings", "macro_f1"):
        assert seen.page.locator(f"[aria-label='{label}'] tbody tr").count() == 4
    assert seen.page.locator(".run:visible [aria-label=Scores] tbody tr").count() == 2
    assert seen.page.locator(".run:visible [aria-label=Classes] tbody tr").count() == 3
    assert "Two clients never met." in seen.page.locator(".findings").first.inner_text()
    assert seen.page.locator(".run:visible").count() == 1
    seen.page.select_option("#choice", label=runs[3].name)
    seen.settle()
    assert seen.page.locator(".run:visible").get_attribute("aria-label") == runs[3].name
    assert seen.figure("score").locator(".scatterlayer path").count() > 3
    seen.page.set_viewport_size({"width": 400, "height": 900})
    seen.until("document.documentElement.scrollWidth <= 400")
    table = seen.page.locator(".wide").first
    assert "Δ_A" in table.inner_text()
    assert table.evaluate("table => table.scrollWidth > table.clientWidth"), "what is wider than the screen scrolls"
    table.focus()
    table.press("ArrowRight")
    seen.until("document.querySelector('.wide').scrollLeft > 0")


def test_how_unlike_clients_are_stands_beside_their_mean_for_each_setting_and_run(make_run: Any) -> None:
    html = page([make_run("a", method="dec_lora"), make_run("b", method="local")], {})
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("min", "spread", "worst tenth"))
    assert html.count(heads) == 2 + 2  # both metrics side by side, and each run's scores


def test_runs_that_cannot_be_compared_are_shown_one_by_one(make_run: Any) -> None:
    text = page([make_run("one"), make_run("two")], {})
    assert "one and two have the same seed, 0; give each run once" in text
    assert text.count('class="run"') == 2


def test_hostile_text_runs_nothing(look: Any, make_run: Any) -> None:
    run = make_run(HOSTILE, method=HOSTILE, metric=HOSTILE, labels=(HOSTILE, "b", "c"))
    run.recipe["note"] = HOSTILE
    finding = Finding(HOSTILE, "notice", HOSTILE, HOSTILE, HOSTILE)
    seen = look(page([run, make_run("other", activation=0.9)], {HOSTILE: [finding]}))
    assert seen.page.title() == "2 runs · peertune"
    assert seen.page.locator("main img, main svg a, main script:not([type='application/json'])").count() == 0
    seen.figure("partition").locator(".bars").first.hover(force=True)
    assert seen.page.title() == "2 runs · peertune"


def test_a_script_that_got_into_the_page_would_not_run(browser: Any, make_run: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page([make_run(rounds=2)], {}).replace("</main>", f"{HOSTILE}</main>"), encoding="utf-8")
    seen = Seen(browser, file)
    assert seen.page.title() == "a run · peertune"
    assert sum("Content Security Policy" in said for said in seen.said) >= 2
    seen.context.close()


def test_a_run_that_has_just_begun_has_a_page(look: Any, make_run: Any) -> None:
    seen = look(page([make_run(rounds=0)], {}))
    assert "No round is finished yet." in seen.page.locator("main").inner_text()
    assert seen.figure("partition").count() == 1


def test_a_page_says_nothing_of_where_files_lie_on_this_machine(make_run: Any) -> None:
    places = {
        "model": {"name": "/home/ana/models/minilm"},
        "task": {"name": "text", "path": "C:\\Users\\ana\\rows", "inputs": ["~ana/text"]},
        "graph": {"name": "edges", "path": "../secret/edges.csv"},
    }
    run = make_run()
    run = replace(run, folder=Path("/home/ana/runs/first"), recipe={**run.recipe, **places})
    for made in (page([run], {}), page([run, replace(run, name="second")], {})):
        assert not re.search(r"\bana\b|secret|home", made[: made.index("plotly.js v")])
        for kept in ("…/minilm", "…/rows", "…/text", "…/edges.csv"):
            assert kept in made or kept.replace("…", "\\u2026") in made
