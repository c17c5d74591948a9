"""Words with a BIO tag each as tokens for TokenClassification: the first piece of a word carries its tag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune_api.job import Truncation
from finetune_trainer.data.cutting import too_long
from finetune_trainer.data.encode import IGNORED, Encoding, as_array
from finetune_trainer.data.formats import Example
from finetune_trainer.data.kinds import EncodedTags
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from finetune_trainer.data.encoders import EncodingRules


class TagEncoder:
    """Encodes words joined by blanks, as the model reads running text; further pieces and special tokens are -100."""

    def __init__(self, tokenizer: TextTokenizer, rules: EncodingRules) -> None:
        """rules.labels: the names of the tags."""
        self.tokenizer = tokenizer
        self._limit = rules.max_length
        self._error = rules.truncation is Truncation.ERROR
        self._names = tuple(rules.labels)
        self._numbers = {name: number for number, name in enumerate(rules.labels)}

    def encode(self, example: Example) -> Encoding | BadRecord | None:
        """EncodedTags; a BadRecord for a wrong tag, a word without a token, or what truncation Error refuses."""
        problem = self._problem(example)
        if problem:
            return example.record.bad(*problem)
        ids, first = self.pieces(example.words)
        lost = next((word for word, at in zip(example.words, first, strict=True) if at is None), None)
        if lost is not None:
            return example.record.bad(f"the tokenizer makes nothing of the word {lost[:40]!r}", "Remove the word.")
        labels = [IGNORED] * len(ids)
        for at, tag in zip(first, example.tags, strict=True):
            assert at is not None
            labels[at] = self._numbers[tag]
        prefix, suffix = self.tokenizer.prefix, self.tokenizer.suffix
        length = len(prefix) + len(ids) + len(suffix)
        if length > self._limit and self._error:
            return too_long(example.record, length, self._limit, field="hyperparameters.maxSequenceLength")
        kept = self.tokenizer.framed(ids, self._limit)
        inner = len(kept) - len(prefix) - len(suffix)
        if all(label == IGNORED for label in labels[:inner]):
            return None
        framed = [*[IGNORED] * len(prefix), *labels[:inner], *[IGNORED] * len(suffix)]
        item = EncodedTags(as_array(kept), as_array(framed))
        return Encoding(item, length, len(kept), len(kept), " ".join(example.tags))

    def pieces(self, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
        """(ids without special tokens, for each word the place of its first piece, None where it has none).

        A piece belongs to the word of which, or of the blank before which, it has a character; one that spans two words
        is the first one's.
        """
        ids, offsets = self.tokenizer.encode(" ".join(words))
        first: list[int | None] = []
        end, at = -1, 0
        for word in words:
            before, end = end, end + 1 + len(word)
            while before > 0 and at < len(ids) and offsets[at][1] <= before:
                at += 1
            inside = at < len(ids) and offsets[at][0] < end
            first.append(at if inside else None)
            at += inside
        return ids, first

    def show(self, item: EncodedTags) -> str:
        """The text, each tag behind the first piece of its word: `Paris⟦B-LOC⟧`."""
        parts: list[str] = []
        run: list[int] = []
        for token, label in zip(item.input_ids.tolist(), item.labels.tolist(), strict=True):
            run.append(token)
            if label != IGNORED:
                parts.append(f"{self.tokenizer.decode(run)}⟦{self._names[label]}⟧")
                run = []
        return "".join([*parts, self.tokenizer.decode(run)])

    def _problem(self, example: Example) -> tuple[str, str] | None:
        words, tags = example.words, example.tags
        if len(words) != len(tags):
            return f"{len(words)} words but {len(tags)} tags", "Give each word one tag."
        unknown = next((tag for tag in tags if tag not in self._numbers), None)
        if unknown is not None:
            return f"the tag {unknown[:40]!r} is not a BIO tag of this data", "Write O, B-TYPE or I-TYPE for each word."
        return None if words else ("there is no word in it", "Give it words and tags.")
