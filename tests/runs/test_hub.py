"""What is exported loads by itself, and what is put on the hub is what was exported."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers
from hub import TOKEN, Hub, serving
from huggingface_hub import ModelCard
from peft import PeftModel
from processes import Command, finish, start
from safetensors import safe_open
from seeing import COLOURS, SIDE, save_clip, save_images, save_vit
from speaking import make_model, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

Call = Callable[..., tuple[int, str, str]]
WORDS = ["[PAD]", "[UNK]", "good", "fine", "bad", "poor", "film", "plot"]
TINY = [
    "clients=2",
    "rounds=1",
    "algorithm={name: dec_lora}",
    "graph={name: complete}",
    "training={learning_rate: 0.1, local_steps: 1, per_device_train_batch_size: 2}",
    "evaluate.rows=2",
    "lora={r: 2, lora_alpha: 3, target_modules: all-linear}",
    "head=frozen",
]


def save_text_base(folder: Path, config: Any, dtype: torch.dtype) -> None:
    """Save a base without a head, and its tokenizer."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "eos_token": "[PAD]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT: dict[str, Any] = {"vocab_size": len(WORDS), "max_position_embeddings": 24}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**SIZES, **TEXT),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=len(WORDS), n_positions=24, n_embd=16, n_layer=2, n_head=2),
    "llama": lambda: transformers.LlamaConfig(**SIZES, **TEXT, num_key_value_heads=2),
}


@pytest.fixture
def review_run(peertune: Call, tmp_path: Path) -> Callable[..., Path]:
    """What makes a run of a tiny classifier of reviews."""

    def make(
        architecture: str,
        dtype: torch.dtype,
        *overrides: str,
        labels: tuple[str, str] = ("no", "yes"),
        problem: str | None = None,
    ) -> Path:
        config = CONFIGS[architecture]()
        config.problem_type = problem
        save_text_base(tmp_path / "base", config, dtype)
        rows = [("good film", 1), ("fine plot film", 1), ("bad", 0), ("poor film", 0)] * 2
        for split in ("train", "validation"):
            lines = ["text,label", *(f"{text},{labels[label]}" for text, label in rows)]
            (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
        task = f"task={{name: text, inputs: [text], label: label, path: {tmp_path}}}"
        model = f"model={{name: {tmp_path / 'base'}, dtype: {str(dtype).removeprefix('torch.')}}}"
        run = tmp_path / "run"
        words = ("partition={name: iid}", "device=cpu", *TINY, *overrides)
        code, _, err = peertune("run", "digits-demo", model, task, *words, "--out", run)
        assert (code, err) == (0, "")
        return run

    return make


@torch.no_grad()
def logits(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    found: Tensor = model.eval()(**rows).logits
    return found


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("client", ["1", "average"])
def test_a_merged_classifier_loads_by_itself_and_says_what_the_adapter_says_over_the_base(
    peertune: Call, review_run: Callable[..., Path], tmp_path: Path, architecture: str, client: str
) -> None:
    run = review_run(architecture, torch.float64)
    for words in (("--to", tmp_path / "adapter"), ("--to", tmp_path / "model", "--merge")):
        code, out, err = peertune("export", run, "--client", client, *words)
        assert (code, err) == (0, "")
    assert out.endswith(f"of {run}, merged into its base in float64, is in {tmp_path / 'model'}\n")
    auto = transformers.AutoModelForSequenceClassification
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = dict(tokenizer(["good film", "bad", "poor plot"], padding=True, return_tensors="pt"))
    base = auto.from_pretrained(tmp_path / "base", num_labels=2, dtype=torch.float64)
    base.config.pad_token_id = tokenizer.pad_token_id
    before = logits(base, rows)
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), rows)
    merged = auto.from_pretrained(tmp_path / "model", dtype="auto")
    torch.testing.assert_close(logits(merged, rows), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before, expected, rtol=1e-3)
    assert merged.config.id2label == {0: "no", 1: "yes"}
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    assert "peertune" not in (tmp_path / "model" / "config.json").read_text()


