"""Names from outside: what is imported, what is called, and what peers compare."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peertune.assembly import plugins
from peertune.assembly.build import agreed, build
from peertune.assembly.registry import (
    build_algorithm,
    build_graph,
    build_partition,
    build_task,
    check_choices,
    from_outside,
    graph_settings,
    resolved_choices,
    takes,
)
from peertune.data.tasks import hub_settings
from peertune.errors import PeertuneError, RecipeError
from peertune.recipe import load_recipe

Write = Callable[[str, str], Path]
TOLD = 'from pathlib import Path\nPath("imported").touch()\n'
HUB = """
import numpy as np
from peertune import Graph


def hub(clients: int, hubs: int = 1, activation: float = 1.0) -> Graph:
    edges = np.array([[i, j] for i in range(hubs) for j in range(i + 1, clients)])
    return Graph(clients, lambda t: edges, 1, activation, 0, name="hub")
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a file in the current folder, which is empty; what is imported from it is forgotten in the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def made(file: str, text: str) -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()
        return path

    yield made
    plugins.allow([])
    plugins._imported.cache_clear()
    for module in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


def install(write: Write, distribution: str, *points: str, version: str = "1.0") -> None:
    """Write what a package manager leaves of a distribution: in a folder of its own, which is on the path."""
    about = f"{distribution}/{distribution}-{version}.dist-info"
    write(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    write(f"{about}/top_level.txt", f"{distribution}\n")
    file = write(f"{about}/entry_points.txt", "\n".join(points))
    if (place := str(file.parents[1])) not in sys.path:
        sys.path.append(place)


def with_graph(name: str, *more: str) -> Any:
    return load_recipe("digits-demo", [f"graph={{name: '{name}'}}", "clients=3", "partition={name: iid}", *more])


def test_nothing_is_imported_for_a_recipe_until_the_module_is_allowed(write: Write) -> None:
    write("mine.py", TOLD + HUB)
    recipe = with_graph("mine:hub", "graph.hubs=2")
    for allowed in ([], ["other"], ["mine.hub"]):
        plugins.allow(allowed)
        with pytest.raises(RecipeError) as caught:
            check_choices(recipe)
        said = "code from outside, which no recipe runs by itself; if you trust it, add --plugin mine"
        assert str(caught.value) == f"graph.name: 'mine:hub' is {said}"
    assert not Path("imported").exists()
    plugins.allow(["other", "mine"])
    check_choices(load_recipe("digits-demo"))
    assert not Path("imported").exists(), "nothing names it"
    check_choices(recipe)
    assert Path("imported").exists()
    assert build_graph(recipe).edges_at(0).tolist() == [[0, 1], [0, 2], [1, 2]]
    assert plugins.options() == ["--plugin", "other", "--plugin", "mine"]


def test_what_is_no_modules_name_is_not_allowed() -> None:
    for word in ("mine.py/", "./mine", "mine:hub", "", "a..b", "mine graphs", "mine\n"):
        with pytest.raises(PeertuneError, match=r"^--plugin: .* is no module's name; give one as `import` takes it"):
            plugins.allow([word])
    for word in ("../mine:hub", "mine;ls:hub", ":hub"):
        with pytest.raises(RecipeError, match=r"is neither a name nor of the form module:function$"):
            check_choices(with_graph(word))


CALLED = """
from __future__ import annotations
import functools
from pathlib import Path
from typing import Any
import networkx
import peertune
from peertune import Graph


def bare(clients: int):
    Path("called").touch()


def other(clients: int) -> peertune.Task:
    Path("called").touch()


def namesake(clients: int) -> networkx.Graph:
    Path("called").touch()


def anything(clients: int) -> Any:
    Path("called").touch()


def unresolved(clients: int) -> Grph:
    Path("called").touch()


def evil(clients: int) -> Path("called").touch() and Graph:
    Path("called").touch()


def many(**settings: int) -> Graph:
    Path("called").touch()


def name(name: str) -> Graph:
    Path("called").touch()


def pair(clients: int, hubs: tuple[int, int] = (1, 2)) -> Graph:
    Path("called").touch()


def thing(clients: int, hubs: object = object()) -> Graph:
    Path("called").touch()


class Hub(Graph):
    def __post_init__(self) -> None:
        Path("called").touch()


whole = functools.partial(bare)
"""
NOT_CALLED = {
    "called:bare": "is not annotated with -> peertune.Graph, so it is not called",
    "called:other": "is not annotated with -> peertune.Graph, so it is not called",
    "called:namesake": "is not annotated with -> peertune.Graph, so it is not called",
    "called:anything": "is not annotated with -> peertune.Graph, so it is not called",
    "called:unresolved": "its annotations can't be read (NameError: name 'Grph' is not defined)",
    "called:many": "takes **settings: 'int', but a setting has a name and a value as JSON has them",
    "called:name": "takes name: 'str', but a setting has a name and a value as JSON has them",
    "called:pair": "takes hubs: 'tuple[int, int]' = (1, 2), but a setting has a name and a value as JSON has them",
    "called:thing": "but a setting has a name and a value as JSON has them",
    "called:Hub": "called has no Python function 'Hub'",
    "called:whole": "called has no Python function 'whole'",
    "called:hbu": "called has no Python function 'hbu'",
    "called:Hub.__init__": "called has no Python function 'Hub.__init__'",
    "os:getcwd": "os has no Python function 'getcwd'",
    "os:makedirs": "is not annotated with -> peertune.Graph, so it is not called",
    "sys:exit": "module sys: has no file, so nobody can be sure to have the same; name another",
}


@pytest.mark.parametrize("name", NOT_CALLED)
def test_only_a_function_that_says_that_it_makes_one_is_called(write: Write, name: str) -> None:
    write("called.py", CALLED)
    plugins.allow([name.partition(":")[0]])
    with pytest.raises(RecipeError) as caught:
        check_choices(with_graph(name))
    assert NOT_CALLED[name] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("called").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n\n1 / 0\n", "ZeroDivisionError: division by zero, broken.py line 3"),
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("raise SystemExit(0)\n", "SystemExit: 0, broken.py line 1"),
        ("import nowhere_at_all\n", "ModuleNotFoundError: No module named 'nowhere_at_all', broken.py line 1"),
        (None, "ModuleNotFoundError: No module named 'broken'"),
    ],
)
def test_a_module_that_fails_on_import_is_refused_in_one_line(write: Write, text: str | None, said: str) -> None:
    if text is not None:
        write("broken.py", text)
    plugins.allow(["broken"])
    with pytest.raises(RecipeError) as caught:
        check_choices(with_graph("broken:hub"))
    assert str(caught.value).startswith(f"module broken: can't be imported ({said}")
    assert len(str(caught.value).splitlines()) == 1


