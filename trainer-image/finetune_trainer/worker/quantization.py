"""Quantised bases: what is quantised at load, and that it stays as it was loaded."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from finetune_api.failures import FinetuneError
from finetune_api.job import ComputeType, QuantizationType
from finetune_api.runfile import RunQuantization

_COMPUTE = {ComputeType.FP32: torch.float32, ComputeType.BF16: torch.bfloat16, ComputeType.FP16: torch.float16}


def quantization_config(quantization: RunQuantization) -> BitsAndBytesConfig:
    """bitsandbytes' settings; raises InvalidSpec for what this release does not train on."""
    if quantization.bits != 4 or quantization.type not in (QuantizationType.NF4, QuantizationType.FP4):
        raise FinetuneError(
            f"QLoRA with {quantization.bits} bits of type {quantization.type} is not supported; use 4 bits, NF4 or FP4.",
            failure_class="InvalidSpec",
            field="spec.tuning.quantization",
        )
    compute = _COMPUTE[quantization.compute_type]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type.value.lower(),
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute,
    )


def keep_bits(model: nn.Module) -> None:
    """The frozen base stays as it was loaded.

    On CPUs with AVX512-BF16 bitsandbytes repacks the weights at the first pass in evaluation mode and rounds their
    scales on the way; training and resume would then depend on whether an evaluation came first.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
