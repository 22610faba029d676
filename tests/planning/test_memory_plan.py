import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import taking
import torch
from federation import see_through
from processes import forking
from speaking import make_tokenizer, save
from transformers import LlamaConfig, LlamaForCausalLM

from peertune import ALGORITHMS, Algorithm, At, Memory, Tensors
from peertune.assembly.build import build
from peertune.errors import RunError
from peertune.memory import LiveBytes, available_bytes, meta_stands_for
from peertune.models.meta import FourBits
from peertune.planning import memory_plan as plans
from peertune.planning.memory_plan import Plan, check_fits, plan
from peertune.recipe import Choice, Privacy, Recipe, check_recipe, load_recipe

GiB = 2**30


def rows_of(folder: Path, lengths: int = 4) -> Path:
    for name, count in (("train", 40), ("validation", 6)):
        rows = [
            {"prompt": "a rose is " * (1 + i % lengths), "completion": "a rose " * (2 + i % max(1, lengths - 1))}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = rows_of(tmp_path_factory.mktemp("memory"))
    for name in ("llama", "gpt2"):
        save(path / name, name)
    return path


@pytest.fixture
def little(folder: Path, tmp_path: Path) -> Recipe:
    """A recipe that is planned in little time: one site a layer, and batches of one size instead of three."""
    (tmp_path / "llama").symlink_to(folder / "llama")
    recipe = recipe_of(rows_of(tmp_path, lengths=1))
    return plans._with(recipe, "lora.target_modules", ["q_proj"])


def recipe_of(folder: Path, base: str = "llama", **training: Any) -> Recipe:
    values = {
        "model": {"name": str(folder / base), "dtype": "float32"},
        "lora": {"r": 4, "rank_pattern": {r".*\.0\..*": 7}, "target_modules": "all-linear", "lora_dropout": 0.1},
        "task": {"name": "instructions", "path": str(folder), "metric": "perplexity"},
        "clients": 3,
        "algorithm": {"name": "dec_lora"},
        "training": {"local_steps": 2, "per_device_train_batch_size": 4, "tokens_per_pass": 256} | training,
        "rounds": 2,
        "device": "cpu",
    }
    return check_recipe(values, "test")


def test_views_share_and_what_is_gone_no_longer_counts() -> None:
    def act() -> None:
        x = torch.zeros(1000)
        y = x[10:] + 1
        del x
        y[5:].mul_(2)
        y.sum()

    with LiveBytes("cpu") as live:
        assert live.most(act).taken == 4000 + 3960
        assert live.now == 0
        live.hold([torch.zeros(10)], {"a": torch.zeros(5, device="meta")})
        assert live.now == 0


def test_the_meta_device_runs_as_the_one_that_it_stands_for() -> None:
    from peertune.adapters.attention import attention

    # in bfloat16, which on a CPU is not given to the fused kernel
    query = torch.zeros(2, 4, 256, 16, device="meta", dtype=torch.bfloat16)
    mask = torch.zeros(2, 1, 256, 256, device="meta", dtype=torch.bfloat16)
    taken = {}
    for device in ("cpu", "cuda"):
        with meta_stands_for(device), LiveBytes("meta") as live:
            module = torch.nn.Module()
            taken[device] = live.most(lambda: attention(module, query, query, query, mask)).taken  # noqa: B023
    scores = 2 * 4 * 256 * 256 * 4
    assert taken["cuda"] < scores / 2 < 2 * scores <= taken["cpu"]


@pytest.mark.parametrize(
    ("base", "checkpointing"),
    [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True), ("digits-vit", False)],
)
def test_a_plan_takes_what_the_steps_take(folder: Path, base: str, checkpointing: bool) -> None:
    if base == "digits-vit":
        recipe = load_recipe("digits-demo", ["clients=3", "partition={name: iid}", "device=cpu"])
    else:
        recipe = recipe_of(folder, base, gradient_checkpointing=checkpointing)
    planned = plan(recipe)
    job = build(recipe).job
    with LiveBytes("cpu") as live:
        weights = [*job.model.base.parameters(), *job.model.base.buffers()]
        live.hold(weights, job.state.adapters, job.state.moments)
        state = job.state.clone()
        taken = [plans._training(live, job, job.algorithm.local, state, t, phase) for t, phase in plans._phases(job)]
    most, gradients = max(taken)
    assert planned.gradients == gradients
    # On a CPU a batch is used where it lies; on the meta device, as on a GPU, it is a copy.
    assert 0 <= planned.gradients + planned.activations - most.taken < 20_000
    assert planned.base == plans._storage_bytes(weights)
    assert planned.moments == plans._storage_bytes(state.moments.values())


