"""What the server counts: for Prometheus, and for a page that shows the last seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
# Answers whose latencies are remembered, and seconds over which a rate is taken.
_REMEMBERED, _WINDOW = 1000, 10


class Metrics:
    """Counters of a server. Adapters are not among the labels: there may be a million.

    Args:
        levels: called when asked; numbers that are read elsewhere, by name. Those that end in `_total` only grow.
    """

    def __init__(self, levels: Callable[[], Mapping[str, float]]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("loraxs_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self._seconds = Histogram(
            "loraxs_request_seconds", "Until the end", ["route"], buckets=_BUCKETS, registry=self.registry
        )
        self._first = Histogram(
            "loraxs_first_token_seconds", "Until the first token", buckets=_BUCKETS, registry=self.registry
        )
        self._prompt = Counter("loraxs_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self._completion = Counter("loraxs_completion_tokens", "Tokens of answers", registry=self.registry)
        self.registry.register(_Levels(levels))
        self._latencies: deque[float] = deque(maxlen=_REMEMBERED)
        # Tokens by second, the present one last.
        self._by_second: deque[list[int]] = deque(maxlen=_WINDOW + 1)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A response has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def finished(self, seconds: float) -> None:
        """All of an answer was computed, in this time."""
        self._latencies.append(seconds)

    def prompt(self, tokens: int) -> None:
        """A prompt was accepted."""
        self._prompt.inc(tokens)

    def first_token(self, seconds: float) -> None:
        """The first token of an answer came, so long after the request."""
        self._first.observe(seconds)

    def tokens(self, count: int) -> None:
        """Tokens were computed."""
        self._completion.inc(count)
        now = int(time.monotonic())
        if not self._by_second or self._by_second[-1][0] != now:
            self._by_second.append([now, 0])
        self._by_second[-1][1] += count

    def recent(self) -> dict[str, float | None]:
        """Latency in seconds of the last answers, and tokens each second of the last full ones."""
        now = int(time.monotonic())
        tokens = sum(count for second, count in self._by_second if now - _WINDOW <= second < now)
        ordered = sorted(self._latencies)
        p50, p99 = (ordered[int(q * (len(ordered) - 1))] if ordered else None for q in (0.5, 0.99))
        return {"latency_p50": p50, "latency_p99": p99, "tokens_per_second": tokens / _WINDOW}

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)


class _Levels(Collector):
    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, value in self._read().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"loraxs_{name}", name.removesuffix("_total").replace("_", " ").capitalize(), value=value)
