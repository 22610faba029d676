import json
import subprocess as starter
import sys
from pathlib import Path

import processes
import sides
from processes import start

from peertune import simulate


def test_a_test_is_thorough_by_what_its_module_has_and_by_a_browser() -> None:
    assert sides.is_thorough({"subprocess": starter}, [])
    assert sides.is_thorough({"begin": start}, [])
    assert sides.is_thorough({"processes": processes}, [])
    assert sides.is_thorough({}, ["tmp_path", "browser"])
    assert sides.is_thorough({"run": simulate}, [])
    assert not sides.is_thorough({"json": json, "Path": Path, "seconds": 1.0}, ["tmp_path"])


def test_what_a_test_starts_is_seen() -> None:
    before = len(sides.started)
    starter.run([sys.executable, "-c", ""], check=True)
    assert sides.started[before:] == [sys.executable]
