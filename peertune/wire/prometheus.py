"""How a peer stands (`peer_status`), as Prometheus reads it: at 127.0.0.1 only, for a scraper on the same machine."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from peertune.errors import RunError
from peertune.wire.status import DOING, ReadStatus

_OWN = {
    "round": ("round", "The round the peer is in, counted from 0."),
    "rounds": ("rounds", "Rounds of the run."),
    "step": ("step", "Local steps done in the round."),
    "local_steps": ("local_steps", "Local steps of a round."),
    "roster_serial": ("roster", "Serial of the roster in use."),
    "certificate_expiry_timestamp_seconds": ("valid_until", "When the peer's certificate ends."),
}
_NOW = {
    "peer_reached": ("reached", "Whether the last attempt to reach the neighbour came through."),
    "peer_round": ("round", "The round the neighbour was in when last heard."),
    "peer_step": ("step", "Local steps it had done in that round."),
    "peer_last_seen_timestamp_seconds": ("seen_at", "When the neighbour was last heard."),
    "peer_taken": ("taken", "What share of the neighbour's weight a rule took when it was last heard."),
    "peer_clock_offset_seconds": ("clock_offset_s", "By how much its clock is ahead of this peer's."),
}
_SINCE_THE_START = {
    "bytes_sent": ("bytes_sent", "Bytes of payload sent since the start."),
    "bytes_received": ("bytes_received", "Bytes of payload received since the start."),
    "unmixed": ("unmixed", "Messages of the neighbour that counted, of which nothing was mixed."),
    "clones": ("clones", "Times that another process spoke with the neighbour's key."),
}
"""Of each neighbour."""


class _Standing(Collector):
    def __init__(self, current: ReadStatus) -> None:
        self._current = current

    def collect(self) -> Iterator[Metric]:
        now = self._current()
        about = {"federation": now["federation"], "name": now["name"], "client": str(now["client"])}
        yield InfoMetricFamily("peertune_peer", "Who this peer is.", about)
        doing = GaugeMetricFamily("peertune_doing", "1 for what the peer is doing, 0 for the rest.", labels=["doing"])
        for name in DOING:
            doing.add_metric([name], float(name == now["doing"]))
        yield doing
        for name, (key, text) in _OWN.items():
            yield GaugeMetricFamily(f"peertune_{name}", text, now[key])
        named = [(known["name"] or f"client-{known['client']}", known) for known in now["neighbours"]]
        for family, facts in ((GaugeMetricFamily, _NOW), (CounterMetricFamily, _SINCE_THE_START)):
            for name, (key, text) in facts.items():
                metric = family(f"peertune_{name}", text, labels=["peer"])
                for peer, known in named:
                    if known[key] is not None:
                        metric.add_metric([peer], float(known[key]))
                yield metric
        missed = "Writes of records and checkpoints that failed since the start."
        yield CounterMetricFamily("peertune_failed_writes", missed, now["failed_writes"])
        edges = CounterMetricFamily(
            "peertune_edges", "Edges that counted, and that failed, since the start.", labels=["peer", "outcome"]
        )
        for peer, known in named:
            edges.add_metric([peer, "counted"], known["up"])
            edges.add_metric([peer, "failed"], known["down"])
        yield edges


@contextmanager
def served(port: int, current: ReadStatus) -> Iterator[int]:
    """Answer at 127.0.0.1 (port 0: any) and yield the port. Raises RunError where it can't be listened at."""
    registry = CollectorRegistry()
    registry.register(_Standing(current))
    try:
        server, thread = start_http_server(port, "127.0.0.1", registry)
    except OSError as error:
        raise RunError(
            f"127.0.0.1:{port}: no metrics can be served there ({error.strerror}); give a free port"
        ) from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
