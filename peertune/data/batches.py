"""From a task's rows to the batches that the base takes.

Rows are encoded once. In a local step every client draws its own rows; those of all clients are then sorted by length
and cut into micro-batches by a budget of tokens, so that almost no padding is computed. Gradients add up over
micro-batches, which makes the sort exact: it changes how rows travel, not which rows a client trains on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peertune import draws
from peertune.data.tasks import Split
from peertune.errors import DataError
from peertune.types import Batch


@dataclass(frozen=True)
class Encoded:
    """A split as the model takes it: N rows of whole arrays, or of token sequences laid end to end."""

    arrays: Mapping[str, Tensor]  # [N, …], the same size for every row (images)
    tokens: Mapping[str, Tensor]  # [total], the rows of each feature end to end
    padding: Mapping[str, int]  # what each token feature is padded with
    starts: NDArray[np.int64]  # [N], where each row's tokens start
    lengths: NDArray[np.int64]  # [N], tokens of each row, as the base counts them
    labels: Tensor  # [N], int64 or float32

    def __len__(self) -> int:
        return len(self.labels)


def encode_text(tokenizer: Any, split: Split, inputs: Sequence[str], max_length: int) -> Encoded:
    """Tokenise a split once; `inputs` are one or two text columns, rows are cut at `max_length` tokens.

    Raises DataError for a row without tokens, or where `max_length` has no room for text beside the special tokens.
    """
    texts = [list(split.columns[name]) for name in inputs]
    encoding = tokenizer(*texts, truncation=True, max_length=max_length, padding=False, return_attention_mask=False)
    lengths = np.array([len(row) for row in encoding["input_ids"]], dtype=np.int64)
    if not lengths.all():
        raise DataError(f"task: row {int(lengths.argmin())} of the data has no tokens; remove empty rows")
    if lengths.max() > max_length:
        raise DataError(
            f"training.max_length: {max_length} leaves no room for text; give {int(lengths.max()) + 2} or more"
        )
    tokens = {
        name: torch.from_numpy(np.concatenate([np.asarray(row) for row in rows])) for name, rows in encoding.items()
    }
    padding = {name: tokenizer.pad_token_id if name == "input_ids" else 0 for name in tokens}
    return Encoded({}, tokens, padding, np.cumsum(lengths) - lengths, lengths, _labels(split))


def encode_images(split: Split, tokens: int) -> Encoded:
    """Take a split of `pixel_values [N, C, H, W]` as it is; every image is `tokens` tokens long to the base."""
    pixels = torch.from_numpy(np.asarray(split.columns["pixel_values"], dtype=np.float32))
    zeros = np.zeros(len(pixels), dtype=np.int64)
    return Encoded({"pixel_values": pixels}, {}, {}, zeros, zeros + tokens, _labels(split))


def _labels(split: Split) -> Tensor:
    labels = torch.from_numpy(np.asarray(split.labels))
    return labels.float() if labels.is_floating_point() else labels.long()


def pad(encoded: Encoded, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """Return the model's inputs for these rows, `[b, …]`, padded on the right to the longest of them."""
    inputs = {name: value[rows] for name, value in encoded.arrays.items()}
    if encoded.tokens:
        offsets = torch.arange(int(encoded.lengths[rows].max()))
        mask = offsets < torch.from_numpy(encoded.lengths[rows])[:, None]
        places = torch.from_numpy(encoded.starts[rows])[:, None] + offsets * mask
        for name, value in encoded.tokens.items():
            inputs[name] = torch.where(mask, value[places], encoded.padding[name])
        inputs["attention_mask"] = mask.long()
    return inputs


def micro_batches(lengths: NDArray[np.int64], tokens: int) -> Iterator[NDArray[np.int64]]:
    """Sort rows by length and cut them so that no part, padded to its longest, holds more than `tokens` tokens.

    Yields row numbers, longest rows first: the largest micro-batch comes first, so memory that suffices for it
    suffices. A row longer than the budget goes alone.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


@lru_cache(maxsize=4096)
def _epoch(seed: int, client: int, epoch: int, rows: int) -> NDArray[np.int64]:
    return draws.generator(seed, "epoch", client, epoch).permutation(rows)


def sample(seed: int, client: int, rows: int, step: int, size: int) -> NDArray[np.int64]:
    """Return which of a client's `rows` rows it trains on in a step, `[size]`: a pure function of its arguments.

    The client goes through its rows in a new order each epoch, without replacement; a batch may straddle two epochs.
    """
    places = np.arange(step * size, (step + 1) * size)
    return np.array([_epoch(seed, client, int(place) // rows, rows)[place % rows] for place in places], dtype=np.int64)


def training_steps(
    encoded: Encoded,
    parts: Sequence[NDArray[np.int64]],
    *,
    rows_per_step: int,
    local_steps: int,
    tokens: int,
    seed: int,
) -> Callable[[Sequence[int], int], Iterator[list[Batch]]]:
    """Return `steps(clients, round)`, which yields the micro-batches of each local step of these clients.

    `parts[k]` are the rows that client k holds. A batch's client numbers are places in `clients`, as the stack has
    them.
    """

    def steps(clients: Sequence[int], round: int) -> Iterator[list[Batch]]:
        for step in range(round * local_steps, (round + 1) * local_steps):
            rows = np.concatenate(
                [parts[client][sample(seed, client, len(parts[client]), step, rows_per_step)] for client in clients]
            )
            places = np.repeat(np.arange(len(clients)), rows_per_step)
            positions = np.tile(np.arange(rows_per_step), len(clients))
            keys = draws.words(seed, "dropout", np.repeat(clients, rows_per_step), step, positions).view(np.int64)
            yield [
                Batch(
                    pad(encoded, rows[chosen]),
                    encoded.labels[rows[chosen]],
                    torch.from_numpy(places[chosen]),
                    torch.full((len(chosen),), 1 / rows_per_step, dtype=torch.float64),
                    torch.from_numpy(keys[chosen]),
                )
                for chosen in micro_batches(encoded.lengths[rows], tokens)
            ]

    return steps


def validation_batches(
    encoded: Encoded, rows: NDArray[np.int64], clients: int, tokens: int
) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
    """Yield every row once for every client, with each row's place in `rows`, in batches of at most `tokens` tokens."""
    for chosen in micro_batches(encoded.lengths[rows], max(1, tokens // clients)):
        inputs = pad(encoded, rows[chosen])
        total = len(chosen) * clients
        yield (
            Batch(
                {name: value.repeat(clients, *[1] * (value.dim() - 1)) for name, value in inputs.items()},
                encoded.labels[rows[chosen]].repeat(clients),
                torch.arange(clients).repeat_interleave(len(chosen)),
                torch.zeros(total, dtype=torch.float64),
                torch.zeros(total, dtype=torch.int64),
            ),
            np.tile(chosen, clients),
        )
