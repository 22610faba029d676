"""Processes on this machine for the runs of a sweep."""

from peertune.sweeps import launch


def test_the_last_words_of_a_process_are_none_of_its_progress() -> None:
    progress = b"peertune: 2026-01-02 03:04:05 INFO round 3 of 80, loss 0.5\n"
    assert launch.last_words(progress, "ended with exit code -9") == "ended with exit code -9"
    assert launch.last_words(b"peertune: no room\n" + progress, "") == "no room"
    assert launch.last_words(b"peertune: seed=0: no room\npeertune: seed=1: no rows\n", "", "seed=0") == "no room"
    assert launch.last_words(b"peertune: no base\n", "", "seed=0") == "no base"