def test_a_merged_model_has_the_precision_of_the_base_on_disk_whatever_it_was_trained_in(
    peertune: Call, review_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = review_run("bert", torch.bfloat16, "model.dtype=float32")
    code, out, _ = peertune("export", run, "--client", "0", "--to", tmp_path / "model", "--merge")
    assert code == 0
    assert "merged into its base in bfloat16" in out
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize(
    ("metric", "labels", "base", "merged"),
    [
        ("pearson", ("0.5", "1.5"), "single_label_classification", (1, "regression")),
        ("accuracy", ("no", "yes"), "regression", (2, "single_label_classification")),
    ],
)
def test_a_merged_model_is_what_it_was_trained_for_whatever_its_base_was(
    peertune: Call,
    review_run: Callable[..., Path],
    tmp_path: Path,
    metric: str,
    labels: tuple[str, str],
    base: str,
    merged: tuple[int, str],
) -> None:
    run = review_run("bert", torch.float32, f"task.metric={metric}", labels=labels, problem=base)
    assert peertune("export", run, "--client", "0", "--to", tmp_path / "model", "--merge")[0] == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.num_labels, config.problem_type) == merged


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_merged_language_model_loads_by_itself_and_says_what_the_adapter_says_over_the_base(
    peertune: Call, tmp_path: Path, architecture: str
) -> None:
    make_model(architecture).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    ends = transformers.GenerationConfig(eos_token_id=[1, 7])
    ends.save_pretrained(tmp_path / "base")
    for split in ("train", "validation"):
        lines = ["prompt,completion", *(f"{word}: , {word[::-1]}" for word in ("abc", "def", "gh", "ijk"))]
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    task = f"task={{name: instructions, path: {tmp_path}}}"
    model = f"model={{name: {tmp_path / 'base'}, dtype: float64}}"
    words = ("partition={name: iid}", "device=cpu", *TINY)
    assert peertune("run", "digits-demo", model, task, *words, "--out", "run")[0] == 0
    for kind in (("--to", "adapter"), ("--to", "model", "--merge")):
        code, _, err = peertune("export", "run", "--client", "1", *kind)
        assert (code, err) == (0, "")
    auto = transformers.AutoModelForCausalLM
    base = auto.from_pretrained(tmp_path / "base", dtype="auto")
    rows = {"input_ids": torch.randint(2, 258, (3, 7), generator=torch.Generator().manual_seed(0))}
    before = logits(base, rows)
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), rows)
    merged = auto.from_pretrained(tmp_path / "model", dtype="auto")
    torch.testing.assert_close(logits(merged, rows), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before, expected, rtol=1e-3)
    assert merged.generation_config.eos_token_id == [1, 7]
    assert merged.config.use_cache
    tokenizers = (transformers.AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("base", "model"))
    assert len({tokenizer.backend_tokenizer.to_str() for tokenizer in tokenizers}) == 1
    assert ModelCard.load(tmp_path / "model" / "README.md").data.pipeline_tag == "text-generation"


