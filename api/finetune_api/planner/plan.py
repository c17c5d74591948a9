"""The plan: the cheapest pool that fits, and the run file.

Without a pin, pools are tried by price; on each pool the smallest number of GPUs that fits is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune_api.failures import FinetuneError
from finetune_api.job import FineTuneJobSpec, Hyperparameters, ObjectiveType, Precision, Resources, Task, TuningType
from finetune_api.planner import memory, settings, support
from finetune_api.planner.references import References, spec_digest
from finetune_api.pool import GPUPoolSpec
from finetune_api.runfile import (
    RunDataset,
    RunFile,
    RunHyperparameters,
    RunJob,
    RunModel,
    RunOutput,
    RunResources,
)
from finetune_api.status import DataFacts, MemoryEstimate, ModelFacts, Plan, Preflight, Setting

CPU = "cpu"
MAX_PARAMETERS_ON_CPU = 10**9
MICRO_BATCHES = (8, 4, 2, 1)


@dataclass(frozen=True)
class Pool:
    """A GPUPool by name."""

    name: str
    spec: GPUPoolSpec

    @property
    def on_cpu(self) -> bool:
        """Whether the pool has no GPUs."""
        return self.spec.accelerator == CPU


@dataclass(frozen=True)
class Planned:
    """A plan for status and the run file that the trainer reads."""

    plan: Plan
    run: RunFile


@dataclass(frozen=True)
class _Fit:
    pool: Pool
    gpus: int
    nodes: int
    zero_stage: int
    micro_batch: int
    accumulation: int
    memory: MemoryEstimate
    settings: tuple[Setting, ...]


def make_plan(
    spec: FineTuneJobSpec,
    job: RunJob,
    preflight: Preflight,
    references: References,
    pools: Sequence[Pool],
    trainer_image: str,
) -> Planned:
    """Plan a run that preflight found good.

    Raises FinetuneError: UnsupportedField, InvalidSpec (settings that contradict each other), NoPoolFits (the message
    lists every pool and what it lacks).
    """
    refused = support.unsupported(spec)
    if refused:
        raise FinetuneError(
            "; ".join(item.message for item in refused), failure_class="UnsupportedField", field=refused[0].field
        )
    if preflight.model is None or preflight.data is None:
        raise FinetuneError("preflight did not describe model and data")
    fit, reason = _choose(spec, preflight.model, preflight.data, pools)
    return _write(spec, job, preflight.model, preflight.data, references, fit, reason, trainer_image)


def _choose(spec: FineTuneJobSpec, model: ModelFacts, data: DataFacts, pools: Sequence[Pool]) -> tuple[_Fit, str]:
    resources = spec.resources or Resources()
    candidates, reason = _candidates(resources, model, pools)
    fits: list[_Fit] = []
    lacks: list[str] = []
    for pool in candidates:
        found = _fit(spec, model, data, pool, resources)
        if isinstance(found, _Fit):
            fits.append(found)
        else:
            lacks.append(f"{pool.name}: {found}")
    if fits:
        best = min(fits, key=lambda f: (f.pool.spec.hourly_price_usd * f.gpus * f.nodes, f.gpus * f.nodes, f.pool.name))
        return best, reason
    lacks += [f"{pool.name}: {_skipped(pool, resources, model)}" for pool in pools if pool not in candidates]
    raise FinetuneError(
        "no pool fits: " + ("; ".join(lacks) or "the cluster has no GPUPool"),
        failure_class="NoPoolFits",
        field="spec.resources" if resources.pool is None else "spec.resources.pool",
    )


def _candidates(resources: Resources, model: ModelFacts, pools: Sequence[Pool]) -> tuple[list[Pool], str]:
    if resources.pool is not None:
        return [pool for pool in pools if pool.name == resources.pool], "set by the job"
    allowed = [pool for pool in pools if resources.spot or not pool.spec.spot]
    gpus = [pool for pool in allowed if not pool.on_cpu]
    if gpus:
        return gpus, "the cheapest pool that fits"
    small = [pool for pool in allowed if model.parameters <= MAX_PARAMETERS_ON_CPU]
    return small, "there are no GPU pools and the model is small enough for a CPU"


def _skipped(pool: Pool, resources: Resources, model: ModelFacts) -> str:
    if resources.pool is not None:
        return f"not asked for (resources.pool is {resources.pool})"
    if pool.spec.spot and not resources.spot:
        return "spot capacity, and resources.spot is not true"
    if model.parameters > MAX_PARAMETERS_ON_CPU:
        return "a CPU pool, and the model has more than a billion parameters"
    return "a CPU pool, taken only when pinned by resources.pool"


def _fit(spec: FineTuneJobSpec, model: ModelFacts, data: DataFacts, pool: Pool, resources: Resources) -> _Fit | str:
    """The smallest gang on this pool that holds the run, or what it lacks."""
    nodes = resources.nodes or 1
    if nodes > pool.spec.max_nodes:
        return f"has at most {pool.spec.max_nodes} nodes, {nodes} are asked for"
    lack = "no number of GPUs was possible"
    for gpus, zero_stage in _gangs(spec, pool, resources):
        if gpus > pool.spec.gpus_per_node:
            lack = f"has {pool.spec.gpus_per_node} GPUs per node, {gpus} are asked for"
            continue
        found = _batch(spec, model, data, pool, gpus, nodes, zero_stage)
        if isinstance(found, _Fit):
            return found
        lack = found
    return lack


def _gangs(spec: FineTuneJobSpec, pool: Pool, resources: Resources) -> Iterator[tuple[int, int]]:
    hp = spec.hyperparameters or Hyperparameters()
    counts = (resources.gpus,) if resources.gpus else (1, 2, 4, 8)
    may_shard = (
        spec.tuning.type != TuningType.QLORA
        and (resources.nodes or 1) == 1
        and hp.optimizer in (None, *support.ZERO_OPTIMIZERS)
        and not (pool.on_cpu and hp.precision == Precision.FP16)
    )
    for gpus in counts:
        if gpus > pool.spec.gpus_per_node and not resources.gpus:
            return
        if hp.zero_stage is not None:
            yield gpus, hp.zero_stage
            continue
        if gpus == 1 or resources.gpus:
            yield gpus, 0
        if gpus > 1 and may_shard:
            yield gpus, 3


def _batch(
    spec: FineTuneJobSpec, model: ModelFacts, data: DataFacts, pool: Pool, gpus: int, nodes: int, zero_stage: int
) -> _Fit | str:
    ledger = settings.Ledger()
    optimization = settings.optimization(spec, model.parameters, ledger, on_cpu=pool.on_cpu, zero_stage=zero_stage)
    if zero_stage and pool.on_cpu and optimization.precision == Precision.FP16:
        raise FinetuneError(
            "hyperparameters.precision: FP16 with zeroStage above 0 needs a GPU; choose BF16 or FP32 on a CPU pool",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.precision",
        )
    length = settings.sequence_length(spec, data, model.max_positions, ledger)
    if model.max_positions is not None and length > model.max_positions:
        raise FinetuneError(
            f"hyperparameters.maxSequenceLength is {length}, the model was built for {model.max_positions} tokens",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.maxSequenceLength",
        )
    rank = (spec.tuning.lora.rank if spec.tuning.lora else None) or 16
    best = None
    for micro, accumulation in _micro_batches(spec, data, gpus * nodes):
        best = memory.estimate(
            model,
            memory.Shape(
                spec.tuning.type,
                optimization.precision,
                optimization.optimizer,
                micro,
                length,
                optimization.gradient_checkpointing,
                rank,
                gpus * nodes,
                zero_stage,
                pool.on_cpu,
            ),
        )
        if best.total_gib <= pool.spec.gpu_memory_gib * memory.USABLE_SHARE:
            return _Fit(pool, gpus, nodes, zero_stage, micro, accumulation, best, tuple(ledger.settings))
    needs = best.total_gib if best else 0.0
    return (
        f"needs about {needs:.1f} GiB per GPU with {gpus * nodes} GPUs and micro batch 1, has "
        f"{pool.spec.gpu_memory_gib:g} GiB of which {memory.USABLE_SHARE:.0%} can be used"
    )


def _micro_batches(spec: FineTuneJobSpec, data: DataFacts, world: int) -> Iterator[tuple[int, int]]:
    """(micro batch, accumulation) from the largest micro batch down; their product with world is the global batch."""
    hp = spec.hyperparameters or Hyperparameters()
    wanted = hp.global_batch_size
    if wanted is not None and wanted % world:
        raise FinetuneError(
            f"hyperparameters.globalBatchSize is {wanted}; it must be a multiple of {world}, the number of GPUs",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.globalBatchSize",
        )
    if hp.micro_batch_size is not None:
        step = hp.micro_batch_size * world
        total = wanted or max(step, settings.DEFAULT_GLOBAL_BATCH // step * step)
        if total % step:
            raise FinetuneError(
                f"hyperparameters.globalBatchSize is {total}; it must be a multiple of microBatchSize × GPUs = {step}",
                failure_class="InvalidSpec",
                field="spec.hyperparameters.microBatchSize",
            )
        yield hp.micro_batch_size, total // step
        return
    per_gpu = (wanted or max(world, min(settings.DEFAULT_GLOBAL_BATCH, data.rows) // world * world)) // world
    for micro in MICRO_BATCHES:
        if micro <= per_gpu and per_gpu % micro == 0:
            yield micro, per_gpu // micro


def _write(
    spec: FineTuneJobSpec,
    job: RunJob,
    model: ModelFacts,
    data: DataFacts,
    references: References,
    fit: _Fit,
    pool_reason: str,
    trainer_image: str,
) -> Planned:
    ledger = settings.Ledger(list(fit.settings))
    optimization = settings.optimization(
        spec, model.parameters, settings.Ledger(), on_cpu=fit.pool.on_cpu, zero_stage=fit.zero_stage
    )
    world = fit.gpus * fit.nodes
    fraction = settings.validation_fraction(spec, data.rows, ledger)
    train_rows = data.rows - (settings.held_out_rows(data.rows, fraction) if fraction else 0)
    hp = spec.hyperparameters or Hyperparameters()
    ledger.pick(
        "hyperparameters.globalBatchSize",
        hp.global_batch_size,
        fit.micro_batch * fit.accumulation * world,
        "a small batch that averages out noise",
    )
    ledger.pick("hyperparameters.microBatchSize", hp.micro_batch_size, fit.micro_batch, "the largest that fits")
    epochs, total_steps = _length(hp, train_rows, fit.micro_batch * fit.accumulation * world, ledger)
    ledger.pick(
        "hyperparameters.zeroStage",
        hp.zero_stage,
        fit.zero_stage,
        "the model fits without" if fit.zero_stage == 0 else "one GPU cannot hold the state",
    )
    has_validation = fraction is not None or references.validation is not None
    run = RunFile(
        job=job,
        model=RunModel(
            source=references.model,
            task=spec.model.task or Task.CAUSAL_LM,
            attention=optimization.attention,
            digest=model.digest,
        ),
        dataset=RunDataset.model_validate(
            {
                "sources": references.sources,
                "format": data.format,
                "columns": spec.dataset.columns,
                "prompt_template": spec.dataset.prompt_template,
                "validation_fraction": fraction,
                "validation": references.validation,
                "loss_on": settings.loss_on(spec, data, ledger),
                "truncation": settings.truncation(spec, ledger),
                "digest": data.digest,
            }
        ),
        objective=ObjectiveType.SUPERVISED,
        tuning=settings.tuning(spec, ledger),
        hyperparameters=RunHyperparameters(
            total_steps=total_steps,
            epochs=epochs,
            learning_rate=optimization.learning_rate,
            schedule=optimization.schedule,
            warmup_ratio=optimization.warmup_ratio,
            weight_decay=optimization.weight_decay,
            micro_batch_size=fit.micro_batch,
            gradient_accumulation=fit.accumulation,
            max_sequence_length=next(s.value for s in ledger.settings if s.name == "hyperparameters.maxSequenceLength"),
            precision=optimization.precision,
            optimizer=optimization.optimizer,
            gradient_checkpointing=optimization.gradient_checkpointing,
            max_grad_norm=optimization.max_grad_norm,
            zero_stage=fit.zero_stage,
            seed=optimization.seed,
        ),
        evaluation=settings.evaluation(spec, total_steps, has_validation, ledger),
        checkpoint=settings.checkpoint(spec, ledger),
        output=RunOutput(
            target=references.output,
            merge_adapter=bool(spec.output.merge_adapter),
            on_existing=settings.on_existing(spec, ledger),
        ),
        resources=RunResources(
            pool=fit.pool.name, nodes=fit.nodes, processes_per_node=fit.gpus, accelerator=fit.pool.spec.accelerator
        ),
        settings=[setting.to_json() for setting in ledger.settings],
    )
    plan = Plan(
        spec_digest=spec_digest(spec),
        pool=fit.pool.name,
        pool_reason=pool_reason,
        nodes=fit.nodes,
        gpus_per_node=fit.gpus,
        micro_batch_size=fit.micro_batch,
        gradient_accumulation=fit.accumulation,
        zero_stage=fit.zero_stage,
        total_steps=total_steps,
        settings=ledger.settings,
        memory=fit.memory,
        run_digest=run.digest(),
        trainer_image=trainer_image,
    )
    return Planned(plan, run)


def _length(
    hp: Hyperparameters, train_rows: int, global_batch: int, ledger: settings.Ledger
) -> tuple[float | None, int]:
    if hp.max_steps is not None:
        return None, ledger.pick("hyperparameters.maxSteps", hp.max_steps, hp.max_steps, "")
    epochs = ledger.pick("hyperparameters.epochs", hp.epochs, 3.0, "three passes, as is usual for a small dataset")
    return epochs, max(1, math.ceil(train_rows / global_batch * epochs))
