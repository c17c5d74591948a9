"""Preferences as tokens: two completions of one prompt, or one completion and whether it is a good one.

Each completion is a whole text, encoded as supervised learning encodes it (template, BOS, end token), with the loss on
the completion only. What is too long loses the beginning of its prompt; a completion is never cut, because the end
token is part of what is preferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune_api.job import LossOn, Truncation
from finetune_trainer.data.chat import ChatError
from finetune_trainer.data.encode import Encoder, Encoding, _without_oldest, as_array
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.kinds import EncodedExample, EncodedJudged, EncodedPair
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from finetune_trainer.data.encoders import EncodingRules

_ANSWERS = ("assistant", "completion")


@dataclass(frozen=True, slots=True)
class _Text:
    """One text. ids and labels of equal length; prompt: tokens before the completion."""

    ids: list[int]
    labels: list[int]
    prompt: int

    def without(self, start: int, count: int) -> _Text:
        """The text without count tokens from start on."""
        end = start + count
        return _Text(self.ids[:start] + self.ids[end:], self.labels[:start] + self.labels[end:], self.prompt - count)


class _Completions:
    """Encodes a prompt with each of several ways to go on, cut by the same amount."""

    def __init__(self, tokenizer: TextTokenizer, rules: EncodingRules) -> None:
        self.tokenizer = tokenizer
        self._rules = rules
        self._encoder = Encoder(
            tokenizer, loss_on=LossOn.COMPLETION, truncation=rules.truncation, max_length=rules.max_length
        )

    def texts(
        self, example: Example, ways: Sequence[Sequence[Turn]]
    ) -> tuple[list[_Text], int, int] | BadRecord | None:
        """(texts, tokens before the cut, dropped turns) of the prompt with each of ways.

        None if a completion does not fit even without its prompt.
        """
        prompt, limit = example.turns, self._rules.max_length
        length = 0
        while True:
            try:
                found = [self._text(prompt, way) for way in ways]
            except ChatError as error:
                return example.record.bad(str(error), "Correct the messages, or set dataset.promptTemplate.")
            longest = max(len(text.ids) for text in found)
            length = length or sum(len(text.ids) for text in found)
            if longest <= limit:
                break
            if self._rules.truncation is Truncation.ERROR:
                return example.record.bad(
                    f"{longest} tokens, more than hyperparameters.maxSequenceLength {limit}",
                    "Raise hyperparameters.maxSequenceLength, shorten the records, or set dataset.truncation to "
                    "Tail or OldestTurns.",
                )
            shorter = self._shorter(prompt, ways[0])
            if shorter is None:
                break
            prompt = shorter
        fitting = _fit(found, limit)
        return None if fitting is None else (fitting, length, len(example.turns) - len(prompt))

    def show(self, ids: Any, labels: Any) -> str:
        """A text, the completion between ⟦ and ⟧."""
        return self._encoder.show(EncodedExample(ids, labels))

    def _text(self, prompt: Sequence[Turn], way: Sequence[Turn]) -> _Text:
        rendered = self._encoder.render([*prompt, *way])
        earlier = sum(turn.role in _ANSWERS for turn in prompt)
        spans = rendered.spans[earlier:]
        return _Text(*self._encoder.tokens(replace(rendered, spans=spans, prompt_end=spans[0][0])))

    def _shorter(self, prompt: Sequence[Turn], way: Sequence[Turn]) -> tuple[Turn, ...] | None:
        if self._rules.truncation is not Truncation.OLDEST_TURNS:
            return None
        left = _without_oldest([*prompt, *way])
        return None if left is None or len(left) <= len(way) else left[: len(left) - len(way)]


def _fit(texts: list[_Text], limit: int) -> list[_Text] | None:
    """texts without the beginning of their prompt, so that the longest fits; None if the prompt is too short for that.

    The first token stays: a BOS, or what the completion's first token is predicted from.
    """
    over = max(len(text.ids) for text in texts) - limit
    if over <= 0:
        return texts
    if over > min(text.prompt for text in texts) - 1:
        return None
    return [text.without(1, over) for text in texts]


class PairEncoder:
    """Two completions of one prompt, for DPO, ORPO and Reward: items are EncodedPair."""

    def __init__(self, tokenizer: TextTokenizer, rules: EncodingRules) -> None:
        self.tokenizer = tokenizer
        self._completions = _Completions(tokenizer, rules)

    def encode(self, example: Example) -> Encoding | BadRecord | None:
        """The pair; a BadRecord if it is too long or its completions are the same; None if a completion cannot fit."""
        found = self._completions.texts(example, (example.chosen, example.rejected))
        if found is None or isinstance(found, BadRecord):
            return found
        (chosen, rejected), length, dropped = found
        if chosen.ids == rejected.ids:
            return example.record.bad(
                "chosen and rejected are the same", "Give two different completions, or remove the record."
            )
        item = EncodedPair(
            as_array(chosen.ids), as_array(chosen.labels), as_array(rejected.ids), as_array(rejected.labels)
        )
        kept = len(chosen.ids) + len(rejected.ids)
        return Encoding(item, length, kept, chosen.prompt, example.chosen[-1].text, dropped)

    def show(self, item: EncodedPair) -> str:
        """Both texts, the completions between ⟦ and ⟧."""
        chosen = self._completions.show(item.chosen_ids, item.chosen_labels)
        rejected = self._completions.show(item.rejected_ids, item.rejected_labels)
        return f"chosen: {chosen}\nrejected: {rejected}"


class JudgedEncoder:
    """One completion and whether it is desirable, for KTO: items are EncodedJudged."""

    def __init__(self, tokenizer: TextTokenizer, rules: EncodingRules) -> None:
        self.tokenizer = tokenizer
        self._completions = _Completions(tokenizer, rules)

    def encode(self, example: Example) -> Encoding | BadRecord | None:
        """The completion; a BadRecord if it is too long; None if the completion cannot fit."""
        way = example.chosen or example.rejected
        found = self._completions.texts(example, (way,))
        if found is None or isinstance(found, BadRecord):
            return found
        (text,), length, dropped = found
        item = EncodedJudged(as_array(text.ids), as_array(text.labels), text.prompt, int(bool(example.chosen)))
        return Encoding(item, length, len(text.ids), text.prompt, way[-1].text, dropped)

    def show(self, item: EncodedJudged) -> str:
        """The text, the completion between ⟦ and ⟧, and how it is judged."""
        word = "desirable" if item.desirable else "undesirable"
        return f"{word}: {self._completions.show(item.input_ids, item.labels)}"
