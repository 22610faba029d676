"""One client's mixing of what it was sent, for those who wait for nobody: at a peer, and where its run is replayed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from peertune.methods.shares import as_weights
from peertune.rounds import metrics
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.mixing import tell
from peertune.topology.pushes import rows, share
from peertune.types import Stack, Tensors, only, stacked


class Post(NamedTuple):
    """Which message this is: a client's after a training, of one of the starts of its process."""

    client: int
    start: int  # its number; one that was started again may send other contents for a version
    version: int  # the number of the training
    degree: int  # to how many it was sent


class Taken(NamedTuple):
    """A message that is mixed, and how old it is."""

    post: Post
    staleness: int  # trainings that the receiver has ended since the sender began, but for the one after which it mixes


def mixed(
    job: Job,
    me: int,
    own: Post,
    sent: Sequence[Stack],
    came: Sequence[tuple[Taken, Tensors]],
    heard: int,
    refuse: Refuse,
) -> tuple[Heard, list[Taken]]:
    """Return what a client hears, what it `sent` itself among it, and which messages are not refused.

    `own` says which message that is.
    `came` has of each neighbour one message, `[1, …]`. `heard` says how many count for the weights: those that came,
    and where a run is replayed those that were refused then, too.
    """
    payload = only(sent)
    each = {taken.post.client: tensors for taken, tensors in came} | {me: payload}
    among = sorted(each)
    tensors = {name: torch.cat([each[client][name].to(job.device) for client in among]) for name in payload}
    places = torch.tensor([among.index(taken.post.client) for taken, _ in came], dtype=torch.int64, device=job.device)
    refused = refuse(stacked(tensors), torch.zeros_like(places), places) if came else []
    tell(job, own.version, refused, [me], among, "it is left out")
    without = {among[sender] for _, sender, _ in refused}
    whole = [taken for taken, _ in came if taken.post.client not in without]
    assert job.pushing is not None, "who mixes what was pushed has a way to"
    exponent, directed = job.pushing.staleness_exponent, job.graph.directed
    takes = {
        (0, among.index(taken.post.client)): share(
            own.degree, heard, taken.post.degree, taken.staleness, exponent, directed=directed
        )
        for taken in whole
    }
    weights = as_weights(rows([me], among, takes, directed=directed), job.device)
    failed = sorted(metrics.as_edge(client, me, directed) for client in without)
    return Heard(stacked(tensors), weights, among, failed, sent=[own.degree]), whole
