"""What a chat template takes beside the messages: tools, documents and whatever else its variables are called."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from peertune.errors import DataError
from peertune.types import Split

_NAMED = ("tools", "documents")
"""Columns that are for the template, by the names that `transformers` gives them."""
_KEPT = ("messages", "add_generation_prompt", "chat_template", "tokenize", "conversation")
"""Variables of templates that no column fills."""


def variables(tokenizer: Any, split: Split) -> Callable[[int], dict[str, Any]]:
    """Return what gives the variables of the tokenizer's chat template for a row.

    A column that is called as one of them fills it; so do the entries of a column `chat_template_kwargs`, as in TRL.
    Tools and documents may be JSON. Nulls stand for what isn't there, at any depth: Parquet has no other way.

    Raises DataError where there is no template, and for tools, documents, tool calls and entries that a row has and the
    template has no place for.
    """
    written = tokenizer.chat_template
    if not written:
        raise DataError(
            "task: messages need a tokenizer with a chat template, and the base's has none; "
            "use a chat model, or columns prompt and completion"
        )
    written = "\n".join(written.values()) if isinstance(written, Mapping) else written
    known, columns = _names(written) - {*_KEPT}, split.columns
    filled = [name for name in columns if name in known or name in _NAMED]

    def given(row: int) -> dict[str, Any]:
        place = f"task: {split.called(row)}"
        found = {name: _value(place, name, columns[name][row]) for name in filled}
        entries = columns["chat_template_kwargs"][row] if "chat_template_kwargs" in columns else None
        if not isinstance(entries, Mapping | None):
            raise DataError(f"{place}: chat_template_kwargs is {entries!r:.60}, give names and values")
        found |= entries or {}
        found = {name: _without_nulls(value) for name, value in found.items() if value is not None}
        for name in found:
            if name not in known:
                raise DataError(_no_place(place, name))
        if "tool_calls" not in written and any(message.get("tool_calls") for message in columns["messages"][row]):
            raise DataError(_no_place(place, "tool_calls"))
        return found

    return given


def _no_place(where: str, name: str) -> str:
    return (
        f"{where}: has {name}, and the base's chat template has no place for that; "
        "leave it out of the data, or use a base whose template takes it"
    )


def _names(template: str) -> set[str]:
    """Return the names that a template looks up by themselves, not in another value."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [token for token in Environment().lex(template) if token[1] != "whitespace"]
    except TemplateSyntaxError as error:
        raise DataError(f"task: the base's chat template is damaged ({error.message})") from None
    pairs = zip([(0, "", ""), *tokens], tokens, strict=False)
    return {word for (_, _, before), (_, what, word) in pairs if what == "name" and before != "."}


def _value(where: str, name: str, value: Any) -> Any:
    if name not in _NAMED:
        return value
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise DataError(f"{where}: {name} is text and not JSON, give a list") from None
    if value is not None and not isinstance(value, list | tuple):
        raise DataError(f"{where}: {name} is {value!r:.60}, give a list")
    return value or None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list | tuple) else value
