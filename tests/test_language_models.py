"""Language models in a stack, against PEFT models one by one."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from playing import at_step, every_kind, starting
from speaking import make_model, make_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peertune.adapters.attention import register_attention
from peertune.adapters.peft_format import find_sites
from peertune.adapters.stacked import StackedModel, attach, init_adapters
from peertune.data.batches import UNLABELLED, Encoded, TrainingSteps, validation_batches
from peertune.data.completions import encode_completions, encode_prompts
from peertune.method import Phase
from peertune.models.generation import Decoding, generate, sampler
from peertune.models.load import in_four_bits
from peertune.rounds.training import Optim, adamw, evaluate, hits, row_losses, train_local
from peertune.types import Batch, Split, Tensors, take

K, R, ALPHA, RATE, ROWS = 3, 2, 4, 1e-2, 4
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "qwen2": ["q_proj", "up_proj"]}
both = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
every_model = pytest.mark.parametrize("name", list(TARGETS))


def make_rows(count: int = 40) -> Encoded:
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh"), draw.integers(1, 9))) for _ in range(2 * count)]
    columns = {"prompt": words[:count], "completion": [f" {word}" for word in words[count:]]}
    split = Split(columns, np.zeros(count, dtype=np.int64))
    return encode_completions(make_tokenizer(), split, ("prompt", "completion"), 64)


def make_stack(name: str, dropout: float = 0.0, **settings: Any) -> tuple[StackedModel, Tensors]:
    """A stack in which no two clients agree."""
    register_attention()
    base = make_model(name, dropout=dropout)
    base.set_attn_implementation("peertune")
    output = next(path for path, module in base.named_modules() if module is base.get_output_embeddings())
    sites = find_sites(base, TARGETS[name], (output,))
    model = attach(
        base, sites, r=R, lora_alpha=ALPHA, lora_dropout=dropout, base_dropout=True, output_name=output, **settings
    )
    draw = torch.Generator().manual_seed(1)
    start = init_adapters(model, K, 0)
    return model, {x: torch.randn(v.shape, generator=draw, dtype=v.dtype) * 0.2 for x, v in start.items()}


def make_steps(encoded: Encoded, steps: int, packed: bool, tokens: int = 60) -> list[list[Batch]]:
    parts = np.array_split(np.arange(len(encoded)), K)
    sizes: dict[str, Any] = {"rows_per_step": ROWS, "local_steps": steps, "tokens": tokens, "clients_together": K}
    return list(TrainingSteps(encoded, parts, **sizes, packed=packed, seed=0)(range(K), 0))


def train(model: StackedModel, adapters: Tensors, steps: list[list[Batch]]) -> tuple[Tensors, Tensor]:
    optim = Optim(adamw(), lambda _: every_kind(RATE), 0.5, "never")
    state = starting(adapters, optim.optimizer.init(adapters)).clone()
    phase = Phase(frozenset("AB"), frozenset())
    return state.adapters, train_local(model, state, steps, phase, optim, at_step(state.clients)).loss


class Twin:
    """One client's adapter as a PEFT model of its own."""

    def __init__(self, name: str, adapters: Tensors, client: int) -> None:
        base = make_model(name)
        fan = any(isinstance(x, Conv1D) for x in base.modules())
        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS[name], fan_in_fan_out=fan)
        self.model: Any = get_peft_model(base, config)
        named = dict(self.model.named_parameters())
        self.own = {x: named[f"base_model.model.{x[:-2]}.lora_{x[-1]}.default.weight"] for x in adapters}
        for x, parameter in self.own.items():
            parameter.data.copy_(adapters[x][client])

    def loss(self, encoded: Encoded, rows: np.ndarray[Any, Any]) -> Tensor:
        return twin_loss(self.model, encoded, rows)


