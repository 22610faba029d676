"""Rows of causal language models: a prompt, which is given, and a completion, which is learnt.

A row is a pair of both, a conversation whose last message is the completion, or plain text, which is all completion.
Prompt and completion are tokenised as one text; the completion's tokens are labelled, and the loss is on them alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peertune.data.batches import UNLABELLED, Encoded, end_to_end
from peertune.data.chat import variables
from peertune.data.tokens import TOGETHER, Tokens, put_around
from peertune.errors import DataError
from peertune.types import Split

_A_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Put before a chat template that writes the date, so that rows are the same on every day and at every peer."""


@dataclass(frozen=True)
class _Text:
    """One row in words."""

    row: str  # what its source calls it
    prompt: str
    completion: str
    ends: bool  # whether the model is to stop after it, where the completion's words don't say so
    special: bool  # whether the tokenizer adds its own tokens; a chat template has them


def encode_completions(
    tokenizer: Any,
    split: Split,
    inputs: Sequence[str],
    max_length: int,
    rows: NDArray[np.int64] | None = None,
) -> Encoded:
    """Tokenise prompts and completions once, and label the completions' tokens.

    Given `rows`, ascending, only these are tokenised; the others have no tokens.

    A row longer than `max_length` tokens loses the beginning of its prompt (but for the token that begins every text),
    then the end of its completion; `Encoded.long` tells which.

    Raises DataError for a completion without tokens, and where the tokenizer lacks a chat template, or an end of text.
    """
    rows = np.arange(len(split)) if rows is None else rows
    return _encode(tokenizer, _texts(tokenizer, split, inputs, rows.tolist()), max_length, len(split), rows)


def encode_words(
    tokenizer: Any, split: Split, words: Sequence[str], max_length: int, rows: NDArray[np.int64] | None = None
) -> Encoded:
    """Tokenise the prompt of each row, or of these, with the word of its class, which is what a model is to say."""
    rows = np.arange(len(split)) if rows is None else rows
    texts = [
        _Text(split.called(row), split.columns["prompt"][row], words[split.labels[row]], False, True)
        for row in rows.tolist()
    ]
    return _encode(tokenizer, texts, max_length, len(split), rows)


def encode_choices(tokenizer: Any, split: Split, words: Sequence[str], max_length: int) -> Encoded:
    """Tokenise each row's prompt with every word in turn, `N · len(words)` rows.

    All words of a row are said after the same prompt: it is cut as the longest asks for, and labels begin where the
    words first differ.
    """
    texts = [
        _Text(split.called(row), prompt, word, False, True)
        for row, prompt in enumerate(split.columns["prompt"])
        for word in words
    ]
    return _encode(tokenizer, texts, max_length, len(texts), np.arange(len(texts)), alike=len(words))


def encode_prompts(
    tokenizer: Any, split: Split, inputs: Sequence[str], max_length: int
) -> tuple[list[Tokens], list[int]]:
    """Return the tokens of each row's prompt, its last `max_length` at most, and which rows were cut."""
    prompts, long = [], []
    texts = _once(tokenizer, _texts(tokenizer, split, inputs, range(len(split))))
    for row, (tokens, spans) in enumerate(_tokenise(tokenizer, texts, [text.prompt for text in texts])):
        words = np.flatnonzero(spans[:, 0] < spans[:, 1])
        if not len(words):
            raise DataError(f"task: {texts[row].row}: a prompt without tokens; to generate, give each row a prompt")
        tokens = tokens[: words[-1] + 1]  # a model goes on from words, not from what a tokenizer ends texts with
        if len(tokens) > max_length:
            long.append(row)
        prompts.append(_cut(tokens, len(tokens), len(tokens) - max_length, tokenizer)[0])
    return prompts, long


def completions(tokenizer: Any, encoded: Encoded, rows: Sequence[int]) -> tuple[list[str], set[int]]:
    """Return what each row's labels say, and the tokens that end them: the last special one of each row."""
    special, said, ends = set(tokenizer.all_special_ids), [], set()
    for row in rows:
        labels = encoded.labels[int(encoded.starts[row]) :][: int(encoded.lengths[row])]
        tokens = labels[labels != UNLABELLED].tolist()
        said.append(tokenizer.decode(tokens, skip_special_tokens=True))
        ends.update([token for token in tokens if token in special][-1:])
    return said, ends


def _texts(tokenizer: Any, split: Split, inputs: Sequence[str], rows: Sequence[int]) -> list[_Text]:
    columns = [split.columns[name] for name in inputs]
    match tuple(inputs):
        case ("messages",):
            given = variables(tokenizer, split)
            return [_spoken(tokenizer, split.called(row), columns[0][row], given(row)) for row in rows]
        case ("text",):
            return [_Text(split.called(row), "", columns[0][row], True, True) for row in rows]
        case _:
            return [_Text(split.called(row), columns[0][row], columns[1][row], True, True) for row in rows]


