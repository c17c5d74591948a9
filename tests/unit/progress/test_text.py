"""Progress as people read it in `kubectl get ftj`."""

from __future__ import annotations

import pytest

from finetune_api.documents import ProgressDocument, Spent, Stage, TerminationMessage
from finetune_api.guards import GuardState, Rollback, RollbackReason
from finetune_api.status import Progress, TimeSpent
from finetune_operator.progress import text

NOW = "2026-01-01T00:00:00Z"


def shown(**facts: object) -> Progress:
    """Status at step 420 of 1000."""
    document = ProgressDocument(
        attempt=2,
        stage=Stage.TRAINING,
        step=420,
        total_steps=1000,
        loss=1.2344,
        eval_loss=1.5,
        eta_seconds=7440,
        checkpoint_step=400,
    )
    return text.running(document.model_copy(update=facts), NOW)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, ""),
        (0, "0s"),
        (59, "59s"),
        (60, "1m"),
        (3599, "59m"),
        (3600, "1h00m"),
        (7440, "2h04m"),
        (86399, "23h59m"),
        (86400, "1d00h"),
        (273600, "3d04h"),
    ],
)
def test_an_eta_is_short(seconds: int | None, said: str) -> None:
    assert text.duration(seconds) == said


@pytest.mark.parametrize(
    ("loss", "said"), [(None, ""), (1.2344, "1.234"), (0.0, "0.000"), (999.9, "999.900"), (12345.6, "1.23e+04")]
)
def test_a_loss_has_three_decimals_or_three_digits(loss: float | None, said: str) -> None:
    assert text.loss_text(loss) == said


@pytest.mark.parametrize(
    ("step", "total", "said"),
    [(0, 1000, 0), (420, 1000, 42), (999, 1000, 99), (1000, 1000, 100), (1200, 1000, 100), (5, 0, 0)],
)
def test_a_hundred_percent_is_said_only_at_the_end(step: int, total: int, said: int) -> None:
    assert text.percent(step, total) == said


def test_the_columns_of_a_running_job() -> None:
    progress = shown()
    assert (progress.summary, progress.loss_text, progress.eta) == ("42% 420/1000", "1.234", "2h04m")


def test_the_stage_is_shown_while_the_number_of_steps_is_unknown() -> None:
    assert shown(stage=Stage.LOADING, step=0, total_steps=0).summary == "Loading"


def test_what_the_trainer_does_not_know_is_absent() -> None:
    assert "gradNorm" not in shown().to_json()
    assert "loss" not in shown(loss=None).to_json()


def test_only_the_time_differs_is_the_same() -> None:
    later = shown().model_copy(update={"update_time": "2026-01-01T00:00:10Z"})
    assert text.same(shown(), later)
    assert not text.same(shown(), later.model_copy(update={"step": 421}))
    assert not text.same(None, later)


def test_a_success_ends_at_its_last_step_without_an_eta() -> None:
    message = TerminationMessage(outcome="Succeeded", step=1000, checkpoint_step=1000, eval_loss=1.1)
    last = text.ended(message, 2, 1000, shown(), NOW)
    assert last is not None
    assert (last.summary, last.stage, last.eta, last.eta_seconds) == ("100% 1000/1000", "Done", "", None)
    assert (last.loss_text, last.checkpoint_step, last.eval_loss) == ("1.234", 1000, 1.1)


def test_a_run_too_short_to_be_asked_still_shows_its_steps() -> None:
    last = text.ended(TerminationMessage(outcome="Succeeded", step=20), 1, 20, None, NOW)
    assert last is not None
    assert (last.attempt, last.summary, last.stage) == (1, "100% 20/20", "Done")


def test_an_evaluation_takes_no_steps_and_is_whole_at_its_end() -> None:
    shown_before = shown(stage=Stage.EVALUATING, step=0, total_steps=0)
    assert (shown_before.summary, shown_before.percent) == ("Evaluating", 0)
    last = text.ended(TerminationMessage(outcome="Succeeded", artifact="report"), 2, 0, shown_before, NOW)
    assert last is not None
    assert (last.summary, last.percent, last.stage) == ("Done", 100, "Done")


