"""What Prometheus sees of the operator. Labels come from the failure table, never from users."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram

from finetune_operator.actions import Event

RECONCILES = Counter("finetune_operator_reconciles", "Reconciles by outcome.", ["outcome"])
RECONCILE_SECONDS = Histogram(
    "finetune_operator_reconcile_seconds", "Duration of a reconcile.", buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 30)
)
QUEUE_DEPTH = Gauge("finetune_operator_queue_depth", "Jobs that wait to be looked at.")
STATUS_WRITES = Counter("finetune_operator_status_writes", "Status writes by the reconciler.")
TRANSITIONS = Counter("finetune_operator_transitions", "Changes of a condition that people were told of.", ["reason"])
LEADER = Gauge("finetune_operator_leader", "1 while this process holds the Lease.")
LOOP_LAG = Gauge("finetune_operator_loop_lag_seconds", "How late the event loop last was.")


def count_events(events: Iterable[Event]) -> None:
    """Counts what people were told, by reason."""
    for event in events:
        TRANSITIONS.labels(reason=event.reason).inc()
