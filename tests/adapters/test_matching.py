"""A stack of K adapters over one CLIP equals K separate PEFT models, in either tower and in both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoders import disagreeing
from peft import LoraConfig, PeftModel, get_peft_model
from playing import at_step, every_kind, starting
from torch import Tensor, nn

from peertune.adapters.attention import register_attention
from peertune.adapters.matching import match_names
from peertune.adapters.peft_format import find_sites, save_adapter
from peertune.adapters.stacked import StackedModel, attach, init_adapters
from peertune.data.batches import Encoded, TrainingSteps
from peertune.method import Phase
from peertune.rounds.training import Optim, adamw, row_losses, train_local
from peertune.types import Batch, State, Tensors, take

K, R, ALPHA, CLASSES = 3, 2, 3, 4
ROWS = (4, 2, 3)  # rows of each client
START, END, VOCAB = 28, 29, 30
RATE, DECAY = 1e-2, 0.05
TOWERS: dict[str, str | list[str]] = {
    "image": r"vision_model.*(q_proj|fc1)|visual_projection",
    "text": r"text_model.*(v_proj|fc2)|text_projection",
    "both": ["q_proj", "v_proj"],
}
every_tower = pytest.mark.parametrize("targets", TOWERS.values(), ids=TOWERS)
sizes: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "projection_dim": 8,
}


def make_base(dropout: float = 0.0, exact: str = "sdpa") -> Any:
    """A base in float64 whose weights are large enough for every part to matter."""
    config = transformers.CLIPConfig(
        text_config=sizes
        | {"vocab_size": VOCAB, "max_position_embeddings": 12, "bos_token_id": START, "eos_token_id": END}
        | {"attention_dropout": dropout},
        vision_config=sizes | {"image_size": 6, "patch_size": 3, "attention_dropout": dropout},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.CLIPModel(config).double()
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                parameter.normal_(0.0, 0.3) if name != "logit_scale" else parameter.fill_(1.2)
    base.set_attn_implementation(exact)
    return base


def make_prompts(templates: int = 1) -> dict[str, Tensor]:
    """Prompts of unlike lengths, padded to the longest: `input_ids` and `attention_mask [P, s]`."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 8, (CLASSES * templates, 1), generator=generator)
    place = torch.arange(int(lengths.max()))
    ids = torch.randint(1, START, (CLASSES * templates, len(place)), generator=generator)
    ids = ids.where(place < lengths - 1, END)
    ids[:, 0] = START
    return {"input_ids": ids, "attention_mask": (place < lengths).long()}


def make_stack(
    targets: str | list[str],
    *,
    lora_dropout: float = 0.0,
    base_dropout: float = 0.0,
    templates: int = 1,
    checkpointing: bool = False,
) -> tuple[StackedModel, Tensors]:
    """A stack over a base, and adapters in which no two clients agree and B is not 0."""
    register_attention()
    base = make_base(base_dropout, "peertune")
    model = attach(
        base,
        find_sites(base, targets, []),
        r=R,
        lora_alpha=ALPHA,
        lora_dropout=lora_dropout,
        base_dropout=True,
        checkpointing=checkpointing,
        forward=match_names(**make_prompts(templates), templates=templates),
    )
    return model, disagreeing(model)


