"""LoRA and QLoRA adapters on a frozen base."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from finetune_api.failures import FinetuneError
from finetune_api.job import LoraBias, LoraVariant, TuningType
from finetune_api.runfile import RunFile, RunLora

ALL_LINEAR = "all-linear"
_BIAS = {LoraBias.NONE: "none", LoraBias.ALL: "all", LoraBias.LORA_ONLY: "lora_only"}


def prepare_tuning(model: PreTrainedModel, run: RunFile) -> PreTrainedModel | PeftModel:
    """The model with exactly those parameters trainable that the tuning names."""
    if run.tuning.type is TuningType.FULL:
        return model
    if run.tuning.type not in (TuningType.LORA, TuningType.QLORA) or run.tuning.lora is None:
        raise FinetuneError(
            f"Tuning {run.tuning.type} is not in this release; use Full, LoRA or QLoRA.",
            failure_class="InvalidSpec",
            field="spec.tuning.type",
        )
    return attach_lora(model, run.tuning.lora)


def attach_lora(model: PreTrainedModel, lora: RunLora) -> PeftModel:
    """A LoRA adapter on model; its own weights are fp32. Raises InvalidSpec for a target that cannot be adapted."""
    targets = lora.target_modules
    _refuse_tied_head(model, [*targets, *(lora.modules_to_save or [])])
    try:
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.rank,
                # A whole number is written as one: readers of adapter_config.json expect that.
                lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
                bias=_BIAS[lora.bias],
                modules_to_save=lora.modules_to_save,
                use_dora=lora.variant is LoraVariant.DORA,
                use_rslora=lora.variant is LoraVariant.RS_LORA,
            ),
            autocast_adapter_dtype=True,
        )
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise FinetuneError(
            f"LoRA cannot be put on {', '.join(targets)}: {error}. This model's linear layers are {', '.join(names)}.",
            failure_class="InvalidSpec",
            field="spec.tuning.lora.targetModules",
        ) from error


def _refuse_tied_head(model: PreTrainedModel, names: list[str]) -> None:
    """A merged adapter on a tied head would change the input embeddings too."""
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not inputs.weight:
        return
    tied = {name.rpartition(".")[2] for name, module in model.named_modules() if module is head or module is inputs}
    asked = sorted(name for name in names if name.rpartition(".")[2] in tied)
    if asked:
        raise FinetuneError(
            f"{', '.join(asked)} shares its weights with the embeddings in this model; an adapter on it cannot be "
            "merged. Leave it out, or use all-linear.",
            failure_class="InvalidSpec",
            field="spec.tuning.lora.targetModules",
        )


def parameter_shares(model: nn.Module) -> dict[str, Any]:
    """Counts of all, trainable and quantised parameters, and the shares of all that they are."""
    total = trainable = quantised = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        shape = state.shape if state is not None else getattr(parameter, "ds_shape", parameter.shape)
        count = prod(shape)
        total += count
        trainable += count if parameter.requires_grad else 0
        quantised += count if state is not None else 0
    return {
        "total": total,
        "trainable": trainable,
        "trainableShare": trainable / total,
        "quantised": quantised,
        "quantisedShare": quantised / total,
    }


def as_base(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which model computes as the untuned base does; Full is its own base until it trains."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
