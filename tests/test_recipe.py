import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from seeing import COLOURS, save_clip, save_images
from speaking import CHAT
from speaking import save as save_language_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from peertune.assembly.build import build
from peertune.data.tasks import _GLUE
from peertune.engines.simulator import simulate
from peertune.errors import RecipeError
from peertune.recipe import Choice, arguments, as_yaml, check_recipe, load_recipe, recipe_names, recipe_text
from peertune.recipe.hints import ELSEWHERE

MESSAGES = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "yes"}]
WORDS = ["good", "bad", "film", "plot", "dull", "bright", "slow", "quick"]


def refusal(recipe: str | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_recipe(text: str | bytes) -> Path:
        file = tmp_path / "mine.yaml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    return write_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_short_and_opens_with_what_it_is_and_how_to_run_it(name: str) -> None:
    lines = recipe_text(name).splitlines()
    opening = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert len(lines) <= 40
    assert re.match(r"# [A-Z].{20,}[.:]", opening[0])
    assert any(re.match(rf"#   peertune run {name}( |$)", line) for line in opening)
    load_recipe(name)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny random models, of GLUE's tasks with a few rows, and of images."""
    folder = tmp_path_factory.mktemp("small")
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", cls_token="<s>", sep_token="</s>", unk_token="<unk>"
    )
    sizes: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 140,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for family, model in (
            ("roberta", RobertaModel(RobertaConfig(**sizes))),
            ("bert", BertModel(BertConfig(**sizes))),
        ):
            model.save_pretrained(folder / family)
            tokenizer.save_pretrained(folder / family)
    save_language_model(folder / "llama", "llama", CHAT)
    for form, extra in (
        ("instructions", {"messages": MESSAGES, "answer": "yes"}),
        ("label_words", {"passage": "it is"}),
    ):
        (folder / form).mkdir()
        for split, count in (("train", 40), ("validation", 12)):
            made = [{"question": "is it", "answer": bool(number % 2)} | extra for number in range(count)]
            (folder / form / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    save_clip(folder / "clip")
    save_images(folder / "images", dict.fromkeys(COLOURS, 12))
    for config, task in _GLUE.items():
        (folder / config).mkdir()
        for split, rows in (("train", 240), (task.validation[0], 12)):
            lines = [",".join([*task.inputs, "label"])]
            for row in range(rows):
                texts = [" ".join(WORDS[(row * 3 + place) % 8] for place in range(1 + row % 5)) for _ in task.inputs]
                lines.append(",".join([*texts, str(row % len(task.classes) if task.classes else row / 10)]))
            (folder / config / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_builds_and_runs_two_rounds(name: str, small: Path) -> None:
    recipe = load_recipe(name)
    overrides = ["rounds=2", "evaluate.rows=8", "training.local_steps=1", "training.per_device_train_batch_size=2"]
    if recipe.task.name == "images":
        overrides += [f"model.name={small / 'clip'}", "task.id=null", f"task.path={small / 'images'}"]
        overrides.append("task.train=train")
    elif recipe.task.name in ("instructions", "label_words"):
        rows = small / recipe.task.name
        overrides += [f"model.name={small / 'llama'}", "model.quantization=null", "task.id=null", f"task.path={rows}"]
        overrides += ["task.config=null", "task.validation=validation", "evaluate.max_new_tokens=4"]
        overrides += ["training.max_length=64"]
    elif recipe.task.name != "digits":
        family = "roberta" if "roberta" in recipe.model.name else "bert"
        overrides += [f"model.name={small / family}", f"task.path={small / str(recipe.task.settings['config'])}"]
    run = build(load_recipe(name, overrides))
    first, second = simulate(run.job)
    assert second.evaluation is not None
    assert second.evaluation.rows == 8
    assert len(second.evaluation.clients) == recipe.clients
    assert (first.round, second.round) == (0, 1)


def test_what_a_run_resolved_is_a_recipe_of_the_same_run(tmp_path: Path) -> None:
    overrides = ["rounds=2", "evaluate.rows=4", "training={local_steps: 1, per_device_train_batch_size: 2}"]
    run = build(load_recipe("digits-demo", overrides))
    file = tmp_path / "resolved.yaml"
    file.write_text(yaml.safe_dump(run.resolved.model_dump(mode="json"), sort_keys=False))
    again = build(load_recipe(file))
    assert again.resolved == run.resolved
    (*_, one), (*_, other) = simulate(run.job), simulate(again.job)
    assert one.state is not None
    assert other.state is not None
    assert one.loss == other.loss
    assert one.evaluation == other.evaluation
    assert all(torch.equal(x, other.state.adapters[name]) for name, x in one.state.adapters.items())


def test_overrides_set_any_key_and_the_last_one_counts() -> None:
    recipe = load_recipe(
        "digits-demo",
        [
            "seed=3",
            "graph.activation=0.02",
            "lora.target_modules=[fc1, fc2]",
            "seed=4",
            "evaluate={rows: 7}",
            "task.x=1",
        ],
    )
    assert (recipe.seed, recipe.graph.settings, recipe.task.settings) == (4, {"activation": 0.02}, {"x": 1})
    assert recipe.lora.target_modules == ["fc1", "fc2"]
    assert (recipe.evaluate.every, recipe.evaluate.rows) == (10, 7)
    assert load_recipe("digits-demo", ["model.revision=a=b"]).model.revision == "a=b"


def test_an_override_can_make_a_block_that_the_recipe_leaves_out() -> None:
    assert load_recipe("digits-demo", ["checkpoint.keep=5"]).checkpoint.keep == 5


@pytest.mark.parametrize(("text", "value"), [("2e-3", 0.002), ("1E+0", 1.0), ("1.e-2", 0.01), ("5.0e-3", 0.005)])
def test_numbers_with_an_exponent_are_numbers(text: str, value: float) -> None:
    assert load_recipe("digits-demo", [f"training.learning_rate={text}"]).training.learning_rate == value


def test_a_tracker_may_be_given_by_itself_and_none_is_no_tracker() -> None:
    assert load_recipe("digits-demo", ["report_to=tensorboard"]).report_to == ["tensorboard"]
    assert load_recipe("digits-demo", ["report_to=none"]).report_to == []


def test_numbers_are_those_of_json_and_all_else_is_text_and_what_is_written_is_read_as_it_was(write: Any) -> None:
    for text, value in (("01", "01"), ("010", "010"), ("1:30", "1:30"), ("1e5", 1e5), ("-3", -3), (".5", 0.5)):
        assert load_recipe("digits-demo", [f"task.label={text}"]).task.settings["label"] == value
    values = ["1e5", "01", "010", "1:30", "0x1f", "1_000", ".5", "yes", "ö", 1e-5, 1e10, 3.0, 7, True, False]
    written = as_yaml({**yaml.safe_load(MINE), "task": {"name": "digits", "values": values}})
    found = load_recipe(write(written)).task.settings["values"]
    assert [(value, type(value)) for value in found] == [(value, type(value)) for value in values]
    assert yaml.safe_load(written)["task"]["values"] == values


def test_an_argument_of_a_choice_is_taken_as_it_is_or_refused() -> None:
    def part(size: int, share: float = 0.5, names: list[str] | dict[int | str, str] | None = None) -> None: ...

    def given(**settings: Any) -> dict[str, Any]:
        return arguments(part, Choice(name="part", **settings), "block", ())

    assert given(size=3) == {"size": 3, "share": 0.5, "names": None}
    for wrong in ({"size": "3"}, {"size": 3.0}, {"size": True}, {"size": 3, "share": "0.1"}, {"size": 3, "names": [1]}):
        with pytest.raises(RecipeError, match=r"^block\.(size|share|names).*: input should be a valid .*, not "):
            given(**wrong)
    for names in (["a", False], {"a": False}):
        with pytest.raises(
            RecipeError, match=r"^block\.names: input should be a valid string, not False; put it in quo"
        ):
            given(size=3, names=names)

    def other(size) -> None: ...  # type: ignore[no-untyped-def]

    class Thing: ...

    def odd(thing: Thing) -> None: ...

    assert arguments(other, Choice(name="other", size=[1]), "block", ())["size"] == [1], "of no type, so of any"
    with pytest.raises(RecipeError, match=r"^block\.thing: odd takes a <class '.*Thing'>, which no recipe can give$"):
        arguments(odd, Choice(name="odd", thing=1), "block", ())
    with pytest.raises(RecipeError, match=r"block\.size: is missing, part needs it"):
        given()
    with pytest.raises(RecipeError, match=r"block\.sise: unknown key 'sise', did you mean size\? \(part takes names, "):
        given(sise=3)
    with pytest.raises(RecipeError, match=r"block\.lr: unknown key 'lr', did you mean training\.learning_rate\?"):
        given(lr=3)


def test_a_recipe_may_be_nested_values_which_overrides_leave_as_they_were() -> None:
    values = yaml.safe_load(recipe_text("digits-demo"))
    assert load_recipe(values, ["graph.activation=0.5"]) == load_recipe("digits-demo", ["graph.activation=0.5"])
    assert values["graph"]["activation"] == 0.1
    with pytest.raises(RecipeError, match=r"^recipe: lora\.rank: unknown key 'rank', did you mean lora\.r\?"):
        load_recipe({**values, "lora": {"rank": 4}})


def test_a_setting_of_a_part_that_is_null_has_its_default() -> None:
    assert load_recipe("digits-demo", ["partition.alpha=null"]).partition.settings == {}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("xyz=1", "digits-demo: xyz: unknown key 'xyz', choose from algorithm, attacks, checkpoint"),
        ("leaning_rate=1", "leaning_rate: unknown key 'leaning_rate', did you mean training.learning_rate?"),
        ("learning_rate=1e-3", "learning_rate: unknown key 'learning_rate', did you mean training.learning_rate?"),
        ("lr=1e-3", "lr: unknown key 'lr', did you mean training.learning_rate?"),
        ("training.lr=1e-3", "training.lr: unknown key 'lr', did you mean training.learning_rate?"),
        ("lora.rank=4", "lora.rank: unknown key 'rank', did you mean lora.r?"),
        (
            "evaluate.load_best_model_at_end=true",
            "unknown key 'load_best_model_at_end', did you mean evaluate.load_best?",
        ),
        (
            "evaluate.early_stopping_patience=3",
            "unknown key 'early_stopping_patience', did you mean evaluate.patience?",
        ),
        ("evaluate.early_stopping_threshold=0.1", "any improvement counts for evaluate.patience, however small"),
        (
            "evaluate.greater_is_better=true",
            "evaluate.greater_is_better: the best is by the score of the task's metric",
        ),
        ("lora.dropout=.1", "lora.dropout: unknown key 'dropout', did you mean lora_dropout or model.dropout?"),
        ("every=5", "every: unknown key 'every', did you mean evaluate.every or checkpoint.every?"),
        ("rounds=1_000", "rounds: input should be a valid integer, not '1_000'"),
        ("rounds=1:30", "rounds: input should be a valid integer, not '1:30'"),
        ("rounds=010", "rounds: input should be a valid integer, not '010'"),
        ("report_to=tensorbord", "report_to: input should be 'tensorboard', 'wandb', 'mlflow' or 'trackio', not 'te"),
        ("training.momentum=.9", "training.momentum: is a setting of sgd, and training.optim is adamw; leave it out"),
        ("training={optim: sgd, adam_beta2: .9}", "training.adam_beta2: is a setting of adamw, and training.optim is"),
        ("evaluate.top_p=.9", "evaluate.top_p: at evaluate.temperature 0 nothing is sampled; give a temperature"),
        ("training.warmup_steps=800", "training.warmup_steps: 800 steps of warm-up leave none of the run's 800 "),
        (
            "training={local_steps: 5, warmup_steps: 5, lr_scheduler_span: round}",
            "none of the round's 5 (training.local_",
        ),
        ("training.lr_scheduler_span=round", "training.lr_scheduler_span: a rate that is constant has none; give lr_"),
        (
            "evaluate={on: own, rows: 5}",
            "evaluate.rows: is of the validation set, and evaluate.on=own takes none of it",
        ),
        ("training.leaning_rate=1", "training.leaning_rate: unknown key 'leaning_rate', did you mean learning_rate?"),
        ("Rounds=3", "digits-demo: Rounds: unknown key 'Rounds', did you mean rounds?"),
        ("grph.activation=1", "digits-demo: grph: unknown key 'grph', did you mean graph?"),
        ("graph=ring", "digits-demo: graph: is a block of keys, not 'ring'"),
        ("lora=8", "digits-demo: lora: is a block of keys, not 8"),
        ("graph={activation: 1}", "digits-demo: graph.name: is missing"),
        ("rounds=many", "rounds: input should be a valid integer, not 'many'"),
        ("rounds='3'", "rounds: input should be a valid integer, not '3'"),
        ("rounds=true", "rounds: input should be a valid integer, not True"),
        ("rounds=", "rounds: input should be a valid integer, not None"),
        ("rounds=0", "rounds: input should be greater than or equal to 1, not 0"),
        ("lora.lora_dropout=1", "lora.lora_dropout: input should be less than 1, not 1"),
        ("training.learning_rate=.inf", "training.learning_rate: input should be a finite number, not inf"),
        ("training.learning_rate=.nan", "training.learning_rate: input should be "),
        ("training.tokens_per_pass=0", "training.tokens_per_pass: input should be greater than or equal to 1, not 0"),
        ("checkpoint.steps=0", "checkpoint.steps: input should be greater than or equal to 1, not 0"),
        ("checkpoint.steps=-3", "checkpoint.steps: input should be greater than or equal to 1, not -3"),
        ("checkpoint.steps=2.5", "checkpoint.steps: input should be a valid integer, not 2.5"),
        ("checkpoint.steps=often", "checkpoint.steps: input should be a valid integer, not 'often'"),
        ("training.optim=adam", "training.optim: input should be 'adamw' or 'sgd', not 'adam'"),
        ("lora.target_modules=[1]", "lora.target_modules: input should be a valid string, not 1"),
        ("device=tpu", "device: string should match pattern '^(auto|cpu|cuda"),
        (
            "training.warmup_steps=1.5",
            "training.warmup_steps: input should be a number of steps, or a share of them below",
        ),
        (
            "training.warmup_steps=-1",
            "training.warmup_steps: input should be a number of steps, or a share of them below",
        ),
        (
            "training={warmup_steps: 1, warmup_ratio: 0.1}",
            "training.warmup_ratio: is training.warmup_steps, which below 1 is a share of the steps; give one of",
        ),
        ("training.warmup_ratio=1", "training.warmup_ratio: is training.warmup_steps, which below 1 is a share of the"),
        ("lora.use_rslora=1", "lora.use_rslora: input should be a valid boolean, not 1"),
        ("lora.rank_pattern={query: 0}", "lora.rank_pattern.query: input should be greater than or equal to 1, not 0"),
        ("lora.rank_pattern={query: 2.5}", "lora.rank_pattern.query: input should be a valid integer, not 2.5"),
        ("lora.rank_pattern={1: 2}", "lora.rank_pattern: input should be a valid string, not 1"),
        ("lora.rank_pattern=[query]", "lora.rank_pattern: input should be a valid dictionary, not ['query']"),
        ("lora.alpha_pattern={query: 0}", "lora.alpha_pattern.query: input should be greater than 0, not 0"),
        ("lora.alpha_pattern={query: .inf}", "lora.alpha_pattern.query: input should be a finite number, not inf"),
        ("lora.rankpattern={query: 2}", "lora.rankpattern: unknown key 'rankpattern', did you mean rank_pattern?"),
        ("lora.rslora=true", "lora.rslora: unknown key 'rslora', did you mean lora.use_rslora?"),
        ("training.class_weight={5: -1}", "training.class_weight: input should be greater than or equal to 0, not -1"),
        ("training.lr_scheduler_kwargs.min_lr=0", "training.lr_scheduler_kwargs.min_lr: is of cosine_with_min_lr, and"),
        (
            "training.lr_scheduler_type=cosine_with_min_lr",
            "training.lr_scheduler_kwargs: cosine_with_min_lr falls to min_lr or min_lr_rate; give one of the two",
        ),
        (
            "training={learning_rate: 0.1, lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 0.2}}",
            "training.lr_scheduler_kwargs.min_lr: 0.2 is above training.learning_rate, which is 0.1; a rate falls",
        ),
        (
            "lora={layers_to_transform: [0], target_modules: all-linear}",
            "lora.layers_to_transform: goes with a list of lora.target_modules, which is the expression 'all-linear'",
        ),
        (
            "lora.init_lora_weights=eva",
            "lora.init_lora_weights: input should be True, 'gaussian', 'pissa' or 'olora', not 'eva' (docs/recipe.md, "
            "Names that recipes lack)",
        ),
        (
            "training.gradient_accumulation_steps=4",
            "training.gradient_accumulation_steps: a step is one batch, cut for the device by training."
            "tokens_per_pass; for 4 times 16 rows give training.per_device_train_batch_size=64 (docs/recipe.md, "
            "Names that recipes lack)",
        ),
        (
            "training.gradient_accumulation_steps=four",
            "; for 1 times 16 rows give training.per_device_train_batch_size=16 (",
        ),
        (
            "training.num_train_epochs=3",
            "training.num_train_epochs: a run has rounds · training.local_steps = 800 steps of 16 rows, so that each "
            "client passes over 12,800 rows; give rounds, or training.local_steps, for 3 times those that a client "
            "holds (docs",
        ),
        (
            "training={num_train_epochs: 2, local_steps: many}",
            "training.num_train_epochs: a run has rounds · training.local_steps = 10 steps of 32 rows, so that each ",
        ),
        ("lora.modules_to_save=[classifier]", "lora.modules_to_save: the head trains and is mixed with head=trained"),
        ("rounds.x=1", "override 'rounds.x=1': rounds is no block, it has the value "),
        ("rounds", "override 'rounds': write key=value, such as graph.activation=0.02"),
        ("=3", "override '=3': write key=value"),
        ("seed=[1", "override 'seed=[1': the value is not YAML; quote it"),
        ("model.revision=2024-02-30", "override 'model.revision=2024-02-30': the value is not YAML; quote it"),
    ],
)
def test_an_override_that_is_wrong_is_refused_in_one_line(override: str, line: str) -> None:
    assert line in refusal("digits-demo", override)


