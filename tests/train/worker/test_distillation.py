"""Distillation: the paper's formula, the same gradient under any split, and a teacher that fits the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.methods.case import Case
from tests.train.methods.cases_distillation import CASES, CLASSIFICATION, SENTIMENT, distillation
from tests.train.worker.gradients import flat_gradient, save_gradient
from tests.train.worker.runs import Work, build_engine_in, in_child, launch, made_model

CAUSAL, CLASSIFIER = CASES
UNEVEN = [{"prompt": f"count {i}: ", "completion": "ab" * (1 + 3 * (i % 5)) + str(i)} for i in range(10)]


def _work(root: Path, case: Case = CAUSAL, rows: Any = None, **hyperparameters: Any) -> Work:
    work = case.work(root, {"hyperparameters": hyperparameters}, rows)
    (root / "run.json").write_text(json.dumps(work.run.to_json()))
    return work


# ---- the formula


def test_the_divergence_is_that_of_the_paper_in_value_and_gradient() -> None:
    for temperature, error, gradient_error in in_child(_formula_errors):
        assert error <= 1e-5, f"temperature {temperature}"
        assert gradient_error <= 1e-5, f"temperature {temperature}"


def _formula_errors() -> list[tuple[float, float, float]]:
    import torch

    from finetune_trainer.worker.objectives import distillation as ours

    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([0, 2, 3, 7, 8])
    found = []
    for temperature in (1.0, 2.0, 4.0):
        student = (torch.randn(10, 37, generator=generator) * 3).requires_grad_()
        teacher = torch.randn(10, 37, generator=generator) * 3
        p = torch.exp(teacher[rows] / temperature)
        p = p / p.sum(-1, keepdim=True)
        q = torch.exp(student[rows] / temperature)
        q = q / q.sum(-1, keepdim=True)
        expected = temperature**2 * (p * torch.log(p / q)).sum()
        (wanted,) = torch.autograd.grad(expected, student)
        ours._CHUNK_NUMBERS = 74  # two rows at a time
        value = ours.divergence_sum(student, teacher, rows, temperature)
        (gradient,) = torch.autograd.grad(value, student)
        relative = float((gradient - wanted).norm() / wanted.norm())
        found.append((temperature, abs(float(value) / float(expected) - 1), relative))
    return found


def test_a_padded_vocabulary_is_compared_on_the_shared_part() -> None:
    cut, plain, without_rows = in_child(_padded)
    assert cut == pytest.approx(plain, rel=1e-6)
    assert without_rows == 0.0


def _padded() -> tuple[float, float, float]:
    import torch

    from finetune_trainer.worker.objectives.distillation import divergence_sum

    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(6, 40, generator=generator), torch.randn(6, 48, generator=generator)
    rows = torch.arange(6)
    cut = divergence_sum(student, teacher, rows, 2.0)
    plain = divergence_sum(student, teacher[:, :40].clone(), rows, 2.0)
    return float(cut), float(plain), float(divergence_sum(student, teacher, rows[:0], 2.0))


def test_no_log_probability_of_a_token_is_kept_for_the_backward_pass() -> None:
    assert in_child(_kept_numbers) < 3 * 64 * 100, "the logits of both models and what they were made of, no more"


def _kept_numbers() -> int:
    import torch

    from finetune_trainer.worker.objectives import distillation as ours

    ours._CHUNK_NUMBERS = 800  # eight rows at a time
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    student, teacher = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = ours.divergence_sum(student, teacher, torch.arange(64), 2.0)
    total.backward()
    return sum(kept.values())


# ---- the gradient of a step


@pytest.mark.parametrize(("micro", "accumulation", "ranks"), [(8, 1, 1), (1, 8, 1), (3, 2, 2)])
def test_a_step_has_the_gradient_of_the_formula_over_all_its_tokens(
    tmp_path: Path, micro: int, accumulation: int, ranks: int
) -> None:
    case = Case(CAUSAL.name, {**CAUSAL.model}, UNEVEN, CAUSAL.changes, models=CAUSAL.models)
    work = case.work(
        tmp_path / "w",
        {
            "hyperparameters": {
                "microBatchSize": micro,
                "gradientAccumulation": accumulation,
                "totalSteps": 1,
                "maxGradNorm": 1000.0,
            },
            "resources": {"processesPerNode": ranks},
        },
    )
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    in_child(_without_dropout, str(work.root))
    assert launch(save_gradient, ranks, str(work.root)) == [0] * ranks
    reference = in_child(_formula_gradient, str(work.root))
    found = np.load(work.root / "gradient-0.npy")
    assert np.linalg.norm(found - reference) / np.linalg.norm(reference) <= 1e-5


def _without_dropout(root: str) -> None:
    path = Path(root) / "inputs/model/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}))


def _formula_gradient(root: str) -> Any:
    """By plain torch, a record at a time: the mean over all tokens of 0.5 · CE + 0.5 · 16 · KL."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune_api.runfile import RunFile
    from finetune_trainer.data import load_dataset
    from finetune_trainer.worker.loading import load_tokenizer

    folder = Path(root)
    run = RunFile.from_json(json.loads((folder / "run.json").read_text()))
    examples = load_dataset(run, folder / "inputs", load_tokenizer(folder / "inputs/model")).train
    student = AutoModelForCausalLM.from_pretrained(folder / "inputs/model", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "inputs/teacher", dtype=torch.float32).eval()
    assert len(examples) == 8
    total, tokens = torch.zeros(()), 0
    for example in examples:
        ids, labels = (torch.from_numpy(a.astype("int64")) for a in (example.input_ids, example.labels))
        counted = labels[1:] != -100
        ours = student(input_ids=ids[None]).logits[0, :-1][counted]
        with torch.no_grad():
            theirs = teacher(input_ids=ids[None]).logits[0, :-1][counted]
        p, q = (theirs / 4).softmax(-1), (ours / 4).softmax(-1)
        cross = -ours.log_softmax(-1).gather(-1, labels[1:][counted][:, None]).sum()
        total = total + 0.5 * cross + 0.5 * 16 * (p * (p.log() - q.log())).sum()
        tokens += int(counted.sum())
    (total / tokens).backward()
    return flat_gradient(student)


