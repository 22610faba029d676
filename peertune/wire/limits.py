"""What keeps strangers, who need no certificate to open a connection, from using up this process's files."""

import logging
import resource

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0  # after which a connection that has not shaken hands is closed
STRANGERS = 64  # connections that there is room for beside those of members
FILES = 65_536  # as many as are asked for where the hard limit has no end


def raise_open_files() -> None:
    """Raise the limit of open files to the hardest that this process may have; it goes on where that can't be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, FILES) if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        log.warning("the limit of open files stays at %d (%s)", soft, error)


def of_connections(seats: int) -> list[tuple[str, int]]:
    """Return gRPC's settings for a server of so many members: how many connections, and how long a handshake.

    There is room for two of each member, which may be dialling anew, and for STRANGERS; never for more than half of the
    files that may be open. What comes beyond that is closed at once.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2 * seats + STRANGERS if soft == resource.RLIM_INFINITY else min(2 * seats + STRANGERS, soft // 2)
    return [
        ("grpc.max_allowed_incoming_connections", most),
        ("grpc.server_handshake_timeout_ms", int(1000 * HANDSHAKE_S)),
    ]
