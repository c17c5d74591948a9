"""How many tokens a record has for an objective on a task, without an array: the light image has no numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from finetune_api.job import LossOn, ObjectiveType, Task, Truncation
from finetune_trainer.data.chat import ChatError
from finetune_trainer.data.cutting import too_long
from finetune_trainer.data.encode import IGNORED, Encoder, Rendered
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.prepare import in_batches
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.tokenizer import TextTokenizer

_MEND = "Correct the messages, or set dataset.promptTemplate."
_AS_THEY_STAND = ("text", "prompt", "completion")
Part = tuple[str, Callable[[list[int]], int]]
"""A text of a record, and how many tokens its ids lack or have too many."""


@dataclass(frozen=True, slots=True)
class Limits:
    """In tokens, of source and target, or of a question and its answer. error: what is longer is refused, not cut."""

    source: int | None = None
    target: int | None = None
    error: bool = False


@dataclass(frozen=True, slots=True)
class Size:
    """lengths: tokens of each sequence that the record gives: source and target, chosen and rejected.

    They are what Limits leave, before any cut to the longest sequence. cut: whether Limits took anything.
    """

    lengths: tuple[int, ...]
    cut: bool = False

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Of the longest sequence."""
        return max(self.lengths)


class Measure:
    """Counts as the encoders of data/ do. plain_chat: whether a conversation was written without a chat template."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        objective: ObjectiveType,
        task: Task,
        loss_on: LossOn,
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        self._tokenizer = tokenizer
        self._objective = objective
        self._task = task
        self._limits = limits
        one_text = task is Task.CAUSAL_LM
        self._encoder = Encoder(
            tokenizer,
            loss_on=loss_on,
            truncation=Truncation.ERROR if limits.error else Truncation.TAIL,
            max_length=1 << 30,
            max_source=limits.source if one_text else None,
            max_target=limits.target if one_text else None,
        )
        self.plain_chat = False

    def sizes(self, examples: Iterable[Example]) -> Iterator[tuple[Example, Size] | BadRecord]:
        """Each example, its question and answer within the limits, with its size.

        A BadRecord for what the chat template refuses, and for what is longer than the limits where that is an error.
        """
        for batch in in_batches(examples, lambda example: example):
            found = [self._prepared(example) for example in batch]
            texts = [text for item in found if not isinstance(item, BadRecord) for text, _ in item[2]]
            ids = iter(self._tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False))
            for item in found:
                if isinstance(item, BadRecord):
                    yield item
                    continue
                example, cut, parts = item
                lengths = tuple(len(own := next(ids).ids) + change(own) for _, change in parts)
                two_sides = self._task is Task.SEQ2SEQ and len(lengths) == 2
                yield self._sides(example, lengths) if two_sides else (example, Size(lengths, cut > 0))

    def teaches_within(self, example: Example, limit: int) -> bool:
        """Whether something is left to learn of a text of causal learning once its tail is cut to limit tokens."""
        _, labels, _ = self._encoder.tokens(self._encoder.render(example.turns))
        return any(label != IGNORED for label in labels[1:limit])

    def _prepared(self, example: Example) -> tuple[Example, int, list[Part]] | BadRecord:
        """(the example within the limits, tokens cut off, its texts)."""
        limited = self._encoder.within_limits(example)
        if isinstance(limited, BadRecord):
            return limited
        parts = self._parts(limited[0])
        return parts if isinstance(parts, BadRecord) else (*limited, parts)

    def _sides(self, example: Example, lengths: tuple[int, ...]) -> tuple[Example, Size] | BadRecord:
        """A source and its target within their limits, which count special tokens too."""
        names, kept = ("Source", "Target"), []
        for length, limit, name in zip(lengths, (self._limits.source, self._limits.target), names, strict=True):
            if limit is not None and length > limit and self._limits.error:
                what = f"the {name.lower()} has "
                return too_long(example.record, length, limit, field=f"dataset.max{name}Tokens", what=what)
            kept.append(min(length, limit or length))
        return example, Size(tuple(kept), tuple(kept) != lengths)

    def _parts(self, example: Example) -> list[Part] | BadRecord:
        try:
            if self._objective in (ObjectiveType.PPO, ObjectiveType.GRPO):
                return [self._prompt(example)]
            if example.chosen or example.rejected:
                ways = [way for way in (example.chosen, example.rejected) if way]
                return [self._conversation((*example.turns, *way)) for way in ways]
            if self._task is Task.CAUSAL_LM:
                return [self._conversation(example.turns)]
        except ChatError as error:
            return example.record.bad(str(error), _MEND)
        return self._framed(example)

    def _conversation(self, turns: Sequence[Turn]) -> Part:
        self._note(turns)
        rendered = self._encoder.render(turns)
        return rendered.text, lambda ids: self._ending(rendered, ids) + self._tokenizer.with_bos(ids)

    def _ending(self, rendered: Rendered, ids: list[int]) -> int:
        return 0 if rendered.ends or ids[-1:] == [self._tokenizer.eos_id] else 1

    def _prompt(self, example: Example) -> Part:
        asked = example.turns[:-1] if example.turns[-1].role in ("assistant", "completion") else example.turns
        if asked and asked[0].role in _AS_THEY_STAND:
            return asked[0].text, self._tokenizer.with_bos
        self._note(asked)
        return self._encoder.chat.render(asked, ask=True), self._tokenizer.with_bos

    def _framed(self, example: Example) -> list[Part]:
        frame = len(self._tokenizer.prefix) + len(self._tokenizer.suffix)
        if self._task is Task.TOKEN_CLASSIFICATION:
            return [(" ".join(example.words), lambda ids: frame)]
        if self._task is Task.SEQUENCE_CLASSIFICATION:
            return [("".join(turn.text for turn in example.turns), lambda ids: frame)]
        if self._task is Task.SEQ2SEQ and len(example.turns) == 2:
            source, target = example.turns
            return [(source.text, lambda ids: frame), (target.text, self._target)]
        text = "\n".join(turn.text for turn in example.turns)
        if self._task is Task.MASKED_LM:
            return [(text, lambda ids: frame or self._bare_frame())]
        return [(text, lambda ids: 1)]

    def _bare_frame(self) -> int:
        """Classifier and end tokens of a tokenizer that puts nothing round a text by itself."""
        first = self._tokenizer.variables.get("cls_token")
        return 1 + (first is not None and self._tokenizer.backend.token_to_id(first) is not None)

    def _target(self, ids: list[int]) -> int:
        own = 0
        while own < len(ids) and ids[-1 - own] == self._tokenizer.eos_id:
            own += 1
        return len(self._tokenizer.prefix) + 1 - own

    def _note(self, turns: Sequence[Turn]) -> None:
        if self._tokenizer.chat_template is None and any(turn.role not in _AS_THEY_STAND for turn in turns):
            self.plain_chat = True
