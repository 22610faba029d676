"""Image tasks: what is read from folders and from the hub, what is refused, and what a base is given."""

from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from peertune.data import images as module
from peertune.data.images import Images, Pixels, images, prompts
from peertune.errors import DataError
from peertune.types import Split, Task

COLOURS = {"blue": (0, 0, 200), "green": (0, 180, 0), "red": (220, 0, 0)}
FLOWER = "a photo of a {}, a type of flower"


def draw(colour: tuple[int, int, int], number: int = 0) -> PIL.Image.Image:
    """A picture that is 10 wide and 6 high, bright in its upper left corner."""
    image = PIL.Image.new("RGB", (10, 6), colour)
    image.putpixel((0, 0), (255, 255, 255))
    image.putpixel((9, 5), (number, number, number))
    return image


def save(root: Path, split: str, counts: Mapping[str, int], suffix: str = "png") -> Path:
    for name, count in counts.items():
        (root / split / name).mkdir(parents=True)
        for number in range(count):
            draw(COLOURS.get(name, (90, 90, 90)), number).save(root / split / name / f"{number:02}.{suffix}")
    return root


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    save(tmp_path, "train", {"red": 5, "blue": 3, "green": 4})
    return save(tmp_path, "validation", {"red": 1, "blue": 2, "green": 1})


def read(path: Path, **settings: Any) -> Task:
    return images(path=str(path), seed=0, **settings)


def names_of(split: Split) -> list[str]:
    pixels = split.columns["pixel_values"]
    assert isinstance(pixels, Images)
    return [f"{source.parent.name}/{source.name}" for source in (pixels.sources[row] for row in pixels.rows)]


def test_a_folder_has_a_class_for_each_of_its_folders(flowers: Path) -> None:
    (flowers / "train" / ".cache").mkdir()
    (flowers / "train" / "red" / ".DS_Store").write_bytes(b"\0")
    (flowers / "train" / "about.txt").write_text("flowers")
    task = read(flowers)
    assert (task.inputs, task.form, task.metric, task.templates) == (("pixel_values",), "classify", "accuracy", ())
    assert task.classes == ("blue", "green", "red")
    assert task.train.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 5
    assert task.validation.labels.tolist() == [0, 0, 1, 2]
    assert names_of(task.validation) == ["blue/00.png", "blue/01.png", "green/00.png", "red/00.png"]
    assert task.train.columns["label"] == ["blue"] * 3 + ["green"] * 4 + ["red"] * 5


