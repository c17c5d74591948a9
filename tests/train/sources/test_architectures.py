"""Which model fits which task. The table is tried on the library itself: every type, every task, one forward pass."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.job import ObjectiveType, Task, TuningType
from finetune_trainer.sources.architectures import (
    MIXTURES,
    TASKS,
    check_architecture,
    labels_of,
    model_shape,
    quantization_of,
)
from finetune_trainer.sources.parameters import estimate_parameters
from tests.train.sources import families
from tests.train.worker.runs import in_child

BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}


@cache
def tried() -> dict[str, dict[str, Any]]:
    return in_child(families.try_all)


def test_every_listed_type_computes_every_listed_task_without_code_of_its_own() -> None:
    assert {name: found["error"] for name, found in tried().items() if "error" in found} == {}
    shapes = {
        "CausalLM": [2, 9, families.VOCABULARY],
        "MaskedLM": [2, 9, families.VOCABULARY],
        "Seq2Seq": [2, 9, families.VOCABULARY],
        "SequenceClassification": [2, 3],
        "TokenClassification": [2, 9, 3],
    }
    for name, found in tried().items():
        assert found["logits"] == {task.value: shapes[task.value] for task in TASKS[name]}, name


def test_the_shape_of_every_listed_type_is_read_from_its_config() -> None:
    for name, found in tried().items():
        shape = model_shape(found["whole"])
        seq2seq = Task.SEQ2SEQ in TASKS[name]
        assert (shape.hidden_size, shape.layers) == (families.WIDTH, 5 if seq2seq else 2), name
        assert shape.vocabulary_size == families.VOCABULARY
        assert shape.encoder == (seq2seq or Task.MASKED_LM in TASKS[name])
        assert shape.experts == (4 if name in MIXTURES else None)
        size = found["whole"].get("moe_intermediate_size") or found["whole"].get("intermediate_size")
        fused = (2, size) if name in MIXTURES - {"switch_transformers"} else (None, None)
        assert (shape.experts_per_token, shape.expert_size) == fused, name
        assert shape.shared_expert_size == (48 if name == "qwen2_moe" else None), name


def test_parameters_are_estimated_from_a_config_as_it_is_saved_to_within_three_percent() -> None:
    for name, found in tried().items():
        assert estimate_parameters(found["config"]) == pytest.approx(found["parameters"], rel=0.03), name


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}, 512),
        ({"model_type": "t5", "n_positions": 512}, None),
        ({"model_type": "bloom"}, None),
    ],
)
def test_positions_are_those_that_a_text_can_use(config: dict[str, Any], positions: int | None) -> None:
    sizes = {"hidden_size": 8, "d_model": 8, "num_hidden_layers": 1, "num_layers": 1, "vocab_size": 9}
    assert model_shape(config | sizes).max_positions == positions


@pytest.mark.parametrize(
    ("config", "task", "field", "words"),
    [
        (BERT, Task.CAUSAL_LM, "task", "cannot be used with model.task CausalLM; it fits MaskedLM and SequenceClass"),
        (LLAMA, Task.SEQ2SEQ, "task", "it fits CausalLM and SequenceClassification and TokenClassification"),
        (T5, Task.SEQUENCE_CLASSIFICATION, "task", "it fits Seq2Seq"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, Task.CAUSAL_LM, "uri", "no head for CausalLM"),
        (LLAMA | {"architectures": ["LlamaModel"]}, Task.CAUSAL_LM, "uri", "LlamaModel has no head for CausalLM"),
        (BERT | {"architectures": ["BertForSequenceClassification"]}, Task.MASKED_LM, "uri", "no head for MaskedLM"),
        ({"model_type": "chatglm", "auto_map": {}}, Task.CAUSAL_LM, "uri", "choose a model of type glm or glm4"),
        ({"model_type": "RefinedWebModel"}, Task.CAUSAL_LM, "uri", "choose a revision of type falcon"),
        ({"model_type": "wav2vec2"}, Task.SEQ2SEQ, "uri", "supported for Seq2Seq are mt5, switch_transformers, t5"),
        ({}, Task.CAUSAL_LM, "uri", "config.json has no model_type"),
    ],
)
def test_a_model_that_does_not_fit_its_task_is_refused(
    config: dict[str, Any], task: Task, field: str, words: str
) -> None:
    with pytest.raises(FinetuneError, match=words) as caught:
        check_architecture(config, task=task, field="objective.distillation.teacher.uri")
    assert caught.value.failure_class == "ModelUnsupported"
    assert caught.value.field == f"spec.objective.distillation.teacher.{field}"


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (BERT, Task.MASKED_LM),
        (BERT, Task.TOKEN_CLASSIFICATION),
        (LLAMA, Task.SEQUENCE_CLASSIFICATION),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, Task.SEQUENCE_CLASSIFICATION),
        (T5 | {"architectures": ["T5WithLMHeadModel"]}, Task.SEQ2SEQ),
        ({"model_type": "gpt2", "architectures": ["GPT2Model"]}, Task.CAUSAL_LM),
        ({"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "auto_map": {"AutoModel": "x"}}, Task.CAUSAL_LM),
    ],
)
def test_a_model_that_fits_passes(config: dict[str, Any], task: Task) -> None:
    check_architecture(config, task=task)


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"bits": 4}, "an unknown method"),
        (None, None),
        ({}, None),
    ],
)
def test_weights_that_are_quantised_already_are_recognised(given: dict[str, Any] | None, method: str | None) -> None:
    assert quantization_of({"quantization_config": given}) == method


@pytest.mark.parametrize(
    ("method", "tuning", "objective", "words"),
    [
        ("gptq", TuningType.LORA, ObjectiveType.SUPERVISED, "quantised by gptq"),
        ("awq", None, ObjectiveType.EVALUATION, "quantised by awq"),
        ("bitsandbytes", TuningType.FULL, ObjectiveType.SUPERVISED, "so they cannot change; choose an adapter"),
        ("bitsandbytes", TuningType.FULL, ObjectiveType.PRETRAIN, "Pretrain makes new ones"),
    ],
)
def test_quantised_weights_are_refused_where_they_do_not_work(
    method: str, tuning: TuningType | None, objective: ObjectiveType, words: str
) -> None:
    config = LLAMA | {"quantization_config": {"quant_method": method}}
    with pytest.raises(FinetuneError, match=words):
        check_architecture(config, tuning=tuning, objective=objective)


@pytest.mark.parametrize("tuning", [TuningType.LORA, TuningType.QLORA, TuningType.IA3, TuningType.PREFIX_TUNING, None])
def test_a_bitsandbytes_base_carries_adapters(tuning: TuningType | None) -> None:
    check_architecture(LLAMA | {"quantization_config": {"quant_method": "bitsandbytes"}}, tuning=tuning)


def test_labels_come_in_the_order_of_their_numbers() -> None:
    assert labels_of({"id2label": {"10": "k", "2": "c", "0": "a"}}) == ("a", "c", "k")
    assert labels_of({}) == ("LABEL_0", "LABEL_1")
    assert labels_of({"id2label": {"x": "a"}}) == ()
