"""Eight peers without rounds for half an hour, some killed and stopped: their memory, and all of it made again."""

import tempfile
from pathlib import Path

from benchmarks.measure import Figure, figure
from benchmarks.soak import RECIPE, soaked
from benchmarks.wire import PEERS
from peertune.api.replaying import Replay

ROUNDS = 520
EVERY = 2  # rounds, to a kill or a stop
PAUSE_S = 1.0  # of each peer after each training, so that two cores have eight of them


def run(rounds: int = ROUNDS, seed: int = 0) -> list[Figure]:
    """Run until all have made their trainings, in float64, and replay what they noted."""
    pauses = ", ".join(f"{{slow: {client}, rounds: [0, {rounds}], delay_s: {PAUSE_S}}}" for client in range(PEERS))
    recipe = [part.format(rounds=rounds) for part in RECIPE]
    recipe += ["time={mode: asynchronous, staleness_exponent: 0.5}", "model.dtype=float64", f"faults=[{pauses}]"]
    with tempfile.TemporaryDirectory() as folder:
        figures = soaked(Path(folder), rounds, recipe, seed, EVERY)
        made = Replay([Path(folder) / "runs" / f"{client}" for client in range(PEERS)]).finish()
    return [
        *figures,
        figure("starts of the peers", [one.starts for one in made], ""),
        figure("a replay's adapters, apart from theirs", [max(one.apart for one in made)], "", target="≤ 1e-12"),
    ]
