"""What people would write: one PEFT model with an adapter for each client, trained one client after the other."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from peertune.adapters.packing import pack
from peertune.assembly.build import Built
from peertune.data.batches import pack_rows
from peertune.types import Batch

ClientRows = tuple[list[Tensor], Tensor]
"""A client's rows of one step: token ids of each, and labels `[rows]`."""


def client_rows(batches: Sequence[Batch], clients: int) -> list[ClientRows]:
    """Take the micro-batches of one local step apart again, into each client's rows without padding."""
    ids: list[list[Tensor]] = [[] for _ in range(clients)]
    labels: list[list[Tensor]] = [[] for _ in range(clients)]
    for batch in batches:
        lengths = batch.inputs["attention_mask"].sum(1).tolist()
        for row, (client, length) in enumerate(zip(batch.clients.tolist(), lengths, strict=True)):
            ids[client].append(batch.inputs["input_ids"][row, :length])
            labels[client].append(batch.labels[row])
    return [(rows, torch.stack(own)) for rows, own in zip(ids, labels, strict=True)]


class PeftLoop:
    """Trains all clients for a step, one after the other."""

    def __init__(
        self,
        run: Built,
        *,
        dtype: torch.dtype,
        attention: str | None = None,
        pad_to: int | None = None,
        adapters_in_float32: bool = True,
        packed: bool = False,
    ) -> None:
        """Take the recipe's base, head, rank, rate and dropout from `run`.

        `attention` is transformers' (None: its default); rows are padded to `pad_to` tokens, or else to the longest of
        their client's batch, or `packed`, which takes BERT or RoBERTa. PEFT keeps the adapters of a bfloat16 base in
        float32, unless told otherwise.
        """
        recipe = run.resolved
        self.pad_to = pad_to
        self.packed = packed
        self.device = run.job.device
        extra = {} if attention is None else {"attn_implementation": attention}
        base = AutoModelForSequenceClassification.from_pretrained(
            recipe.model.name, num_labels=len(run.labels), dtype=dtype, **extra
        )
        base.load_state_dict({name: x.to(dtype) for name, x in run.head.items()}, strict=False)
        if not recipe.model.dropout:
            for module in base.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        base.to(self.device)
        lora = LoraConfig(
            r=recipe.lora.r,
            lora_alpha=int(recipe.lora.lora_alpha),
            lora_dropout=recipe.lora.lora_dropout,
            target_modules=recipe.lora.target_modules,
        )
        names = [f"client-{client}" for client in range(recipe.clients)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(
                base, lora, adapter_name=names[0], autocast_adapter_dtype=adapters_in_float32
            ).train()
            for name in names[1:]:
                self.model.add_adapter(name, lora, autocast_adapter_dtype=adapters_in_float32)
        self.optimizers = {}
        for name in names:
            self.model.set_adapter(name)
            parameters = [x for x in self.model.parameters() if x.requires_grad]
            self.optimizers[name] = torch.optim.AdamW(
                parameters, lr=recipe.training.learning_rate, weight_decay=recipe.training.weight_decay
            )

    def step(self, rows: Sequence[ClientRows]) -> list[float]:
        """Train every client on its rows and return their losses."""
        losses = []
        for (name, optimizer), (ids, labels) in zip(self.optimizers.items(), rows, strict=True):
            self.model.set_adapter(name)
            logits = self._packed(ids) if self.packed else self._padded(ids)
            loss = nn.functional.cross_entropy(logits.float(), labels.to(self.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def _padded(self, ids: Sequence[Tensor]) -> Tensor:
        tokens = nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
        if self.pad_to is not None:
            tokens = nn.functional.pad(tokens, (0, self.pad_to - tokens.shape[1]))
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        logits: Tensor = self.model(input_ids=tokens.to(self.device), attention_mask=mask.to(self.device)).logits
        return logits

    def _packed(self, ids: Sequence[Tensor]) -> Tensor:
        """Lay rows end to end in blocks, kept apart by a mask, and give the head the first token of each."""
        packing = pack_rows(np.array([len(row) for row in ids]))
        assert packing is not None, "rows of a step are short enough to share blocks"
        packing = packing.to(self.device)
        tokens = pack(nn.utils.rnn.pad_sequence(list(ids), batch_first=True).to(self.device), packing)
        base: Any = self.model.base_model.model
        apart = packing.rows[:, None, :, None] != packing.rows[:, None, None, :]
        mask = torch.zeros_like(apart, dtype=base.dtype).masked_fill_(apart, torch.finfo(base.dtype).min)
        backbone = base.base_model
        positions = packing.positions + getattr(backbone.embeddings, "padding_idx", -1) + 1  # RoBERTa counts from there
        hidden = backbone(input_ids=tokens, position_ids=positions, attention_mask=mask).last_hidden_state
        first = hidden.flatten(0, 1)[packing.starts][:, None]
        pooled = first if backbone.pooler is None else base.dropout(backbone.pooler(first))
        logits: Tensor = base.classifier(pooled)
        return logits
