"""Planned faults: which edges fail, who is down and who is slow."""

import numpy as np

from peertune.topology import GRAPHS, Fault, clients_down, delay_s, planned_weights


def test_a_planned_edge_fails_whichever_end_comes_first() -> None:
    graph = GRAPHS["complete"](clients=4)
    (one, failed), (other, same) = (planned_weights(graph, [Fault(1, 2, edge=edge)], 2) for edge in ((1, 3), (3, 1)))
    assert failed == same == [(1, 3)]
    assert one[1, 3] == other[1, 3] == 0
    np.testing.assert_array_equal(one.toarray(), other.toarray())
    assert [planned_weights(graph, [Fault(1, 2, edge=(3, 1))], t)[1] for t in (0, 1, 2, 3)] == [
        [],
        [(1, 3)],
        [(1, 3)],
        [],
    ]


def test_a_plan_says_who_is_down_and_who_is_slow_in_which_round() -> None:
    faults = [Fault(1, 2, down=3), Fault(2, 3, slow=1, delay_s=0.5), Fault(2, 2, slow=1, delay_s=0.25)]
    faults.append(Fault(1, 1, edge=(0, 1)))
    assert [clients_down(faults, t) for t in range(4)] == [set(), {3}, {3}, set()]
    one_end = [planned_weights(GRAPHS["ring"](clients=5), faults, t)[1] for t in range(4)]
    assert one_end == [[], [(0, 1), (2, 3), (3, 4)], [(2, 3), (3, 4)], []]
    assert [delay_s(faults, 1, t) for t in range(5)] == [0, 0, 0.75, 0.5, 0]
    assert [delay_s(faults, client, 2) for client in (0, 2, 3)] == [0, 0, 0]
