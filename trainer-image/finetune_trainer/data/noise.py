"""Text with parts hidden, to be predicted: masked tokens (BERT) and corrupted spans (T5).

The noise of an item depends on (seed, training or not, epoch, index) only: a resumed run hides the same tokens, and
evaluation hides the same ones each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_api.failures import FinetuneError
from finetune_api.job import Task
from finetune_api.runfile import RunFile
from finetune_trainer.data.encode import IGNORED
from finetune_trainer.data.kinds import EncodedExample, EncodedTarget
from finetune_trainer.data.windows import Blocks, RandomWindows, Redrawn, generator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

    from finetune_trainer.data.kinds import Ids

SENTINELS = 100
"""How many sentinels T5 has; `<extra_id_0>` is the first."""
_MASKED, _RANDOM = 0.8, 0.1


def sentinel(number: int) -> str:
    """The text of T5's sentinel of that number."""
    return f"<extra_id_{number}>"


@dataclass(frozen=True)
class MaskRules:
    """How tokens are masked. special: of each id whether it is never masked, bool [vocabulary]."""

    probability: float
    mask_id: int
    special: NDArray[np.bool_]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, probability: float) -> MaskRules:
        """From a tokenizer; raises FinetuneError(ModelUnsupported) if it has no mask token."""
        import numpy as np

        if tokenizer.mask_token_id is None:
            raise FinetuneError(
                "The base model's tokenizer has no mask token, so MaskedLM cannot hide anything. Choose a masked model "
                "such as BERT, or task CausalLM.",
                failure_class="ModelUnsupported",
                field="spec.model.task",
            )
        special = np.zeros(len(tokenizer), np.bool_)
        special[list(tokenizer.all_special_ids)] = True
        return cls(probability, tokenizer.mask_token_id, special)


def mask_tokens(ids: Ids, rules: MaskRules, random: np.random.Generator) -> tuple[Ids, Ids]:
    """(what the model sees, labels), both int32 [length]: labels are the hidden tokens, -100 elsewhere.

    probability of the ordinary tokens is hidden, rounded, at least one: 80% by the mask, 10% by a random ordinary
    token, 10% stay as they are (Devlin et al. 2018, section 3.1).
    """
    import numpy as np

    ordinary = np.flatnonzero(~rules.special[ids])
    count = min(max(round(len(ordinary) * rules.probability), 1), len(ordinary))
    chosen = random.choice(ordinary, count, replace=False) if count else ordinary
    labels = np.full(len(ids), IGNORED, np.int32)
    labels[chosen] = ids[chosen]
    seen = np.array(ids, np.int32)
    fate = random.random(count)
    seen[chosen[fate < _MASKED]] = rules.mask_id
    drawn = chosen[(fate >= _MASKED) & (fate < _MASKED + _RANDOM)]
    seen[drawn] = random.choice(np.flatnonzero(~rules.special), len(drawn))
    return seen, labels


@dataclass(frozen=True)
class SpanRules:
    """How spans are dropped. sentinels: ids in the order of their use."""

    probability: float
    mean_length: float
    sentinels: tuple[int, ...]
    eos_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, probability: float, mean_length: float, longest: int) -> SpanRules:
        """From a tokenizer; raises FinetuneError(InvalidSpec) if it has too few sentinels for texts of longest tokens."""
        vocabulary = tokenizer.get_vocab()
        found = []
        while (text := sentinel(len(found))) in vocabulary:
            found.append(vocabulary[text])
        needed = spans_of(longest, probability, mean_length)[1] + 1
        if len(found) < needed:
            raise FinetuneError(
                f"Span corruption of {longest} tokens needs {needed} sentinels, but the tokenizer has {len(found)}. Add "
                f"{sentinel(len(found))} to {sentinel(needed - 1)} in model.tokenizer.addSpecialTokens, or use a shorter "
                "objective.pretrain.blockSize.",
                failure_class="InvalidSpec",
                field="spec.model.tokenizer.addSpecialTokens",
            )
        assert tokenizer.eos_token_id is not None  # the text's encoder asks for it
        return cls(probability, mean_length, tuple(found), tokenizer.eos_token_id)


