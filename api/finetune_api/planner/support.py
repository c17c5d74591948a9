"""What the schema can say and the spec alone shows to be impossible. Such a value is refused by name, never ignored.

Combinations of method, model and parallelism are in finetune_api.validity, fields without an effect in
finetune_api.planner.unused; here is the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_api.job import (
    Attention,
    FineTuneJobSpec,
    MasterWeights,
    ObjectiveType,
    Optimizer,
    Precision,
    Source,
    Task,
    TuningType,
)
from finetune_api.metrics import check_best_metric, check_metrics, offered_metrics
from finetune_api.model import FurtherModel
from finetune_api.planner.expressions import fault_of
from finetune_api.planner.from_job import TAKES_ADAPTER, keeps_its_start
from finetune_api.planner.objective import REINFORCEMENTS
from finetune_api.planner.pretrain import NOISED, SMALLEST_VOCABULARY, joins_text
from finetune_api.planner.tuning import FIXED_EMBEDDINGS, SOFT_PROMPTS, WITHOUT_DROPOUT, quantization_type
from finetune_api.planner.unused import Found, unused, value_at
from finetune_api.validity import Cell, refusing

# Fields with some values that work. docs/supported.md is generated from this table, the next and unused.TRAINING_ONLY.
CHOICES: dict[str, tuple[Any, ...]] = {
    "model.attention": (Attention.EAGER, Attention.SDPA),
}

# Fields that must be absent (a field of type boolean: absent or false).
NOT_YET = (
    "model.cache",
    "queueName",
)

# DeepSpeed shards the state of these.
ZERO_OPTIMIZERS = (Optimizer.ADAMW,)

_ORDER = [field.alias for field in FineTuneJobSpec.model_fields.values()]


@dataclass(frozen=True)
class Unsupported:
    """A spec path whose value cannot be honoured, and what to write instead."""

    field: str
    message: str


def unsupported(spec: FineTuneJobSpec, data_format: str | None = None) -> list[Unsupported]:
    """Every value of spec that cannot be honoured, in the order of the spec.

    data_format: as which preflight read the records; before it, what the spec itself says is taken.
    """
    checks = (_combination, _refused_choices, _not_yet, _model, _places, _objective, _tuning)
    found = [item for check in checks for item in check(spec)]
    found += [*_hyperparameters(spec), *_sharding(spec), *_output(spec), *_metrics(spec), *_best_step(spec)]
    found += unused(spec, data_format or spec.dataset.format or "")
    found.sort(key=lambda item: _ORDER.index(item[0].split(".")[0].split("[")[0]))
    return [Unsupported(f"spec.{path}", message) for path, message in found]


def cell_of(
    spec: FineTuneJobSpec, *, zero_stage: int = 0, precision: Precision | None = None, on_cpu: bool = False
) -> Cell:
    """The spec's place in the validity table; what the job sets itself goes before zero_stage and precision."""
    hp = spec.hyperparameters
    given_stage = hp.zero_stage if hp is not None else None
    given_precision = hp.precision if hp is not None else None
    return Cell(
        objective=spec.objective_type,
        tuning=spec.tuning.type if spec.tuning is not None else None,
        task=spec.task,
        quantization=quantization_type(spec),
        zero_stage=zero_stage if given_stage is None else given_stage,
        precision=given_precision or precision or Precision.FP32,
        on_cpu=on_cpu,
    )


def _combination(spec: FineTuneJobSpec) -> Found:
    rule = refusing(cell_of(spec))
    if rule is not None:
        yield rule.field, rule.message


def _refused_choices(spec: FineTuneJobSpec) -> Found:
    for path, allowed in CHOICES.items():
        value = value_at(spec, path)
        if value is not None and value not in allowed:
            yield path, f"{path}: {value} is not supported yet; choose {' or '.join(map(str, allowed))}"


def _not_yet(spec: FineTuneJobSpec) -> Found:
    for path in NOT_YET:
        value = value_at(spec, path)
        if value is not None and value is not False:
            yield path, f"{path} is not supported yet; remove it"


def _model(spec: FineTuneJobSpec) -> Found:
    yield from _revision(spec.model, "model")
    if spec.model.adapter is None:
        return
    path = "model.adapter"
    if spec.model.adapter.revision is not None and not spec.model.adapter.uri.startswith("hf://"):
        yield f"{path}.revision", f"{path}.revision belongs to hf://owner/name; remove it"
    if spec.tuning_type == TuningType.FULL:
        yield path, f"{path}: Full trains the base itself; choose the merged model as model.uri"
    elif spec.objective_type not in TAKES_ADAPTER:
        yield path, f"{path}: {spec.objective_type} starts from a whole model; choose the merged model as model.uri"
    elif keeps_its_start(spec) and value_at(spec, "hyperparameters.zeroStage") == 3:
        yield (
            path,
            f"{path}: stage 3 would shard the start that {spec.objective_type} compares with; choose zeroStage 2",
        )


