"""A base's own head: whose outputs are in the order of the task's classes, or told."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoding import CPU, load, save_tokenizer, sizes, words
from transformers import AutoModelForSequenceClassification

from peertune.models.heads import order
from peertune.models.load import Base, load_base

CLASSES = ["negative", "neutral", "positive"]


@pytest.mark.parametrize(
    ("own", "found"),
    [
        (["negative", "neutral", "positive"], [0, 1, 2]),
        (["positive", "negative", "neutral"], [1, 2, 0]),
        (["NEUTRAL", "Positive ", "-negative"], [2, 0, 1]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], None),
        (["negative", "neutral", "mixed"], None),
        (["negative", "neutral", "negative"], None),
        (["negative", "positive"], None),
    ],
)
def test_a_head_is_in_order_where_all_names_agree_but_for_case_and_spelling(
    own: list[str], found: list[int] | None
) -> None:
    assert order(own, CLASSES) == found


def test_names_that_differ_in_case_alone_are_told_apart_and_numbers_are_those_of_transformers() -> None:
    assert order(["a", "A"], ["A", "a"]) == [1, 0]
    assert order(["a", "A"], ["A", "-a"]) is None
    assert order(["LABEL_1", "LABEL_0"], ["0", "1"]) == [1, 0]
    assert order(["LABEL_0", "LABEL_1"], ["1", "2"]) is None


CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "llama": transformers.LlamaConfig,
}


def save(folder: Path, kind: str, names: list[str], **said: Any) -> Any:
    """Write a whole classifier whose outputs have these names."""
    described = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(CONFIGS[kind](**sizes, **words, **described, **said))
    made.save_pretrained(folder)
    save_tokenizer(folder, pad_token="[PAD]")
    return made.eval()


def loaded(folder: Path, classes: list[str]) -> Base:
    given: dict[str, Any] = {"revision": None, "dtype": torch.float32, "device": CPU, "seed": 0}
    return load_base(str(folder), purpose="text", classes=classes, **given)


@torch.no_grad()
def answers(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.tensor([[3, 4, 5], [5, 5, 3]])).logits
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_head_in_another_order_is_brought_in_the_order_of_the_classes_and_told(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = save(tmp_path, kind, ["Positive", "NEGATIVE", "neutral"])
    base = loaded(tmp_path, CLASSES)
    torch.testing.assert_close(answers(base.model), answers(theirs)[:, [1, 2, 0]])
    assert torch.equal(*(x[next(iter(base.head))] for x in (base.head, base.model.state_dict())))
    assert base.model.config.id2label == dict(enumerate(CLASSES))
    assert caplog.messages == [
        f"model.name: {tmp_path}: the outputs of its head, Positive, NEGATIVE, neutral, are put in the order of the "
        "task's classes, negative, neutral, positive"
    ]


def test_a_head_of_other_names_stays_as_it_is_and_one_of_another_size_is_drawn_and_both_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = save(tmp_path, "bert", ["LABEL_0", "LABEL_1", "LABEL_2"])
    torch.testing.assert_close(answers(loaded(tmp_path, CLASSES).model), answers(theirs))
    loaded(tmp_path, CLASSES[:2])
    assert caplog.messages == [
        f"model.name: {tmp_path}: the outputs of its head are called LABEL_0, LABEL_1, LABEL_2, and are taken for the "
        "classes negative, neutral, positive in this order; if that is wrong, give a copy whose config.json names them "
        "so (id2label)",
        f"model.name: {tmp_path}: its head has 3 outputs and the task asks for 2; a new one is drawn from the seed",
    ]
    caplog.clear()
    save(tmp_path, "bert", CLASSES)
    loaded(tmp_path, CLASSES)
    theirs.bert.save_pretrained(tmp_path)  # without a head
    load(tmp_path, classes=4)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("stored", "classes", "now"),
    [
        ("single_label_classification", [], "regression"),
        ("regression", CLASSES, "single_label_classification"),
        ("multi_label_classification", CLASSES, "single_label_classification"),
    ],
)
def test_a_base_is_what_the_task_makes_of_it_whatever_its_config_says(
    tmp_path: Path, stored: str, classes: list[str], now: str
) -> None:
    save(tmp_path, "bert", CLASSES, problem_type=stored)
    model = loaded(tmp_path, classes).model
    assert model.config.problem_type == now
    targets = torch.tensor([1, 0]) if classes else torch.tensor([0.5, 1.5])
    inputs = {"input_ids": torch.tensor([[3, 4], [5, 5]]), "labels": targets}
    assert model(**inputs).loss.isfinite()
