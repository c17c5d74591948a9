"""The teacher of a distillation: loaded frozen, and proven to read the student's tokens and classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetune_api.failures import FinetuneError
from finetune_api.job import ComputeType, Precision, QuantizationType, TuningType
from finetune_api.runfile import RunFile, RunQuantization, RunTuning
from finetune_trainer.worker.heads import Head, fresh_modules
from finetune_trainer.worker.loading import PRECISIONS, load_base, load_tokenizer, padding_id
from finetune_trainer.worker.zero import unsharded

FIELD = "spec.objective.distillation.teacher"
_PROBES = (
    "The capital of France is Paris.",
    "  two spaces,\ttabs\nand lines\n\n",
    "1234567890 + 3.14 = ?",
    "naïve café, Straße, Ωμέγα, привет, 你好, 🙂",
    "def f(x):\n    return x ** 2  # code",
    "UPPER lower MiXeD don't",
)
_COMPUTE = {Precision.FP32: ComputeType.FP32, Precision.BF16: ComputeType.BF16, Precision.FP16: ComputeType.FP16}


def load_teacher(
    folder: Path, run: RunFile, tokenizer: PreTrainedTokenizerFast, *, head: Head, device: torch.device
) -> PreTrainedModel:
    """The teacher in evaluation mode, frozen, whole on device even under ZeRO; in 4 bits where the run asks for it.

    tokenizer: the student's. Raises FinetuneError with the teacher's field: InvalidSpec for another tokenizer, too few
    positions or a head that was never trained; else as load_base does.
    """
    settings = run.objective.distillation
    assert settings is not None  # the planner gives every such run its settings
    try:
        check_tokenizers(tokenizer, load_tokenizer(folder))
        with unsharded():
            teacher = load_base(
                folder,
                _as_own_run(run, quantize=settings.quantize_teacher),
                head=head,
                labels=_own_classes(folder) if head.new else (),
                pad_id=padding_id(tokenizer),
                dtype=PRECISIONS[run.hyperparameters.precision],
                device=device,
            )
    except FinetuneError as error:
        if error.field is not None and error.field.startswith(FIELD):
            raise
        message = str(error).replace("The base model", "The teacher")
        raise FinetuneError(message, failure_class=error.failure_class, field=f"{FIELD}.uri") from error
    _check_trained(teacher)
    _check_positions(teacher, run.hyperparameters.max_sequence_length)
    teacher.config.use_cache = False
    teacher.requires_grad_(False)
    return teacher.to(device).eval() if not settings.quantize_teacher else teacher.eval()


def check_tokenizers(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> None:
    """Raises InvalidSpec unless both give the same ids for any text: same vocabulary, same merges, same probe texts."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise _refused(
            f"its vocabulary of {len(theirs)} tokens is not the student's of {len(ours)}: they differ in "
            f"{len(different)} tokens, such as {', '.join(map(repr, different[:3]))}"
        )
    if _merges(student) != _merges(teacher):
        raise _refused("it has the student's vocabulary, but merges characters in another order")
    for text in _PROBES:
        if student(text)["input_ids"] != teacher(text)["input_ids"]:
            raise _refused(f"it reads {text!r} as other tokens than the student")


def _merges(tokenizer: PreTrainedTokenizerFast) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges")


def _refused(why: str) -> FinetuneError:
    return FinetuneError(
        f"The teacher's tokenizer is not the student's: {why}. Its distribution is over other tokens, so nothing could "
        "be compared. Choose a teacher of the student's family.",
        failure_class="InvalidSpec",
        field=f"{FIELD}.uri",
    )


def _check_trained(teacher: PreTrainedModel) -> None:
    fresh = fresh_modules(teacher)
    if fresh:
        raise FinetuneError(
            f"The teacher's files lack {', '.join(fresh[:3])}, so its head would be random and teach nothing. Fine-tune "
            "the teacher on the task first, and give that model's URI.",
            failure_class="InvalidSpec",
            field=f"{FIELD}.uri",
        )


def _check_positions(teacher: PreTrainedModel, length: int) -> None:
    positions = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < length:
        raise FinetuneError(
            f"The teacher has {positions} positions, fewer than hyperparameters.maxSequenceLength {length}. Lower it.",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.maxSequenceLength",
        )


def teacher_classes(teacher: PreTrainedModel, labels: Sequence[str]) -> list[int]:
    """For each of the student's labels the teacher's class of that name; by number where the teacher has no names.

    Raises InvalidSpec if the teacher knows other classes.
    """
    names = {int(number): str(name) for number, name in teacher.config.id2label.items()}
    if len(names) == len(labels) and all(name == f"LABEL_{number}" for number, name in names.items()):
        return list(range(len(labels)))
    numbers = {name: number for number, name in names.items()}
    if set(numbers) != set(labels):
        raise FinetuneError(
            f"The teacher's classes are {', '.join(sorted(numbers)[:8])}, but the data's labels are "
            f"{', '.join(sorted(labels)[:8])}. Choose a teacher of the same task, or name the labels as the teacher does.",
            failure_class="InvalidSpec",
            field=f"{FIELD}.uri",
        )
    return [numbers[label] for label in labels]


def _own_classes(folder: Path) -> tuple[str, ...]:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return tuple(str(config.id2label[number]) for number in sorted(config.id2label))


def _as_own_run(run: RunFile, *, quantize: bool) -> RunFile:
    """The run as if the teacher were its base: frozen, quantised or not, whatever the student is."""
    quantization = RunQuantization(
        bits=4,
        type=QuantizationType.NF4,
        double_quant=True,
        compute_type=_COMPUTE[run.hyperparameters.precision],
    )
    tuning = RunTuning(
        type=TuningType.QLORA if quantize else TuningType.FULL, quantization=quantization if quantize else None
    )
    return run.model_copy(update={"tuning": tuning})