def _revision(model: FurtherModel, path: str) -> Found:
    if model.revision is not None and not (model.uri or "").startswith("hf://"):
        yield f"{path}.revision", f"{path}.revision belongs to hf://owner/name; remove it"


def _places(spec: FineTuneJobSpec) -> Found:
    for index, source in enumerate(spec.dataset.sources):
        yield from _source(source, f"dataset.sources[{index}]")
    for path, alone in _single_sources(spec):
        yield from _source(alone, path)
        if alone.weight is not None:
            yield f"{path}.weight", f"{path}.weight has no meaning, because these records are not mixed; remove it"


def _single_sources(spec: FineTuneJobSpec) -> Iterator[tuple[str, Source]]:
    for name in ("validation", "test"):
        held_out = getattr(spec.dataset, name)
        if held_out is not None and held_out.source is not None:
            yield f"dataset.{name}.source", held_out.source
    if spec.evaluation is None:
        return
    if spec.evaluation.retention is not None:
        yield "evaluation.retention", spec.evaluation.retention
    for number, benchmark in enumerate(spec.evaluation.benchmarks or []):
        yield f"evaluation.benchmarks[{number}].source", benchmark.source


def _source(source: Source, path: str) -> Found:
    if source.uri.startswith("hf://datasets/"):
        return
    for name, value in (("config", source.config), ("split", source.split), ("revision", source.revision)):
        if value is not None:
            yield f"{path}.{name}", f"{path}.{name} belongs to hf://datasets/owner/name; remove it"


def _objective(spec: FineTuneJobSpec) -> Found:
    if spec.objective is None:
        return
    distillation = spec.objective.distillation
    if distillation is not None:
        yield from _revision(distillation.teacher, "objective.distillation.teacher")
    for name in REINFORCEMENTS:
        settings = getattr(spec.objective, name.lower())
        for number, term in enumerate(settings.rewards if settings is not None else []):
            path = f"objective.{name.lower()}.rewards[{number}]"
            if term.model is not None:
                yield from _revision(term.model, f"{path}.model")
            fault = fault_of(term.pattern) if term.pattern is not None else None
            if fault is not None:
                yield f"{path}.pattern", f"{path}.pattern is not a regular expression ({fault}); choose one that is"
    if spec.objective.pretrain is not None:
        yield from _pretrain(spec)


def _pretrain(spec: FineTuneJobSpec) -> Found:
    path, given = "objective.pretrain", spec.objective.pretrain if spec.objective is not None else None
    if given is None:
        return
    fresh = spec.objective_type == ObjectiveType.PRETRAIN
    if not fresh and spec.task not in NOISED and not joins_text(spec):
        why = "belongs to Pretrain, MaskedLM and Seq2Seq; of a causal model it needs blockSize and type Supervised"
        yield path, f"{path} {why}; remove it"
        return
    for name, value in (
        ("tokenizer", given.tokenizer),
        ("vocabularySize", given.vocabulary_size),
        ("randomWindows", given.random_windows),
    ):
        if value is not None and not fresh:
            yield f"{path}.{name}", f"{path}.{name} belongs to type Pretrain; remove it"
    if given.mask_probability is not None and spec.task not in NOISED:
        yield f"{path}.maskProbability", f"{path}.maskProbability belongs to MaskedLM and Seq2Seq; remove it"
    if given.mean_span_length is not None and spec.task != Task.SEQ2SEQ:
        yield f"{path}.meanSpanLength", f"{path}.meanSpanLength belongs to Seq2Seq; remove it"
    least = SMALLEST_VOCABULARY.get(spec.task, 0) if fresh else 0
    if given.vocabulary_size is not None and given.vocabulary_size < least:
        why = f"{given.vocabulary_size} has no room for 256 bytes and {least - 256} special tokens"
        yield f"{path}.vocabularySize", f"{path}.vocabularySize: {why}; choose at least {least}"
    length = value_at(spec, "hyperparameters.maxSequenceLength")
    if given.block_size is not None and length not in (None, given.block_size):
        yield f"{path}.blockSize", f"{path}.blockSize and hyperparameters.maxSequenceLength differ; set only one"


def _tuning(spec: FineTuneJobSpec) -> Found:
    if spec.tuning is None:
        return
    if value_at(spec, "model.tokenizer.addSpecialTokens") and spec.tuning_type in FIXED_EMBEDDINGS:
        path = "model.tokenizer.addSpecialTokens"
        why = "IA3 and soft prompts keep the embeddings fixed, so that added tokens would stay untrained"
        yield path, f"{path}: {why}; choose Full, LoRA or QLoRA, or remove it"
    prompt, quantization, ia3 = spec.tuning.soft_prompt, spec.tuning.quantization, spec.tuning.ia3
    if spec.tuning.lora is not None and spec.tuning.lora.dropout and spec.objective_type in WITHOUT_DROPOUT:
        path = "tuning.lora.dropout"
        yield (
            path,
            f"{path}: {spec.objective_type} compares two passes, and dropout would be their difference; remove it",
        )
    if prompt is not None and prompt.projection is not None and spec.tuning.type != TuningType.PREFIX_TUNING:
        path = "tuning.softPrompt.projection"
        yield path, f"{path} belongs to PrefixTuning; remove it"
    if prompt is not None and prompt.init_text is not None and spec.tuning.type != TuningType.PROMPT_TUNING:
        path = "tuning.softPrompt.initText"
        yield path, f"{path} belongs to PromptTuning; remove it"
    if quantization is not None and quantization.double_quant and quantization_type(spec) == "Int8":
        path = "tuning.quantization.doubleQuant"
        yield path, f"{path} belongs to the 4-bit types; remove it"
    if ia3 is not None and not set(ia3.feedforward_modules or ()) <= set(ia3.target_modules or ()):
        path = "tuning.ia3.feedforwardModules"
        yield path, f"{path} must be among tuning.ia3.targetModules; set both"


