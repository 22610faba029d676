"""What the commands share."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's path, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to set, such as graph.activation=0.02 seed=1."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for machines.")]


@contextmanager
def messages() -> Iterator[None]:
    """Show what the program is doing on a terminal; elsewhere only warnings."""
    logger = logging.getLogger("peertune")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("peertune: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    logger.info("starting")
    try:
        yield
    finally:
        logger.removeHandler(handler)


def environment() -> dict[str, Any]:
    """Return versions and devices."""
    import platform
    from importlib.metadata import version

    import torch

    from peertune.models import pick_device, pick_dtype

    device = pick_device("auto")
    packages = ("peertune", "torch", "transformers", "peft", "datasets", "safetensors", "numpy")
    return {
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
    }


def _processor() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print JSON on standard output."""
    print(json.dumps(value, indent=2))
