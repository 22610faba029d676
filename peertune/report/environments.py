"""Where runs that are put side by side differ in what numbers depend on beside settings, seeds and rows."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from peertune.report.runs import RunData, environments, settings

MOST_VALUES = 4
"""Values that a line counts one by one."""


class Difference(NamedTuple):
    """What runs differ in, of what belongs together; `str` makes a line of it."""

    keys: Mapping[str, str]  # of `environment.json`, dotted → in words
    values: Mapping[str, str | None]  # run → its values in words; None: not known
    follows: str  # what that means for the numbers
    grave: bool  # whether it makes other models of them

    def __str__(self) -> str:
        *most, last = dict.fromkeys(self.keys.values())
        what = f"{', '.join(most)} and {last}" if most else last
        counts = Counter(value for value in self.values.values() if value is not None)
        ranked = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
        told = [f"{value} in {count}" for value, count in ranked[:MOST_VALUES]]
        if rest := ranked[MOST_VALUES:]:
            told.append(f"{len(rest)} others in {sum(count for _, count in rest)}")
        if unknown := len(self.values) - counts.total():
            told.append(f"not known of {unknown}")
        return f"runs differ in {what}: {', '.join(told)}; {self.follows}"


_WEIGHTS = {
    "weights.body": "the base's weights",
    "weights.nf4": "the base's weights",
    "weights.head": "the base's head",
}
_MORE = "their scores may differ by more than the last digits"
_DIGITS = "their last digits may differ"
_SECONDS = f"{_DIGITS}, and their seconds can't be compared"
_TOGETHER: Sequence[tuple[Mapping[str, str], str]] = (
    (_WEIGHTS, "their scores are of different models"),
    ({"dtype": "dtype"}, _MORE),
    ({name: name for name in ("peertune", "torch", "transformers", "tokenizers", "peft", "numpy", "scipy")}, _MORE),
    ({"device": "device", "gpus": "GPU"}, _SECONDS),
    ({"float32_products": "float32 products", "onednn": "oneDNN", "settings": "settings of libraries"}, _DIGITS),
    ({"processor": "processor", "cpu_capability": "CPU capability"}, _SECONDS),
    ({"threads": "threads", "processes": "processes"}, _SECONDS),
)
"""What makes a line together, the gravest first: key → in words, and what a difference in any of them means."""
_OF_CPUS = ("processor", "cpu_capability", "threads", "onednn")
"""Keys that don't matter to what a GPU computes."""
_SETTINGS = {"dtype": "model.dtype", "device": "device"}
"""Keys that are settings as well."""


def differences(runs: Sequence[RunData], by: Collection[str] = ()) -> list[Difference]:
    """Return where these runs differ in what their numbers depend on, the gravest first.

    What a run does not say, as one of an earlier version, is not known, and differs from nothing. What the settings
    `by` tell apart already is no difference: a dtype, a device, or the weights of bases of different names.
    """
    found = []
    told = {run.name: _told(run) for run in runs}
    for keys, follows in _TOGETHER:
        for members in _bases(runs) if keys is _WEIGHTS and "model.name" in by else [list(told)]:
            differ = {
                key: word
                for key, word in keys.items()
                if _SETTINGS.get(key) not in by and len({told[name][key] for name in members if key in told[name]}) > 1
            }
            if differ:
                values = {name: _in_words(told[name], list(differ)) for name in members}
                found.append(Difference(differ, values, follows, grave=keys is _WEIGHTS))
    return found


def known(run: RunData, key: str) -> str | None:
    """Return a run's value of such a key in words; None where it is not known."""
    return _told(run).get(key)


def _told(run: RunData) -> dict[str, str]:
    """Return what a run says in words, by dotted key; where peers differ, or times, all that there is."""
    found: dict[str, set[str]] = {}
    for environment in environments(run):
        for key, value in _flat(environment):
            found.setdefault(key, set()).add(value)
    return {key: " + ".join(sorted(values)) for key, values in found.items()}


def _flat(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    on_gpu = str(environment.get("device")).startswith("cuda")
    for key, value in environment.items():
        if key == "resumed" or key in (_OF_CPUS if on_gpu else ("gpus",)):
            continue
        if key == "weights" and isinstance(value, dict):
            yield from ((f"{key}.{part}", str(digest)) for part, digest in value.items())
        elif isinstance(value, dict):
            yield key, " ".join(f"{name}={setting}" for name, setting in value.items()) or "none"
        elif isinstance(value, list):
            yield key, " ".join(map(str, dict.fromkeys(value))) or "none"
        elif isinstance(value, bool):
            yield key, "on" if value else "off"
        elif value is not None:
            yield key, str(value)


def _in_words(told: Mapping[str, str], keys: Sequence[str]) -> str | None:
    return " / ".join(told.get(key, "?") for key in keys) if any(key in told for key in keys) else None


def _bases(runs: Sequence[RunData]) -> list[list[str]]:
    """Return the names of the runs over each base."""
    found: dict[str, list[str]] = {}
    for run in runs:
        found.setdefault(str(settings(run).get("model.name")), []).append(run.name)
    return list(found.values())