def spans_of(length: int, probability: float, mean_length: float) -> tuple[int, int]:
    """(tokens that are dropped, spans that they lie in) of a text of length tokens; at least one token is kept."""
    dropped = min(max(round(length * probability), 1), length - 1)
    spans = min(max(round(dropped / mean_length), 1), dropped, length - dropped)
    return dropped, spans


def corrupt_spans(ids: Ids, rules: SpanRules, random: np.random.Generator) -> tuple[Ids, Ids]:
    """(source, target), both int32 and ended by the end token.

    Each dropped span stands as one sentinel in the source; the target is each sentinel with its span, and a last
    sentinel (Raffel et al. 2019, section 3.1.4 and figure 2). Spans do not touch; each way to place them, and each way
    to share the dropped tokens among them, is as likely as any other. A text of fewer than two tokens loses nothing.
    """
    import numpy as np

    ids = ids[:-1] if len(ids) and ids[-1] == rules.eos_id else ids
    dropped, spans = spans_of(len(ids), rules.probability, rules.mean_length) if len(ids) > 1 else (0, 0)
    # What is kept before the first span and after the last one may be nothing.
    kept = _parts(len(ids) - dropped + 2, spans + 1, random)
    kept[[0, -1]] -= 1
    gone = _parts(dropped, spans, random) if spans else kept[:0]
    source: list[Ids] = []
    target: list[Ids] = []
    begin = 0
    for number in range(spans):
        mark = np.array([rules.sentinels[number]], np.int32)
        start, end = begin + kept[number], begin + kept[number] + gone[number]
        source += [ids[begin:start], mark]
        target += [mark, ids[start:end]]
        begin = end
    last = np.array([rules.sentinels[spans], rules.eos_id], np.int32)
    return np.concatenate([*source, ids[begin:], last[1:]]), np.concatenate([*target, last])


def _parts(total: int, count: int, random: np.random.Generator) -> NDArray[Any]:
    """total as a sum of count whole numbers of at least 1; each way is as likely as any other."""
    import numpy as np

    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


class Noised(Sequence[Any]):
    """Items with noise that is drawn anew in each epoch: EncodedExample (masked) or EncodedTarget (spans)."""

    def __init__(
        self, items: Sequence[EncodedExample], rules: MaskRules | SpanRules, seed: int, training: bool
    ) -> None:
        self._items = items
        self._rules = rules
        self._seed = (seed, int(training))
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the noise of this epoch from now on, and the items too where they are drawn."""
        self._epoch = epoch
        if isinstance(self._items, Redrawn):
            self._items.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def lengths(self) -> NDArray[np.int32] | None:
        """Tokens of each text before its noise, where they are known without reading it."""
        return getattr(self._items, "lengths", None)

    def __getitem__(self, index: int) -> EncodedExample | EncodedTarget:  # type: ignore[override]  # no slices
        ids = self._items[index].input_ids
        random = generator(*self._seed, self._epoch, index % len(self))
        if isinstance(self._rules, MaskRules):
            return EncodedExample(*mask_tokens(ids, self._rules, random))
        return EncodedTarget(*corrupt_spans(ids, self._rules, random))


def trained_view(
    run: RunFile, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Any], *, training: bool
) -> Sequence[Any]:
    """What a run on plain text trains on (or is evaluated on, if not training), from its encoded documents.

    Joined text is cut into blocks; with random windows, training draws windows and evaluation reads the blocks one
    after another. Masked models and Seq2Seq then get their noise. Other runs keep their items.
    """
    settings, seed = run.objective.pretrain, run.hyperparameters.seed
    if settings is None or not documents:
        return documents
    items: Sequence[EncodedExample] = documents
    if settings.random_windows and training:
        items = RandomWindows(documents, settings.block_size, seed)
    elif joins_documents(run):
        items = Blocks(documents, settings.block_size)
    if run.model.task is Task.MASKED_LM:
        return Noised(items, MaskRules.of(tokenizer, settings.mask_probability), seed, training)
    if run.model.task is Task.SEQ2SEQ:
        rules = SpanRules.of(tokenizer, settings.mask_probability, settings.mean_span_length, settings.block_size)
        return Noised(items, rules, seed, training)
    return items


def joins_documents(run: RunFile) -> bool:
    """Whether the documents of a run on plain text are read as one running text: they must not be cut before."""
    settings = run.objective.pretrain
    return settings is not None and (settings.random_windows or run.hyperparameters.packing or run.joins_text)