def test_pefts_pattern_of_nothing_is_none() -> None:
    empty = load_recipe("digits-demo", ["lora.rank_pattern={}", "lora.alpha_pattern={}", "lora.use_rslora=false"])
    assert empty == load_recipe("digits-demo")


def test_every_name_that_recipes_lack_is_told_so_and_stands_on_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text()
    listed = page.partition("## Names that recipes lack")[2].partition("\n## ")[0]
    for name in ELSEWHERE:
        assert f"`{name}`" in listed, name
        assert refusal("digits-demo", f"lora.{name}=1").endswith("(docs/recipe.md, Names that recipes lack)"), name


MINE = "model: {name: m}\ntask: {name: digits}\nclients: 2\nalgorithm: {name: local}\nrounds: 1\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lora: {r: 1\nseed: 0\n", ": line 2: not YAML ("),
        (MINE + "seed: 1\nseed: 2\n", ": line 7: not YAML (key seed stands twice)"),
        ("model: {name: a, name: b}\n", ": line 1: not YAML (key name stands twice)"),
        ("model: \x01\n", ": not YAML (unacceptable character #x0001"),
        ("model: {revision: 2024-02-30}\n", ": not YAML (day is out of range for month)"),
        ("model: !!python/object/apply:os.getcwd []\n", ": line 1: not YAML (could not determine a constructor"),
        ("- model\n", ": a recipe is a mapping of blocks"),
        ("", ": a recipe is a mapping of blocks"),
        (MINE.replace("rounds: 1", ""), ": rounds: is missing"),
        (MINE.replace("model", "modell"), ": modell: unknown key 'modell', did you mean model?"),
        (b"\xff\xfe\x00", ": can't be read (not a text file)"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_line(write: Any, text: str | bytes, line: str) -> None:
    file = write(text)
    assert f"{file}{line}" in refusal(file)


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    assert refusal("digit-demo") == "recipe: unknown name 'digit-demo', did you mean digits-demo?"
    assert refusal("nothing like it at all").startswith("recipe: unknown name 'nothing like it at all', choose from ")
    assert "no.yaml: can't be read (No such file or directory); give a recipe's path" in refusal(tmp_path / "no.yaml")
    assert f"{tmp_path}: can't be read (Is a directory)" in refusal(tmp_path)
    assert "can't be read (File name too long)" in refusal("x" * 300)


def test_a_recipe_may_be_a_file_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text(MINE)
    assert load_recipe(tmp_path / "mine").clients == 2


def test_a_key_that_yaml_takes_for_a_boolean_is_the_word_that_stands_there(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe_text("digits-demo").replace("evaluate: {", "evaluate: {on: both, "))
    recipe = load_recipe(file, ["task={name: text, path: x, classes: {yes: ham, no: spam}}"])
    assert recipe.evaluate.on == load_recipe("digits-demo", ["evaluate={on: both}"]).evaluate.on == "both"
    assert recipe.task.settings["classes"] == {"yes": "ham", "no": "spam"}


def test_values_that_never_were_yaml_are_checked_alike() -> None:
    with pytest.raises(RecipeError, match=r"^here: clients: is missing$"):
        check_recipe({"model": {"name": "m"}, "task": {"name": "t"}, "algorithm": {"name": "a"}, "rounds": 1}, "here")
