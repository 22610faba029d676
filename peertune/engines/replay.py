"""What peers that waited for nobody did, once more in one process, in any order that their logs allow.

A training follows from what its client held, and mixing from that and from the messages that the log names. So nothing
depends on time: trainings are made as soon as their clients' states are known, many in one pass.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice

from peertune.errors import RunError
from peertune.method import standing
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.posts import Post, mixed
from peertune.rounds.round import Begun, end, turn_of
from peertune.rounds.turns import Came, train
from peertune.runs.mixlog import Line, Start
from peertune.types import Stack, State, Tensors


def replay(
    job: Job,
    logs: Mapping[int, Sequence[Start]],
    asked: Mapping[int, int],
    outside: Callable[[Post], Tensors] | None = None,
) -> Iterator[tuple[int, Mapping[int, State]]]:
    """Make again what the logs of the job's clients say; yield after each pass how many trainings are made, and states.

    A start goes on from what the newest before it had in its round. `asked` has a round of each client: what its last
    start held before that training, `[1]`, is its state once it is reached. `outside` returns messages of others,
    `[1, …]`.

    Raises:
        RunError: the logs contradict each other, or name a message that is nowhere.
    """
    course = _Course(job, logs, asked, outside)
    while course.go_on():
        yield course.trainings, course.states
    course.check()
    yield course.trainings, course.states


class _Branch:
    """One start of a client's process, and how far it is made again."""

    def __init__(self, client: int, place: int, start: Start) -> None:
        self.client, self.place, self.start, self.round = client, place, start, start.round
        self.state: State | None = None  # [1], what it holds before the training; None where that isn't known, or over
        self.trained: tuple[State, Came] | None = None  # what its training came to, until it is mixed

    @property
    def line(self) -> Line | None:
        """What it mixed after the training that it is in; None after the last line."""
        past = self.round - self.start.round
        return self.start.lines[past] if past < len(self.start.lines) else None

    @property
    def post(self) -> Post:
        """What it sends after the training that it is in, as `_which` has it."""
        return Post(self.client, self.start.number, self.round, 0)


