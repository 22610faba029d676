import subprocess
import sys
from importlib import import_module

import pytest

import peertune

NAMES = [
    *("ALGORITHMS", "ATTACKS", "GRAPHS", "MODIFIERS", "PARTITIONS", "TASKS"),
    *(
        "Algorithm",
        "At",
        "Attack",
        "Gradient",
        "Graph",
        "Local",
        "Memory",
        "Message",
        "Mixer",
        "Partition",
        "PeertuneError",
        "Phase",
    ),
    *("Run", "Runs", "Schedule", "Split", "Stopped", "Task", "Tensors"),
    *("alternating", "both", "build", "by_round", "gossip", "load_recipe", "resume", "run", "simulate", "sweep"),
]


def test_the_public_names_are_these_constants_then_classes_then_functions_each_sorted() -> None:
    assert peertune.__all__ == NAMES
    assert sorted(NAMES, key=lambda name: (not name.isupper(), name[0].islower(), name)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_stays_what_it_is_once_its_module_is_imported(name: str) -> None:
    home = import_module(peertune._HOMES[name])
    assert getattr(peertune, name) is getattr(home, name)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'peertune' has no attribute 'Trainer'"):
        _ = peertune.Trainer


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, peertune; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "pydantic", "numpy", "peft", "datasets"} & set(loaded)
