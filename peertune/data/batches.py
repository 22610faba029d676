"""From a task's rows to the batches that the base takes.

Rows are encoded once. In a local step every client draws its own rows; those of several clients travel together in
micro-batches of about as many tokens as a budget says. Where the base's layers take packed rows, a micro-batch comes
with a plan that lays whole rows end to end in blocks; elsewhere rows are sorted by length first. Either way almost no
padding is computed. Gradients add up over micro-batches, which makes all of it exact: it changes how rows travel, not
which rows a client trains on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peertune.data.images import Images, Pixels
from peertune.data.poison import Twins
from peertune.data.tokens import put_around, tokenise
from peertune.errors import DataError
from peertune.privacy.draws import keyed, sampled
from peertune.randomness import Draw, generator, words
from peertune.types import Batch, Packing, Split

UNLABELLED = -100
"""In the place of a token that a language model need not predict, as in `transformers`."""


@dataclass(frozen=True)
class Encoded:
    """A split as the model takes it: N rows of whole arrays, or of token sequences laid end to end.

    Rows that nobody here trains on need not be tokenised, and then have no tokens.
    """

    arrays: Mapping[str, Tensor | Pixels]  # [N, …], the same size for every row (images)
    tokens: Mapping[str, Tensor]  # [total], the rows of each feature end to end
    padding: Mapping[str, int]  # what each token feature is padded with
    starts: NDArray[np.int64]  # [N], where each row's tokens start
    lengths: NDArray[np.int64]  # [N], tokens of each row, as the base counts them
    labels: Tensor  # [N] int64 or float32; of a language model [total], the tokens themselves or UNLABELLED
    long: Sequence[int] = ()  # the rows that were longer than they may be, and were cut; ascending

    token_labels: bool = False  # whether labels are a language model's, tokens to predict

    def __len__(self) -> int:
        return len(self.lengths)

    def said(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens to predict in these rows, end to end, `[T]`."""
        own = [self.labels[self.starts[row] :][: self.lengths[row]] for row in rows.tolist()]
        labels = torch.cat(own)
        said: NDArray[np.int64] = labels[labels != UNLABELLED].numpy()
        return said

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """How many labels each row's loss is the sum over, `[N]`."""
        if not self.token_labels:
            return np.ones(len(self), dtype=np.int64)
        labelled = np.concatenate([[0], np.cumsum(self.labels.numpy() != UNLABELLED)])
        counts: NDArray[np.int64] = labelled[self.starts + self.lengths] - labelled[self.starts]
        return counts


def encode_text(
    tokenizer: Any,
    split: Split,
    inputs: Sequence[str],
    max_length: int,
    rows: NDArray[np.int64] | None = None,
) -> Encoded:
    """Tokenise a split once; `inputs` are one or two text columns, rows are cut at `max_length` tokens, and told.

    Given `rows`, ascending, only these are tokenised; the others have no tokens.

    Raises DataError for a row without tokens, or where `max_length` has no room for text beside the special tokens.
    """
    rows = np.arange(len(split)) if rows is None else rows
    texts = [[split.columns[name][row] for row in rows.tolist()] for name in inputs]
    first, last = put_around(tokenizer)
    texts[0] = [text.removeprefix(first) for text in texts[0]]
    texts[-1] = [text.removesuffix(last) for text in texts[-1]]
    found = tokenise(tokenizer, texts, max_length)
    if not found.lengths.all():
        empty = split.called(int(rows[found.lengths.argmin()]))
        raise DataError(f"task: {empty} of the data has no tokens; remove empty rows")
    if (most := int(found.lengths.max())) > max_length:
        raise DataError(f"training.max_length: {max_length} leaves no room for text; give {most + 2} or more")
    tokens = {name: torch.from_numpy(x) for name, x in found.features.items()}
    padding = {name: tokenizer.pad_token_id if name == "input_ids" else 0 for name in tokens}
    places = end_to_end(len(split), rows, found.lengths)
    return Encoded({}, tokens, padding, *places, labels_of(split), rows[found.cut].tolist())


