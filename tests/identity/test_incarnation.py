"""Which start of a peer speaks: started again, copied and started twice, or put back from a copy."""

import shutil
from pathlib import Path

import pytest

from peertune.errors import IdentityError, RunError
from peertune.identity.incarnation import Incarnation, clone, next_incarnation


def test_each_start_has_a_higher_number_whatever_the_clock_says(tmp_path: Path) -> None:
    starts = [next_incarnation(tmp_path, now) for now in (1000.9, 1000.9, 5000.0, 10.0)]
    assert [start.number for start in starts] == [1000, 1001, 5000, 5001]
    assert len({start.nonce for start in starts}) == 4
    assert int((tmp_path / "incarnation").read_text()) == 5001
    assert next_incarnation(tmp_path).number > 1_700_000_000, "seconds since the epoch"


def test_a_copy_of_a_disk_that_is_started_too_is_told_by_its_nonce_or_by_its_number(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    next_incarnation(one, 1000.0)
    shutil.copytree(one, other)
    first, copy = (next_incarnation(folder, 1000.0) for folder in (one, other))
    assert first.number == copy.number == 1001
    assert clone(first, copy) == "two processes with its key, of one start (number 1001)"
    later = next_incarnation(other, 1007.0)
    assert clone(first, later) == "", "the higher replaces the lower"
    said = "two processes with its key: one of start 1001 speaks after one of start 1007"
    assert clone(later, first) == said


def test_an_older_copy_that_is_put_back_and_a_folder_that_is_made_anew_go_on_above_what_was_heard(
    tmp_path: Path,
) -> None:
    folder, copy = tmp_path / "peer", tmp_path / "copy"
    folder.mkdir()
    next_incarnation(folder, 1000.0)
    shutil.copytree(folder, copy)
    heard = [next_incarnation(folder, 1000.0) for _ in range(3)][-1]
    assert clone(heard, next_incarnation(copy, 1060.0)) == ""
    (tmp_path / "anew").mkdir()
    assert clone(heard, next_incarnation(tmp_path / "anew", 1060.0)) == ""


def test_who_says_nothing_of_its_start_is_taken_as_before() -> None:
    assert clone(Incarnation(), Incarnation()) == clone(Incarnation(1000, 7), Incarnation()) == ""
    assert clone(Incarnation(), Incarnation(1000, 7)) == clone(Incarnation(1000, 7), Incarnation(1000, 7)) == ""


def test_a_number_that_cant_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "incarnation").write_text("x")
    with pytest.raises(IdentityError, match=r"incarnation: holds no number; remove it, if no other process runs"):
        next_incarnation(tmp_path)
    with pytest.raises(RunError, match=r"incarnation: can't be written"):
        next_incarnation(tmp_path / "none")
