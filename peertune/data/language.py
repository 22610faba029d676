"""Tasks for causal language models."""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np

from peertune.data.labels import Classes, need_text, number_labels, told_already
from peertune.data.measures import Metrics, judged, read_metrics
from peertune.data.scores import ANSWERS, OF_CLASSES, OF_TOKENS
from peertune.data.sources import Source
from peertune.data.splits import Splits
from peertune.data.tables import MissingCells, Table, missing, need_columns, nested, whole, without_missing
from peertune.errors import DataError
from peertune.types import Task

_TRUTHS = {"false": 0, "true": 1}
_FIELD = re.compile(r"\{([^{}\n]+)\}")


def instructions(
    path: str | None = None,
    id: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    train: str = "train",
    validation: str = "validation",
    prompt: str | None = None,
    completion: str | None = None,
    chat: bool = False,
    metric: Metrics = "perplexity",
    field: str | None = None,
    validation_split: float | str | None = None,
    test: str | None = None,
    *,
    missing_cells: MissingCells = "refuse",
) -> Task:
    r"""Teach a causal language model to complete prompts, to answer in conversations, or to write text.

    The data are in the folder `path`, where `field` says what in JSON files holds the rows, or are the hub's `id` (with
    its `config`, at `revision`). They have one of three forms, as Hugging Face's TRL has them: columns `prompt` and
    `completion`; a column `messages`, each a list of `role` and `content`, of which the last is the assistant's and is
    learnt; or a column `text`. Other columns are put in words by `prompt` and `completion`, such as
    `"Question: {question}\nAnswer:"` and `" {answer}"`. With `chat` a prompt and a completion become a conversation of
    two messages. Conversations need a tokenizer with a chat template.

    `metric` is `perplexity`, `token_accuracy`, or both; or one or both of those that generate: `exact_match` (the whole
    completion, but for space at its ends) and `last_number` (the last number of both agree, as GSM8K's answers are
    judged). The first is what is judged by.
    `validation_split` and `test` are as for `text`.

    Raises DataError where the arguments, a file, a column or a row is wrong.
    """
    source = Source(path, id, config, revision, field)
    splits = Splits(train, (validation,), validation_split, test)
    called = source.named("instructions", splits)
    where = f"task {called}"
    measures = read_metrics(where, metric, OF_TOKENS | ANSWERS.keys())
    if (prompt is None) != (completion is None):
        raise DataError(f"{where}: give both prompt and completion, or neither for the columns of these names")
    tables = source.read(where, splits)
    if prompt is not None and completion is not None:
        tables = _in_words(where, tables, {"prompt": prompt, "completion": completion}, missing_cells)
        inputs: tuple[str, ...] = ("prompt", "completion")
    else:
        inputs = _form(where, tables)
    if chat and inputs != ("prompt", "completion"):
        raise DataError(f"{where}: chat is for prompts and completions, and the columns are {', '.join(inputs)}")
    if inputs == ("text",) and measures[0].metric in ANSWERS:
        raise DataError(f"{where}: metric {measures[0]} needs prompts to go on from, and the rows are plain text")
    tables = without_missing(where, tables, inputs[:-1], inputs[-1:], missing_cells)
    for name, table in tables.items():
        if inputs == ("messages",):
            tables[name] = table.with_columns({"messages": _conversations(f"{where}: {name}", table)})
            continue
        need_text(f"{where}: {name}", table, inputs)
        if chat:
            pairs = zip(*(table.columns[column] for column in inputs), strict=True)
            tables[name] = table.with_columns({"messages": [_conversation(*pair) for pair in pairs]})
    inputs = ("messages",) if chat else inputs
    # No classes, to deal rows by, as a regression has none.
    dealt = splits.dealt(where, [table.split(np.zeros(len(table))) for table in tables.values()])
    return Task(called, inputs, (), form="complete", **judged(measures), **dealt)


def label_words(
    prompt: str,
    label: str,
    words: list[str],
    path: str | None = None,
    id: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    train: str = "train",
    validation: str = "validation",
    metric: Metrics = "accuracy",
    classes: Classes | None = None,
    field: str | None = None,
    validation_split: float | str | None = None,
    test: str | None = None,
    *,
    missing_cells: MissingCells = "refuse",
) -> Task:
    r"""Classify by a causal language model: the class whose word is the likeliest to follow the prompt.

    `prompt` puts the columns in words, such as `"{passage}\nQuestion: {question}?\nAnswer:"`; `words` holds what
    stands for each class, by number, such as `[" no", " yes"]`; labels that are names are numbered in sorted order, or
    by `classes`, where parties train on rows of their own, of which one may lack a class. In training the word of the
    right class is the completion. A word's likelihood is the product over its tokens, and is not divided by
    their number: choose words of alike many tokens. DeCAF (arXiv 2505.21382) scores WiC and BoolQ by F1; its prompts
    are not known to us.

    The data and errors are as for `instructions`.
    """
    source = Source(path, id, config, revision, field)
    splits = Splits(train, (validation,), validation_split, test)
    called = source.named("label_words", splits)
    where = f"task {called}"
    if len(words) < 2 or len(set(words)) < len(words) or not all(word.strip() for word in words):
        raise DataError(f"{where}: words is {words}; give two or more different ones, none of them empty")
    measures = read_metrics(where, metric, OF_CLASSES)
    if label in _FIELD.findall(prompt):
        raise DataError(told_already(where, label))
    tables = source.read(where, splits)
    for name, table in tables.items():
        need_columns(f"{where}: {name}", table, (label,))
        tables[name] = table.with_columns({label: _truths(table.columns[label])})
    tables = _in_words(where, tables, {"prompt": prompt}, missing_cells, label)
    first = tables[train]
    if classes is None and label not in first.classes and None not in map(whole, first.columns[label]):
        classes = [str(number) for number in range(len(words))]
    found = number_labels(where, tables, ("prompt",), label, classes, measures, missing_cells)
    names = found.classes
    if len(names) != len(words):
        raise DataError(f"{where}: there are {len(names)} classes ({', '.join(names[:5])}) and {len(words)} words")
    dealt = splits.dealt(where, found.splits)
    return Task(called, ("prompt",), names, form="choose", words=tuple(words), **judged(found.measures), **dealt)


