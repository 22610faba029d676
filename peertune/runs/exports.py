"""Adapters out of a run, each a folder in PEFT's format."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load

from peertune.errors import RunError
from peertune.files import check_absent, written_folder
from peertune.rounds import best
from peertune.rounds.slices import average
from peertune.runs.directory import TAKEN, hostile, peer, ranks, write_together
from peertune.types import ALONE, Group, State, Tensors, among, by_client, kind

BEST = "best.json"
"""In the folder of a client's best adapter, of which evaluated round it is; -1 where it never was evaluated."""


@contextmanager
def written(
    run: Path, state: State, client: int | None, to: Path, *, last: bool = False, rank: int | None = None
) -> Iterator[tuple[Path, float]]:
    """Yield a folder with one client's adapter, or the average of all where `client` is None, in PEFT's format.

    The average is of those who aren't hostile. With a `rank` it is the adapter of that rank which is nearest; how far
    that is, as a share, is yielded, too. Where the state has each client's best, a client's is that, unless the `last`
    is asked for. The folder takes the place of `to` when all is done that is to be done with it, and vanishes
    otherwise. Raises RunError for a client that isn't there, a folder that is there already, and the `last` of a run
    that kept no others.
    """
    own = peer(run)
    clients: Sequence[int] = range(state.clients) if own is None else [int(own["client"])]
    who = f"the run has clients 0 to {clients[-1]}" if own is None else f"the run is of client {clients[0]} alone"
    if client is not None and client not in clients:
        raise RunError(f"client {client}: {who}")
    if client is None and own is not None:
        raise RunError(f"average: {who}; give --client {clients[0]}")
    check_absent(to)
    each, write = _each(state, last=last), _adapter_writer(run)
    with written_folder(to) as beside:
        if client is None:
            one: tuple[Tensors, int | None] = average(among(state.stacks, clients, hostile(run))[0]), None
        else:
            one = each[clients.index(client)]
        yield beside, write(beside, *one, rank)


def rounds_behind(folder: Path, state: State) -> int:
    """Return after how many rounds the adapter in a folder was what it is, which was written of this state."""
    file = folder / BEST
    evaluated = int(json.loads(file.read_text())["round"]) if file.exists() else -1
    return state.round if evaluated < 0 else evaluated + 1


def own_rank(run: Path, folder: Path, rank: int | None) -> dict[str, Any]:
    """Return rank and scale of an adapter that was written with another rank than the run's, or with a given one.

    They are in PEFT's words; {} where they are the run's.
    """
    if rank is None and not ranks(run):
        return {}
    config = json.loads((folder / "adapter_config.json").read_text())
    return {key: config[key] for key in ("r", "lora_alpha", "alpha_pattern")}


def write_all(run: Path, state: State, clients: Sequence[int], group: Group = ALONE) -> None:
    """Write `adapters/`: those of these clients, of whom the state is, and the average; of a peer its own.

    The average is of the last adapters of those who aren't hostile, also where each client's best was kept.
    """
    write, each = _adapter_writer(run), _each(state)
    honest, _ = among(state.stacks, clients, hostile(run))
    mean = {} if peer(run) else average(honest, group, sorted({*ranks(run).get("clients", ())}))

    def write_own(beside: Path, _: list[Any]) -> None:
        for client, own in zip(clients, each, strict=True):
            write(beside / f"client-{client:03d}", *own)
        if mean and group.rank == 0:
            write(beside / "average", mean, None)

    write_together(run / "adapters", group, write_own)


class _Write(Protocol):
    """Writes an adapter into a folder, and of which evaluated round it is, where it is a best one.

    With a rank it is cut to that, and what is lost is returned.
    """

    def __call__(self, folder: Path, adapter: Tensors, round: int | None, rank: int | None = None) -> float: ...


def _each(state: State, *, last: bool = False) -> list[tuple[Tensors, int | None]]:
    """Return each client's adapter, and of which evaluated round it is, where it is a best one."""
    adapters, rounds = best.kept(state, last=last)
    singles = [{name: x[0] for name, x in single.items()} for single in by_client(adapters)]
    of: list[int | None] = [*rounds] or [None] * len(singles)
    return list(zip(singles, of, strict=True))


def _adapter_writer(run: Path) -> _Write:
    """Return what writes an adapter into a folder, with all that the adapters of a run share."""
    from peertune.adapters.peft_format import LoraConfig, at_rank, save_adapter
    from peertune.adapters.truncation import truncated

    try:
        lora = LoraConfig.from_pretrained(str(run / "adapter"))
        head = load((run / "adapter" / "head.safetensors").read_bytes())
        labels = (run / "adapter" / "labels.json").read_bytes()
        file = run / "adapter" / TAKEN
        taken = load(file.read_bytes()) if file.exists() else {}
    except (OSError, ValueError, SafetensorError):
        raise RunError(f"{run}/adapter: is missing or damaged; give the folder of a run") from None

    scaling = ranks(run).get("scaling")

    def write(folder: Path, adapter: Tensors, round: int | None, rank: int | None = None) -> float:
        config, lost = lora, 0.0
        if scaling is not None:
            (own,) = {len(x) for name, x in adapter.items() if kind(name) == "A"}
            config = at_rank(lora, own, own_scaling=scaling == "own")
        if rank is not None:
            if taken or lora.rank_pattern:
                raise RunError(
                    "--rank: is not of pissa, olora or rank_pattern, whose layers keep their ranks; leave it out"
                )
            adapter, lost = truncated(adapter, rank)
            config = at_rank(config, rank, own_scaling=False)
        save_adapter(folder, adapter, head=head, lora=config, taken=taken)
        (folder / "labels.json").write_bytes(labels)
        if round is not None:
            (folder / BEST).write_text(json.dumps({"round": round}) + "\n")
        return lost

    return write
