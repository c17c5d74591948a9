"""Progress as people read it: "42% 420/1000", "1.234", "2h04m". Pure."""

from __future__ import annotations

from finetune_api.documents import ProgressDocument, Spent, Stage, TerminationMessage
from finetune_api.guards import GuardState, Rollback, RollbackReason
from finetune_api.status import Progress, TimeSpent

SUCCEEDED = "Succeeded"
ROLLED_BACK = "RolledBack"
_WHAT_THE_LOSS_DID = {
    RollbackReason.SPIKE: "rose",
    RollbackReason.PLATEAU: "rose and stayed high",
    RollbackReason.NON_FINITE: "was not finite",
}


def running(document: ProgressDocument, now: str, planned_batch: tuple[int, int] | None = None) -> Progress:
    """What a running trainer says of itself; `now` is an RFC 3339 time.

    planned_batch: micro batch and accumulation.
    """
    guards = document.guards or GuardState()
    rollbacks = guards.rollbacks
    micro_batch = None
    if planned_batch is not None and guards.micro_batch_divisor > 1:
        micro_batch, _ = guards.split(*planned_batch)
    return Progress(
        attempt=document.attempt,
        stage=document.stage.value,
        step=document.step,
        total_steps=document.total_steps,
        epoch=document.epoch,
        percent=percent(document.step, document.total_steps),
        loss=document.loss,
        eval_loss=document.eval_loss,
        learning_rate=document.learning_rate,
        tokens_per_second=document.tokens_per_second,
        eta_seconds=document.eta_seconds,
        checkpoint_step=document.checkpoint_step,
        resumed_from_step=document.resumed_from_step,
        micro_batch_size=micro_batch,
        rollbacks=len(rollbacks) or None,
        last_rollback=rollback_text(rollbacks[-1]) if rollbacks else None,
        spent=time_spent(document.spent) if document.spent is not None else None,
        summary=summary(document.step, document.total_steps, document.stage.value),
        loss_text=loss_text(document.loss),
        eta=duration(document.eta_seconds),
        update_time=now,
    )


def ended(
    message: TerminationMessage | None, attempt: int, total_steps: int, shown: Progress | None, now: str
) -> Progress | None:
    """The last word of an attempt whose pod has ended, or None where nobody knows how far it came.

    shown: what status says of the same attempt; what the message leaves out is kept from it, but for the ETA and for
    checkpoints, which a guard may have undone.
    """
    step = message.step if message else None
    if step is None:
        if shown is None:
            return None
        step = 0 if message is not None and message.outcome == ROLLED_BACK else shown.step
    total = max(shown.total_steps if shown else total_steps, step)
    stage = shown.stage if shown else Stage.TRAINING.value
    done = message is not None and message.outcome == SUCCEEDED
    if done:
        stage = Stage.DONE.value
    news: dict[str, str | int | float | TimeSpent | None] = {
        "attempt": attempt,
        "stage": stage,
        "step": step,
        "total_steps": total,
        "percent": 100 if done and total == 0 else percent(step, total),  # an evaluation takes no steps
        "summary": summary(step, total, stage),
        "update_time": now,
    }
    if message:
        news |= {"checkpoint_step": message.checkpoint_step, "resumed_from_step": message.resumed_from_step}
    if message and message.eval_loss is not None:
        news["eval_loss"] = message.eval_loss
    if message and message.spent is not None:
        news["spent"] = time_spent(message.spent)
    kept = shown.model_dump(exclude={"eta", "eta_seconds"}) if shown else {}
    return Progress.model_validate({**kept, **news})


def same(one: Progress | None, other: Progress) -> bool:
    """Whether both say the same, whenever they said it. That time passed is no news by itself."""
    if one is None:
        return False
    return one.model_copy(update={"update_time": other.update_time, "spent": other.spent}) == other


def rollback_text(rollback: Rollback) -> str:
    """One sentence about a return to an earlier checkpoint."""
    return (
        f"the loss {_WHAT_THE_LOSS_DID[rollback.reason]} at step {rollback.onset_step}: the run went back to step "
        f"{rollback.to_step}, with {rollback.factor:g} of the learning rate up to step {rollback.until_step}"
    )


def time_spent(spent: Spent) -> TimeSpent:
    """Whole seconds, rounded down."""
    return TimeSpent(**{f"{name}_seconds": int(seconds) for name, seconds in spent})


def percent(step: int, total: int) -> int:
    """Whole percent, rounded down: 100 is said only at the end."""
    return min(100, 100 * step // total) if total > 0 else 0


def summary(step: int, total: int, stage: str) -> str:
    """ "42% 420/1000", or the stage while the number of steps is not known."""
    return f"{percent(step, total)}% {step}/{total}" if total > 0 else stage


def loss_text(loss: float | None) -> str:
    """Three decimals, or three digits where the loss is large; empty where there is none."""
    if loss is None:
        return ""
    return f"{loss:.3f}" if abs(loss) < 1000 else f"{loss:.3g}"


def duration(seconds: int | None) -> str:
    """ "45s", "12m", "2h04m", "3d04h"; empty where it is not known."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds}s"
    minutes = seconds // 60
    if minutes < 60:
        return f"{minutes}m"
    hours = minutes // 60
    if hours < 24:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"
