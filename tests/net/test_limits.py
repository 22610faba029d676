import resource
from collections.abc import Iterator

import pytest

from peertune.net import limits


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
