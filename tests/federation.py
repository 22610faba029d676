"""A federation on this machine: a CA, folders of peers, a roster, and the peers as real processes."""

import json
import os
import socket
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import parties
from processes import AT_MOST_S, forking
from safetensors.torch import load_file, save_file
from torch import Tensor

from peertune.assembly.registry import build_graph, graph_settings
from peertune.files import write_file
from peertune.recipe import load_recipe

_PORTS = range(16_000, 32_000)  # below those that systems give to callers, who could take one before it is listened at
_places = (place % len(_PORTS) for place in count(os.getpid() * 97))


def free_ports(number: int) -> list[int]:
    """Return ports on end that nobody listens at: each call goes on after the last, and each process elsewhere."""
    while True:
        ports = [_PORTS[next(_places)] for _ in range(number)]
        with ExitStack() as held:
            try:
                for port in ports:
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        if ports[-1] == ports[0] + number - 1:
            return ports


@dataclass(frozen=True)
class Federation:
    """Where its parts are; peer k is client k, in `folder/peer-k`."""

    parties: parties.Federation
    ports: list[int]

    @property
    def folder(self) -> Path:
        return self.parties.folder

    @property
    def roster(self) -> Path:
        return self.folder / "roster.yaml"

    def peer(self, client: int) -> Path:
        return self.folder / f"peer-{client}"

    def address(self, client: int) -> str:
        return f"127.0.0.1:{self.ports[client]}"

    def own(self, client: int, name: str) -> Path:
        """Where a peer's own roster for a run of that name is."""
        return self.peer(client) / f"{name}.roster.yaml"

    def issue_own(self, name: str, overrides: Sequence[str]) -> None:
        """Issue to each peer its own roster for a run: `digits-demo` with these overrides."""
        recipe = load_recipe("digits-demo", overrides)
        rosters = self.parties.own_rosters(build_graph(recipe), graph_settings(recipe))
        for client in range(len(self.ports)):
            write_file(self.own(client, name), rosters[f"peer-{client}"].raw)

    def issue(self) -> bytes:
        """Issue a roster, and put it where the peers look."""
        data = self.parties.roster().raw
        write_file(self.roster, data)
        return data


def found(
    folder: Path,
    peers: int,
    silent: Sequence[int] = (),
    through: Mapping[int, int] | None = None,
    now: datetime | None = None,
    hosts: Sequence[str] = (),
) -> Federation:
    """Make a federation of so many peers, at the time `now`.

    The `silent` ones have no address and can only dial out; others are reached `through` another port than their own,
    and at the `hosts` where they are given.
    """
    made = Federation(parties.Federation(folder, name="trial", now=now), free_ports(peers))
    for client in range(peers):
        port = (through or {}).get(client, made.ports[client])
        host = hosts[client] if hosts else "127.0.0.1"
        made.parties.join(f"peer-{client}", None if client in silent else f"{host}:{port}", now=now)
    made.issue()
    return made


@dataclass(frozen=True)
class Played:
    """What became of one peer's run."""

    adapters: dict[str, Tensor]  # [1, …]
    records: list[dict[str, Any]]
    known: dict[int, dict[str, Any]]  # what it knows of its neighbours at the end


def see_through(processes: Sequence[Any], errors: Path) -> None:
    """Start processes and see them end well; where one does not, fail with what was written to `errors`."""
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(AT_MOST_S)
            assert process.exitcode == 0, errors.read_text() if errors.exists() else process
    finally:
        for process in processes:
            process.kill()


@dataclass(frozen=True)
class Lie:
    """A peer that sends a number in the place of each value of A."""

    client: int
    value: float

    def told(self, payload: Mapping[str, Tensor], place: int = 0) -> dict[str, Tensor]:
        """Return the payload `[K, …]` with the lie in the place of the client's own."""
        found = {name: x.clone() if name.endswith(".A") else x for name, x in payload.items()}
        for name, x in found.items():
            if name.endswith(".A"):
                x[place] = self.value
        return found


def play(
    made: Federation,
    recipes: Mapping[str, Sequence[str]],
    lies: Mapping[str, Lie] | None = None,
    **options: Any,
) -> dict[str, list[Played]]:
    """Run each recipe with one process for each peer, all at once, one recipe after the other; return what came of it.

    A recipe is overrides of `digits-demo`, in which one peer may lie. Who was issued an own roster for it uses that.
    The processes are forked from one that has imported what they need.
    """
    forks = forking()
    out = made.folder / "played"
    peers = range(len(made.ports))
    together = forks.Barrier(len(peers), timeout=AT_MOST_S)  # no peer may meet another that runs another recipe
    processes = [
        forks.Process(target=_play, args=(made, client, recipes, lies or {}, out, together, options))
        for client in peers
    ]
    see_through(processes, out / "errors")
    return {name: [_read(out / name / f"{client}") for client in peers] for name in recipes}


def _play(
    made: Federation,
    client: int,
    recipes: Mapping[str, Sequence[str]],
    lies: Mapping[str, Lie],
    out: Path,
    together: Any,
    options: Mapping[str, Any],
) -> None:
    import torch

    from peertune.assembly.build import agreed, build
    from peertune.engines.peer import run_peer
    from peertune.engines.pushing import run_pushing_peer
    from peertune.identity.membership import Membership
    from peertune.runs.mixlog import MixLog
    from peertune.wire.swap import Swapper

    torch.set_num_threads(1)
    try:
        for name, overrides in recipes.items():
            own = made.own(client, name)
            membership = Membership(made.peer(client), own if own.exists() else made.roster)
            told = membership.current()[1].own
            run = build(load_recipe("digits-demo", overrides), [client], known=None if told is None else told.known)
            swapper = Swapper(
                membership,
                agreed(run),
                patience_s=run.resolved.network.patience_s,
                faults=run.job.faults,
                **options,
            )
            if (lie := lies.get(name)) is not None and lie.client == client:
                _have_it_lie(swapper, lie)
            swapper.start(made.address(client))
            records, state = [], run.job.state
            pushes = run.job.pushing is not None
            (out / name / f"{client}").mkdir(parents=True, exist_ok=True)
            kept = MixLog(out / name / f"{client}")
            for record in run_pushing_peer(run.job, swapper, kept) if pushes else run_peer(run.job, swapper):
                assert record.state is not None
                state = record.state
                records.append({k: v for k, v in asdict(replace(record, state=None)).items() if k != "state"})
            swapper.stop()
            together.wait()
            (out / name).mkdir(parents=True, exist_ok=True)
            known = {other: asdict(value) for other, value in swapper.neighbours.items()}
            (out / name / f"{client}.json").write_text(json.dumps({"records": records, "known": known}))
            save_file({k: x.contiguous() for k, x in state.adapters.items()}, out / name / f"{client}.safetensors")
    except BaseException:
        together.abort()
        out.mkdir(exist_ok=True)
        with (out / "errors").open("a") as file:
            file.write(f"peer {client}\n{traceback.format_exc()}\n")
        raise


def _have_it_lie(swapper: Any, lie: Lie) -> None:
    honest = swapper.swap
    swapper.swap = lambda t, payload, *others: honest(t, lie.told(payload), *others)


def _read(file: Path) -> Played:
    found = json.loads(file.with_suffix(".json").read_text())
    known = {int(client): value for client, value in found["known"].items()}
    return Played(load_file(file.with_suffix(".safetensors")), found["records"], known)
