"""Completions drawn from the policy itself, the same again for the same seed and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from finetune_trainer.worker.tokenizers import end_ids


@dataclass(frozen=True)
class Drawn:
    """One completion on the host. ids: int64 [length], at least 1. ended: whether its last token is an end token."""

    ids: Tensor
    ended: bool


def seed_of(*parts: int) -> int:
    """One seed from several numbers, such as the run's seed, the step, the rank and the micro batch."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Sampler:
    """Draws from softmax(logits / temperature) over the whole vocabulary: what the loss takes the policy to be."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, temperature: float, new_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._temperature = temperature
        self._new_tokens = new_tokens
        self._ends = end_ids(tokenizer)

    def draw(self, engine: Any, ids: Tensor, mask: Tensor, seed: int) -> list[Drawn]:
        """One completion for each prompt. ids, mask: [prompts, longest], padded on the left.

        The global random state is as before afterwards. Under ZeRO-3 every rank has to call it.
        """
        model, device = engine.model, engine.args.device
        was_training = model.training
        model.eval()
        devices = [device] if device.type == "cuda" else []
        ends = self.ends(model)
        # The library puts autocast round the model's own forward only, and an adapter's model generates beneath it.
        with torch.random.fork_rng(devices), torch.no_grad(), engine.accelerator.autocast():
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=self._config(ends),
                synced_gpus=engine.supervision.zero_stage == 3,
            )
        model.train(was_training)
        return [_until_end(row, ends) for row in output[:, ids.shape[1] :].cpu()]

    def ends(self, model: Any) -> list[int]:
        """Every token that ends a completion: the model's, the tokenizer's, and the one that ends a chat's answer."""
        own = getattr(model.generation_config, "eos_token_id", None)
        found = [*(own if isinstance(own, list) else [own]), *self._ends]
        return sorted({token for token in found if token is not None})

    def _config(self, ends: Sequence[int]) -> GenerationConfig:
        """What the model's own settings would change of the distribution is named, because they fill what is not."""
        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=self._new_tokens,
            do_sample=True,
            temperature=self._temperature,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            typical_p=1.0,
            epsilon_cutoff=0.0,
            eta_cutoff=0.0,
            min_length=0,
            min_new_tokens=0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=1,
            eos_token_id=list(ends),
            pad_token_id=ends[0] if pad is None else pad,
            use_cache=True,
        )


def _until_end(row: Tensor, ends: Sequence[int]) -> Drawn:
    """row up to its first end token, that one included."""
    found = torch.isin(row, torch.tensor(list(ends))).nonzero()
    length = int(found[0]) + 1 if len(found) else len(row)
    return Drawn(row[:length].clone(), len(found) > 0)
