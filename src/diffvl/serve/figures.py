"""What a server counts, in the text form that Prometheus reads."""

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diffvl.serve.draft_batch import DraftBatch
from diffvl.serve.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Figures:
    """Counters of requests; what the engine knows by itself is asked of it.

    Attributes:
        requests: by HTTP status. prompt_tokens: of requests that were answered or begun.
        seconds: of whole requests; waited: until they joined the batch; first: until the first block of the answer was there.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_OfEngine(engine))
        registry = self._registry
        self.requests = Counter("diffvl_requests", "Chat completions by HTTP status.", ["status"], registry=registry)
        self.prompt_tokens = Counter("diffvl_prompt_tokens", "Tokens of prompts, images included.", registry=registry)
        self.seconds = Histogram("diffvl_request_seconds", "From arrival to end.", buckets=SECONDS, registry=registry)
        self.waited = Histogram(
            "diffvl_wait_seconds", "From arrival until the batch is joined.", buckets=SECONDS, registry=registry
        )
        self.first = Histogram(
            "diffvl_first_block_seconds", "From arrival to the first block.", buckets=SECONDS, registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _OfEngine(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> list[Metric]:
        engine = self._engine
        gauges = {
            "diffvl_running": ("Requests in the batch.", len(engine.running)),
            "diffvl_waiting": ("Prepared requests that wait for a place in the batch.", len(engine.waiting)),
        }
        counters = {
            "diffvl_answer_tokens": ("Tokens of answers, once nothing can take them away.", engine.counts.answer_tokens),
            "diffvl_blocks": ("Blocks that the batch was decoded by.", engine.counts.blocks),
            "diffvl_forwards": ("Passes of the trunk.", engine.forwards),
            "diffvl_faults": ("Calls of the model that failed.", engine.counts.faults),
        }
        if isinstance(engine.batch, DraftBatch):
            del counters["diffvl_blocks"]
            counters["diffvl_drafted_tokens"] = ("Tokens of drafts that were checked.", engine.batch.drafted)
            counters["diffvl_accepted_tokens"] = ("Tokens of drafts that were kept.", engine.batch.accepted)
        return [
            *(GaugeMetricFamily(name, about, value) for name, (about, value) in gauges.items()),
            *(CounterMetricFamily(name, about, value) for name, (about, value) in counters.items()),
        ]
