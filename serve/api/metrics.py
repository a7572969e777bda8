"""Prometheus metrics of one application."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.backends.protocol import Backend

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1)
_E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
_TEMPERATURE_BUCKETS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2)
_LABELS = ("model_name", "strategy")


class GenerationMetrics:
    """The series of one model and strategy."""

    def __init__(self, metrics: "Metrics", strategy: str) -> None:
        labels = (metrics.model_name, strategy)
        self._metrics = metrics
        self._labels = labels
        self.time_to_first_token = metrics.time_to_first_token.labels(*labels)
        self.inter_token_latency = metrics.inter_token_latency.labels(*labels)
        self.time_per_output_token = metrics.time_per_output_token.labels(*labels)
        self.request_latency = metrics.request_latency.labels(*labels)
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.generation_tokens = metrics.generation_tokens.labels(*labels)
        self.request_prompt_tokens = metrics.request_prompt_tokens.labels(*labels)
        self.request_generation_tokens = metrics.request_generation_tokens.labels(*labels)
        self.sampling_temperature = metrics.sampling_temperature.labels(*labels)

    def count_finish(self, reason: str) -> None:
        """Count a sequence that ended: stop, length, abort (the client left) or error."""
        self._metrics.finished_sequences.labels(*self._labels, reason).inc()


class Metrics:
    """All series of an application; gauges are read from the backend when they are asked for.

    Args:
        backend: gives the gauges and counters of the engine.
        model_name: label of every series.
    """

    def __init__(self, backend: Backend, model_name: str) -> None:
        self.model_name = model_name
        registry = CollectorRegistry()
        self._registry = registry
        self._by_strategy: dict[str, GenerationMetrics] = {}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"proa_{name}", text, _LABELS, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = _LABELS) -> Counter:
            return Counter(f"proa_{name}", text, labels, registry=registry)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From request to first token.", _TTFT_BUCKETS
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between tokens of a sequence.", _ITL_BUCKETS
        )
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds", "Mean time per later token.", _ITL_BUCKETS
        )
        self.request_latency = histogram(
            "e2e_request_latency_seconds", "From request to last token.", _E2E_BUCKETS
        )
        self.request_prompt_tokens = histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS
        )
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens of a request.", _TOKEN_BUCKETS
        )
        self.sampling_temperature = histogram(
            "sampling_temperature",
            "Temperature of each token of requests with return_decoding_trace.",
            _TEMPERATURE_BUCKETS,
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.finished_sequences = counter(
            "sequences_finished", "Sequences by end.", (*_LABELS, "finished_reason")
        )
        self.http_requests = counter(
            "http_requests", "HTTP responses.", ("model_name", "endpoint", "status")
        )
        registry.register(_BackendCollector(backend, model_name))

    def of_strategy(self, strategy: str) -> GenerationMetrics:
        """Return the series of a strategy."""
        if strategy not in self._by_strategy:
            self._by_strategy[strategy] = GenerationMetrics(self, strategy)
        return self._by_strategy[strategy]

    def count_response(self, endpoint: str, status: int) -> None:
        """Count a response; `endpoint` is the route's path, not the client's."""
        self.http_requests.labels(self.model_name, endpoint, str(status)).inc()

    def render(self) -> bytes:
        """Return all series in Prometheus' text format."""
        return generate_latest(self._registry)


class _BackendCollector(Collector):
    def __init__(self, backend: Backend, model_name: str) -> None:
        self._backend = backend
        self._model_name = model_name

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._backend.stats()
        num_used = stats.num_cache_blocks - stats.num_free_cache_blocks
        gauges = {
            "num_requests_running": ("Running sequences.", stats.num_running_sequences),
            "num_requests_waiting": ("Requests in the queue.", stats.num_waiting_requests),
            "kv_cache_usage_perc": (
                "Used part of the KV cache, 0 to 1.",
                num_used / max(1, stats.num_cache_blocks),
            ),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up.", stats.prompt_tokens),
            "prefix_cache_hits": ("Prompt tokens found.", stats.cached_prompt_tokens),
            "num_preemptions": ("Sequences preempted.", stats.preemptions),
            "engine_steps": ("Steps of the engine.", stats.steps),
        }
        labels = [self._model_name]
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"proa_{name}", text, labels=["model_name"])
            gauge.add_metric(labels, value)
            yield gauge
        for name, (text, value) in counters.items():
            total = CounterMetricFamily(f"proa_{name}", text, labels=["model_name"])
            total.add_metric(labels, value)
            yield total
