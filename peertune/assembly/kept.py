"""Rows as a base reads them, kept between runs, by a digest of all that they follow from: texts, tokenizer, code."""

import json
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peertune import cache
from peertune.data import batches, chat, completions, tokens
from peertune.data.batches import Encoded, end_to_end, labels_of
from peertune.types import Split

_CODE = (batches, chat, completions, tokens)
"""Modules that say what becomes of a text."""
_TOKENIZER = ("chat_template", "model_input_names", "model_max_length", "split_special_tokens", "truncation_side")
"""What a tokenizer does beside what the one that it wraps does."""
_LIBRARIES = ("jinja2", "tokenizers", "transformers")


def kept(
    encode: Callable[[], Encoded], tokenizer: Any, split: Split, rows: NDArray[np.int64] | None, **settings: object
) -> Encoded:
    """Return what `encode` makes of these `rows` of a split, or all, with the settings; from before where it is kept.

    What a slow tokenizer makes is not kept: nobody can tell all that it follows from.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or cache.folder() is None:
        return encode()
    rows = np.arange(len(split)) if rows is None else rows
    name = f"tokens-{_digest(tokenizer, split, rows, settings)}"
    if (arrays := cache.read(name)) is not None:
        return _from_arrays(arrays, split, rows)
    encoded = encode()
    cache.write(name, _as_arrays(encoded, rows))
    return encoded


def _digest(tokenizer: Any, split: Split, rows: NDArray[np.int64], settings: object) -> str:
    """Return a digest of all that the tokens of these rows follow from."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # which each call sets as it needs them
    backend.no_truncation()
    found = sha256()
    for module in _CODE:
        found.update(Path(str(module.__file__)).read_bytes())
    asked = {name: getattr(tokenizer, name, None) for name in _TOKENIZER}
    said = [settings, asked, type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.pad_token_id]
    found.update(json.dumps([said, [version(name) for name in _LIBRARIES]], default=repr, sort_keys=True).encode())
    found.update(backend.to_str().encode())
    found.update(json.dumps([len(split), rows.tolist()]).encode())
    for name, values in sorted(split.columns.items()):
        text = json.dumps([name, [values[row] for row in rows.tolist()]], default=repr, ensure_ascii=False)
        found.update(text.encode(errors="surrogatepass"))
    found.update(np.ascontiguousarray(split.labels[rows]).data)
    return found.hexdigest()


def _as_arrays(encoded: Encoded, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return what is kept of encoded rows; half the bytes suffice for tokens."""
    found: dict[str, NDArray[Any]]
    found = {f"tokens.{name}": x.numpy().astype(np.int32) for name, x in encoded.tokens.items()}
    found |= {f"padding.{name}": np.array([token]) for name, token in encoded.padding.items()}
    found |= {"lengths": encoded.lengths[rows], "long": np.array(encoded.long, dtype=np.int64)}
    return found | ({"labels": encoded.labels.numpy().astype(np.int32)} if encoded.token_labels else {})


def _from_arrays(arrays: cache.Arrays, split: Split, rows: NDArray[np.int64]) -> Encoded:
    """Return the rows that were kept so."""
    tokens = {
        name.removeprefix("tokens."): torch.from_numpy(x.astype(np.int64))
        for name, x in arrays.items()
        if name.startswith("tokens.")
    }
    labels = arrays.get("labels")
    return Encoded(
        {},
        tokens,
        {name: int(arrays[f"padding.{name}"][0]) for name in tokens},
        *end_to_end(len(split), rows, arrays["lengths"]),
        labels_of(split) if labels is None else torch.from_numpy(labels.astype(np.int64)),
        arrays["long"].tolist(),
        token_labels=labels is not None,
    )
