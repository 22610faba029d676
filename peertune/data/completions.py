"""Rows of causal language models: a prompt, which is given, and a completion, which is learnt.

A row is a pair of both, a conversation whose last message is the completion, or plain text, which is all completion.
Prompt and completion are tokenised as one text; the completion's tokens are labelled, and the loss is on them alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peertune.data.batches import UNLABELLED, Encoded
from peertune.errors import DataError
from peertune.types import Split


@dataclass(frozen=True)
class _Text:
    """One row in words."""

    prompt: str
    completion: str
    ends: bool  # whether the model is to stop after it, where the completion's words don't say so
    special: bool  # whether the tokenizer adds its own tokens; a chat template has them


def encode_completions(tokenizer: Any, split: Split, inputs: Sequence[str], max_length: int) -> Encoded:
    """Tokenise prompts and completions once, and label the completions' tokens.

    Prompt and completion are tokenised as one text. A row longer than `max_length` tokens loses the beginning of its
    prompt (but for the token that begins every text), then the end of its completion; `Encoded.long` tells which.

    Raises DataError for a completion without tokens, and where the tokenizer lacks a chat template, or an end of text.
    """
    return _encode(tokenizer, _texts(tokenizer, split, inputs), max_length)


def encode_words(tokenizer: Any, split: Split, words: Sequence[str], max_length: int) -> Encoded:
    """Tokenise each row's prompt with the word of its class, which is what a model is to say."""
    prompts = split.columns["prompt"]
    texts = (_Text(prompt, words[label], False, True) for prompt, label in zip(prompts, split.labels, strict=True))
    return _encode(tokenizer, texts, max_length)


def encode_choices(tokenizer: Any, split: Split, words: Sequence[str], max_length: int) -> Encoded:
    """Tokenise each row's prompt with every word in turn, `N · len(words)` rows."""
    texts = (_Text(prompt, word, False, True) for prompt in split.columns["prompt"] for word in words)
    return _encode(tokenizer, texts, max_length)


def encode_prompts(
    tokenizer: Any, split: Split, inputs: Sequence[str], max_length: int
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Return the tokens of each row's prompt, its last `max_length` at most, and the completion that is right."""
    texts = list(_texts(tokenizer, split, inputs))
    if tuple(inputs) == ("messages",):
        right = [messages[-1]["content"] for messages in split.columns["messages"]]
    else:
        right = [text.completion for text in texts]
    prompts = []
    for text in texts:
        ids = tokenizer(text.prompt, add_special_tokens=text.special)["input_ids"]
        if not len(ids):
            raise DataError("task: a prompt without tokens; to generate, give each row a prompt")
        prompts.append(_cut(np.asarray(ids, dtype=np.int64), len(ids), max_length, tokenizer)[0])
    return prompts, right


def _texts(tokenizer: Any, split: Split, inputs: Sequence[str]) -> Iterable[_Text]:
    match tuple(inputs):
        case ("messages",):
            return [_spoken(tokenizer, row, messages) for row, messages in enumerate(split.columns["messages"])]
        case ("text",):
            return [_Text("", text, True, True) for text in split.columns["text"]]
        case _:
            pairs = zip(split.columns["prompt"], split.columns["completion"], strict=True)
            return [_Text(prompt, completion, True, True) for prompt, completion in pairs]


def _spoken(tokenizer: Any, row: int, messages: Sequence[Mapping[str, str]]) -> _Text:
    """Put a conversation in the words of the tokenizer's chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            "task: messages need a tokenizer with a chat template, and the base's has none; "
            "use a chat model, or columns prompt and completion"
        )
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template raises whatever it likes, for roles in an order that it does not know
        raise DataError(
            f"task: row {row}: the chat template refuses it ({' '.join(str(error).split())[:120]})"
        ) from error
    if not whole.startswith(prompt):
        raise DataError(
            f"task: row {row}: the chat template writes a conversation's beginning otherwise once it is answered; "
            "use columns prompt and completion"
        )
    return _Text(prompt, whole[len(prompt) :], False, False)


def _encode(tokenizer: Any, texts: Iterable[_Text], max_length: int) -> Encoded:
    if not tokenizer.is_fast:
        raise DataError("task: the base's tokenizer is a slow one, which can't tell where a completion begins")
    ids: list[NDArray[np.int64]] = []
    labels: list[NDArray[np.int64]] = []
    long = []
    for row, text in enumerate(texts):
        encoding = tokenizer(
            text.prompt + text.completion,
            add_special_tokens=text.special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        own = np.asarray(encoding["input_ids"], dtype=np.int64)
        ends = np.asarray([end for _, end in encoding["offset_mapping"]], dtype=np.int64)
        said = np.flatnonzero(ends > len(text.prompt))
        if not len(said):
            raise DataError(f"task: row {row}: {text.completion!r:.60} has no tokens; give a completion that has some")
        begin = int(said[0])
        if text.ends and tokenizer.eos_token_id is not None and own[-1] != tokenizer.eos_token_id:
            own = np.append(own, tokenizer.eos_token_id)
        if not text.ends:  # a token that the tokenizer puts after every text is no part of a word
            own = own[: int(said[-1]) + 1]
        own, begin, cut = *_cut(own, begin, max_length, tokenizer), len(own) > max_length
        if cut:
            long.append(row)
        mask = np.arange(len(own)) >= max(begin, 1)  # nothing comes before the first token to predict it from
        if not mask.any():
            raise DataError(f"task: row {row}: {text.completion!r:.60} is one token with none before it; give a prompt")
        ids.append(own)
        labels.append(np.where(mask, own, UNLABELLED))
    lengths = np.array([len(own) for own in ids], dtype=np.int64)
    return Encoded(
        {},
        {"input_ids": torch.from_numpy(np.concatenate(ids))},
        {"input_ids": tokenizer.pad_token_id},
        np.cumsum(lengths) - lengths,
        lengths,
        torch.from_numpy(np.concatenate(labels)),
        long,
    )


def _cut(ids: NDArray[np.int64], begin: int, max_length: int, tokenizer: Any) -> tuple[NDArray[np.int64], int]:
    """Shorten a row of which the first `begin` tokens are the prompt; return it, and where the completion begins."""
    surplus = len(ids) - max_length
    if surplus <= 0:
        return ids, begin
    first = int(begin > 0 and ids[0] == tokenizer.bos_token_id)
    gone = min(surplus, max(0, begin - max(first, 1)))
    kept = np.concatenate([ids[:first], ids[first + gone :]])
    return kept[:max_length], begin - gone