def test_what_a_method_remembers_is_counted_for_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    def remembering() -> Algorithm:
        def init(adapters: Tensors, at: At) -> Memory:
            return {"its.numbers": torch.zeros(len(at.clients), 1000)}

        plain = ALGORITHMS["dec_lora"]()
        return plain._replace(mixer=plain.mixer._replace(init=init))

    monkeypatch.setitem(ALGORITHMS, "remembering", remembering)
    recipe = load_recipe("digits-demo", ["clients=3", "partition={name: iid}", "device=cpu"])
    remembered, plain = (
        plan(recipe.model_copy(update={"algorithm": Choice(name=name)})).adapters
        for name in ("remembering", "dec_lora")
    )
    assert remembered - plain == 2 * 3 * 4 * 1000, "of the start, and of the state that goes on from it"


def test_what_rounds_began_with_is_counted_for_all_clients_where_checkpoints_lie_within_them(little: Recipe) -> None:
    recipe = plans._with(little, "modifiers", [Choice(name="fedspeed")])
    within = plans._with(recipe, "checkpoint.steps", 2)
    planned = plan(within)
    assert planned.starts > 0
    assert plan(recipe).starts == 0 == plan(plans._with(within, "modifiers", [])).starts
    assert planned.total == replace(planned, starts=0).total + planned.starts


def test_checkpointing_and_smaller_passes_take_less(little: Recipe) -> None:
    def planned(key: str, value: Any) -> Plan:
        return plan(plans._with(little, f"training.{key}", value))

    whole = plan(little)
    assert planned("gradient_checkpointing", True).activations < 0.8 * whole.activations
    assert planned("tokens_per_pass", 64).activations < 0.6 * whole.activations
    assert planned("clients_per_pass", 1).gradients == whole.gradients // 3


def test_rows_that_are_private_take_a_gradient_each(little: Recipe) -> None:
    private = little.model_copy(update={"privacy": Privacy(noise_multiplier=1.0, delta=1e-5)})
    assert plan(private).activations > plan(little).activations


