"""Texts as a tokenizer has them: their tokens end to end, and which texts were cut."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

TOGETHER = 1000
"""Texts that are tokenised at a time: what a tokenizer says of each takes much more memory than its tokens."""


class Tokenised(NamedTuple):
    """The tokens of N texts, or pairs of texts."""

    features: Mapping[str, Tokens]  # `input_ids`, and what else the base takes; each `[total]`, the rows end to end
    lengths: Tokens  # [N]
    cut: list[int]  # the rows that were longer than they may be; ascending


def tokenise(tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int) -> Tokenised:
    """Tokenise texts, or pairs of them: `texts` are one or two columns. Rows are cut at `max_length` tokens."""
    rows: dict[str, list[Sequence[int]]] = {}
    cut: list[int] = []
    encode = _by_backend if _is_plain(tokenizer) else _by_transformers
    for start in range(0, len(texts[0]), TOGETHER):
        features, long = encode(tokenizer, [column[start : start + TOGETHER] for column in texts], max_length)
        for name, values in features.items():
            rows.setdefault(name, []).extend(values)
        cut += [start + row for row in long]
    lengths = np.array([len(row) for row in rows["input_ids"]], dtype=np.int64)
    flat = {name: np.fromiter(chain.from_iterable(x), np.int64, int(lengths.sum())) for name, x in rows.items()}
    return Tokenised(flat, lengths, cut)


def put_around(tokenizer: Any) -> tuple[str, str]:
    """Return the token that a tokenizer puts before every text and the one that it puts after, as text; "" for none.

    A text that has them already, as texts from chat templates do, would have them twice.
    """
    made = tokenizer("a", return_special_tokens_mask=True)
    tokens, added = tokenizer.convert_ids_to_tokens(made["input_ids"]), made["special_tokens_mask"]
    return (tokens[0] if added and added[0] else "", tokens[-1] if added and added[-1] else "")


def _is_plain(tokenizer: Any) -> bool:
    """Whether `transformers` only hands texts on to the tokenizer that it wraps."""
    ways = (getattr(type(tokenizer), name, None) for name in ("__call__", "_encode_plus"))
    return [getattr(way, "__module__", None) for way in ways] == [
        "transformers.tokenization_utils_base",
        "transformers.tokenization_utils_tokenizers",
    ]


def _by_backend(
    tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int
) -> tuple[dict[str, list[Sequence[int]]], list[int]]:
    """Return the features of each row, and which were cut, without the places of tokens in the text: half the time."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast(list(zip(*texts, strict=True)) if len(texts) > 1 else list(texts[0]))
    features = {"input_ids": [row.ids for row in encodings]}
    if "token_type_ids" in tokenizer.model_input_names:
        features["token_type_ids"] = [row.type_ids for row in encodings]
    full = [row for row, ids in enumerate(features["input_ids"]) if len(ids) >= max_length]
    return features, [row for row in full if encodings[row].overflowing]


def _by_transformers(
    tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int
) -> tuple[dict[str, list[Sequence[int]]], list[int]]:
    """Do the same by the tokenizer's own way."""
    features = dict(
        tokenizer(
            *(list(column) for column in texts),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
        )
    )
    full = [row for row, ids in enumerate(features["input_ids"]) if len(ids) >= max_length]
    if not full:
        return features, []
    whole = tokenizer(*([column[row] for row in full] for column in texts), verbose=False)["input_ids"]
    return features, [row for row, ids in zip(full, whole, strict=True) if len(ids) > max_length]