@pytest.mark.parametrize("architecture", ["clip", "vit"])
def test_a_merged_model_of_images_loads_by_itself_and_says_what_the_adapter_says_over_the_base(
    peertune: Call, tmp_path: Path, architecture: str
) -> None:
    (save_clip if architecture == "clip" else save_vit)(tmp_path / "base")
    save_images(tmp_path / "data", dict.fromkeys(COLOURS, 4))
    templates = ", templates: ['a {}.']" if architecture == "clip" else ""
    task = f"task={{name: images, path: {tmp_path / 'data'}{templates}}}"
    model = f"model={{name: {tmp_path / 'base'}, dtype: float32}}"
    words = ("partition={name: iid}", "device=cpu", *TINY)
    code, _, err = peertune("run", "digits-demo", model, task, *words, "--out", "run")
    assert (code, err) == (0, "")
    for kind in (("--to", "adapter"), ("--to", "model", "--merge")):
        code, _, err = peertune("export", "run", "--client", "1", *kind)
        assert (code, err) == (0, "")
    rows = {"pixel_values": torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))}
    loader: Any = transformers.AutoModelForImageClassification
    labels = {"num_labels": len(COLOURS)}
    if architecture == "clip":
        loader, labels = transformers.AutoModelForZeroShotImageClassification, {}
        processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
        rows |= processor(text=["a fern.", "a red rose."], padding=True, return_tensors="pt")
    answer = "logits_per_image" if architecture == "clip" else "logits"
    base = loader.from_pretrained(tmp_path / "base", **labels).eval()
    merged = loader.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        before = base(**rows)[answer]
        expected = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**rows)[answer]
        torch.testing.assert_close(merged(**rows)[answer], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, rtol=1e-3)
    prepared = (transformers.AutoImageProcessor.from_pretrained(tmp_path / folder) for folder in ("base", "model"))
    image = PIL.Image.new("RGB", (30, 20), "red")
    torch.testing.assert_close(*(prepare(image, return_tensors="pt")["pixel_values"] for prepare in prepared))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("gone", "can't be loaded ("),
        ("cut short", "can't be loaded ("),
        ("quantised", "is stored quantised; export the adapter alone"),
    ],
)
def test_a_base_that_cannot_be_merged_into_is_one_line_and_leaves_nothing(
    peertune: Call, review_run: Callable[..., Path], tmp_path: Path, damage: str, expected: str
) -> None:
    run = review_run("bert", torch.float32)
    weights, config = (tmp_path / "base" / name for name in ("model.safetensors", "config.json"))
    match damage:
        case "gone":
            shutil.rmtree(tmp_path / "base")
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "quantised":
            own = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
            config.write_text(json.dumps(json.loads(config.read_text()) | own))
    before = sorted(tmp_path.iterdir())
    code, out, err = peertune("export", run, "--client", "0", "--to", "model", "--merge")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("peertune: --merge: ")
    assert expected in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run over the built-in base."""
    folder = tmp_path_factory.mktemp("digits")
    words = ["run", "digits-demo", "clients=3", "rounds=2", "partition={name: iid}", "head=trained", "--out", "run"]
    words += ["training={local_steps: 1, per_device_train_batch_size: 2}", "evaluate.rows=8"]
    code, _, err = finish(start(folder, *words))
    assert code == 0, err
    return folder


def test_a_merged_image_classifier_over_the_built_in_base_loads_by_itself(
    peertune: Call, digits: Path, tmp_path: Path
) -> None:
    for words in (("--to", "adapter"), ("--to", "model", "--merge")):
        assert peertune("export", digits / "run", "--client", "2", *words)[0] == 0
    code = [
        re.findall(r"```py\n(.*?)```", (tmp_path / to / "README.md").read_text(), re.DOTALL)
        for to in ("adapter", "model")
    ]
    rows = {"pixel_values": torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    answers = []
    for (block,) in code:  # as the card says
        names: dict[str, Any] = {}
        exec(block, names)
        answers.append(logits(names["model"], rows))
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)
    assert names["model"].config.id2label == dict(enumerate("56789"))


# ---- the hub


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def with_the_hub(hub: Hub, folder: Path) -> dict[str, str]:
    """Return an environment in which the stand-in is the hub."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return inherited | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home")}


