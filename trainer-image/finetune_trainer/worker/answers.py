"""Answers of a model to held-out prompts, for the side-by-side table of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetune_api.job import Generation
from finetune_trainer.data import HeldOutPrompt

SHOWN_PROMPTS = 3
_DEFAULT_NEW_TOKENS = 64


class Answerer:
    """Generates by the run's settings, greedily unless they ask for sampling; the same prompts before and after."""

    def __init__(
        self, prompts: Sequence[HeldOutPrompt], settings: Generation, tokenizer: PreTrainedTokenizerFast, seed: int
    ) -> None:
        """prompts: the first SHOWN_PROMPTS are used."""
        self.prompts = list(prompts[:SHOWN_PROMPTS])
        self._settings = settings
        self._tokenizer = tokenizer
        self._seed = seed

    def answers(self, engine: Any) -> list[str]:
        """One answer per prompt from the model as it is now. Every rank calls it: sharded weights need them all."""
        model: PreTrainedModel = engine.model
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(), torch.no_grad(), engine.supervision.heartbeat.long_phase():
            torch.manual_seed(self._seed)
            found = [self._answer(model, prompt, engine) for prompt in self.prompts]
        model.train(was_training)
        return found

    def _answer(self, model: PreTrainedModel, prompt: HeldOutPrompt, engine: Any) -> str:
        ids = torch.from_numpy(prompt.prompt_ids.astype("int64"))[None].to(engine.args.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self._config(model),
            synced_gpus=engine.supervision.zero_stage == 3,
        )
        return self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def _config(self, model: PreTrainedModel) -> GenerationConfig:
        """Nothing is taken from the model's own generation settings but its end tokens."""
        own, wish = model.generation_config, self._settings
        end = own.eos_token_id if own is not None and own.eos_token_id is not None else self._tokenizer.eos_token_id
        first_end = end[0] if isinstance(end, list) else end
        options = (
            {
                "temperature": wish.temperature,
                "top_k": wish.top_k,
                "top_p": wish.top_p,
            }
            if wish.do_sample
            else {}
        )
        return GenerationConfig(
            max_new_tokens=wish.max_new_tokens or _DEFAULT_NEW_TOKENS,
            do_sample=bool(wish.do_sample),
            num_beams=wish.num_beams or 1,
            no_repeat_ngram_size=wish.no_repeat_ngram_size or 0,
            eos_token_id=end,
            pad_token_id=self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else first_end,
            use_cache=True,
            **{key: value for key, value in options.items() if value is not None},
        )
