"""The gradient of a step is that of one concatenated batch, however the step is cut; the same for evaluation."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.worker.gradients import flat_gradient, save_gradient
from tests.train.worker.runs import FULL, Work, build_engine_in, in_child, launch, work_for

# Eight training records (ten, two held out) of very different lengths in the loss, prompts not counted.
UNEVEN = [{"prompt": f"count {i}: ", "completion": "ab" * (1 + 3 * (i % 5)) + str(i)} for i in range(10)]
SPLITS = [(8, 1, 1), (1, 8, 1), (4, 2, 1), (3, 4, 1), (2, 2, 2), (3, 2, 2)]
TOLERANCE = 1e-6


def _work(root: Path, micro: int, accumulation: int, ranks: int, **changes: Any) -> Work:
    return work_for(
        root,
        rows=UNEVEN,
        **{
            **FULL,
            "microBatchSize": micro,
            "gradientAccumulation": accumulation,
            "processesPerNode": ranks,
            "totalSteps": 1,
            "maxGradNorm": 1000.0,
            **changes,
        },
    )


@pytest.mark.parametrize(("micro", "accumulation", "ranks"), SPLITS)
def test_a_step_has_the_gradient_of_one_concatenated_batch(
    tmp_path: Path, micro: int, accumulation: int, ranks: int
) -> None:
    work = _work(tmp_path / "w", micro, accumulation, ranks)
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))

    assert launch(save_gradient, ranks, str(work.root)) == [0] * ranks

    reference = in_child(_concatenated_gradient, str(work.root))
    found = np.load(work.root / "gradient-0.npy")
    assert np.linalg.norm(found - reference) / np.linalg.norm(reference) <= TOLERANCE


def _concatenated_gradient(root: str) -> Any:
    """By plain torch: all records in one batch, sum of token losses over the number of tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune_api.runfile import RunFile
    from finetune_trainer.data import load_dataset

    folder = Path(root)
    run = RunFile.from_json(json.loads((folder / "run.json").read_text()))
    tokenizer = AutoTokenizer.from_pretrained(folder / "inputs/model")
    examples = load_dataset(run, folder / "inputs", tokenizer).train
    assert len(examples) == 8
    model = AutoModelForCausalLM.from_pretrained(folder / "inputs/model", dtype=torch.float32)
    longest = max(len(e.input_ids) for e in examples)
    ids = torch.stack([torch.tensor([*e.input_ids, *[2] * (longest - len(e.input_ids))]) for e in examples])
    mask = torch.stack([torch.tensor([1] * len(e.input_ids) + [0] * (longest - len(e.input_ids))) for e in examples])
    labels = torch.stack([torch.tensor([*e.labels, *[-100] * (longest - len(e.labels))]) for e in examples])
    logs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    counted = labels[:, 1:] != -100
    picked = logs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    (-(picked * counted).sum() / counted.sum()).backward()
    return flat_gradient(model)


def test_two_ranks_log_the_losses_of_one(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"totalSteps": 5, "seed": 3}  # two steps an epoch, the second not full
    one = _work(tmp_path / "one", 2, 3, 1, **changes)
    two = _work(tmp_path / "two", 1, 3, 2, **changes)
    assert one.train() == [0], one.logged()
    assert two.train() == [0, 0], two.logged()

    expected = [line["loss"] for line in one.metrics() if "loss" in line]
    assert [line["loss"] for line in two.metrics() if "loss" in line] == pytest.approx(expected, rel=1e-5)
    assert two.read("state/result.json")["evalLoss"] == pytest.approx(
        one.read("state/result.json")["evalLoss"], rel=1e-5
    )
    assert (
        two.read("artifact/report.json")["training"]["tokens"] == one.read("artifact/report.json")["training"]["tokens"]
    )


def test_the_held_out_loss_weighs_each_token_the_same(tmp_path: Path) -> None:
    work = _work(tmp_path / "w", 2, 1, 1, validationFraction=0.5)
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    found, expected, mean_of_means = in_child(_held_out_losses, str(work.root))
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(mean_of_means - expected) > 1e-3, "the records are uneven, so a mean of batch means is another figure"


def _held_out_losses(root: str) -> tuple[float, float, float]:
    import torch

    engine = build_engine_in(root)
    found = engine.evaluate()["eval_loss"]
    sums, counts = [], []
    for example in engine._held_out:
        ids, labels = (torch.from_numpy(a.astype("int64")) for a in (example.input_ids, example.labels))
        with torch.no_grad():
            logs = engine.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        kept = labels[1:] != -100
        sums.append(float(-logs[kept, labels[1:][kept]].sum()))
        counts.append(int(kept.sum()))
    mean_of_means = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums)
    return found, sum(sums) / sum(counts), mean_of_means


def test_evaluation_keeps_the_logits_of_one_batch_only(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} ", "completion": "xy" * 20} for i in range(130)]
    work = work_for(
        tmp_path / "w", rows=rows, model={"vocabulary": 16000}, **FULL, validationFraction=0.9, microBatchSize=1
    )
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    rise, one_batch, whole_set = in_child(_evaluation_peak, str(work.root))
    assert whole_set > 250e6
    assert rise < 100e6, f"{rise / 1e6:.0f} MB more; one batch of logits is {one_batch / 1e6:.0f} MB"


def _evaluation_peak(root: str) -> tuple[float, float, float]:
    """Rise of the process's peak memory through an evaluation, and the size of logits of one batch and of all."""
    engine = build_engine_in(root)
    tokens = [len(example.input_ids) for example in engine._held_out]

    def memory(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024.0

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    engine.evaluate()
    return memory("VmHWM") - before, max(tokens) * 16000 * 4.0, sum(tokens) * 16000 * 4.0


def test_an_order_depends_on_seed_and_epoch_only() -> None:
    steps = in_child(_orders)
    first, second = steps[(8, 1, 1)]
    for split, epochs in steps.items():
        assert epochs == [first, second], f"{split} sees other records in some step"
    assert first != second
    assert sorted(chain(*first)) == list(range(21)), "each record once an epoch, none repeated"


def _orders() -> dict[tuple[int, int, int], list[list[list[int]]]]:
    from finetune_trainer.worker.batches import Split, StepBatches

    lengths = [5 + (7 * i) % 11 for i in range(21)]
    found = {}
    for micro, accumulation, ranks in ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)):
        epochs = []
        for epoch in (0, 1):
            per_rank = []
            for rank in range(ranks):
                batches = StepBatches(lengths, Split(micro, accumulation, rank, ranks), seed=5)
                batches.set_epoch(epoch)
                per_rank.append(list(batches))
                assert len(per_rank[-1]) == len(batches)
            passes = [list(chain(*chunk)) for chunk in zip(*per_rank, strict=True)]
            epochs.append([sorted(chain(*passes[i : i + accumulation])) for i in range(0, len(passes), accumulation)])
        found[(micro, accumulation, ranks)] = epochs
    return found


def test_workers_are_told_apart_by_their_environment() -> None:
    from finetune_trainer.worker.ranks import Ranks

    assert Ranks.from_environment({}) == Ranks(0, 0, 1, 1)
    env = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    ranks = Ranks.from_environment({**os.environ, **env})
    assert (ranks.is_main, ranks.is_node_main) == (False, False)
    assert Ranks(4, 0, 8, 4).is_node_main
