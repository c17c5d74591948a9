"""The training run of one process, from the local files to the artifact. The main flow of the trainer."""

from __future__ import annotations

import shutil

import torch
from transformers import PreTrainedTokenizerFast, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from finetune_api.documents import Stage
from finetune_api.failures import FinetuneError
from finetune_api.job import Precision
from finetune_api.runfile import RunFile
from finetune_trainer.agent.timekeeping import Activity
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.data import Encoded, load_dataset
from finetune_trainer.worker import resume
from finetune_trainer.worker.arguments import check_accelerator, training_arguments
from finetune_trainer.worker.batches import Split
from finetune_trainer.worker.boundary import StepBoundary
from finetune_trainer.worker.carry import Carry
from finetune_trainer.worker.engine import Engine
from finetune_trainer.worker.evaluate.best import BestPolicy, keep_weights, take_best
from finetune_trainer.worker.evaluate.generation import Generator
from finetune_trainer.worker.evaluate.measuring import Measurement, Measurer, evaluates_only, logged_metrics
from finetune_trainer.worker.evaluate.names import check_evaluation
from finetune_trainer.worker.experts import has_separate_experts
from finetune_trainer.worker.faults import Stopped
from finetune_trainer.worker.features import Features
from finetune_trainer.worker.guards import LossGuard, in_force
from finetune_trainer.worker.heartbeat import Heartbeat
from finetune_trainer.worker.log import Log
from finetune_trainer.worker.objectives import make_objective, objective_class
from finetune_trainer.worker.packing import arrange_packing, with_steps_of
from finetune_trainer.worker.progress import Progress
from finetune_trainer.worker.publish import publish
from finetune_trainer.worker.ranks import Ranks
from finetune_trainer.worker.report import Outcome
from finetune_trainer.worker.supervision import SavePolicy, Supervision
from finetune_trainer.worker.tokenizers import prepare_tokenizer
from finetune_trainer.worker.tuning import parameter_shares, prepare_tuning
from finetune_trainer.worker.zero import check_zero


def train(run: RunFile, work: WorkDir, ranks: Ranks, heartbeat: Heartbeat, log: Log) -> None:
    """Train, evaluate and publish; raises FinetuneError, Stopped among them after a checkpoint."""
    disable_progress_bar()
    planned, run = run, in_force(run, work.guards())
    check_run(run, ranks)
    supervision = supervise(run, work, ranks, heartbeat)
    restored = resume.resume_folder(work)
    if restored:
        hp = run.hyperparameters
        resume.require_state(restored, ranks, zero=hp.zero_stage > 0, scaled=hp.precision is Precision.FP16)
    with heartbeat.long_phase():
        supervision.progress.stage(Stage.LOADING)
        tokenizer = prepare_tokenizer(run, work)
        data = load_dataset(run, work.inputs, tokenizer, beat=lambda: read_on(supervision))
        data = arrange_packing(run, data, work.inputs, ranks)
        run = with_steps_of(run, data)
        supervision.run_to(run.hyperparameters.total_steps)
        resume.require_same_steps(supervision.carry, step_records=run.global_batch_size, epoch_records=len(data.train))
        announce(run, data, ranks, log)
        engine = build_engine(run, supervision, data, tokenizer)
    log.info("loaded", records=len(data.train), held_out=len(data.validation), **parameter_shares(engine.model))

    if evaluates_only(run):
        # What the library does before the first step: passes by autocast, but no gradients to share.
        engine.model_wrapped = engine.accelerator.prepare_model(engine.model, evaluation_mode=True)
        boundary_of(engine).measure_base()
    else:
        heartbeat.doing(Activity.RESTORING if restored else Activity.LOADING)
        engine.train(resume_from_checkpoint=str(restored) if restored else None)
    leave_if_asked(engine)
    supervision.progress.stage(Stage.EVALUATING)
    heartbeat.doing(Activity.EVALUATING)
    outcome = measure(engine, run)
    leave_if_asked(engine)
    supervision.progress.stage(Stage.PUBLISHING)
    heartbeat.doing(Activity.PUBLISHING)
    with heartbeat.long_phase():
        publish(engine, planned, data, outcome)
    log.info("published", artifact=outcome.artifact, base_eval_loss=outcome.base_eval_loss, eval_loss=outcome.eval_loss)


def check_run(run: RunFile, ranks: Ranks) -> None:
    """Refuse what this release cannot do, before anything is loaded."""
    objective_class(run)
    check_evaluation(run)
    if ranks.world_size != run.world_size:
        raise FinetuneError(f"The run file plans {run.world_size} processes, but {ranks.world_size} were started.")
    check_zero(run)
    check_accelerator(run, ranks)


