from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from playing import at_step
from torch import Tensor

from peertune.errors import RecipeError
from peertune.method import Memory, Phase, standing
from peertune.methods.adaptive import PROBES, REPORTERS, _spread, _trains_a, adaptive, drawn_reporters
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.schedules import switching_interval
from peertune.randomness import Draw, generator, uniforms
from peertune.topology import GRAPHS, Graph, rho, weights_at
from peertune.types import Tensors

WINDOW = 40
BOTH = Phase(frozenset("AB"), frozenset("AB"))


class Agreement:
    """What clients tell each other, and what they agree on, without training."""

    def __init__(self, window: int, first: int, clients: int, seed: int) -> None:
        self.schedule, self.message, self.mixer = adaptive(window, first, clients, seed)

    def init(self, clients: Sequence[int], round: int) -> Memory:
        return self.schedule.init({}, standing(clients, torch.full((len(clients),), round)))

    def phases(self, memory: Memory, round: int) -> list[Phase]:
        return self.schedule.phases(memory, at_step(len(memory["adaptive.fallback"]), round))

    def told(self, memory: Memory) -> Tensors:
        return self.message.send({}, memory, at_step(1), BOTH)[0]

    def step(
        self, own: Memory, heard: Tensors, weights: Tensor, round: int, clients: Sequence[int] | None = None
    ) -> Memory:
        rounds = torch.full((len(own["adaptive.fallback"]),), round)
        at = standing(range(len(rounds)) if clients is None else clients, rounds)
        used, memory = self.mixer.weigh({}, heard, weights, own, at, BOTH)
        assert used is weights
        assert memory.keys() == own.keys()
        return memory


class Seen(NamedTuple):
    """What a round looked like."""

    round: int
    trained: list[str]  # what each client trains, A or B
    memory: Memory  # before the round


def weights(graph: Graph) -> Callable[[int], Tensor]:
    return lambda t: torch.from_numpy(weights_at(graph, t).toarray())


def rounds(
    weights: Callable[[int], Tensor], clients: int, count: int, seed: int = 0, window: int = WINDOW
) -> Iterator[Seen]:
    """Play the agreement alone: no training, only what clients tell each other."""
    agreement = Agreement(window, 5, clients, seed)
    memory = agreement.init(range(clients), 0)
    for t in range(count):
        phases = agreement.phases(memory, t)
        yield Seen(t, ["A" if "A" in phase.train else "B" for phase in phases], memory)
        memory = agreement.step(memory, memory, weights(t), t)


def intervals(trained: list[str]) -> list[int]:
    """Return the lengths of the phases that are whole."""
    ends = [t for t in range(1, len(trained)) if trained[t] != trained[t - 1]]
    return [end - start for start, end in pairwise(ends)]


def random_graph(number: int) -> Graph:
    """One of many graphs, dense and sparse, static and drawn anew each round, of 4 to 24 clients."""
    rng = generator(number, "graphs of the test")
    clients = int(rng.integers(4, 25))
    match number % 5:
        case 0:
            return GRAPHS["complete"](clients=clients, seed=number, activation=float(rng.uniform(0.15, 1)))
        case 1:
            return GRAPHS["erdos_renyi"](clients=clients, seed=number, probability=float(rng.uniform(0.4, 0.9)))
        case 2:
            degree = 4 if clients > 4 else 3
            return GRAPHS["random_regular"](clients=clients, seed=number, degree=degree, activation=0.7)
        case 3:
            return GRAPHS["matching"](clients=clients, seed=number, probability=float(rng.uniform(0.3, 1)))
        case _:
            return GRAPHS["bipartite"](clients=clients, seed=number, activation=float(rng.uniform(0.4, 1)))


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(15))  # three of each kind
def test_all_clients_switch_in_the_same_round_on_a_random_graph(number: int) -> None:
    graph = random_graph(number)
    for seen in rounds(weights(graph), graph.clients, 4 * WINDOW, seed=number):
        assert len(set(seen.trained)) == 1, seen.round


@pytest.mark.thorough
def test_all_clients_agree_on_the_interval_where_edges_go_one_way() -> None:
    graph = GRAPHS["epidemic"](clients=10, fan_out=2, activation=0.3, seed=1)
    played = list(rounds(weights(graph), 10, 4 * WINDOW, seed=1))
    assert all(len(set(seen.trained)) == 1 for seen in played)
    found = np.mean(intervals([seen.trained[0] for seen in played[WINDOW:]]))
    assert found == pytest.approx(switching_interval(rho(graph, 500)), abs=1)


