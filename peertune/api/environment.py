"""Versions, devices and settings: what numbers may depend on, and what a bug report needs."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peertune import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "datasets", "safetensors", "numpy", "scipy")
_SETTINGS = (
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
)
"""What in a process's environment has the libraries of products take other instructions, or fewer digits."""


def environment(device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Return versions, devices and settings, as a recipe with this device and dtype has them.

    Raises ModelError where the device isn't there.
    """
    import torch

    from peertune.models.load import pick_device, pick_dtype

    on = pick_device(device)
    return {
        **versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(on),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "dtype": str(pick_dtype(dtype, on)).removeprefix("torch."),
        "float32_products": torch.get_float32_matmul_precision(),
        "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "settings": {name: value for name in _SETTINGS if (value := os.environ.get(name))},
        "launch": os.environ.get("TORCHELASTIC_RUN_ID"),
    }


def versions() -> dict[str, str]:
    """Return the versions of what results depend on."""
    installed = {package: version(package) for package in _PACKAGES}
    return {"peertune": __version__, **installed, "python": platform.python_version()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
