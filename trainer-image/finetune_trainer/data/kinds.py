"""What an encoded record is, for each way to learn from one.

Every class is a frozen dataclass of 1-D numpy arrays and whole numbers only, so that one on-disk table holds any of
them. `input_ids` is int32; labels are int32 with -100 where the loss does not count, and not shifted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """A text and what is learnt of it, both of shape [length]. labels: input_ids in the loss, -100 elsewhere."""

    input_ids: Ids
    labels: Ids


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Two completions of one prompt, each a whole text as in EncodedExample: DPO, ORPO, Reward."""

    chosen_ids: Ids
    chosen_labels: Ids
    rejected_ids: Ids
    rejected_labels: Ids


@dataclass(frozen=True, slots=True)
class EncodedJudged:
    """One completion and whether it is desirable (1) or not (0): KTO. prompt: how many tokens the prompt has."""

    input_ids: Ids
    labels: Ids
    prompt: int
    desirable: int


@dataclass(frozen=True, slots=True)
class EncodedTarget:
    """A source and the target to write, ended by the end token: Seq2Seq."""

    input_ids: Ids
    labels: Ids


@dataclass(frozen=True, slots=True)
class EncodedLabel:
    """A text and the number of its class: SequenceClassification."""

    input_ids: Ids
    label: int


@dataclass(frozen=True, slots=True)
class EncodedTags:
    """A text and one tag number for each token, -100 but on the first piece of each word: TokenClassification."""

    input_ids: Ids
    labels: Ids


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt to be answered by the model itself: PPO, GRPO. reference: the wished answer as UTF-8 bytes, or empty."""

    input_ids: Ids
    reference: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class EncodedPacked:
    """Several texts in one sequence. starts: where each begins, the first at 0. labels as in EncodedExample, and -100
    at each start."""

    input_ids: Ids
    labels: Ids
    starts: Ids


Item = (
    EncodedExample
    | EncodedPair
    | EncodedJudged
    | EncodedTarget
    | EncodedLabel
    | EncodedTags
    | EncodedPrompt
    | EncodedPacked
)
ITEMS: tuple[type[Any], ...] = get_args(Item)
"""Every class of Item."""
