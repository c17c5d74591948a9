"""What only the pool and the model's own facts rule out."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.failures import FinetuneError
from finetune_api.job import (
    FineTuneJobSpec,
    Hyperparameters,
    Lora,
    LoraVariant,
    MasterWeights,
    Precision,
    QuantizationType,
    Task,
)
from finetune_api.planner.optimization import Optimization
from finetune_api.planner.support import cell_of
from finetune_api.planner.tuning import BEFORE_LAST_TOKEN, TOKEN_PROMPTS, quantization_type
from finetune_api.status import ModelFacts
from finetune_api.validity import refusing

SEPARATE_EXPERTS = ("switch_transformers",)
"""Mixtures that hold a linear layer for each expert; the others hold all experts of a layer in one weight."""


def require_possible(
    spec: FineTuneJobSpec, chosen: Optimization, model: ModelFacts, *, zero_stage: int, on_cpu: bool
) -> None:
    """Raises FinetuneError(InvalidSpec) for the first setting that cannot work with this model on this kind of pool."""
    rule = refusing(cell_of(spec, zero_stage=zero_stage, precision=chosen.precision, on_cpu=on_cpu))
    found = [(rule.field, rule.message)] if rule is not None else []
    for field, message in [*found, *_on_pool(spec, chosen, on_cpu), *_with_model(spec, model)]:
        raise FinetuneError(message, failure_class="InvalidSpec", field=f"spec.{field}")


def _on_pool(spec: FineTuneJobSpec, chosen: Optimization, on_cpu: bool) -> Iterator[tuple[str, str]]:
    path = "hyperparameters"
    if on_cpu and chosen.liger:
        yield f"{path}.liger", f"{path}.liger: the kernels need a GPU; remove it or pin a GPU pool by resources.pool"
    if chosen.master_weights == MasterWeights.BF16 and chosen.precision != Precision.BF16:
        name = f"{path}.masterWeights"
        yield name, f"{name}: BF16 goes with precision BF16 only; set {path}.precision: BF16 or choose FP32"


def _on_fused_experts(lora: Lora) -> Iterator[tuple[str, str]]:
    if lora.dropout or lora.variant == LoraVariant.DORA:
        name = "tuning.lora.experts"
        yield (
            name,
            f"{name}: experts that are held in one weight cannot be adapted with dropout or by DoRA; choose dropout 0 and "
            "variant Standard or RsLoRA, or remove it",
        )


def _with_model(spec: FineTuneJobSpec, model: ModelFacts) -> Iterator[tuple[str, str]]:
    quantization = quantization_type(spec)
    if model.quantization is not None and quantization is not None:
        name = "tuning.quantization"
        yield name, f"{name}: the model's files are quantised already ({model.quantization}); choose tuning.type LoRA"
    if model.experts is not None and quantization == QuantizationType.INT8:
        name = "tuning.quantization.bits"
        yield name, f"{name}: the experts of {model.model_type} have no 8-bit form; choose 4"
    lora = spec.tuning.lora if spec.tuning is not None else None
    full = spec.tuning.full if spec.tuning is not None else None
    if full is not None and full.first_layers is not None and full.first_layers > model.layers:
        name = "tuning.full.firstLayers"
        yield name, f"{name} is {full.first_layers}, the model has {model.layers} layers; choose at most {model.layers}"
    if spec.task == Task.SEQUENCE_CLASSIFICATION and spec.tuning_type in TOKEN_PROMPTS and not model.encoder:
        yield "tuning.type", BEFORE_LAST_TOKEN
    if model.experts is not None:
        if lora is not None and lora.experts and model.model_type not in SEPARATE_EXPERTS:
            yield from _on_fused_experts(lora)
        return
    hp = spec.hyperparameters or Hyperparameters()
    for field, asked in (
        ("tuning.lora.experts", lora is not None and bool(lora.experts)),
        ("tuning.full.preset", full is not None and full.preset is not None),
        ("hyperparameters.routerLossWeight", hp.router_loss_weight is not None),
    ):
        if asked:
            yield field, f"{field}: {model.model_type} is no mixture of experts; remove it"
