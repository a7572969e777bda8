"""Prometheus metrics of one application."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.backends.protocol import Backend
from serve.requests import TokenOutput

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


class ArmMeter:
    """Times and counts one arm of a request; its clock starts at once.

    Args:
        metrics: all series.
        strategy: name of the arm's decoding strategy.
        adapter: name of its adapter, or None.
        num_prompt_tokens: of the request's prompts; they count once for each arm.
    """

    def __init__(
        self, metrics: "Metrics", strategy: str, adapter: str | None, num_prompt_tokens: int
    ) -> None:
        self._metrics = metrics
        self._series = metrics.of_strategy(strategy)
        self._adapter = adapter
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._start_s = time.perf_counter()
        self._first_s = 0.0

    def count_output(self, output: TokenOutput, last_s: float) -> float:
        """Count an output of a sequence whose last one came at `last_s`, 0 at the first.

        Returns:
            The time of this output.
        """
        now = time.perf_counter()
        if last_s:
            self._series.inter_token_latency.observe(now - last_s)
        elif not self._first_s:
            self._first_s = now
            self._series.time_to_first_token.observe(now - self._start_s)
        if output.token_id is not None:
            self._num_tokens += 1
        if output.trace is not None:
            self._series.sampling_temperature.observe(output.trace.temperature)
        return now

    def count_finish(self, reason: str) -> None:
        """Count a sequence that ended."""
        self._series.count_finish(reason)

    def close(self, end_s: float, longest: int, *, is_whole: bool) -> None:
        """Count the arm when the request has ended.

        Args:
            end_s: time of its last output.
            longest: tokens of its longest sequence.
            is_whole: every sequence has finished.
        """
        if not self._first_s:
            return
        series = self._series
        series.prompt_tokens.inc(self._num_prompt_tokens)
        series.generation_tokens.inc(self._num_tokens)
        if self._adapter is not None:
            self._metrics.count_adapter_tokens(self._adapter, self._num_tokens)
        if not is_whole:
            return
        series.request_latency.observe(end_s - self._start_s)
        series.request_prompt_tokens.observe(self._num_prompt_tokens)
        series.request_generation_tokens.observe(self._num_tokens)
        if longest > 1:
            series.time_per_output_token.observe((end_s - self._first_s) / (longest - 1))


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
        self._adapter_tokens: dict[str, int] = {}

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
        registry.register(_AdapterCollector(backend, model_name, self._adapter_tokens))

    def of_strategy(self, strategy: str) -> GenerationMetrics:
        """Return the series of a strategy."""
        if strategy not in self._by_strategy:
            self._by_strategy[strategy] = GenerationMetrics(self, strategy)
        return self._by_strategy[strategy]

    def count_adapter_tokens(self, adapter: str, num_tokens: int) -> None:
        """Count generated tokens of an adapter."""
        self._adapter_tokens[adapter] = self._adapter_tokens.get(adapter, 0) + num_tokens

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
        num_side_used = stats.num_side_cache_blocks - stats.num_free_side_cache_blocks
        gauges = {
            "num_requests_running": ("Running sequences.", stats.num_running_sequences),
            "num_requests_waiting": ("Requests in the queue.", stats.num_waiting_requests),
            "kv_cache_usage_perc": (
                "Used part of the KV cache, 0 to 1.",
                num_used / max(1, stats.num_cache_blocks),
            ),
            "side_kv_cache_usage_perc": (
                "Used part of the side networks' KV cache, 0 to 1.",
                num_side_used / max(1, stats.num_side_cache_blocks),
            ),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up.", stats.prompt_tokens),
            "prefix_cache_hits": ("Prompt tokens found.", stats.cached_prompt_tokens),
            "base_prefix_cache_hits": (
                "Prompt tokens that the cache had of base or variant, whatever their side network.",
                stats.base_cached_prompt_tokens,
            ),
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
        yield from self._backend.own_metrics()


class _AdapterCollector(Collector):
    """What is attached. Only attached names are labels, so their number stays bounded."""

    def __init__(self, backend: Backend, model_name: str, tokens: dict[str, int]) -> None:
        self._backend = backend
        self._model_name = model_name
        self._tokens = tokens

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        adapters = self._backend.adapters()
        sides = [adapter for adapter in adapters if adapter.has_side]
        gauges = {
            "adapters_attached": ("Adapters that can be asked for.", len(adapters)),
            "adapters_loaded": ("Adapters in memory.", sum(a.is_loaded for a in adapters)),
            "adapter_memory_bytes": (
                "Memory of the loaded side networks.",
                sum(adapter.num_bytes for adapter in sides if adapter.is_loaded),
            ),
            "variant_memory_bytes": (
                "Memory of the variants, what they share with the base left out.",
                sum(adapter.num_bytes for adapter in adapters if not adapter.has_side),
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"proa_{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name in self._tokens.keys() - {adapter.name for adapter in adapters}:
            del self._tokens[name]
        labels = ["model_name", "adapter"]
        total = CounterMetricFamily("proa_adapter_tokens", "Generated tokens.", labels=labels)
        for adapter in adapters:
            total.add_metric([self._model_name, adapter.name], self._tokens.get(adapter.name, 0))
        yield total