def on_the_hub(hub: Hub, folder: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    """Run the command in a process that takes the stand-in for the hub; return exit code, output and messages."""
    code, out, err = finish(Command(folder, words, with_the_hub(hub, folder) | environment))
    assert TOKEN not in out + err
    return code, out, err


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.mark.parametrize(
    ("client", "kind", "private"), [("average", [], ["--private"]), ("1", ["--merge"], [])], ids=["adapter", "model"]
)
def test_what_is_put_on_the_hub_is_what_was_exported(
    hub: Hub, digits: Path, tmp_path: Path, client: str, kind: list[str], private: list[str]
) -> None:
    words = [
        "export",
        str(digits / "run"),
        "--client",
        client,
        "--to",
        "out",
        "--push",
        "my-lab/digits",
        *kind,
        *private,
    ]
    code, out, err = on_the_hub(hub, tmp_path, *words)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"and at {hub.address}/my-lab/digits"
    arrived = hub.files["my-lab/digits"]
    assert arrived.pop(".gitattributes") == b""
    assert arrived == everything(tmp_path / "out")
    assert hub.private["my-lab/digits"] == bool(private)
    tokens = {token for _, path, token in hub.asked if "my-lab/digits" in path or path == "/api/repos/create"}
    assert tokens == {f"Bearer {TOKEN}"}
    about: Any = ModelCard(arrived["README.md"].decode()).data
    assert about.library_name == ("transformers" if kind else "peft")
    assert 'from_pretrained("my-lab/digits")' in arrived["README.md"].decode() or not kind


def test_large_files_go_to_their_store(digits: Path, tmp_path: Path) -> None:
    words = ["export", str(digits / "run"), "--client", "0", "--to", "out", "--push", "me/it"]
    with serving(large=(".safetensors",)) as hub:
        code, _, err = on_the_hub(hub, tmp_path, *words, HF_HUB_DISABLE_XET="1")
    assert code == 0, err
    assert hub.files["me/it"] == everything(tmp_path / "out") | {".gitattributes": b""}
    assert list(hub.stored.values()) == [(tmp_path / "out" / "adapter_model.safetensors").read_bytes()]
    assert {token for _, path, token in hub.asked if path.startswith("/store/")} == {None}


def test_a_model_that_is_there_and_empty_is_filled(hub: Hub, digits: Path, tmp_path: Path) -> None:
    hub.add("me/it", private=True)
    hub.refusals["/api/repos/create"] = (403, "You may not create models here")
    words = ["export", str(digits / "run"), "--client", "0", "--to", "out", "--push", "me/it", "--private"]
    assert on_the_hub(hub, tmp_path, *words)[0] == 0
    assert hub.files["me/it"] == everything(tmp_path / "out") | {".gitattributes": b""}


PUSH = """
import sys
from pathlib import Path
from peertune.errors import PeertuneError
from peertune.runs import hub
for name in sys.argv[1:]:
    try:
        hub.push(Path("out"), name, private=name.endswith("private"))
    except PeertuneError as error:
        print(name, error)
"""


def test_what_the_hub_refuses_is_a_line_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.add("me/taken", private=False, **{"README.md": b"mine"})
    hub.add("me/not-private", private=False)
    hub.refusals = {
        "/me/unwritable/preupload": (403, "Forbidden"),
        "/me/vanished/preupload": (404, "Repository not found"),
        "/me/full/commit": (413, f"No room\nfor {TOKEN}"),
    }
    names = ["me/taken", "me/not-private", "me/unwritable", "me/vanished", "me/full"]
    code, out, err = finish(Command(tmp_path, names, with_the_hub(hub, tmp_path), PUSH))
    assert (code, err) == (0, "")
    assert TOKEN not in out
    assert out.splitlines() == [
        "me/taken --push: me/taken is there already and holds README.md; give another name",
        "me/not-private --push: me/not-private is there already, open to all; make it private, or leave out --private",
        f"me/unwritable --push: {hub.address} does not let this token write to me/unwritable; take one that may, or "
        "another name",
        f"me/vanished --push: {hub.address} knows no me/vanished, nor may this token make it; check the name",
        f"me/full --push: {hub.address} answers 413 (No room for …); try again later",
    ]
    assert hub.files["me/taken"] == {".gitattributes": b"", "README.md": b"mine"}
    assert all(set(hub.files[name]) == {".gitattributes"} for name in names[1:])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_TOKEN": ""}, "--push: there is no token of the hub; type `hf auth login`, or set HF_TOKEN"),
        ({"HF_TOKEN": "hf_a b"}, "--push: the token of the hub holds what no token holds; copy it again"),
        ({"HF_TOKEN": "hf_other"}, "does not know the token; make one at "),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "127.0.0.1:9 can't be reached (ConnectError); check the network",
        ),
    ],
    ids=["no token", "a broken token", "an unknown token", "no network"],
)
def test_without_a_hub_or_a_token_nothing_is_left(
    hub: Hub, digits: Path, tmp_path: Path, environment: dict[str, str], expected: str
) -> None:
    words = ["export", str(digits / "run"), "--client", "0", "--to", "out", "--push", "me/it"]
    code, out, err = on_the_hub(hub, tmp_path, *words, **environment)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert expected in line
    assert environment.get("HF_TOKEN") not in line.split()
    assert not (tmp_path / "out").exists()
    assert hub.files == {}


def test_nothing_is_pushed_where_something_else_is_wrong(hub: Hub, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for client, to in (("3", "out"), ("0", "there")):
        words = ["export", str(digits / "run"), "--client", client, "--to", to, "--push", "me/it"]
        assert on_the_hub(hub, tmp_path, *words)[0] == 2
    assert hub.asked == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--push", "digits"], "--push: 'digits' is no OWNER/NAME of letters, digits, '-', '_' and '.'; write"),
        (["--push", "me/two/parts"], "--push: 'me/two/parts' is no OWNER/NAME"),
        (["--push", "me/it--is"], "--push: 'me/it--is' is no OWNER/NAME"),
        (["--push", "me/digits"], "--push: HF_HUB_OFFLINE is set, so nothing can be put on the hub; unset it"),
        (["--private"], "--private: goes with --push"),
    ],
)
def test_a_push_that_cannot_be_is_one_line(
    peertune: Call, digits: Path, tmp_path: Path, words: list[str], expected: str
) -> None:
    code, out, err = peertune("export", digits / "run", "--client", "0", "--to", "out", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"peertune: {expected}")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
