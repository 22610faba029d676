"""A graph from a file beside the recipe: runs, sweeps and peers as real processes, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from federation import found
from processes import finish, finish_well, forks, start, wait_until
from ranks import assert_same_adapters

from peertune.runs import records
from peertune.sweeps.launch import Command

Call = Callable[..., tuple[int, str, str]]
MINE = """
import numpy as np
from peertune import Graph


def hub(clients: int, hubs: int = 1) -> Graph:
    edges = np.array([[i, j] for i in range(hubs) for j in range(i + 1, clients)])
    return Graph(clients, lambda t: edges, 1, 1.0, 0, name="hub")
"""
SMALL = [
    "rounds=2",
    "partition={name: iid}",
    "algorithm={name: dec_lora}",
    "graph={name: 'mine:hub'}",
    "training={local_steps: 1, per_device_train_batch_size: 2}",
    "evaluate={every: 2, rows: 4}",
    "lora.r=2",
    "model.dtype=float64",
]
ALLOWED = ["--plugin", "mine"]
REFUSED = "graph.name: 'mine:hub' is code from outside, which no recipe runs by itself; if you trust it, add --plugin "


def test_a_graph_from_a_file_runs_in_sweeps_workers_and_again_and_is_not_needed_to_read_what_it_left(
    tmp_path: Path, peertune: Call
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    recipe = ["digits-demo", "clients=3", *SMALL]
    settings = [*recipe, "graph.hubs=2", "--out", "grid"]
    code, _, err = finish(start(tmp_path, "sweep", *settings))
    assert (code, err) == (2, f"peertune: {REFUSED}mine\n")
    code, out, err = finish(start(tmp_path, "sweep", *settings, "--jobs", "2", *ALLOWED))
    assert (code, out) == (0, "1 of 1 runs are finished in grid\n"), err
    (run,) = (tmp_path / "grid").iterdir()
    assert [record["edges"] for record in records.read(run)] == [[[0, 1], [0, 2], [1, 2]]] * 2
    assert json.loads((run / "facts.json").read_text())["plugins"]["graph"]["function"] == "mine:hub"
    with forks() as made:
        workers = ["--workers", "2", "--out", "two", *ALLOWED]
        code, _, err = finish(made.start(tmp_path, "run", *recipe, "graph.hubs=2", *workers))
    assert code == 0, err
    assert_same_adapters(tmp_path / "two", run)

    with (tmp_path / "mine.py").open("a") as file:
        file.write("# another\n")
    code, _, err = finish(start(tmp_path, "run", "--resume", str(run)))
    assert (code, err) == (2, f"peertune: {REFUSED}mine\n")
    code, _, err = finish(start(tmp_path, "run", "--resume", str(run), *ALLOWED))
    assert code == 0
    assert f"{run}: the code of graph is another than the run began with: " in err

    (tmp_path / "mine.py").unlink()
    assert "hub, p = 1.0" in (peertune("report", run) and (run / "report.html").read_text())
    for words in (["compare", "grid"], ["diagnose", run], ["export", run, "--client", "0", "--to", "adapter"]):
        code, _, err = peertune(*words)
        assert (code, err) == (0, "")


def test_peers_with_one_code_meet_and_one_with_other_code_under_its_name_is_told(tmp_path: Path) -> None:
    two = found(tmp_path, 2)

    def words(client: int, command: str, *more: str) -> list[str]:
        who = ["--roster", str(two.roster), "--dir", str(two.peer(client)), "--recipe", "digits-demo"]
        return ["peer", command, *who, *ALLOWED, *more, "clients=2", *SMALL]

    for client in range(2):
        (two.peer(client) / "mine.py").write_text(MINE + "# another\n" * client)
    first = start(two.peer(0), *words(0, "start", "--out", "run"))
    try:
        status = two.peer(0) / "run" / "status.json"
        wait_until(lambda: status.exists() and json.loads(status.read_text())["doing"] == "waiting", first)
        code, out, _ = finish(start(two.peer(1), *words(1, "doctor", "--json")))
        (check,) = [
            check for check in json.loads(out)["checks"] if (check["member"], check["what"]) == ("peer-0", "run")
        ]
        assert (code, check["level"]) == (1, "failed")
        assert check["finding"].startswith('differs in plugins: {"graph": {"digest": "'), check
        (two.peer(1) / "mine.py").write_text(MINE)
        finish_well([first, start(two.peer(1), *words(1, "start", "--out", "run"))])
    finally:
        first.kill()
    for client in range(2):
        assert [record["edges"] for record in records.read(two.peer(client) / "run")] == [[[0, 1]]] * 2


@pytest.mark.parametrize(
    "words",
    [
        ["run", "digits-demo"],
        ["run", "digits-demo", "--dry-run"],
        ["graph", "digits-demo"],
        ["sweep", "digits-demo", "--out", "x"],
    ],
)
def test_a_recipe_alone_runs_no_code(peertune: Call, words: list[str]) -> None:
    Path("mine.py").write_text("open('imported', 'w')")
    code, _, err = peertune(*words, "clients=3", *SMALL)
    assert (code, err) == (2, f"peertune: {REFUSED}mine\n")
    assert not Path("imported").exists()


def test_data_read_by_code_from_outside_are_refused_too(peertune: Call) -> None:
    code, _, err = peertune("data", "digits-demo", "task={name: 'mine:rows'}")
    assert (code, err) == (2, f"peertune: task.name{REFUSED[10:]}mine\n".replace("hub", "rows"))
    code, _, err = peertune("graph", "digits-demo", "--plugin", "./mine.py")
    assert (code, "'./mine.py' is no module's name" in err) == (2, True)


def test_a_run_of_a_sweep_is_allowed_what_the_sweep_is_whenever_it_starts(tmp_path: Path) -> None:
    command = Command(("recipe.yaml", "seed=0"), tmp_path / "run", ("--plugin", "mine"))
    begun = command.now()
    (tmp_path / "run").mkdir()
    for words, last in ((begun, ["recipe.yaml", "seed=0", "--out"]), (command.now(), ["--resume"])):
        assert words == ["run", "--plugin", "mine", *last, str(tmp_path / "run")]