def test_generation_fills_a_cache(little: Recipe) -> None:
    recipe = little
    task = recipe.task.model_copy(update={"metric": "exact_match"})
    recipe = plans._with(recipe, "evaluate.max_new_tokens", 8)
    width = 96  # all positions of the base
    cache = 2 * 2 * 2 * 8 * 4 * (512 // width // 4 * 4) * width  # keys and values, layers, groups, d, bytes, tokens
    assert plan(recipe.model_copy(update={"task": task})).evaluation > cache > 0


def test_a_gpu_that_is_not_here_can_be_planned_for(little: Recipe) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is here")
    recipe = plans._with(plans._with(little, "device", "cuda"), "model.dtype", "auto")
    planned = plan(recipe)
    assert (planned.device, planned.dtype, planned.process, planned.holes) == ("cuda", "bfloat16", 0, 0)
    assert planned.available is None
    assert planned.lacking == 0
    assert plan(plans._with(recipe, "model.quantization", "nf4")).base < planned.base


def test_four_bits_take_4127_thousandths_a_weight() -> None:
    layer = torch.nn.Linear(1024, 4096, bias=False, device="meta", dtype=torch.bfloat16)
    four = FourBits(layer)
    taken = sum(x.numel() * x.element_size() for x in (*four.parameters(), *four.buffers()))
    assert taken * 8 / layer.weight.numel() == pytest.approx(4.127, abs=5e-4)
    x = torch.zeros(2, 3, 1024, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with LiveBytes("meta") as live:
        whole = live.most(lambda: four(x).sum().backward()).taken
    assert whole > layer.weight.numel() * 2


@pytest.fixture
def own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process holds by itself counts for nothing: it moves."""
    monkeypatch.setattr(plans, "resident_bytes", lambda: 0)


@pytest.mark.usefixtures("own_bytes")
def test_what_does_not_fit_is_refused_with_what_would(little: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan(little)
    there = whole.total - whole.activations // 4
    monkeypatch.setattr(plans, "available_bytes", lambda _: there)
    with pytest.raises(RunError, match=r"memory: .* are needed and cpu has .*; give .*gradient_checkpointing=true \("):
        check_fits(little, replace(whole, available=there))
    best = plan(plans._with(little, "evaluate.load_best", True))
    score_and_round = 2 * 3 * 16  # of three clients, at the start and while it runs
    assert best.adapters - whole.adapters == whole.gradients + score_and_round, "one copy more of what is trained"
    monkeypatch.setattr(plans, "available_bytes", lambda _: 1000)
    tried = r"training.tokens_per_pass=64 clients=1 needs \S+ MiB"
    saving = plans._with(plans._with(little, "training.gradient_checkpointing", True), "model.dtype", "bfloat16")
    with pytest.raises(RunError, match=f"even {tried}: give a smaller base, or another device"):
        check_fits(saving, replace(plan(saving), available=1000))


@pytest.mark.usefixtures("own_bytes")
def test_advice_is_true(little: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan(little)
    there = int(0.45 * whole.total)
    monkeypatch.setattr(plans, "available_bytes", lambda _: there)
    with pytest.raises(RunError) as caught:
        check_fits(little, replace(whole, available=there))
    advice = str(caught.value).partition("; give ")[2]
    assert advice, caught.value
    for alternative in advice.split(" or "):
        tried = little
        for setting in alternative.rpartition(" (")[0].split():
            key, _, value = setting.partition("=")
            tried = plans._with(tried, key, {"true": True}.get(value, int(value) if value.isdigit() else value))
        assert plan(tried).total <= there, alternative


def test_there_is_memory() -> None:
    there = available_bytes(torch.device("cpu"))
    assert there is None or 2**27 < there < 2**50


def answer(function: Callable[..., None], file: Path, *arguments: Any) -> Any:
    """Call a function in a process of its own, which begins as all of them do; return what it writes to a file."""
    see_through([forking().Process(target=function, args=(file, *arguments))], file.with_suffix(".errors"))
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that weighs more than the libraries, and rows."""
    folder = tmp_path_factory.mktemp("large")
    rows_of(folder)
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, vocab_size=8000, num_attention_heads=16, max_position_embeddings=96)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def planned_large(large: Path) -> dict[bool, tuple[Path, Plan]]:
    """A recipe of one step with the large base, without gradient checkpointing and with it, and what is planned."""
    files = []
    for checkpointing in (False, True):
        recipe = recipe_of(large, "base", local_steps=1, tokens_per_pass=512, gradient_checkpointing=checkpointing)
        files.append(large / f"{checkpointing}.yaml")
        files[-1].write_text(json.dumps(recipe.model_copy(update={"rounds": 1}).model_dump(mode="json")))
    plans_made = answer(taking.planned, large / "plans", files)
    return {bool(place): (file, Plan(**made)) for place, (file, made) in enumerate(zip(files, plans_made, strict=True))}


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_process_takes_what_was_planned(
    planned_large: dict[bool, tuple[Path, Plan]], tmp_path: Path, checkpointing: bool
) -> None:
    file, planned = planned_large[checkpointing]
    assert planned.base > 200 * 2**20
    assert planned.total - planned.process > planned.process / 2
    taken = answer(taking.taken, tmp_path / "taken", file, tmp_path / "run")
    # What a heap leaves unused is chance: .5 to 1.2 times its activations, of which a plan says .8.
    least, most = (planned.total + (seen / plans.HOLES - 1) * planned.holes for seen in (0.5, 1.2))
    assert 0.85 * least < taken < 1.15 * most
    assert checkpointing == (planned.holes == 0)