@pytest.mark.thorough
@pytest.mark.parametrize(("before", "after"), [(0.6, 0.12), (0.12, 0.6)])
def test_a_graph_whose_density_changes_half_way_changes_the_interval_for_all_at_once(
    before: float, after: float
) -> None:
    early, late = (GRAPHS["complete"](clients=10, seed=3, activation=p) for p in (before, after))
    half, window = 4 * 60, 60
    played = list(
        rounds(lambda t: weights(early if t < half else late)(t), clients=10, count=2 * half, seed=3, window=window)
    )
    assert all(len(set(seen.trained)) == 1 for seen in played)
    trained = [seen.trained[0] for seen in played]
    settled = [
        np.mean(intervals(trained[start : start + 2 * window])) for start in (half - 2 * window, half + 2 * window)
    ]
    assert settled == [pytest.approx(switching_interval(rho(graph)), abs=1.5) for graph in (early, late)]
    assert (settled[0] < settled[1]) == (before > after)


@pytest.mark.thorough
@pytest.mark.parametrize("joins", [7, 40, 59])
def test_clients_that_join_late_switch_with_the_others_from_their_first_exchange_on(joins: int) -> None:
    graph = GRAPHS["complete"](clients=10, seed=joins, activation=0.3)
    late = [8, 9]
    agreement = Agreement(WINDOW, 5, 10, joins)
    memory = agreement.init(range(10), 0)
    reached: set[int] = set()
    for t in range(5 * WINDOW):
        if t == joins:  # a process that starts now knows the recipe and the round, and nothing else
            fresh = agreement.init(late, t)
            memory = {name: torch.cat([x[:8], fresh[name]]) for name, x in memory.items()}
        matrix = weights(graph)(t)
        if t < joins:  # nobody there: its edges are dropped at both ends
            for client in late:
                for other in range(10):
                    if other != client:
                        matrix[other, other] += matrix[other, client]
                        matrix[client, client] += matrix[client, other]
                        matrix[other, client] = matrix[client, other] = 0
        trained = ["A" if "A" in phase.train else "B" for phase in agreement.phases(memory, t)]
        together = [*range(8), *sorted(reached)]
        assert len({trained[client] for client in together}) == 1, t
        memory = agreement.step(memory, memory, matrix, t)
        if t >= joins:
            knowing = {*range(8), *reached}
            reached |= {client for client in late if any(matrix[client, other] > 0 for other in knowing)}
    assert reached == set(late)


def test_a_client_that_was_cut_off_is_back_in_phase_after_the_exchange_that_reaches_it() -> None:
    graph = GRAPHS["complete"](clients=6, seed=1)
    alone = torch.block_diag(torch.ones(1, 1), torch.full((5, 5), 0.2)).double()
    out, back = WINDOW // 2 - 3, WINDOW + 12  # away while the others report, and for a while after
    trained = [
        seen.trained
        for seen in rounds(
            lambda t: alone if out <= t < back else weights(graph)(t), clients=6, count=2 * WINDOW, seed=1
        )
    ]
    assert all(len(set(now[1:])) == 1 for now in trained)
    assert any(len(set(now)) == 2 for now in trained[WINDOW : back + 1]), "the client was never out of phase"
    assert all(len(set(now)) == 1 for now in trained[back + 1 :])


@pytest.mark.thorough
@pytest.mark.parametrize("activation", [0.05, 0.2, 1.0])
def test_the_interval_comes_near_to_that_of_the_graphs_rho(activation: float) -> None:
    graph = GRAPHS["complete"](clients=10, seed=5, activation=activation)
    window = 120
    trained = [seen.trained[0] for seen in rounds(weights(graph), 10, 6 * window, seed=5, window=window)]
    found = float(np.mean(intervals(trained[window:])))
    assert found == pytest.approx(switching_interval(rho(graph)), rel=0.35, abs=1)


def test_b_and_a_train_equally_long_in_each_window() -> None:
    graph = GRAPHS["complete"](clients=8, seed=2, activation=0.4)
    trained = [seen.trained[0] for seen in rounds(weights(graph), 8, 5 * 36, seed=2, window=36)]
    for start in range(0, len(trained), 36):
        window = trained[start : start + 36]
        assert window[0] == "B"
        assert abs(window.count("A") - window.count("B")) <= 2


