"""One client as a process of its own, which swaps with its neighbours over the network."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, Literal

import numpy as np
import torch

from peertune.engines.company import Company, neighbours, steps_told
from peertune.engines.fallback import Past
from peertune.errors import DivergedError, Exit, WireError
from peertune.method import Phase, standing
from peertune.methods.private import STEPS
from peertune.privacy.draws import keyed
from peertune.rounds import best
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.record import RoundRecord
from peertune.rounds.round import run_round
from peertune.rounds.turns import begun_from
from peertune.runs.budget import Ledger
from peertune.topology import clients_down, delay_s, failed_edges, partners_at, row_at
from peertune.types import Stack, State, Tensors, only, stacked
from peertune.wire.pace import furthest_believed, silence_s
from peertune.wire.swap import Swapper

log = logging.getLogger(__name__)


def run_peer(
    job: Job,
    swapper: Swapper,
    when_alone: Literal["train", "wait"] = "train",
    when_refused: Literal["stop", "train"] = "stop",
    records: Callable[[], Sequence[Mapping[str, Any]]] = list,
    recall: Callable[[int], State | None] | None = None,
    ledger: Ledger | None = None,
) -> Iterator[RoundRecord]:
    """Run the rounds that are left of a peer's job and yield a record after each, as `simulate` does.

    There is no coordinator. A round ends when each of its edges has counted or failed. A peer that finds that others
    went on without it goes on from where they are, with the adapter that it has: after such a jump `record.state.round`
    is more than one beyond `record.round`. One that reaches nobody trains alone, or waits. One that its neighbours have
    refused for as long as a round waits for them ends before its last round. `records` returns those of the rounds
    before, as JSON has them: from a peer that was restarted, others may still need the verdicts. Where training
    diverges after it mixed, it goes on with what it was before: with what `recall(round)` returns, the newest state
    that was kept with fewer rounds behind it. Where its rows are private, `ledger` knows what was spent.
    """
    (me,) = job.clients
    company, met = Company(job, swapper, when_alone, when_refused), False
    fastest_s, past, made = inf, Past(recall, swapper.name), records()

    def add(record: Mapping[str, Any]) -> None:
        nonlocal fastest_s
        fastest_s = min(fastest_s, sum(record["seconds"].values()))
        mixed = {i + j - me for i, j in record["edges"]} - {sender for _, sender in record["not_mixed"]}
        past.add(record["round"], record["loss"], mixed)

    for before in made:
        counted, failed = ([i + j - me for i, j in before[key]] for key in ("edges", "failed_edges"))
        swapper.remember(before["round"], counted, failed)
        add(before)
    past.suspect(suspect for _, *suspect in (made[-1]["suspects"] if made else ()))
    heard = swapper.last_heard()
    swapper.enter(job.state.round)  # from here on it answers
    job = replace(job, steps=steps_told(job, swapper), lines=swapper.lines)
    state = job.state.clone()
    if (ahead := _caught_up(job, swapper, state.round, heard, fastest_s)) > state.round:
        whole = recall(state.round + 1) if state.step and recall else None  # which has no round half made
        state = (state if whole is None else whole.clone()).at(ahead)
    while state.round < job.rounds:
        if me in clients_down(job.faults, state.round):
            state = state.at(state.round + 1)
            continue
        if not company.is_there():
            return
        begun = None
        if ledger is not None and job.private is not None:
            begun = keyed(job.private.marks[me], begun_from(state)[0])
            steps = ledger.before(state.round, begun) * job.private.per_round
            steps += state.step if job.private.unit == "record" else 0  # of a round that was begun
            state.remember({STEPS: torch.full_like(state.memory[STEPS], steps)})
        at = standing(job.clients, state.rounds, job.local_steps)
        (phase,) = job.algorithm.schedule.phases(state.known, at)
        if ledger is not None and begun is not None and phase.train:
            ledger.begin(state.round, begun)
        heard = swapper.last_heard()
        swapper.enter(state.round, phase)
        try:
            bounded = replace(job, most_loss=past.most_loss(state.round))
            if past.fell_back_in(state.round):  # else who it left out, which no record says yet, would be forgotten
                bounded = replace(bounded, pausing=None)
            state, record = run_round(
                bounded, state, job.clients, state.round, partial(_exchange, job, swapper, past, state, phase)
            )
        except DivergedError as error:
            kept = best.part(state.memory)  # what scored well did so, whatever came later
            state = past.fall_back(state.round, error)
            state.remember(kept)
            continue
        add(vars(record))
        swapper.note_mixed((sender for _, sender in record.not_mixed), record.taken)
        here = state.round
        if swapper.passed_by(record.round):  # who is in company is not behind because a single one says so
            pace_s = inf if record.edges else fastest_s
            state = state.at(_caught_up(job, swapper, here, heard, pace_s))
        skipped = [t for t in range(here, state.round) if met and me not in clients_down(job.faults, t)]
        yield replace(record, state=state, skipped=len(skipped), suspects=[(me, *suspect) for suspect in past.suspects])
        if record.edges:
            met = True
            company.met()
        elif company.shut_out():
            return


ENOUGH = 0.9
"""The share of the rounds in which a peer was up that it must have made."""


def ended(records: Sequence[Mapping[str, Any]], *, whole: bool, refusals: Callable[[], Mapping[str, str]]) -> Exit:
    """Return how a peer's run ended, from its records; `whole` unless it ended before its last round.

    What passed before it met a neighbour since its start counts as passed while it was away. Only of a peer that was
    alone at the end is it asked who refuses it.
    """
    if not whole:
        return Exit.REFUSED
    met = [bool(r["edges"]) for r in records if r["edges"] or r["failed_edges"] or r["vacant_edges"]]
    if met and not met[-1] and refusals():
        return Exit.REFUSED
    if met and not any(met):
        return Exit.ALONE
    made, skipped = len(records), sum(record["skipped"] for record in records)
    return Exit.DONE if made and made >= ENOUGH * (made + skipped) else Exit.CUT_SHORT


def _exchange(
    job: Job, swapper: Swapper, past: Past, state: State, phase: Phase, sent: Sequence[Stack], t: int, refuse: Refuse
) -> Heard:
    """Swap with the round's neighbours, and take from each what the mixing matrix says."""
    (me,), payload = job.clients, only(sent)
    if (delay := delay_s(job.faults, me, t)) > 0:
        swapper.pause(delay)
    if not payload:
        return Heard([], torch.ones(1, 1, dtype=torch.float64, device=job.device), [me], [])
    row = row_at(job.graph, me, t)
    near = [other for other in row if other != me]
    first = torch.zeros(1, dtype=torch.int64, device=job.device)

    edgewise = job.algorithm.message.edgewise

    def read(client: int, tensors: Tensors) -> Tensors:
        """Return what a client sent as a mixer gets it, `[1, …]`, on the device. Raises WireError for what can't be."""
        tensors = {name: x.to(job.device) for name, x in tensors.items()}
        if edgewise is not None and client != me:
            tensors = edgewise.unpack(tensors, state.known, client)
        return job.read(tensors, t, client)

    def check(client: int, tensors: Tensors) -> str:
        why = past.left_out(client, t)
        try:
            if not why and (found := refuse(stacked(read(client, tensors)), first, first)):
                why = found[0].why
        except WireError as error:
            why = str(error)
        return f"round {t}: {why}; the edge fails" if why else ""

    packed = {} if edgewise is None else {client: edgewise.pack(payload, state.known, client) for client in near}
    came = swapper.swap(t, payload, near, check, _layouts(job, payload, near, phase), packed)
    lost = {other: (min(me, other), max(me, other)) for other in near if other not in came}
    vacant = [edge for other, edge in lost.items() if swapper.vacant(other)]
    failed = [edge for edge in lost.values() if edge not in vacant]
    row[me] += sum(row.pop(other) for other in lost)
    heard = sorted([me, *came])
    parts = [read(client, payload if client == me else came[client]) for client in heard]
    weights = torch.tensor([[row[client] for client in heard]], dtype=torch.float64, device=job.device)
    return Heard(_stacks(job, heard, parts), weights, heard, failed, vacant)


