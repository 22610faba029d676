"""The run directory: what a run leaves behind, and what it resumes from.

    runs/<name>/
      recipe.yaml  resolved.yaml  environment.json     what was asked, what was run, on what
      facts.json                                       its format, what follows from the recipe: rho, who holds what
      adapter/                                         what all adapters share: PEFT's config, head, labels, what was
                                                       taken out of the base
      rounds.jsonl                                     a RoundRecord a line: the truth; all else derives from it
      mixed.jsonl  messages/                           of a peer that waits for nobody: what it mixed when, and messages
      rounds/round-000012.safetensors                  its long lists, where it has any: of over 1,000 clients or edges
      checkpoints/round-000120/                        state-000.safetensors and meta.json, whole or not there
      checkpoints/within-000123-000040/                the same after 40 local steps of round 123, where that is asked
                                                       for; the newest alone
      adapters/client-000/ … adapters/average/         each loads with PeftModel.from_pretrained

Files and folders appear whole or not at all: they are written beside their place and renamed into it. Only
`rounds.jsonl` grows; a line that was cut off counts as not written.

Several processes (`Group`) write a shard of a checkpoint each, and the adapters of their own clients; a folder appears
when all have written. A run can go on from a checkpoint in any number of processes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from peertune import files
from peertune.errors import RunError
from peertune.files import reported, written_folder

if TYPE_CHECKING:  # torch and PEFT take seconds to import, and most commands only read
    from torch import Tensor

    from peertune.adapters.peft_format import LoraConfig
    from peertune.types import Group

TAKEN = "taken.safetensors"
"""In `adapter/`, what was taken out of the base as the clients' start, where something was."""
FORMAT = 2
"""Of run directories and checkpoints, in `facts.json` and `meta.json`: grows when a version that does not know a change
would misread them. All up to this one are read. Those without a number count as 0, and are as those of 1. In 2 a
checkpoint holds the method's memory, where 1 has signals, and each client's round."""


def check_free(folder: Path) -> None:
    """Raise RunError where there is something in the place of a new run directory."""
    with reported(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder}: is there already; give another --out, or go on with --resume {folder}")


def check_shared(folder: Path, group: "Group") -> None:
    """Raise RunError where a process of the group does not see the folder that rank 0 sees, and makes if need be."""
    if group.size == 1:
        return
    token = folder / f".seen-{group.gather(uuid4().hex)[0]}"
    if group.rank == 0:
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
    group.gather("")
    seen = group.gather(token.exists())
    if group.rank == 0:
        token.unlink()
    if not all(seen):
        rank = seen.index(False)
        raise RunError(f"{folder}: rank {rank} doesn't see it; give an --out on a disk that all machines share")


def launched(folder: Path, launch: str) -> bool:
    """Return whether the run was begun by torchrun's launch of this name."""
    return bool(_said(folder, "environment").get("launch") == launch)


def locked(folder: Path) -> AbstractContextManager[None]:
    """Keep other processes from working on the same run. Raises RunError where one does already."""
    return files.locked(folder, "run")


