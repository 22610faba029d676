"""The example of a method of one's own: installed, from its file, in two processes, among peers, by its equations."""

import ast
import io
import shutil
import subprocess
import sys
import tokenize
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import found
from processes import finish, finish_well, start
from ranks import assert_same_adapters
from safetensors.torch import load_file
from scripts import as_module
from torch import Tensor

from peertune import build, load_recipe, simulate
from peertune.assembly.needs import check_needs
from peertune.errors import RecipeError
from peertune.method import Algorithm, standing
from peertune.rounds.job import Job
from peertune.runs import records
from peertune.topology import weights_at
from peertune.types import Tensors

FOLDER = Path(__file__).parents[1] / "examples" / "own-method"
RECIPE = FOLDER / "tracking.yaml"
NAMED = "algorithm.name=own_method:gradient_tracking"
SHORT = [
    "clients=3",
    "rounds=3",
    "partition={name: iid}",
    "model.dtype=float64",
    "training.local_steps=2",
    "training.per_device_train_batch_size=2",
    "evaluate={every: 3, rows: 4}",
]
ALLOWED = ["--plugin", "own_method"]


def test_installed_it_is_a_name_like_any_other_in_a_sweep(tmp_path: Path) -> None:
    here, packages = shutil.copytree(FOLDER, tmp_path / "here"), tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", packages, here], check=True)
    (here / "own_method.py").unlink()  # what is installed is found, not what lies here
    words = ["sweep", "tracking.yaml", *SHORT, "algorithm.name=gradient_tracking,dec_lora", "--jobs", "2"]
    process = start(here, *words, "--out", "grid", PYTHONPATH=str(packages))
    code, out, err = finish(process)
    assert (code, out) == (0, "2 of 2 runs are finished in grid\n"), err
    sent = {run.name: sum(records.read(run)[-1]["bytes_sent"]) for run in (here / "grid").iterdir()}
    tracking, plain = (next(size for name, size in sent.items() if of in name) for of in ("tracking", "dec_lora"))
    assert tracking == 2 * plain > 0


def test_allowed_from_its_file_it_is_the_same_in_one_process_two_and_as_peers(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    two = found(tmp_path, 2)
    settings = [*SHORT, "clients=2", "graph={name: complete}", NAMED]
    processes = [start(tmp_path, "run", "tracking.yaml", *settings, *ALLOWED, "--out", "one")]
    processes.append(start(tmp_path, "run", "tracking.yaml", *settings, *ALLOWED, "--workers", "2", "--out", "two"))
    for client in range(2):
        who = ["--roster", str(two.roster), "--dir", str(two.peer(client))]
        words = ["peer", "start", *who, "--recipe", "tracking.yaml", *settings, *ALLOWED]
        processes.append(start(tmp_path, *words, "--out", f"peers/{client}"))
    finish_well(processes)
    assert_same_adapters(tmp_path / "two", tmp_path / "one")
    for client in range(2):
        part = Path("adapters", f"client-{client:03d}", "adapter_model.safetensors")
        ours, theirs = load_file(tmp_path / "peers" / f"{client}" / part), load_file(tmp_path / "one" / part)
        for name, x in theirs.items():
            torch.testing.assert_close(ours[name], x, rtol=0, atol=1e-12)


def example() -> Algorithm:
    made: Algorithm = as_module(FOLDER / "own_method.py").gradient_tracking()
    return made


def job(*more: str) -> Job:
    made = build(load_recipe(str(RECIPE), [*SHORT, "algorithm.name=dec_lora", "clients=4", *more])).job
    algorithm = example()
    memory = algorithm.init(made.state.clone().adapters, standing(made.clients, made.state.rounds))
    return replace(made, algorithm=algorithm, state=replace(made.state, memory=memory))


def test_it_comes_to_what_its_equations_say() -> None:
    asked, seen = job("graph={name: ring, activation: 0.7}"), list[tuple[Tensors, Tensors]]()

    def spy(own: Tensors, heard: Tensors, weights: Tensor, memory: Tensors, *rest: Any) -> Any:
        seen.append(({name: x.clone() for name, x in own.items()}, dict(memory)))
        return asked.algorithm.mixer.weigh(own, heard, weights, memory, *rest)

    spied = replace(asked, algorithm=asked.algorithm._replace(mixer=asked.algorithm.mixer._replace(weigh=spy)))
    start, steps, rate = asked.state.clone().adapters, asked.local_steps, 0.1
    corrections = {name: torch.zeros_like(x) for name, x in start.items()}
    for record in simulate(spied):
        assert record.state is not None
        ended, before = seen[-1]
        W = torch.from_numpy(weights_at(asked.graph, record.round).toarray())
        for name, x in start.items():
            z = (x - ended[name]) / rate  # the sum of what plain steps of SGD followed
            torch.testing.assert_close(before[f"tracking.{name}.z"], z, rtol=0, atol=1e-9)
            mixed = torch.einsum("ij,j...->i...", W, z)
            corrections[name] = corrections[name] + (mixed - z) / steps
            torch.testing.assert_close(record.state.memory[f"tracking.{name}.c"], corrections[name], rtol=0, atol=1e-9)
            assert corrections[name].mean(0).abs().max() < 1e-12
        start = record.state.clone().adapters
    assert max(float(c.abs().max()) for c in corrections.values()) > 1e-4


def test_it_needs_plain_steps() -> None:
    asked = load_recipe(str(RECIPE), [*SHORT, "algorithm.name=dec_lora", "training.optim=adamw"])
    with pytest.raises(RecipeError, match=r"needs sgd; give training\.optim=sgd$"):
        check_needs(asked, job().graph, example())


def test_it_is_under_40_lines_of_code() -> None:
    source = (FOLDER / "own_method.py").read_text()
    quoted = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in skipped]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - quoted
    assert len(code) < 40