def test_folders_with_numbers_for_names_are_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        save(tmp_path, split, {str(number): 1 for number in (10, 2, 1)})
    assert read(tmp_path).classes == ("1", "2", "10")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_any_format_is_read_when_it_is_asked_for(suffix: str, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        save(tmp_path, split, {"red": 1, "blue": 1}, suffix)
    image = read(tmp_path).train.columns["pixel_values"][1]
    assert (image.mode, image.size) == ("RGB", (10, 6))
    assert np.asarray(image)[3, 5] == pytest.approx(np.array(COLOURS["red"]), abs=30)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_any_mode_becomes_rgb(mode: str, flowers: Path) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    draw(COLOURS["red"]).convert(mode).save(flowers / "train" / "red" / f"x.{suffix}")
    image = read(flowers).train.columns["pixel_values"][-1]
    assert (image.mode, image.size) == ("RGB", (10, 6))


def test_a_photo_is_turned_upright(flowers: Path) -> None:
    image = draw(COLOURS["red"])
    exif = image.getexif()
    exif[0x0112] = 6  # taken with the camera on its side: turn it clockwise
    image.save(flowers / "train" / "red" / "x.png", exif=exif)
    upright = np.asarray(read(flowers).train.columns["pixel_values"][-1])
    assert upright.shape == (10, 6, 3)
    assert upright[0, 5].tolist() == [255, 255, 255]


def test_shots_keep_so_many_rows_of_each_class_or_all_of_a_smaller_one(flowers: Path) -> None:
    task = read(flowers, shots=4)
    assert Counter(task.train.labels.tolist()) == {0: 3, 1: 4, 2: 4}
    assert task.train.columns["label"] == [name.partition("/")[0] for name in names_of(task.train)]
    assert len(task.validation) == 4
    drawn = {tuple(names_of(images(path=str(flowers), shots=2, seed=seed).train)) for seed in range(20)}
    assert len(drawn) > 10
    assert names_of(read(flowers, shots=2).train) == names_of(read(flowers, shots=2).train)
    # What is drawn of a class depends on no other class.
    before = [name for name in names_of(read(flowers, shots=2).train) if name.startswith("blue")]
    (flowers / "train" / "red" / "00.png").unlink()
    assert [name for name in names_of(read(flowers, shots=2).train) if name.startswith("blue")] == before


def test_templates_make_a_task_of_matching(flowers: Path) -> None:
    for split in ("train", "validation"):
        (flowers / split / "red").rename(flowers / split / "red_lily")
    task = read(flowers, templates=[FLOWER, "{}: a {}"])
    assert (task.form, task.templates) == ("match", (FLOWER, "{}: a {}"))
    assert task.classes == ("blue", "green", "red_lily")
    assert prompts(task) == [
        "a photo of a blue, a type of flower",
        "blue: a blue",
        "a photo of a green, a type of flower",
        "green: a green",
        "a photo of a red lily, a type of flower",
        "red lily: a red lily",
    ]


def test_classes_name_what_the_folders_call_otherwise(flowers: Path) -> None:
    task = read(flowers, classes={"red": "rose", "blue": "violet", "green": "fern"})
    assert task.classes == ("rose", "violet", "fern")
    assert task.train.labels.tolist() == [1] * 3 + [2] * 4 + [0] * 5
    with pytest.raises(
        DataError, match=r"^task images/\w+: train: row 0: label: unknown name 'blue', choose from green, red"
    ):
        read(flowers, classes={"red": "rose", "green": "fern"})


def test_a_party_may_lack_a_class_that_is_named(flowers: Path) -> None:
    task = read(flowers, classes=["blue", "green", "red", "white"])
    assert task.classes == ("blue", "green", "red", "white")
    assert set(task.train.labels) == {0, 1, 2}
    with pytest.raises(DataError, match="unknown name 'green', did you mean grene"):
        read(flowers, classes=["blue", "grene", "red", "white"])


def test_values_can_be_learnt_from_images_too(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        save(tmp_path, split, {"0.5": 1, "12": 2})
    task = read(tmp_path, metric="pearson")
    assert task.classes == ()
    assert task.train.labels.tolist() == [0.5, 12, 12]
    with pytest.raises(DataError, match="metric pearson is of values; leave out classes, templates and shots"):
        read(tmp_path, metric="pearson", shots=3)


# from the hub


def encoded(image: PIL.Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def hub(monkeypatch: pytest.MonkeyPatch, label: Any, labels: Sequence[Any], tmp_path: Path) -> None:
    """Let the hub have splits `train` and `test` with these labels, the first image by its path and others by bytes."""
    (tmp_path / "first.png").write_bytes(encoded(draw((1, 2, 3))))
    rows = [
        {"bytes": None, "path": str(tmp_path / "first.png")},
        *({"bytes": encoded(draw((number, 0, 0))), "path": None} for number in range(1, len(labels))),
    ]
    features = datasets.Features(
        {"photo": datasets.Image(), "kind": label, "place": datasets.Value("string"), "mask": datasets.Image()}
    )
    columns = {"photo": rows, "kind": labels, "place": [f"at {number}" for number in range(len(labels))], "mask": rows}
    split = datasets.Dataset.from_dict(columns, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": split, "test": split})


def from_hub(**settings: Any) -> Task:
    return images(id="some/flowers", image="photo", label="kind", validation="test", seed=0, **settings)


def test_the_hub_brings_its_own_names_and_its_images_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, datasets.ClassLabel(names=["10", "9", "8"]), [0, 2, 2, 1], tmp_path)
    task = from_hub()
    assert (task.name, task.classes) == ("images/some/flowers", ("10", "9", "8"))
    assert task.train.labels.tolist() == [0, 2, 2, 1]
    assert set(task.train.columns) == {"kind", "place", "pixel_values"}
    assert task.train.columns["place"] == ["at 0", "at 1", "at 2", "at 3"]
    assert [image.getpixel((5, 3)) for image in task.train.columns["pixel_values"]] == [
        (1, 2, 3),
        (1, 0, 0),
        (2, 0, 0),
        (3, 0, 0),
    ]
    few = from_hub(shots=1)
    assert len(few.train) == 3
    assert few.train.columns["place"] == [f"at {row}" for row in few.train.columns["pixel_values"].rows]  # type: ignore[union-attr]


def test_numbers_for_names_are_named_by_what_they_are_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, datasets.ClassLabel(names=["10", "9", "8"]), [0, 2, 2, 1], tmp_path)
    with pytest.raises(
        DataError, match=r"the classes have numbers for names, which no text matches; name them in class"
    ):
        from_hub(templates=[FLOWER])
    task = from_hub(templates=[FLOWER], classes={8: "lily", 9: "rose", 10: "fern"})
    assert task.train.labels.tolist() == [2, 0, 0, 1]
    assert [task.classes[label] for label in task.train.labels] == ["fern", "lily", "lily", "rose"]
    with pytest.raises(
        DataError, match=r"unknown name '10', choose from fern, .*; name what the data number by task.cl"
    ):
        from_hub(templates=[FLOWER], classes=["fern", "rose", "lily"])


def test_names_without_numbers_are_numbered_in_sorted_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, datasets.Value("string"), ["rose", "fern", "rose"], tmp_path)
    task = from_hub(templates=[FLOWER])
    assert task.classes == ("fern", "rose")
    assert task.train.labels.tolist() == [1, 0, 1]


def test_a_data_set_of_the_hub_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, datasets.ClassLabel(names=["a", "b"]), [0, 1, -1], tmp_path)
    base: dict[str, Any] = {"id": "a/b", "image": "photo", "label": "kind", "validation": "test", "seed": 0}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, r"train: no kind in 1 of 3 rows \(row 2\); test: no kind in 1 of 3 rows .*=drop leaves these rows out$"),
        ({"classes": {"a": "x", "c": "y"}, "missing_cells": "drop"}, "train: row 1: kind: unknown name 'b'"),
        ({"train": "trian"}, "split: unknown name 'trian', did you mean train"),
        ({"label": "kinds"}, "train: column: unknown name 'kinds', did you mean kind"),
        ({"label": "kinds", "classes": {"a": "x"}}, "give two or more different names"),
        ({"image": "foto"}, "train: column: unknown name 'foto', did you mean photo"),
        ({"image": "place"}, "train: column place holds no images, say in image which does"),
    )
    for settings, message in cases:
        with pytest.raises(DataError, match=message):
            images(**{**base, **settings})


