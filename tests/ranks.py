"""The processes of a cluster on this machine, as torchrun starts them: real ones, each with a base of its own."""

import json
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from federation import free_ports, see_through
from processes import forking
from safetensors.torch import load_file, save_file
from torch import Tensor

from peertune.rounds.job import Job
from peertune.types import by_client


@dataclass(frozen=True)
class Together:
    """What became of a run."""

    adapters: list[dict[str, Tensor]]  # of each client, [1, …]
    records: list[list[dict[str, Any]]]  # of each process


def together(out: Path, ranks: int, recipes: Mapping[str, Sequence[str]]) -> dict[str, Together]:
    """Run each recipe, overrides of `digits-demo`, in so many processes, one recipe after the other."""
    forks, (port,) = forking(), free_ports(1)
    out.mkdir()
    processes = [forks.Process(target=_run, args=(out, rank, ranks, port, recipes)) for rank in range(ranks)]
    see_through(processes, out / "errors")
    return {name: _read(out / name, ranks) for name in recipes}


def _run(out: Path, rank: int, ranks: int, port: int, recipes: Mapping[str, Sequence[str]]) -> None:
    from peertune.assembly.build import build
    from peertune.engines.distributed import joined, run_cluster, share
    from peertune.recipe import load_recipe

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    try:
        with joined() as group:
            for name, overrides in recipes.items():
                recipe = load_recipe("digits-demo", overrides)
                job = build(recipe, share(recipe.clients, group), group=group).job
                job = spoilt(job, SPOILT[name]) if name in SPOILT else job
                records, state = [], job.state
                for record in run_cluster(job):
                    assert record.state is not None
                    state = record.state
                    records.append({k: v for k, v in asdict(replace(record, state=None)).items() if k != "state"})
                (out / name).mkdir(exist_ok=True)
                (out / name / f"{rank}.json").write_text(json.dumps(records))
                own = zip(job.clients, by_client(state.stacks), strict=True)
                kept = {f"{client}/{k}": x.contiguous() for client, each in own for k, x in each.items()}
                save_file(kept, out / name / f"{rank}.safetensors")
    except BaseException:
        with (out / "errors").open("a") as file:
            file.write(f"rank {rank}\n{traceback.format_exc()}\n")
        raise


SPOILT = {"far": 30.0, "apart": 3.0, "far pushed": 30.0, "far met": 30.0}
"""Recipes of which the last client starts with this in the place of each value of A."""


def spoilt(job: Job, value: float) -> Job:
    """Return the job with what the last client starts with spoilt."""
    state = job.state.clone()
    for name, x in state.adapters.items():
        if name.endswith(".A") and job.graph.clients - 1 in job.clients:
            x[-1] = value
    return replace(job, state=state)


def assert_same_adapters(ours: Path, theirs: Path) -> None:
    """Hold the adapters of two run directories against each other, in float64."""
    folders = sorted(folder.name for folder in (theirs / "adapters").iterdir())
    assert sorted(folder.name for folder in (ours / "adapters").iterdir()) == folders
    for folder in folders:
        expected = load_file(theirs / "adapters" / folder / "adapter_model.safetensors")
        for name, x in load_file(ours / "adapters" / folder / "adapter_model.safetensors").items():
            torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-12)


def _read(folder: Path, ranks: int) -> Together:
    adapters: dict[int, dict[str, Tensor]] = {}
    for rank in range(ranks):
        for key, x in load_file(folder / f"{rank}.safetensors").items():
            client, _, name = key.partition("/")
            adapters.setdefault(int(client), {})[name] = x
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return Together([adapters[client] for client in sorted(adapters)], told)
