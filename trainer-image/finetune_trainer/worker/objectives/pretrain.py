"""Training from random initialisation: the model is made from a config, and its vocabulary follows the tokenizer.

The same classes learn from noised text (MaskedLM, span corruption) on a base that has its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetune_api.failures import FinetuneError
from finetune_api.job import ObjectiveType, PretrainTokenizer
from finetune_api.runfile import RunFile
from finetune_trainer.worker.heads import Head
from finetune_trainer.worker.loading import ATTENTION, weight_type
from finetune_trainer.worker.objectives.base import Objective
from finetune_trainer.worker.objectives.causal import CausalSupervised
from finetune_trainer.worker.objectives.masked import MaskedText
from finetune_trainer.worker.objectives.seq2seq import Seq2Seq
from finetune_trainer.worker.zero import unsharded


class PlainText(Objective):
    """The last base of an objective on text: with Pretrain its model has random weights, else those of the files."""

    def load_model(self, folder: Path, device: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model before any step; with Pretrain the same on all ranks and in every attempt."""
        if self.run.objective.type is not ObjectiveType.PRETRAIN:
            return super().load_model(folder, device, dtype)
        return fresh_model(folder, self.run, self.tokenizer, head=self.head, device=device, dtype=dtype)


class CausalPretrain(CausalSupervised, PlainText):
    """The next token of running text."""


class MaskedPretrain(MaskedText, PlainText):
    """The hidden tokens of running text."""


class SpanCorruption(Seq2Seq, PlainText):
    """The dropped spans of a text (Raffel et al. 2019). Unit: a target token."""

    generates = False


def fresh_model(
    folder: Path,
    run: RunFile,
    tokenizer: PreTrainedTokenizerFast,
    *,
    head: Head,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A model with random weights from the config in folder, which depend on the run's seed only.

    Raises FinetuneError: ModelUnsupported for a config that makes no model, InvalidSpec for blocks that are too long.
    """
    config = fresh_config(folder, run, tokenizer)
    torch.manual_seed(run.hyperparameters.seed)
    try:
        # Under ZeRO-3 it is sharded later: weights that are drawn shard by shard would be others than without it.
        with unsharded():
            model: PreTrainedModel = head.auto.from_config(
                config, dtype=dtype or weight_type(run), attn_implementation=ATTENTION[run.model.attention]
            )
    except (ValueError, KeyError, ImportError) as error:
        raise _unsupported(f"No model can be made from its config: {error}") from error
    return model if device is None or run.hyperparameters.zero_stage == 3 else model.to(device)


def fresh_config(folder: Path, run: RunFile, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The config in folder with the vocabulary of tokenizer; a learnt tokenizer also gives the special ids."""
    settings = run.objective.pretrain
    assert settings is not None  # the planner gives every Pretrain run its settings
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unsupported(f"Its config cannot be read: {error}") from error
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and settings.block_size > positions:
        raise FinetuneError(
            f"objective.pretrain.blockSize {settings.block_size} is more than the {positions} positions of the model's "
            "config. Lower blockSize, or raise the positions in config.json.",
            failure_class="InvalidSpec",
            field="spec.objective.pretrain.blockSize",
        )
    if settings.tokenizer is PretrainTokenizer.MODEL:
        text.vocab_size = max(text.vocab_size, len(tokenizer))
        return config
    for part in {id(part): part for part in (config, text)}.values():
        part.vocab_size = len(tokenizer)
        part.bos_token_id = tokenizer.bos_token_id
        part.eos_token_id = tokenizer.eos_token_id
        part.pad_token_id = tokenizer.pad_token_id
        if getattr(part, "is_encoder_decoder", False):
            part.decoder_start_token_id = tokenizer.pad_token_id
    return config


def _unsupported(message: str) -> FinetuneError:
    return FinetuneError(
        f"The base model cannot be pretrained. {message}", failure_class="ModelUnsupported", field="spec.model.uri"
    )