def test_a_failure_keeps_stage_and_step_and_drops_the_eta() -> None:
    for message in (None, TerminationMessage(outcome="Hang")):
        last = text.ended(message, 2, 1000, shown(), NOW)
        assert last is not None
        assert (last.summary, last.stage, last.eta) == ("42% 420/1000", "Training", "")


def test_a_gang_that_goes_back_to_the_beginning_has_neither_steps_nor_a_checkpoint() -> None:
    last = text.ended(TerminationMessage(outcome="RolledBack"), 2, 1000, shown(resumed_from_step=300), NOW)
    assert last is not None
    assert (last.summary, last.checkpoint_step, last.resumed_from_step) == ("0% 0/1000", None, None)


def test_a_checkpoint_that_a_guard_undid_since_is_not_shown_at_the_end() -> None:
    last = text.ended(TerminationMessage(outcome="Stopped", step=15), 2, 1000, shown(resumed_from_step=300), NOW)
    assert last is not None
    assert (last.step, last.checkpoint_step, last.resumed_from_step) == (15, None, None)


def test_nothing_is_made_up_where_nobody_knows() -> None:
    assert text.ended(None, 2, 1000, None, NOW) is None
    assert text.ended(TerminationMessage(outcome="Internal"), 2, 1000, None, NOW) is None


def guarded(**fields: object) -> ProgressDocument:
    """A document of a run that guards have changed."""
    rollback = Rollback(reason=RollbackReason.SPIKE, onset_step=40, to_step=30, until_step=50, factor=0.5)
    guards = GuardState.model_validate({"rollbacks": (rollback,), **fields})
    return ProgressDocument(attempt=1, stage=Stage.TRAINING, step=45, total_steps=100, guards=guards)


def test_what_guards_changed_is_shown() -> None:
    progress = text.running(guarded(micro_batch_divisor=4), NOW, (8, 2))
    assert (progress.rollbacks, progress.micro_batch_size) == (1, 2)
    assert progress.last_rollback == (
        "the loss rose at step 40: the run went back to step 30, with 0.5 of the learning rate up to step 50"
    )


def test_nothing_is_shown_of_guards_that_changed_nothing() -> None:
    document = ProgressDocument(attempt=1, stage=Stage.TRAINING, step=45, total_steps=100, guards=GuardState())
    shown_json = text.running(document, NOW, (8, 2)).to_json()
    assert not {"rollbacks", "lastRollback", "microBatchSize"} & set(shown_json)
    assert text.running(guarded(), NOW, None).micro_batch_size is None


@pytest.mark.parametrize("reason", RollbackReason)
def test_every_reason_to_roll_back_has_words(reason: RollbackReason) -> None:
    rollback = Rollback(reason=reason, onset_step=4, to_step=3, until_step=5, factor=0.5)
    assert "at step 4" in text.rollback_text(rollback)


def test_every_part_of_the_time_is_shown_in_whole_seconds() -> None:
    spent = Spent(start=1.9, restore=2, train=3.5, evaluate=4, save=5, redo=6.99)
    assert text.time_spent(spent) == TimeSpent(
        start_seconds=1, restore_seconds=2, train_seconds=3, evaluate_seconds=4, save_seconds=5, redo_seconds=6
    )
    assert len(TimeSpent.model_fields) == len(Spent.model_fields), "status would drop a part that it has no field for"


def test_time_that_passes_is_no_news_but_is_kept_at_the_end() -> None:
    one = shown(spent=Spent(start=10.9))
    other = shown(spent=Spent(start=20.9))
    assert one.spent == TimeSpent(start_seconds=10)
    assert text.same(one, other)
    message = TerminationMessage(outcome="Stopped", resumed_from_step=400, spent=Spent(start=21, train=30))
    last = text.ended(message, 2, 1000, other, NOW)
    assert last is not None
    assert (last.resumed_from_step, last.spent) == (400, TimeSpent(start_seconds=21, train_seconds=30))
    silent = text.ended(None, 2, 1000, other, NOW)
    assert silent is not None and silent.spent == TimeSpent(start_seconds=20)
