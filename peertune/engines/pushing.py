"""One client as a process of its own that waits for nobody: it trains, pushes, mixes what has come, and trains on."""

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal

from peertune.engines.company import Company, neighbours, steps_told
from peertune.method import standing
from peertune.rounds import metrics
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.posts import Post, Taken, mixed
from peertune.rounds.record import RoundRecord
from peertune.rounds.round import run_round
from peertune.runs.mixlog import MixLog
from peertune.topology import delay_s
from peertune.topology.pushes import To, one_sends_to
from peertune.types import Stack, only
from peertune.wire.codec import layout
from peertune.wire.mailbox import Letter, Mailbox
from peertune.wire.swap import Swapper


def run_pushing_peer(
    job: Job,
    swapper: Swapper,
    kept: MixLog,
    when_alone: Literal["train", "wait"] = "train",
    when_refused: Literal["stop", "train"] = "stop",
) -> Iterator[RoundRecord]:
    """Make the trainings that are left of a peer's job, and yield a record after each.

    A message is pushed to those with whom the graph has an edge in the training's number, by threads that go on while
    the next training does; what can't be delivered before the next message to the same neighbour counts as a failed
    edge there. To those who have said that they are done nothing is sent. What is mixed is noted in `kept` before the
    adapters change. Where training diverges the run ends with DivergedError: there is no falling back, as `run_peer`
    has it.
    """
    company, course = Company(job, swapper, when_alone, when_refused), _Course(job, swapper, kept)
    kept.begin(swapper.start_number, job.state.round)
    if sent := job.sent(job.algorithm.phase(job.state.round).send):
        swapper.receive(Mailbox(layout(sent), course.may_send))
    swapper.enter(job.state.round)  # from here on it answers
    job = replace(job, steps=steps_told(job, swapper), lines=swapper.lines)
    state = job.state.clone()
    while state.round < job.rounds and company.is_there():
        (phase,) = job.algorithm.schedule.phases(state.known, standing(job.clients, state.rounds, job.local_steps))
        swapper.enter(state.round, phase)
        state, record = run_round(job, state, job.clients, state.round, course.exchange)
        yield replace(record, state=state)
        if record.edges:
            company.met()
        elif company.shut_out():
            return
    if state.round == job.rounds:
        swapper.say_done(neighbours(job))


class _Course:
    """What a peer has ended, sent and mixed since it was started."""

    def __init__(self, job: Job, swapper: Swapper, kept: MixLog) -> None:
        (self.me,) = job.clients
        self.job, self.swapper, self.kept = job, swapper, kept
        self.ended: list[float] = []  # when each training ended, on the monotonic clock
        self.sends_to = lru_cache(maxsize=256)(partial(one_sends_to, job.graph, job.faults))

    def may_send(self, client: int, version: int) -> bool:
        """Return whether the graph has an edge from this client in its training of this number."""
        if version >= self.job.rounds:
            return False
        of = client if self.job.graph.directed else self.me  # where edges go both ways, by the draws of its own
        return (self.me if self.job.graph.directed else client) in self.sends_to(of, version).receivers

    def exchange(self, sent: Sequence[Stack], t: int, refuse: Refuse) -> Heard:
        """Push what was trained, and take what has come."""
        payload = only(sent)
        job, me = self.job, self.me
        if (delay := delay_s(job.faults, me, t)) > 0:
            self.swapper.pause(delay)
        now = time.monotonic()
        planned = self.sends_to(me, t) if payload else To([], [])
        over = [client for client in planned.receivers if self.swapper.over(client)]
        to, lost = ([client for client in clients if client not in over] for clients in planned)
        own = Post(me, self.swapper.start_number, t, len(to))
        late = self.swapper.push(t, len(to), payload, [client for client in to if client not in lost])
        letters = self.swapper.letters()
        came = [(Taken(letter.post, self._staleness(letter, now)), letter.tensors) for letter in letters]
        heard, taken = mixed(job, me, own, sent, came, len(came), refuse)
        self.kept.add(t, len(to), len(came), [one for one in came if one[0] in taken])
        self.ended.append(now)
        missed, vacant = (
            {metrics.as_edge(me, client, job.graph.directed) for client in clients}
            for clients in ((*lost, *late), over)
        )
        return heard._replace(failed=sorted({*heard.failed, *missed}), vacant=sorted(vacant))

    def _staleness(self, letter: Letter, now: float) -> int:
        """Return how many trainings this peer has ended since the sender began; of earlier starts nothing is known."""
        return max(0, bisect_left(self.ended, now) - bisect_right(self.ended, letter.began))
