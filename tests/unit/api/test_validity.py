"""The validity table: complete, in words that help, and the same for CEL, the operator and the planner."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.cel import validity_rules
from finetune_api.crd import structural
from finetune_api.failures import FinetuneError
from finetune_api.job import FineTuneJobSpec, ObjectiveType, Precision, QuantizationType, Task, TuningType
from finetune_api.planner import unsupported
from finetune_api.planner.support import cell_of
from finetune_api.validity import RULES, Cell, cells, refusal, refusing
from finetune_trainer.cli import cel
from tests.unit.api import values

GOAL, T, Q, P = ObjectiveType, TuningType, QuantizationType, Precision
CAUSAL, CLASSES = Task.CAUSAL_LM, Task.SEQUENCE_CLASSIFICATION

WORKS = [
    Cell(GOAL.SUPERVISED, T.FULL, CAUSAL, zero_stage=3, precision=P.BF16),
    Cell(GOAL.SUPERVISED, T.LORA, CAUSAL, zero_stage=2, precision=P.FP16),
    Cell(GOAL.SUPERVISED, T.QLORA, CAUSAL, Q.NF4, zero_stage=2),
    Cell(GOAL.SUPERVISED, T.QLORA, CAUSAL, Q.INT8),
    Cell(GOAL.SUPERVISED, T.IA3, Task.SEQ2SEQ),
    Cell(GOAL.SUPERVISED, T.PREFIX_TUNING, CAUSAL, Q.NF4),
    Cell(GOAL.SUPERVISED, T.PROMPT_TUNING, CLASSES),
    Cell(GOAL.SUPERVISED, T.LORA, Task.TOKEN_CLASSIFICATION),
    Cell(GOAL.SUPERVISED, T.FULL, Task.MASKED_LM),
    Cell(GOAL.PRETRAIN, T.FULL, CAUSAL),
    Cell(GOAL.PRETRAIN, T.FULL, Task.MASKED_LM),
    Cell(GOAL.PRETRAIN, T.FULL, Task.SEQ2SEQ),
    Cell(GOAL.DISTILLATION, T.FULL, CLASSES),
    Cell(GOAL.REWARD, T.QLORA, CLASSES, Q.NF4),
    Cell(GOAL.DPO, T.QLORA, CAUSAL, Q.NF4, zero_stage=2),
    Cell(GOAL.ORPO, T.FULL, CAUSAL),
    Cell(GOAL.KTO, T.LORA, CAUSAL),
    Cell(GOAL.PPO, T.LORA, CAUSAL),
    Cell(GOAL.GRPO, T.QLORA, CAUSAL, Q.NF4),
    Cell(GOAL.EVALUATION, None, Task.TOKEN_CLASSIFICATION),
    Cell(GOAL.EVALUATION, T.QLORA, CAUSAL, Q.INT8),
]
# cell, field that is named, words of the reason
REFUSED = [
    (Cell(GOAL.SUPERVISED, None, CAUSAL), "tuning", "is missing"),
    (Cell(GOAL.EVALUATION, T.LORA, CAUSAL), "tuning", "changes no parameter"),
    (Cell(GOAL.EVALUATION, None, CAUSAL, zero_stage=2), "hyperparameters.zeroStage", "no optimizer state"),
    (Cell(GOAL.PRETRAIN, T.LORA, CAUSAL), "tuning.type", "choose Full"),
    (Cell(GOAL.PRETRAIN, T.FULL, CLASSES), "model.task", "MaskedLM"),
    (Cell(GOAL.DPO, T.LORA, Task.SEQ2SEQ), "model.task", "choose CausalLM"),
    (Cell(GOAL.DPO, T.PROMPT_TUNING, CAUSAL), "tuning.type", "Supervised only"),
    (Cell(GOAL.REWARD, T.LORA, CAUSAL), "model.task", "SequenceClassification"),
    (Cell(GOAL.DISTILLATION, T.FULL, Task.SEQ2SEQ), "model.task", "SequenceClassification"),
    (Cell(GOAL.SUPERVISED, T.PROMPT_TUNING, Task.MASKED_LM), "tuning.type", "masked model"),
    (Cell(GOAL.SUPERVISED, T.PREFIX_TUNING, CLASSES), "tuning.type", "needs a decoder"),
    (Cell(GOAL.SUPERVISED, T.FULL, CAUSAL, Q.NF4), "tuning.quantization", "cannot train"),
    (Cell(GOAL.SUPERVISED, T.LORA, CAUSAL, Q.NF4), "tuning.quantization", "QLoRA"),
    (Cell(GOAL.SUPERVISED, T.QLORA, CAUSAL), "tuning.quantization", "choose LoRA"),
    (Cell(GOAL.SUPERVISED, T.QLORA, CAUSAL, Q.NF4, zero_stage=3), "hyperparameters.zeroStage", "3 cannot shard"),
    (Cell(GOAL.SUPERVISED, T.QLORA, CAUSAL, Q.INT8, zero_stage=1), "hyperparameters.zeroStage", "8-bit"),
    (Cell(GOAL.SUPERVISED, T.IA3, CAUSAL, Q.NF4, zero_stage=2), "hyperparameters.zeroStage", "QLoRA only"),
    (Cell(GOAL.SUPERVISED, T.P_TUNING, CAUSAL, zero_stage=3), "hyperparameters.zeroStage", "soft prompt"),
    (Cell(GOAL.DPO, T.FULL, CAUSAL, zero_stage=3), "hyperparameters.zeroStage", "reference"),
    (Cell(GOAL.DPO, T.FULL, CAUSAL, zero_stage=3), "hyperparameters.zeroStage", "second copy"),
    (Cell(GOAL.PPO, T.FULL, CAUSAL, zero_stage=3), "hyperparameters.zeroStage", "generation"),
    (Cell(GOAL.GRPO, T.LORA, CAUSAL, zero_stage=2), "hyperparameters.zeroStage", "generation"),
    (Cell(GOAL.SUPERVISED, T.LORA, CAUSAL, precision=P.FP16, on_cpu=True), "hyperparameters.precision", "needs a GPU"),
    (
        Cell(GOAL.SUPERVISED, T.FULL, CAUSAL, zero_stage=2, precision=P.FP16, on_cpu=True),
        "hyperparameters.precision",
        "needs a GPU",
    ),
]


def as_spec(cell: Cell) -> dict[str, Any]:
    """The cell as a person would write it."""
    document = values.spec_json(**values.merge(values.OBJECTIVES[cell.objective], {"model": {"task": cell.task.value}}))
    document.pop("tuning", None)
    if cell.tuning is not None:
        document["tuning"] = {"type": cell.tuning.value}
        if cell.quantization is not None:
            document["tuning"]["quantization"] = {"type": cell.quantization.value}
    if cell.zero_stage:
        document["hyperparameters"] = {"zeroStage": cell.zero_stage}
    return document


@pytest.mark.parametrize("cell", WORKS, ids=str)
def test_what_people_use_works(cell: Cell) -> None:
    assert refusal(cell) is None


@pytest.mark.parametrize(("cell", "field", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_work_is_refused_with_the_reason(cell: Cell, field: str, words: str) -> None:
    found = refusal(cell)
    assert found is not None
    assert found.startswith(f"{field}: ")
    assert words in found


def test_every_cell_has_an_answer_and_every_rule_is_the_answer_to_some_cell() -> None:
    asked = list(cells())
    assert len(asked) == len(set(asked)) == 10 * 8 * 5 * 4 * 4 * 3 * 2
    told = {refusing(cell) for cell in asked}
    assert told == {None, *RULES}, "a rule behind another one that says it all is dead"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.message[:60])
def test_a_refusal_names_a_field_of_the_spec_and_says_what_to_do(rule: Any) -> None:
    node = structural(FineTuneJobSpec)
    for part in rule.field.split("."):
        node = node["properties"][part]
    assert "choose" in rule.reason or "remove" in rule.reason


def test_the_api_server_the_operator_and_the_table_say_the_same_of_every_cell_that_can_be_written() -> None:
    rules = list(validity_rules())
    compared = 0
    for cell in cells(precision=P.FP32, on_cpu=False):
        unquantised = cell.tuning == T.QLORA and cell.quantization is None
        if unquantised or (cell.tuning is None and cell.quantization is not None):
            continue
        document = as_spec(cell)
        broken = [rule["message"] for rule in rules if not cel.holds(rule["rule"], document)]
        found = refusing(cell)
        assert (found.message in broken) if found is not None else broken == [], cell
        spec = FineTuneJobSpec.from_json(document)
        assert cell_of(spec) == cell
        compared += 1
    assert compared > 5000


@pytest.mark.parametrize("kind", ["absent", "bits"])
def test_quantisation_that_is_not_spelled_out_is_understood(kind: str) -> None:
    given = {"absent": {}, "bits": {"quantization": {"bits": 8}}}[kind]
    document = values.spec_json(tuning=given, hyperparameters={"zeroStage": 2})
    cell = cell_of(FineTuneJobSpec.from_json(document))
    assert cell.quantization == {"absent": Q.NF4, "bits": Q.INT8}[kind]
    broken = [rule for rule in validity_rules() if not cel.holds(rule["rule"], document)]
    assert bool(broken) == (kind == "bits")


def test_a_reward_model_needs_no_task() -> None:
    document = values.spec_json(**values.OBJECTIVES["Reward"])
    assert FineTuneJobSpec.from_json(document).task == CLASSES
    assert all(cel.holds(rule["rule"], document) for rule in validity_rules())
    assert unsupported(FineTuneJobSpec.from_json(document)) == []


@pytest.mark.parametrize("kind", values.OBJECTIVES)
@pytest.mark.parametrize("tuning", ["Full", "LoRA", "QLoRA"])
def test_the_planner_never_chooses_a_refused_cell(kind: str, tuning: str) -> None:
    changes = values.merge(values.OBJECTIVES[kind], {"tuning": {"type": tuning}})
    model = values.model_facts(13_000_000_000, hidden_size=5120, layers=40, vocabulary_size=32000)
    job = values.spec(**changes)
    if unsupported(job):
        return
    try:
        run = values.plan(job, values.A100_80, model=model).run
    except FinetuneError as error:
        assert error.failure_class == "NoPoolFits"
        return
    hp = run.hyperparameters
    assert refusal(cell_of(job, zero_stage=hp.zero_stage, precision=hp.precision)) is None


def test_a_pool_that_a_rule_is_about_is_refused_before_a_gpu_is_taken() -> None:
    job = values.spec(
        tuning={"type": "LoRA"}, hyperparameters={"zeroStage": 2, "precision": "FP16"}, resources={"pool": "cpu"}
    )
    with pytest.raises(FinetuneError, match="needs a GPU") as caught:
        values.plan(job, values.cpu_pool(), model=values.small_model())
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.hyperparameters.precision")
