"""The run directory: what a run leaves behind, and what it resumes from.

    runs/<name>/
      recipe.yaml  resolved.yaml  environment.json     what was asked, what was run, on what
      facts.json                                       its format, what follows from the recipe: rho, who holds what
      adapter/                                         what all adapters share: PEFT's config, head, labels
      rounds.jsonl                                     a RoundRecord a line: the truth; all else derives from it
      rounds/round-000012.safetensors                  its long lists, where it has any: of over 1,000 clients or edges
      checkpoints/round-000120/                        state-000.safetensors and meta.json, whole or not there
      adapters/client-000/ … adapters/average/         each loads with PeftModel.from_pretrained

Files and folders appear whole or not at all: they are written beside their place and renamed into it. Only
`rounds.jsonl` grows; a line that was cut off counts as not written.

Several processes (`Group`) write a shard of a checkpoint each, and the adapters of their own clients; a folder appears
when all have written. A run can go on from a checkpoint in any number of processes.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, asdict, fields, replace
from hashlib import file_digest, sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from peertune import files
from peertune.errors import RunError
from peertune.files import reported, write_file, written_folder
from peertune.types import ALONE, Evaluation, Group, RoundRecord, State, Tensors

if TYPE_CHECKING:  # PEFT takes seconds to import, and most commands only read
    from peft import LoraConfig

log = logging.getLogger(__name__)

FORMAT = 1
"""Of run directories and checkpoints, in `facts.json` and `meta.json`: grows when a version that does not know a change
would misread them. All up to this one are read. Those without a number count as 0, and are as those of 1."""
LONGEST_LIST = 1_000
"""Values up to which a list of a record stands in its line of `rounds.jsonl`; longer ones go to a file beside it."""
_NUMBERS = ("clients", "edges", "failed_edges", "vacant_edges", "not_mixed", "out_of_phase", "suspects")
"""Lists of clients' numbers, of which the line keeps the length; of measured values it keeps the mean."""


def check_free(folder: Path) -> None:
    """Raise RunError where there is something in the place of a new run directory."""
    with reported(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder}: is there already; give another --out, or go on with --resume {folder}")


