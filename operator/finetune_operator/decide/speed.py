"""Whether a run is slower than planned: a warning, never an end.

The plan knows no hours. So a run counts as slow where its own estimate of the time to its end exceeds what is left of
spec.deadlineSeconds, or where it makes less than half the tokens per second of the job's best earlier attempt. Once
told, the warning stays until the run is clearly better, so that it does not come and go.
"""

from __future__ import annotations

from finetune_api.documents import Stage
from finetune_api.status import ConditionType, Current, Progress
from finetune_operator.decide import deadline
from finetune_operator.decide.draft import Draft

SLOWER = "SlowerThanPlanned"
OWN_STEPS = 20
SLOW_SHARE = 0.5
GOOD_SHARE = 0.6
GOOD_MARGIN = 0.9  # the estimate may take this share of what is left before the warning ends


def why_slow(draft: Draft, current: Current) -> str | None:
    """What to tell the owner where the attempt is slower than planned, else None."""
    progress = draft.seen.status.progress
    if progress is None or progress.attempt != current.number or progress.stage != Stage.TRAINING.value:
        return None
    if progress.step - (progress.resumed_from_step or 0) < OWN_STEPS:
        return None  # both figures are means since the start, and first steps are slow
    training = draft.seen.status.condition(ConditionType.TRAINING)
    told = training is not None and training.reason == SLOWER
    return _late(draft, progress, told=told) or _slow(draft, progress, told=told)


def _late(draft: Draft, progress: Progress, *, told: bool) -> str | None:
    left = deadline.seconds_left(draft)
    if left is None or progress.eta_seconds is None or progress.eta_seconds <= left * (GOOD_MARGIN if told else 1.0):
        return None
    # A moment and not what is left until it: the text must not change while nothing else does.
    return (
        f"the training needs about {progress.eta_seconds} s more, and spec.deadlineSeconds ends at "
        f"{deadline.end(draft)}; raise it while the job runs, or the job ends with DeadlineExceeded"
    )


def _slow(draft: Draft, progress: Progress, *, told: bool) -> str | None:
    best = max((entry.tokens_per_second or 0.0 for entry in draft.seen.status.attempts), default=0.0)
    speed = progress.tokens_per_second
    if speed is None or speed >= best * (GOOD_SHARE if told else SLOW_SHARE):
        return None
    return (
        f"the attempt makes {speed:.0f} tokens per second, and an earlier one made {best:.0f}; have the node looked "
        "at; cordon it and delete the attempt's Job to go on elsewhere, which uses up no retry"
    )
