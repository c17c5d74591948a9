"""Which records share a sequence."""

from __future__ import annotations

import numpy as np
import pytest

from finetune_trainer.data.encode import IGNORED
from finetune_trainer.data.kinds import EncodedExample
from finetune_trainer.data.packing import Packed, best_fit


def test_no_sequence_is_too_long_and_each_record_is_in_one() -> None:
    lengths = np.random.default_rng(0).integers(2, 513, 5000)
    places = best_fit(lengths, 512, seed=1)
    fill = np.bincount(places, weights=lengths)
    assert len(places) == 5000 and fill.max() <= 512 and fill.min() > 0
    best = int(np.ceil(lengths.sum() / 512))
    assert best <= len(fill) <= 11 / 9 * best + 1
    assert fill.sum() / (512 * len(fill)) > 0.99


@pytest.mark.parametrize(
    ("lengths", "capacity", "sequences"),
    [([5, 5, 5], 10, 2), ([6, 4, 5, 5], 10, 2), ([10, 10], 10, 2), ([1] * 10, 10, 1), ([7, 6, 4, 3], 10, 2)],
)
def test_small_sets_are_packed_as_well_as_can_be(lengths: list[int], capacity: int, sequences: int) -> None:
    assert len(set(best_fit(np.array(lengths), capacity, seed=0).tolist())) == sequences


def test_the_packing_is_the_same_for_a_seed_and_another_for_another() -> None:
    lengths = np.random.default_rng(0).integers(2, 20, 300)
    assert (best_fit(lengths, 64, 1) == best_fit(lengths, 64, 1)).all()
    assert (best_fit(lengths, 64, 1) != best_fit(lengths, 64, 2)).any()


def test_a_packed_sequence_holds_whole_records_with_nothing_learnt_at_their_starts() -> None:
    items = []
    for k in range(40):
        ids = np.arange(100 * k, 100 * k + k % 9 + 2, dtype=np.int32)
        items.append(EncodedExample(ids, ids.copy()))
    packed = Packed(items, [len(item.input_ids) for item in items], 24, seed=3)
    seen = []
    for number, sequence in enumerate(packed):
        assert len(sequence.input_ids) == packed.lengths[number] <= 24
        assert sequence.starts[0] == 0 and (sequence.labels[sequence.starts] == IGNORED).all()
        for start, end in zip(sequence.starts, [*sequence.starts[1:], len(sequence.input_ids)], strict=True):
            record = int(sequence.input_ids[start]) // 100
            assert sequence.input_ids[start:end].tolist() == items[record].input_ids.tolist()
            assert sequence.labels[start + 1 : end].tolist() == items[record].labels[1:].tolist()
            seen.append(record)
    assert sorted(seen) == list(range(40)) and 0.5 < packed.fill <= 1