PARTS = """
from __future__ import annotations

from dataclasses import replace

import numpy as np

from peertune import ALGORITHMS, TASKS, Algorithm, Graph, Message, Mixer, Partition, Split, Task


def few(rows: int = 60, path: str | None = None) -> Task:
    whole = TASKS["digits"]()
    return replace(whole, name="few", train=whole.train.take(np.arange(rows), ["pixel_values"]))


def first(rows: int = 10) -> Partition:
    def deal(split: Split, clients: int, seed: int) -> list[np.ndarray]:
        return [np.arange(rows) + rows * client for client in range(clients)]

    return deal


def pairs(clients: int, seed: int) -> Graph:
    return Graph(clients, lambda t: np.array([[0, 1], [0, 2]]), 1, 0.5, seed)


def slow(every: int = 3, unlike=None) -> Algorithm:
    return ALGORITHMS["dec_lora"]()


def loud(message: Message, words: str = "") -> Message:
    return message._replace(exact=False)


def wrong(mixer: Mixer) -> Message:
    return Message()


def none(every: int = 3) -> Algorithm:
    return None


def small(clients: int) -> Graph:
    return pairs(3, 0)
"""


def test_tasks_partitions_graphs_and_algorithms_come_from_outside(write: Write) -> None:
    write("parts.py", PARTS)
    plugins.allow(["parts"])
    blocks = ["task={name: 'parts:few'}", "partition={name: 'parts:first', rows: 7}"]
    blocks += ["modifiers=[{name: half}, {name: 'parts:loud', words: a}]"]
    recipe = with_graph("parts:pairs", *blocks, "algorithm={name: 'parts:slow', every: 4, unlike: [1]}")
    check_choices(recipe)
    task = build_task(recipe)
    assert [part.tolist()[0] for part in build_partition(recipe, task)] == [0, 7, 14]
    assert len(task.train) == 60
    assert list(from_outside(recipe)) == ["task", "partition", "graph", "algorithm", "modifiers[1]"]
    assert takes("task", "parts:few", "path")
    assert hub_settings("parts:few") == ()
    assert not build_algorithm(recipe, build_graph(recipe)).message.exact
    resolved = resolved_choices(recipe, build_algorithm(recipe, build_graph(recipe)))
    assert resolved["algorithm"].settings == {"every": 4, "unlike": [1]}, "though the method says nothing of them"
    assert [part.settings for part in resolved["modifiers"]] == [{}, {"words": "a"}]
    assert (resolved["task"].settings, resolved["partition"].settings) == ({"rows": 60}, {"rows": 7})


