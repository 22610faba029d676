"""Processes on this machine for the runs of a sweep."""

import subprocess
import sys
from pathlib import Path

from sweeping import SMALL

from peertune.sweeps import launch


def test_the_last_words_of_a_process_are_none_of_its_progress() -> None:
    progress = b"peertune: 2026-01-02 03:04:05 INFO round 3 of 80, loss 0.5\n"
    assert launch.last_words(progress, "ended with exit code -9") == "ended with exit code -9"
    assert launch.last_words(b"peertune: no room\n" + progress, "") == "no room"
    assert launch.last_words(b"peertune: seed=0: no room\npeertune: seed=1: no rows\n", "", "seed=0") == "no room"
    assert launch.last_words(b"peertune: no base\n", "", "seed=0") == "no base"


def test_runs_import_nothing_from_the_folder_that_one_is_in(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('not this one')")
    command = Path(sys.executable).with_name("peertune")
    words = ["sweep", "digits-demo", *SMALL, "rounds=1", "lora.r=999", "--out", "all"]
    done = subprocess.run([command, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "lora.r: 999 is above the size of" in done.stderr
