"""Answers of a model to prompts, by the settings of the spec.

Where a decoder's positions end before the answer does, the answer goes on from the newest half of them: each token is
written after at least half as many tokens as the model has positions, and never after more than it has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from finetune_api.job import Generation
from finetune_trainer.worker.padding import pad_arrays
from finetune_trainer.worker.tokenizers import end_ids

if TYPE_CHECKING:
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
                written = self._written(engine, [prompts[k] for k in places])
                texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
                for place, text in zip(places, texts, strict=True):
                    found[place] = text.strip()
        model.train(was_training)
        return found

    def notes(self, model: Any) -> dict[str, str]:
        """What the report says of answers that are shorter than the settings ask for, by the name of the setting."""
        room = _room(model)
        if not model.config.is_encoder_decoder or self._wanted <= room:
            return {}
        return {"generation.maxNewTokens": f"answers end after {room} tokens, where the decoder's positions end"}

    @property
    def _wanted(self) -> int:
        return self.settings.max_new_tokens or _DEFAULT_NEW_TOKENS

    def _written(self, engine: Any, prompts: Sequence[NDArray[np.int32]]) -> Any:
        """The tokens of each answer; each prompt for itself where the positions are too few for the longest."""
        encodes, room = engine.model.config.is_encoder_decoder, _room(engine.model)
        if encodes or max(map(len, prompts)) + self._wanted <= room:
            return self._generate(engine, prompts, min(self._wanted, room))
        return [self._continued(engine, prompt) for prompt in prompts]

    def _continued(self, engine: Any, prompt: NDArray[np.int32]) -> list[int]:
        """An answer that goes on from the newest half of the positions each time that they are full."""
        room, left = _room(engine.model), self._wanted
        kept = room // 2
        context = prompt if len(prompt) < room else prompt[-kept:]
        count = room - len(context)
        answer: list[int] = []
        ended = False
        while True:
            engine.look_for_stop()
            written = self._generate(engine, [context], min(count, left))[0].tolist()
            if not ended:
                answer += written
            ended = ended or len(written) < min(count, left) or written[-1] in self._ends(engine.model)
            left -= count
            # Sharded weights need all ranks in each pass: one whose answer has ended goes on with the others.
            if not engine.agreement.any_of(left > 0 and not ended, engine.args.device):
                return answer
            context = np.concatenate([context, np.asarray(written, np.int32)])[-kept:]
            count = room - kept

    def _generate(self, engine: Any, prompts: Sequence[NDArray[np.int32]], new_tokens: int) -> Tensor:
        """What is written behind prompts: [prompts, at most new_tokens], padded behind an end token."""
        model = engine.model
        encodes = bool(model.config.is_encoder_decoder)
        ids, mask = (
            tensor.to(engine.args.device) for tensor in pad_prompts(prompts, self._pad(model), left=not encodes)
        )
        # Autocast is put round the outermost forward only, which generate of an adapter's model passes by.
        with engine.accelerator.autocast():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._config(model, new_tokens),
                synced_gpus=engine.supervision.zero_stage == 3,
            )
        # What an encoder's decoder writes begins with its start token.
        return output[:, 1:] if encodes else output[:, ids.shape[1] :]

    def _ends(self, model: Any) -> list[int]:
        """The model's own end tokens, and those that it learnt: a base's settings know nothing of the chat's."""
        own = getattr(model.generation_config, "eos_token_id", None)
        return list(dict.fromkeys([*(own if isinstance(own, list) else [] if own is None else [own]), *self._learnt]))

    @cached_property
    def _learnt(self) -> list[int]:
        return end_ids(self.tokenizer)

    def _pad(self, model: Any) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (self._ends(model) or [0])[0]

    def _config(self, model: Any, new_tokens: int) -> GenerationConfig:
        """Nothing is taken from the model's own generation settings but its end and start tokens."""
        wish = self.settings
        sampling = {"temperature": wish.temperature or 1.0, "top_k": wish.top_k or 0, "top_p": wish.top_p or 1.0}
        return GenerationConfig(
            max_new_tokens=new_tokens,
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


def _room(model: Any) -> int:
    """Tokens that the decoder has positions for beside virtual ones: prompt and answer, or an encoder's answer alone."""
    positions = getattr(model.config, "max_position_embeddings", None)
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return positions - virtual if isinstance(positions, int) and positions > 0 else sys.maxsize


def _decoder_start(model: Any) -> int | None:
    own = getattr(model.generation_config, "decoder_start_token_id", None)
    return own if own is not None else getattr(model.config, "decoder_start_token_id", None)


def pad_prompts(prompts: Sequence[NDArray[np.int32]], fill: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [prompts, longest]. left: a decoder goes on at the right end, so padding stands before."""
    if not left:
        return pad_arrays(prompts, fill)
    ids, mask = pad_arrays([prompt[::-1].copy() for prompt in prompts], fill)
    return ids.flip(1), mask.flip(1)
