"""The base model and its tokenizer, from local files: safetensors only, no code of theirs runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from finetune_api.failures import FinetuneError
from finetune_api.job import Attention, MasterWeights, ObjectiveType, Precision, TuningType
from finetune_api.runfile import RunFile
from finetune_trainer.worker.heads import CAUSAL_HEAD, Head, fresh_modules, make_fresh, matches, name_labels
from finetune_trainer.worker.log import open_log
from finetune_trainer.worker.quantization import check_quantised_files, finish_quantization, load_options

ATTENTION = {Attention.EAGER: "eager", Attention.SDPA: "sdpa", Attention.FLASH: "flash_attention_2"}
PRECISIONS = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


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
    autocast. Under ZeRO the master weights live in DeepSpeed's shards. masterWeights BF16 gives them up. A frozen base
    is held in the run's precision.
    """
    hp = run.hyperparameters
    trains = run.tuning.type is TuningType.FULL and run.objective.type is not ObjectiveType.EVALUATION
    if trains and hp.zero_stage == 0 and hp.master_weights is MasterWeights.FP32:
        return torch.float32
    return PRECISIONS[hp.precision]


def padding_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id to pad with: the tokenizer's own, else its end token; None without either."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
    return next((number for number in found if number is not None), None)


def load_base(
    folder: Path,
    run: RunFile,
    *,
    head: Head = CAUSAL_HEAD,
    labels: Sequence[str] = (),
    pad_id: int | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> PreTrainedModel:
    """The base model with every weight from the files; a missing, extra or misshapen one that head does not name is an
    error. A head that the files lack is made; `heads.fresh_modules` names what was.

    labels: names of the classes, kept in the model's config. pad_id: what classifiers are padded with; causal bases
    look for the last token that is another. dtype: weight_type(run) when None. device: where the weights go at once
    (needed for quantised weights on a GPU). Raises FinetuneError: UnsafeFile, ModelUnsupported, InvalidSpec.
    """
    _require_safetensors(folder)
    quantization = run.tuning.quantization
    device = None if run.hyperparameters.zero_stage == 3 else device
    keep = True
    with _reading(run):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_quantised_files(config, run)
        options = load_options(quantization, config, device)
        if head.new:
            keep = name_labels(config, head, labels)
            _suit_classifier(config, head, pad_id)
            options["ignore_mismatched_sizes"] = True
            if "quantization_config" in options:
                # Left to itself the library quantises an output layer that has a bias.
                options["quantization_config"].llm_int8_skip_modules = head.modules
        model, info = head.auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype or weight_type(run),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=_attention(run, head, config),
            output_loading_info=True,
            **options,
        )
    missing = _require_complete(info, head)
    if head.new:
        make_fresh(model, missing, keep=keep, head=head, seed=run.hyperparameters.seed)
        _require_trained_head(model, run)
    finish_quantization(model, quantization, device)
    return model


@contextmanager
def _reading(run: RunFile) -> Iterator[None]:
    """Errors of the library are told as ours; its table of weights that differ is not printed, for each of them is
    either named by the head or an error."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
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
    finally:
        logger.setLevel(level)


def _attention(run: RunFile, head: Head, config: Any) -> str:
    """The kernel that the run plans; eager, which computes the same, where the architecture (BLOOM) has no sdpa."""
    model = head.auto._model_mapping.get(type(config), None)
    if run.model.attention is Attention.SDPA and model is not None and not model._supports_sdpa:
        open_log().info("attention-eager", architecture=config.model_type)
        return ATTENTION[Attention.EAGER]
    return ATTENTION[run.model.attention]


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


def _suit_classifier(config: Any, head: Head, pad_id: int | None) -> None:
    if config.is_encoder_decoder and head.auto is AutoModelForSequenceClassification:
        raise _unsupported(
            f"A sequence-to-sequence model ({config.model_type}) cannot tell classes of texts here. Choose an encoder or "
            "a causal model, or set model.task to Seq2Seq and let it write the label."
        )
    text = config.get_text_config()
    if pad_id is not None and pad_id < text.vocab_size:
        text.pad_token_id = pad_id


def _require_complete(info: dict[str, Any], head: Head) -> list[str]:
    """The names of the weights that head has to make. Raises ModelUnsupported for any other difference."""
    missing = sorted(info.get("missing_keys") or ())
    reshaped = sorted(name for name, *_ in info.get("mismatched_keys") or ())
    unexpected = sorted(info.get("unexpected_keys") or ())
    for names, allowed, what in (
        (missing, head.new, "lack"),
        (unexpected, head.dropped, "have, but the architecture does not know,"),
        (reshaped, head.new, "have in another shape"),
    ):
        wrong = [name for name in names if not matches(name, allowed)]
        if wrong:
            raise _unsupported(f"The base model's files {what} {len(wrong)} weights: {', '.join(wrong[:5])}.")
    if unexpected:
        open_log().info("weights-dropped", names=unexpected[:20], count=len(unexpected))
    return [*missing, *reshaped]


def _require_trained_head(model: PreTrainedModel, run: RunFile) -> None:
    """Evaluation of a head that nobody has trained says nothing."""
    if run.objective.type is ObjectiveType.EVALUATION and run.model.adapter is None and fresh_modules(model):
        raise _unsupported(
            f"The base model has no trained head for the labels {', '.join(model.config.label2id)}, so there is nothing "
            "to evaluate. Choose a model that was trained on these labels."
        )


def _unsupported(message: str) -> FinetuneError:
    return FinetuneError(message, failure_class="ModelUnsupported", field="spec.model.uri")
