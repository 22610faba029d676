"""Recipes as YAML: which words are numbers, read and written alike."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # a date that doesn't exist is a ValueError


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers of JSON, so `2e-3` is one, and `010` and `1:30` are text.

    No key may stand twice, and the keys `on`, `off`, `yes` and `no`, which YAML 1.1 takes for booleans, are text.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in reversed(node.value):
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} stands twice", key.start_mark)
        for key, _ in node.value:
            if key.value in ("on", "off", "yes", "no"):
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number, as well as what other readers would."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9]\d*)$",
    "tag:yaml.org,2002:float": r"[-+]?(((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[-+]?\d+)?|\.inf)$|\.nan$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag not in _NUMBERS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in _NUMBERS.items():
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(_tag, re.compile(_form, re.ASCII | re.IGNORECASE), list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """Read plain values. Raises one of `NOT_YAML`."""
    return yaml.load(text, _Loader)  # a SafeLoader: plain values only


def as_yaml(values: Mapping[str, Any]) -> str:
    """Write plain values so that they are read as what they are."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
