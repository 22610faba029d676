"""The checkpoints of a run: its state after a round, in shards, and which of them stay.

Several processes write a shard each, and of clients of several ranks a shard for each rank. A run can go on from a
checkpoint in any number of processes.

Beside them at most one is kept for runs that go on: `within-000003-000120` is the state after 120 local steps of round
3. It goes when a newer checkpoint is there. Whoever asks what a run has come to between rounds does not see it.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import file_digest, sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_safetensors

from peertune.errors import RunError
from peertune.rounds.slices import rank
from peertune.rounds.under_way import dealt
from peertune.runs.directory import FORMAT, check_format, write_together
from peertune.types import ALONE, Group, State, Tensors

log = logging.getLogger(__name__)


def save(folder: Path, state: State, keep: int, clients: Sequence[int], group: Group = ALONE) -> None:
    """Write a checkpoint of the state of these clients, a shard, and remove all that are not among the `keep`.

    The newest two stay, and of the older ones those that `_thinned` leaves.
    """
    _write(folder / "checkpoints" / f"round-{state.round:06d}", state, clients, group)
    if group.rank > 0:
        return
    held = _checkpoints(folder)
    stay = _thinned([_place(checkpoint)[0] for checkpoint in held], keep)
    _remove([checkpoint for checkpoint in held if _place(checkpoint)[0] not in stay])
    _remove((folder / "checkpoints").glob("within-*"))
    _remove((folder / "checkpoints").glob(".*"))  # of a process that was killed


def save_within(folder: Path, state: State, clients: Sequence[int], group: Group = ALONE) -> None:
    """Write the state of these clients within a round, or before it, a shard, in the place of the one before."""
    place = folder / "checkpoints" / f"within-{state.round:06d}-{state.step:06d}"
    _write(place, state, clients, group)
    if group.rank == 0:
        _remove(other for other in place.parent.glob("within-*") if other != place)
        _remove(place.parent.glob(".*"))


def _write(place: Path, state: State, clients: Sequence[int], group: Group) -> None:
    def write(beside: Path, _: list[Any]) -> list[dict[str, Any]]:
        shards = []
        for rows, part in state.parts:
            data, cohort = _shard(part), rank(part.adapters, part.adapters)
            name = f"state-{group.rank:03d}{f'-{cohort}' if state.cohorts else ''}.safetensors"
            (beside / name).write_bytes(data)
            own = {"file": name, "clients": [clients[row] for row in rows.tolist()], "sha256": sha256(data).hexdigest()}
            shards.append(own | {"rank": cohort})
        return shards

    def describe(beside: Path, shards: list[Any]) -> None:
        if group.rank == 0:
            meta = {"format": FORMAT, "round": state.round, "step": state.step, "shards": [*chain(*shards)]}
            (beside / "meta.json").write_text(json.dumps(meta) + "\n")

    write_together(place, group, write, describe)


def _shard(state: State) -> bytes:
    parts = {"adapters": state.adapters, "moments": state.moments, "memory": state.memory, "within": state.within}
    parts |= {"clients": {"rounds": state.rounds}, "under_way": state.under_way}
    return as_safetensors(
        {f"{part}/{name}": x.detach().cpu().contiguous() for part, xs in parts.items() for name, x in xs.items()}
    )


def _remove(checkpoints: Iterable[Path]) -> None:
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint, ignore_errors=True)


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


def _place(checkpoint: Path) -> tuple[int, int]:
    """Return how many rounds are whole in a checkpoint, and how many local steps of the next are made."""
    _, rounds, *step = checkpoint.name.split("-")
    return int(rounds), int(*step)


def _checkpoints(folder: Path, *, within: bool = False) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    held = chain(*((folder / "checkpoints").glob(f"{name}-*") for name in ("round", "within")[: 1 + within]))
    return sorted(held, key=_place, reverse=True)


def load(
    folder: Path,
    like: State | None = None,
    clients: Sequence[int] | None = None,
    group: Group = ALONE,
    before: int | None = None,
    *,
    within: bool = False,
) -> State | None:
    """Return the state of these clients, or of all, in the newest whole checkpoint, or None where there is none yet.

    With `before`, in the newest of those that have fewer rounds behind them; None where these are damaged. It may be a
    state `within` a round only where that is asked for.
    It is on the CPU. A checkpoint that is damaged, or whose part that another process of the group reads is, is passed
    over with a warning. Raises RunError where all are damaged, or where the newest is of a later format or does not fit
    the state `like` that the run starts from.
    """
    held = _checkpoints(folder, within=within)
    held = [checkpoint for checkpoint in held if before is None or _place(checkpoint)[0] < before]
    (found, *_) = group.gather([str(checkpoint) for checkpoint in held])
    for checkpoint in map(Path, found):
        wrong, state = "", None
        try:
            state = _read(checkpoint, clients)
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


def _read(checkpoint: Path, clients: Sequence[int] | None) -> State:
    """Return the state of these clients, or of all, out of the shards that hold them."""
    meta = dict(json.loads((checkpoint / "meta.json").read_text()))
    check_format(checkpoint, meta)
    by_cohort: dict[int, list[Mapping[str, Any]]] = {}
    for shard in meta["shards"]:
        by_cohort.setdefault(int(shard.get("rank", 0)), []).append(shard)
    held = {cohort: {int(client) for shard in of for client in shard["clients"]} for cohort, of in by_cohort.items()}
    order = sorted(chain(*held.values())) if clients is None else [*clients]
    wanted = {cohort: [client for client in order if client in of] for cohort, of in held.items()}
    place = {client: row for row, client in enumerate(order)}
    return State.together(
        [
            (torch.tensor([place[client] for client in own]), _read_cohort(checkpoint, meta, by_cohort[cohort], own))
            for cohort, own in sorted(wanted.items())
            if own or len(wanted) == 1
        ]
    )


def _read_cohort(
    checkpoint: Path, meta: Mapping[str, Any], shards: Sequence[Mapping[str, Any]], clients: Sequence[int]
) -> State:
    """Return the state of these clients out of the shards that hold those of their rank."""
    held = [list(map(int, shard["clients"])) for shard in shards]
    places = {client: place for place, client in enumerate(clients)}
    parts: dict[str, Tensors] = {name: {} for name in ("adapters", "moments", "memory", "within", "clients")}
    under_way: list[Tensors] = []
    for shard, own in zip(shards, held, strict=True):
        wanted = [row for row, client in enumerate(own) if client in places]
        if not wanted:
            continue
        file = checkpoint / Path(shard["file"]).name
        with file.open("rb") as stream:
            if file_digest(stream, "sha256").hexdigest() != shard["sha256"]:
                raise ValueError(f"the contents of {file.name} are not what was written")
        rows = slice(wanted[0], wanted[-1] + 1)  # neighbours, as they were dealt
        to = torch.tensor([places[client] for client in own[rows]])
        under_way.append({})
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                part, _, rest = name.replace("signals/", "memory/").partition("/")
                if part == "under_way":  # no rows by client
                    under_way[-1][rest] = tensors.get_tensor(name)
                    continue
                x = tensors.get_slice(name)[rows]
                if rest not in parts[part]:  # of its own, aligned memory: kernels round by alignment
                    parts[part][rest] = x.new_empty((len(places), *x.shape[1:]))
                parts[part][rest][to] = x
    memory = parts["memory"]
    if int(meta.get("format", 0)) < 2 and "adaptive.reports" in memory:  # where NaN says what has not come
        memory["adaptive.known"] = ~memory["adaptive.reports"][..., 0].isnan()
        memory["adaptive.reports"].nan_to_num_(nan=0.0)
        del memory["adaptive.client"]
    rounds = parts["clients"].get("rounds", torch.full((len(places),), int(meta["round"])))
    step = int(meta.get("step", 0))
    ahead = dealt(under_way, places)
    return State(parts["adapters"], parts["moments"], rounds, memory, ahead, step, parts["within"])


def _fitted(checkpoint: Path, state: State, like: State) -> State:
    """Return the state with its tensors in the order of `like`, in which norms add up to the same bits."""
    if [rows.tolist() for rows, _ in state.parts] != [rows.tolist() for rows, _ in like.parts]:
        raise RunError(f"{checkpoint}: other clients have other ranks; resume with the run's own recipe")
    if state.cohorts:
        both = zip(state.cohorts, like.cohorts, strict=True)
        return State.together([(rows, _fitted(checkpoint, own, other)) for (rows, own), (_, other) in both])
    parts = [(state.adapters, like.adapters), (state.moments, like.moments), (state.memory, like.memory)]
    for have, want in parts:
        for name in sorted(have.keys() | want.keys()):
            shapes = [tuple(part[name].shape) if name in part else None for part in (have, want)]
            if shapes[0] != shapes[1]:
                raise RunError(
                    f"{checkpoint}: {name} is {shapes[0]} where the recipe makes {shapes[1]}; "
                    "resume with the run's own recipe"
                )
    adapters, moments, memory = ({name: have[name] for name in want} for have, want in parts)
    return replace(state, adapters=adapters, moments=moments, memory=memory)
