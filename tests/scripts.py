"""Files of the examples, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType


def as_module(file: Path) -> ModuleType:
    """Run a file that no package has, and return it as a module of its name."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
