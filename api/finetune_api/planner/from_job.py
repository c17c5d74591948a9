"""fromJob: the artifact of an earlier FineTuneJob in place of a model's URI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finetune_api.failures import FinetuneError
from finetune_api.job import FineTuneJobSpec, Model, ObjectiveType, Task, TuningType
from finetune_api.model import AdapterReference, FurtherModel
from finetune_api.status import ConditionType, FineTuneJobStatus, ResolvedModel

BASE = "model"
TEACHER = "objective.distillation.teacher"
# Objectives that can start from a base with an adapter on it; the others need a whole model.
TAKES_ADAPTER = (
    ObjectiveType.SUPERVISED,
    ObjectiveType.EVALUATION,
    ObjectiveType.DPO,
    ObjectiveType.ORPO,
    ObjectiveType.KTO,
    ObjectiveType.PPO,
    ObjectiveType.GRPO,
)
# Those of them whose reference is base and adapter as they were at the start, which stage 3 would shard.
_KEEPS_ITS_START = (ObjectiveType.DPO, ObjectiveType.KTO)


class NotFinished(Exception):
    """The named job has no artifact yet."""


def named_jobs(spec: FineTuneJobSpec) -> dict[str, str]:
    """Spec path of each model that names a job, and the job's name."""
    return {path: model.from_job for path, model in _models(spec) if model.from_job is not None}


def takes_adapter(spec: FineTuneJobSpec) -> bool:
    """Whether the job can start from a base with an adapter on it."""
    return spec.tuning_type != TuningType.FULL and spec.objective_type in TAKES_ADAPTER


def keeps_its_start(spec: FineTuneJobSpec) -> bool:
    """Whether the run keeps an earlier adapter as it was at the start, so that stage 3 cannot shard it."""
    return spec.model.adapter is not None and spec.objective_type in _KEEPS_ITS_START


def resolve(
    spec: FineTuneJobSpec, path: str, earlier: tuple[FineTuneJobSpec | None, FineTuneJobStatus] | None
) -> ResolvedModel:
    """What the fromJob at path stands for; earlier: spec and status of the job that it names, None if there is none.

    Raises NotFinished where waiting may help, FinetuneError(InvalidSpec) with the field where it cannot.
    """
    name = named_jobs(spec)[path]
    if earlier is None:
        raise NotFinished(
            f"{path}.fromJob: there is no FineTuneJob {name} in this namespace; create it or correct the name"
        )
    found, status = earlier
    if not status.is_true(ConditionType.SUCCEEDED):
        if status.plan is not None and status.is_true(ConditionType.FINISHED):
            raise _invalid(path, f"FineTuneJob {name} ended without success; name one that succeeded")
        raise NotFinished(f"{path}.fromJob: FineTuneJob {name} has not finished yet")
    if status.artifacts is None or found is None or found.objective_type == ObjectiveType.EVALUATION:
        raise _invalid(path, f"FineTuneJob {name} made no model; name one that tuned a model")
    task = None if found.task == Task.CAUSAL_LM else found.task.value
    adapter, whole = status.artifacts.adapter, status.artifacts.model
    if adapter is not None and path == BASE and takes_adapter(spec):
        base = with_resolved(found, status.resolved).model
        if base.uri is None:
            raise _invalid(
                path, f"the base of FineTuneJob {name} is not known any more; write model.uri and model.adapter"
            )
        return ResolvedModel(field=path, job=name, uri=base.uri, revision=base.revision, adapter=adapter, task=task)
    if whole is None:
        raise _invalid(
            path, f"FineTuneJob {name} made an adapter only; run it with output.mergeAdapter: true for a whole model"
        )
    return ResolvedModel(field=path, job=name, uri=whole, task=task)


def with_resolved(spec: FineTuneJobSpec, resolved: Sequence[ResolvedModel]) -> FineTuneJobSpec:
    """The spec with a URI beside each fromJob that is resolved."""
    by_path = {item.field: item for item in resolved}
    if not by_path:
        return spec
    changed = spec.model_copy(update={"model": _base(spec.model, by_path.get(BASE))})
    if spec.objective is None:
        return changed
    members: dict[str, object] = {}
    if (distillation := spec.objective.distillation) is not None:
        teacher = _further(distillation.teacher, by_path.get(TEACHER))
        members["distillation"] = distillation.model_copy(update={"teacher": teacher})
    for name in ("ppo", "grpo"):
        settings = getattr(spec.objective, name)
        if settings is not None:
            rewards = [
                term.model_copy(update={"model": _further(term.model, by_path.get(_reward(name, number)))})
                if term.model is not None
                else term
                for number, term in enumerate(settings.rewards)
            ]
            members[name] = settings.model_copy(update={"rewards": rewards})
    return changed.model_copy(update={"objective": spec.objective.model_copy(update=members)})


def _models(spec: FineTuneJobSpec) -> Iterator[tuple[str, FurtherModel]]:
    yield BASE, spec.model
    if spec.objective is None:
        return
    if spec.objective.distillation is not None:
        yield TEACHER, spec.objective.distillation.teacher
    for name in ("ppo", "grpo"):
        settings = getattr(spec.objective, name)
        for number, term in enumerate(settings.rewards if settings is not None else []):
            if term.model is not None:
                yield _reward(name, number), term.model


def _reward(name: str, number: int) -> str:
    return f"objective.{name}.rewards[{number}].model"


def _further(model: FurtherModel, found: ResolvedModel | None) -> FurtherModel:
    if found is None or model.from_job != found.job:
        return model
    return model.model_copy(update={"uri": found.uri, "revision": found.revision})


def _base(model: Model, found: ResolvedModel | None) -> Model:
    if found is None or model.from_job != found.job:
        return model
    return model.model_copy(
        update={
            "uri": found.uri,
            "revision": found.revision,
            "adapter": AdapterReference(uri=found.adapter) if found.adapter is not None else None,
            "task": Task(found.task) if found.task is not None and model.task is None else model.task,
        }
    )


def _invalid(path: str, message: str) -> FinetuneError:
    return FinetuneError(f"{path}.fromJob: {message}", failure_class="InvalidSpec", field=f"spec.{path}.fromJob")
