"""Which records a step has: the same under any split, in any process, and after a resume."""

from __future__ import annotations

from typing import Any, ClassVar

from tests.train.worker.runs import in_child

SPLITS = [(12, 1, 1), (1, 12, 1), (3, 2, 2), (2, 2, 3)]


def _steps(
    lengths: list[int], labels: list[int] | None, options: dict[str, bool], epochs: int, splits: list[Any]
) -> list[Any]:
    """For each split: for each epoch the steps, each as its sorted records."""
    from finetune_trainer.worker.batches import Split, StepBatches

    found = []
    for micro, accumulation, world in splits:
        ranks = []
        for rank in range(world):
            split = Split(micro, accumulation, rank, world, **options)
            batches = StepBatches(lengths, split, seed=3, labels=labels)
            epoch_batches = []
            for epoch in range(epochs):
                batches.set_epoch(epoch)
                epoch_batches.append(list(batches))
            ranks.append(epoch_batches)
        steps = []
        for epoch in range(epochs):
            passes = [[i for rank in ranks for i in rank[epoch][k]] for k in range(len(ranks[0][epoch]))]
            steps.append(
                [
                    sorted(i for p in passes[k : k + accumulation] for i in p)
                    for k in range(0, len(passes), accumulation)
                ]
            )
        found.append(steps)
    return found


def test_grouping_by_length_gives_the_same_steps_for_any_split_and_less_padding() -> None:
    lengths = [(37 * k) % 101 + 1 for k in range(250)]
    grouped = in_child(_steps, lengths, None, {"group_by_length": True}, 2, SPLITS)
    assert all(split == grouped[0] for split in grouped)
    plain = in_child(_steps, lengths, None, {}, 2, SPLITS[:1])[0]

    def padding(steps: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in step) * len(step) - sum(lengths[i] for i in step) for step in steps)

    for epoch in range(2):
        assert sorted(i for step in grouped[0][epoch] for i in step) == list(range(250))
        assert padding(grouped[0][epoch]) < 0.1 * padding(plain[epoch])
        assert max(lengths) == max(lengths[i] for i in grouped[0][epoch][0]), "the longest comes first"
    assert grouped[0][0] != grouped[0][1], "each epoch draws anew"


def test_balanced_labels_come_equally_often_in_each_step_and_all_records_before_any_again() -> None:
    labels = [0] * 90 + [1] * 20 + [2] * 10
    for steps in in_child(_steps, [5] * 120, labels, {"balance_labels": True}, 2, SPLITS):
        for epoch in steps:
            assert all([sum(labels[i] == label for i in step) for label in range(3)] == [4, 4, 4] for step in epoch)
            drawn = [i for step in epoch for i in step]
            counts = {i: drawn.count(i) for i in range(90, 120)}
            assert set(counts.values()) == {2, 4}  # 40 draws of 20 records, and of 10
            assert len(set(drawn) & set(range(90))) == 40


def test_the_draw_depends_on_seed_and_epoch_only_so_that_a_resume_goes_on_exactly() -> None:
    labels = [k % 7 == 0 for k in range(100)]
    options = {"balance_labels": True, "group_by_length": True}
    once = in_child(_steps, [k % 13 + 1 for k in range(100)], labels, options, 3, SPLITS[2:3])
    again = in_child(_steps, [k % 13 + 1 for k in range(100)], labels, options, 3, SPLITS[2:3])
    assert once == again and once[0][1] != once[0][2]


def test_the_last_short_step_stays_the_last() -> None:
    for options in ({}, {"group_by_length": True}):
        steps = in_child(_steps, list(range(1, 31)), None, options, 1, SPLITS)
        assert [[len(step) for step in split[0]] for split in steps] == [[12, 12, 6]] * len(SPLITS)


def _loaded() -> tuple[list[int], list[list[int]]]:
    """(labels of a balanced epoch as the loader gives them, epochs that drawn items were told of)."""
    import numpy as np
    import torch

    from finetune_trainer.data.kinds import EncodedLabel
    from finetune_trainer.worker.batches import EpochLoader, Split

    class Items(list):  # type: ignore[type-arg]
        told: ClassVar[list[int]] = []

        def set_epoch(self, epoch: int) -> None:
            self.told.append(epoch)

    items = Items(EncodedLabel(np.arange(3, dtype=np.int32), int(k >= 9)) for k in range(12))
    loader = EpochLoader(
        items,
        Split(2, 1, 0, 1, balance_labels=True),
        length=lambda item: len(item.input_ids),
        collate=lambda batch: {"labels": torch.tensor([item.label for item in batch])},
        seed=1,
        pin=False,
    )
    loader.set_epoch(4)
    return [int(label) for batch in loader for label in batch["labels"]], [items.told]


def test_the_loader_balances_by_the_items_labels_and_tells_drawn_items_their_epoch() -> None:
    labels, told = in_child(_loaded)
    assert sorted(labels) == [0] * 6 + [1] * 6 and told == [[4]]
