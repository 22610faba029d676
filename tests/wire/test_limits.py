import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation import found

from peertune.identity.membership import Membership
from peertune.wire import limits


@pytest.fixture
def files() -> Iterator[int]:
    """The hard limit of open files; afterwards the limits are as before."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_of_open_files_is_raised_to_the_hard_one(files: int) -> None:
    for soft in (files // 2, files):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, files))
        limits.raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (files, files)


def test_connections_are_two_for_each_member_and_a_few_and_take_half_of_the_files_at_most(files: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, files))
    most = [dict(limits.of_connections(seats))["grpc.max_allowed_incoming_connections"] for seats in (2, 100, 5_000)]
    assert most == [68, 264, 512]


def test_a_roster_that_no_file_is_left_to_read_is_read_later(
    tmp_path: Path, files: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("peertune.identity.membership.LOOK_EVERY_S", 1e-9)  # at every look
    made = found(tmp_path, 2)
    membership = Membership(made.peer(0), made.roster)
    made.issue()
    os.close(number := os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, files))  # none can be opened
    serials = [membership.current()[1].serial for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    assert serials == [1, 1, 1]
    (said,) = caplog.messages
    assert said.startswith(f"{made.roster}: can't be read (Too many open files); ")
    assert membership.current()[1].serial == 2
