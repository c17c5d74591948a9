"""The base model and its tokenizer, from local files: safetensors only, no code of theirs runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from finetune_api.failures import FinetuneError
from finetune_api.job import Attention, Precision, TuningType
from finetune_api.runfile import RunFile
from finetune_trainer.worker.quantization import keep_bits, quantization_config

ATTENTION = {Attention.EAGER: "eager", Attention.SDPA: "sdpa", Attention.FLASH: "flash_attention_2"}
PRECISIONS = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@dataclass(frozen=True)
class Head:
    """What stands on the base. auto: the library's class that builds it.

    new: name endings of weights that the files need not have, because training makes them; every other missing weight
    is an error. labels: how many outputs; None: one for each label of the data, where the task has labels.
    """

    auto: Any
    new: tuple[str, ...] = ()
    labels: int | None = None


CAUSAL_HEAD = Head(AutoModelForCausalLM)


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


def load_base(
    folder: Path,
    run: RunFile,
    *,
    head: Head = CAUSAL_HEAD,
    labels: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> PreTrainedModel:
    """The base model with every weight from the files; a missing, extra or misshapen weight is an error.

    labels: names of the classes, kept in the model's config. dtype: weight_type(run) when None. device: where the
    weights go at once (needed for quantised weights on a GPU).
    Raises FinetuneError: UnsafeFile, ModelUnsupported, InvalidSpec.
    """
    _require_safetensors(folder)
    quantization = run.tuning.quantization if run.tuning.type is TuningType.QLORA else None
    options: dict[str, Any] = {"quantization_config": quantization_config(quantization)} if quantization else {}
    if device is not None and run.hyperparameters.zero_stage != 3:
        options["device_map"] = {"": device}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, info = head.auto.from_pretrained(
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
    _require_complete(info, head.new)
    if quantization:
        keep_bits(model)
    return model


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


def _require_complete(info: dict[str, Any], new: tuple[str, ...]) -> None:
    for kind, what in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "have, but the architecture does not know,"),
        ("mismatched_keys", "have in another shape"),
    ):
        names = sorted(str(name) for name in info.get(kind) or ())
        if kind == "missing_keys":
            names = [name for name in names if not name.endswith(new)]
        if names:
            raise _unsupported(f"The base model's files {what} {len(names)} weights: {', '.join(names[:5])}.")


def _unsupported(message: str) -> FinetuneError:
    return FinetuneError(message, failure_class="ModelUnsupported", field="spec.model.uri")
