"""A step of ten clients that train a language model, one row each, beside a loop over the adapters of a PEFT model.

On a GPU the base has LLaMA-2-7B's shape in 4 bits and a row 512 tokens; on a CPU it has SmolLM-135M's in the machine's
best precision, and a row 128. Weights are random, and the text, too.
"""

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.measure import Figure, figure, interleaved, ratios
from benchmarks.setup import model as minilm
from peertune import build, load_recipe
from peertune.assembly.build import Built
from peertune.method import standing
from peertune.models.load import in_four_bits
from peertune.rounds.training import train_local
from peertune.types import Batch


class Shape(NamedTuple):
    """The sizes of a Llama."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    groups: int  # of heads that share keys and values


SHAPES = {
    "LLaMA-2-7B's shape": Shape(4096, 11008, layers=32, heads=32, groups=32),
    "SmolLM-135M's shape": Shape(576, 1536, layers=30, heads=9, groups=3),
}


def run(repeats: int = 5) -> list[Figure]:
    """Measure with dropout off."""
    gpu = torch.cuda.is_available()
    label, tokens = ("LLaMA-2-7B's shape", 512) if gpu else ("SmolLM-135M's shape", 128)
    settings = ["model.quantization=nf4", "training.gradient_checkpointing=true"] if gpu else []
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder), SHAPES[label])
        return compare(make(Path(folder), tokens, *settings), label, repeats)


def save_base(folder: Path, shape: Shape) -> None:
    """Write a Llama with random weights in bfloat16, MiniLM's tokenizer, which serves for speed, and random text."""
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    tokenizer.save_pretrained(folder)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    draw = np.random.default_rng(0)
    for name, rows in (("train", 200), ("validation", 2)):
        texts = [" ".join(draw.choice(words, 600)) for _ in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def make(folder: Path, tokens: int, *settings: str) -> Built:
    """Build ten clients over this base, which train on one row of so many tokens in a step."""
    recipe = (
        "task={name: instructions}",
        f"task.path={folder}",
        f"model.name={folder}",
        "lora={r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}",
        "training.per_device_train_batch_size=1",
        "training.local_steps=1",
        "training.max_grad_norm=0",
        "training.long_rows=cut",
        f"training.max_length={tokens}",
        "clients=10",
        "algorithm.name=dec_lora",
        "model.dropout=false",
        "partition={name: iid}",
    )
    return build(load_recipe("tad-llama-7b-sft", ["model.quantization=null", *recipe, *settings]))


def compare(setup: Built, label: str, repeats: int) -> list[Figure]:
    """Time both on the same rows, turn by turn; on a GPU say how much memory each takes at most."""
    job, clients = setup.job, setup.resolved.clients
    steps = [next(iter(job.steps(range(clients), [turn] * clients))) for turn in range(repeats + 2)]
    state, loop = job.state.clone(), Loop(setup)
    peaks: dict[str, list[float]] = {"peertune": [], "loop": []}

    def stacked(turn: int) -> list[float]:
        return train_local(
            job.model,
            state,
            [steps[turn]],
            job.algorithm.phase(0),
            job.optim,
            standing(job.clients, state.at(turn).rounds),
        ).loss.tolist()

    def watched(name: str, losses: list[float]) -> list[float]:
        if job.device.type == "cuda":
            peaks[name].append(torch.cuda.max_memory_allocated() / 2**30)
            torch.cuda.reset_peak_memory_stats()
        return losses

    ours, theirs = torch.tensor(stacked(0)), torch.tensor(loop.step(steps[0]))
    if not torch.allclose(ours, theirs, rtol=0.05):
        raise RuntimeError(f"the losses differ: {ours.tolist()} and {theirs.tolist()}")
    times = interleaved(
        {
            "loop": lambda turn: watched("loop", loop.step(steps[turn])),
            "peertune": lambda turn: watched("peertune", stacked(turn)),
        },
        repeats,
    )
    count = [sum(int(batch.inputs["attention_mask"].sum()) for batch in step) for step in steps[1 : repeats + 1]]
    rates = {name: ratios(count, taken) for name, taken in times.items()}
    speed = ratios(times["loop"], times["peertune"])
    figures = [
        figure(f"loop over PEFT's adapters ({label})", rates["loop"], "tokens/s"),
        figure(f"peertune ({label})", rates["peertune"], "tokens/s", note=f"{count[0]:,} tokens a step"),
        figure(f"speed over the loop ({label})", speed, "×"),
    ]
    return figures + [figure(f"most memory, {name} ({label})", found, "GiB") for name, found in peaks.items() if found]


class Loop:
    """One base with an adapter for each client, trained one after the other."""

    def __init__(self, setup: Built) -> None:
        """Load the recipe's base again, in the precision and with the layers of `setup`."""
        recipe, self.device = setup.resolved, setup.job.device
        dtype = getattr(torch, recipe.model.dtype)
        held: dict[str, Any] = {"device_map": {"": self.device}}
        if recipe.model.quantization is not None:
            held = in_four_bits(dtype, self.device)
        base = transformers.AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=dtype, **held)
        base.config.use_cache = False
        lora = LoraConfig(
            r=recipe.lora.r, lora_alpha=int(recipe.lora.lora_alpha), target_modules=recipe.lora.target_modules
        )
        names = [f"client-{client}" for client in range(recipe.clients)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers renames what PEFT reads
            if recipe.training.gradient_checkpointing:
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model = get_peft_model(base, lora, adapter_name=names[0]).train()
            for name in names[1:]:
                self.model.add_adapter(name, lora)
        self.optimizers = {}
        for name in names:
            self.model.set_adapter(name)
            own = [x for x in self.model.parameters() if x.requires_grad]
            self.optimizers[name] = torch.optim.AdamW(own, lr=recipe.training.learning_rate, weight_decay=0)

    def step(self, batches: Sequence[Batch]) -> list[float]:
        """Train every client on its row of a step, and return the losses."""
        rows: dict[int, Tensor] = {}
        for batch in batches:
            lengths = batch.inputs["attention_mask"].sum(1).tolist()
            for row, (client, length) in enumerate(zip(batch.clients.tolist(), lengths, strict=True)):
                rows[client] = batch.inputs["input_ids"][row : row + 1, :length]
        losses = []
        for client, (name, optimizer) in enumerate(self.optimizers.items()):
            self.model.set_adapter(name)
            ids = rows[client].to(self.device)
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()
