"""What a round leaves: the values that the records of a run are made of. They hold no tensors, but for the state."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what only reads records spares itself torch
    from peertune.types import State

MOST_CLASSES = 100
"""Classes up to which an evaluation counts what was taken for what: that many squared numbers."""


@dataclass(frozen=True)
class Evaluation:
    """How good the clients' own models are, and the model of the averaged adapter; fields as in `RoundRecord`."""

    metric: str  # what was measured: a key of METRICS, and the class that it is of
    clients: list[float]  # [K], each client's own model; with `evaluate.on: own` on rows of its own, as `own`
    average: float | None  # the adapter averaged over the clients, factor by factor; None where nobody holds them all
    rows: int  # rows of the validation set that were used; with `evaluate.on: own` all that clients hold out
    # [K], share of the rows for which a client predicts its most frequent class; [] for values, and with `own` alone
    top_share: list[float]
    own: list[float] = field(default_factory=list)  # [K], each client's own model on rows of its own, where asked for
    # With `evaluate.ensemble`, on the common rows: each client's negative log-likelihood and calibration error [K], the
    # score of the mean of all clients' probabilities, and of whoever is surest of a row; None where nobody holds them
    nll: list[float] = field(default_factory=list)
    ece: list[float] = field(default_factory=list)
    ensemble: float | None = None
    route: float | None = None
    # and [K], of the mean of the probabilities by each client's adapter and by those it heard, as they were sent
    heard_ensemble: list[float] = field(default_factory=list)
    # With `evaluate.load_best` [K], of which evaluated round each client's best adapter so far is, -1 for none
    best_rounds: list[int] = field(default_factory=list)
    # With `evaluate.mixing`, on the rows of `own` [K]: of each client's adapter as it was trained, before mixing, and
    # of the mean of the factors that others sent it; its own where it heard nobody, and of kinds that weren't sent
    own_trained: list[float] = field(default_factory=list)
    own_heard: list[float] = field(default_factory=list)
    # What the best answer that is the same for all rows scores on the common rows (the mean over peers whose rows
    # differ; None with `evaluate.on: own`), and [K] on the rows of `own`
    constant: float | None = None
    own_constant: list[float] = field(default_factory=list)
    # [C, C], rows by their class and by the class that was predicted, summed over the clients' own models, each on the
    # rows of `clients`; [] for values and texts, and of more than MOST_CLASSES classes
    confusion: list[list[int]] = field(default_factory=list)
    # [K], of the common rows of other classes, with a backdoor's trigger put in, the share called its target
    backdoor: list[float] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)  # who they are, where some are hostile; [] where it is of all
    also: "list[Evaluation]" = field(default_factory=list)  # the same predictions by the task's other metrics

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Evaluation":
        """Return what `dataclasses.asdict` wrote."""
        return cls(**{**values, "also": [cls.of(metric) for metric in values["also"]]})

    def with_heard(self, scores: Sequence[list[float]]) -> "Evaluation":
        """Return the same with `heard_ensemble`, a list for each metric; where there are none, as it is."""
        if not scores:
            return self
        also = [replace(one, heard_ensemble=heard) for one, heard in zip(self.also, scores[1:], strict=True)]
        return replace(self, heard_ensemble=scores[0], also=also)


_OWN = ("own", "own_trained", "own_heard", "own_constant")
SCORES_OF_CLIENTS = ("clients", "top_share", *_OWN, "nll", "ece", "heard_ensemble", "backdoor", "best_rounds")
"""Lists of an evaluation that go by client."""


