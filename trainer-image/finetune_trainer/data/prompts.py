"""Prompts for a model that answers itself: PPO and GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune_api.job import LossOn, Truncation
from finetune_trainer.data.chat import ChatError
from finetune_trainer.data.encode import Encoder, Encoding, as_array
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.kinds import EncodedPrompt
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from finetune_trainer.data.encoders import EncodingRules

_ANSWERS = ("assistant", "completion")


class PromptEncoder:
    """A prompt up to where the model is to write, and the answer that the data gives, if any."""

    def __init__(self, tokenizer: TextTokenizer, rules: EncodingRules) -> None:
        """rules.new_tokens of rules.max_length are left for the completion."""
        self.tokenizer = tokenizer
        self._truncation = rules.truncation
        self._limit = rules.max_length - rules.new_tokens
        self._encoder = Encoder(
            tokenizer, loss_on=LossOn.COMPLETION, truncation=rules.truncation, max_length=rules.max_length
        )

    def encode(self, example: Example) -> Encoding | BadRecord | None:
        """The prompt, without its beginning where it is too long; a BadRecord if that is not wished, or it is empty."""
        turns = example.turns
        answered = turns[-1].role in _ANSWERS
        asked = turns[:-1] if answered else turns
        reference = turns[-1].text if answered else ""
        try:
            ids = self._ids(asked)
        except ChatError as error:
            return example.record.bad(str(error), "Correct the messages, or set dataset.promptTemplate.")
        if not ids:
            return example.record.bad("the prompt is empty", "Give it a prompt.")
        length = len(ids)
        if length > self._limit:
            if self._truncation is Truncation.ERROR or self._limit < 1:
                return example.record.bad(
                    f"{length} tokens, more than the {max(self._limit, 0)} that hyperparameters.maxSequenceLength "
                    "leaves beside maxNewTokens",
                    "Raise hyperparameters.maxSequenceLength, shorten the prompts, or set dataset.truncation to Tail.",
                )
            ids = [ids[0], *ids[length - self._limit + 1 :]]
        item = EncodedPrompt(as_array(ids), _as_bytes(reference.strip()))
        return Encoding(item, length, len(ids), len(ids), reference.strip())

    def show(self, item: EncodedPrompt) -> str:
        """The prompt, and the wished answer between ⟦ and ⟧ if there is one."""
        reference = item.reference.tobytes().decode()
        prompt = self.tokenizer.decode(item.input_ids.tolist())
        return f"{prompt}⟦{reference}⟧" if reference else prompt

    def _ids(self, asked: Sequence[Turn]) -> list[int]:
        if not asked:
            return []
        plain = asked[0].role in ("prompt", "text")
        text = asked[0].text if plain else self._encoder.chat.render(asked, ask=True)
        ids, _ = self.tokenizer.encode(text)
        change = self.tokenizer.with_bos(ids)
        if change > 0 and self.tokenizer.bos_id is not None:
            return [self.tokenizer.bos_id, *ids]
        return ids[-change:] if change < 0 else ids


def _as_bytes(text: str) -> NDArray[np.uint8]:
    import numpy as np  # the light image counts tokens without it

    return np.frombuffer(text.encode(), np.uint8)
