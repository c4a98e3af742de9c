"""What ``/metrics`` reports, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one server; a registry of its own, so that several servers may live in one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        count = lambda name, words, *labels: Counter(f"apb_{name}", words, labels, registry=self.registry)  # noqa: E731
        self._requests = count("requests", "Requests answered", "route", "status")
        self._prefill_seconds = count("prefill_seconds", "Seconds of prefill, compilation included")
        self._prefill_tokens = count("prefill_tokens", "Document tokens prefilled")
        self._prefills = count("prefills", "Prefills finished")
        self._load_seconds = count("load_seconds", "Seconds of loading sessions from disk")
        self._decode_seconds = count("decode_seconds", "Seconds of query phases and decoding")
        self._decode_tokens = count("decode_tokens", "Tokens generated")
        self._sessions = count("session_lookups", "Requests by where their session was found", "result")
        self._cancelled = count("cancelled", "Work dropped because its clients went away", "stage")

    def watch(self, name: str, words: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when it is read."""
        Gauge(f"apb_{name}", words, registry=self.registry).set_function(value)

    def watch_places(self, name: str, words: str, value: Callable[[str], float]) -> None:
        """A gauge for each place where sessions are: "device" and "disk"."""
        gauge = Gauge(f"apb_{name}", words, ["where"], registry=self.registry)
        for where in ("device", "disk"):
            gauge.labels(where=where).set_function(partial(value, where))

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def prefill_seconds(self, seconds: float, *, loaded: bool = False) -> None:
        """``loaded``: the session came from disk."""
        (self._load_seconds if loaded else self._prefill_seconds).inc(seconds)

    def prefilled(self, tokens: int) -> None:
        self._prefills.inc()
        self._prefill_tokens.inc(tokens)

    def decode_seconds(self, seconds: float) -> None:
        self._decode_seconds.inc(seconds)

    def answered(self, tokens: int) -> None:
        self._decode_tokens.inc(tokens)

    def session(self, result: str) -> None:
        """``result``: "hit", "joined" (a prefill or a load on its way), "disk" or "miss"."""
        self._sessions.labels(result).inc()

    def cancelled(self, stage: str) -> None:
        """``stage``: "prefill" or "answer"."""
        self._cancelled.labels(stage).inc()

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
