"""The run's tokenizer: the base's own, with the tokens that the run adds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune_api.runfile import RunFile
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.tokenizer import TextTokenizer
from finetune_trainer.worker.loading import load_tokenizer
from finetune_trainer.worker.vocabulary import learns_tokenizer, learnt_tokenizer


def prepare_tokenizer(run: RunFile, work: WorkDir) -> PreTrainedTokenizerFast:
    """The tokenizer that the run trains with. One that differs from the base's is written to changed_folder.

    Every process calls it and gets the same. Raises ModelUnsupported for a tokenizer that cannot be read, and as
    vocabulary.learnt_tokenizer does.
    """
    if learns_tokenizer(run):
        return learnt_tokenizer(run, work, changed_folder(work))
    tokenizer = load_tokenizer(work.inputs / "model")
    if run.model.add_special_tokens:
        tokenizer.add_tokens(run.model.add_special_tokens, special_tokens=True)
        write_changed(tokenizer, work)
    return tokenizer


def changed_folder(work: WorkDir) -> Path:
    """Where a tokenizer lies that is not the base's own; absent where the base's is used."""
    return work.root / "cache" / "tokenizer"


def tokenizer_folder(work: WorkDir) -> Path:
    """The folder of the run's tokenizer."""
    changed = changed_folder(work)
    return changed if changed.is_dir() else work.inputs / "model"


def write_changed(tokenizer: PreTrainedTokenizerFast, work: WorkDir) -> None:
    """Write the run's tokenizer to changed_folder. Ranks of one node may do so at the same time."""
    target = changed_folder(work)
    if target.is_dir():
        return
    draft = target.with_name(f".tokenizer-{os.getpid()}")
    tokenizer.save_pretrained(draft)
    try:
        draft.rename(target)
    except OSError:  # another rank was first; both hold the same
        shutil.rmtree(draft)


def added_ids(run: RunFile, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of the tokens that the run adds; their embeddings train with an adapter too."""
    found = [tokenizer.convert_tokens_to_ids(token) for token in run.model.add_special_tokens or []]
    return sorted(set(found))


def end_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens with which texts end that a model learns: the end token, and what ends an answer of the chat template."""
    stop = ChatFormat(TextTokenizer.from_transformers(tokenizer)).stop
    found = [tokenizer.eos_token_id, None if stop is None else tokenizer.convert_tokens_to_ids(stop)]
    return sorted({token for token in found if token is not None})


def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Room for every id of the tokenizer; each new row is the mean of the old ones, the same in every process.

    Rows that the base has beyond its tokenizer are used as they are, and none is ever taken away.
    """
    rows = _rows(model.get_input_embeddings())
    if len(tokenizer) <= rows:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    _fill(model.get_input_embeddings(), rows)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        _fill(head, rows)


def _rows(layer: Any) -> int:
    shape = getattr(layer.weight, "ds_shape", layer.weight.shape)
    return int(shape[0])


@torch.no_grad()
def _fill(layer: Any, rows: int) -> None:
    """Set the rows from `rows` on to the mean of those before; likewise a bias."""
    weights = [w for w in (layer.weight, getattr(layer, "bias", None)) if w is not None]
    for weight in weights:
        if hasattr(weight, "ds_id"):
            from deepspeed import zero

            with zero.GatheredParameters([weight], modifier_rank=0):
                weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)
        else:
            weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)
