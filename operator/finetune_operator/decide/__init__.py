"""What should happen next. Pure: no clock, no I/O, no randomness; the time comes with the snapshot.

`decide` is the whole flow of a job's life; each concern has a file of its own.
"""

from finetune_api.status import ConditionType
from finetune_operator.actions import Decision
from finetune_operator.config import Config
from finetune_operator.decide import attempt, finished, launch, planning, preflight, sight, stopping
from finetune_operator.decide.draft import Draft
from finetune_operator.snapshot import Snapshot

__all__ = ["decide"]


def decide(seen: Snapshot, config: Config) -> Decision:
    """The next step of the job's life. Asked again with what that step led to, it ends up asking for nothing."""
    draft = Draft(seen, config)
    status = seen.status
    if seen.job.deleting:
        return stopping.for_deletion(seen)
    if not status.conditions:
        return sight.first(seen)
    if status.plan is not None and status.is_true(ConditionType.FINISHED):
        finished.keep(draft)
    elif status.plan is not None and seen.job.spec is None:
        sight.unreadable(draft)
    elif status.plan is not None and status.current is not None:
        attempt.go_on(draft)
    elif status.plan is not None:
        launch.next_attempt(draft)
    elif stopping.before_plan(draft):
        pass
    elif status.observed_generation != seen.job.generation:
        draft.start_over()
    elif preflight.refused_for_good(draft) or planning.refused_by_the_spec(draft):
        pass
    elif status.preflight is not None and status.preflight.ok:
        planning.plan(draft)
    else:
        preflight.go_on(draft)
    return draft.decision()
