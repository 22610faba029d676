"""A stack of K adapters over one base equals K separate PEFT models, whatever passes through the base together."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from encoders import FEW, disagreeing
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from playing import at_step, every_kind, starting
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peertune.adapters.attention import register_attention
from peertune.adapters.peft_format import by_site, find_sites
from peertune.adapters.rows import Rows, bound_rows
from peertune.adapters.stacked import StackedModel, attach, frozen_norms, init_adapters
from peertune.data.batches import Encoded, TrainingSteps, pack_rows
from peertune.errors import ModelError
from peertune.method import Phase
from peertune.rounds.training import Optim, adamw, row_losses, train_local
from peertune.types import Batch, State, Tensors, kind, select, take

# PEFT asks every model whether it checkpoints gradients, in a way that transformers will drop.
K, R, ALPHA, CLASSES = 3, 2, 3, 3
ROWS = (4, 2, 3)  # rows of each client
PAD, EOS, VOCAB = 1, 29, 30
RATE, DECAY = 1e-2, 0.05


class TextTower(nn.Module):
    """CLIP's text encoder with a layer on its pooled output."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.tower = transformers.CLIPTextModel(config)
        self.score = nn.Linear(config.hidden_size, CLASSES)

    def set_attn_implementation(self, name: str) -> None:
        self.tower.set_attn_implementation(name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        pooled = self.tower(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return SimpleNamespace(logits=self.score(pooled))


class Case(NamedTuple):
    """An architecture, its target modules, its head, what computes its attention exactly in float64, and its ranks."""

    make: Callable[[float], nn.Module]  # dropout → model
    targets: list[str]
    head: str
    exact: str
    image: bool = False
    tolerance: float = 1e-12
    lora: Mapping[str, Any] = {}  # of PEFT's LoraConfig


labels: dict[str, Any] = {"num_labels": CLASSES}
sizes: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    **labels,
}
words: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": EOS}
patches: dict[str, Any] = {"image_size": 4, "patch_size": 2, "num_channels": 1}


def bert(p: float) -> nn.Module:
    config = transformers.BertConfig(
        **sizes, **words, max_position_embeddings=24, hidden_dropout_prob=p, attention_probs_dropout_prob=p
    )
    return transformers.BertForSequenceClassification(config)


def roberta(p: float) -> nn.Module:
    config = transformers.RobertaConfig(
        **sizes, **words, max_position_embeddings=24, hidden_dropout_prob=p, attention_probs_dropout_prob=p
    )
    return transformers.RobertaForSequenceClassification(config)


def vit(p: float) -> nn.Module:
    config = transformers.ViTConfig(**sizes, **patches, hidden_dropout_prob=p, attention_probs_dropout_prob=p)
    return transformers.ViTForImageClassification(config)


def gpt2(p: float) -> nn.Module:
    config = transformers.GPT2Config(
        **words,
        **labels,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=24,
        embd_pdrop=p,
        resid_pdrop=p,
        attn_pdrop=p,
    )
    return transformers.GPT2ForSequenceClassification(config)


class Coded(nn.Linear):
    """A linear layer that keeps its weight in another form, as 4 bits would be."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.weight = nn.Parameter((16 * weight).to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 16, self.bias)


def test_norms_are_those_of_the_frozen_layers_in_whatever_form_they_keep_their_weight() -> None:
    base: Any = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=600, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    )
    weights = torch.randint(-8, 8, (600, 16)).float() / 16
    base.transformer.h[0].mlp.c_proj = Coded(weights[:16])
    names = ["lm_head", "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj"]
    tied, conv = base.transformer.wte.weight, base.transformer.h[0].attn.c_attn.weight
    found = frozen_norms(attach(base, names, r=2, lora_alpha=6))
    expected = [torch.linalg.matrix_norm(x.detach().double()).item() for x in (tied, conv, weights[:16])]
    assert [norm for norm, _ in found.values()] == pytest.approx(expected, rel=1e-6)
    assert {scaling for _, scaling in found.values()} == {3.0}


def test_a_heads_parts_have_the_norm_of_its_layer() -> None:
    base = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    whole = torch.cat([x.detach().flatten() for x in base[1].parameters()]).double().norm().item()
    found = frozen_norms(attach(base, ["0"], r=1, lora_alpha=1, head_names=["1"]))
    assert found.keys() == {"0", "1.weight", "1.bias"}
    assert [*found["1.weight"], *found["1.bias"]] == pytest.approx([whole, 1.0, whole, 1.0])


def test_each_site_has_its_own_scale_and_no_more_rank_than_its_layer_is_large() -> None:
    base = nn.Sequential(nn.Linear(9, 4), nn.Linear(4, 9), nn.Linear(9, 9))
    model = attach(base, "012", r=4, lora_alpha=6, rank_at={"2": 9}, alpha_at={"1": 5}, use_rslora=True)
    assert {name: scaling for name, (_, scaling) in frozen_norms(model).items()} == {"0": 3.0, "1": 2.5, "2": 2.0}
    assert {name: x.shape[1] for name, x in init_adapters(model, 1, 0).items() if kind(name) == "A"} == {
        "0.A": 4,
        "1.A": 4,
        "2.A": 9,
    }
    with pytest.raises(
        ModelError, match=r"lora\.rank_pattern: 5 is above the size of 0 \(4 in, 3 out\); use at most 3"
    ):
        attach(nn.Sequential(nn.Linear(4, 3)), "0", r=1, lora_alpha=1, rank_at={"0": 5})


def llama(p: float) -> nn.Module:
    config = transformers.LlamaConfig(
        **sizes, **words, num_key_value_heads=2, max_position_embeddings=24, attention_dropout=p
    )
    return transformers.LlamaForSequenceClassification(config)


def clip_image(p: float) -> nn.Module:
    config = transformers.CLIPConfig(
        vision_config=sizes | patches | {"attention_dropout": p}, text_config=sizes | words, **labels
    )
    return transformers.CLIPForImageClassification(config)


def clip_text(p: float) -> nn.Module:
    return TextTower(transformers.CLIPTextConfig(**sizes, **words, max_position_embeddings=24, attention_dropout=p))


# Where eager attention rounds its softmax to float32, PEFT's side runs on sdpa. Llama's normalisation also passes
# through float32, where a last bit of float64 may tip one of float32.
CASES = {
    "bert": Case(bert, ["query", "value"], "classifier", "eager"),
    "roberta": Case(roberta, ["query", "dense"], "classifier", "eager"),
    "vit": Case(vit, ["q_proj", "fc1"], "classifier", "sdpa", image=True),
    "gpt2": Case(gpt2, ["c_attn", "c_fc"], "score", "eager"),
    "llama": Case(llama, ["q_proj", "v_proj", "down_proj"], "score", "sdpa", tolerance=1e-9),
    "clip_image": Case(clip_image, ["q_proj", "v_proj"], "classifier", "sdpa", image=True),
    "clip_text": Case(clip_text, ["k_proj", "fc2"], "score", "sdpa"),
}
PACKING = ("bert", "roberta", "gpt2", "llama")
THOROUGH = {name: () if name in {*FEW, "vit"} else pytest.mark.thorough for name in CASES}
every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=THOROUGH[name]) for name, case in CASES.items()]
)
every_way = pytest.mark.parametrize(
    ("case", "packed"),
    [
        *(pytest.param(case, False, id=name, marks=THOROUGH[name]) for name, case in CASES.items()),
        *(pytest.param(CASES[name], True, id=f"{name} packed", marks=THOROUGH[name]) for name in PACKING),
    ],
)


def make_base(case: Case, dropout: float = 0.0) -> nn.Module:
    """A base in float64 whose weights are large enough for every part to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = case.make(dropout).double()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.normal_(0.0, 0.3)
    return base


def make_stack(
    case: Case, base: nn.Module, *, head: bool = False, lora_dropout: float = 0.0, base_dropout: bool = False
) -> tuple[StackedModel, Tensors]:
    """A stack over a copy of the base, and adapters in which no two clients agree and B is not 0."""
    register_attention()
    base = deepcopy(base)
    base.set_attn_implementation("peertune")  # type: ignore[operator]
    sites = find_sites(base, case.targets, [case.head])
    model = attach(
        base,
        sites,
        r=R,
        lora_alpha=ALPHA,
        rank_at=by_site("", case.lora.get("rank_pattern", {}), sites),
        alpha_at=by_site("", case.lora.get("alpha_pattern", {}), sites),
        use_rslora=case.lora.get("use_rslora", False),
        lora_dropout=lora_dropout,
        head_names=head_layers(case, base) if head else (),
        base_dropout=base_dropout,
    )
    return model, disagreeing(model)


def head_layers(case: Case, base: nn.Module) -> list[str]:
    return [name for name, x in base.named_modules() if name.startswith(case.head) and isinstance(x, nn.Linear)]


def make_rows(case: Case, seed: int, rows: int) -> dict[str, Tensor]:
    """One client's rows, padded to the longest of them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    if case.image:
        return {"pixel_values": torch.randn(rows, 1, 4, 4, generator=generator, dtype=torch.float64), "labels": labels}
    lengths = torch.randint(2, 8, (rows,), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(2, EOS, mask.shape, generator=generator).where(mask, PAD)
    ids[torch.arange(rows), lengths - 1] = EOS
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def widen(name: str, x: Tensor, length: int) -> Tensor:
    fill = PAD if name == "input_ids" else 0
    return nn.functional.pad(x, (0, length - x.shape[1]), value=fill) if name in ("input_ids", "attention_mask") else x


def make_batch(parts: list[dict[str, Tensor]], further: int = 0, packed: bool = False) -> Batch:
    """The rows of all clients in one batch, shuffled, and padded to the longest of all and `further`, or packed."""
    clients = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part["labels"]) for part in parts]))
    order = torch.randperm(len(clients), generator=torch.Generator().manual_seed(2))
    longest = max(part["input_ids"].shape[1] for part in parts) if "input_ids" in parts[0] else 0
    inputs = {
        name: torch.cat([widen(name, part[name], longest + further) for part in parts])[order] for name in parts[0]
    }
    labels = inputs.pop("labels")
    weights = 1 / torch.bincount(clients).double()[clients[order]]
    packing = pack_rows(inputs["attention_mask"].sum(1).numpy()) if packed else None
    assert packing is not None or not packed
    return Batch(inputs, labels, clients[order], weights, torch.arange(len(clients))[order] + 7_000_000_000, packing)


def make_steps(case: Case, steps: int) -> list[list[dict[str, Tensor]]]:
    """The rows of each client in each step."""
    return [[make_rows(case, 10 * step + client, rows) for client, rows in enumerate(ROWS)] for step in range(steps)]


def phase(*kinds: str) -> Phase:
    return Phase(frozenset(kinds), frozenset())


def make_optim(max_grad_norm: float = 0.0) -> Optim:
    return Optim(adamw(weight_decay=DECAY), lambda _: every_kind(RATE), max_grad_norm, "never")


def train_stack(
    model: StackedModel,
    adapters: Tensors,
    steps: list[list[dict[str, Tensor]]],
    phases: list[Phase],
    max_grad_norm: float,
    packed: bool,
) -> tuple[Tensors, list[Tensor]]:
    optim = make_optim(max_grad_norm)
    state = starting(adapters, optim.optimizer.init(adapters)).clone()
    losses = [
        train_local(model, state, [[make_batch(parts, packed=packed)]], now, optim, at_step(state.clients)).loss
        for parts, now in zip(steps, phases, strict=True)
    ]
    return state.adapters, losses


class Twin:
    """One client's adapter as a PEFT model of its own, trained by PyTorch's own optimiser and clipping."""

    def __init__(self, case: Case, base: nn.Module, adapter: Tensors, *, head: bool) -> None:
        base = deepcopy(base)
        base.set_attn_implementation(case.exact)  # type: ignore[operator]
        config = LoraConfig(
            r=R,
            lora_alpha=ALPHA,
            target_modules=find_sites(base, case.targets, [case.head]),
            modules_to_save=[case.head] if head else None,
            fan_in_fan_out=any(isinstance(x, Conv1D) for x in base.modules()),
            **case.lora,
        )
        self.model = get_peft_model(base, config)
        parameters = dict(self.model.named_parameters())
        self.trained = {name: parameters[self._peft_name(case, name)] for name in adapter}
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(adapter[name])
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=RATE, weight_decay=DECAY)

    @staticmethod
    def _peft_name(case: Case, name: str) -> str:
        path, _, what = name.rpartition(".")
        if what == "head":
            return f"base_model.model.{case.head}.modules_to_save.default{path.removeprefix(case.head)}"
        return f"base_model.model.{path}.lora_{what}.default.weight"

    def step(self, rows: dict[str, Tensor], kinds: frozenset[str], max_grad_norm: float) -> Tensor:
        for name, parameter in self.trained.items():
            parameter.requires_grad_(kind(name) in kinds)
        inputs = {name: value for name, value in rows.items() if name != "labels"}
        loss = nn.functional.cross_entropy(self.model(**inputs).logits, rows["labels"])
        self.optimizer.zero_grad()
        loss.backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), max_grad_norm)
        self.optimizer.step()
        return loss.detach()


def assert_equals_peft(
    case: Case, packed: bool, *, head: bool = False, phases: list[Phase], max_grad_norm: float = 0.0
) -> None:
    base = make_base(case)
    model, adapters = make_stack(case, base, head=head)
    assert model.packs or not packed
    steps = make_steps(case, len(phases))
    trained, losses = train_stack(model, adapters, steps, phases, max_grad_norm, packed)

    def assert_close(ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=case.tolerance, atol=case.tolerance)

    for client in range(K):
        twin = Twin(case, base, {name: x[client] for name, x in adapters.items()}, head=head)
        for parts, now, loss in zip(steps, phases, losses, strict=True):
            expected = twin.step(parts[client], now.train, max_grad_norm)
            assert_close(loss[client], expected)
        for name, x in twin.trained.items():
            assert_close(trained[name][client], x.detach())
        batch = make_batch([make_rows(case, 99, 3)], packed=packed)
        own = model(take(trained, slice(client, client + 1)), batch, training=False)
        assert_close(own, twin.model.eval()(**batch.inputs).logits)


@every_way
def test_a_stack_equals_separate_peft_models_through_phases_of_both_factors_and_of_either(
    case: Case, packed: bool
) -> None:
    phases = [phase("A", "B"), phase("B"), phase("B"), phase("A"), phase("A"), phase("A", "B")]
    assert_equals_peft(case, packed, phases=phases)


PATTERNED: dict[str, Mapping[str, Any]] = {
    "bert": {
        "rank_pattern": {r".*\.0\..*query": 1, "attention.self.query": 5, "output.dense": 3},
        "alpha_pattern": {"value": 7.0, r"^bert\.encoder\.layer\.1\..*": 0.5},
    },
    "gpt2": {"rank_pattern": {"h.1.attn.c_attn": 4, "c_fc": 1}, "alpha_pattern": {"c_attn": 1.0}, "use_rslora": True},
    "llama": {"use_rslora": True},
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", PATTERNED)
def test_ranks_and_scales_by_site_are_pefts(name: str, packed: bool) -> None:
    targets = {"bert": ["query", "key", "value", "dense"]}
    case = CASES[name]._replace(targets=targets.get(name, CASES[name].targets), lora=PATTERNED[name])
    assert_equals_peft(case, packed, phases=[phase("A", "B"), phase("B"), phase("A")])


@every_way
def test_a_trained_head_equals_pefts_modules_to_save(case: Case, packed: bool) -> None:
    phases = [phase("A", "B", "head"), phase("B", "head"), phase("A", "head")]
    assert_equals_peft(case, packed, head=True, phases=phases)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("max_grad_norm", [1e-2, 0.5])
def test_clipping_equals_pytorchs_for_each_client(max_grad_norm: float, packed: bool) -> None:
    phases = [phase("A", "B", "head"), phase("B", "head"), phase("A")]
    assert_equals_peft(CASES["bert"], packed, head=True, phases=phases, max_grad_norm=max_grad_norm)


def gradients(model: StackedModel, adapters: Tensors, batch: Batch) -> Tensors:
    params = {name: x.clone().requires_grad_() for name, x in adapters.items()}
    losses = row_losses(model(params, batch, training=True), batch) * batch.weights
    return dict(zip(params, torch.autograd.grad(losses.sum(), list(params.values())), strict=True))


@every_way
def test_a_clients_rows_never_touch_anothers_gradient(case: Case, packed: bool) -> None:
    model, adapters = make_stack(case, make_base(case), head=True)
    parts = make_steps(case, 1)[0]
    mine = gradients(model, adapters, make_batch(parts, packed=packed))
    other = make_rows(case, 77, ROWS[1])
    if not case.image:  # of the same lengths: another width of the batch, or places in blocks, could round differently
        mask = parts[1]["attention_mask"]
        other |= {"attention_mask": mask, "input_ids": (parts[1]["input_ids"] % (EOS - 2) + 2).where(mask > 0, PAD)}
    changed = gradients(model, adapters, make_batch([parts[0], other, parts[2]], packed=packed))
    for name, grad in changed.items():
        assert torch.equal(grad[[0, 2]], mine[name][[0, 2]])
        assert not torch.equal(grad[1], mine[name][1])


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", [CASES[name] for name in ("bert", "gpt2", "llama")], ids=["bert", "gpt2", "llama"])
def test_padding_further_changes_nothing(case: Case, lora_dropout: float) -> None:
    base = make_base(case, dropout=lora_dropout)
    model, adapters = make_stack(case, base, head=True, lora_dropout=lora_dropout, base_dropout=True)
    parts = make_steps(case, 1)[0]
    tight, loose = (gradients(model, adapters, make_batch(parts, further)) for further in (0, 5))
    for name, grad in loose.items():
        torch.testing.assert_close(grad, tight[name], rtol=case.tolerance, atol=case.tolerance)


def encode(seed: int, rows: int, longest: int) -> Encoded:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, rows)
    tokens = {"input_ids": torch.from_numpy(generator.integers(3, VOCAB, lengths.sum()))}
    labels = torch.from_numpy(generator.integers(0, CLASSES, rows))
    return Encoded({}, tokens, {"input_ids": PAD}, np.cumsum(lengths) - lengths, lengths, labels)


def train_on_budget(case: Case, budget: int, clients_together: int, packed: bool) -> State:
    model, adapters = make_stack(case, make_base(case, dropout=0.2), head=True, lora_dropout=0.2, base_dropout=True)
    steps = TrainingSteps(
        encode(3, 20, longest=8),
        [np.arange(7), np.arange(7, 9), np.arange(9, 20)],
        rows_per_step=4,
        local_steps=2,
        tokens=budget,
        clients_together=clients_together,
        packed=packed,
        seed=5,
    )
    optim = make_optim(max_grad_norm=1.0)
    state = starting(adapters, optim.optimizer.init(adapters)).clone()
    train_local(model, state, steps(range(K), 0), phase("A", "B", "head"), optim, at_step(state.clients))
    return state


@pytest.mark.thorough
@settings(max_examples=20, derandomize=True)
@given(
    budget=st.integers(1, 120),
    clients_together=st.integers(1, K),
    packed=st.booleans(),
    name=st.sampled_from(["bert", "gpt2"]),
)
def test_no_budget_of_tokens_and_no_packing_changes_the_training_with_all_dropout_on(
    budget: int, clients_together: int, packed: bool, name: str
) -> None:
    whole = train_on_budget(CASES[name], 10_000, K, packed=False)
    cut = train_on_budget(CASES[name], budget, clients_together, packed)
    for part in whole.adapters:
        torch.testing.assert_close(cut.adapters[part], whole.adapters[part], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_client_trains_the_same_alone_as_among_others_with_all_dropout_on(packed: bool) -> None:
    case = CASES["bert"]
    model, adapters = make_stack(case, make_base(case, dropout=0.2), lora_dropout=0.2, base_dropout=True)
    batch = make_batch(make_steps(case, 1)[0], packed=packed)
    together = gradients(model, adapters, batch)
    for client in range(K):
        own = batch.clients == client
        alone = replace(
            batch,
            inputs={name: x[own] for name, x in batch.inputs.items()},
            labels=batch.labels[own],
            clients=torch.zeros(int(own.sum()), dtype=torch.int64),
            weights=batch.weights[own],
            keys=batch.keys[own],
            packing=None,
        )
        for name, grad in gradients(model, take(adapters, slice(client, client + 1)), alone).items():
            torch.testing.assert_close(grad[0], together[name][client], rtol=1e-12, atol=1e-12)


def test_every_dropout_of_base_and_adapter_is_on_in_training_and_off_otherwise() -> None:
    case = CASES["bert"]
    batch = make_batch(make_steps(case, 1)[0])
    base = make_base(case, dropout=0.2)
    plain, adapters = make_stack(case, base)
    still = plain(adapters, batch, training=True)
    for lora_dropout, base_dropout in ((0.2, False), (0.0, True)):
        model, _ = make_stack(case, base, lora_dropout=lora_dropout, base_dropout=base_dropout)
        assert torch.equal(model(adapters, batch, training=False), still)
        dropped = model(adapters, batch, training=True)
        assert not torch.isclose(dropped, still).any()
        again = model(adapters, batch, training=True)
        assert torch.equal(again, dropped)
        other = model(adapters, replace(batch, keys=batch.keys + 1), training=True)
        assert not torch.isclose(other, dropped).any()


@pytest.mark.parametrize("kinds", [{"A"}, {"B"}, {"head"}, {"A", "head"}], ids=lambda kinds: " ".join(sorted(kinds)))
def test_kinds_that_are_not_trained_stay_bit_for_bit_and_keep_their_moments(kinds: set[str]) -> None:
    case = CASES["bert"]
    base = make_base(case)
    model, adapters = make_stack(case, base, head=True)
    optim = make_optim()
    state = starting(adapters, optim.optimizer.init(adapters)).clone()
    frozen = {name: x.clone() for name, x in model.base.named_parameters()}
    train_local(model, state, [[make_batch(make_steps(case, 1)[0])]], phase(*kinds), optim, at_step(state.clients))
    for name, x in state.adapters.items():
        assert torch.equal(x, adapters[name]) == (kind(name) not in kinds)
        assert state.moments[f"{name}.v"].any() == (kind(name) in kinds)
    for name, x in model.base.named_parameters():
        assert torch.equal(x, frozen[name])
        assert x.grad is None


def test_without_bound_rows_the_base_is_as_it_was() -> None:
    case = CASES["roberta"]
    base = make_base(case)
    rows = make_rows(case, 0, 3)
    model, _ = make_stack(case, base, head=True)
    del rows["labels"]
    torch.testing.assert_close(model.base(**rows).logits, base(**rows).logits, rtol=1e-12, atol=1e-12)


@every_case
def test_all_clients_start_from_the_bases_own_answers(case: Case) -> None:
    base = make_base(case)
    base.set_attn_implementation(case.exact)  # type: ignore[operator]
    model, _ = make_stack(case, base, head=True)
    gaussian = init_adapters(model, K, seed=4, gaussian=True)
    for name, x in gaussian.items():
        if name.endswith(".A"):  # as PEFT's init_lora_weights="gaussian", which draws from the global generator
            r = x.shape[1]
            assert x[0].std().item() == pytest.approx(1 / r, rel=4 / (2 * x[0].numel()) ** 0.5)
    start = init_adapters(model, K, seed=4)
    assert all(not x.any() for x in select(start, {"B"}).values())
    batch = make_batch(make_steps(case, 1)[0])
    torch.testing.assert_close(
        model(start, batch, training=False),
        base(**batch.inputs).logits,
        rtol=case.tolerance,
        atol=case.tolerance,
    )


def test_a_site_starts_from_values_that_depend_on_the_seed_and_its_name_alone() -> None:
    case = CASES["bert"]
    few, _ = make_stack(case._replace(targets=["query"]), make_base(case))
    many, _ = make_stack(case, make_base(case))
    start, wider, other = init_adapters(few, 2, 0), init_adapters(many, 4, 0), init_adapters(few, 2, 1)
    for name, x in start.items():
        assert torch.equal(x[[0, 0]], x)
        assert torch.equal(x, wider[name][:2])
        if kind(name) == "A":
            assert not torch.isclose(x, other[name]).any()
            assert 0.9 * 16**-0.5 < x.abs().max() <= 16**-0.5
            others = [
                y[0] for site, y in wider.items() if site != name and kind(site) == "A" and y.shape == wider[name].shape
            ]
            assert others
            assert not any(torch.isclose(x[0], y).any() for y in others)


class Keeping(nn.Linear):
    """A layer that keeps what it returns, as a cache does."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("kind_of", [nn.Linear, Keeping])
def test_what_a_layer_returns_stays_its_own(kind_of: type[nn.Linear]) -> None:
    base = nn.Sequential(kind_of(6, 4))
    model = attach(base, ["0"], r=2, lora_alpha=2)
    adapters = {name: torch.ones_like(x) for name, x in init_adapters(model, 1, 0).items()}
    x, rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(3, dtype=torch.int64)
    layer = model.sites["0"].layer
    before = layer(x).detach().clone()
    with torch.no_grad(), bound_rows(Rows(adapters, rows, rows, False, model.streams)):
        found = base(x)
    torch.testing.assert_close(found, before + 2 * x.sum(1, keepdim=True))
    if isinstance(layer, Keeping):
        assert torch.equal(layer.kept, before)


def test_gradients_over_a_bfloat16_base_lose_no_more_than_one_bfloat16_layer_does() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    x, y = (torch.randn(256, 12, 64, generator=generator) for _ in range(2))
    factors = {"0.A": torch.randn(1, 4, 64, generator=generator), "0.B": torch.randn(1, 64, 4, generator=generator)}

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        model = attach(deepcopy(layer).to(dtype), ["0"], r=4, lora_alpha=4)
        adapters = {name: factor.clone().requires_grad_() for name, factor in factors.items()}
        rows = torch.zeros(len(x), dtype=torch.int64)
        with bound_rows(Rows(adapters, rows, rows, False, model.streams)):
            (model.base(x.to(dtype)).float() * y).sum().backward()
        return [factor.grad for factor in adapters.values() if factor.grad is not None]

    for exact, rounded in zip(gradients(torch.float32), gradients(torch.bfloat16), strict=True):
        # Each row's gradient is rounded to 8 bits; adding 256 of them in bfloat16 loses 2e-2.
        assert float((rounded - exact).norm() / exact.norm()) < 6e-3
