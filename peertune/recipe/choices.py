"""What is chosen by name: its arguments, held against the signature of the factory of that name."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from peertune.errors import RecipeError
from peertune.recipe.hints import unknown_key
from peertune.recipe.schema import Choice


def arguments(factory: Callable[..., Any], choice: Choice, where: str, given: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of the factory of `choice.name` that the recipe sets or leaves at their defaults.

    `given` are the parameters that the program supplies, which are no settings. Raises RecipeError for an unknown,
    missing or wrongly typed argument; one without a type may be anything.
    """
    hints = get_type_hints(factory)
    parameters = {name: p for name, p in inspect.signature(factory).parameters.items() if name not in given}
    for key in choice.settings:
        if key not in parameters:
            takes = f"takes {', '.join(sorted(parameters))}" if parameters else "takes no settings"
            problem, listed, _ = unknown_key(f"{where}.{key}", parameters).partition(", choose")
            way_out = f"; {where}.{key}=null leaves out what the recipe sets" if listed else ""
            raise RecipeError(f"{problem} ({choice.name} {takes}{way_out})")
    values = {}
    for name, parameter in parameters.items():
        if name not in choice.settings:
            if parameter.default is parameter.empty:
                raise RecipeError(f"{where}.{name}: is missing, {choice.name} needs it")
            values[name] = parameter.default
            continue
        try:
            values[name] = TypeAdapter(hints.get(name, Any)).validate_python(choice.settings[name], strict=True)
        except PydanticUserError:
            raise RecipeError(
                f"{where}.{name}: {choice.name} takes a {hints[name]}, which no recipe can give"
            ) from None
        except ValidationError as error:
            first = max(error.errors(), key=lambda complaint: len(complaint["loc"]))  # of what came nearest
            said = f"{first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
            if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
                said += "; put it in quotes"
            raise RecipeError(f"{where}.{name}: {said}") from None
    return values