def test_packed_records_have_the_loss_of_single_ones(tmp_path: Path) -> None:
    case = Case("x", {**CAUSAL.model, "dropout": 0.0}, CAUSAL.rows, CAUSAL.changes, models=CAUSAL.models)
    settings = {"microBatchSize": 32, "gradientAccumulation": 1, "maxSequenceLength": 128, "totalSteps": 1}
    found = []
    for packing in (False, True):
        work = case.work(tmp_path / str(packing), {"hyperparameters": {**settings, "packing": packing}})
        assert work.train() == [0], work.logged()
        found.append([line["loss"] for line in work.metrics() if "loss" in line])
        said = work.read("artifact/report.json")["data"]["packing"]
    assert "records do not see one another" in said
    assert found[1] == pytest.approx(found[0], rel=1e-6)


# ---- the teacher


def test_the_teacher_is_frozen_and_in_evaluation_mode_while_the_student_trains(tmp_path: Path) -> None:
    work = _work(tmp_path / "w", totalSteps=2)
    modes, changed, part = in_child(_modes, str(work.root))
    assert modes == [(True, False), (True, False)], "(student, teacher) in training mode, at each step's end"
    assert not changed
    assert not part, "the teacher is no part of the model that is optimised and saved"


def _modes(root: str) -> tuple[list[tuple[bool, bool]], bool, bool]:
    import torch
    from transformers import TrainerCallback

    engine = build_engine_in(root)
    teacher = engine.objective.teacher
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    modes: list[tuple[bool, bool]] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            modes.append((engine.model.training, teacher.training))

    engine.add_callback(Look())
    engine.train()
    changed = any(not torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    modules = {id(module) for module in engine.model.modules()}
    return modes, changed, any(id(module) in modules for module in teacher.modules())


def test_the_report_holds_both_parts_of_the_loss(tmp_path: Path) -> None:
    work = _work(tmp_path / "w", totalSteps=2)
    assert work.train() == [0], work.logged()
    tuned = work.read("artifact/report.json")["evaluation"]["tuned"]
    assert tuned["loss"] == pytest.approx(0.5 * tuned["labelLoss"] + 0.5 * 16 * tuned["divergence"], rel=1e-6)
    assert 0 <= tuned["tokenAccuracy"] <= 1
    assert tuned["perplexity"] == pytest.approx(np.exp(tuned["labelLoss"]), rel=1e-6)


def test_a_teacher_in_4_bits_teaches_nearly_the_same(tmp_path: Path) -> None:
    whole = _work(tmp_path / "whole", totalSteps=2)
    quantised = {"objective": distillation(quantizeTeacher=True), "hyperparameters": {"totalSteps": 2}}
    small = CAUSAL.work(tmp_path / "small", quantised)
    (small.root / "run.json").write_text(json.dumps(small.run.to_json()))
    share, first, second = in_child(_quantised_share, str(small.root), str(whole.root))
    assert share > 0.5
    assert first != second
    assert first == pytest.approx(second, rel=0.05)


def _quantised_share(small: str, whole: str) -> tuple[float, float, float]:
    from finetune_trainer.worker.tuning import parameter_shares

    engine = build_engine_in(small)
    share = parameter_shares(engine.objective.teacher)["quantisedShare"]
    return share, engine.evaluate()["eval_loss"], build_engine_in(whole).evaluate()["eval_loss"]


@pytest.mark.slow
def test_the_teacher_is_whole_on_each_rank_under_zero_3(tmp_path: Path) -> None:
    # Dropout would draw other numbers on two ranks than on one.
    case = Case("x", {**CAUSAL.model, "dropout": 0.0}, CAUSAL.rows, CAUSAL.changes, models=CAUSAL.models)
    plain = case.work(tmp_path / "plain", {"hyperparameters": {"totalSteps": 2}})
    assert plain.train() == [0], plain.logged()
    sharded = case.work(
        tmp_path / "sharded",
        {
            "hyperparameters": {"totalSteps": 2, "microBatchSize": 1, "zeroStage": 3},
            "resources": {"processesPerNode": 2},
        },
    )
    assert sharded.train() == [0, 0], sharded.logged()
    found = [[line["loss"] for line in work.metrics() if "loss" in line] for work in (plain, sharded)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# ---- refusals


def _refusal(work: Work) -> dict[str, Any]:
    assert work.train() != [0]
    return work.read("state/error-0.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vocabulary", "its vocabulary of 319 tokens is not the student's of 320"),
        ("merges", "merges characters in another order"),
        ("normalizer", "reads 'The capital of France is Paris.' as other tokens"),
    ],
)
def test_distillation_with_different_vocabularies_or_tokenizers_is_refused(
    tmp_path: Path, change: str, message: str
) -> None:
    work = _work(tmp_path / "w")
    path = work.root / "inputs/teacher/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    if change == "vocabulary":
        merge = tokenizer["model"]["merges"].pop()
        del tokenizer["model"]["vocab"]["".join(merge)]
    elif change == "merges":
        tokenizer["model"]["merges"].reverse()
    else:
        tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer))
    error = _refusal(work)
    assert (error["class"], error["field"]) == ("InvalidSpec", "spec.objective.distillation.teacher.uri")
    assert message in error["message"]


