"""The plan: the cheapest pool that fits, and the run file.

Without a pin, pools are tried by price; on each pool the smallest number of GPUs that fits is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finetune_api.failures import FinetuneError
from finetune_api.job import FineTuneJobSpec, Hyperparameters, ObjectiveType, Precision, Resources, TuningType
from finetune_api.planner import memory, settings, support
from finetune_api.planner.ledger import Ledger
from finetune_api.planner.optimization import Optimization, optimization
from finetune_api.planner.references import References
from finetune_api.planner.tuning import DEFAULT_RANK
from finetune_api.planner.write import DEFAULT_GLOBAL_BATCH, Fit, Given, Planned, Pool, write
from finetune_api.runfile import RunJob
from finetune_api.status import DataFacts, ModelFacts, Preflight

MAX_PARAMETERS_ON_CPU = 10**9
MICRO_BATCHES = (8, 4, 2, 1)


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
    return write(Given(spec, job, preflight, references, trainer_image), fit, reason)


def _choose(spec: FineTuneJobSpec, model: ModelFacts, data: DataFacts, pools: Sequence[Pool]) -> tuple[Fit, str]:
    resources = spec.resources or Resources()
    candidates, reason = _candidates(resources, model, pools)
    fits: list[Fit] = []
    lacks: list[str] = []
    for pool in candidates:
        found = _fit(spec, model, data, pool, resources)
        if isinstance(found, Fit):
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


def _fit(spec: FineTuneJobSpec, model: ModelFacts, data: DataFacts, pool: Pool, resources: Resources) -> Fit | str:
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
        if isinstance(found, Fit):
            return found
        lack = found
    return lack


def _gangs(spec: FineTuneJobSpec, pool: Pool, resources: Resources) -> Iterator[tuple[int, int]]:
    hp = spec.hyperparameters or Hyperparameters()
    counts = (resources.gpus,) if resources.gpus else (1, 2, 4, 8)
    may_shard = (
        spec.tuning_type not in (None, TuningType.QLORA)
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
) -> Fit | str:
    ledger = Ledger()
    chosen = optimization(spec, model.parameters, ledger, on_cpu=pool.on_cpu, zero_stage=zero_stage)
    _require_possible(spec, chosen, pool, zero_stage)
    length = settings.sequence_length(spec, data, model.max_positions, ledger)
    _require_length(spec, model, length)
    best = None
    for micro, accumulation in _micro_batches(spec, data, gpus * nodes):
        shape = memory.Shape(
            tuning=spec.tuning_type or TuningType.FULL,
            precision=chosen.precision,
            optimizer=chosen.optimizer,
            micro_batch_size=micro,
            sequence_length=length,
            gradient_checkpointing=chosen.gradient_checkpointing,
            lora_rank=_rank(spec),
            world_size=gpus * nodes,
            zero_stage=zero_stage,
            on_cpu=pool.on_cpu,
        )
        best = memory.estimate(model, shape)
        if best.total_gib <= pool.spec.gpu_memory_gib * memory.USABLE_SHARE:
            return Fit(pool, gpus, nodes, zero_stage, micro, accumulation, best, chosen, length, tuple(ledger.settings))
    needs = best.total_gib if best else 0.0
    return (
        f"needs about {needs:.1f} GiB per GPU with {gpus * nodes} GPUs and micro batch 1, has "
        f"{pool.spec.gpu_memory_gib:g} GiB of which {memory.USABLE_SHARE:.0%} can be used"
    )


def _require_possible(spec: FineTuneJobSpec, chosen: Optimization, pool: Pool, zero_stage: int) -> None:
    if zero_stage and pool.on_cpu and chosen.precision == Precision.FP16:
        raise FinetuneError(
            "hyperparameters.precision: FP16 with zeroStage above 0 needs a GPU; choose BF16 or FP32 on a CPU pool",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.precision",
        )


def _require_length(spec: FineTuneJobSpec, model: ModelFacts, length: int) -> None:
    if spec.objective_type == ObjectiveType.PRETRAIN or model.max_positions is None or length <= model.max_positions:
        return
    raise FinetuneError(
        f"hyperparameters.maxSequenceLength is {length}, the model was built for {model.max_positions} tokens",
        failure_class="InvalidSpec",
        field="spec.hyperparameters.maxSequenceLength",
    )


def _rank(spec: FineTuneJobSpec) -> int:
    lora = spec.tuning.lora if spec.tuning is not None else None
    return (lora.rank if lora is not None else None) or DEFAULT_RANK


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
        total = wanted or max(step, DEFAULT_GLOBAL_BATCH // step * step)
        if total % step:
            raise FinetuneError(
                f"hyperparameters.globalBatchSize is {total}; it must be a multiple of microBatchSize × GPUs = {step}",
                failure_class="InvalidSpec",
                field="spec.hyperparameters.microBatchSize",
            )
        yield hp.micro_batch_size, total // step
        return
    per_gpu = (wanted or max(world, min(DEFAULT_GLOBAL_BATCH, data.rows) // world * world)) // world
    for micro in MICRO_BATCHES:
        if micro <= per_gpu and per_gpu % micro == 0:
            yield micro, per_gpu // micro
