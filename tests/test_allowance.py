from peertune.allowance import Allowance


def test_each_member_is_allowed_so_much_a_minute_and_what_is_left_is_told() -> None:
    now = 0.0
    allowance = Allowance(3, lambda: now)
    assert [allowance.take(5) for _ in range(5)] == [3, 2, 1, 0, 0]
    assert allowance.take(6) == 3, "another member"
    now = 59.9
    assert allowance.take(5) == 0
    now = 60.0
    assert [allowance.take(5) for _ in range(4)] == [3, 2, 1, 0]
