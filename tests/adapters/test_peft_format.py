"""PEFT chooses the same layers, and reads what we write."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from peertune.adapters.peft_format import by_site, checked_pattern, find_sites, save_adapter, save_config
from peertune.adapters.sites import scaling
from peertune.assembly.build import Built, build
from peertune.engines.simulator import simulate
from peertune.errors import ModelError
from peertune.recipe import check_recipe
from peertune.runs import directory, exports
from peertune.types import Batch, State

# PEFT asks every model whether it checkpoints gradients, in a way that transformers will drop.
WORDS = ["[PAD]", "[UNK]", "good", "fine", "bad", "poor", "film", "plot"]
sizes: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
words: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 0, "max_position_embeddings": 24}
gpt2_words: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 0, "n_positions": 24}

CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**sizes, **words),
    "roberta": lambda: transformers.RobertaConfig(**sizes, **words),
    "gpt2": lambda: transformers.GPT2Config(**gpt2_words, n_embd=16, n_layer=2, n_head=2),
    "llama": lambda: transformers.LlamaConfig(**sizes, **words, num_key_value_heads=2),
    "vit": lambda: transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1),
    "clip": lambda: transformers.CLIPConfig(
        text_config=sizes, vision_config=sizes | {"image_size": 8, "patch_size": 4, "num_channels": 1}
    ),
}
HEADS = {"gpt2": "score", "llama": "score"}


def sequence_model(architecture: str) -> nn.Module:
    model: nn.Module = AutoModelForSequenceClassification.from_config(CONFIGS[architecture]())
    return model


every_text_model = pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "llama"])
TARGETS = {
    "bert": (["query", "value"], ["dense"], r".*layer\.1\..*(key|dense)", "all-linear"),
    "roberta": (["query", "value"], ["dense"], r".*layer\.1\..*(key|dense)", "all-linear"),
    "gpt2": (["c_attn"], ["attn.c_proj", "h.0.mlp.c_proj"], r"transformer\.h\.\d\.mlp\.c_fc", "all-linear"),
    "llama": (["q_proj", "v_proj"], ["layers.1.mlp.up_proj"], r"model\.layers\.0\.self_attn\.._proj", "all-linear"),
}


@pytest.mark.parametrize(
    ("architecture", "targets"), [(name, targets) for name, tried in TARGETS.items() for targets in tried], ids=str
)
def test_sites_are_the_layers_that_peft_wraps_outside_the_head(architecture: str, targets: str | list[str]) -> None:
    model, head = sequence_model(architecture), HEADS.get(architecture, "classifier")
    sites = find_sites(model, targets, [head])
    config = LoraConfig(
        target_modules=targets,
        task_type=TaskType.SEQ_CLS,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
    )
    peft = get_peft_model(model, config)
    wrapped = [name for name, layer in peft.get_base_model().named_modules() if isinstance(layer, LoraLayer)]
    assert sites == wrapped
    assert not any(name.startswith(head) for name in sites)


@pytest.mark.parametrize(
    ("architecture", "targets", "choice"),
    [
        ("bert", ["dense", "query"], {"exclude_modules": ["output.dense"]}),
        ("bert", "all-linear", {"exclude_modules": r".*layer\.0\..*"}),
        ("bert", ["query", "value"], {"layers_to_transform": [1]}),
        ("gpt2", ["c_attn", "c_fc"], {"layers_to_transform": [0], "exclude_modules": ["c_fc"]}),
        ("llama", ["q_proj", "up_proj"], {"layers_to_transform": [1, 0], "exclude_modules": "model.layers.1.*up_proj"}),
    ],
    ids=str,
)
def test_layers_are_left_out_as_peft_does_and_an_export_names_those_that_are_not(
    architecture: str, targets: str | list[str], choice: dict[str, Any], tmp_path: Path
) -> None:
    model, head = sequence_model(architecture), HEADS.get(architecture, "classifier")
    conv = any(isinstance(layer, Conv1D) for layer in model.modules())
    config = LoraConfig(r=2, target_modules=targets, task_type=TaskType.SEQ_CLS, fan_in_fan_out=conv, **choice)
    sites = find_sites(model, targets, [head], choice.get("exclude_modules"), choice.get("layers_to_transform"))
    assert sites != find_sites(model, targets, [head])

    layers = dict(model.named_modules())
    sizes = {name: layers[name].weight.shape[:: -1 if isinstance(layers[name], Conv1D) else 1] for name in sites}
    adapter = {f"{name}.A": torch.ones(2, d_in) for name, (_, d_in) in sizes.items()}
    adapter |= {f"{name}.B": torch.ones(d_out, 2) for name, (d_out, _) in sizes.items()}
    heads = {name: x for name, x in model.state_dict().items() if name.startswith(head)}
    save_adapter(tmp_path, adapter, head=heads, lora=config)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["exclude_modules"], written["layers_to_transform"]) == (None, None)
    for peft in (get_peft_model(sequence_model(architecture), config), PeftModel.from_pretrained(model, str(tmp_path))):
        wrapped = [name for name, layer in peft.get_base_model().named_modules() if isinstance(layer, LoraLayer)]
        assert sites == wrapped


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (([], [5]), "lora.layers_to_transform: there is no layer 5; those with adapters are 0, 1"),
        (
            (["vlaue"], None),
            "lora.exclude_modules: 'vlaue' leaves out none of the layers that target_modules chooses, ",
        ),
        (("que(ry", None), "lora.exclude_modules: 'que(ry' is no regular expression"),
        ((["query", "value"], [0]), "lora: exclude_modules and layers_to_transform leave no layer for adapters"),
    ],
    ids=str,
)
def test_a_choice_among_layers_without_effect_is_refused(choice: tuple[Any, Any], said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        find_sites(sequence_model("bert"), ["query", "value"], ["classifier"], *choice)


@every_text_model
def test_targets_that_match_nothing_are_an_error_that_lists_the_layers(architecture: str) -> None:
    model, head = sequence_model(architecture), HEADS.get(architecture, "classifier")
    layers = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and not name.startswith(head)
    }
    with pytest.raises(ModelError, match=r"'nothing' matches no layer; the linear layers here are") as error:
        find_sites(model, ["nothing"], [head])
    assert str(error.value).partition(" here are ")[2] == ", ".join(sorted(layers))


BERT = "the linear layers here are dense, key, query, value"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ["query", "classifier"],
            f"'classifier' chooses only classifier, of the head or the output layer, which .*; {BERT}",
        ),
        ("class.*", f"'class.*' chooses only classifier, of the head or the output layer, which .*; {BERT}"),
        (["query", "vlaue"], f"'vlaue' matches no layer; did you mean value? {BERT}"),
        (["query", "all-linear"], "'all-linear' stands by itself and in no list; write lora.target_modules=all-linear"),
        ([], f"lora.target_modules: names no layer; {BERT}"),
        ("query", "'query' is a regular expression, which .*; for layers by .* write a list, [query]"),
        ("[query, value]", "'[query, value]' is a regular expression, which .* write a list, [query, value]"),
        ("key,query", "'key,query' is a regular expression, which .* write a list, [key, query]"),
        ("nothing", f"'nothing' is a regular expression, which no layer's whole name matches; {BERT}"),
        ("all_linear", "'all_linear' is a regular expression, which .* matches, did you mean all-linear?"),
        ("que(ry", "lora.target_modules: 'que(ry' is no regular expression (missing ), unterminated subpattern .*"),
    ],
    ids=str,
)
def test_each_word_and_an_expression_choose_a_site_or_are_refused(targets: str | list[str], said: str) -> None:
    with pytest.raises(ModelError) as error:
        find_sites(sequence_model("bert"), targets, ["classifier"])
    assert re.search(re.escape(said).replace(r"\.\*", ".*") + "$", str(error.value))


def test_a_layer_of_the_head_that_is_chosen_beside_sites_is_told(caplog: pytest.LogCaptureFixture) -> None:
    base = sequence_model("roberta")
    assert not [site for site in find_sites(base, ["dense"], ["classifier"]) if site.startswith("classifier")]
    (said,) = caplog.messages
    assert said.startswith("lora.target_modules: classifier.dense, of the head or the output layer, carries no adapter")
    find_sites(base, "all-linear", ["classifier"])
    assert len(caplog.messages) == 1


QUERY = "bert.encoder.layer.{}.attention.self.query"
PATTERNS = [
    {"query": 3, "value": 1},
    {r".*\.0\..*": 4, "attention.self.query": 3},  # in the order of the alphabet, too
    {"layer.1.*": 2, "^bert.encoder.layer.0.*query": 3, "(key|value)": 1},
    {"query": 3, ".*": 4},  # in that order, .* would take all
    {"value|query": 3, "key": 5, "attention.*": 2},
    {},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_ranks_and_scales_by_site_are_those_that_peft_gives_whoever_saves_them(
    pattern: dict[str, int], rslora: bool, tmp_path: Path
) -> None:
    model, targets = sequence_model("bert"), ["query", "key", "value", "dense"]
    sites = find_sites(model, targets, ["classifier"])
    alphas = {key: 1.5 * rank for key, rank in pattern.items()}
    given = {"r": 6, "lora_alpha": 4.0, "target_modules": sites, "use_rslora": rslora}
    theirs = LoraConfig(rank_pattern=pattern, alpha_pattern=alphas, **given)  # type: ignore[arg-type]
    rank_at, alpha_at = by_site("", pattern, sites), by_site("", alphas, sites)
    ours = {name: (rank_at.get(name, 6), alpha_at.get(name, 4.0)) for name in sites}

    def made(config: LoraConfig) -> dict[str, tuple[int, float]]:
        layers = get_peft_model(sequence_model("bert"), config).get_base_model().named_modules()
        return {
            name: (layer.r["default"], layer.scaling["default"])
            for name, layer in layers
            if isinstance(layer, LoraLayer)
        }

    expected = {name: (r, scaling(r, alpha, rslora)) for name, (r, alpha) in ours.items()}
    assert made(theirs) == expected
    kept = checked_pattern("", pattern, sites), checked_pattern("", alphas, sites)
    save_config(tmp_path, LoraConfig(rank_pattern=kept[0], alpha_pattern=kept[1], **given))  # type: ignore[arg-type]
    saved = LoraConfig.from_pretrained(str(tmp_path))
    assert made(saved) == expected
    saved.save_pretrained(str(tmp_path))
    assert made(LoraConfig.from_pretrained(str(tmp_path))) == expected


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ({"qurey": 2}, "'qurey' matches no layer with an adapter; did you mean query? those are query, value"),
        (
            {QUERY.format(7): 2},
            f"{QUERY.format(7)!r} matches no layer with an adapter; did you mean {QUERY.format(1)} or ",
        ),
        ({"key": 2}, "'key' matches no layer with an adapter; those are query, value"),
        ({"uery": 2}, "'uery' matches no layer with an adapter; did you mean query? those are"),
        ({"que(ry": 2}, "'que(ry' is no regular expression (missing ), unterminated subpattern)"),
        (
            {"query": 2, "layer.0.*query": 4},
            f"'layer.0.*query' is without effect, since 'query', which matches {QUERY.format(0)} as well, stands "
            "before it; put it first, or leave it out",
        ),
    ],
    ids=str,
)
def test_a_pattern_with_a_key_without_effect_is_refused(pattern: dict[str, int], said: str) -> None:
    sites = find_sites(sequence_model("bert"), ["query", "value"], ["classifier"])
    with pytest.raises(ModelError) as error:
        checked_pattern("lora.rank_pattern", pattern, sites)
    assert str(error.value).startswith(f"lora.rank_pattern: {said}")


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


def save_base(folder: Path, architecture: str, lacking: str) -> None:
    """Save a checkpoint that lacks its head, or a part of it, or its pooler too, or nothing."""
    torch.manual_seed(0)
    config = CONFIGS[architecture]()
    config.num_labels = 5 if architecture in ("vit", "clip") else 2
    auto = AutoModelForImageClassification if architecture in ("vit", "clip") else AutoModelForSequenceClassification
    model = auto.from_config(config)  # type: ignore[no-untyped-call]
    if lacking == "pooler":
        model.bert.pooler = None
    if lacking == "size":  # a head of another size: RoBERTa's first layer fits all the same
        config.num_labels = 4
        model = auto.from_config(config)  # type: ignore[no-untyped-call]
    prefix = model.base_model_prefix
    if lacking == "head" and hasattr(model, prefix):
        model = getattr(model, prefix)
    elif lacking == "head":
        model = transformers.CLIPModel(config)
    model.save_pretrained(folder)
    if architecture not in ("vit", "clip"):
        save_tokenizer(folder)


def train(
    tmp_path: Path, architecture: str, lacking: str, *, head: str, targets: list[str] | str, **lora: Any
) -> tuple[Built, State]:
    """Run two rounds of a recipe on a tiny local task; leave the run directory in `run`."""
    save_base(tmp_path / "base", architecture, lacking)
    rows = [("good film", 1), ("fine plot film", 1), ("bad", 0), ("poor film", 0), ("fine", 1), ("bad plot", 0)] * 2
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.csv").write_text("text,label\n" + "".join(f"{x},{y}\n" for x, y in rows))
    text = {"name": "text", "inputs": ["text"], "label": "label", "path": str(tmp_path / "data")}
    recipe = check_recipe(
        {
            "model": {"name": str(tmp_path / "base"), "dtype": "float64"},
            "lora": {"r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "target_modules": targets} | lora,
            "head": head,
            "task": {"name": "digits"} if architecture in ("vit", "clip") else text,
            "clients": 2,
            "algorithm": {"name": "dec_lora"},
            "graph": {"name": "complete", "activation": 0.5},
            "training": {"learning_rate": 0.1, "local_steps": 1, "per_device_train_batch_size": 2},
            "rounds": 2,
            "evaluate": {"rows": 2},
            "seed": 3,
            "device": "cpu",
        },
        "test",
    )
    run = build(recipe)
    *_, last = simulate(run.job)
    assert last.state is not None
    directory.create(
        tmp_path / "run",
        recipe="",
        resolved="",
        environment={},
        facts={},
        lora=run.lora,
        head=run.head,
        labels=run.labels,
        taken=run.job.model.taken,
    )
    exports.write_all(tmp_path / "run", last.state, run.job.clients)
    return run, last.state


def inputs(architecture: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if architecture in ("vit", "clip"):
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)}
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    ids = torch.randint(2, len(WORDS), (3, 5), generator=generator).where(mask, 0)
    return {"input_ids": ids, "attention_mask": mask.long()}


def read(tmp_path: Path, architecture: str, adapter: str) -> nn.Module:
    """Read an adapter as anyone would: the base with whatever head this draws, then the adapter over it."""
    images = architecture in ("vit", "clip")
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    base = auto.from_pretrained(
        tmp_path / "base",
        num_labels=5 if images else 2,
        dtype=torch.float64,
        ignore_mismatched_sizes=True,
        attn_implementation="sdpa",
    )
    base.config.pad_token_id = 0
    model: nn.Module = PeftModel.from_pretrained(base, tmp_path / "run" / "adapters" / adapter)
    return model.eval()


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize(
    ("architecture", "lacking", "targets"),
    [
        ("bert", "head", ["query", "value"]),
        ("bert", "pooler", ["query", "dense"]),
        ("bert", "pooler", "all-linear"),
        ("bert", "nothing", "all-linear"),
        ("roberta", "head", "all-linear"),
        ("roberta", "size", ["query", "dense"]),
        ("roberta", "nothing", ["query", "value"]),
        ("gpt2", "head", "all-linear"),
        ("gpt2", "head", ["c_attn"]),
        ("llama", "head", "all-linear"),
        ("vit", "head", ["q_proj", "v_proj"]),
        ("clip", "head", r".*vision_model.*\.(q_proj|v_proj)"),
    ],
    ids=str,
)
def test_peft_reads_every_adapter_with_its_head_and_gives_the_stacks_logits(
    tmp_path: Path, architecture: str, lacking: str, targets: list[str] | str, head: str
) -> None:
    answers_alike(tmp_path, architecture, *train(tmp_path, architecture, lacking, head=head, targets=targets))


@pytest.mark.parametrize(
    ("architecture", "init", "patterns"),
    [
        ("roberta", "pissa", {}),
        ("gpt2", "pissa", {"rank_pattern": {"c_attn": 3}, "alpha_pattern": {"mlp.c_fc": 2.5}, "use_rslora": True}),
        ("gpt2", "olora", {"rank_pattern": {"h.0.*": 1}, "alpha_pattern": {"c_attn": 7.0}}),
        ("vit", "olora", {}),
    ],
    ids=str,
)
def test_what_was_taken_out_of_the_base_is_made_good_over_the_published_one(
    tmp_path: Path, architecture: str, init: str, patterns: dict[str, Any]
) -> None:
    run, state = train(
        tmp_path, architecture, "head", head="frozen", targets="all-linear", init_lora_weights=init, **patterns
    )
    answers_alike(tmp_path, architecture, run, state)


@pytest.mark.parametrize(
    ("architecture", "targets", "patterns"),
    [
        ("bert", ["query", "dense"], {"rank_pattern": {"query": 4, ".*": 1}, "alpha_pattern": {"dense": 0.5}}),
        ("gpt2", "all-linear", {"rank_pattern": {"h.1.*": 3}, "use_rslora": True}),
    ],
    ids=str,
)
def test_peft_reads_adapters_whose_ranks_and_scales_go_by_layer(
    tmp_path: Path, architecture: str, targets: list[str] | str, patterns: dict[str, Any]
) -> None:
    run, state = train(tmp_path, architecture, "head", head="trained", targets=targets, **patterns)
    assert len({x.shape[1] for name, x in state.adapters.items() if name.endswith(".A")}) == 2
    answers_alike(tmp_path, architecture, run, state)


def answers_alike(tmp_path: Path, architecture: str, run: Built, state: State) -> None:
    """Assert that PEFT's models over the base answer as the stack does."""
    rows, zeros = inputs(architecture), torch.zeros(3, dtype=torch.int64)
    batch = Batch(rows, zeros, zeros, zeros.double(), zeros)
    answers = {}
    for client, adapter in enumerate(["client-000", "client-001", "average"]):
        own = {name: x[client : client + 1] if client < 2 else x.mean(0, True) for name, x in state.adapters.items()}
        with torch.no_grad():
            answers[adapter] = run.job.model(own, batch, training=False)
            theirs = read(tmp_path, architecture, adapter)(**rows).logits
        torch.testing.assert_close(theirs, answers[adapter], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(answers["client-000"], answers["client-001"], rtol=1e-3)
    assert all(x.any() for x in state.adapters.values())


def test_what_bitsandbytes_says_while_peft_imports_it_is_not_heard_and_later_words_are(tmp_path: Path) -> None:
    said = "import logging\nlogging.getLogger('bitsandbytes.backends.cpu.ops').warning('no kernel')\n"
    (tmp_path / "bitsandbytes.py").write_text(f"{said}class nn:\n    pass\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r})\nimport peertune.adapters.peft_format, bitsandbytes\n{said}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["no kernel"]
