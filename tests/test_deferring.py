import subprocess
import sys
from pathlib import Path

ALONE = """
import sys
from peertune import deferring

deferring.alone()
from peertune import build, load_recipe, simulate

made = build(load_recipe("digits-demo", ["clients=2", "rounds=1", "training.local_steps=1", "evaluate.rows=20"]))
list(simulate(made.job))
heavy = {"torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "datasets", "networkx"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

import torch
import transformers
from transformers.loss.loss_for_object_detection import linear_sum_assignment
from transformers.masking_utils import TransformGetItemToIndex

assert torch.distributed.is_available()
rows, columns = linear_sum_assignment([[2.0, 1.0], [1.0, 2.0]])
assert columns.tolist() == [1, 0]
with TransformGetItemToIndex():
    assert torch.arange(3)[torch.tensor(1)] == 1
assert torch._dynamo.__file__
import transformers.models
"""
LISTED = """
print(sorted(transformers.models._class_to_module.items()), sorted(transformers.models._object_missing_backend))
print(sorted(transformers.models._modules), sorted(set(transformers.models.__all__)))
"""
OTHERS = """
import sys
import transformers
import peertune.adapters
from transformers.distributed.parallel_utils import DTensor
from transformers.utils import is_torch_distributed_available

assert is_torch_distributed_available()
assert DTensor is sys.modules["torch.distributed.tensor"].DTensor
"""


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_of_the_command_loads_nothing_that_it_does_not_use_and_where_others_load_models_all_is_as_ever(
    tmp_path: Path,
) -> None:
    assert run(ALONE + LISTED, tmp_path) == run(OTHERS + LISTED, tmp_path)
