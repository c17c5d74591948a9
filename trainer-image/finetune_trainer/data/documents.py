"""Plain text as documents for pretraining and noise: tokens with their ends, nothing asked and nothing answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_api.job import LossOn, Task, Truncation
from finetune_trainer.data.cutting import too_long
from finetune_trainer.data.encode import Encoder, Encoding, as_array
from finetune_trainer.data.formats import Example
from finetune_trainer.data.kinds import EncodedExample
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from finetune_trainer.data.encoders import EncodingRules


class DocumentEncoder:
    """Encodes the text of an example, all of it to be learnt.

    task MaskedLM frames it as the tokenizer does ([CLS] … [SEP]), Seq2Seq ends it by the end token, both within
    rules.max_length. For CausalLM Encoder itself does.
    """

    def __init__(self, tokenizer: TextTokenizer, rules: EncodingRules, *, task: Task) -> None:
        self.tokenizer = tokenizer
        self._error = rules.truncation is Truncation.ERROR
        self._limit = rules.max_length
        self._shown = Encoder(tokenizer, loss_on=LossOn.ALL, truncation=rules.truncation, max_length=rules.max_length)
        self._prefix, self._suffix = _frame(tokenizer) if task is Task.MASKED_LM else ((), (tokenizer.eos_id,))

    def encode(self, example: Example) -> Encoding | BadRecord | None:
        """The encoding; a BadRecord if it is empty or too long and may not be cut."""
        ids, _ = self.tokenizer.encode("\n".join(turn.text for turn in example.turns))
        if not ids:
            return example.record.bad("its text has no token", "Give it a text.")
        prefix = () if example.record.continues else self._prefix
        suffix = () if example.record.unfinished else self._suffix
        frame = len(prefix) + len(suffix)
        length = len(ids) + frame
        if self._error and length > self._limit:
            return too_long(example.record, length, self._limit, field="hyperparameters.maxSequenceLength")
        whole = as_array([*prefix, *ids[: max(self._limit - frame, 0)], *suffix])
        return Encoding(EncodedExample(whole, whole), length, len(whole), len(whole), "")

    def show(self, item: EncodedExample) -> str:
        """The text between ⟦ and ⟧: any token of it may be hidden."""
        return self._shown.show(item)


def _frame(tokenizer: TextTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands round a text: by the tokenizer's own post-processor, else its classifier and end tokens."""
    if tokenizer.prefix or tokenizer.suffix:
        return tokenizer.prefix, tokenizer.suffix
    first = tokenizer.variables.get("cls_token")
    found = tokenizer.backend.token_to_id(first) if first else None
    return (() if found is None else (found,)), (tokenizer.eos_id,)