def check_shared(folder: Path, group: Group) -> None:
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
    try:
        found = json.loads((folder / "environment.json").read_text())
        return bool(found["launch"] == launch)
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
    head: Mapping[str, Tensor],
    labels: Sequence[str],
) -> None:
    """Make the run directory. Raises RunError where something is there already, or it can't be written."""
    from peertune.adapters.peft_format import save_config

    check_free(folder)
    with written_folder(folder) as beside:
        (beside / "recipe.yaml").write_text(recipe, encoding="utf-8")
        (beside / "resolved.yaml").write_text(resolved, encoding="utf-8")
        (beside / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
        (beside / "facts.json").write_text(json.dumps({"format": FORMAT, **facts}, indent=2) + "\n")
        (beside / "adapter").mkdir()
        save_config(beside / "adapter", lora)
        shared = save({name: value.cpu().contiguous() for name, value in head.items()})
        (beside / "adapter" / "head.safetensors").write_bytes(shared)
        (beside / "adapter" / "labels.json").write_text(json.dumps(list(labels)) + "\n", encoding="utf-8")
        (beside / "rounds.jsonl").touch()


def resolved(folder: Path) -> Path:
    """Return the file of what was run. Raises RunError where the folder is no run, or one of a later format."""
    file = folder / "resolved.yaml"
    if not file.is_file():
        raise RunError(f"{folder}: is no run, it holds no resolved.yaml; give the folder of one")
    check_format(folder, _facts(folder))
    return file


def check_format(what: Path, said: Mapping[str, Any]) -> None:
    """Raise RunError where a run or a checkpoint says that it is of a format that this version does not read."""
    number = said.get("format", 0)
    if type(number) is not int or not 0 <= number <= FORMAT:
        raise RunError(f"{what}: is of format {number!r}, and this version reads 0 to {FORMAT}; use a newer peertune")


def _facts(folder: Path) -> dict[str, Any]:
    """Return what `facts.json` says; {} where it can't be read."""
    try:
        found = json.loads((folder / "facts.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def append(folder: Path, record: RoundRecord) -> None:
    """Add a record to `rounds.jsonl`; its long lists go to a file of their own, which is written first.

    Raises RunError where it can't be written; then the file is as before.
    """
    values = asdict(replace(record, state=None))
    del values["state"]
    long = {name: np.asarray(x) for name, x in _lists(values).items() if len(x) > LONGEST_LIST}
    if long:
        file = _long_lists(folder, record.round)
        with reported(file):
            file.parent.mkdir(exist_ok=True)
        write_file(file, safetensors.numpy.save(long))
        for name, x in long.items():
            _put(values, name, len(x) if name in _NUMBERS else float(x.mean()))
        values["long"] = sorted(long)
    file = folder / "rounds.jsonl"
    with reported(file):
        before = file.stat().st_size
        try:
            with file.open("a") as lines:
                lines.write(json.dumps(values) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
        except OSError:
            os.truncate(file, before)  # what there was room for is no line
            raise


def _long_lists(folder: Path, round: int) -> Path:
    return folder / "rounds" / f"round-{round:06d}.safetensors"


def _lists(values: Mapping[str, Any], block: str = "") -> dict[str, list[Any]]:
    """Return the lists of a record by name, such as `loss` and `evaluation.clients`."""
    found: dict[str, list[Any]] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _lists(value, f"{block}{name}.")
        elif isinstance(value, list):
            found[f"{block}{name}"] = value
    return found


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Put something in the place of one of these lists."""
    *blocks, last = name.split(".")
    for block in blocks:
        values = values[block]
    values[last] = value


def records(folder: Path, lists: Container[str] | None = None) -> list[dict[str, Any]]:
    """Read `rounds.jsonl`, a record for each round in order, with its long lists in their places.

    Given `lists`, only long lists of these names are read, such as `evaluation.clients`; the others stay what the line
    has, a mean or a length.

    A line that is damaged, or whose long lists are, is left out with a warning; a last line that was cut off is no
    record. Raises RunError where the file isn't there.
    """
    found = []
    for record, _ in _lines(folder):
        try:
            if "long" in record:
                with safe_open(_long_lists(folder, record["round"]), framework="np") as held:
                    for name in record.pop("long"):
                        if lists is None or name in lists:
                            _put(record, name, held.get_tensor(name).tolist())
            found.append(record)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError):
            log.warning("%s/rounds: round %s is missing or damaged and left out; restore it", folder, record["round"])
    return found


def _lines(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each record as its line has it, and the line."""
    try:
        lines = (folder / "rounds.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        raise RunError(f"{folder}: no readable rounds.jsonl; give the folder of a run") from None
    next_round = 0
    for number, line in enumerate(lines, start=1):
        try:
            record = _whole(json.loads(line), RoundRecord)
            if record["evaluation"] is not None:
                record["evaluation"] = _whole(record["evaluation"], Evaluation)
            if record["round"] < next_round:
                raise ValueError("a round stands twice")
        except (ValueError, TypeError, KeyError, AttributeError):
            if number < len(lines):
                log.warning("%s/rounds.jsonl: line %d is damaged and left out; restore the file", folder, number)
            continue
        next_round = record["round"] + 1
        yield record, line


def _whole(values: dict[str, Any], of: type[RoundRecord] | type[Evaluation]) -> dict[str, Any]:
    """Return what a line says, with the defaults of the fields that it lacks, as versions that lack them write it.

    What no field of this version is for is kept. Raises KeyError where a field is missing that has no default.
    """
    found = dict(values)
    for field in fields(of):
        if field.name not in found and field.name != "state":
            made = field.default if field.default_factory is MISSING else field.default_factory()
            if made is MISSING:
                raise KeyError(field.name)
            found[field.name] = made
    return found


@contextmanager
def _written_together(folder: Path, group: Group) -> Iterator[Path]:
    """Yield a folder that all processes write into; it takes the place of `folder` when all have written.

    Nobody goes on before it has: a process that ended would have its launcher stop the others in the middle of that.
    """
    with written_folder(folder) if group.rank == 0 else nullcontext() as made:
        beside = Path(group.gather(made and str(made.absolute()))[0])
        if not beside.is_dir():
            raise RunError(f"{beside}: isn't there; give an --out on a disk that all machines share")
        with reported(folder):
            yield beside
        group.gather("")
    group.gather("")


def save_checkpoint(folder: Path, state: State, keep: int, clients: Sequence[int], group: Group = ALONE) -> None:
    """Write a checkpoint of the state of these clients, a shard, and remove all that are not among the `keep`.

    The newest two stay, and of the older ones those that `_thinned` leaves.
    """
    parts = {"adapters": state.adapters, "moments": state.moments, "signals": state.signals}
    data = save(
        {f"{part}/{name}": x.detach().cpu().contiguous() for part, xs in parts.items() for name, x in xs.items()}
    )
    name = f"state-{group.rank:03d}.safetensors"
    shard = {"file": name, "clients": list(clients), "sha256": sha256(data).hexdigest()}
    with _written_together(folder / "checkpoints" / f"round-{state.round:06d}", group) as beside:
        (beside / name).write_bytes(data)
        shards = group.gather(shard)
        if group.rank == 0:
            meta = {"format": FORMAT, "round": state.round, "shards": shards}
            (beside / "meta.json").write_text(json.dumps(meta) + "\n")
    if group.rank > 0:
        return
    unfinished = (folder / "checkpoints").glob(".round-*")  # of a process that was killed
    held = _checkpoints(folder)
    stay = _thinned([_round(checkpoint) for checkpoint in held], keep)
    for old in (*(checkpoint for checkpoint in held if _round(checkpoint) not in stay), *unfinished):
        shutil.rmtree(old, ignore_errors=True)


def _thinned(rounds: Sequence[int], keep: int) -> set[int]:
    """Return which of the checkpoints of these `rounds`, the newest first, stay: `keep` of them.

    The newest two and the oldest do. Of the others one goes that leaves the smallest gap, by the ratio of the ages
    beside it. So ages come to grow by one factor from each to the next, and the whole run stays in reach.
    """
    stay = list(rounds)
    while len(stay) > keep:
        ages = [stay[0] - at for at in stay]
        inner = range(2, len(stay) - 1)
        del stay[min(inner, key=lambda n: ages[n + 1] / ages[n - 1]) if keep > 2 and inner else -1]
    return set(stay)


def _round(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("round-"))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("round-*"), key=_round, reverse=True)


def load_checkpoint(
    folder: Path,
    like: State | None = None,
    clients: Sequence[int] | None = None,
    group: Group = ALONE,
    before: int | None = None,
) -> State | None:
    """Return the state of these clients, or of all, in the newest whole checkpoint, or None where there is none yet.

    With `before`, in the newest of those that have fewer rounds behind them; None where these are damaged.
    It is on the CPU. A checkpoint that is damaged, or whose part that another process of the group reads is, is passed
    over with a warning. Raises RunError where all are damaged, or where the newest is of a later format or does not fit
    the state `like` that the run starts from.
    """
    held = [checkpoint for checkpoint in _checkpoints(folder) if before is None or _round(checkpoint) < before]
    (found, *_) = group.gather([str(checkpoint) for checkpoint in held])
    for checkpoint in map(Path, found):
        wrong, state = "", None
        try:
            state = _read_checkpoint(checkpoint, clients)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            wrong = str(error) or type(error).__name__
        if any(told := group.gather(wrong)):
            log.warning("%s is damaged and passed over (%s)", checkpoint, next(filter(None, told)))
            continue
        assert state is not None
        return state if like is None else _fitted(checkpoint, state, like)
    if found and before is None:
        raise RunError(
            f"{folder}/checkpoints: every checkpoint is damaged; restore one, or start again with another --out"
        )
    return None


def _read_checkpoint(checkpoint: Path, clients: Sequence[int] | None) -> State:
    """Return the state of these clients, or of all, out of the shards that hold them."""
    meta = dict(json.loads((checkpoint / "meta.json").read_text()))
    check_format(checkpoint, meta)
    held = [list(map(int, shard["clients"])) for shard in meta["shards"]]
    places = {client: place for place, client in enumerate(sorted(chain(*held)) if clients is None else clients)}
    parts: dict[str, Tensors] = {"adapters": {}, "moments": {}, "signals": {}}
    for shard, own in zip(meta["shards"], held, strict=True):
        wanted = [row for row, client in enumerate(own) if client in places]
        if not wanted:
            continue
        file = checkpoint / Path(shard["file"]).name
        with file.open("rb") as stream:
            if file_digest(stream, "sha256").hexdigest() != shard["sha256"]:
                raise ValueError(f"the contents of {file.name} are not what was written")
        rows = slice(wanted[0], wanted[-1] + 1)  # neighbours, as they were dealt
        to = torch.tensor([places[client] for client in own[rows]])
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                part, _, rest = name.partition("/")
                x = tensors.get_slice(name)[rows]
                if rest not in parts[part]:  # of its own, aligned memory: kernels round by alignment
                    parts[part][rest] = x.new_empty((len(places), *x.shape[1:]))
                parts[part][rest][to] = x
    return State(parts["adapters"], parts["moments"], int(meta["round"]), parts["signals"])


def _fitted(checkpoint: Path, state: State, like: State) -> State:
    """Return the state with its tensors in the order of `like`, in which norms add up to the same bits."""
    parts = [(state.adapters, like.adapters), (state.moments, like.moments), (state.signals, like.signals)]
    for have, want in parts:
        for name in sorted(have.keys() | want.keys()):
            shapes = [tuple(part[name].shape) if name in part else None for part in (have, want)]
            if shapes[0] != shapes[1]:
                raise RunError(
                    f"{checkpoint}: {name} is {shapes[0]} where the recipe makes {shapes[1]}; "
                    "resume with the run's own recipe"
                )
    adapters, moments, signals = ({name: have[name] for name in want} for have, want in parts)
    return State(adapters, moments, state.round, signals)


def rewind(folder: Path, round: int) -> None:
    """Forget the records from `round` on: they will be made again. Raises RunError where one before it is missing.

    A peer may have missed rounds: its records have gaps.
    """
    kept = [(record["round"], line) for record, line in _lines(folder) if record["round"] < round]
    whole = next((t for t, (number, _) in enumerate(kept) if number != t), len(kept))
    if whole < round and peer(folder) is None:
        raise RunError(
            f"{folder}/rounds.jsonl: has no record of round {whole}, which the checkpoint round-{round:06d} follows; "
            "restore the file, or remove the checkpoint to go on from an older one"
        )
    write_file(folder / "rounds.jsonl", "".join(f"{line}\n" for _, line in kept).encode())


@contextmanager
def exported(run: Path, state: State, client: int | None, to: Path) -> Iterator[Path]:
    """Yield a folder with one client's adapter, or the average of all where `client` is None, in PEFT's format.

    It takes the place of `to` when all is done that is to be done with it, and vanishes otherwise. Raises RunError for
    a client that isn't there or a folder that is there already.
    """
    clients = _clients(run, state)
    if client is not None and client not in clients:
        raise RunError(f"client {client}: {_who(run, clients)}")
    if client is None and len(clients) < 2 and peer(run) is not None:
        raise RunError(f"average: {_who(run, clients)}; give --client {clients[0]}")
    with reported(to):
        if to.exists():
            raise RunError(f"{to}: is there already; give another folder")
    write = _adapter_writer(run)
    with written_folder(to) as beside:
        write(beside, _adapter(state, None if client is None else clients.index(client)))
        yield beside


def export_all(run: Path, state: State, clients: Sequence[int], group: Group = ALONE) -> None:
    """Write `adapters/`: those of these clients, of whom the state is, and the average; of a peer its own."""
    write = _adapter_writer(run)
    with _written_together(run / "adapters", group) as beside:
        for place, client in enumerate(clients):
            write(beside / f"client-{client:03d}", _adapter(state, place))
        if peer(run) is None:
            average = {name: group.mean(x) for name, x in state.adapters.items()}
            if group.rank == 0:
                write(beside / "average", average)


def peer(run: Path) -> dict[str, Any] | None:
    """Return which client of which federation a peer's run is of; None for a simulation."""
    found = _facts(run).get("peer")
    return found if isinstance(found, dict) else None


def purpose(run: Path) -> str:
    """Return what the run's models are for, in the hub's words. Raises RunError where the run does not say it."""
    try:
        form = json.loads((run / "facts.json").read_text()).get("task", {}).get("form")
        task = json.loads((run / "adapter" / "adapter_config.json").read_text())["task_type"]
        known = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation", None: "image-classification"}
        return "zero-shot-image-classification" if form == "match" else known[task]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{run}: its facts.json or adapter is missing or damaged; restore it") from None


def _clients(run: Path, state: State) -> Sequence[int]:
    """Return the numbers of the clients whose adapters the state holds."""
    own = peer(run)
    return range(state.clients) if own is None else [int(own["client"])]


def _who(run: Path, clients: Sequence[int]) -> str:
    if peer(run) is None:
        return f"the run has clients 0 to {clients[-1]}"
    return f"the run is of client {clients[0]} alone"


def _adapter_writer(run: Path) -> Callable[[Path, Tensors], None]:
    """Return what writes an adapter into a folder, with all that the adapters of a run share."""
    from peft import LoraConfig

    from peertune.adapters.peft_format import save_adapter

    try:
        lora = LoraConfig.from_pretrained(str(run / "adapter"))
        head = load((run / "adapter" / "head.safetensors").read_bytes())
        labels = (run / "adapter" / "labels.json").read_bytes()
    except (OSError, ValueError, SafetensorError):
        raise RunError(f"{run}/adapter: is missing or damaged; give the folder of a run") from None

    def write(folder: Path, adapter: Tensors) -> None:
        save_adapter(folder, adapter, head=head, lora=lora)
        (folder / "labels.json").write_bytes(labels)

    return write


def _adapter(state: State, place: int | None) -> Tensors:
    return {name: x.mean(0) if place is None else x[place] for name, x in state.adapters.items()}
