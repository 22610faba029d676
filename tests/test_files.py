from pathlib import Path

import pytest
from run_directories import no_room

from peertune.errors import RunError
from peertune.files import write_file


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_file(file, b"before")
    with no_room(100), pytest.raises(RunError, match=r"report\.html: can't be written \(File too large\)"):
        write_file(file, b"x" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert file.read_bytes() == b"before"