def _hyperparameters(spec: FineTuneJobSpec) -> Found:
    hp = spec.hyperparameters
    if hp is None:
        return
    path = "hyperparameters"
    pretrains = spec.objective_type == ObjectiveType.PRETRAIN
    if hp.packing and not pretrains:
        if spec.tuning_type in SOFT_PROMPTS:
            yield (
                f"{path}.packing",
                f"{path}.packing: a soft prompt leaks from one packed record to the next; remove it",
            )
        elif spec.task != Task.CAUSAL_LM or spec.objective_type != ObjectiveType.SUPERVISED:
            yield f"{path}.packing", f"{path}.packing belongs to Supervised tuning of causal models; remove it"
    if hp.group_by_length and (hp.packing or pretrains or spec.objective_type in REINFORCEMENTS):
        yield (
            f"{path}.groupByLength",
            f"{path}.groupByLength: rows are of one length, or grow while they train; remove it",
        )
    if hp.global_batch_size == 1 and spec.objective_type == ObjectiveType.KTO:
        name = f"{path}.globalBatchSize"
        yield name, f"{name}: KTO compares each record with another of its optimizer step; choose 2 or more"
    if hp.gradient_checkpointing and spec.tuning_type == TuningType.PREFIX_TUNING:
        name = f"{path}.gradientCheckpointing"
        yield name, f"{name}: PrefixTuning passes keys and values that recomputation would lose; remove it"
    if hp.master_weights == MasterWeights.BF16:
        name = f"{path}.masterWeights"
        if spec.tuning_type != TuningType.FULL:
            yield name, f"{name}: BF16 belongs to Full, adapters are held in FP32; remove it"
        elif hp.precision not in (None, Precision.BF16):
            yield name, f"{name}: BF16 goes with precision BF16 only; choose FP32 or set {path}.precision: BF16"


def _sharding(spec: FineTuneJobSpec) -> Found:
    zero = value_at(spec, "hyperparameters.zeroStage") or 0
    if not zero:
        return
    path = "hyperparameters.zeroStage"
    if (value_at(spec, "resources.nodes") or 1) > 1:
        yield path, f"{path} above 0 is not supported yet on more than one node; set resources.nodes: 1"
    optimizer = value_at(spec, "hyperparameters.optimizer")
    if optimizer not in (None, *ZERO_OPTIMIZERS):
        path = "hyperparameters.optimizer"
        yield path, f"{path}: {optimizer} does not work with zeroStage above 0; choose {' or '.join(ZERO_OPTIMIZERS)}"
    if value_at(spec, "hyperparameters.masterWeights") == MasterWeights.BF16:
        path = "hyperparameters.masterWeights"
        yield path, f"{path}: DeepSpeed shards master weights in FP32; choose FP32 or set hyperparameters.zeroStage: 0"


def _output(spec: FineTuneJobSpec) -> Found:
    if spec.output.merge_adapter and spec.tuning_type in (TuningType.FULL, *SOFT_PROMPTS):
        path = "output.mergeAdapter"
        yield path, f"{path} belongs to LoRA, QLoRA and IA3, which have something to merge; remove it"


def _metrics(spec: FineTuneJobSpec) -> Found:
    given = spec.evaluation
    if given is None:
        return
    offered = offered_metrics(
        spec.objective_type,
        spec.task,
        retention=given.retention is not None,
        benchmarks=[benchmark.name for benchmark in given.benchmarks or []],
    )
    try:
        check_metrics(offered, given.metrics or [], given.require or [])
    except FinetuneError as error:
        path = (error.field or "spec.evaluation").removeprefix("spec.")
        yield path, f"{path}: {error}"


def _best_step(spec: FineTuneJobSpec) -> Found:
    given, path = spec.checkpoint, "checkpoint.bestMetric"
    if given is None or given.best_metric is None:
        return
    try:
        check_best_metric(spec.objective_type, spec.task, given.best_metric)
    except FinetuneError as error:
        yield path, f"{path}: {error}"
    if given.keep_best == 0 and value_at(spec, "hyperparameters.earlyStopping") is None:
        yield path, f"{path} chooses the best step and checkpoint.keepBest: 0 keeps none; remove one of them"