def put_together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put an evaluation together of which processes or peers have parts, as `dataclasses.asdict` writes them.

    What some clients lack, whose version is older, nobody has. Each has the same `rows`, or what its caller makes of
    them.
    """
    found = dict(parts[0])
    for name in (*SCORES_OF_CLIENTS, "judged"):
        whole = all(part[name] or not part["clients"] for part in parts)
        found[name] = [value for part in parts for value in part[name]] if whole else []
    found["average"] = next((part["average"] for part in parts if part["average"] is not None), None)
    levels = [part["constant"] for part in parts]
    found["constant"] = levels[0] if len({*levels}) == 1 else None if None in levels else fmean(levels)
    found["confusion"] = [
        [sum(counts) for counts in zip(*rows, strict=True)]
        for rows in zip(*(part["confusion"] for part in parts), strict=False)
    ]
    found["also"] = [put_together(metric) for metric in zip(*(part["also"] for part in parts), strict=True)]
    return found


def summed(taken: Iterable[Sequence[float]]) -> list[tuple[int, float, float]]:
    """Put together what processes or peers have taken of senders: see `RoundRecord.taken`."""
    found: dict[int, tuple[float, float]] = {}
    for sender, had, took in taken:
        before = found.get(int(sender), (0.0, 0.0))
        found[int(sender)] = before[0] + had, before[1] + took
    return [(sender, *found[sender]) for sender in sorted(found)]


@dataclass(frozen=True)
class RoundRecord:
    """What one round did; a line of `rounds.jsonl`.

    Lines of other versions have fewer fields, or more. A field that a line lacks has its default here, so a field that
    is added needs one that is true of the runs that were made without it.
    """

    round: int
    train: list[str]  # kinds trained by most clients, sorted
    send: list[str]  # kinds sent, sorted
    clients: list[int]
    loss: list[float]  # [K], mean over the round's local steps; [] where rows are private
    # [K], mean over the local steps, before clipping; where rows are private, of what is noised; [] where clients are
    grad_norm: list[float]
    bytes_sent: list[int]  # [K]
    neighbours: list[int]  # [K], how many others each client heard
    edges: list[tuple[int, int]]  # over which something came, i < j; of a directed graph (sender, receiver)
    failed_edges: list[tuple[int, int]]  # active by the graph, over which nothing came; in the same order
    out_of_phase: list[int]  # clients that trained other kinds than `train`
    neighbourhood_cross_term: list[float] | None  # [K], of what each heard, before mixing; only in evaluated rounds
    # Consensus errors and cross term after mixing, mean drift and contraction by mixing; {} where only one is known.
    diagnostics: dict[str, float]
    seconds: dict[str, float]  # by stage
    evaluation: Evaluation | None = None
    vacant_edges: list[tuple[int, int]] = field(default_factory=list)  # active by the graph, to a seat without a member
    failed_writes: int = 0  # of records and checkpoints, until this one was written, since the start
    skipped: int = 0  # rounds after this one that a peer was up in and passed over, since others were further
    # (receiver, sender) of edges that counted and of which the receiver mixed nothing: too far from what others have
    not_mixed: list[tuple[int, int]] = field(default_factory=list)
    # (sender, weight by the graph, weight taken), summed over those who heard it, where a mixer weighs by what it hears
    taken: list[tuple[int, float, float]] = field(default_factory=list)
    # (receiver, sender, round, times): a peer takes nothing from the sender until that round; it fell back so often
    suspects: list[tuple[int, int, int, int]] = field(default_factory=list)
    # Of a recipe with `time.step_s`: the virtual second in which the last client had ended the round, and what each
    # client did until then: (client, began, trained, ended, whom it waited for last or -1)
    time_s: float | None = None
    spans: Sequence[tuple[int, float, float, float, int]] = field(default_factory=list)
    # [K], what each client has spent of its budget until here; [] where rows aren't private, or nothing was evaluated
    epsilon: list[float] = field(default_factory=list)
    sites_sent: list[int] = field(default_factory=list)  # [K], of a recipe with `time.deadline_s`: how many, the last
    state: "State | None" = field(default=None, repr=False, compare=False)  # after the round; never written as JSON


class Watch:
    """Adds up the seconds of each stage."""

    def __init__(self, trained: float) -> None:
        self.seconds = {"train": trained}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as this stage's."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
