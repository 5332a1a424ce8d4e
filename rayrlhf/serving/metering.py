"""What /metrics says, in the form of Prometheus.

Ray exports what Serve itself counts, per replica, at its own port; these are the endpoint's.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/score",
    "/v1/votes",
    "/admin/weights",
    "/healthz",
    "/metrics",
)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Meters:
    """The endpoint's counters."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "rayrlhf_serve_requests", "Requests answered", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "rayrlhf_serve_request_seconds",
            "From the head of a request to the end of its answer",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.ongoing = Gauge(
            "rayrlhf_serve_ongoing_requests", "Requests being answered", registry=registry
        )
        self.answers = Counter(
            "rayrlhf_serve_answers", "Answers begun, by model", ["model"], registry=registry
        )
        self.version = Gauge(
            "rayrlhf_serve_weights_version",
            "Version of the weights that are live",
            ["model"],
            registry=registry,
        )
        self.is_up = Gauge(
            "rayrlhf_serve_engine_up",
            "1 where an engine answers",
            ["model", "engine"],
            registry=registry,
        )
        self.reloads = Counter(
            "rayrlhf_serve_reloads",
            "New weights, by outcome",
            ["model", "outcome"],
            registry=registry,
        )

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count a request; `status` 0 is one whose client went away before an answer."""
        name = path if path in PATHS else "other"
        self._requests.labels(name, str(status or 499)).inc()
        self._seconds.labels(name).observe(seconds)

    def text(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self._registry)