def test_rows_without_an_image_or_a_label_are_counted_together_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [{"bytes": encoded(draw((number, 0, 0))), "path": None} for number in range(5)]
    columns = {"image": [None, *pictures[1:4], None], "label": [0, 1, None, 0, 1]}
    split = datasets.Dataset.from_dict(columns, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": split, "validation": split})
    said = (
        r"train: no image in 2 of 5 rows \(first row 0\), no label in 1 of 5 rows \(row 2\); validation: .*=drop leaves"
    )
    with pytest.raises(DataError, match=said):
        images(id="some/data", seed=0)
    task = images(id="some/data", seed=0, missing_cells="drop")
    assert task.train.labels.tolist() == [1, 0]
    assert [image.getpixel((5, 3))[0] for image in task.train.columns["pixel_values"]] == [1, 3]
    assert task.train.called(1) == "row 3"


def test_an_unreachable_hub_is_said_at_once() -> None:
    with pytest.raises(
        DataError, match=r"^task images/peertune/nothing: not in the local cache .* give task.path=FOLDER$"
    ):
        images(id="peertune/nothing", seed=0)


# what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 0}, "shots is 0, give at least 1"),
        ({"templates": []}, "templates is empty; give one or more, such as 'a photo of a {}'"),
        ({"templates": ["a photo of a flower"]}, "template 'a photo of a flower' has no {} where the name of a class"),
        ({"classes": ["red"]}, "classes is \\['red'\\]; give two or more different names"),
        ({"classes": {"red": "x", "blue": "x", "green": "y"}}, "give two or more different names"),
        ({"metric": "acuracy"}, "metric: unknown name 'acuracy', did you mean accuracy"),
        ({"metric": "perplexity"}, "metric perplexity does not fit; choose from accuracy, "),
        ({"metric": "f1"}, "metric f1 is of one class; say of which of blue, green, red, as in task.metric={"),
        ({"validation": "train"}, "train and validation are both train; hold some rows out"),
        ({"validation": "valid"}, "split: unknown name 'valid', did you mean validation"),
        ({"id": "some/data"}, r"^task images: give either path \(a folder\) or id"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str, flowers: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(flowers, **settings)
    assert "\n" not in str(caught.value)


def refusal(path: Path) -> str:
    with pytest.raises(DataError, match=r"^task images/") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_laid_out_otherwise_is_refused(flowers: Path) -> None:
    assert "is not there, give the folder that holds a folder for each split" in refusal(flowers / "nowhere")
    assert "is a file, not a folder" in refusal(flowers / "train" / "red" / "00.png")
    assert f"{flowers / 'train' / 'red'}: split: unknown name 'train'" in refusal(flowers / "train" / "red")
    (flowers / "validation" / "rad").mkdir()
    draw((0, 0, 0)).save(flowers / "validation" / "rad" / "0.png")
    assert "validation: row 3: label: unknown name 'rad', did you mean red?" in refusal(flowers)
    for folder in ("rad", "red", "green"):
        for file in (flowers / "validation" / folder).iterdir():
            file.rename(flowers / "validation" / f"{folder}.png")
        (flowers / "validation" / folder).rmdir()
    for file in (flowers / "validation" / "blue").iterdir():
        file.unlink()
    assert "validation: no rows, give at least one" in refusal(flowers)
    (flowers / "validation" / "blue").rmdir()
    assert "validation holds no folders; put each class's images in one of its name" in refusal(flowers)


def test_what_is_no_image_is_named_when_the_task_is_loaded(flowers: Path) -> None:
    file = flowers / "train" / "red" / "notes.txt"
    file.write_text("five red ones")
    assert f"train: {file} is no image; take it away, or save it as JPEG, PNG, " in refusal(flowers)
    file.unlink()
    file.mkdir()
    assert f"train: {file} can't be read (Is a directory)" in refusal(flowers)
    file.rmdir()
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    assert "is no image" in refusal(flowers)
    PIL.Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(file.with_suffix(".png"))
    file.unlink()
    assert "can't be read (its pixels are of mode I;16; save it with 8 bits a channel)" in refusal(flowers)


def test_an_image_of_the_hub_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, datasets.ClassLabel(names=["a", "b"]), [0, 1], tmp_path)
    task = from_hub()
    (tmp_path / "first.png").unlink()
    with pytest.raises(DataError, match=r"train: row 0 can't be read \(No such file or directory\)$"):
        task.train.columns["pixel_values"][0]
    gone = Images("task images/x: train", [None], np.zeros(1, np.int64))
    with pytest.raises(DataError, match="train: row 0 has no image, leave it out"):
        gone.check()


def test_an_image_that_turns_out_to_be_cut_off_is_named_in_one_line(flowers: Path) -> None:
    file = flowers / "train" / "blue" / "00.png"
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:5000])
    pixels = read(flowers).train.columns["pixel_values"]  # its header is whole
    with pytest.raises(DataError, match=rf"^task images/\w+: train: {file} can't be read \(") as caught:
        Pixels(pixels, lambda image: torch.zeros(1))[np.array([4, 0])]  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# what a base is given


def as_tensor(image: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_pixels_are_computed_for_the_rows_that_are_asked_for(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read(flowers).train.columns["pixel_values"]
    assert isinstance(source, Images)
    whole = torch.stack([as_tensor(image) for image in source])
    asked: Counter[int] = Counter()

    def process(image: PIL.Image.Image) -> torch.Tensor:
        asked[image.getpixel((9, 5))[0]] += 1  # type: ignore[index]
        return as_tensor(image)

    for room, again in ((12, 0), (2, 10), (0, 12)):
        monkeypatch.setattr(module, "KEPT_BYTES", room * whole[0].nbytes)
        pixels = Pixels(source, process)
        for rows in ([3, 3, 0], [11], [3, 4], list(range(12))):
            assert torch.equal(pixels[np.array(rows)], whole[rows])
        asked.clear()
        assert torch.equal(pixels[np.arange(12)], whole)
        assert asked.total() == again
