"""The contract with the pinned libraries: where our engine takes hold, they must look as they did."""

from __future__ import annotations

from tests.train.worker.runs import in_child

SIGNATURES = {
    "get_train_dataloader": "(self)",
    "create_scheduler": "(self, num_training_steps, optimizer)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "get_batch_samples": "(self, epoch_iterator, num_batches, device)",
    "_get_num_items_in_batch": "(self, batch_samples, device)",
    "log": "(self, logs, start_time)",
    "training_step": "(self, model, inputs, num_items_in_batch)",
    "compute_loss": "(self, model, inputs, return_outputs, num_items_in_batch)",
    "_clip_grad_norm": "(self, model)",
    "_save_checkpoint": "(self, model, trial)",
    "_evaluate": "(self, trial, ignore_keys_for_eval, skip_scheduler)",
    "get_eval_dataloader": "(self, eval_dataset)",
    "evaluation_loop": "(self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)",
    "_load_rng_state": "(self, checkpoint)",
    "_init_training_state": "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, "
    "trial)",
    "_issue_warnings_after_load": "(self, load_result)",
}


def test_each_seam_has_the_signature_that_the_engine_overrides() -> None:
    library, ours = in_child(_signatures)
    assert library == SIGNATURES
    assert ours == SIGNATURES


def _signatures() -> tuple[dict[str, str], dict[str, str]]:
    import inspect

    from transformers import Trainer

    from finetune_trainer.worker.engine import Engine

    found = []
    for owner in (Trainer, Engine):
        found.append({name: f"({', '.join(inspect.signature(vars(owner)[name]).parameters)})" for name in SIGNATURES})
    return found[0], found[1]


def test_one_step_calls_the_seams_in_this_order() -> None:
    """Agreement comes before the backward pass, the save after the step: what the guards rest upon."""
    assert in_child(_order_in_source) == [
        "loss before backward",
        "clip before the optimizer's step",
        "step before saving",
        "evaluate before save",
    ]


def _order_in_source() -> list[str]:
    import inspect

    from transformers import Trainer

    def before(function: object, first: str, second: str) -> bool:
        text = inspect.getsource(function)  # type: ignore[arg-type]
        return 0 <= text.index(first) < text.index(second)

    checks = {
        "loss before backward": before(Trainer.training_step, "self.compute_loss(", "self.accelerator.backward("),
        "clip before the optimizer's step": before(Trainer._run_epoch, "self._clip_grad_norm(", "self.optimizer.step("),
        "step before saving": before(Trainer._run_epoch, "self.optimizer.step(", "self._maybe_log_save_evaluate("),
        "evaluate before save": before(Trainer._maybe_log_save_evaluate, "self._evaluate(", "self._save_checkpoint("),
    }
    return [name for name, holds in checks.items() if holds]


def test_the_switches_that_the_zero_recipe_turns_are_there() -> None:
    assert in_child(_switches) == (True, True, True)


def _switches() -> tuple[bool, bool, bool]:
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from accelerate.utils import other
    from bitsandbytes.nn import Linear4bit
    from deepspeed.ops import __compatible_ops__

    assert deepspeed.__version__
    return (
        "deepspeed_shm_comm" in __compatible_ops__,
        hasattr(other, "is_deepspeed_available"),
        hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu"),
    )
