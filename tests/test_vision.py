"""Runs on folders of images, from the recipe to adapters that load: CLIP by the names of classes, a ViT by a head."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
import yaml
from federation import found
from peft import PeftModel
from processes import finish_well, start
from seeing import COLOURS, save_clip, save_images, save_vit

from peertune.assembly.build import agreed, build
from peertune.errors import PeertuneError
from peertune.recipe import check_recipe

Call = Callable[..., tuple[int, str, str]]
TEMPLATES = ["a photo of a {}, a flower.", "a {}."]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clip`, `vit` and `flowers`."""
    folder = tmp_path_factory.mktemp("made")
    save_clip(folder / "clip")
    save_vit(folder / "vit")
    save_images(folder / "flowers", dict.fromkeys(COLOURS, 12))
    return folder


def write(folder: Path, made: Path, **blocks: Any) -> Path:
    """Write a recipe that a CLIP learns well within its rounds."""
    recipe = {
        "model": {"name": str(made / "clip"), "dtype": "float32"},
        "lora": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "task": {"name": "images", "path": str(made / "flowers"), "shots": 10, "templates": TEMPLATES},
        "clients": 3,
        "graph": {"name": "ring", "weights": "uniform"},
        "algorithm": {"name": "decaf"},
        "training": {
            "learning_rate": 1e-2,
            "local_steps": 2,
            "per_device_train_batch_size": 6,
            "tokens_per_pass": 30,  # one client's rows in several micro-batches
        },
        "rounds": 12,
        "evaluate": {"every": 4},
    }
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(recipe | blocks))
    return file


