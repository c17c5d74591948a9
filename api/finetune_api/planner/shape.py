"""From a spec to what the size rule looks at."""

from __future__ import annotations

from finetune_api.job import FineTuneJobSpec, Lora, ObjectiveType, TuningType
from finetune_api.method import GrpoSettings
from finetune_api.planner.memory import Shape
from finetune_api.planner.objective import GENERATIONS, REINFORCEMENTS, settings_of
from finetune_api.planner.optimization import Optimization
from finetune_api.planner.tuning import DEFAULT_RANK, DEFAULT_VIRTUAL_TOKENS, SOFT_PROMPTS, quantization_type
from finetune_api.status import Preflight

# A record of these is a pair of texts.
_PAIRS = (ObjectiveType.REWARD, ObjectiveType.DPO, ObjectiveType.ORPO, ObjectiveType.KTO)
# These look at the model as it was; under an adapter that is the base with the adapter off.
_WITH_REFERENCE = (ObjectiveType.DPO, ObjectiveType.KTO, *REINFORCEMENTS)
# Of the inputs, or of the inputs and outputs if that is more, of all linear layers of a usual gated layer.
_SHARES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 0.12),
    **dict.fromkeys(("query_key_value", "c_attn", "qkv_proj"), 0.23),
    **dict.fromkeys(("gate_proj", "up_proj"), 0.21),
    "down_proj": 0.31,
}
_QUANTISED_TEACHER = 3.5  # weight files of 16 bits against 4 bits, embeddings left as they are


def shape_of(
    spec: FineTuneJobSpec,
    found: Preflight,
    chosen: Optimization,
    sequence_length: int,
    *,
    world_size: int,
    zero_stage: int,
    on_cpu: bool,
) -> Shape:
    """The run as the size rule sees it, with micro batch 1."""
    lora = spec.tuning.lora if spec.tuning is not None else None
    prompt = spec.tuning.soft_prompt if spec.tuning is not None else None
    quantised = spec.tuning.quantization if spec.tuning is not None else None
    soft = spec.tuning_type in SOFT_PROMPTS
    return Shape(
        tuning=spec.tuning_type,
        precision=chosen.precision,
        optimizer=chosen.optimizer,
        micro_batch_size=1,
        sequence_length=sequence_length,
        gradient_checkpointing=chosen.gradient_checkpointing,
        lora_rank=(lora.rank if lora is not None else None) or DEFAULT_RANK,
        world_size=world_size,
        zero_stage=zero_stage,
        on_cpu=on_cpu,
        quantization=quantization_type(spec),
        double_quant=quantised is None or quantised.double_quant is not False,
        task=spec.task,
        master_weights=chosen.master_weights,
        sequences=_sequences(spec),
        trained_share=_trained_share(spec, found.model.layers if found.model is not None else 0),
        virtual_tokens=((prompt.virtual_tokens if prompt is not None else None) or DEFAULT_VIRTUAL_TOKENS)
        if soft
        else 0,
        projection=bool(prompt is not None and prompt.projection),
        reference=spec.objective_type in _WITH_REFERENCE and spec.tuning_type == TuningType.FULL,
        further_bytes=_further_bytes(spec, found),
        adapted_share=_adapted_share(lora),
        adapted_experts=lora is not None and bool(lora.experts),
    )


def _sequences(spec: FineTuneJobSpec) -> int:
    if spec.objective_type in _PAIRS:
        return 2
    given = settings_of(spec)
    if isinstance(given, GrpoSettings):
        return given.generations or GENERATIONS
    return 1


def _trained_share(spec: FineTuneJobSpec, layers: int) -> float:
    """First layers are counted; what patterns leave out is not known before the model is built, so all is counted."""
    full = spec.tuning.full if spec.tuning is not None else None
    if full is None or full.first_layers is None or not layers:
        return 1.0
    return min(1.0, full.first_layers / layers)


def _adapted_share(lora: Lora | None) -> float:
    """Patterns and names that are not known here may mean any layer, so all are counted."""
    names = (lora.target_modules if lora is not None else None) or []
    return min(1.0, sum(_SHARES.get(name, 1.0) for name in names)) if names else 1.0


def _further_bytes(spec: FineTuneJobSpec, found: Preflight) -> int:
    total = sum(found.further_weight_bytes.values())
    distillation = spec.objective.distillation if spec.objective is not None else None
    if distillation is not None and distillation.quantize_teacher:
        return round(total / _QUANTISED_TEACHER)
    return total
