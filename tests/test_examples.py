"""The examples run as they are, with less to do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from federation import free_ports

from peertune.recipe import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.timeout(900)  # nine processes, each of which takes 8 s of a CPU to import what it needs
def test_eight_hospitals_one_of_which_is_killed(tmp_path: Path) -> None:
    folder, rounds = tmp_path / "play", 32
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [EXAMPLES / "eight-hospitals" / "play.sh", folder, "training.local_steps=1", "network.patience_s=5"],
        env=os.environ | {"PATH": path, "ROUNDS": str(rounds), "PORT": str(free_ports(8)[0])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    logs = "\n".join(f"{log.name}: {log.read_text()}" for log in sorted(folder.glob("*.log")))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    found = {file.parent.name: file.read_text() for file in folder.glob("runs/*/rounds.jsonl")}
    assert sorted(found) == [f"hospital-{k}" for k in range(1, 9)]
    records = {name: [json.loads(line) for line in text.splitlines()] for name, text in found.items()}
    for k, name in enumerate(sorted(found)):
        assert records[name][-1]["round"] == rounds - 1
        assert (folder / "runs" / name / "adapters" / f"client-{k:03d}" / "adapter_model.safetensors").is_file()

    killed = re.search(r"killed after (\d+) rounds", done.stdout)
    assert killed is not None
    lost = int(killed[1])
    after = [record for record in records["hospital-3"] if record["round"] >= lost]
    assert any(2 in edge for record in after for edge in record["edges"])  # it met others again
    failed = [edge for record in records["hospital-1"] for edge in record["failed_edges"]]
    assert [0, 2] in failed  # who went on without it

    assert (folder / "report.html").stat().st_size > 1e6
    scores = re.search(r"the adapters' scores, hospital 1 to 8:((?: [01]\.\d+){8})$", done.stdout, re.MULTILINE)
    assert scores is not None, done.stdout
    for key in (folder / "ca" / "key.pem", folder / "hospital-1" / "key.pem"):
        assert key.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda file: file.parent.name)
def test_a_recipe_is_short_and_opens_with_what_it_is_for(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# ")
    load_recipe(file)
