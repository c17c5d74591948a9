"""The plan: the cheapest pool that fits, and the run file.

Without a pin, pools are tried by price; on each pool the smallest number of GPUs that fits is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from finetune_api.failures import FinetuneError
from finetune_api.job import FineTuneJobSpec, Hyperparameters, MasterWeights, ObjectiveType, Resources, TuningType
from finetune_api.planner import memory, settings, support
from finetune_api.planner.facts import require_possible
from finetune_api.planner.from_job import keeps_its_start
from finetune_api.planner.ledger import Ledger
from finetune_api.planner.optimization import optimization
from finetune_api.planner.references import References
from finetune_api.planner.shape import shape_of
from finetune_api.planner.write import DEFAULT_GLOBAL_BATCH, Fit, Given, Planned, Pool, described, write
from finetune_api.runfile import RunJob
from finetune_api.status import DataFacts, ModelFacts, Preflight
from finetune_api.validity import refusing

MAX_PARAMETERS_ON_CPU = 10**9
MICRO_BATCHES = (8, 4, 2, 1)
ANY_LENGTH = ("bloom",)
"""Families that can be made for longer text than config.json names: it tells what the weights were made from."""


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
    refused = support.unsupported(spec, described(preflight)[1].format)
    if refused:
        raise FinetuneError(
            "; ".join(item.message for item in refused), failure_class="UnsupportedField", field=refused[0].field
        )
    fit, reason = _choose(spec, preflight, pools)
    return write(Given(spec, job, preflight, references, trainer_image), fit, reason)


def _choose(spec: FineTuneJobSpec, preflight: Preflight, pools: Sequence[Pool]) -> tuple[Fit, str]:
    model, _ = described(preflight)
    resources = spec.resources or Resources()
    candidates, reason = _candidates(resources, model, pools)
    fits: list[Fit] = []
    lacks: list[str] = []
    for pool in candidates:
        found = _fit(spec, preflight, pool, resources)
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


def _fit(spec: FineTuneJobSpec, preflight: Preflight, pool: Pool, resources: Resources) -> Fit | str:
    """The smallest gang on this pool that holds the run, or what it lacks."""
    nodes = resources.nodes or 1
    if nodes > pool.spec.max_nodes:
        return f"has at most {pool.spec.max_nodes} nodes, {nodes} are asked for"
    lack = "no number of GPUs was possible"
    for gpus, zero_stage in _gangs(spec, pool, resources):
        if gpus > pool.spec.gpus_per_node:
            lack = f"has {pool.spec.gpus_per_node} GPUs per node, {gpus} are asked for"
            continue
        found = _batch(spec, preflight, pool, gpus, nodes, zero_stage)
        if isinstance(found, Fit):
            return found
        lack = found
    return lack


def _gangs(spec: FineTuneJobSpec, pool: Pool, resources: Resources) -> Iterator[tuple[int, int]]:
    """(GPUs per node, ZeRO stage) from the smallest gang up."""
    given = spec.hyperparameters.zero_stage if spec.hyperparameters is not None else None
    sharded = _sharded_stage(spec, pool)
    for gpus in (resources.gpus,) if resources.gpus else (1, 2, 4, 8):
        if gpus > pool.spec.gpus_per_node and not resources.gpus:
            return
        if given is not None:
            yield gpus, given
            continue
        if gpus == 1 or resources.gpus:
            yield gpus, 0
        if gpus > 1 and sharded is not None:
            yield gpus, sharded


def _sharded_stage(spec: FineTuneJobSpec, pool: Pool) -> int | None:
    """The stage that shards most of what the run may shard; None where sharding is out of the question."""
    hp = spec.hyperparameters or Hyperparameters()
    if ((spec.resources and spec.resources.nodes) or 1) > 1 or hp.optimizer not in (None, *support.ZERO_OPTIMIZERS):
        return None
    if hp.master_weights == MasterWeights.BF16 or keeps_its_start(spec):
        return None
    for stage in (3, 2) if spec.tuning_type == TuningType.FULL else (3,):
        if refusing(support.cell_of(spec, zero_stage=stage, on_cpu=pool.on_cpu)) is None:
            return stage
    return None


def _batch(
    spec: FineTuneJobSpec, preflight: Preflight, pool: Pool, gpus: int, nodes: int, zero_stage: int
) -> Fit | str:
    model, data = described(preflight)
    ledger = Ledger()
    chosen = optimization(spec, model, ledger, on_cpu=pool.on_cpu, zero_stage=zero_stage)
    require_possible(spec, chosen, model, zero_stage=zero_stage, on_cpu=pool.on_cpu)
    length = settings.sequence_length(spec, data, model.max_positions, ledger)
    _require_length(spec, model, length)
    shape = shape_of(
        spec, preflight, chosen, length, world_size=gpus * nodes, zero_stage=zero_stage, on_cpu=pool.on_cpu
    )
    best = None
    for micro, accumulation in _micro_batches(spec, data, gpus * nodes):
        best = memory.estimate(model, replace(shape, micro_batch_size=micro))
        if best.total_gib <= pool.spec.gpu_memory_gib * memory.USABLE_SHARE:
            return Fit(pool, gpus, nodes, zero_stage, micro, accumulation, best, chosen, length, tuple(ledger.settings))
    needs = best.total_gib if best else 0.0
    return (
        f"needs about {needs:.1f} GiB per GPU with {gpus * nodes} GPUs and micro batch 1, has "
        f"{pool.spec.gpu_memory_gib:g} GiB of which {memory.USABLE_SHARE:.0%} can be used"
    )


def _require_length(spec: FineTuneJobSpec, model: ModelFacts, length: int) -> None:
    fresh = spec.objective_type == ObjectiveType.PRETRAIN
    if model.max_positions is None or length <= model.max_positions or (fresh and model.model_type in ANY_LENGTH):
        return
    block = spec.objective.pretrain.block_size if spec.objective is not None and spec.objective.pretrain else None
    field = "hyperparameters.maxSequenceLength" if block is None else "objective.pretrain.blockSize"
    raise FinetuneError(
        f"{field} is {length}, the model was built for {model.max_positions} tokens"
        + ("; lower it, or raise the positions in its config.json" if fresh else ""),
        failure_class="InvalidSpec",
        field=f"spec.{field}",
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
