"""What a round leaves: the values that the records of a run are made of. They hold no tensors, but for the state."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what only reads records spares itself torch
    from peertune.types import State


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


SCORES_OF_CLIENTS = ("clients", "top_share", "own", "nll", "ece", "heard_ensemble", "best_rounds")
"""Lists of an evaluation that go by client."""


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
    loss: list[float]  # [K], mean over the round's local steps
    grad_norm: list[float]  # [K], mean over the local steps, before clipping
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
    # (receiver, sender, round, times): a peer takes nothing from the sender until that round; it fell back so often
    suspects: list[tuple[int, int, int, int]] = field(default_factory=list)
    state: "State | None" = field(default=None, repr=False, compare=False)  # after the round; never written as JSON
