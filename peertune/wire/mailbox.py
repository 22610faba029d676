"""What neighbours have pushed and this peer has not mixed yet: of each the newest message, and nothing of it twice."""

from collections.abc import Callable
from typing import NamedTuple

from peertune.rounds.posts import Post
from peertune.types import Tensors
from peertune.wire.codec import Layout


class Letter(NamedTuple):
    """A message that came."""

    post: Post
    began: float  # when its training began, on this machine's monotonic clock
    tensors: Tensors  # [1, …], as they were sent


class Mailbox:
    """One message for each neighbour at most, so what is held is bounded by how many these are.

    `like` is what a message must be. `may_send(client, version)` says whether the recipe's graph has this edge. It is
    used under the lock of the node.
    """

    def __init__(self, like: Layout, may_send: Callable[[int, int], bool]) -> None:
        self.like, self.may_send = like, may_send
        self._last: dict[int, tuple[int, int]] = {}  # sender → start and version of the newest that came
        self._held: dict[int, Letter] = {}

    def is_new(self, client: int, start: int, version: int) -> bool:
        """Whether a message is newer than all that came from this client."""
        return (start, version) > self._last.get(client, (-1, -1))

    def put(self, letter: Letter) -> None:
        """Take a message in, in the place of an older one; one that is not new changes nothing."""
        post = letter.post
        if self.is_new(post.client, post.start, post.version):
            self._last[post.client] = post.start, post.version
            self._held[post.client] = letter

    def open(self) -> list[Letter]:
        """Return what has come since the last time, by client, and forget it."""
        held, self._held = self._held, {}
        return [letter for _, letter in sorted(held.items())]
