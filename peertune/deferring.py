"""What `transformers` imports and no process of the command uses: done without, or put off until something uses it.

As it is imported it takes names from SciPy's solvers, PyTorch's compiler and PyTorch's distributed tensors. These take
as long to import as PyTorch itself.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_alone = False


def alone() -> None:
    """Say that this process is peertune's own: its code compiles nothing and shards no base.

    A process in which others use `transformers` may do both, so there all is imported as ever. It has no effect once
    the models of `transformers` were imported.
    """
    global _alone
    _alone = True


@contextmanager
def put_off() -> Iterator[None]:
    """For a `with` block that imports `transformers` or loads a base, in a process that is `alone`, do without these.

    `transformers` finds that PyTorch was built without its distributed part, which it has a way for. What is marked for
    the compiler is not marked. What is taken from other modules is looked up when it is called.
    """
    standing = [kind(name) for name, kind in _STANDING.items() if _alone and name not in sys.modules]
    sys.modules.update({module.__name__: module for module in standing})
    try:
        if _alone and "transformers.modeling_utils" not in sys.modules:
            with suppress(AttributeError):  # another version has another way, and takes its time
                _without_distributed()
                _list_models()
        yield
    finally:
        for module in standing:
            _withdraw(module)


def _without_distributed() -> None:
    """Have `transformers` ask once whether PyTorch has its distributed part, and remember that it has none."""
    import torch.distributed
    from transformers.utils import import_utils

    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        import_utils.is_torch_distributed_available()
    finally:
        torch.distributed.is_available = available


def _list_models() -> None:
    """Import the list of models, which `transformers` has made of all their files already and would make again."""
    from transformers.utils import import_utils

    transformers: Any = sys.modules["transformers"]
    folder, scan = Path(str(transformers.__file__)).parent / "models", import_utils.define_import_structure
    lacking: Mapping[str, list[str]] = transformers._object_missing_backend
    known: dict[frozenset[str], dict[str, set[str]]] = defaultdict(dict)
    for module, names in transformers._import_structure.items():
        if (inside := module.removeprefix("models.")) != module:
            known[frozenset()].setdefault(inside, set())
            for name in names:
                known[frozenset(lacking.get(name, ()))].setdefault(inside, set()).add(name)
    import_utils.define_import_structure = lambda path, prefix=None: (  # type: ignore[assignment]
        known if Path(path) == folder / "__init__.py" else scan(path, prefix)
    )
    try:
        import_module("transformers.models")
    finally:
        import_utils.define_import_structure = scan


class _Later(ModuleType):
    """Stands in for a module, of which some functions and classes are taken, to be called after it is loaded."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # which the import system asks for
            raise AttributeError(name)

        def called(*args: Any, **kwargs: Any) -> Any:
            return getattr(_real(self), name)(*args, **kwargs)

        return called


class _Compiler(ModuleType):
    """Stands in for PyTorch's compiler; what asks it for more than marks loads it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = find_spec(name)
        self.__path__ = (self.__spec__ and self.__spec__.submodule_search_locations) or []  # of modules in it

    def disable(self, fn: Any = None, *_: Any, **__: Any) -> Any:
        """Leave a function as it is, or return what does."""
        return self.disable if fn is None else fn

    allow_in_graph = assume_constant_result = disable

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(self), name)


def _real(standing: ModuleType) -> ModuleType:
    """Return the module that something stood in for."""
    _withdraw(standing)
    return import_module(standing.__name__)


def _withdraw(standing: ModuleType) -> None:
    if sys.modules.get(standing.__name__) is standing:
        del sys.modules[standing.__name__]


_STANDING: dict[str, type[ModuleType]] = {
    "torch._dynamo": _Compiler,
    "torch._dynamo._trace_wrapped_higher_order_op": _Later,
    "scipy.optimize": _Later,
}
