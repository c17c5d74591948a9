"""What is hidden of a text: the share, what stands in its place, and that nothing of it is left to chance twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from finetune_trainer.data.kinds import EncodedExample, EncodedTarget
from finetune_trainer.data.noise import MaskRules, Noised, SpanRules, corrupt_spans, mask_tokens, spans_of
from finetune_trainer.data.windows import RandomWindows, generator

IGNORED, MASK, EOS = -100, 4, 1
# Ids 0 to 4 are special, 5 to 499 are ordinary.
SPECIAL = np.arange(500) < 5
RULES = MaskRules(0.15, MASK, SPECIAL)
SPANS = SpanRules(0.15, 3.0, tuple(range(900, 1000)), EOS)


def _text(length: int, seed: int = 0) -> Any:
    return np.concatenate([[0], generator(seed, length).integers(5, 500, length - 2), [1]]).astype(np.int32)


def test_a_mask_hides_15_percent_by_80_10_10_and_no_special_token() -> None:
    hidden = masks = same = others = ordinary = 0
    for seed in range(200):
        ids = _text(202, seed)
        seen, labels = mask_tokens(ids, RULES, generator(seed))
        chosen = labels != IGNORED
        assert np.array_equal(labels[chosen], ids[chosen]), "the label is the token itself"
        assert np.array_equal(seen[~chosen], ids[~chosen]), "what is not hidden stays"
        assert not chosen[[0, -1]].any(), "special tokens are never hidden"
        ordinary += 200
        hidden += int(chosen.sum())
        masks += int((seen[chosen] == MASK).sum())
        same += int((seen[chosen] == ids[chosen]).sum())
        others += int(((seen[chosen] != ids[chosen]) & (seen[chosen] >= 5)).sum())
    assert hidden == 200 * 30
    assert masks / hidden == pytest.approx(0.8, abs=0.02)
    assert same / hidden == pytest.approx(0.1, abs=0.015)
    assert others / hidden == pytest.approx(0.1, abs=0.015)
    assert masks + same + others == hidden, "no special token but the mask is ever drawn"


def test_a_short_text_hides_one_token_and_one_of_special_tokens_none() -> None:
    assert (mask_tokens(np.array([0, 9, 1], np.int32), RULES, generator(0))[1] != IGNORED).tolist() == [0, 1, 0]
    seen, labels = mask_tokens(np.array([0, 1], np.int32), RULES, generator(0))
    assert (seen.tolist(), labels.tolist()) == ([0, 1], [IGNORED, IGNORED])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 20, 64, 512])
def test_source_and_target_of_span_corruption_together_are_the_text(length: int) -> None:
    ids = generator(length).integers(5, 500, length).astype(np.int32)
    for seed in range(50):
        source, target = corrupt_spans(np.append(ids, EOS).astype(np.int32), SPANS, generator(seed))
        assert source[-1] == target[-1] == EOS
        assert _put_back(source[:-1].tolist(), target[:-1].tolist()) == ids.tolist()
        dropped, spans = spans_of(length, 0.15, 3.0) if length > 1 else (0, 0)
        assert len(source) == length - dropped + spans + 1
        assert len(target) == dropped + spans + 2, "a sentinel for each span, one more, and the end token"


def _put_back(source: list[int], target: list[int]) -> list[int]:
    """The text, by reading each sentinel of source as its span of target; sentinels come in their order."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token >= 900:
            assert token == 900 + len(spans)
            spans[token] = []
        else:
            spans[900 + len(spans) - 1].append(token)
    assert spans.popitem()[1] == [], "the last sentinel has no span"
    assert [token for token in source if token >= 900] == list(spans)
    assert all(spans.values())
    return [back for token in source for back in (spans[token] if token >= 900 else [token])]


def test_spans_have_the_wished_mean_length_and_may_lie_anywhere() -> None:
    ids = np.arange(5, 105, dtype=np.int32)
    hidden = np.zeros(100)
    for seed in range(3000):
        source, _ = corrupt_spans(ids, SPANS, generator(seed))
        kept = source[(source < 900) & (source > EOS)] - 5
        hidden += 1
        hidden[kept] -= 1
    assert spans_of(100, 0.15, 3.0) == (15, 5)
    assert hidden.sum() / 3000 == 15
    assert hidden[3:-3].min() > 0.8 * hidden.mean()
    assert hidden.min() > 0.3 * hidden.mean(), "the first and the last tokens are dropped too, if by fewer spans"


def test_noise_repeats_for_the_same_epoch_and_differs_between_epochs_and_from_evaluation() -> None:
    texts = [EncodedExample(_text(60, k), _text(60, k)) for k in range(4)]

    def labels(epoch: int, *, training: bool = True) -> list[list[int]]:
        noised = Noised(texts, RULES, 7, training)
        noised.set_epoch(epoch)
        return [item.labels.tolist() for item in noised]

    assert labels(2) == labels(2)
    assert labels(2) != labels(3)
    assert labels(0) != labels(0, training=False)
    noised = Noised(texts, RULES, 7, True)
    assert noised[1].labels.tolist() == noised[1].labels.tolist(), "asking twice draws once"
    assert noised[-1].labels.tolist() == noised[3].labels.tolist()


def test_noise_over_random_windows_draws_both_for_the_epoch() -> None:
    text = EncodedExample(np.arange(5, 400, dtype=np.int32), np.arange(5, 400, dtype=np.int32))
    noised = Noised(RandomWindows([text], 32, 1), SPANS, 1, True)
    first = noised[0]
    noised.set_epoch(1)
    second = noised[0]
    assert isinstance(first, EncodedTarget)
    assert first.input_ids[0] != second.input_ids[0]
    noised.set_epoch(0)
    assert np.array_equal(noised[0].input_ids, first.input_ids)