def create(
    folder: Path,
    *,
    recipe: str,
    resolved: str,
    environment: Mapping[str, Any],
    facts: Mapping[str, Any],
    lora: "LoraConfig",
    head: "Mapping[str, Tensor]",
    labels: Sequence[str],
    taken: "Mapping[str, Tensor]",
) -> None:
    """Make the run directory; `taken` was taken out of the base as the clients' start.

    Raises RunError where something is there already, or it can't be written.
    """
    from safetensors.torch import save

    from peertune.adapters.peft_format import save_config

    check_free(folder)
    with written_folder(folder) as beside:
        (beside / "recipe.yaml").write_text(recipe, encoding="utf-8")
        (beside / "resolved.yaml").write_text(resolved, encoding="utf-8")
        (beside / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
        (beside / "facts.json").write_text(json.dumps({"format": FORMAT, **facts}, indent=2) + "\n")
        (beside / "adapter").mkdir()
        save_config(beside / "adapter", lora)
        for file, tensors in {"head.safetensors": head, **({TAKEN: taken} if taken else {})}.items():
            data = save({name: value.cpu().contiguous() for name, value in tensors.items()})
            (beside / "adapter" / file).write_bytes(data)
        (beside / "adapter" / "labels.json").write_text(json.dumps(list(labels)) + "\n", encoding="utf-8")
        (beside / "rounds.jsonl").touch()


def resolved(folder: Path) -> Path:
    """Return the file of what was run. Raises RunError where the folder is no run, or one of a later format."""
    file = folder / "resolved.yaml"
    if not file.is_file():
        raise RunError(f"{folder}: is no run, it holds no resolved.yaml; give the folder of one")
    check_format(folder, _said(folder))
    return file


def check_format(what: Path, said: Mapping[str, Any]) -> None:
    """Raise RunError where a run or a checkpoint says that it is of a format that this version does not read."""
    number = said.get("format", 0)
    if type(number) is not int or not 0 <= number <= FORMAT:
        raise RunError(f"{what}: is of format {number!r}, and this version reads 0 to {FORMAT}; use a newer peertune")


def _said(folder: Path, part: str = "facts") -> dict[str, Any]:
    """Return what `facts.json`, or another such part of a run, says; {} where it can't be read."""
    try:
        found = json.loads((folder / f"{part}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def peer(run: Path) -> dict[str, Any] | None:
    """Return which client of which federation a peer's run is of; None for a simulation."""
    found = _said(run).get("peer")
    return found if isinstance(found, dict) else None


def has_own_rows(run: Path) -> bool:
    """Return whether a peer trained on rows that its party gave it, and not on what the recipe deals out."""
    return _said(run).get("own_rows") is True


def ranks(run: Path) -> dict[str, Any]:
    """Return the clients' ranks and how their scales are made; {} of a run whose clients have one rank."""
    return dict(_said(run).get("ranks", {}))


def hostile(run: Path) -> list[int]:
    """Return the clients that attack, by the recipe; mostly []."""
    return list(_said(run).get("hostile", ()))


def plugins(run: Path) -> dict[str, Any]:
    """Return which code the run was begun with that is not peertune's, by block of the recipe."""
    found = _said(run).get("plugins", {})
    return found if isinstance(found, dict) else {}


def weights(run: Path) -> dict[str, str]:
    """Return the digests of the base's weights that the run began with; {} where it does not say them."""
    found = _said(run, "environment").get("weights", {})
    return found if isinstance(found, dict) else {}


def note_environment(run: Path, round: int, now: Mapping[str, Any]) -> dict[str, Any]:
    """Write down, and return, in what a run that has made so many rounds goes on otherwise than it was.

    That is `resumed` in `environment.json`: a mapping for each time, `round` and what changed. What the run did not say
    before is not known to have changed.
    """
    said = _said(run, "environment")
    resumed = said.get("resumed", [])
    was = reduce(dict.__or__, resumed, said)
    changed = {key: value for key, value in now.items() if key != "launch" and key in was and was[key] != value}
    if changed:
        told = said | {"resumed": [*resumed, {"round": round, **changed}]}
        files.write_file(run / "environment.json", (json.dumps(told, indent=2) + "\n").encode())
    return changed


def pipeline_tag(run: Path) -> str:
    """Return what the run's models are for, in the hub's words. Raises RunError where the run does not say it."""
    try:
        form = json.loads((run / "facts.json").read_text()).get("task", {}).get("form")
        task = json.loads((run / "adapter" / "adapter_config.json").read_text())["task_type"]
        known = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation", None: "image-classification"}
        return "zero-shot-image-classification" if form == "match" else known[task]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{run}: its facts.json or adapter is missing or damaged; restore it") from None


def in_all(group: "Group", act: Callable[[], Any]) -> list[Any]:
    """Return what the act of each process comes to, by rank. Raises RunError in all of them where one's does."""
    value, wrong = None, ""
    try:
        value = act()
    except RunError as error:
        wrong = str(error)
    told = group.gather([value, wrong])
    if wrong := next((wrong for _, wrong in told if wrong), ""):
        raise RunError(wrong)
    return [value for value, _ in told]


def write_together(folder: Path, group: "Group", *steps: Callable[[Path, list[Any]], Any]) -> None:
    """Have all processes write into a folder beside, which takes the place of `folder` when all have taken all steps.

    A step is given that folder, and what the step before came to in each process; values that JSON can hold. Where one
    process can't write, none of it stays. Nobody goes on before the folder is in its place: a process that ended would
    have its launcher stop the others in the middle of that. Raises RunError in all of them.
    """
    with ExitStack() as stack:
        made = in_all(
            group, lambda: str(stack.enter_context(written_folder(folder)).absolute()) if group.rank == 0 else ""
        )
        beside, told = Path(made[0]), list[Any]()

        def take(step: Callable[[Path, list[Any]], Any]) -> Any:
            if not beside.is_dir():
                raise RunError(f"{beside}: isn't there; give an --out on a disk that all machines share")
            with reported(folder):
                return step(beside, told)

        for step in steps:
            told = in_all(group, partial(take, step))
        in_all(group, stack.pop_all().close)