def _layouts(job: Job, payload: Tensors, near: Sequence[int], phase: Phase) -> dict[int, Tensors]:
    """Return what neighbours send, `[1, …]`, where that has other shapes or types than what is sent to them."""
    if (layout := job.algorithm.message.layout) is not None:
        return {client: layout(payload, client, phase) for client in near}
    return {client: job.sent(phase.send, client) for client in near} if job.ranks else {}


def _stacks(job: Job, clients: Sequence[int], parts: Sequence[Tensors]) -> list[Stack]:
    """Return what these clients sent, each `[1, …]`, by their ranks."""
    ranks = [job.ranks[client] if job.ranks else 0 for client in clients]
    found = []
    for rank in sorted(set(ranks)):
        rows = [row for row, own in enumerate(ranks) if own == rank]
        tensors = {name: torch.cat([parts[row][name] for row in rows]) for name in parts[rows[0]]}
        found.append(Stack(torch.tensor(rows), tensors))
    return found


def _expected(job: Job, t: int) -> list[int]:
    """Return those whom this peer has to meet in round t, if nothing goes wrong but what is planned."""
    (me,) = job.clients
    if not job.algorithm.phase(t).send:
        return []
    mine = [(min(me, other), max(me, other)) for other in partners_at(job.graph, me, t)]
    lost = failed_edges(job.faults, np.array(mine, dtype=np.int64).reshape(-1, 2), t)
    return [i + j - me for i, j in mine if (i, j) not in lost]


def _caught_up(job: Job, swapper: Swapper, round: int, before: Mapping[int, float], fastest_s: float) -> int:
    """Return the round to go on with: this one, or that of the others if they went on without this peer.

    A neighbour went on without it if the two had an edge in a round that the neighbour has behind it; the last of those
    rounds doesn't tell, since its payload is still at hand there. Where others are is what two of them say, or what a
    single one can have come to since it was heard `before`, so that none can drive the others on (`wire.pace`; where
    `fastest_s` is infinite, a single one is not believed).
    """
    heard, now = swapper.last_heard(), time.time()  # before the asking, which is no silence
    there = swapper.ask_rounds(neighbours(job))
    ahead = {client: theirs for client, theirs in there.items() if theirs > round}
    silence = silence_s(ahead, before, heard, now)
    target = min(furthest_believed(round, ahead, silence, fastest_s), job.rounds)
    left = {client: min(theirs, target) for client, theirs in ahead.items()}
    if not any(left.get(other, 0) > t + 1 for t in range(round, target - 1) for other in _expected(job, t)):
        return round
    log.warning("behind: going on from round %d, where the others are, instead of %d", target, round)
    return target
