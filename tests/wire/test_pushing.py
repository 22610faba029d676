"""Messages that nobody waits for: what is taken of them, and how they are delivered."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import parties
import pytest
from federation import Federation, found
from processes import wait_until
from swapping import call, hello, outcomes, payload, peers, same
from wires import called, peer, whole

from peertune.rounds.posts import Post
from peertune.wire.codec import CHUNK_BYTES, encode, layout
from peertune.wire.mailbox import Letter, Mailbox
from peertune.wire.peer_pb2 import Chunk, Hello, Verdict
from peertune.wire.peer_pb2 import Post as Said
from peertune.wire.swap import Swapper

LIKE = layout(payload(0))
POST = Chunk(post=Said(degree=3, age_ms=1500))


def taking(swapper: Swapper) -> Mailbox:
    """Have a peer take what is pushed in even versions below 100."""
    box = Mailbox(LIKE, lambda client, version: version % 2 == 0 and version < 100)
    swapper.receive(box)
    swapper.enter(0)
    return box


def letter(client: int, start: int, version: int) -> Letter:
    return Letter(Post(client, start, version, 1), 0.0, {})


def test_a_mailbox_has_the_newest_message_of_each_and_none_twice() -> None:
    box = Mailbox(LIKE, lambda client, version: True)
    for one in [(2, 1, 4), (1, 1, 0), (2, 1, 6), (2, 1, 5), (1, 1, 0), (3, 2, 0), (3, 1, 9)]:
        box.put(letter(*one))
    assert [one.post[:3] for one in box.open()] == [(1, 1, 0), (2, 1, 6), (3, 2, 0)]
    box.put(letter(2, 1, 6))
    assert box.open() == []
    box.put(letter(2, 2, 0))  # it was started again
    assert [one.post[:3] for one in box.open()] == [(2, 2, 0)]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return found(tmp_path_factory.mktemp("three"), 3)


# ---- the end that takes


def pushed(swapper: Swapper, version: int, *parts: Chunk) -> Verdict:
    *_, last = called(swapper, 2, hello(version, Hello.PUSH), *parts)
    return last.verdict


def test_what_is_pushed_is_taken_once(federation: parties.Federation) -> None:
    swapper = peer(federation)
    box = taking(swapper)
    assert pushed(swapper, 4, POST, *whole(2)).outcome == Verdict.COUNTED
    assert pushed(swapper, 4).outcome == Verdict.COUNTED, "it is told at once, whatever it would send"
    assert pushed(swapper, 2).outcome == Verdict.COUNTED, "what is older, too"
    (came,) = box.open()
    assert came.post == Post(2, 0, 4, 3)
    assert same(came.tensors, payload(2))
    assert pushed(swapper, 4).outcome == Verdict.COUNTED
    assert box.open() == []
    assert swapper.neighbours[2].bytes_received == len(encode(payload(2)))


@pytest.mark.parametrize(
    ("version", "parts", "why"),
    [
        (5, [POST, *whole(2)], "pushes version 5, in which there is no edge"),
        (100, [POST, *whole(2)], "pushes version 100, in which there is no edge"),
        (4, whole(2), "sends its parts in another order than post, total, data"),
        (4, [POST, POST, *whole(2)], "sends its parts in another order than post, total, data"),
        (4, [POST, *whole(2)[:2]], "hangs up before the end of its payload"),
        (4, [POST, Chunk(total=2**60)], f"payload: {2**60} bytes are announced"),
        (4, [POST, whole(2)[0], Chunk(data=b"x" * CHUNK_BYTES)], "payload: a chunk has"),
        (4, [POST, whole(2)[0], hello(4)], "sends its parts in another order than post, total, data"),
    ],
)
def test_what_can_not_be_mixed_is_refused(
    federation: parties.Federation, version: int, parts: list[Chunk], why: str
) -> None:
    swapper = peer(federation)
    box = taking(swapper)
    said = pushed(swapper, version, *parts)
    assert (said.outcome, said.reason[: len(why)]) == (Verdict.REFUSED, why)
    assert box.open() == []


def test_a_peer_that_goes_by_rounds_takes_nothing(federation: parties.Federation) -> None:
    swapper = peer(federation)
    swapper.enter(0)
    assert pushed(swapper, 4, POST, *whole(2)).outcome == Verdict.REFUSED


def test_whatever_a_member_pushes_only_what_is_whole_gets_in(federation: parties.Federation) -> None:
    swapper, draw = peer(federation), random.Random(0)
    box, good, total = taking(swapper), 0, len(encode(payload(2)))
    sound = [POST, *whole(2)]
    for version in range(0, 98, 2):
        kinds = [
            POST,
            Chunk(),
            Chunk(total=draw.choice([0, total, 2**63])),
            Chunk(data=draw.randbytes(draw.choice([1, 99, total]))),
        ]
        kinds += [Chunk(verdict=Verdict(outcome=Verdict.HAVE)), Chunk(roster=draw.randbytes(40)), *sound]
        parts = sound if version % 10 == 0 else [draw.choice(kinds) for _ in range(draw.randrange(7))]
        is_sound = parts[:4] == sound
        outcome = pushed(swapper, version, *parts).outcome
        assert outcome == (Verdict.COUNTED if is_sound else Verdict.REFUSED), parts
        good += is_sound
        assert all(same(one.tensors, payload(2)) for one in box.open())
    assert 10 <= good < 49
    assert swapper.answering._serving[2] == 0


# ---- the end that delivers


def test_what_is_pushed_to_one_that_is_away_is_delivered_later_and_only_the_newest(three: Federation) -> None:
    with peers(three, [0]) as first:
        assert first[0].push(0, 1, payload(0, 0), [1]) == []
        wait_until(lambda: bool(first[0].known(1).problem))
        assert first[0].push(2, 1, payload(0, 2), [1]) == [1], "the last one has not reached it"
        with peers(three, [1]) as second:
            box = taking(second[1])
            wait_until(lambda: first[0].known(1).up == 1)
            (came,) = box.open()
            assert (came.post, same(came.tensors, payload(0, 2))) == (Post(0, 0, 2, 1), True)
            assert first[0].push(4, 1, payload(0, 4), [1]) == []
            first[0].stop()  # lingers until it is delivered
            (came,) = box.open()
            assert came.post.version == 4
            assert (first[0].known(1).up, first[0].known(1).down) == (2, 1)


def test_to_one_that_has_said_that_it_is_done_nothing_is_delivered_any_more(three: Federation) -> None:
    with peers(three, [0]) as first:
        with peers(three, [1]) as second:
            taking(first[0])
            taking(second[1])
            second[1].say_done([0, 2])
            assert [first[0].over(client) for client in (1, 2)] == [True, False]
        first[0].push(0, 1, payload(0), [1])  # as one would that was called before it was told
        wait_until(lambda: bool(first[0].known(1).problem))
        assert first[0].push(2, 1, payload(0, 2), [1]) == []
        with peers(three, [1]) as second:
            second[1].enter(0)
            assert second[1].ask_rounds([0]) == {0: 0}
            assert not first[0].over(1), "it has been started again"


def test_what_is_refused_is_not_sent_again(three: Federation) -> None:
    with peers(three, [0, 1]) as there:
        box = taking(there[1])
        there[0].push(3, 1, payload(0), [1])  # in which there is no edge
        wait_until(lambda: "no edge" in there[0].known(1).problem)
        assert there[0].push(4, 1, payload(0), [1]) == []
        wait_until(lambda: there[0].known(1).up == 1)
        assert [one.post.version for one in box.open()] == [4]


def test_many_calls_at_once_leave_one_message(three: Federation) -> None:
    with peers(three, [0]) as there, ThreadPoolExecutor(3) as pool:
        box, ready = taking(there[0]), threading.Barrier(3)

        def push(version: int) -> list[int]:
            ready.wait()
            return outcomes(call(three, 1, 0, iter([hello(version, Hello.PUSH), POST, *whole(1)])))

        assert list(pool.map(push, [4, 6, 6])) == [[Verdict.COUNTED]] * 3
        assert [one.post.version for one in box.open()] == [6]
