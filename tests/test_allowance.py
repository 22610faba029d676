import logging

import pytest

from peertune.allowance import LINE, LINES, Allowance, Lines, one_line


def test_each_member_is_allowed_so_much_a_minute_and_what_is_left_is_told() -> None:
    now = 0.0
    allowance = Allowance(3, lambda: now)
    assert [allowance.take(5) for _ in range(5)] == [3, 2, 1, 0, 0]
    assert allowance.take(6) == 3, "another member"
    now = 59.9
    assert allowance.take(5) == 0
    now = 60.0
    assert [allowance.take(5) for _ in range(4)] == [3, 2, 1, 0]


def test_what_others_say_becomes_a_short_printable_line() -> None:
    assert one_line("a\nb\x1b[2Jc") == "a b [2Jc"
    assert (one_line("x" * 300), one_line("abc", 2)) == ("x" * 200, "ab")


def test_a_client_causes_a_few_lines_of_a_certain_length_and_none_where_nobody_reads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = Lines()
    with caplog.at_level(logging.ERROR):
        for _ in range(LINES):
            lines.say(1, "nobody reads this")
    for number in range(LINES + 3):
        lines.say(1, f"{number} {'x' * 1000}")
    assert [text.partition(": ")[2][0] for text in caplog.messages] == list("012345")
    assert {len(text) for text in caplog.messages} == {LINE}
    more = [text.endswith("; more of it is left out for a minute") for text in caplog.messages]
    assert more == [False] * (LINES - 1) + [True]
    lines.say(2, "another\nclient")
    assert caplog.messages[-1] == "client 2: another client"
