"""`audit`: what a neighbour can tell of one row from what a client sends."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Call

from peertune.api.auditing import Audit, audit

pytestmark = pytest.mark.thorough
TINY = [
    "rounds=2",
    "training={learning_rate: 0.05, local_steps: 1, per_device_train_batch_size: 23}",
    "lora={r: 4, target_modules: [q_proj, v_proj]}",
]
HOW: dict[str, Any] = {"client": 1, "shadows": 100}


@pytest.fixture(scope="module", autouse=True)
def _secret(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEERTUNE_SECRET", str(tmp_path_factory.mktemp("secret") / "secret"))


@pytest.fixture(scope="module")
def leaking() -> Audit:
    return audit("digits-demo", TINY, **HOW)


def test_without_privacy_a_neighbour_finds_the_row_and_it_is_proved(leaking: Audit) -> None:
    assert (leaking.rows, leaking.shadows, leaking.rounds, leaking.most_epsilon) == (23, 100, 2, None)
    assert leaking.least_epsilon > 0.7
    first = leaking.tests[0]
    assert first.members + first.others == 50
    assert first.found / first.members - first.alarms / first.others > 0.8


def test_with_privacy_what_is_proved_stays_below_what_the_accountant_allows(leaking: Audit) -> None:
    private = audit("digits-demo", [*TINY, "privacy={epsilon: 0.5, delta: 1e-4}"], **HOW)
    assert private.most_epsilon is not None
    assert 0.4 < private.most_epsilon <= 0.5
    assert private.least_epsilon <= private.most_epsilon < leaking.least_epsilon
    assert not private.broken


def test_noise_that_is_too_little_for_a_budget_is_found_out() -> None:
    """With next to no noise and the largest epsilon that is told, the test proves more than a budget of .4 allows."""
    weak = audit("digits-demo", [*TINY, "privacy={noise_multiplier: 0.1, delta: 1e-4}"], **HOW)
    assert weak.least_epsilon > 0.4
    claimed = weak._replace(most_epsilon=0.4)
    assert claimed.broken


def test_the_command_says_it_in_a_table_and_as_json(peertune: Call, tmp_path: Path) -> None:
    few = ["rounds=1", "training.local_steps=1", "privacy={epsilon: 3, delta: 1e-4}", "--shadows", 40, "--client", 1]
    code, out, err = peertune("audit", "digits-demo", *few)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("40 shadow clients with the 23 rows of client 1, over 1 rounds;")
    assert {line[:14].strip() for line in lines[2:6]} == {"loss", "first message", "all messages", "shadow model"}
    assert "at most 3.00 by the accountant, at δ 0.0001" in lines[-1]
    code, out, _ = peertune("audit", "digits-demo", *few, "--json")
    told = json.loads(out)
    assert (code, told["broken"], told["shadows"], len(told["tests"])) == (0, False, 40, 4)
    assert told["least_epsilon"] <= told["most_epsilon"] <= 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--client", 10], "--client: 10; give one from 0 to 9"),
        (["--shadows", 10], "--shadows: 10 prove nothing"),
        (["algorithm.name=local"], "algorithm: sends nothing"),
        (["clients=1"], "clients: a canary is another client's row"),
    ],
)
def test_what_can_t_be_audited_is_refused(peertune: Call, words: list[object], message: str) -> None:
    code, out, err = peertune("audit", "digits-demo", *words)
    assert (code, out) == (2, "")
    assert message in err
