"""What Prometheus sees of the operator. Labels come from the failure table, never from users."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram

from finetune_api.failures import TABLE
from finetune_api.status import FineTuneJobStatus, Goodput
from finetune_operator.actions import Event

RECONCILES = Counter("finetune_operator_reconciles", "Reconciles by outcome.", ["outcome"])
RECONCILE_SECONDS = Histogram(
    "finetune_operator_reconcile_seconds", "Duration of a reconcile.", buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 30)
)
QUEUE_DEPTH = Gauge("finetune_operator_queue_depth", "Jobs that wait to be looked at.")
STATUS_WRITES = Counter("finetune_operator_status_writes", "Status writes by the reconciler.")
TRANSITIONS = Counter("finetune_operator_transitions", "Changes of a condition that people were told of.", ["reason"])
ATTEMPTS = Counter("finetune_operator_attempts_ended", "Attempts that ended, by how they did.", ["class"])
INTERRUPTIONS = Counter("finetune_operator_interruptions", "Attempts that were interrupted; they use up no retry.")
RETRIES = Counter("finetune_operator_retries", "Failed attempts that are tried again, by how they ended.", ["class"])
JOB_SECONDS = Counter(
    "finetune_operator_job_seconds", "Time of all jobs since their first attempt, by what it went into.", ["part"]
)
LEADER = Gauge("finetune_operator_leader", "1 while this process holds the Lease.")
LOOP_LAG = Gauge("finetune_operator_loop_lag_seconds", "How late the event loop last was.")
PARTS = {name: name.removesuffix("_seconds") for name in Goodput.model_fields if name.endswith("_seconds")}
OUTCOMES = ("Succeeded", "Suspended", *TABLE)


def count_events(events: Iterable[Event]) -> None:
    """Counts what people were told, by reason."""
    for event in events:
        TRANSITIONS.labels(reason=event.reason).inc()


def count_change(before: FineTuneJobStatus, after: FineTuneJobStatus) -> None:
    """Counts what one status write says anew: ended attempts, interruptions, retries, and where time went."""
    for outcome in OUTCOMES:
        ended = after.endings.get(outcome, 0) - before.endings.get(outcome, 0)
        if ended > 0:
            ATTEMPTS.labels(outcome).inc(ended)
    INTERRUPTIONS.inc(max(0, (after.interruptions or 0) - (before.interruptions or 0)))
    failed_again = (after.failures or 0) > (before.failures or 0) and after.next_attempt_time is not None
    if after.plan is not None and failed_again and after.failure is not None:
        RETRIES.labels(after.failure.failure_class).inc()
    if after.goodput is None:
        return
    for field, part in PARTS.items():
        seconds = getattr(after.goodput, field) - (getattr(before.goodput, field) if before.goodput is not None else 0)
        JOB_SECONDS.labels(part=part).inc(max(0, seconds))
