"""What people would write: one PEFT model with an adapter for each client, trained one client after the other."""

import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from peertune.assembly.build import Built
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
    ) -> None:
        """Take the recipe's base, head, rank, rate and dropout from `run`.

        `attention` is transformers' (None: its default); rows are padded to `pad_to` tokens, or else to the longest of
        their client's batch. PEFT keeps the adapters of a bfloat16 base in float32, unless told otherwise.
        """
        recipe = run.resolved
        self.pad_to = pad_to
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
            tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True)
            if self.pad_to is not None:
                tokens = nn.functional.pad(tokens, (0, self.pad_to - tokens.shape[1]))
            lengths = torch.tensor([len(row) for row in ids])
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
            logits = self.model(input_ids=tokens.to(self.device), attention_mask=mask.to(self.device)).logits
            loss = nn.functional.cross_entropy(logits.float(), labels.to(self.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()