def _truths(labels: list[Any]) -> list[Any]:
    """Return 1 and 0 for true and false, however a format writes them, where there is nothing else."""
    if any(str(value).lower() not in _TRUTHS for value in labels if not missing(value)):
        return labels
    return [value if missing(value) else _TRUTHS[str(value).lower()] for value in labels]


def _in_words(
    where: str, tables: Mapping[str, Table], templates: Mapping[str, str], rule: MissingCells, *learnt: str
) -> dict[str, Table]:
    """Return the tables with a column for each template: a row's values in the place of its `{column}`s.

    Other braces stay. Raises DataError where a row lacks a value, or one of the columns `learnt`, by the rule.
    """
    columns: dict[str, list[str]] = {}
    for name, table in tables.items():
        for made, template in templates.items():
            found = [field for field in _FIELD.findall(template) if field in table.columns or field.isidentifier()]
            if not found:
                raise DataError(
                    f"{where}: {made}: {template!r} takes nothing from the rows; put a column's name in braces"
                )
            need_columns(f"{where}: {name}: {template!r}", table, found)
            columns[made] = found
    fields = tuple(dict.fromkeys(field for found in columns.values() for field in found))
    tables = without_missing(where, tables, fields, learnt, rule)
    for name, table in tables.items():
        for field in fields:
            for row, value in enumerate(table.columns[field]):
                if not isinstance(value, str | int | float | date):
                    raise DataError(f"{where}: {name}: {table.called(row)}: {field} is {value!r:.80}, which is no text")
        tables[name] = table.with_columns(
            {made: _filled(table, template, columns[made]) for made, template in templates.items()}
        )
    return tables


def _filled(table: Table, template: str, names: Sequence[str]) -> list[str]:
    def filled(row: int) -> str:
        return _FIELD.sub(lambda field: str(table.columns[field[1]][row]) if field[1] in names else field[0], template)

    return [filled(row) for row in range(len(table))]


_FORMS = (("messages",), ("prompt", "completion"), ("text",))


def _form(where: str, tables: Mapping[str, Table]) -> tuple[str, ...]:
    """Return which columns the rows of all splits are in."""
    forms = {}
    for name, table in tables.items():
        need_columns(f"{where}: {name}", table, ())
        form = next((form for form in _FORMS if all(column in table.columns for column in form)), None)
        if form is None:
            raise DataError(
                f"{where}: {name}: has no messages, no prompt and completion, no text, but {', '.join(table.columns)}; "
                'say what is learnt, such as prompt="{question}" and completion="{answer}"' + nested(table)
            )
        forms[name] = form
    if len(set(forms.values())) > 1:
        said = ", and ".join(f"{name} {', '.join(form)}" for name, form in forms.items())
        raise DataError(f"{where}: {said.replace(' ', ' has the columns ', 1)}; give both in one form")
    return next(iter(forms.values()))


def _conversation(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _conversations(where: str, table: Table) -> list[list[dict[str, Any]]]:
    """Return each row's messages, of which the last is the assistant's and says something."""
    conversations = []
    for row, messages in enumerate(table.columns["messages"]):
        place = f"{where}: {table.called(row)}"
        said = [_message(place, message) for message in messages] if isinstance(messages, list | tuple) else []
        if len(said) < 2 or said[-1]["role"] != "assistant":
            raise DataError(f"{place}: its last message must be the assistant's, after one of another role")
        if not (said[-1].get("content") or "").strip() and not said[-1].get("tool_calls"):
            raise DataError(f"{place}: the assistant's message is empty, leave the row out")
        conversations.append(said)
    return conversations


def _message(where: str, message: Any) -> dict[str, Any]:
    """Return a message with its content as one text, and without what it says nothing of.

    Content may be null or absent beside tool calls, and may be in parts of text, which follow one another as chat
    templates write them.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: {message!r:.80} is no message, give its role and content")
    said = {key: value for key, value in message.items() if value is not None or key == "content"}
    content = said.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise DataError(f"{where}: {part!r:.80} is no part of text, and other parts can't be learnt")
        said["content"] = "".join(part["text"] for part in content)
    elif not isinstance(content, str) and (content is not None or not said.get("tool_calls")):
        raise DataError(f"{where}: {message!r:.80} is no message, give its role and content")
    return said