def make_rows(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """One client's images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 6, 6, generator=generator, dtype=torch.float64), torch.randint(
        CLASSES, (rows,), generator=generator
    )


def make_steps(steps: int) -> list[list[tuple[Tensor, Tensor]]]:
    """The rows of each client in each step."""
    return [[make_rows(10 * step + client, rows) for client, rows in enumerate(ROWS)] for step in range(steps)]


def make_batch(parts: list[tuple[Tensor, Tensor]]) -> Batch:
    """The rows of all clients in one batch, shuffled."""
    clients = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(labels) for _, labels in parts]))
    order = torch.randperm(len(clients), generator=torch.Generator().manual_seed(2))
    pixels, labels = (torch.cat(values)[order] for values in zip(*parts, strict=True))
    weights = 1 / torch.bincount(clients).double()[clients[order]]
    keys = torch.arange(len(clients))[order] + 7_000_000_000
    shared = clients[order] * 1_000_003 + 9_000_000_000
    return Batch({"pixel_values": pixels}, labels, clients[order], weights, keys, shared=shared)


def make_optim() -> Optim:
    return Optim(adamw(weight_decay=DECAY), lambda _: every_kind(RATE), 0.0, "never")


def phase(*kinds: str) -> Phase:
    return Phase(frozenset(kinds), frozenset())


class Twin:
    """One client's adapter as a PEFT model of its own, trained by PyTorch's own optimiser on CLIP's own logits."""

    def __init__(self, targets: str | list[str], adapter: Tensors) -> None:
        base = make_base()
        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=find_sites(base, targets, []))
        self.model = get_peft_model(base, config)
        parameters = dict(self.model.named_parameters())
        self.trained = {
            name: parameters[f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight"] for name in adapter
        }
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(adapter[name])
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=RATE, weight_decay=DECAY)

    def logits(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(**make_prompts(), pixel_values=pixels).logits_per_image
        return logits

    def step(self, rows: tuple[Tensor, Tensor], kinds: frozenset[str]) -> Tensor:
        for name, parameter in self.trained.items():
            parameter.requires_grad_(name[-1] in kinds)
        loss = nn.functional.cross_entropy(self.logits(rows[0]), rows[1])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@every_tower
def test_a_stack_equals_separate_peft_models_through_phases_of_both_factors_and_of_either(
    targets: str | list[str],
) -> None:
    model, adapters = make_stack(targets)
    phases = [phase("A", "B"), phase("B"), phase("A"), phase("A", "B")]
    steps, optim = make_steps(len(phases)), make_optim()
    state = starting(adapters, optim.optimizer.init(adapters)).clone()
    losses = [
        train_local(model, state, [[make_batch(parts)]], now, optim, at_step(state.clients)).loss
        for parts, now in zip(steps, phases, strict=True)
    ]
    for client in range(K):
        twin = Twin(targets, {name: x[client] for name, x in adapters.items()})
        for parts, now, loss in zip(steps, phases, losses, strict=True):
            assert_close(loss[client], twin.step(parts[client], now.train))
        for name, x in twin.trained.items():
            assert_close(state.adapters[name][client], x.detach())
        batch = make_batch([make_rows(99, 3)])
        own = model(take(state.adapters, slice(client, client + 1)), batch, training=False)
        assert_close(own, twin.logits(batch.inputs["pixel_values"]))


def gradients(model: StackedModel, adapters: Tensors, batch: Batch) -> Tensors:
    params = {name: x.clone().requires_grad_() for name, x in adapters.items()}
    losses = row_losses(model(params, batch, training=True), batch) * batch.weights
    return dict(zip(params, torch.autograd.grad(losses.sum(), list(params.values())), strict=True))


@every_tower
def test_a_clients_rows_never_touch_anothers_gradient(targets: str | list[str]) -> None:
    model, adapters = make_stack(targets, lora_dropout=0.3)
    parts = make_steps(1)[0]
    mine = gradients(model, adapters, make_batch(parts))
    changed = gradients(model, adapters, make_batch([parts[0], make_rows(77, ROWS[1]), parts[2]]))
    for name, grad in changed.items():
        assert torch.equal(grad[[0, 2]], mine[name][[0, 2]])
        assert not torch.equal(grad[1], mine[name][1])


def train_on_budget(targets: str | list[str], budget: int, clients_together: int) -> State:
    model, adapters = make_stack(targets, lora_dropout=0.3, base_dropout=0.2, templates=2)
    pixels, labels = make_rows(3, 20)
    zeros = np.zeros(20, dtype=np.int64)
    steps = TrainingSteps(
        Encoded({"pixel_values": pixels}, {}, {}, zeros, zeros + 5, labels),
        [np.arange(7), np.arange(7, 9), np.arange(9, 20)],
        rows_per_step=4,
        local_steps=2,
        tokens=budget,
        clients_together=clients_together,
        packed=False,
        seed=5,
    )
    optim = make_optim()
    state = starting(adapters, optim.optimizer.init(adapters)).clone()
    train_local(model, state, steps(range(K), 0), phase("A", "B"), optim, at_step(state.clients))
    return state


@pytest.mark.thorough
@pytest.mark.parametrize(("budget", "clients_together"), [(5, K), (15, K), (35, 2), (10_000, 1)])
@every_tower
def test_no_cut_into_micro_batches_changes_the_training_with_all_dropout_on(
    targets: str | list[str], budget: int, clients_together: int
) -> None:
    whole, cut = train_on_budget(targets, 10_000, K), train_on_budget(targets, budget, clients_together)
    for name, x in whole.adapters.items():
        torch.testing.assert_close(cut.adapters[name], x, rtol=1e-10, atol=1e-10)


@every_tower
def test_checkpointing_changes_no_bit(targets: str | list[str]) -> None:
    batch = make_batch(make_steps(1)[0])
    dropout: dict[str, Any] = {"lora_dropout": 0.3, "base_dropout": 0.2}
    plain, again = (gradients(*make_stack(targets, **dropout, checkpointing=on), batch) for on in (False, True))
    for name, grad in plain.items():
        assert torch.equal(again[name], grad)


def test_prompts_draw_masks_of_their_own_by_client_and_by_step() -> None:
    """One image of two clients with one adapter: what they are shown of the classes differs by dropout alone."""
    model, adapters = make_stack(TOWERS["text"], lora_dropout=0.5)
    alike = take(adapters, torch.tensor([0, 0]))
    pixels, labels = make_rows(0, 1)
    batch = make_batch([(pixels, labels), (pixels, labels)])
    first, second = model(alike, batch, training=True)
    assert not torch.isclose(first, second).any()
    assert batch.shared is not None
    later = Batch(batch.inputs, batch.labels, batch.clients, batch.weights, batch.keys, shared=batch.shared + 1)
    assert not torch.isclose(first, model(alike, later, training=True)[0]).any()
    assert_close(*model(alike, batch, training=False))
    # Two prompts of the same words differ too: no mask is common to all of a client's prompts.
    ids, mask = make_prompts().values()
    twice = match_names(ids[:1].repeat(2, 1), mask[:1].repeat(2, 1), 1)
    own = attach(
        make_base(exact="peertune"),
        find_sites(make_base(), TOWERS["text"], []),
        r=R,
        lora_alpha=ALPHA,
        lora_dropout=0.5,
        forward=twice,
    )
    assert not torch.isclose(*own(alike, batch, training=True)[0])
    assert torch.isclose(*own(alike, batch, training=False)[0])


@every_tower
def test_a_class_is_the_mean_of_its_templates(targets: str | list[str]) -> None:
    """CLIP's recipe: embed each prompt, scale to length 1, average over the templates, scale to length 1."""
    model, adapters = make_stack(targets, templates=3)
    batch = make_batch([make_rows(9, 5)])
    for client in range(K):
        twin: Any = Twin(targets, {name: x[client] for name, x in adapters.items()}).model.get_base_model()
        prompts = twin.get_text_features(**make_prompts(3)).pooler_output
        prompts = prompts / prompts.norm(dim=-1, keepdim=True)
        classes = torch.stack([prompts[3 * number : 3 * number + 3].mean(0) for number in range(CLASSES)])
        classes = classes / classes.norm(dim=-1, keepdim=True)
        images = twin.get_image_features(batch.inputs["pixel_values"]).pooler_output
        expected = torch.exp(twin.logit_scale) * images / images.norm(dim=-1, keepdim=True) @ classes.T
        assert_close(model(take(adapters, slice(client, client + 1)), batch, training=False), expected)


def test_prompts_pass_once_where_the_text_tower_carries_no_sites() -> None:
    passed: list[int] = []
    for targets, expected in ((TOWERS["image"], [CLASSES]), (TOWERS["both"], [K * CLASSES] * 3)):
        passed.clear()
        model, adapters = make_stack(targets)
        text: Any = model.base.text_model
        text.register_forward_hook(lambda _, __, result: passed.append(len(result.pooler_output)))
        for parts in make_steps(3):
            gradients(model, adapters, make_batch(parts))
        assert passed == expected


def test_logits_of_a_bfloat16_base_are_not_rounded_to_eighths() -> None:
    register_attention()
    base = make_base(exact="peertune").bfloat16()
    model = attach(
        base,
        find_sites(base, ["q_proj"], []),
        r=R,
        lora_alpha=ALPHA,
        forward=match_names(**make_prompts(), templates=1),
    )
    pixels, labels = make_rows(0, 4)
    logits = model(init_adapters(model, 1, 0), make_batch([(pixels.bfloat16(), labels)]), training=False)
    assert logits.dtype == torch.float32


@every_tower
def test_peft_loads_what_is_saved_and_answers_alike(targets: str | list[str], tmp_path: Path) -> None:
    model, adapters = make_stack(targets)
    lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, inference_mode=True)
    save_adapter(tmp_path, {name: x[1] for name, x in adapters.items()}, head={}, lora=lora)
    loaded = PeftModel.from_pretrained(make_base(), str(tmp_path)).eval()
    batch = make_batch([make_rows(9, 5)])
    with torch.no_grad():
        theirs = loaded(**make_prompts(), pixel_values=batch.inputs["pixel_values"]).logits_per_image
    assert_close(model(take(adapters, slice(1, 2)), batch, training=False), theirs)
