"""What a name in a recipe stands for: a factory of peertune's own, or one from outside, which is code.

A recipe may come from anybody, so nothing that it names is imported unless the command line allows the module. Packages
that offer names by entry points were installed by the user, which allows them.

Which modules a process may import is set once, by `allow`, before a recipe is read. It is a property of the process, as
`sys.path` is: handed along, it would be an argument of everything that reads a recipe, and could come from one.
"""

import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from peertune.errors import PeertuneError, RecipeError, unknown

Factory = Callable[..., Any]

_MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_allowed: tuple[str, ...] = ()


class Choices(NamedTuple):
    """What a block of a recipe may name."""

    kind: str  # such as graph: entry points are in the group `peertune.graphs`
    own: Mapping[str, Factory]  # name → factory
    given: tuple[str, ...]  # a factory's parameters that the program supplies
    made: Mapping[str, Any]  # what a factory may return, by its name in `peertune`
    also: Factory | None = None  # what is done to all that is made, with settings that every choice then takes


class Found(NamedTuple):
    """What a name stands for."""

    factory: Factory
    origin: Mapping[str, str]  # which code that is, the same wherever it is the same; {} of peertune's own


def allow(modules: Sequence[str]) -> None:
    """Let recipes name functions of these modules, and of no others but installed entry points.

    They are looked for where Python finds packages, and last in the current folder, however Python was started. Raises
    PeertuneError for what is no module's name.
    """
    global _allowed
    for module in modules:
        if not re.fullmatch(_MODULE, module):
            raise PeertuneError(f"--plugin: {module!r} is no module's name; give one as `import` takes it: mine.graphs")
    _allowed = tuple(dict.fromkeys(modules))
    if _allowed:
        here = os.getcwd()
        sys.path[:] = [*(place for place in sys.path if place not in ("", here)), here]


def options() -> list[str]:
    """Return the words by which another process of peertune allows the same."""
    return [word for module in _allowed for word in ("--plugin", module)]


def find(table: Choices, name: str, where: str) -> Found:
    """Return what a name in the block `where` of a recipe stands for.

    Raises RecipeError, in one line, for a name that nobody or more than one offers, for a module that is not allowed or
    can't be imported, and for what is no function that is annotated to return what the block is of. None is called.
    """
    named = f"{where}.name: {name!r}"
    if ":" in name:
        module, _, function = name.partition(":")
        if module in _allowed:
            return _function(table, module, function, named)
        if not re.fullmatch(_MODULE, module):
            raise RecipeError(f"{named} is neither a name nor of the form module:function")
        raise RecipeError(
            f"{named} is code from outside, which no recipe runs by itself; if you trust it, add --plugin {module}"
        )
    offered = [(by, point) for by, point in _offered(tuple(sys.path)) if point.group == f"peertune.{table.kind}s"]
    meant = [(by, point.value) for by, point in offered if point.name == name]
    if len(meant) + (name in table.own) > 1:
        several = sorted([by for by, _ in meant] + ["peertune"] * (name in table.own))
        raise RecipeError(f"{named} is offered by {' and '.join(several)}; uninstall one, or name it module:function")
    if meant:
        module, _, function = meant[0][1].partition(":")
        return _function(table, module.strip(), function.strip(), named)
    if name not in table.own:
        raise RecipeError(unknown(f"{where}.name", name, {*table.own, *(point.name for _, point in offered)}))
    return Found(table.own[name], {})


def _function(table: Choices, module: str, function: str, named: str) -> Found:
    """Import the module, and return its function if it says that it makes what the table is of."""
    names, origin = _imported(module)
    factory = names.get(function)
    if not inspect.isfunction(factory):
        raise RecipeError(f"{named}: {module} has no Python function {function!r}")
    try:
        returns = get_type_hints(factory).get("return")
    except Exception as error:
        raise RecipeError(f"{named}: its annotations can't be read ({type(error).__name__}: {error})") from None
    if returns not in table.made.values():
        wanted = " or ".join(f"peertune.{name}" for name in table.made)
        raise RecipeError(f"{named}: is not annotated with -> {wanted}, so it is not called")
    for parameter in inspect.signature(factory).parameters.values():
        if not _is_setting(parameter):
            raise RecipeError(f"{named}: takes {parameter}, but a setting has a name and a value as JSON has them")
    return Found(factory, {"function": f"{module}:{function}", **origin})


def _is_setting(parameter: inspect.Parameter) -> bool:
    """Return whether a recipe can set the parameter, and a run directory hold its default."""
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and parameter.name != "name"
    try:
        return named and parameter.default in (parameter.empty, json.loads(json.dumps(parameter.default)))
    except (TypeError, ValueError):
        return named and parameter.default is parameter.empty


@cache
def _imported(module: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Import the module; return its names and which code it is. Raises RecipeError, in one line, where that fails."""
    try:
        imported = import_module(module)
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if last.filename.startswith("<") else f", {Path(last.filename).name} line {last.lineno}"
        raise RecipeError(f"module {module}: can't be imported ({type(error).__name__}: {error}{place})") from None
    return vars(imported), _origin(module)


def _origin(module: str) -> dict[str, str]:
    """Return the digest of an imported module's code, and the distribution and version that it is from, if any.

    Of a package it is that of all its Python files, of another module that of its one.
    """
    parents = (sys.modules[".".join(module.split(".")[: depth + 1])] for depth in range(module.count(".") + 1))
    first = next((file for parent in parents if (file := getattr(parent, "__file__", None))), None)
    if first is None:
        raise RecipeError(f"module {module}: has no file, so nobody can be sure to have the same; name another")
    folder = Path(first).parent
    files = folder.rglob("*.py") if Path(first).name == "__init__.py" else [Path(first)]
    made = sha256()
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        code = file.read_bytes()
        made.update(f"{name} {len(code)} ".encode() + code)
    installed = _distributions_with(module.partition(".")[0])
    return {"digest": made.hexdigest()[:16]} | ({"distribution": ", ".join(installed)} if installed else {})


def _distributions_with(package: str) -> list[str]:
    """Return name and version of each distribution that brings a package, or a module of this name.

    They are those of `importlib.metadata.packages_distributions`, which parses every line that any distribution lists.
    """

    def has(installed: Distribution) -> bool:
        if package in (installed.read_text("top_level.txt") or "").split():
            return True
        files = f"\n{installed.read_text('RECORD')}"
        return f"\n{package}/" in files or f"\n{package}.py," in files

    return sorted({f"{each.name} {each.version}" for each in distributions() if has(each)})


@cache
def _offered(path: tuple[str, ...]) -> list[tuple[str, EntryPoint]]:
    """Return who offers what to peertune on this path; what lies in the current folder counts as not installed."""
    found: dict[str, list[EntryPoint]] = {}
    for distribution in distributions(path=list(path)):
        points = [point for point in distribution.entry_points if point.group.startswith("peertune.")]
        if points and Path(str(distribution.locate_file(""))).resolve() != Path.cwd():
            found.setdefault(distribution.name.lower(), points)
    return [(by, point) for by, points in found.items() for point in points]
