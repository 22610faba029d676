"""Images matched to the names of classes: CLIP's zero-shot head (Radford et al., arXiv 2103.00020, section 3.1).

There is no layer with an output for each class. The text tower turns every class's name, put in templates such as
`a photo of a {}`, into a direction, and an image belongs to the class whose direction is nearest to its own. Adapters
in the text tower move the classes, those in the image tower the images.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peertune.adapters.rows import Rows, bound_rows, current_rows
from peertune.adapters.stacked import Forward

_SPREAD = -0x61C8864680B583EB  # the golden ratio's 64-bit fraction: prompts of one client draw from keys far apart


def match_names(input_ids: Tensor, attention_mask: Tensor, templates: int) -> Forward:
    """Return what turns a CLIP model and `pixel_values [b, 3, H, W]` into logits `[b, C]`.

    `input_ids` and `attention_mask [P, s]` are the prompts of one model, class by class, `templates` of each class. A
    logit is the cosine of the image's embedding and of the class's, times `exp(logit_scale)`, where a class's embedding
    is the mean of those of its prompts, each of length 1. A row is held against the classes of its own client: where
    the text tower carries sites, the prompts pass through it once for each client of the stack, with masks of dropout
    that all rows of a client's step share. Else they pass once for all, and what comes out is kept.
    """
    kept: dict[torch.device, Tensor] = {}

    def forward(base: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        pixels, rows = inputs["pixel_values"], current_rows()
        images = _unit(base.visual_projection(base.vision_model(pixel_values=pixels).pooler_output))
        if rows is not None and any(name.startswith(("text_model.", "text_projection.")) for name in rows.adapters):
            text_rows, places = _text_rows(rows, len(input_ids)), rows.clients
            with bound_rows(text_rows):
                classes = embed(base, pixels.device, len(text_rows.clients) // len(input_ids))
        else:
            if pixels.device not in kept:
                with bound_rows(None), torch.no_grad():
                    kept[pixels.device] = embed(base, pixels.device, 1)
            classes, places = kept[pixels.device], torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
        cosines = (images @ classes.flatten(0, 1).T).view(len(images), *classes.shape[:2])
        return cosines[torch.arange(len(images), device=pixels.device), places] * _wide(base.logit_scale).exp()

    def embed(base: Any, device: torch.device, clients: int) -> Tensor:
        """Return the directions of the classes, `[clients, C, d]`."""
        ids, mask = (x.to(device).repeat(clients, 1) for x in (input_ids, attention_mask))
        prompts = _unit(base.text_projection(base.text_model(input_ids=ids, attention_mask=mask).pooler_output))
        return _unit(prompts.view(clients, -1, templates, prompts.shape[-1]).mean(2))

    return forward


def _text_rows(rows: Rows, prompts: int) -> Rows:
    """Return the rows of all prompts of each client of the stack, `K · prompts` of them."""
    assert rows.shared is not None, "rows of clients say what their step shares"
    stack, device = len(next(iter(rows.adapters.values()))), rows.clients.device
    own = rows.shared.new_zeros(stack).index_put((rows.clients,), rows.shared)
    keys = own[:, None] + _SPREAD * torch.arange(1, prompts + 1, device=device)
    clients = torch.arange(stack, device=device).repeat_interleave(prompts)
    return replace(rows, clients=clients, keys=keys.flatten(), shared=own[clients], packing=None, columns={}, made={})


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(_wide(x), dim=-1)


def _wide(x: Tensor) -> Tensor:
    """Return float32 at least: at a scale of 100, bfloat16 would round logits to an eighth."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