class _Course:
    """The branches of all clients, and the messages that are still to be mixed."""

    def __init__(
        self,
        job: Job,
        logs: Mapping[int, Sequence[Start]],
        asked: Mapping[int, int],
        outside: Callable[[Post], Tensors] | None,
    ) -> None:
        self.job, self.asked, self.outside = job, asked, outside
        self.trainings, self.states = 0, dict[int, State]()
        self.branches = {
            client: [_Branch(client, place, start) for place, start in enumerate(logs[client])]
            for client in job.clients
        }
        lines = chain.from_iterable(start.lines for start in chain.from_iterable(logs.values()))
        self.wanted = Counter(_which(taken.post) for line in lines for taken in line.taken)
        self.posts: dict[Post, Tensors] = {}
        for row, (client, branches) in enumerate(self.branches.items()):
            if branches and branches[0].start.round == 0:
                self._begin(branches[0], job.state.take(slice(row, row + 1)).clone())
            elif not branches and asked.get(client) == 0:
                self.states[client] = job.state.take(slice(row, row + 1)).clone()

    def go_on(self) -> bool:
        """Make what can be made now; return whether that was something."""
        training = list(chain.from_iterable(islice(filter(self._can_train, of), 1) for of in self.branches.values()))
        if training:
            self._train(training)
        mixing = list(filter(self._can_mix, chain.from_iterable(self.branches.values())))
        for branch in mixing:
            self._mix(branch)
        return bool(training or mixing)

    def check(self) -> None:
        """Raise RunError where not all that the logs say could be made."""
        for branch in chain.from_iterable(self.branches.values()):
            if (line := branch.line) is None:
                continue
            where = f"client {branch.client}, start {branch.start.number}, round {branch.round}"
            if branch.trained is None:
                raise RunError(
                    f"{where}: no start before it comes to where this one goes on; give whole run directories"
                )
            post = next(post for post, _ in line.taken if not self._is_there(post))
            what = f"it mixed round {post.version} of client {post.client}, start {post.start}"
            if post.client not in self.branches:
                raise RunError(f"{where}: {what}, whose run isn't here; give the run directories of all")
            raise RunError(f"{where}: {what}, whose log can't have sent it by then; give both as they were left")
        for client, at in self.asked.items():
            if client not in self.states:
                raise RunError(f"client {client}: its log does not come to round {at}, as its checkpoint does")

    def _begin(self, branch: _Branch, state: State) -> None:
        """Note what a branch holds before its next training, and begin the starts that go on from there."""
        branch.state, branches = state, self.branches[branch.client]
        if branch.place == len(branches) - 1 and self.asked.get(branch.client) == branch.round:
            self.states[branch.client] = state.clone()
        for later in branches[branch.place + 1 :]:
            reach = (one.start for one in reversed(branches[: later.place]))
            origin = next((start for start in reach if start.round <= later.start.round <= start.end), None)
            if origin is branch.start and later.start.round == branch.round:
                self._begin(later, state.clone())

    def _can_train(self, branch: _Branch) -> bool:
        return branch.state is not None and (branch.line is not None or branch.post in self.wanted)

    def _train(self, branches: Sequence[_Branch]) -> None:
        """Do the next local steps of these, one of a client, in one pass, and have what they send."""
        clients = [branch.client for branch in branches]
        turn = turn_of(self.job, State.of([branch.state for branch in branches if branch.state is not None]), clients)
        (came,) = train([turn])
        if isinstance(came, Exception):
            raise came
        for row, branch in enumerate(branches):
            own = slice(row, row + 1)
            state = turn.state.take(own).clone()
            branch.state, branch.trained = None, (state, Came(came.loss[own], came.grad_norm[own]))
            if branch.post in self.wanted:
                at = standing([branch.client], state.rounds, self.job.local_steps)
                payload, _ = self.job.algorithm.message.send(state.adapters, state.known, at, turn.phases[row])
                self.posts[branch.post] = {name: x.clone() for name, x in payload.items()}
        self.trainings += len(branches)

    def _can_mix(self, branch: _Branch) -> bool:
        line = branch.line
        return branch.trained is not None and line is not None and all(self._is_there(post) for post, _ in line.taken)

    def _is_there(self, post: Post) -> bool:
        """Whether a message can be had, which is fetched where it is another's."""
        which = _which(post)
        if which not in self.posts and post.client not in self.branches and self.outside is not None:
            self.posts[which] = self.outside(post)
        return which in self.posts

    def _mix(self, branch: _Branch) -> None:
        """Mix what a branch's log says that it mixed, and go on to its next training."""
        assert branch.trained is not None
        state, came = branch.trained
        turn = turn_of(self.job, state, [branch.client])
        begun = Begun.of(turn, [branch.client], branch.round, turn.phases[0])
        state, _ = end(self.job, begun, [came], partial(self._exchange, branch), common=False)
        branch.trained, branch.round = None, branch.round + 1
        self._begin(branch, state)

    def _exchange(self, branch: _Branch, payload: Sequence[Stack], t: int, refuse: Refuse) -> Heard:
        """Return what a branch heard, and forget what nobody is to mix any more."""
        assert branch.line is not None
        degree, heard, taken = branch.line
        came = [(one, self.posts[_which(one.post)]) for one in taken]
        for which in (_which(one.post) for one in taken):
            self.wanted[which] -= 1
            if not self.wanted[which]:
                del self.wanted[which], self.posts[which]
        own = Post(branch.client, branch.start.number, t, degree)
        return mixed(self.job, branch.client, own, payload, came, heard, lambda *_: [])[0]


def _which(post: Post) -> Post:
    """Return a message by what tells it from others; its degree is for its receivers."""
    return post._replace(degree=0)
