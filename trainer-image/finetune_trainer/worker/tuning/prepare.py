"""From a loaded base to the model that trains: the main flow of the tuning."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune_api.failures import FinetuneError
from finetune_api.job import MasterWeights, ObjectiveType, Precision, TuningType
from finetune_api.runfile import RunFile
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.worker.experts import mark_leaf_modules
from finetune_trainer.worker.loading import PRECISIONS
from finetune_trainer.worker.tokenizers import added_ids, tokenizer_folder
from finetune_trainer.worker.tuning.adapters import attach_adapter
from finetune_trainer.worker.tuning.earlier import continue_from, load_frozen
from finetune_trainer.worker.tuning.full import choose_trainable
from finetune_trainer.worker.tuning.prompts import without_prompt

SOFT_PROMPTS = (TuningType.PROMPT_TUNING, TuningType.P_TUNING, TuningType.PREFIX_TUNING)


def prepare_tuning(
    model: PreTrainedModel, run: RunFile, tokenizer: PreTrainedTokenizerFast, work: WorkDir
) -> PreTrainedModel | PeftModel:
    """The model with exactly those parameters trainable that the tuning names.

    tokenizer: the run's, with added tokens, for which the embeddings of model have room. work: an earlier adapter is
    read from its inputs. Raises FinetuneError: InvalidSpec, ModelUnsupported, UnsafeFile.
    """
    check_settings(model, run)
    earlier = work.inputs / "adapter" if run.model.adapter is not None else None
    if run.objective.type is ObjectiveType.EVALUATION:
        return model if earlier is None else load_frozen(model, earlier)
    if run.tuning.type is TuningType.FULL:
        choose_trainable(model, run.tuning.full)
    else:
        model = attach_adapter(model, run, added_ids(run, tokenizer), tokenizer_folder(work))
        if earlier is not None:
            continue_from(model, earlier, run)
    hold_master_weights(model, run)
    if run.tuning.type is TuningType.IA3 and run.tuning.quantization is not None:
        hold_norms(model)
    if run.hyperparameters.zero_stage == 3:
        mark_leaf_modules(model)
    return model


def check_settings(model: PreTrainedModel, run: RunFile) -> None:
    """Refuse settings that exclude each other or that this model cannot take; raises InvalidSpec."""
    hp, tuning = run.hyperparameters, run.tuning
    if tuning.type is TuningType.FULL:
        if run.model.adapter is not None and run.objective.type is not ObjectiveType.EVALUATION:
            raise _invalid(
                "Full tuning cannot go on from an adapter. Merge the adapter (output.mergeAdapter) and name the merged "
                "model in model.uri.",
                "model.adapter",
            )
        if getattr(model, "is_quantized", False) and run.objective.type is not ObjectiveType.EVALUATION:
            raise _invalid("Quantised weights cannot be trained by Full; use QLoRA.", "tuning.type")
    if tuning.type is TuningType.PREFIX_TUNING and hp.gradient_checkpointing:
        raise _invalid(
            "PrefixTuning hands its prefix to the model as a cache, which gradient checkpointing drops. Set "
            "gradientCheckpointing to false.",
            "hyperparameters.gradientCheckpointing",
        )
    if hp.master_weights is MasterWeights.BF16 and (hp.precision is not Precision.BF16 or hp.zero_stage > 0):
        raise _invalid(
            "masterWeights BF16 needs precision BF16 and zeroStage 0: ZeRO keeps fp32 master weights of its own.",
            "hyperparameters.masterWeights",
        )
    if run.model.add_special_tokens and tuning.type not in (TuningType.FULL, TuningType.LORA, TuningType.QLORA):
        raise _invalid(
            f"{tuning.type} keeps the embeddings fixed, so that added tokens would stay untrained. Use Full, LoRA or "
            "QLoRA.",
            "model.tokenizer.addSpecialTokens",
        )
    if tuning.type in SOFT_PROMPTS and run.output.merge_adapter:
        raise _invalid(
            f"{tuning.type} changes no weight of the base, so there is nothing to merge. Set mergeAdapter to false.",
            "output.mergeAdapter",
        )
    if tuning.type in SOFT_PROMPTS and tuning.soft_prompt is not None:
        _check_positions(model, run, tuning.soft_prompt.virtual_tokens)


def _check_positions(model: PreTrainedModel, run: RunFile, virtual_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = run.hyperparameters.max_sequence_length
    if isinstance(positions, int) and length + virtual_tokens > positions > 0:
        raise _invalid(
            f"{virtual_tokens} virtual tokens and sequences of {length} tokens are more than the {positions} positions "
            f"of this model. Set maxSequenceLength to at most {positions - virtual_tokens}.",
            "hyperparameters.maxSequenceLength",
        )


def hold_norms(model: nn.Module) -> None:
    """Layer norms are held in fp32: IA3's factors lift the output of a quantised layer to fp32, and on a CPU a norm in
    16 bits refuses such an input."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()


def hold_master_weights(model: nn.Module, run: RunFile) -> None:
    """What trains is held in fp32, or in bf16 where masterWeights says so: 16 bits swallow small updates.

    Under ZeRO the master weights live in DeepSpeed's shards. Its stage 3 takes weights of one kind only, so an adapter
    beside a trained head is held as the head is, in the run's precision.
    """
    hp = run.hyperparameters
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtype = torch.bfloat16 if hp.master_weights is MasterWeights.BF16 else torch.float32
    if hp.zero_stage > 0:
        if hp.zero_stage < 3 or len({parameter.dtype for parameter in trained}) == 1:
            return
        dtype = PRECISIONS[hp.precision]
    for parameter in trained:
        if parameter.dtype is not dtype:
            parameter.data = parameter.data.to(dtype)


def as_base(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which model computes as the untuned base does; Full is its own base until it trains."""
    if not isinstance(model, PeftModel):
        return nullcontext()
    return without_prompt(model) if model.active_peft_config.is_prompt_learning else model.disable_adapter()


def _invalid(message: str, field: str) -> FinetuneError:
    return FinetuneError(message, failure_class="InvalidSpec", field=f"spec.{field}")