def end_to_end(
    size: int, rows: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each row of a split of this size starts, and how long it is, where only `rows` have a length."""
    of_all = np.zeros(size, dtype=np.int64)
    of_all[rows] = lengths
    return np.cumsum(of_all) - of_all, of_all


def encode_images(split: Split, tokens: int, process: Callable[[Any], Tensor] | None = None) -> Encoded:
    """Take a split of images; every one is `tokens` tokens long to the base.

    `pixel_values` are `[N, C, H, W]`, and taken as they are, or `Images`, which `process` turns into `[C, H, W]` one by
    one when they are wanted.
    """
    images = split.columns["pixel_values"]
    pixels: Tensor | Pixels
    if isinstance(images, Images):
        assert process is not None, "images are processed as their base wants them"
        pixels = Pixels(images, process)
    else:
        pixels = torch.from_numpy(np.asarray(images, dtype=np.float32))
    zeros = np.zeros(len(split), dtype=np.int64)
    return Encoded({"pixel_values": pixels}, {}, {}, zeros, zeros + tokens, labels_of(split))


def labels_of(split: Split) -> Tensor:
    """Return the labels of a split's rows, `[N]`: int64 or float32."""
    labels = torch.from_numpy(np.asarray(split.labels))
    return labels.float() if labels.is_floating_point() else labels.long()


def make_batch(
    encoded: Encoded,
    rows: NDArray[np.int64],
    *,
    clients: Tensor,
    weights: Tensor,
    keys: Tensor,
    shared: Tensor,
    packed: int,
    each: int | None = None,
) -> Batch:
    """Put these rows in a batch; `clients`, `weights`, `keys`, `shared` and `each` are as `Batch` has them.

    Where `packed` isn't 0, the batch has a packing, as `pack_rows` makes one with this `multiple`.
    A language model predicts each labelled token from the place before it.
    """
    inputs, places = pad(encoded, rows), None
    if not encoded.token_labels:
        labels = encoded.labels[rows]
    else:
        lengths = encoded.lengths[rows]
        row = np.repeat(np.arange(len(rows)), lengths)
        position = in_rows(lengths)
        tokens = encoded.labels[encoded.starts[rows][row] + position]
        wanted = tokens != UNLABELLED
        labels = tokens[wanted]
        places = torch.from_numpy(row * int(lengths.max()) + position - 1)[wanted]
    packing = pack_rows(encoded.lengths[rows], packed) if packed else None
    return Batch(inputs, labels, clients, weights, keys, packing, shared, places, each)


def in_rows(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each token's position in its row, of rows of these lengths end to end."""
    position: NDArray[np.int64] = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return position


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


BLOCK = 48
"""Slots of a block where no row is longer: attention within a block costs as its square, empty slots fall with it."""


SEATS = 8
"""How many rows a block has at most is rounded up to a multiple of it, so that shapes recur."""


def pack_rows(lengths: NDArray[np.int64], multiple: int = 1) -> Packing | None:
    """Plan how rows of these lengths, padded to the longest, lie in blocks of one size; None where it saves no block.

    The longest first, each row goes to the fullest block that has room for it. A block is as long as the longest row,
    `BLOCK` at least, rounded up to a multiple of 16. Where there are more than eight, empty ones are added, up to a
    `multiple`.
    """
    size = -(-max(BLOCK, int(lengths.max())) // 16) * 16
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # blocks by the room that is left in them
    blocks, starts, count = np.empty_like(lengths), np.empty_like(lengths), 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        room = next((room for room in range(length, size + 1) if with_room[room]), size)
        if with_room[room]:
            block = with_room[room].pop()
        else:
            block, count = count, count + 1
        blocks[row], starts[row] = block, size - room
        with_room[room - length].append(block)
    count = count if count <= 8 else -(-count // multiple) * multiple
    if count >= len(lengths):
        return None
    width = int(lengths.max())
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = in_rows(lengths)
    starts += blocks * size
    slots = starts[row] + position
    in_block = np.bincount(blocks, minlength=count)  # rows
    place, order = np.empty_like(starts), np.argsort(starts)
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(in_block) - in_block, in_block)
    most = -(-int(in_block.max()) // SEATS) * SEATS
    rows, positions = np.full(count * size, -1), np.zeros(count * size, dtype=np.int64)
    rows[slots], positions[slots] = row, position
    return Packing(
        torch.from_numpy(slots),
        torch.from_numpy(row * width + position),
        torch.from_numpy(rows).view(count, size),
        torch.from_numpy(positions).view(count, size),
        width,
        torch.from_numpy(starts),
        torch.from_numpy(blocks * most + place),
        most,
    )


def even_parts(lengths: NDArray[np.int64], tokens: int, least: int = 1) -> list[NDArray[np.int64]]:
    """Cut rows, in their order, into parts of alike many tokens: about `tokens` each, and `least` parts or more.

    Returns row numbers. Where a row is longer than such a part, a part beside it may be empty and is left out.
    """
    total = int(lengths.sum())
    parts = max(least, round(total / tokens), 1)
    middles = np.cumsum(lengths) - lengths / 2
    cuts = np.searchsorted(middles, np.arange(1, parts) * total / parts)
    return [part for part in np.split(np.arange(len(lengths)), cuts) if len(part)]


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
    return generator(seed, Draw.EPOCH, client, epoch).permutation(rows)


def sample(seed: int, client: int, rows: int, step: int, size: int) -> NDArray[np.int64]:
    """Return which of a client's `rows` rows it trains on in a step, `[size]`: a pure function of its arguments.

    The client goes through its rows in a new order each epoch, without replacement; a batch may straddle two epochs.
    """
    places = np.arange(step * size, (step + 1) * size)
    return np.array([_epoch(seed, client, int(place) // rows, rows)[place % rows] for place in places], dtype=np.int64)


class Drawn(NamedTuple):
    """The rows that some clients train on in one local step, one client's after the other's; `b` of them."""

    rows: NDArray[np.int64]  # [b], their numbers
    clients: NDArray[np.int64]  # [b], whose each is: a place among the clients
    weights: NDArray[np.float64]  # [b], what each counts in its client's mean
    keys: NDArray[np.int64]  # [b], what its dropout masks are drawn from
    shared: NDArray[np.int64]  # [b], what masks are drawn from that all rows of a client's step share


class Drawing(NamedTuple):
    """How a client whose rows are private draws them: each by itself, with one chance, as nobody else can foresee."""

    key: bytes  # the client's own
    rate: float  # the chance


@dataclass(frozen=True)
class TrainingSteps:
    """The local steps of a run: which rows each client draws, and the micro-batches in which they travel."""

    encoded: Encoded
    # which rows client k holds
    parts: Mapping[int, NDArray[np.int64]] | Sequence[NDArray[np.int64]]
    rows_per_step: int  # of each client
    local_steps: int  # a round
    tokens: int  # of a micro-batch, about
    clients_together: int  # about so many neighbouring clients have rows in a micro-batch at most
    packed: int  # blocks of its packing come in multiples of this; 0: it has none
    seed: int
    row_weights: NDArray[np.float64] | None = None  # [N], what each row counts in its client's mean; None: all alike
    twins: Mapping[int, Sequence[Twins]] = field(default_factory=dict)  # what hostile clients train on for their rows
    drawings: Mapping[int, Drawing] = field(default_factory=dict)  # of clients whose rows are private: all, or none

    def __call__(
        self, clients: Sequence[int], rounds: int | Sequence[int], first: int = 0, salts: Sequence[bytes] = ()
    ) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each of a round's local steps of these clients, each in a round of its own or all.

        They begin with step `first` of the round. A batch's client numbers are places in `clients`, as the stack has
        them. Where rows are private, `salts [K]` are digests of where each client begins the round; how many rows a
        step has then varies, and it may have none.
        """
        return steps_together([(self, clients, rounds, salts)], first)

    def drawn(self, clients: Sequence[int], steps: NDArray[np.int64], salts: Sequence[bytes] = ()) -> Drawn:
        """Return what these clients train on, each in its own of the `steps [K]`, counted from the run's start."""
        if self.drawings:
            return self._drawn_alone(clients, steps, salts)
        size = self.rows_per_step
        whose = zip(clients, map(self._held, clients, steps.tolist()), steps.tolist(), strict=True)
        rows = np.concatenate([held[sample(self.seed, client, len(held), step, size)] for client, held, step in whose])
        positions = np.tile(np.arange(size), len(clients))
        keys = words(self.seed, Draw.DROPOUT, np.repeat(clients, size), np.repeat(steps, size), positions)
        shared = np.repeat(words(self.seed, Draw.SHARED_DROPOUT, clients, steps).view(np.int64), size)
        # A client's loss is the mean over its labels.
        each = np.ones(len(rows)) if self.row_weights is None else self.row_weights[rows]
        labels = (each * self.encoded.targets[rows]).reshape(len(clients), size).sum(axis=1)
        weights = each / np.repeat(np.where(labels > 0, labels, 1), size)
        return Drawn(rows, np.repeat(np.arange(len(clients)), size), weights, keys.view(np.int64), shared)

    def _drawn_alone(self, clients: Sequence[int], steps: NDArray[np.int64], salts: Sequence[bytes]) -> Drawn:
        """Return the same where rows are private: nothing of a row depends on which others are drawn."""
        places, rows = [], []
        for client, step, salt in zip(clients, steps.tolist(), salts, strict=True):
            held, drawing = self._held(client, step), self.drawings[client]
            places.append(sampled(keyed(drawing.key, "rows", step, salt), len(held), drawing.rate))
            rows.append(held[places[-1]])
        sizes, found = [len(own) for own in rows], np.concatenate(rows)
        whose = np.repeat(np.arange(len(clients)), sizes)
        counters = np.repeat(clients, sizes), np.repeat(steps, sizes), np.concatenate(places)
        keys = words(self.seed, Draw.DROPOUT, *counters)
        shared = np.repeat(words(self.seed, Draw.SHARED_DROPOUT, clients, steps), sizes)
        each = np.ones(len(found)) if self.row_weights is None else self.row_weights[found]
        weights = each / np.maximum(self.encoded.targets[found], 1)  # the mean over the row's own labels
        return Drawn(found, whose, weights, keys.view(np.int64), shared.view(np.int64))

    def _held(self, client: int, step: int) -> NDArray[np.int64]:
        """Return the rows from which a client draws in a step."""
        now = (twins for twins in self.twins.get(client, ()) if twins.first <= step // self.local_steps <= twins.last)
        return next((twins.rows for twins in now), self.parts[client])


def steps_together(
    runs: Sequence[tuple[TrainingSteps, Sequence[int], int | Sequence[int], Sequence[bytes]]], first: int = 0
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each local step, from `first` on, of some clients of several runs, in these rounds.

    With the rounds come the salts of clients whose rows are private. The runs have the same encoded rows, and as many
    local steps. A batch's client numbers are places among all clients, one run's after the other's.
    """
    steps = runs[0][0]
    for number in range(first, steps.local_steps):
        each = [
            one.drawn(clients, np.broadcast_to(rounds, len(clients)) * one.local_steps + number, salts)
            for one, clients, rounds, salts in runs
        ]
        starts = np.cumsum([0, *(len(clients) for _, clients, _, _ in runs)])
        placed = [drawn._replace(clients=drawn.clients + start) for drawn, start in zip(each, starts, strict=False)]
        yield _cut(steps, Drawn(*map(np.concatenate, zip(*placed, strict=True))), int(starts[-1]))


def _cut(steps: TrainingSteps, drawn: Drawn, clients: int) -> list[Batch]:
    """Cut what so many clients have drawn into micro-batches.

    Rows that all are of one length stay in their order, and a client's in one batch where it has room for them: sites
    then multiply each client's rows with its own factors alone (`peertune.adapters.rows`). Rows that are private have
    their gradients each by itself: they are sorted by length, and never packed.
    """
    if not len(drawn.rows):
        return []
    lengths, least = steps.encoded.lengths[drawn.rows], -(-clients // steps.clients_together)
    alone, packed = bool(steps.drawings), 0 if steps.drawings else steps.packed
    whole = steps.tokens // (steps.rows_per_step * int(lengths.max()))  # clients whose rows have room in one
    by_client = not (alone or packed) and whole > 0 and int(lengths.min()) == int(lengths.max())
    if alone:
        chosen = [*micro_batches(lengths, steps.tokens)]
    elif packed:
        chosen = even_parts(lengths, steps.tokens, least)
    elif by_client:
        rows = np.arange(len(lengths)).reshape(clients, -1)
        chosen = [part.flatten() for part in np.array_split(rows, max(least, -(-clients // whole)))]
    else:
        groups = np.array_split(np.arange(len(lengths)), least)
        chosen = [group[part] for group in groups for part in micro_batches(lengths[group], steps.tokens)]
    return [
        make_batch(
            steps.encoded,
            drawn.rows[part],
            clients=torch.from_numpy(drawn.clients[part]),
            weights=torch.from_numpy(drawn.weights[part]),
            keys=torch.from_numpy(drawn.keys[part]),
            shared=torch.from_numpy(drawn.shared[part]),
            packed=packed,
            each=steps.rows_per_step if by_client else None,
        )
        for part in chosen
    ]


def validation_batches(
    encoded: Encoded, rows: NDArray[np.int64], tokens: int, packed: int
) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
    """Yield every row once, as one client's, with each row's place in `rows`, in batches of about `tokens` tokens.

    `packed` is as `TrainingSteps` has it.
    """
    lengths = encoded.lengths[rows]
    for part in even_parts(lengths, tokens) if packed else micro_batches(lengths, tokens):
        zeros = torch.zeros(len(part), dtype=torch.int64)
        as_one: dict[str, Any] = {"clients": zeros, "weights": zeros.double(), "keys": zeros, "shared": zeros}
        yield make_batch(encoded, rows[part], packed=packed, **as_one), part
