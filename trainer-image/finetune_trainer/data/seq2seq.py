"""A source and a target as tokens for Seq2Seq: the target ends with the end token exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_api.job import Truncation
from finetune_trainer.data.cutting import too_long
from finetune_trainer.data.encode import Encoding, as_array
from finetune_trainer.data.formats import Example
from finetune_trainer.data.kinds import EncodedTarget
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from finetune_trainer.data.encoders import EncodingRules


class Seq2SeqEncoder:
    """Encodes prompts as sources and completions as targets, as the model's own tokenizer does."""

    def __init__(self, tokenizer: TextTokenizer, rules: EncodingRules) -> None:
        """rules.max_source, rules.max_target: limits in tokens, within rules.max_length, for which memory is planned."""
        self.tokenizer = tokenizer
        self._error = rules.truncation is Truncation.ERROR
        self._source_limit, self._source_field = _bound("dataset.maxSourceTokens", rules.max_source, rules.max_length)
        self._target_limit, self._target_field = _bound("dataset.maxTargetTokens", rules.max_target, rules.max_length)

    def encode(self, example: Example) -> Encoding | BadRecord | None:
        """An EncodedTarget; a BadRecord for a record that is not a source and a target, or is too long for Error."""
        if len(example.turns) != 2:
            return example.record.bad(
                "it is not one source and one target", "Use a format with a prompt and a completion."
            )
        source_text, target_text = (turn.text for turn in example.turns)
        source, target = self.source(source_text), self.target(target_text)
        if len(target) == 1:
            return example.record.bad("the target has no token", "Give it a target.")
        if self._error:
            if len(source) > self._source_limit:
                field = self._source_field
                return too_long(example.record, len(source), self._source_limit, field=field, what="the source has ")
            if len(target) > self._target_limit:
                field = self._target_field
                return too_long(example.record, len(target), self._target_limit, field=field, what="the target has ")
        cut_source = self._shorter(source, self.tokenizer.suffix, self._source_limit)
        cut_target = self._shorter(target, (self.tokenizer.eos_id,), self._target_limit)
        item = EncodedTarget(as_array(cut_source), as_array(cut_target))
        length, kept = len(source) + len(target), len(cut_source) + len(cut_target)
        return Encoding(item, length, kept, len(cut_source), target_text)

    def source(self, text: str) -> list[int]:
        """The whole source with the special tokens that the tokenizer puts round a text."""
        ids, _ = self.tokenizer.encode(text)
        return [*self.tokenizer.prefix, *ids, *self.tokenizer.suffix]

    def target(self, text: str) -> list[int]:
        """The whole target and one end token; what the tokenizer puts before a text comes before it."""
        ids, _ = self.tokenizer.encode(text)
        while ids and ids[-1] == self.tokenizer.eos_id:
            ids.pop()
        return [*self.tokenizer.prefix, *ids, self.tokenizer.eos_id]

    def show(self, item: EncodedTarget) -> str:
        """The source, and the target between ⟦ and ⟧."""
        source, target = item.input_ids.tolist(), item.labels.tolist()
        return f"{self.tokenizer.decode(source)} → ⟦{self.tokenizer.decode(target)}⟧"

    @staticmethod
    def _shorter(ids: list[int], end: tuple[int, ...], limit: int) -> list[int]:
        """ids cut to limit; what has to stand at the end still does."""
        return ids if len(ids) <= limit else [*ids[: max(limit - len(end), 0)], *end]


def _bound(name: str, limit: int | None, whole: int) -> tuple[int, str]:
    """(the lower of both limits in tokens, the field that sets it)."""
    return (limit, name) if limit is not None and limit <= whole else (whole, "hyperparameters.maxSequenceLength")
