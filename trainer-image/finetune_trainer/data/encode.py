"""Examples as tokens: what is in the loss, one BOS, an end token that is learnt, and what is cut.

The whole text is tokenised at once and each token is placed by its character range, so merges across the boundary of
prompt and completion come out as they do when the model is used. A token that reaches over the boundary is in the loss:
without it the first word of the completion would never be learnt. The prompt of a held-out record ends before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finetune_api.job import LossOn, Truncation
from finetune_trainer.data.chat import ChatError, ChatFormat, Span
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.kinds import EncodedExample, Item
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.tokenizer import PlacedTokens, TextTokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IGNORED = -100
"""The label of a token outside the loss, as torch's cross entropy has it."""
OPEN, CLOSE = "⟦", "⟧"
_ANSWERS = ("assistant", "completion")
_CONTINUED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as text.

    spans: character ranges in the loss. ends: whether an end token already closes the last one, or the text goes on.
    prompt_end: where the last completion begins. answer: that completion, for comparison with what the model writes.
    begins: whether it is the beginning of its text.
    """

    text: str
    spans: tuple[Span, ...]
    ends: bool
    prompt_end: int
    answer: str
    begins: bool = True


@dataclass(frozen=True, slots=True)
class Encoding:
    """An encoded record and what was cut off it.

    example: one of data.kinds. length: tokens before the cut; kept: after it. prompt: how many tokens of input_ids stand
    before the last completion. answer: the completion that the data gives, or the name of the label.
    """

    example: Item
    length: int
    kept: int
    prompt: int
    answer: str
    dropped_turns: int = 0

    @property
    def cut(self) -> bool:
        """Whether anything was cut off."""
        return self.dropped_turns > 0 or self.length > self.kept


class Encoder:
    """Encodes examples with one tokenizer and one set of rules. max_length: tokens."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        loss_on: LossOn,
        truncation: Truncation,
        max_length: int,
        max_source: int | None = None,
        max_target: int | None = None,
    ) -> None:
        """max_source, max_target: limits in tokens of the last question and of its answer, before they are put together."""
        self.tokenizer = tokenizer
        self.chat = ChatFormat(tokenizer)
        self._loss_on = loss_on
        self._truncation = truncation
        self._max_length = max_length
        self._limits = {"dataset.maxSourceTokens": max_source, "dataset.maxTargetTokens": max_target}

    def encode(self, example: Example) -> Encoding | BadRecord | None:
        """The encoding; a BadRecord if it is too long or teaches nothing; None if the cut left nothing to learn."""
        return self.encode_many([example])[0]

    def encode_many(self, examples: Sequence[Example]) -> list[Encoding | BadRecord | None]:
        """`encode` of each example; several at once are faster."""
        prepared = [self._prepared(example) for example in examples]
        texts = [found[0].text for found in prepared if not isinstance(found, BadRecord)]
        encoded = iter(self.tokenizer.place_many(texts))
        return [
            found if isinstance(found, BadRecord) else self._encoded(example, *found, next(encoded))
            for example, found in zip(examples, prepared, strict=True)
        ]

    def _prepared(self, example: Example) -> tuple[Rendered, Sequence[Turn], int] | BadRecord:
        """(text, turns, tokens cut off by the limits of source and target) of an example."""
        limited = self.within_limits(example)
        if isinstance(limited, BadRecord):
            return limited
        turns, cut = limited[0].turns, limited[1]
        try:
            rendered, record = self.render(turns), example.record
        except ChatError as error:
            return example.record.bad(str(error), "Correct the messages, or set dataset.promptTemplate.")
        ends = rendered.ends or record.unfinished
        return replace(rendered, ends=ends, begins=not record.continues), turns, cut

    def within_limits(self, example: Example) -> tuple[Example, int] | BadRecord:
        """(the example with its last question and answer within their limits, tokens cut off); a BadRecord for Error.

        Both lose their end, but a template's text its beginning, because the words that ask for the answer stand there.
        """
        if not any(self._limits.values()):
            return example, 0
        turns, cut = list(example.turns), 0
        for (name, limit), at in zip(self._limits.items(), question_and_answer(turns), strict=True):
            if limit is None or not 0 <= at < len(turns):
                continue
            turn = turns[at]
            _, offsets = self.tokenizer.encode(turn.text)
            over = len(offsets) - limit
            if over <= 0:
                continue
            if self._truncation is Truncation.ERROR:
                problem = f"message {at + 1} ({turn.role}) has {len(offsets)} tokens, more than {name} {limit}"
                return example.record.bad(problem, f"Raise {name}, or set dataset.truncation to Tail.")
            kept = turn.text[offsets[over][0] :] if turn.role == "prompt" else turn.text[: offsets[limit - 1][1]]
            turns[at], cut = Turn(turn.role, kept), cut + over
        return (replace(example, turns=tuple(turns)), cut) if cut else (example, 0)

    def _encoded(
        self, example: Example, rendered: Rendered, turns: Sequence[Turn], cut: int, encoded: PlacedTokens
    ) -> Encoding | BadRecord | None:
        ids, labels, prompt = self.tokens(rendered, encoded)
        length, whole = len(ids) + cut, len(turns)
        if not _learns(labels) and not example.record.unfinished:
            return example.record.bad("no token of it is in the loss", "Give it a completion.")
        if len(ids) > self._max_length and self._truncation is Truncation.ERROR:
            return example.record.bad(
                f"{len(ids)} tokens, more than hyperparameters.maxSequenceLength {self._max_length}",
                "Raise hyperparameters.maxSequenceLength, shorten the records, or set dataset.truncation to "
                "Tail or OldestTurns.",
            )
        while len(ids) > self._max_length and self._truncation is Truncation.OLDEST_TURNS:
            shorter = _without_oldest(turns)
            if shorter is None:
                break
            turns = shorter
            try:
                rendered = self.render(turns)
            except ChatError as error:
                return example.record.bad(str(error), "Correct the messages, or set dataset.promptTemplate.")
            ids, labels, prompt = self.tokens(rendered)
        ids, labels = ids[: self._max_length], labels[: self._max_length]
        if not _learns(labels) and not example.record.unfinished:
            return None
        item = EncodedExample(as_array(ids), as_array(labels))
        return Encoding(item, length, len(ids), prompt, rendered.answer, whole - len(turns))

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The text of turns with its spans; raises ChatError."""
        if turns[0].role == "text":
            text = turns[0].text
            return Rendered(text, ((0, len(text)),), False, 0, text)
        spans: tuple[Span, ...]
        if turns[0].role == "prompt":
            prompt, completion = turns[0].text, turns[1].text
            text = prompt + completion
            spans, ends = ((len(prompt), len(text)),), False
        else:
            text = self.chat.render(turns)
            answers = self.chat.answers(turns, text)
            completion = next(turn.text for turn in reversed(turns) if turn.role == "assistant")
            # What follows the last answer is never learnt from, so it would only cost time.
            text = text[: answers[-1][1]]
            spans, ends = tuple(answers), text.endswith(tuple(self.tokenizer.special))
        prompt_end = spans[-1][0]
        if self._loss_on is LossOn.ALL:
            spans = ((0, len(text)),)
        return Rendered(text, spans, ends, prompt_end, completion)

    def tokens(self, rendered: Rendered, placed: PlacedTokens | None = None) -> tuple[list[int], list[int], int]:
        """(ids, labels, tokens before the last completion), whole: nothing is cut. placed: the text's, where known."""
        placed = placed or self.tokenizer.place_many([rendered.text])[0]
        ids, labels = placed.ids, [IGNORED] * len(placed.ids)
        for start, end in rendered.spans:
            if start < end:
                first, last = placed.reaching(start), placed.beginning(end)
                labels[first:last] = ids[first:last]
        prompt = placed.reaching(rendered.prompt_end)
        if not rendered.ends and ids[-1:] != [self.tokenizer.eos_id]:
            ids, labels = [*ids, self.tokenizer.eos_id], [*labels, self.tokenizer.eos_id]
        change = self.tokenizer.with_bos(ids) if rendered.begins else 0
        if change > 0 and self.tokenizer.bos_id is not None:
            ids, labels = [self.tokenizer.bos_id, *ids], [IGNORED, *labels]
        elif change < 0:
            ids, labels = ids[-change:], labels[-change:]
        return ids, labels, max(prompt + change, 0)

    def prompt_of(self, encoding: Encoding) -> tuple[list[int], str]:
        """(ids, reference) for generation: the tokens before the last completion, and that completion.

        Plain text has no prompt of its own: its first tokens are to be continued.
        """
        ids = encoding.example.input_ids.tolist()
        start = 1 if self.tokenizer.adds_bos else 0
        if encoding.prompt <= start:
            half = min(max(len(ids) // 2, start + 1), _CONTINUED_TOKENS)
            return ids[:half], self.tokenizer.decode(ids[half:])
        return ids[: encoding.prompt], encoding.answer.strip()

    def show(self, example: EncodedExample) -> str:
        """The example as text, the parts in the loss between ⟦ and ⟧."""
        parts: list[str] = []
        inside, run = False, list[int]()
        for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
            if (label != IGNORED) != inside:
                parts += [self.tokenizer.decode(run), CLOSE if inside else OPEN]
                inside, run = not inside, []
            run.append(token)
        return "".join([*parts, self.tokenizer.decode(run), CLOSE if inside else ""])


def question_and_answer(turns: Sequence[Turn]) -> tuple[int, int]:
    """Where the last answer's question and that answer stand in turns; -1 and the number of turns where there is none."""
    answer = max((k for k, turn in enumerate(turns) if turn.role in _ANSWERS), default=len(turns))
    return max((k for k, turn in enumerate(turns[:answer]) if turn.role in ("user", "prompt")), default=-1), answer


def as_array(ids: Sequence[int]) -> NDArray[np.int32]:
    """ids as int32 of shape [length]: a tenth of what a list takes in memory."""
    import numpy as np  # the light image counts tokens without it

    return np.array(ids, np.int32)


def _learns(labels: list[int]) -> bool:
    # The first token has nothing before it that could predict it.
    return any(label != IGNORED for label in labels[1:])


def _without_oldest(turns: Sequence[Turn]) -> tuple[Turn, ...] | None:
    """turns without the oldest exchange; None if only one is left. The system's message stays."""
    first = next((k for k, turn in enumerate(turns) if turn.role == "user"), len(turns))
    following = next((k for k, turn in enumerate(turns) if k > first and turn.role == "user"), None)
    if following is None or all(turn.role != "assistant" for turn in turns[following:]):
        return None
    head = tuple(turn for turn in turns[:first] if turn.role == "system")
    return head + tuple(turns[following:])