def test_one_neighbourhood_at_a_time_gives_what_all_clients_together_give() -> None:
    graph = GRAPHS["complete"](clients=9, seed=4, activation=0.3)
    agreement = Agreement(12, 5, 9, 4)
    together = agreement.init(range(9), 0)
    apart = [agreement.init([client], 0) for client in range(9)]
    for t in range(30):
        matrix = weights(graph)(t)
        heard = {name: torch.cat([memory[name] for memory in apart]) for name in together}
        for client in range(9):
            near = matrix[client].nonzero()[:, 0]
            own = {name: x[client : client + 1] for name, x in heard.items()}
            apart[client] = agreement.step(
                own, {name: x[near] for name, x in heard.items()}, matrix[client : client + 1, near], t, [client]
            )
        together = agreement.step(together, together, matrix, t)
        for name, x in together.items():
            torch.testing.assert_close(torch.cat([memory[name] for memory in apart]), x)
        assert agreement.phases(together, t + 1) == [agreement.phases(memory, t + 1)[0] for memory in apart]


def test_sparse_weights_give_what_dense_ones_give() -> None:
    graph = GRAPHS["complete"](clients=9, seed=4, activation=0.3)
    dense, sparse = (
        list(rounds(form, 9, 30, window=12))[-1].memory
        for form in (weights(graph), lambda t: weights(graph)(t).to_sparse())
    )
    for name, x in dense.items():
        torch.testing.assert_close(sparse[name], x)


def test_a_window_probes_then_reports_then_agrees() -> None:
    agreement, W = Agreement(4, 5, 3, 0), torch.eye(3).double() / 2 + 1 / 6
    memory = [agreement.init(range(3), 0)]
    for t in range(4):
        memory.append(agreement.step(memory[t], memory[t], W, t))
    probes, reports = ([each[f"adaptive.{name}"] for each in memory] for name in ("probe", "reports"))
    known = [each["adaptive.known"] for each in memory]
    assert all(not x[~told].any() for x, told in zip(reports, known, strict=True)), "nothing stands for what is unknown"
    for client in range(3):
        drawn = uniforms(0, Draw.PROBE, 0, client, np.arange(PROBES))  # the same wherever it is computed
        assert probes[0][client].tolist() == np.where(drawn < 0.5, 1, -1).tolist()
    torch.testing.assert_close(probes[2], W @ W @ probes[0])
    assert torch.equal(probes[3], probes[2])
    assert torch.equal(probes[4], agreement.init(range(3), 4)["adaptive.probe"]), "signs of the next window"
    assert not torch.equal(probes[4], probes[0])
    assert not known[1].any()
    assert torch.equal(known[2][:, 1], torch.eye(3) == 1), "each knows its own"
    assert known[3][:, 1].all()
    assert not known[3][:, 0].any()
    assert torch.equal(reports[4][:, 0], probes[2].expand(3, 3, PROBES))
    assert not known[4][:, 1].any()


@pytest.mark.parametrize(
    ("groups", "share", "phases"),
    [
        ([5], 0.5, [8]),  # 1 - share squared is rho: phases of 3 rounds
        ([5], 0.1, [4]),  # 7
        ([5], 0.05, [2]),  # 10
        ([5], 1e-9, [2]),  # that never end
        ([3, 3], 0.05, [2, 2]),  # half of all have reported
        ([2, 4], 0.05, [4, 2]),  # fewer: as before
        ([2, 1], 0.05, [2, 4]),  # one alone disagrees with nobody
    ],
)
def test_a_window_has_as_many_phases_as_the_last_ones_reports_call_for(
    groups: list[int], share: float, phases: list[int]
) -> None:
    W = torch.block_diag(*((1 - share) * torch.eye(n).double() + share / n for n in groups))
    agreement = Agreement(24, 5, len(W), 0)
    memory = agreement.init(range(len(W)), 0)
    assert memory["adaptive.fallback"].tolist() == [4] * len(W)
    for t in range(24):
        memory = agreement.step(memory, memory, W, t)
    expected = [count for n, count in zip(groups, phases, strict=True) for _ in range(n)]
    assert memory["adaptive.fallback"].tolist() == expected
    trained = [["A" in phase.train for phase in agreement.phases(memory, t)] for t in range(24, 48)]
    assert [1 + sum(a != b for a, b in pairwise(own)) for own in zip(*trained, strict=True)] == expected


