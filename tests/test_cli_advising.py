import json

import pytest
from conftest import Call

INSIDE = ["rounds=60", "training={learning_rate: 0.01, local_steps: 1, per_device_train_batch_size: 4}"]


def test_it_says_what_it_has_seen_and_how_sure_it_is(peertune: Call) -> None:
    code, out, err = peertune("advise", "digits-demo", *INSIDE, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["outside"] == []
    assert 0 < told["probe"]["cross"] < 1
    (alternating,) = (one for one in told["foretold"] if one["method"] == "tad_lora")
    wide = alternating["high"] - alternating["low"]
    assert wide == pytest.approx(2 * alternating["law"]["within"])
    answer = {True: "tad_lora", False: "dec_lora", None: None}[alternating["ahead"]]
    assert told["method"] == answer
    assert (alternating["low"] <= 0 <= alternating["high"]) == (answer is None)
    assert told["switch_every"] == (told["switching_interval"] if answer == "tad_lora" else None)
    assert told["chance"] < 0.75
    assert told["runs"] <= told["runs_planned"]
    assert all(cell["differences"]["tad_lora"]["seeds"] >= 1 for cell in told["near"])


def test_far_from_all_that_was_measured_it_probes_nothing_and_says_what_would_tell(peertune: Call) -> None:
    code, out, err = peertune("advise", "tad-sst2-minilm", "seed=3", "algorithm.switch_every=2", "rounds=20")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "advice    not enough to tell whether alternation pays" in lines
    assert "probe     none, since it would change nothing" in lines
    assert "because   task.name is glue, and digits in all that was measured" in lines
    assert lines[-2:] == [
        "measure   peertune sweep tad-sst2-minilm rounds=20 'algorithm={name: dec_lora},{name: tad_lora}' "
        "seed=0,1,2,3,4 --out runs/told",
        "          peertune compare runs/told --by algorithm.name --paired-with dec_lora",
    ]
    _, out, _ = peertune("advise", "tad-sst2-minilm", "--json")
    assert (json.loads(out)["method"], json.loads(out)["foretold"]) == (None, [])


def test_a_further_number_leaves_it_untold_beside_what_the_probe_shows(peertune: Call) -> None:
    code, out, _ = peertune("advise", "digits-demo", *INSIDE, "rounds=61")
    assert code == 0
    assert "foretold  tad_lora " in out
    assert "because   rounds is 61, and 60 in all that was measured" in out
    assert ": ahead" not in out
    assert ": behind" not in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["digits-demoo"], "digits-demoo"),
        (["digits-demo", "rounds=0"], "rounds"),
        (["digits-demo", "training.optim=adm"], "training.optim"),
    ],
)
def test_a_mistake_is_one_line(peertune: Call, words: list[str], says: str) -> None:
    code, out, err = peertune("advise", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