def twin_loss(model: Any, encoded: Encoded, rows: np.ndarray[Any, Any]) -> Tensor:
    """The mean over all labelled tokens of these rows, as transformers' models make it in float32."""
    cut = [slice(s, s + n) for s, n in zip(encoded.starts[rows], encoded.lengths[rows], strict=True)]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad([encoded.tokens["input_ids"][own] for own in cut])
    labels = pad([encoded.labels[own] for own in cut], padding_value=UNLABELLED)
    mask = pad([torch.ones(own.stop - own.start) for own in cut])
    found = model(input_ids=ids, attention_mask=mask, labels=labels)
    loss = nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss.float(), found.loss.float())
    return loss


def drawn(encoded: Encoded, step: int, client: int) -> np.ndarray[Any, Any]:
    from peertune.data.batches import sample

    part = np.array_split(np.arange(len(encoded)), K)[client]
    return part[sample(0, client, len(part), step, ROWS)]


@both
@every_model
def test_a_stack_equals_separate_peft_models_trained_on_completions(name: str, packed: bool) -> None:
    encoded = make_rows()
    model, adapters = make_stack(name)
    assert model.packs
    steps = 4
    trained, losses = train(model, adapters, make_steps(encoded, steps, packed))
    for client in range(K):
        twin = Twin(name, adapters, client)
        optimizer = torch.optim.AdamW(twin.own.values(), lr=RATE, weight_decay=0)
        expected = []
        for step in range(steps):
            loss = twin.loss(encoded, drawn(encoded, step, client))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(twin.own.values(), 0.5)
            optimizer.step()
            expected.append(loss.detach())
        torch.testing.assert_close(losses[client], torch.stack(expected).mean(), rtol=1e-12, atol=1e-12)
        for x, own in twin.own.items():
            torch.testing.assert_close(trained[x][client], own.detach(), rtol=1e-10, atol=1e-12)


def gradients(model: StackedModel, adapters: Tensors, batches: list[Batch]) -> Tensors:
    params = {x: v.clone().requires_grad_() for x, v in adapters.items()}
    losses = [(row_losses(model(params, batch, training=True), batch) * batch.weights).sum() for batch in batches]
    return dict(zip(params, torch.autograd.grad(torch.stack(losses).sum(), list(params.values())), strict=True))


