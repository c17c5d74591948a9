"""What preflight is asked to check: the job's places and the settings that decide whether its data can be used."""

from __future__ import annotations

from finetune_api.job import FineTuneJobSpec, ObjectiveType, OnExisting
from finetune_api.planner.objective import max_new_tokens
from finetune_api.planner.pretrain import default_tokenizer, draws_windows, joins_text
from finetune_api.planner.references import References, spec_digest
from finetune_api.runfile import InputKind, PreflightFile, PreflightInput, Reference, RunJob, RunPublish


def preflight_file(spec: FineTuneJobSpec, job: RunJob, references: References, *, local: bool = False) -> PreflightFile:
    """What preflight has to check."""
    return PreflightFile(
        job=job,
        spec_digest=spec_digest(spec),
        model=references.model,
        task=spec.task,
        objective=spec.objective_type,
        tuning=spec.tuning_type,
        sources=references.sources,
        validation=references.validation,
        further=further_inputs(spec, references),
        lora=spec.tuning.lora if spec.tuning is not None else None,
        soft_prompt=spec.tuning.soft_prompt if spec.tuning is not None else None,
        ia3=spec.tuning.ia3 if spec.tuning is not None else None,
        full=spec.tuning.full if spec.tuning is not None else None,
        loss_on=spec.dataset.loss_on,
        truncation=spec.dataset.truncation,
        max_sequence_length=spec.hyperparameters.max_sequence_length if spec.hyperparameters else None,
        max_source_tokens=spec.dataset.max_source_tokens,
        max_target_tokens=spec.dataset.max_target_tokens,
        new_tokens=max_new_tokens(spec),
        validation_fraction=spec.dataset.validation.fraction if spec.dataset.validation else None,
        test_fraction=spec.dataset.test.fraction if spec.dataset.test else None,
        max_bad_share=spec.dataset.max_bad_share or 0.0,
        max_cut_share=1.0 if spec.dataset.max_cut_share is None else spec.dataset.max_cut_share,
        format=spec.dataset.format,
        columns=spec.dataset.columns,
        prompt_template=spec.dataset.prompt_template,
        pretrain_tokenizer=default_tokenizer(spec) if spec.objective_type == ObjectiveType.PRETRAIN else None,
        random_windows=draws_windows(spec),
        joins_text=joins_text(spec),
        output=references.output,
        publish=_publish(spec, references),
        on_existing=spec.output.on_existing or OnExisting.FAIL,
        local=local,
    )


def _publish(spec: FineTuneJobSpec, references: References) -> RunPublish | None:
    if spec.output.publish is None or references.publish is None:
        return None
    return RunPublish(target=references.publish, public=bool(spec.output.publish.public))


def further_inputs(spec: FineTuneJobSpec, references: References) -> list[PreflightInput]:
    """What a run reads beside its base model and its records, in the order of the run file's inputs."""
    found: list[tuple[InputKind, str, Reference | None]] = [
        (InputKind.ADAPTER, "model.adapter.uri", references.adapter),
        (InputKind.MODEL, "objective.distillation.teacher.uri", references.teacher),
    ]
    for number, reward in enumerate(references.rewards):
        found.append((InputKind.MODEL, f"objective.{spec.objective_type.lower()}.rewards[{number}].model.uri", reward))
    found.append((InputKind.DATA, "dataset.test.source.uri", references.test))
    found.append((InputKind.DATA, "evaluation.retention.uri", references.retention))
    inputs = [
        PreflightInput(kind=kind, field=path, reference=reference)
        for kind, path, reference in found
        if reference is not None
    ]
    wanted = (spec.evaluation.benchmarks if spec.evaluation is not None else None) or []
    for number, (run, reference) in enumerate(zip(wanted, references.benchmarks, strict=True)):
        path = f"evaluation.benchmarks[{number}].source.uri"
        inputs.append(PreflightInput(kind=InputKind.DATA, field=path, reference=reference, benchmark=run.name))
    return inputs
