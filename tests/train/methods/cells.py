"""A small run for any cell of the validity table."""

from __future__ import annotations

from typing import Any

from finetune_api.job import ObjectiveType, Precision, QuantizationType, Task, TuningType
from finetune_api.validity import Cell, cells, refusal
from tests.train.methods.case import Case, merged
from tests.train.worker.runs import LORA, records

_WORDS = ["red", "blue", "green", "black", "white", "grey"]
_TEXTS = [{"text": f"say {word} {number}: {word * (1 + number % 3)}"} for number in range(4) for word in _WORDS]
_LABELS = [{"text": row["text"], "label": "long" if k % 2 else "short"} for k, row in enumerate(_TEXTS)]
_TAGS = [{"tokens": ["say", word, "now"], "tags": ["O", "B-Colour", "O"]} for word in _WORDS * 3]
_PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no idea"} for r in records()]
_JUDGED = [{"prompt": r["prompt"], "completion": r["completion"], "label": k % 2 == 0} for k, r in enumerate(records())]
_MODELS = {
    Task.CAUSAL_LM: {"family": "llama", "spread": 0.2},
    Task.SEQ2SEQ: {"family": "t5"},
    Task.MASKED_LM: {"family": "bert"},
    Task.SEQUENCE_CLASSIFICATION: {"family": "bert"},
    Task.TOKEN_CLASSIFICATION: {"family": "bert"},
}
_TRAINED_HEADS: dict[Task, dict[str, Any]] = {
    Task.SEQUENCE_CLASSIFICATION: {"labels": ("long", "short")},
    Task.TOKEN_CLASSIFICATION: {"tags": ("O", "B-Colour", "I-Colour")},
}
_PRETRAIN = {
    "tokenizer": "Model",
    "randomWindows": False,
    "blockSize": 32,
    "maskProbability": 0.15,
    "meanSpanLength": 3.0,
}
_PREFERENCE = {"beta": 0.1}
_REINFORCEMENT = {
    "rewards": [{"function": "Length", "targetLength": 3, "weight": 1.0}],
    "beta": 0.05,
    "generations": 2,
    "maxNewTokens": 4,
    "temperature": 1.0,
    "clipRange": 0.2,
    "iterations": 1,
}
_DISTILLATION = {
    "teacher": {"uri": "hf://tiny/teacher", "access": {}},
    "teacherDigest": "sha256:t",
    "temperature": 2.0,
    "alpha": 0.5,
    "quantizeTeacher": False,
}


def allowed(**fixed: object) -> list[Cell]:
    """The cells that no rule refuses."""
    return [cell for cell in cells(**fixed) if refusal(cell) is None]


def cell_name(cell: Cell) -> str:
    """For the test's name."""
    parts = [cell.objective, cell.tuning, cell.task, cell.quantization, f"zero{cell.zero_stage}", cell.precision]
    return "-".join(str(part) for part in parts if part is not None)


def cell_case(cell: Cell) -> Case:
    """Two steps of the cell at tiny size."""
    rows, data = _data(cell)
    changes: dict[str, Any] = {
        "model": {"task": cell.task},
        "dataset": data,
        "objective": _objective(cell),
        "tuning": _tuning(cell),
        "hyperparameters": {
            "totalSteps": 0 if cell.objective is ObjectiveType.EVALUATION else 2,
            "precision": cell.precision,
            "zeroStage": cell.zero_stage,
            "maxSequenceLength": 32 if cell.objective is ObjectiveType.PRETRAIN else 64,
        },
    }
    if cell.zero_stage:
        changes["resources"] = {"processesPerNode": 2}
    if cell.objective is ObjectiveType.PRETRAIN and cell.task is Task.SEQ2SEQ:
        changes["model"]["addSpecialTokens"] = [f"<extra_id_{number}>" for number in range(8)]
    model: dict[str, Any] = dict(_MODELS[cell.task])
    if cell.objective is ObjectiveType.REWARD:
        model = dict(_MODELS[Task.CAUSAL_LM])
    trained = model | _TRAINED_HEADS.get(cell.task, {})
    models = {"teacher": {**trained, "seed": 1}} if cell.objective is ObjectiveType.DISTILLATION else {}
    if cell.objective is ObjectiveType.EVALUATION:
        model = trained
    return Case(cell_name(cell), model, rows, changes, models=models)


def _data(cell: Cell) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    kind = cell.objective
    if kind in (ObjectiveType.REWARD, ObjectiveType.DPO, ObjectiveType.ORPO):
        return _PAIRS, {"format": "Preference"}
    if kind is ObjectiveType.KTO:
        return _JUDGED, {"format": "Preference"}
    if kind is ObjectiveType.PRETRAIN or cell.task is Task.MASKED_LM:
        return _TEXTS, {"format": "Text", "lossOn": "All"}
    if cell.task is Task.SEQUENCE_CLASSIFICATION:
        return _LABELS, {"format": "Labels"}
    if cell.task is Task.TOKEN_CLASSIFICATION:
        return _TAGS, {"format": "Tags"}
    return records(), {}


def _objective(cell: Cell) -> dict[str, Any]:
    kind = cell.objective
    found: dict[str, Any] = {"type": kind}
    if kind is ObjectiveType.PRETRAIN or cell.task is Task.MASKED_LM:
        found["pretrain"] = _PRETRAIN
    if kind is ObjectiveType.DISTILLATION:
        found["distillation"] = _DISTILLATION
    if kind in (ObjectiveType.DPO, ObjectiveType.ORPO, ObjectiveType.KTO):
        found["preference"] = _PREFERENCE
    if kind is ObjectiveType.GRPO:
        found["reinforcement"] = _REINFORCEMENT
    if kind is ObjectiveType.PPO:
        found["reinforcement"] = {**_REINFORCEMENT, "generations": 1}
    return found


def _tuning(cell: Cell) -> dict[str, Any]:
    kind = cell.tuning or TuningType.FULL
    if cell.objective is ObjectiveType.EVALUATION:
        kind = TuningType.FULL  # as the planner has it: nothing trains, and the base may be held quantised
    found: dict[str, Any] = {"type": kind, "lora": None}
    if kind in (TuningType.LORA, TuningType.QLORA):
        found["lora"] = LORA
    if kind is TuningType.IA3:
        found["ia3"] = {}
    if kind in (TuningType.PROMPT_TUNING, TuningType.P_TUNING, TuningType.PREFIX_TUNING):
        found["softPrompt"] = {"virtualTokens": 4, "init": "Random", "projection": False}
    if cell.quantization is not None:
        bits = 8 if cell.quantization is QuantizationType.INT8 else 4
        compute = "FP32" if cell.precision is Precision.FP32 else cell.precision
        found["quantization"] = {
            "bits": bits,
            "type": cell.quantization,
            "doubleQuant": bits == 4,
            "computeType": compute,
        }
    return merged({}, found)
