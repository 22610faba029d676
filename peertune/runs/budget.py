"""What a peer has spent of its privacy: `spent.jsonl`, of which no line is ever taken back.

A line for each state from which it has begun to train a round, `{"round", "state": digest}`, written before it trains.
The digest is also of the secret, the rows and the recipe. A round that is made again from the same state has the same
noise and tells nothing new. From another state, such as after it fell back or from an older checkpoint, with another
secret or by another version it is spent once more, whatever became of the first.
"""

import json
import os
from pathlib import Path

from peertune.errors import RunError
from peertune.files import append_line, reported

FILE = "spent.jsonl"


class Ledger:
    """Knows from which states a peer has trained."""

    def __init__(self, run: Path) -> None:
        """Read what the run's directory says.

        Raises RunError where that is damaged, or missing where the run has begun: nobody could tell what is left.
        """
        self._file = run / FILE
        if not self._file.exists() and any((run / "checkpoints").glob("*")):
            raise RunError(f"{self._file}: is missing, so what was spent is not known; restore it, or begin anew")
        with reported(self._file):
            self._file.touch()
            held = self._file.read_bytes()
            whole = held[: held.rfind(b"\n") + 1]  # a line that was cut off is of a round that was not begun
            os.truncate(self._file, len(whole))
        try:
            self._begun = {(int(line["round"]), str(line["state"])) for line in map(json.loads, whole.splitlines())}
        except (ValueError, TypeError, KeyError):
            raise RunError(f"{self._file}: is damaged, so what was spent is not known; restore it") from None

    def before(self, round: int, state: bytes) -> int:
        """Return how many rounds have been begun, other than this one from this state."""
        return len(self._begun - {(round, state.hex())})

    def begin(self, round: int, state: bytes) -> None:
        """Note that a round is begun. Raises RunError where it can't be written; then it must not be."""
        if (round, state.hex()) not in self._begun:
            append_line(self._file, json.dumps({"round": round, "state": state.hex()}))
            self._begun.add((round, state.hex()))
