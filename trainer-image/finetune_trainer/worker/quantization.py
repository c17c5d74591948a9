"""Quantised bases: what is quantised at load, what comes quantised, and that it stays as it was loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from finetune_api.failures import FinetuneError
from finetune_api.job import ComputeType, ObjectiveType, QuantizationType, TuningType
from finetune_api.runfile import RunFile, RunQuantization
from finetune_trainer.worker.experts import (
    dequantise_experts,
    fused_parameters,
    has_experts,
    quantise_experts,
)

_COMPUTE = {ComputeType.FP32: torch.float32, ComputeType.BF16: torch.bfloat16, ComputeType.FP16: torch.float16}
_BITSANDBYTES = "bitsandbytes"
_NEEDS = {"gptq": "gptqmodel", "awq": "gptqmodel"}


def quantization_config(quantization: RunQuantization) -> BitsAndBytesConfig:
    """bitsandbytes' settings; raises InvalidSpec for a format that does not fit the number of bits."""
    if quantization.bits == 8 and quantization.type is QuantizationType.INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization.bits != 4 or quantization.type is QuantizationType.INT8:
        raise FinetuneError(
            f"{quantization.bits} bits of type {quantization.type} do not exist; use 4 bits with NF4 or FP4, or 8 bits "
            "with Int8.",
            failure_class="InvalidSpec",
            field="spec.tuning.quantization",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type.value.lower(),
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=_COMPUTE[quantization.compute_type],
    )


def check_quantised_files(config: PretrainedConfig, run: RunFile) -> None:
    """Refuse a base whose files are quantised in a way that this run cannot take.

    bitsandbytes' own files (4 and 8 bits) carry adapters. GPTQ and AWQ need kernels that this release has not.
    Raises ModelUnsupported, InvalidSpec.
    """
    method = stored_method(config)
    if method is None:
        return
    if method != _BITSANDBYTES:
        needs = f"the package {_NEEDS[method]} and a GPU" if method in _NEEDS else "kernels of its own"
        raise FinetuneError(
            f"The base model is quantised by {method}, which needs {needs}; this release has neither. Choose the "
            "unquantised model with tuning.type QLoRA, or one quantised by bitsandbytes.",
            failure_class="ModelUnsupported",
            field="spec.model.uri",
        )
    if run.tuning.quantization is not None:
        raise FinetuneError(
            "The base model's files are quantised already. Remove tuning.quantization and choose tuning.type LoRA.",
            failure_class="InvalidSpec",
            field="spec.tuning.quantization",
        )
    if run.tuning.type is TuningType.FULL and run.objective.type is not ObjectiveType.EVALUATION:
        raise FinetuneError(
            "The base model's files are quantised, and quantised weights cannot train. Choose tuning.type LoRA.",
            failure_class="InvalidSpec",
            field="spec.tuning.type",
        )
    if run.hyperparameters.zero_stage == 3:
        raise FinetuneError(
            "zeroStage 3 cannot shard quantised weights, and the base model's files are quantised; use zeroStage 2 or "
            "less.",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.zeroStage",
        )


def stored_method(config: PretrainedConfig) -> str | None:
    """By what the files are quantised; None where they are not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    found = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(found, "value", found))


def load_options(quantization: RunQuantization | None, config: PretrainedConfig, device: Any) -> dict[str, Any]:
    """What to tell from_pretrained of quantisation and place.

    Fused experts are quantised after loading, one at a time on their way to the device: until then they lie on the
    host, where the whole of them in 16 bits has room.
    """
    options: dict[str, Any] = {}
    if device is not None:
        options["device_map"] = {"": "cpu" if quantization and has_experts(config) else device}
    if quantization:
        options["quantization_config"] = quantization_config(quantization)
    return options


def finish_quantization(model: PreTrainedModel, quantization: RunQuantization | None, device: Any) -> None:
    """Quantise what the library passed over, and keep the frozen base as it was loaded.

    Raises InvalidSpec for fused experts with 8 bits, which have no such form.
    """
    if not getattr(model, "is_quantized", False):
        return
    if quantization is not None and any(True for _ in fused_parameters(model)):
        if quantization.bits == 8:
            raise FinetuneError(
                "Experts that are held in one weight have no 8-bit form: they would stay in 16 bits. Use 4 bits.",
                failure_class="InvalidSpec",
                field="spec.tuning.quantization.bits",
            )
        quantise_experts(model, quantization, device)
        if device is not None:
            model.to(device)
    keep_bits(model)


def dequantise(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with plain weights of dtype, quantised experts included."""
    if not getattr(model, "is_quantized", False):
        return model
    dequantise_experts(model, dtype)
    plain = model.dequantize(dtype)
    # Else it would be written as a quantised model.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(plain.config, name):
            delattr(plain.config, name)
    # The way in which quantised files were read has no way back, and saving would try it.
    ways = getattr(plain, "_weight_conversions", None)
    if ways is not None:
        plain._weight_conversions = [way for way in ways if _has_way_back(way)] or None
    return plain


def _has_way_back(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def keep_bits(model: nn.Module) -> None:
    """The frozen base stays as it was loaded.

    On CPUs with AVX512-BF16 bitsandbytes repacks the weights at the first pass in evaluation mode and rounds their
    scales on the way; training and resume would then depend on whether an evaluation came first.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def only_measured(model: nn.Module) -> Iterator[None]:
    """A context in which the library's trainer takes a quantised base without an adapter: nothing of it will train."""
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True  # type: ignore[assignment]  # what its check asks for
    try:
        yield
    finally:
        model._hf_peft_config_loaded = loaded
