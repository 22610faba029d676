"""Text from many clients' language models in one batch: each row goes on from its prompt with its client's adapter.

`transformers` decodes, with a cache of keys and values. Sampling is ours in one point: its randomness is hashed from
the row and the place, as all randomness here, so what a row becomes depends on no other row of its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peertune.adapters.dropout import keyed_uniforms
from peertune.adapters.rows import Rows, bound_rows
from peertune.adapters.stacked import StackedModel
from peertune.data.batches import micro_batches
from peertune.memory import device_type
from peertune.randomness import Draw, words
from peertune.types import Tensors


@dataclass(frozen=True)
class Decoding:
    """How a language model goes on."""

    max_new_tokens: int
    temperature: float  # 0: always the likeliest token
    top_p: float  # the likeliest tokens that together have this probability are drawn from
    stop: Sequence[int]  # tokens that end a text
    pad: int
    seed: int


@torch.no_grad()
def generate(
    model: StackedModel,
    singles: Sequence[Tensors],
    prompts: Sequence[NDArray[np.int64]],
    decoding: Decoding,
    *,
    together: int,
    tokens: int,
) -> list[list[list[int]]]:
    """Return what each single adapter `[1, …]` makes of each prompt: new tokens, without the one that ends them.

    Rows of up to `together` adapters share a batch, of about `tokens` tokens with those to come. Row i draws the same
    random numbers with each adapter.
    """
    found: list[list[list[int]]] = [[[]] * len(prompts) for _ in singles]
    lengths = np.array([len(prompt) + decoding.max_new_tokens for prompt in prompts])  # in the end
    for start in range(0, len(singles), together):
        chunk = singles[start : start + together]
        adapters = {name: torch.cat([single[name] for single in chunk]) for name in chunk[0]}
        for numbers in micro_batches(lengths, tokens // len(chunk)):
            texts = _decode(model, adapters, [prompts[number] for number in numbers], numbers, decoding)
            for place, text in enumerate(texts):
                found[start + place // len(numbers)][numbers[place % len(numbers)]] = text
    return found


CACHE_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""How much of keys and values a batch may keep."""


def cached_tokens(base: Any) -> int:
    """Return how many tokens a batch may have whose keys and values are kept."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * size * base.dtype.itemsize
    return int(CACHE_BYTES[device_type(next(base.parameters()))] // each)


@torch.no_grad()
def pads_left(base: Any, pad: int) -> bool:
    """Whether a base goes on from a text in the same way with padding on its left; some that keep a state don't."""
    tokens = torch.tensor([[2, 3, 4]], device=base.device)
    padded = nn.functional.pad(tokens, (2, 0), value=pad)
    masks = torch.ones_like(tokens), nn.functional.pad(torch.ones_like(tokens), (2, 0))
    asked = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    base.eval()
    alone, beside = (
        base.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **asked).logits[0]
        for ids, mask in zip((tokens, padded), masks, strict=True)
    )
    return bool((alone - beside).norm() <= torch.finfo(base.dtype).eps ** 0.5 * alone.norm())


def _decode(
    model: StackedModel,
    adapters: Tensors,
    prompts: Sequence[NDArray[np.int64]],
    numbers: NDArray[np.int64],
    decoding: Decoding,
) -> list[list[int]]:
    """Go on from the same prompts, whose numbers are `numbers`, with each of the K adapters: K · len(prompts) texts."""
    first = next(iter(adapters.values()))
    device, clients, width = first.device, len(first), max(map(len, prompts))
    ids, mask = (torch.full((len(prompts), width), fill) for fill in (decoding.pad, 0))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    keys = torch.from_numpy(np.tile(words(decoding.seed, Draw.GENERATE, numbers).view(np.int64), clients)).to(device)
    whose = torch.arange(clients, device=device).repeat_interleave(len(prompts))
    model.base.eval()
    with bound_rows(Rows(adapters, whose, keys, False, model.streams)):
        whole = model.base.generate(  # type: ignore[operator]  # what transformers' language models have
            input_ids=ids.repeat(clients, 1).to(device),
            attention_mask=mask.repeat(clients, 1).to(device),
            logits_processor=[sampler(keys, width, decoding.temperature, decoding.top_p)]
            if decoding.temperature
            else [],
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=decoding.pad,
            eos_token_id=list(decoding.stop) or None,
        )
    return [list(takewhile(lambda token: token not in decoding.stop, text)) for text in whole[:, width:].tolist()]


def sampler(keys: Tensor, width: int, temperature: float, top_p: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what makes the likeliest token a sample: `(tokens so far [b, s], logits [b, V]) → [b, V]`.

    By the Gumbel-max trick, the largest of the logits with Gumbel noise added is a draw from their softmax. `keys [b]`
    and the number of tokens beyond `width` are what the noise is hashed from. Before, logits are divided by
    `temperature`, and all but the likeliest that together have the probability `top_p` are left out.
    """

    def noisy(tokens: Tensor, logits: Tensor) -> Tensor:
        logits = logits.float() / temperature
        if top_p < 1:
            ranked, order = logits.sort(descending=True)
            before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)  # of all that are likelier
            ranked = ranked.masked_fill(before >= top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter_(-1, order, ranked)
        uniform = keyed_uniforms(keys, tokens.shape[1] - width, logits.shape[-1])
        return logits - torch.log(-torch.log(uniform))

    return noisy
