"""The base model and its tokenizer, from local files: safetensors only, no code of theirs runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from finetune_api.failures import FinetuneError
from finetune_api.job import Attention, ComputeType, Precision, QuantizationType, TuningType
from finetune_api.runfile import RunFile, RunQuantization

ATTENTION = {Attention.EAGER: "eager", Attention.SDPA: "sdpa", Attention.FLASH: "flash_attention_2"}
PRECISIONS = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}
_COMPUTE = {ComputeType.FP32: torch.float32, ComputeType.BF16: torch.bfloat16, ComputeType.FP16: torch.float16}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The model's own tokenizer; raises ModelUnsupported if it has none that works without its own code."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FinetuneError(
            f"The base model's tokenizer cannot be read: {error}",
            failure_class="ModelUnsupported",
            field="spec.model.uri",
        ) from error


def weight_type(run: RunFile) -> torch.dtype:
    """The number format in which the base's weights are held.

    Full keeps fp32 master weights, because 16-bit weights swallow small updates; the passes run in 16 bit by
    autocast. Under ZeRO the master weights live in DeepSpeed's shards. A frozen base is held in the run's precision.
    """
    hp = run.hyperparameters
    if run.tuning.type is TuningType.FULL and hp.zero_stage == 0:
        return torch.float32
    return PRECISIONS[hp.precision]


def load_base(folder: Path, run: RunFile, *, dtype: torch.dtype | None = None, device: Any = None) -> PreTrainedModel:
    """The base model with every weight from the files; a missing, extra or misshapen weight is an error.

    dtype: weight_type(run) when None. device: where the weights go at once (needed for quantised weights on a GPU).
    Raises FinetuneError: UnsafeFile, ModelUnsupported, InvalidSpec.
    """
    _require_safetensors(folder)
    quantization = run.tuning.quantization if run.tuning.type is TuningType.QLORA else None
    options: dict[str, Any] = {"quantization_config": quantization_config(quantization)} if quantization else {}
    if device is not None and run.hyperparameters.zero_stage != 3:
        options["device_map"] = {"": device}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or weight_type(run),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION[run.model.attention],
            output_loading_info=True,
            **options,
        )
    except (OSError, KeyError) as error:
        raise _unsupported(f"The base model cannot be loaded: {error}") from error
    except (ValueError, ImportError) as error:
        if run.model.attention is Attention.FLASH and "lash" in str(error):
            raise FinetuneError(
                f"attention Flash cannot be used here: {error}",
                failure_class="InvalidSpec",
                field="spec.model.attention",
            ) from error
        raise _unsupported(f"The base model cannot be loaded: {error}") from error
    _require_complete(info)
    if quantization:
        _keep_bits(model)
    return model


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


def _keep_bits(model: nn.Module) -> None:
    """The frozen base stays as it was loaded.

    On CPUs with AVX512-BF16 bitsandbytes repacks the weights at the first pass in evaluation mode and rounds their
    scales on the way; training and resume would then depend on whether an evaluation came first.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise FinetuneError(
            f"The base model has pickle weights only ({', '.join(pickles[:3])}), which could run code. "
            "Convert them to safetensors.",
            failure_class="UnsafeFile",
            field="spec.model.uri",
        )
    raise _unsupported("The base model has no *.safetensors file.")


def _require_complete(info: dict[str, Any]) -> None:
    for kind, what in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "have, but the architecture does not know,"),
        ("mismatched_keys", "have in another shape"),
    ):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            raise _unsupported(f"The base model's files {what} {len(names)} weights: {', '.join(names[:5])}.")


def _unsupported(message: str) -> FinetuneError:
    return FinetuneError(message, failure_class="ModelUnsupported", field="spec.model.uri")
