"""Versions and devices: what numbers may depend on, and what a bug report needs."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peertune import __version__


def environment() -> dict[str, Any]:
    """Return versions and devices."""
    import torch

    from peertune.models.load import pick_device, pick_dtype

    device = pick_device("auto")
    return {
        **versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
        "launch": os.environ.get("TORCHELASTIC_RUN_ID"),
    }


def versions() -> dict[str, str]:
    """Return the versions of what results depend on."""
    packages = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy")
    installed = {package: version(package) for package in packages}
    return {"peertune": __version__, **installed, "python": platform.python_version()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