def _spoken(tokenizer: Any, row: str, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> _Text:
    """Put a conversation in the words of the tokenizer's chat template, whose variables are `given`."""
    try:
        template = tokenizer.get_chat_template(tools=given.get("tools"))  # one for tools, or the default
        if "strftime_now" in template:
            template = _A_DAY + template
        said = {"tokenize": False, "chat_template": template, **given}
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **said)
        whole = tokenizer.apply_chat_template(messages, **said)
    except Exception as error:  # a template raises whatever it likes, for roles in an order that it does not know
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"task: {row}: the chat template refuses it ({reason})") from error
    if not whole.startswith(prompt):
        raise DataError(
            f"task: {row}: the chat template writes a conversation's beginning otherwise once it is answered; "
            "use columns prompt and completion"
        )
    return _Text(row, prompt, whole[len(prompt) :], False, False)


def _once(tokenizer: Any, texts: Sequence[_Text]) -> Sequence[_Text]:
    """Return texts without what the tokenizer puts around every one, where they have it already."""
    if not texts or not texts[0].special:
        return texts
    first, last = put_around(tokenizer)
    found = []
    for text in texts:
        prompt, completion = text.prompt.removeprefix(first), text.completion.removesuffix(last)
        found.append(
            replace(text, prompt=prompt, completion=completion if text.prompt else completion.removeprefix(first))
        )
    return found


def _tokenise(tokenizer: Any, texts: Sequence[_Text], words: Sequence[str]) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield the tokens of each text's `words`, and where in these each token begins and ends, `[s, 2]`."""
    if not tokenizer.is_fast:
        raise DataError(
            "task: the base's tokenizer is a slow one, which can't tell where a completion begins; "
            "use a base with a tokenizer.json"
        )
    for start in range(0, len(words), TOGETHER):
        encoding = tokenizer(
            list(words[start : start + TOGETHER]),
            add_special_tokens=texts[start].special,  # the same for all texts of a task
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for tokens, spans in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            yield np.asarray(tokens, dtype=np.int64), np.asarray(spans, dtype=np.int64).reshape(-1, 2)


def _encode(
    tokenizer: Any, texts: Sequence[_Text], max_length: int, size: int, numbers: NDArray[np.int64], alike: int = 1
) -> Encoded:
    """Tokenise the texts that have these numbers among `size` rows, of which each `alike` have one prompt."""
    rows: list[tuple[Tokens, int]] = []
    texts = _once(tokenizer, texts)
    whole = [text.prompt + text.completion for text in texts]
    for text, (tokens, spans) in zip(texts, _tokenise(tokenizer, texts, whole), strict=True):
        said = np.flatnonzero(spans[:, 1] > len(text.prompt))
        if not len(said):
            raise DataError(f"task: {text.row}: {text.completion!r:.60} has no tokens; give a completion that has some")
        if not text.ends:  # a token that the tokenizer puts after every text is no part of a word
            tokens = tokens[: said[-1] + 1]
        elif tokenizer.eos_token_id is not None and tokens[-1] != tokenizer.eos_token_id:
            tokens = np.append(tokens, tokenizer.eos_token_id)
        rows.append((tokens, int(said[0])))
    ids, labels, long = [], [], []
    for place, (tokens, begin) in enumerate(rows):
        same = rows[place - place % alike :][:alike]
        surplus = max(len(other) for other, _ in same) - max_length
        if surplus > 0:
            long.append(int(numbers[place]))
        own, begin = _cut(tokens, min(begin for _, begin in same), surplus, tokenizer)
        own = own[:max_length]
        mask = np.arange(len(own)) >= max(begin, 1)  # nothing comes before the first token to predict it from
        if not mask.any():
            said_one = f"{texts[place].completion!r:.60} is one token with none before it"
            raise DataError(f"task: {texts[place].row}: {said_one}; give a prompt")
        ids.append(own)
        labels.append(np.where(mask, own, UNLABELLED))
    return Encoded(
        {},
        {"input_ids": torch.from_numpy(np.concatenate(ids))},
        {"input_ids": tokenizer.pad_token_id},
        *end_to_end(size, numbers, np.array([len(own) for own in ids], dtype=np.int64)),
        torch.from_numpy(np.concatenate(labels)),
        long,
        token_labels=True,
    )


def _cut(tokens: Tokens, begin: int, surplus: int, tokenizer: Any) -> tuple[Tokens, int]:
    """Take `surplus` tokens, or as many as there are, from a prompt of the first `begin`; return what is left of both.

    The token that begins every text stays, and one of the prompt.
    """
    first = int(begin > 0 and tokens[0] == tokenizer.bos_token_id)
    gone = max(0, min(surplus, begin - max(first, 1)))
    return np.concatenate([tokens[:first], tokens[first + gone :]]), begin - gone
