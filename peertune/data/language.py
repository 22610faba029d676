"""Tasks for causal language models."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peertune.data.labels import number_labels
from peertune.data.scores import JUDGES, OF_LANGUAGE, OF_VALUES
from peertune.data.sources import Columns, named_source, open_source
from peertune.errors import DataError, unknown
from peertune.types import Split, Task

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
    metric: str = "perplexity",
) -> Task:
    r"""Teach a causal language model to complete prompts, to answer in conversations, or to write text.

    The data are in the folder `path` or are the hub's `id` (with its `config`, at `revision`), in one of three forms,
    as Hugging Face's TRL has them: columns `prompt` and `completion`; a column `messages`, each a list of `role` and
    `content`, of which the last is the assistant's and is learnt; or a column `text`. Other columns are put in words by
    `prompt` and `completion`, such as `"Question: {question}\nAnswer:"` and `" {answer}"`. With `chat` a prompt and a
    completion become a conversation of two messages. Conversations need a tokenizer with a chat template.

    `metric` is `perplexity`, `token_accuracy`, or one of those that generate: `exact_match` (the whole completion, but
    for space at its ends) and `last_number` (the last number of both agree, as GSM8K's answers are judged).

    Raises DataError where the arguments, a file, a column or a row is wrong.
    """
    called = named_source("instructions", path, id)
    where = f"task {called}"
    read, _ = open_source(where, path, id or "", config, revision, "")
    if metric not in OF_LANGUAGE:
        raise DataError(unknown(f"{where}: metric", metric, OF_LANGUAGE))
    if (prompt is None) != (completion is None):
        raise DataError(f"{where}: give both prompt and completion, or neither for the columns of these names")
    forms, splits = [], []
    for name in (train, validation):
        source, place = read((name,)), f"{where}: {name}"
        columns = source
        if prompt is not None and completion is not None:
            columns = {"prompt": _fill(place, prompt, source), "completion": _fill(place, completion, source)}
        inputs = next((form for form in _FORMS if all(name in columns for name in form)), None)
        if inputs is None:
            raise DataError(
                f"{place}: has no messages, no prompt and completion, no text, but {', '.join(columns)}; "
                'say what is learnt, such as prompt="{question}" and completion="{answer}"'
            )
        rows = _FORMS[inputs](place, columns)
        if chat and inputs != ("prompt", "completion"):
            raise DataError(f"{where}: chat is for prompts and completions, and the columns are {', '.join(inputs)}")
        if chat:
            rows = {"messages": [_conversation(*pair) for pair in zip(*rows.values(), strict=True)]}
            inputs = tuple(rows)
        if inputs == ("text",) and metric in JUDGES:
            raise DataError(f"{where}: metric {metric} needs prompts to go on from, and the rows are plain text")
        size = len(next(iter(rows.values())))
        forms.append(inputs)
        splits.append(Split(source | rows, np.zeros(size)))  # no classes, to deal rows by, as a regression has none
    if forms[0] != forms[1]:
        raise DataError(
            f"{where}: {train} has the columns {', '.join(forms[0])}, and {validation} {', '.join(forms[1])}; "
            "give both in one form"
        )
    return Task(called, forms[0], (), splits[0], splits[1], metric, "complete")


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
    metric: str = "accuracy",
    classes: list[str] | None = None,
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
    called = named_source("label_words", path, id)
    where = f"task {called}"
    read, _ = open_source(where, path, id or "", config, revision, label)
    if len(words) < 2 or len(set(words)) < len(words) or not all(word.strip() for word in words):
        raise DataError(f"{where}: words is {words}; give two or more different ones, none of them empty")
    if metric in OF_VALUES or metric in OF_LANGUAGE:
        raise DataError(f"{where}: metric {metric} is not for classes, choose accuracy, f1 or matthews_correlation")
    found = {}
    for name in (train, validation):
        columns = read((name,))
        if label not in columns:
            raise DataError(unknown(f"{where}: {name}: column", label, columns))
        numbers = [int(value) if isinstance(value, bool) else value for value in columns[label]]
        found[name] = columns | {"prompt": _fill(f"{where}: {name}", prompt, columns), label: numbers}
    known = None if classes is None else tuple(classes)
    if known is None and all(isinstance(value, int) for value in found[train][label]):
        known = tuple(str(number) for number in range(len(words)))
    names, splits = number_labels(where, found, ("prompt",), label, known, metric)
    if len(names) != len(words):
        raise DataError(f"{where}: there are {len(names)} classes ({', '.join(names[:5])}) and {len(words)} words")
    return Task(called, ("prompt",), names, splits[0], splits[1], metric, "choose", tuple(words))


def _fill(where: str, template: str, columns: Columns) -> list[str]:
    """Put each row's values in the place of a template's `{column}`s; other braces stay."""
    names = [name for name in _FIELD.findall(template) if name in columns or name.isidentifier()]
    if not names:
        raise DataError(f"{where}: {template!r} takes nothing from the rows; put a column's name in braces")
    for name in names:
        if name not in columns:
            raise DataError(unknown(f"{where}: {template!r}: column", name, columns))
        for row, value in enumerate(columns[name]):
            if value is None or value != value:
                raise DataError(f"{where}: row {row}: {name} is missing, leave out rows without one")

    def filled(row: int) -> str:
        return _FIELD.sub(lambda field: str(columns[field[1]][row]) if field[1] in names else field[0], template)

    return [filled(row) for row in range(len(columns[names[0]]))]


def _conversation(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _pairs(where: str, columns: Columns) -> dict[str, list[Any]]:
    pairs = {name: columns[name] for name in ("prompt", "completion")}
    for name, values in pairs.items():
        _check_texts(where, name, values)
    return pairs


def _plain(where: str, columns: Columns) -> dict[str, list[Any]]:
    _check_texts(where, "text", columns["text"])
    return {"text": columns["text"]}


def _messages(where: str, columns: Columns) -> dict[str, list[Any]]:
    conversations = [list(messages) if isinstance(messages, list | tuple) else [] for messages in columns["messages"]]
    if not conversations:
        raise DataError(f"{where}: no rows, give at least one")
    for row, messages in enumerate(conversations):
        for message in messages:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(x), str) for x in ("role", "content")
            ):
                raise DataError(f"{where}: row {row}: {message!r:.80} is no message, give its role and content")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: row {row}: its last message must be the assistant's, after one of another role")
        if not messages[-1]["content"].strip():
            raise DataError(f"{where}: row {row}: the assistant's message is empty, leave the row out")
    return {"messages": conversations}


_FORMS: dict[tuple[str, ...], Callable[[str, Columns], dict[str, list[Any]]]] = {
    ("messages",): _messages,
    ("prompt", "completion"): _pairs,
    ("text",): _plain,
}


def _check_texts(where: str, name: str, values: Sequence[Any]) -> None:
    if not len(values):
        raise DataError(f"{where}: no rows, give at least one")
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{where}: row {row}: {name} is {value!r}, it must be text")
        if name != "prompt" and not value.strip():
            raise DataError(f"{where}: row {row}: {name} is empty, leave the row out")
