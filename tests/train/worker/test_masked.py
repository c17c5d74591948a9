"""Masked language models: the loss counts hidden tokens only, under any split, and evaluation hides the same ones."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.methods.cases_pretrain import CASES
from tests.train.worker.gradients import save_gradient
from tests.train.worker.runs import Work, build_engine_in, in_child, launch

MASKED = next(case for case in CASES if case.name == "masked-text")
# Texts of very different lengths, so that a mean of means would be another figure.
UNEVEN = [{"text": f"{k} " + "the dog says woof " * (1 + 2 * (k % 4))} for k in range(10)]


def _work(root: Path, micro: int, accumulation: int, ranks: int, **changes: Any) -> Work:
    settings = {
        "microBatchSize": micro,
        "gradientAccumulation": accumulation,
        "totalSteps": 1,
        "maxGradNorm": 1000.0,
        "maxSequenceLength": 128,
        **changes,
    }
    work = MASKED.work(root, {"hyperparameters": settings, "resources": {"processesPerNode": ranks}}, UNEVEN)
    config = root / "inputs/model/config.json"
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps({**json.loads(config.read_text()), **without}))
    (root / "run.json").write_text(json.dumps(work.run.to_json()))
    return work


@pytest.mark.parametrize(
    ("micro", "accumulation", "ranks", "packing"),
    [(8, 1, 1, False), (1, 8, 1, False), (3, 2, 2, False), (2, 2, 2, True)],
)
def test_a_step_has_the_gradient_of_the_mean_over_all_hidden_tokens(
    tmp_path: Path, micro: int, accumulation: int, ranks: int, packing: bool
) -> None:
    work = _work(tmp_path / "w", micro, accumulation, ranks, packing=packing)
    assert launch(partial(save_gradient, flat=_flat_gradient), ranks, str(work.root)) == [0] * ranks
    reference = in_child(_plain_gradient, str(work.root))
    found = np.load(work.root / "gradient-0.npy")
    assert np.linalg.norm(found - reference) / np.linalg.norm(reference) <= 1e-6


def _flat_gradient(model: Any) -> Any:
    named = sorted(model.named_parameters())
    return np.concatenate([p.grad.double().numpy().ravel() for _, p in named if p.grad is not None])


def _plain_gradient(root: str) -> Any:
    """By plain torch, a record at a time, in evaluation mode: the model has no dropout."""
    import torch
    from transformers import AutoModelForMaskedLM

    engine = build_engine_in(root)
    model = AutoModelForMaskedLM.from_pretrained(Path(root) / "inputs/model", dtype=torch.float32).eval()
    assert len(engine._records) == (7 if engine.objective.run.hyperparameters.packing else 8)
    total, tokens = torch.zeros(()), 0
    for item in engine._records:
        ids, labels = (torch.from_numpy(a.astype("int64")) for a in (item.input_ids, item.labels))
        hidden = labels != -100
        logs = model(input_ids=ids[None]).logits[0][hidden].log_softmax(-1)
        total = total - logs.gather(-1, labels[hidden][:, None]).sum()
        tokens += int(hidden.sum())
    (total / tokens).backward()
    return _flat_gradient(model)


def test_packed_blocks_are_the_texts_one_after_another_with_the_same_share_hidden(tmp_path: Path) -> None:
    work = _work(tmp_path / "w", 2, 2, 1, packing=True)
    texts, blocks = in_child(_packed, str(work.root))
    whole = [token for block in blocks for token in block["tokens"]]
    assert [block["length"] for block in blocks] == [64] * (len(blocks) - 1) + [len(whole) % 64 or 64]
    ends = [k + 1 for k, token in enumerate(whole) if token == 1]
    assert ends[-1] == len(whole)
    found = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert len(found) == 8
    assert all(document in texts for document in found), "framed as each would be alone, and none cut or lost"
    for block in blocks:
        ordinary = sum(token > 3 for token in block["tokens"])
        assert block["hidden"] == max(round(0.15 * ordinary), 1)


def _packed(root: str) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """(each text as <s> … </s>, what the packed items hold: their tokens with the hidden ones put back)."""
    engine = build_engine_in(root)
    tokenizer = engine.objective.tokenizer
    texts = [[0, *tokenizer(row["text"], add_special_tokens=False)["input_ids"], 1] for row in UNEVEN]
    blocks = []
    for item in engine._records:
        hidden = item.labels != -100
        tokens = np.where(hidden, item.labels, item.input_ids)
        blocks.append({"tokens": tokens.tolist(), "length": len(tokens), "hidden": int(hidden.sum())})
    return texts, blocks


def test_two_ranks_log_the_losses_of_one(tmp_path: Path) -> None:
    one, two = _work(tmp_path / "one", 2, 2, 1, totalSteps=4), _work(tmp_path / "two", 1, 2, 2, totalSteps=4)
    assert one.train() == [0], one.logged()
    assert two.train() == [0, 0], two.logged()
    found = [[line["loss"] for line in work.metrics() if "loss" in line] for work in (one, two)]
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_training_hides_other_tokens_in_each_epoch_and_evaluation_the_same_ones(tmp_path: Path) -> None:
    work = _work(tmp_path / "w", 2, 2, 1, totalSteps=4)
    epochs, before, after = in_child(_hidden, str(work.root))
    assert epochs[0] != epochs[1]
    assert before == after


def _hidden(root: str) -> Any:
    from transformers import TrainerCallback

    engine = build_engine_in(root)
    epochs: list[Any] = []

    def labels(items: Any) -> list[list[int]]:
        return [item.labels.tolist() for item in items]

    class Look(TrainerCallback):
        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            epochs.append(labels(engine._records))

    engine.add_callback(Look())
    before = labels(engine._held_out)
    engine.train()
    return epochs, before, labels(engine._held_out)


def test_a_text_is_framed_and_its_frame_is_never_hidden(tmp_path: Path) -> None:
    work = _work(tmp_path / "w", 2, 2, 1)
    first, last, hidden = in_child(_frames, str(work.root))
    assert first == {0}, "<s>"
    assert last == {1}, "</s>"
    assert not {0, 1, 2, 3} & hidden


def _frames(root: str) -> tuple[set[int], set[int], set[int]]:
    items = list(build_engine_in(root)._records)
    hidden = {int(label) for item in items for label in item.labels if label != -100}
    return {int(item.input_ids[0]) for item in items}, {int(item.input_ids[-1]) for item in items}, hidden