def test_what_a_function_makes_must_be_what_it_says(write: Write) -> None:
    write("parts.py", PARTS)
    plugins.allow(["parts"])
    with pytest.raises(RecipeError, match=r"^algorithm: parts:none made a NoneType, which is no Algorithm$"):
        check_choices(with_graph("parts:pairs", "algorithm={name: 'parts:none'}"))
    with pytest.raises(RecipeError, match=r"^modifiers\[0\]: parts:wrong returns its message and takes no parameter"):
        check_choices(with_graph("parts:pairs", "modifiers=[{name: 'parts:wrong'}]"))
    values = "peertune.Schedule or peertune.Local or peertune.Message or peertune.Mixer or peertune.Algorithm"
    with pytest.raises(RecipeError, match=rf"^modifiers\[0\]\.name: 'parts:pairs': is not annotated with -> {values}"):
        check_choices(with_graph("parts:pairs", "modifiers=[{name: 'parts:pairs'}]"))
    with pytest.raises(
        RecipeError, match=r"^algorithm\.name: 'parts:pairs': is not annotated with -> peertune\.Algorithm"
    ):
        check_choices(with_graph("parts:pairs", "algorithm={name: 'parts:pairs'}"))
    with pytest.raises(RecipeError, match=r"^graph: parts:small made one of 3 clients, not 5$"):
        check_choices(with_graph("parts:small", "clients=5"))
    with pytest.raises(RecipeError, match=r"^graph\.activation: unknown key"):
        check_choices(with_graph("parts:pairs", "graph.activation=0.5"))
    with pytest.raises(RecipeError, match=r"^graph: parts:pairs takes no activation, which own rosters need"):
        graph_settings(with_graph("parts:pairs"))


def test_an_installed_package_offers_names_and_is_imported_when_one_is_named(write: Write) -> None:
    install(write, "hubs", "[peertune.graphs]", "hub = hubs.inner.made:hub", "[peertune.tasks]", "hub = hubs:no")
    write("hubs/hubs/__init__.py", TOLD)
    write("hubs/hubs/inner/made.py", HUB)
    check_choices(with_graph("ring"))
    with pytest.raises(RecipeError, match=r"^graph\.name: unknown name 'hup', did you mean hub\?$"):
        check_choices(with_graph("hup"))
    assert not Path("imported").exists()
    recipe = with_graph("hub")
    assert build_graph(recipe).name == "hub"
    assert Path("imported").exists()
    code = from_outside(recipe)["graph"]
    assert (code["function"], code["distribution"]) == ("hubs.inner.made:hub", "hubs 1.0")


def test_a_name_that_two_offer_is_refused_where_it_is_asked_for(write: Write) -> None:
    write("mine.py", TOLD + HUB)
    install(write, "one", "[peertune.graphs]", "hub = mine:hub", "ring = mine:hub")
    install(write, "two", "[peertune.graphs]", "hub = mine:hub")
    check_choices(with_graph("star"))
    for name, several in (("hub", "one and two"), ("ring", "one and peertune")):
        with pytest.raises(RecipeError, match=rf"^graph\.name: '{name}' is offered by {several}; uninstall one, or"):
            check_choices(with_graph(name))
    assert not Path("imported").exists()


def test_what_lies_in_the_current_folder_is_not_installed_and_hides_nothing(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(write, "hubs", "[peertune.graphs]", "hub = mine:hub")
    write("hubs/mine.py", TOLD + HUB)
    monkeypatch.chdir("hubs")
    sys.path[:] = ["", *(place for place in sys.path if place != str(Path.cwd()))]
    for allowed in ([], ["other"]):
        plugins.allow(allowed)
        with pytest.raises(RecipeError, match=r"^graph\.name: unknown name 'hub'"):
            check_choices(with_graph("hub"))
    assert not Path("imported").exists()
    write("hubs/networkx.py", TOLD)
    plugins.allow(["mine"])
    check_choices(with_graph("mine:hub"))
    assert sys.path[-1] == str(Path.cwd())
    assert "" not in sys.path
    assert importlib.util.find_spec("networkx").origin != str(Path("networkx.py").absolute())  # type: ignore[union-attr]


def greeting(*overrides: str) -> dict[str, str]:
    settings = ["graph={name: star}", "algorithm={name: dec_lora}", "device=cpu", "model.dtype=float32"]
    return agreed(build(load_recipe("digits-demo", ["clients=3", "partition={name: iid}", *settings, *overrides]), [0]))


@pytest.mark.thorough
def test_a_greeting_tells_code_of_one_name_apart_and_is_as_before_without_any(write: Write) -> None:
    write("mine.py", HUB)
    write("acme/inner/graphs.py", HUB)
    write("acme/inner/__init__.py", "")
    plugins.allow(["mine", "acme.inner.graphs"])

    def named(name: str) -> dict[str, str]:
        plugins._imported.cache_clear()
        return greeting(f"graph={{name: '{name}'}}")

    plain = greeting()
    assert "plugins" not in plain
    mine, packaged = named("mine:hub"), named("acme.inner.graphs:hub")
    assert mine == named("mine:hub")
    assert mine.keys() - plain.keys() == {"plugins"}
    assert {name for name in plain if plain[name] != mine[name]} == {"graph"}
    write("mine.py", HUB + "# another\n")
    write("acme/inner/helper.py", "")
    for name, before in (("mine:hub", mine), ("acme.inner.graphs:hub", packaged)):
        after = named(name)
        assert {key for key in after if before[key] != after[key]} == {"plugins"}, name
    write("parts.py", PARTS)
    plugins.allow(["parts"])
    assert greeting("partition={name: 'parts:first'}") == plain, "each party's own choice"
