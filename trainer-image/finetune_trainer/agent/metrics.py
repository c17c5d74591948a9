"""The agent's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from finetune_api.documents import Stage
from finetune_trainer.agent.progress import ProgressBoard

# From a small adapter to a large model with its optimizer state.
_UPLOAD_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600)
_GAUGES = {
    "step": "Optimizer steps done.",
    "total_steps": "Optimizer steps in all.",
    "epoch": "Passes over the data done.",
    "loss": "Training loss of the last logged step.",
    "eval_loss": "Last evaluation loss.",
    "learning_rate": "Learning rate of the last logged step.",
    "grad_norm": "Gradient norm of the last logged step.",
    "tokens_per_second": "Tokens per second over all processes.",
    "checkpoint_step": "Step of the newest stored checkpoint.",
}


class Metrics:
    """Counters of this attempt, and gauges that follow the progress board."""

    def __init__(self, board: ProgressBoard) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ProgressGauges(board))
        self.uploaded = Counter("finetune_checkpoints_uploaded", "Checkpoints stored.", registry=self._registry)
        self.skipped = Counter(
            "finetune_checkpoints_skipped", "Local checkpoints given up for a newer one.", registry=self._registry
        )
        self.saves_skipped = Gauge(
            "finetune_saves_skipped",
            "Saves left out since the workers started, because the one before was still being written to the disk.",
            registry=self._registry,
        )
        self.upload_failures = Counter(
            "finetune_checkpoint_upload_failures", "Uploads that failed and are tried again.", registry=self._registry
        )
        self.upload_seconds = Histogram(
            "finetune_checkpoint_upload_seconds",
            "Seconds that a checkpoint's upload took.",
            buckets=_UPLOAD_BUCKETS,
            registry=self._registry,
        )

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)


class _ProgressGauges(Collector):
    def __init__(self, board: ProgressBoard) -> None:
        self._board = board

    def collect(self) -> Iterable[Metric]:
        document = self._board.document
        for name, description in _GAUGES.items():
            value = getattr(document, name)
            if value is not None:
                yield GaugeMetricFamily(f"finetune_{name}", description, value=value)
        if document.spent is not None:
            # No counter: a rollback moves seconds from one field to another.
            spent = GaugeMetricFamily("finetune_spent_seconds", "Where this attempt's time went.", labels=["bucket"])
            for name, seconds in document.spent.to_json().items():
                spent.add_metric([name], seconds)
            yield spent
        stages = GaugeMetricFamily("finetune_stage", "1 for what the trainer is doing.", labels=["stage"])
        for stage in Stage:
            stages.add_metric([stage.value], float(stage == document.stage))
        yield stages
