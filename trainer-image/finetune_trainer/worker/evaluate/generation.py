"""Answers of a model to prompts, by the settings of the spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from finetune_api.job import Generation
from finetune_trainer.worker.padding import pad_arrays
from finetune_trainer.worker.tokenizers import end_ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DEFAULT_NEW_TOKENS = 64
# Without gradient a pass holds far less than one of training does.
_PROMPTS_AT_ONCE = 8
_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
}
"""Settings without effect, named because the library takes what is not named from the model's own."""


@dataclass(frozen=True)
class Generator:
    """Generates by the run's settings, greedily unless they ask for sampling; the same prompts give the same answers."""

    settings: Generation
    tokenizer: PreTrainedTokenizerFast
    seed: int

    def answers(self, engine: Any, prompts: Sequence[NDArray[np.int32]]) -> list[str]:
        """One answer per prompt from the model as it is now. Every rank calls it: sharded weights need them all."""
        model = engine.model
        was_training = model.training
        model.eval()
        # Prompts of like length go together; each answer returns to its own place.
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
        found = [""] * len(prompts)
        with torch.random.fork_rng(), torch.no_grad(), engine.supervision.heartbeat.long_phase():
            torch.manual_seed(self.seed)
            for start in range(0, len(order), _PROMPTS_AT_ONCE):
                engine.look_for_stop()
                places = order[start : start + _PROMPTS_AT_ONCE]
                for place, answer in zip(places, self._answer(engine, [prompts[k] for k in places]), strict=True):
                    found[place] = answer
        model.train(was_training)
        return found

    def _answer(self, engine: Any, prompts: Sequence[NDArray[np.int32]]) -> list[str]:
        model = engine.model
        encodes = bool(model.config.is_encoder_decoder)
        ids, mask = (
            tensor.to(engine.args.device) for tensor in pad_prompts(prompts, self._pad(model), left=not encodes)
        )
        config = self._config(model, 0 if encodes else ids.shape[1])
        if config.max_new_tokens < 1:
            return [""] * len(prompts)
        # Autocast is put round the outermost forward only, which generate of an adapter's model passes by.
        with engine.accelerator.autocast():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                synced_gpus=engine.supervision.zero_stage == 3,
            )
        # What an encoder's decoder writes begins with its start token.
        written = output[:, 1:] if encodes else output[:, ids.shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _ends(self, model: Any) -> list[int]:
        """The model's own end tokens, and those that it learnt: a base's settings know nothing of the chat's."""
        own = getattr(model.generation_config, "eos_token_id", None)
        return list(dict.fromkeys([*(own if isinstance(own, list) else [] if own is None else [own]), *self._learnt]))

    @cached_property
    def _learnt(self) -> list[int]:
        return end_ids(self.tokenizer)

    def _pad(self, model: Any) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (self._ends(model) or [0])[0]

    def _config(self, model: Any, prompt: int) -> GenerationConfig:
        """Nothing is taken from the model's own generation settings but its end and start tokens."""
        wish = self.settings
        sampling = {"temperature": wish.temperature or 1.0, "top_k": wish.top_k or 0, "top_p": wish.top_p or 1.0}
        wanted = wish.max_new_tokens or _DEFAULT_NEW_TOKENS
        # Learned positions end with the model's; a longer text would be an index error.
        positions = getattr(model.config, "max_position_embeddings", None)
        virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
        return GenerationConfig(
            max_new_tokens=min(wanted, positions - prompt - virtual) if positions else wanted,
            do_sample=bool(wish.do_sample),
            num_beams=wish.num_beams or 1,
            no_repeat_ngram_size=wish.no_repeat_ngram_size or 0,
            eos_token_id=self._ends(model) or None,
            pad_token_id=self._pad(model),
            decoder_start_token_id=_decoder_start(model),
            use_cache=True,
            **(sampling if wish.do_sample else {}),
            **_NEUTRAL,
        )


def _decoder_start(model: Any) -> int | None:
    own = getattr(model.generation_config, "decoder_start_token_id", None)
    return own if own is not None else getattr(model.config, "decoder_start_token_id", None)


def pad_prompts(prompts: Sequence[NDArray[np.int32]], fill: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [prompts, longest]. left: a decoder goes on at the right end, so padding stands before."""
    if not left:
        return pad_arrays(prompts, fill)
    ids, mask = pad_arrays([prompt[::-1].copy() for prompt in prompts], fill)
    return ids.flip(1), mask.flip(1)
