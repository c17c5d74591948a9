"""Retention: the loss on general text, before and after, to see what the tuning made the model forget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from finetune_api.failures import FinetuneError
from finetune_api.runfile import RunFile
from finetune_trainer.data import EncodedExample
from finetune_trainer.data.readers import read_folder
from finetune_trainer.data.records import BadRecord, BadRows
from finetune_trainer.worker.loss import counted_tokens, next_token_loss_sum
from finetune_trainer.worker.padding import pad_sequences

MAX_TOKENS = 2**18
"""The text is measured up to here, so that it takes a bounded time."""
_SOURCE = "evaluation.retention.uri"


@torch.no_grad()
def retention_metrics(engine: Any, run: RunFile, tokenizer: Any) -> dict[str, float]:
    """retentionLoss, the mean negative log likelihood of a token of the text, and retentionPerplexity; {} without one.

    Every rank calls it and measures all of it: sharded weights need them all. Raises DataInvalid, NonFiniteLoss.
    """
    if run.evaluation.retention is None:
        return {}
    model = engine.model
    was_training = model.training
    model.eval()
    total, tokens, size = 0.0, 0, run.hyperparameters.micro_batch_size
    blocks = list(text_blocks(engine.supervision.work.inputs / "retention", run, tokenizer))
    for start in range(0, len(blocks), size):
        engine.look_for_stop()
        batch = engine._prepare_inputs(pad_sequences(blocks[start : start + size]))
        labels = batch.pop("labels")
        with engine.accelerator.autocast():
            total += float(next_token_loss_sum(model(**batch).logits, labels))
        tokens += int(counted_tokens(labels))
    model.train(was_training)
    loss = total / tokens
    if not math.isfinite(loss):
        raise FinetuneError("The loss on the retention text is not finite.", failure_class="NonFiniteLoss")
    return {"retentionLoss": loss, **({"retentionPerplexity": math.exp(loss)} if loss < 700 else {})}


def text_blocks(folder: Any, run: RunFile, tokenizer: Any) -> Iterator[EncodedExample]:
    """The texts in blocks of maxSequenceLength tokens, up to MAX_TOKENS. Raises DataInvalid."""
    length, left, bad = run.hyperparameters.max_sequence_length, MAX_TOKENS, BadRows()
    for record in read_folder(folder, _SOURCE):
        if isinstance(record, BadRecord):
            bad.add(record)
            continue
        text = record.fields.get("text")
        if not isinstance(text, str):
            bad.add(record.bad("there is no column 'text'", "put the text into a column of that name"))
            continue
        ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)[:left]
        left -= len(ids)
        for start in range(0, len(ids), length):
            block = ids[start : start + length]
            if len(block) > 1:  # the first token of a block is predicted by nothing
                yield EncodedExample(block, block)
        if left <= 0:
            break
    bad.check(0 if left == MAX_TOKENS else 1)
    if left == MAX_TOKENS:
        raise FinetuneError(
            f"{_SOURCE} holds no text. Add records with a column 'text', or remove it.",
            failure_class="DataInvalid",
            field=f"spec.{_SOURCE}",
        )