@both
@every_model
def test_a_prompts_tokens_have_no_loss(name: str, packed: bool) -> None:
    """The loss is that of the completions' tokens, each predicted from the place before it, and of no other."""
    encoded, (model, adapters) = make_rows(), make_stack(name)
    batch, numbers = next(validation_batches(encoded, np.arange(5), 1000, packed))
    assert len(numbers) == 5
    assert batch.places is not None
    width = batch.inputs["input_ids"].shape[1]
    for place, row in enumerate(numbers):
        said = batch.places[batch.places // width == place] % width
        prompt = int((encoded.labels[encoded.starts[row] :][: encoded.lengths[row]] == UNLABELLED).sum())
        assert said.tolist() == list(range(prompt - 1, int(encoded.lengths[row]) - 1))
    single = take(adapters, slice(1, 2))
    whole = torch.log_softmax(model.base(**batch.inputs).logits, -1)  # of the base alone
    start = {x: v * 0 for x, v in single.items()}
    expected = -whole.flatten(0, 1)[batch.places].gather(-1, batch.labels[:, None]).squeeze(-1)
    rows = torch.zeros(5, dtype=torch.float64).index_add(0, batch.places // width, expected)
    torch.testing.assert_close(row_losses(model(start, batch, training=False), batch), rows, rtol=1e-12, atol=1e-12)


@every_model
def test_cutting_and_packing_rows_changes_no_gradient_and_no_dropout(name: str) -> None:
    encoded, (model, adapters) = make_rows(), make_stack(name, dropout=0.2)
    expected = gradients(model, adapters, make_steps(encoded, 1, packed=False, tokens=10_000)[0])
    for packed, tokens in ((False, 40), (True, 10_000), (True, 60)):
        batches = make_steps(encoded, 1, packed, tokens)[0]
        assert (len(batches) > 1) == (tokens < 100)
        assert not packed or any(batch.packing is not None for batch in batches)
        for x, grad in gradients(model, adapters, batches).items():
            torch.testing.assert_close(grad, expected[x], rtol=1e-9, atol=1e-12)


@pytest.mark.thorough
@both
@every_model
def test_checkpointing_changes_not_one_bit(name: str, packed: bool) -> None:
    encoded = make_rows()
    plain, adapters = make_stack(name, dropout=0.2)
    saving, _ = make_stack(name, dropout=0.2, checkpointing=True)
    batches = make_steps(encoded, 1, packed)[0]
    kept, less = (saved_bytes(model, adapters, batches[0]) for model in (plain, saving))
    assert less < 0.7 * kept
    expected = gradients(plain, adapters, batches)
    assert all(torch.equal(grad, expected[x]) for x, grad in gradients(saving, adapters, batches).items())


def saved_bytes(model: StackedModel, adapters: Tensors, batch: Batch) -> int:
    """How much is kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        params = {x: v.clone().requires_grad_() for x, v in adapters.items()}
        row_losses(model(params, batch, training=True), batch).sum()
    own = sum(x.untyped_storage().nbytes() for x in model.base.parameters())
    return sum(kept.values()) - own


@both
@every_model
def test_what_is_read_in_evaluation_is_each_clients_own(name: str, packed: bool) -> None:
    encoded, (model, adapters) = make_rows(), make_stack(name)
    rows = np.arange(30)[::-1].copy()
    singles = [take(adapters, slice(client, client + 1)) for client in range(K)]
    losses = evaluate(model, singles, validation_batches(encoded, rows, 80, packed), 30, row_losses)
    right = evaluate(model, singles, validation_batches(encoded, rows, 80, packed), 30, hits)
    assert (right <= encoded.targets[rows]).all()
    for client in range(K):
        loss = Twin(name, adapters, client).loss(encoded, rows)
        assert losses[client].sum() / encoded.targets[rows].sum() == pytest.approx(float(loss.detach()), rel=1e-12)


PROMPTS = Split({"prompt": ["a", "hello wor", "one two three", "xyz"], "completion": ["b"] * 4}, np.zeros(4))


def make_decoding(**settings: Any) -> Decoding:
    return replace(Decoding(12, temperature=0.0, top_p=1.0, stop=(1,), pad=1, seed=3), **settings)


@pytest.mark.thorough
@every_model
def test_generation_by_a_stack_equals_separate_peft_models(name: str) -> None:
    """Prompts of many lengths, all clients in one batch: as each prompt by itself with its client's model."""
    model, adapters = make_stack(name)
    adapters = {x: 3 * v for x, v in adapters.items()}  # so that clients say different things
    prompts, _ = encode_prompts(make_tokenizer(), PROMPTS, ("prompt", "completion"), 64)
    common = [int(token) for token in np.bincount(np.concatenate(_alone(name, adapters, prompts))).argsort()[-2:]]
    singles = [take(adapters, slice(client, client + 1)) for client in range(K)]
    decoding = make_decoding(stop=common)
    for together, tokens in ((K, 10_000), (2, 60), (1, 1)):
        texts = generate(model, singles, prompts, decoding, together=together, tokens=tokens)
        flat = [text for own in texts for text in own]
        expected = [_until(text, common) for text in _alone(name, adapters, prompts)]
        assert flat == expected
    assert len({tuple(text) for text in flat}) > K  # else nothing is shown
    assert min(map(len, flat)) < 12  # a text ended before the others


def _alone(name: str, adapters: Tensors, prompts: Any) -> list[list[int]]:
    texts = []
    for client in range(K):
        twin = Twin(name, adapters, client)
        for prompt in prompts:
            ids = torch.from_numpy(prompt)[None]
            for _ in range(12):
                ids = torch.cat([ids, twin.model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            texts.append(ids[0, len(prompt) :].tolist())
    return texts


def _until(text: list[int], stop: list[int]) -> list[int]:
    return text[: next((place for place, token in enumerate(text) if token in stop), len(text))]


@pytest.mark.thorough
def test_a_sampled_text_depends_on_no_other_row() -> None:
    model, adapters = make_stack("llama")
    prompts, _ = encode_prompts(make_tokenizer(), PROMPTS, ("prompt", "completion"), 64)
    singles = [take(adapters, slice(client, client + 1)) for client in range(K)]
    make = partial(generate, model, singles, prompts)
    first, cut, other = (
        make(make_decoding(temperature=1.0, seed=seed), together=together, tokens=tokens)
        for seed, together, tokens in ((3, K, 10_000), (3, 1, 1), (4, K, 10_000))
    )
    assert first == cut
    assert first != other


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(top_p: float) -> None:
    count, logits = 40_000, torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(2**62), 2**62, count))
    expected = (logits / 0.7).softmax(-1)
    if top_p < 1:  # the second brings their sum above .8, the others are left out
        expected = torch.where(expected >= expected.sort().values[-2], expected, 0)
        expected /= expected.sum()
    draws = [
        sampler(keys, 4, 0.7, top_p)(torch.zeros(count, 4 + step), logits.expand(count, -1)).argmax(-1)
        for step in (1, 2)
    ]
    same = float(expected.square().sum())  # two draws of one row, by chance
    assert abs(float((draws[0] == draws[1]).double().mean()) - same) <= 4 * (same * (1 - same) / count) ** 0.5
    for drawn in draws:
        shares = torch.bincount(drawn, minlength=5) / count
        error = (expected * (1 - expected) / count).sqrt()
        assert ((shares - expected).abs() <= 4 * error).all()


def test_a_stack_over_a_base_in_4_bits_equals_separate_peft_models(tmp_path: Path) -> None:
    """By the configuration that a CUDA device gets; bitsandbytes, where installed, computes the same on a CPU."""
    quantized = pytest.importorskip("bitsandbytes.nn.modules").Linear4bit
    LlamaForCausalLM(
        LlamaConfig(vocab_size=258, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
    ).save_pretrained(tmp_path)
    register_attention()
    config = in_four_bits(torch.float32, torch.device("cuda"))["quantization_config"]

    def load(attention: str) -> Any:
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32, attn_implementation=attention
        )
        for module in base.modules():
            if isinstance(module, quantized):
                module.support_avx512bf16_for_cpu = False  # which packs weights so that nothing can be trained
        return base

    base = load("peertune")
    assert base.num_parameters() > 1.5 * sum(x.numel() for x in base.parameters())  # two weights in a byte
    sites = find_sites(base, ["q_proj", "v_proj"], ("lm_head",))
    model = attach(base, sites, r=R, lora_alpha=ALPHA, output_name="lm_head")
    draw = torch.Generator().manual_seed(1)
    start = init_adapters(model, K, 0)
    adapters = {x: torch.randn(v.shape, generator=draw) * 0.2 for x, v in start.items()}
    encoded = make_rows()
    found = gradients(model, adapters, make_steps(encoded, 1, packed=True)[0])
    for client in range(K):
        peft = get_peft_model(load("eager"), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"]))
        named = dict(peft.named_parameters())
        own = {x: named[f"base_model.model.{x[:-2]}.lora_{x[-1]}.default.weight"] for x in adapters}
        for x, parameter in own.items():
            parameter.data.copy_(adapters[x][client])
        twin_loss(peft, encoded, drawn(encoded, 0, client)).backward()
        for x, parameter in own.items():
            assert parameter.grad is not None
            torch.testing.assert_close(found[x][client], parameter.grad, rtol=1e-3, atol=1e-5)