def supervise(run: RunFile, work: WorkDir, ranks: Ranks, heartbeat: Heartbeat) -> Supervision:
    """Heartbeat, progress, guards, and what an earlier attempt left."""
    for folder in (work.checkpoints, work.stop_file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    restored = resume.resume_folder(work)
    total = run.hyperparameters.total_steps
    resumed = resume.resumed_step(restored)
    progress = Progress(
        work.state / "progress.json" if ranks.is_node_main else None,
        total_steps=total,
        resumed_from_step=resumed,
    )
    supervision = Supervision(
        work=work,
        ranks=ranks,
        heartbeat=heartbeat,
        progress=progress,
        save_policy=SavePolicy.of(run.checkpoint),
        carry=Carry.load(restored) if restored else Carry(),
        total_steps=total,
        zero_stage=run.hyperparameters.zero_stage,
        guards=work.guards(),
    )
    BestPolicy.of(run).adopt(supervision.carry)
    if restored and supervision.carry.best_steps[:1] == [resumed]:
        keep_weights(restored, supervision)
    return supervision


def read_on(supervision: Supervision) -> None:
    """A sign of life while the data is read. Raises Stopped if this node was asked to stop: nothing is made yet."""
    supervision.heartbeat.beat()
    if supervision.stop_asked():
        raise Stopped("Stopped as asked while the data was read.")


def announce(run: RunFile, data: Encoded, ranks: Ranks, log: Log) -> None:
    """Say once where each setting came from, and show one record with the part that the loss counts."""
    if ranks.is_main:
        for field, reason in Features.of(run).off.items():
            log.warning("feature-off", field=field, reason=reason)
        for setting in run.settings:
            log.info("setting", **{str(key): value for key, value in setting.items() if key != "event"})
        if data.stats.packing:
            log.info("setting", field="hyperparameters.packing", value=data.stats.packing, source="trainer")
        log.info("sample", text=data.sample)


def build_engine(run: RunFile, supervision: Supervision, data: Encoded, tokenizer: PreTrainedTokenizerFast) -> Engine:
    """The engine with model, data and callbacks in place, ready to train."""
    scratch = supervision.work.checkpoints / ".partial"
    if supervision.ranks.is_node_main:
        shutil.rmtree(scratch, ignore_errors=True)
    arguments = training_arguments(run, supervision.ranks, scratch, evaluates=bool(data.validation))
    if run.hyperparameters.zero_stage > 0:
        resume.allow_zero_state()
    # A seed of its own, so that the adapter starts the same however much randomness came before.
    torch.manual_seed(run.hyperparameters.seed)
    device = None if arguments.device.type == "cpu" else arguments.device
    objective = make_objective(run, data, tokenizer)
    base = objective.load_model(supervision.work.inputs / "model", device)
    model = prepare_tuning(base, run, tokenizer, supervision.work)
    # An expert without tokens gets no gradient; data parallelism would wait for it.
    arguments.ddp_find_unused_parameters = has_separate_experts(model)
    generator = Generator(run.evaluation.generation, tokenizer, run.hyperparameters.seed)
    boundary = StepBoundary(Measurer(run, data, generator, tokenizer), BestPolicy.of(run), LossGuard(run))
    engine = Engine(
        model=model,
        args=arguments,
        supervision=supervision,
        objective=objective,
        split=Split.of(run, supervision.ranks),
        train=data.train,
        validation=data.validation,
        data_collator=None,
        callbacks=[boundary],
    )
    engine.remove_callback(PrinterCallback)
    boundary.attach(engine)
    return engine


def leave_if_asked(engine: Engine) -> None:
    """Raises Stopped on all ranks if any was asked to stop; the last step made has its checkpoint by now."""
    engine.agree_on_stop()
    if engine.agreement.stop:
        raise Stopped(f"Stopped as asked after step {engine.state.global_step}; its checkpoint is complete.")


def boundary_of(engine: Engine) -> StepBoundary:
    """The engine's own callback."""
    return next(callback for callback in engine.callback_handler.callbacks if isinstance(callback, StepBoundary))


def measure(engine: Engine, run: RunFile) -> Outcome:
    """The best model is in place, where that is asked for, and measured beside the base."""
    boundary, base = boundary_of(engine), Measurement(**engine.supervision.carry.base)
    measurer, step = boundary.measurer, engine.state.global_step
    if evaluates_only(run):
        tuned = measurer.measure(engine) if hasattr(engine.model, "peft_config") else base
    else:
        known = _known(engine)
        if boundary.best.keep and take_best(engine):
            known, step = None, engine.supervision.carry.best_steps[0]
        tuned = measurer.measure(engine, known)
    outcome = Outcome.of(engine, measurer, base, tuned, step)
    engine.supervision.progress.update(eval_loss=outcome.eval_loss)
    return outcome


def _known(engine: Engine) -> dict[str, float] | None:
    """Metrics on the held-out records after the last step, measured now if they were not yet."""
    if engine.eval_dataset is None:
        return None
    last = engine.state.global_step
    for entry in reversed(engine.state.log_history):
        if "eval_loss" in entry and entry.get("step") == last:
            return logged_metrics(entry)
    return logged_metrics(engine.evaluate())