def last(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
    return record


def rows_of(folder: Path) -> tuple[list[PIL.Image.Image], list[int]]:
    """The images and labels of a folder, read with Pillow alone."""
    files = [(file, label) for label, name in enumerate(sorted(COLOURS)) for file in sorted((folder / name).iterdir())]
    return [PIL.Image.open(file).convert("RGB") for file, _ in files], [label for _, label in files]


def test_a_clip_learns_names_and_its_adapters_answer_the_same_elsewhere(
    made: Path, tmp_path: Path, peertune: Call
) -> None:
    code, _, err = peertune("run", write(tmp_path, made), "--out", "one")
    assert code == 0, err
    evaluation = last(tmp_path / "one")["evaluation"]
    assert min(evaluation["clients"]) > 0.8
    first = json.loads((tmp_path / "one" / "rounds.jsonl").read_text().splitlines()[0])
    assert first["evaluation"] is None or np.mean(first["evaluation"]["clients"]) < np.mean(evaluation["clients"])

    facts = json.loads((tmp_path / "one" / "facts.json").read_text())
    assert facts["partition"]["labels"] == sorted(COLOURS)
    assert np.sum(facts["partition"]["rows"], axis=0).tolist() == [10, 10, 10]
    assert facts["validation"] == {"rows": 36, "labels": [12, 12, 12]}
    assert (facts["task"]["form"], facts["task"]["templates"]) == ("match", TEMPLATES)

    # What another program makes of the adapter: the classes as CLIP's zero-shot recipe has them, and the same answers.
    images, labels = rows_of(made / "flowers" / "validation")
    processor = transformers.AutoImageProcessor.from_pretrained(made / "clip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "clip")
    names = json.loads((tmp_path / "one" / "adapters" / "client-001" / "labels.json").read_text())
    texts = [template.replace("{}", name.replace("_", " ")) for name in names for template in TEMPLATES]
    base = transformers.CLIPModel.from_pretrained(made / "clip")
    model = PeftModel.from_pretrained(base, str(tmp_path / "one" / "adapters" / "client-001")).eval()
    with torch.no_grad():
        answer = model(
            pixel_values=processor(images=images, return_tensors="pt")["pixel_values"],
            **tokenizer(texts, padding=True, return_tensors="pt"),
        )
    classes = answer.text_embeds.view(len(names), len(TEMPLATES), -1).mean(1)
    found = (answer.image_embeds @ (classes / classes.norm(dim=1, keepdim=True)).T).argmax(1)
    assert np.mean(found.numpy() == labels) == pytest.approx(evaluation["clients"][1])


def test_a_resumed_run_ends_in_the_same_bits_with_classes_named_by_number(
    made: Path, tmp_path: Path, peertune: Call
) -> None:
    for split in ("train", "validation"):
        for number, name in enumerate(sorted(COLOURS), start=1):
            (tmp_path / "flowers" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "flowers" / split / str(number)).symlink_to(made / "flowers" / split / name)
    classes = dict(enumerate(sorted(COLOURS, reverse=True), start=1))
    task = {"name": "images", "path": str(tmp_path / "flowers"), "templates": TEMPLATES[:1], "classes": classes}
    file = write(tmp_path, made, task=task, rounds=3, checkpoint={"every": 1, "keep": 3})
    assert peertune("run", file, "--out", "whole")[0] == 0
    assert json.loads((tmp_path / "whole" / "adapter" / "labels.json").read_text()) == sorted(COLOURS, reverse=True)
    adapter = Path("adapters", "client-002", "adapter_model.safetensors")
    before = (tmp_path / "whole" / adapter).read_bytes()
    (newest,) = (tmp_path / "whole" / "checkpoints").glob("*3")
    for file_ in newest.iterdir():
        file_.unlink()
    newest.rmdir()
    code, _, err = peertune("run", file, "--resume", "whole")
    assert code == 0, err
    assert (tmp_path / "whole" / adapter).read_bytes() == before


def test_a_vit_in_a_folder_learns_by_a_trained_head(made: Path, tmp_path: Path, peertune: Call) -> None:
    task = {"name": "images", "path": str(made / "flowers")}
    model = {"name": str(made / "vit"), "dtype": "float32"}
    code, _, err = peertune("run", write(tmp_path, made, task=task, model=model, head="trained"), "--out", "one")
    assert code == 0, err
    scores = last(tmp_path / "one")["evaluation"]["clients"]
    assert min(scores) > 0.9
    images, labels = rows_of(made / "flowers" / "validation")
    processor = transformers.AutoImageProcessor.from_pretrained(made / "vit")
    base = transformers.ViTForImageClassification.from_pretrained(made / "vit", num_labels=3)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "one" / "adapters" / "client-000")).eval()
    with torch.no_grad():
        logits = loaded(pixel_values=processor(images=images, return_tensors="pt")["pixel_values"]).logits
    assert np.mean(logits.argmax(1).numpy() == labels) == pytest.approx(scores[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_images_meet_a_base_of_any_precision(dtype: str, made: Path, tmp_path: Path, peertune: Call) -> None:
    file = write(tmp_path, made, rounds=1)
    assert peertune("run", file, f"model.dtype={dtype}", "--out", "clip")[0] == 0
    assert peertune("run", file, f"model.dtype={dtype}", f"model.name={made}/vit", "task.templates=null")[0] == 0


def test_peers_train_on_folders_of_their_own_of_which_one_lacks_a_class(made: Path, tmp_path: Path) -> None:
    names = sorted(COLOURS)
    for client, own in enumerate((names, names[1:])):
        for split in ("train", "validation"):
            (tmp_path / f"mine-{client}" / split).mkdir(parents=True)
            for name in own:
                (tmp_path / f"mine-{client}" / split / name).symlink_to(made / "flowers" / split / name)
    task = {"name": "images", "id": "nobody/flowers", "templates": TEMPLATES, "classes": names}
    file = write(tmp_path, made, task=task, clients=2, graph={"name": "complete"}, rounds=2)
    federation = found(tmp_path, 2)
    who = [["--roster", str(federation.roster), "--dir", str(federation.peer(client))] for client in range(2)]
    processes = [
        start(
            tmp_path,
            *["peer", "start", "--recipe", str(file), "--data", str(tmp_path / f"mine-{client}"), *who[client]],
            *["--out", str(tmp_path / f"run-{client}"), "network.patience_s=100"],
        )
        for client in range(2)
    ]
    finish_well(processes)
    for client, held in enumerate(([12, 12, 12], [0, 12, 12])):
        facts = json.loads((tmp_path / f"run-{client}" / "facts.json").read_text())
        assert (facts["partition"]["labels"], facts["partition"]["rows"]) == (names, [held])
        assert facts["validation"]["labels"] == held
        assert last(tmp_path / f"run-{client}")["neighbours"] == [1]


def test_peers_must_agree_in_templates_and_names(made: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(write(tmp_path, made).read_text())

    def said(**settings: Any) -> dict[str, str]:
        return agreed(build(check_recipe(values | {"task": values["task"] | settings}, "mine"), [0]))

    own = said()
    assert said(shots=4) == own
    for settings, differs in (
        ({"templates": TEMPLATES[:1]}, {"task"}),
        ({"classes": {name: name.upper() for name in COLOURS}}, {"labels"}),
    ):
        other = said(**settings)
        assert {name for name in own if own[name] != other[name]} == differs


# what is refused


def mistakes(made: Path) -> dict[str, tuple[list[str], str]]:
    return {
        "no CLIP": (
            [f"model.name={made}/vit"],
            f"model.name: {made}/vit is of the kind vit, and a task with templates needs a CLIP, such as openai/clip",
        ),
        "no head": (["head=trained"], "head: a task with templates has no head to train; use head=frozen"),
        "no layer": (
            ["lora.target_modules=[query]"],
            "lora.target_modules: 'query' matches no layer; the linear layers here are fc1, fc2, k_proj, out_proj, "
            "q_proj, text_projection, v_proj, visual_projection",
        ),
        "no braces": (["task.templates=[a flower]"], "task images/flowers: template 'a flower' has no {} where"),
        "long names": (
            ["task.templates=['" + "long " * 8 + "{}']"],
            "task.templates: 42 tokens with the longest name, and the base takes 40; shorten them",
        ),
        "no validation": (["task.validation=test"], "split: unknown name 'test', choose from train, validation"),
        "no folders of classes": ([f"task.path={made}/flowers/train"], "split: unknown name 'train'"),
        "no preprocessor": (
            ["model.name=digits-vit", "task.templates=null"],
            "model.name: digits-vit: what prepares images for it can't be loaded",
        ),
        "no such key": (["task.shot=4"], "task.shot: unknown key 'shot', did you mean shots?"),
        "seed is the program's": (["task.seed=4"], "task.seed: unknown key 'seed'"),
    }


@pytest.mark.parametrize("mistake", mistakes(Path()))
def test_a_mistake_is_one_line_and_exit_2(mistake: str, made: Path, tmp_path: Path, peertune: Call) -> None:
    overrides, message = mistakes(made)[mistake]
    code, out, err = peertune("run", write(tmp_path, made), *overrides)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_checkpoint_whose_images_are_of_another_size_is_refused(made: Path, tmp_path: Path, peertune: Call) -> None:
    save_vit(tmp_path / "vit")
    file = tmp_path / "vit" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": 20}))
    overrides = [f"model.name={tmp_path}/vit", "task.templates=null"]
    code, _, err = peertune("run", write(tmp_path, made), *overrides)
    assert code == 2
    assert "makes images of (3, 20, 20) (channels, height, width) and the model takes (3, 16, 16); give" in err
    file.unlink()
    code, _, err = peertune("run", write(tmp_path, made), *overrides)
    assert code == 2
    assert "put its preprocessor_config.json beside the weights" in err.splitlines()[-1]


def test_numbers_in_the_place_of_names_are_refused(made: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / "flowers" / split).mkdir(parents=True)
        for number, name in enumerate(COLOURS):
            (tmp_path / "flowers" / split / str(number)).symlink_to(made / "flowers" / split / name)
    values = yaml.safe_load(write(tmp_path, made).read_text())
    values["task"]["path"] = str(tmp_path / "flowers")
    with pytest.raises(PeertuneError, match="the classes have numbers for names, which no text matches"):
        build(check_recipe(values, "mine"))


def test_an_image_that_is_cut_off_ends_the_run_in_one_line(tmp_path: Path, made: Path, peertune: Call) -> None:
    save_images(tmp_path / "flowers", dict.fromkeys(COLOURS, 4))
    file = tmp_path / "flowers" / "train" / "fern" / "001.png"
    file.write_bytes(file.read_bytes()[:600])
    task = {"name": "images", "path": str(tmp_path / "flowers"), "templates": TEMPLATES}
    code, _, err = peertune("run", write(tmp_path, made, task=task))
    assert code == 2
    assert f"task images/flowers: train: {file} can't be read (" in err.splitlines()[-1]
    assert "Traceback" not in err
    file.write_text("a fern")
    code, _, err = peertune("run", write(tmp_path, made, task=task))
    assert code == 2
    assert f"train: {file} is no image; take it away, or save it as JPEG, PNG" in err.splitlines()[-1]