def test_a_teacher_whose_head_was_never_trained_is_refused(tmp_path: Path) -> None:
    case = Case("x", CLASSIFIER.model, SENTIMENT, CLASSIFICATION, models={"teacher": CAUSAL.models["teacher"]})
    error = _refusal(case.work(tmp_path / "w"))
    assert (error["class"], error["field"]) == ("InvalidSpec", "spec.objective.distillation.teacher.uri")
    assert "lack score, so its head would be random" in error["message"]


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    work = _work(tmp_path / "w", CLASSIFIER)
    _rename_classes(work, {"positive": "joy", "negative": "anger"})
    error = _refusal(work)
    assert (error["class"], error["field"]) == ("InvalidSpec", "spec.objective.distillation.teacher.uri")
    assert "The teacher's classes are anger, joy, but the data's labels are negative, positive" in error["message"]


def _rename_classes(work: Work, names: dict[str, str]) -> None:
    path = work.root / "inputs/teacher/config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {number: names[name] for number, name in config["id2label"].items()}
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    path.write_text(json.dumps(config))


def test_the_teachers_classes_are_found_by_name(tmp_path: Path) -> None:
    named = _work(tmp_path / "named", CLASSIFIER)
    swapped = _work(tmp_path / "swapped", CLASSIFIER)
    _rename_classes(swapped, {"positive": "negative", "negative": "positive"})
    first, second = in_child(_teacher_logits, str(named.root)), in_child(_teacher_logits, str(swapped.root))
    assert first.shape == (4, 2)
    assert np.abs(first[:, 0] - first[:, 1]).max() > 0.01
    assert np.allclose(first, second[:, ::-1])


def _teacher_logits(root: str) -> Any:
    import torch

    engine = build_engine_in(root)
    batch = engine.objective.collate([engine._records[k] for k in range(4)])
    with torch.no_grad():
        return engine.objective.teacher_logits(batch).numpy()


def test_a_teacher_with_too_few_positions_is_refused(tmp_path: Path) -> None:
    work = CAUSAL.work(tmp_path / "w", {"hyperparameters": {"maxSequenceLength": 256}})
    (work.root / "inputs/model").rename(work.root / "inputs/short")
    (work.root / "inputs/model").symlink_to(made_model(family="gpt2", positions=256))
    error = _refusal(work)
    assert (error["class"], error["field"]) == ("InvalidSpec", "spec.hyperparameters.maxSequenceLength")
    assert "The teacher has 128 positions" in error["message"]
