import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from run_directories import no_room

from peertune import cache

SOME = {"tokens.input_ids": np.arange(1000, dtype=np.int32), "lengths": np.array([400, 600])}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kept" / "here"))
    return tmp_path / "kept" / "here"


def same(found: cache.Arrays | None) -> bool:
    assert found is not None
    return found.keys() == SOME.keys() and all(
        np.array_equal(found[name], x) and found[name].dtype == x.dtype for name, x in SOME.items()
    )


def test_what_is_kept_is_read_back_and_its_owners_alone(kept: Path) -> None:
    assert cache.read("a") is None
    cache.write("a", SOME)
    assert same(cache.read("a"))
    assert cache.read("b") is None
    assert [oct(path.stat().st_mode)[-3:] for path in (kept, kept / "a.safetensors")] == ["700", "600"]


@pytest.mark.parametrize("harm", [lambda data: data[:-1], lambda data: data[:-1] + b"\xff", lambda data: b"", bytes])
def test_what_is_damaged_is_told_and_not_read(
    harm: "type[bytes]", kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write("a", SOME)
    file = kept / "a.safetensors"
    data = harm(file.read_bytes())
    file.write_bytes(data if harm is not bytes else data[:32] + data[40:])
    assert cache.read("a") is None
    assert [record.getMessage() for record in caplog.records] == [f"{file}: is damaged, and made anew"]


def test_what_was_used_least_recently_goes_first(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("first", SOME)
    size = (kept / "first.safetensors").stat().st_size
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * size)
    for age, name in ((50, "second"), (40, "third")):
        cache.write(name, SOME)
        os.utime(kept / f"{name}.safetensors", (time.time() - age, time.time() - age))
    assert same(cache.read("second"))
    cache.write("fourth", SOME)
    assert [entry.file.stem for entry in cache.entries()] == ["fourth", "second", "first"]
    monkeypatch.setattr(cache, "MAX_BYTES", size - 1)
    cache.write("fifth", SOME)
    assert cache.read("fifth") is None


def test_many_may_keep_and_read_the_same_at_once(kept: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(partial(cache.write, "a"), [SOME] * 8))
            assert all(map(same, pool.map(cache.read, ["a"] * 8)))
    assert [path.name for path in kept.iterdir()] == ["a.safetensors"]


def test_a_folder_that_others_may_write_to_is_not_used(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write("a", SOME)
    kept.chmod(0o770)
    assert cache.read("a") is None
    cache.write("b", SOME)
    assert [path.name for path in kept.iterdir()] == ["a.safetensors"]
    assert {record.getMessage() for record in caplog.records} == {
        f"{kept}: others may write there, so it is not used; give it to you alone, with chmod 700"
    }


def test_what_cannot_be_kept_is_told_and_harms_nothing(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    with no_room(100):
        cache.write("a", SOME)
    assert "nothing is kept there (" in caplog.text
    assert cache.read("a") is None
    kept.rmdir()
    kept.write_text("a file")
    cache.write("a", SOME)
    assert cache.entries() == []


def test_nothing_is_kept_where_the_folder_is_named_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peertune: Call
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "")
    cache.write("a", SOME)
    assert (cache.read("a"), cache.entries(), cache.clear()) == (None, [], [])
    assert peertune("cache") == (0, "nothing is kept: PEERTUNE_CACHE is empty\n", "")
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "peertune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "peertune"


def test_the_command_shows_and_clears_what_is_kept_and_no_other_file(kept: Path, peertune: Call) -> None:
    cache.write("a", SOME)
    (kept / "notes.txt").write_text("mine")
    (kept / ".a.safetensors-1-2").write_text("of a process that was killed")
    code, out, _ = peertune("cache")
    assert (code, out.splitlines()[0]) == (0, f"{kept}: of 1,074 MB at most 0.0 MB in 1 entries")
    assert out.splitlines()[1].startswith("  a.safetensors  0.0 MB, used 2")
    assert '"name": "a.safetensors"' in peertune("cache", "show", "--json")[1]
    assert peertune("cache", "clear") == (0, f"{kept}: cleared of 0.0 MB in 1 entries\n", "")
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]