def test_b_and_a_share_each_cycle_and_take_the_longer_half_in_turn() -> None:
    def window(cycles: int, rounds: int) -> str:
        return "".join("BA"[_trains_a(place, cycles, rounds)] for place in range(rounds))

    assert window(1, 10) == "BBBBBAAAAA"
    assert window(2, 10) == "BBBAABBAAA"
    assert window(3, 9) == "BBABAABBA"
    assert window(2, 7) == "BBAABAA"
    assert window(4, 8) == "BABABABA"


def test_disagreement_is_that_of_the_known_rows() -> None:
    values = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = torch.tensor([[True] * 5, [True, False, True, True, False], [False] * 5])
    values[~known] = torch.nan
    expected = [float(sum((x - own.mean(0)).square().sum() for x in own)) for own in (values[0], values[1][known[1]])]
    assert _spread(values, known).tolist() == pytest.approx([*expected, 0.0])


def test_what_no_mean_of_signs_can_be_is_not_sound() -> None:
    agreement = Agreement(WINDOW, 5, 6, 0)
    memory = agreement.init(range(6), 0)
    sound = agreement.message.sound
    assert sound is not None
    assert sound(memory).all()
    probe, reports = memory["adaptive.probe"], memory["adaptive.reports"]
    probe[1, 3], probe[2, 0], probe[3, 0] = torch.nan, -1.00001, 1 + 1e-7
    reports[4, 1, 2, 5], reports[5, 0, 0, 0] = 1.00001, -1
    assert sound(memory).tolist() == [True, False, False, True, False, True]


def test_what_travels_does_not_grow_with_the_number_of_clients() -> None:
    made = [Agreement(WINDOW, 5, clients, 0) for clients in (1_000, 100_000)]
    few, many = (agreement.told(agreement.init([3], 0)) for agreement in made)
    assert {name: x.shape for name, x in few.items()} == {name: x.shape for name, x in many.items()}
    assert sum(x.nbytes for x in many.values()) == 8 * (2 * REPORTERS * PROBES + PROBES) + 2 * REPORTERS


def test_those_who_report_are_drawn_alike_from_any_number_of_clients() -> None:
    assert drawn_reporters(REPORTERS - 1, 0, 0).tolist() == list(range(REPORTERS - 1))
    windows = 2_000
    counts = np.zeros(100)
    for window in range(windows):
        drawn = drawn_reporters(100, 7, window)
        assert len(drawn) == REPORTERS
        assert (np.diff(drawn) > 0).all()
        counts[drawn] += 1
    expected = windows * REPORTERS / 100
    spread = np.sqrt(expected * (1 - REPORTERS / 100))
    assert np.abs(counts - expected).max() < 4.5 * spread
    assert 0.5 < counts.std() / spread < 1.5
    assert len(drawn_reporters(10**15, 0, 0)) == REPORTERS  # where no list of them could be made


def test_clients_that_never_meet_keep_the_first_interval() -> None:
    trained = [seen.trained for seen in rounds(lambda t: torch.eye(5).double(), 5, 3 * WINDOW)]
    assert all(len(set(now)) == 1 for now in trained)
    assert set(intervals([now[0] for now in trained])) == {5}


def test_a_window_must_have_room_to_measure_and_to_tell() -> None:
    with pytest.raises(RecipeError, match="window_rounds: 3 rounds are too few, give at least 4"):
        ALGORITHMS["tad_lora"](switch_every="adaptive", window_rounds=3)
    assert ALGORITHMS["tad_lora"](switch_every="adaptive", window_rounds=4).settings["window_rounds"] == 4


@pytest.mark.parametrize("switch_every", ["auto", 3])
def test_a_window_is_refused_where_nothing_is_estimated(switch_every: int | str) -> None:
    with pytest.raises(RecipeError, match=f"window_rounds: is for .*adaptive, and switch_every is {switch_every}"):
        ALGORITHMS["tad_lora"](switch_every=switch_every, window_rounds=20, rho=lambda: 0.5)


def test_the_settings_say_what_was_chosen() -> None:
    made = ALGORITHMS["tad_lora"](switch_every="adaptive", clients=4, seed=1)
    assert made.settings == {"switch_every": "adaptive", "window_rounds": 40}
    own, same = made.init({}, standing([2], torch.tensor([45]))), Agreement(40, 5, 4, seed=1).init([2], 45)
    for name, x in same.items():
        assert torch.equal(own[name], x)
    assert ["A" in made.phase(t).train for t in (4, 5, 9, 10)] == [False, True, True, False]
    assert all(made.phase(t).send == {"A", "B", "head"} for t in (4, 5))
