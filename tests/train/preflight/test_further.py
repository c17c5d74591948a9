"""Earlier adapters, teachers, reward models, benchmarks and retention text: what a job needs beside model and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.sources import Purpose, Reach, data_digest, fetch
from tests.train.data.making import backend
from tests.train.preflight.local import ASKED, LABELLED, Folder, classifier, faults, remarks, told
from tests.train.sources.making import PICKLE, adapter_files, model_files

ADAPTER = "model.adapter.uri"
TEACHER = "objective.distillation.teacher.uri"
REWARD = "objective.grpo.rewards[1].model.uri"
LORA = {"lora": {"rank": 2, "alpha": 4}}
MADE = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "somewhere/model"}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def fetched_digest(folder: Folder, name: str, purpose: Purpose) -> str:
    """What the agent computes of the same files."""
    from tests.train.sources.making import reference

    reach = Reach(env={}, allow_file=True)
    return fetch(
        reference(folder.uri(name)), folder.root / "got" / name, purpose=purpose, field="f", reach=reach
    ).digest


def test_an_adapter_of_the_same_kind_and_settings_passes_with_its_digest(folder: Folder) -> None:
    folder.put_model("adapter", adapter_files(**MADE))
    result = folder.check({ADAPTER: "Adapter adapter"}, **LORA)
    assert faults(result) == [] and "The adapter was made on" not in remarks(result)
    assert result.digests == {ADAPTER: fetched_digest(folder, "adapter", Purpose.ADAPTER)}


def test_an_adapter_of_another_base_is_remarked(folder: Folder) -> None:
    folder.put_model("adapter", adapter_files(**MADE | {"base_model_name_or_path": "meta/other"}))
    result = folder.check({ADAPTER: "Adapter adapter"}, **LORA)
    assert faults(result) == [] and "The adapter was made on meta/other, and model.uri is" in remarks(result)


@pytest.mark.parametrize(
    ("config", "settings", "field", "words"),
    [
        ({"peft_type": "IA3"}, LORA, "tuning.type", "was made by IA3, and tuning.type is LoRA"),
        ({"r": 8}, LORA, "tuning.lora.rank", "has r 8, and this run would train with 2"),
        ({"r": 8}, {}, "tuning.lora.rank", "has r 8, and this run would train with 16"),
        ({"lora_alpha": 32}, LORA, "tuning.lora.alpha", "has lora_alpha 32, and this run would train with 4"),
        ({"use_dora": True}, LORA, "tuning.lora.variant", "has use_dora True"),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8},
            {"tuning": "PromptTuning", "softPrompt": {"virtualTokens": 10}},
            "tuning.softPrompt.virtualTokens",
            "has num_virtual_tokens 8, and this run would train with 10",
        ),
    ],
)
def test_an_adapter_that_cannot_be_continued_is_told_with_the_setting(
    folder: Folder, config: dict[str, Any], settings: dict[str, Any], field: str, words: str
) -> None:
    folder.put_model("adapter", adapter_files(**MADE | config))
    result = folder.check({ADAPTER: "Adapter adapter"}, **settings)
    assert told(result) == [("InvalidSpec", f"spec.{field}")] and words in faults(result)[0].message


@pytest.mark.parametrize("tuning", ["LoRA", None])
def test_an_adapter_of_an_unknown_kind_or_with_pickles_is_refused(folder: Folder, tuning: str | None) -> None:
    folder.put_model("adapter", adapter_files(peft_type="VERA"))
    job = {"tuning": tuning, "objective": "Supervised" if tuning else "Evaluation"}
    result = folder.check({ADAPTER: "Adapter adapter"}, **job)
    assert told(result) == [("ModelUnsupported", f"spec.{ADAPTER}")] and "PEFT type VERA" in faults(result)[0].message
    (folder.root / "adapter" / "adapter_model.safetensors").unlink()
    (folder.root / "adapter" / "adapter_model.bin").write_bytes(PICKLE)
    assert told(folder.check({ADAPTER: "Adapter adapter"}, **job)) == [("UnsafeFile", f"spec.{ADAPTER}")]


def test_any_adapter_of_a_known_kind_may_be_evaluated(folder: Folder) -> None:
    folder.put_model("adapter", adapter_files(peft_type="IA3", base_model_name_or_path=None))
    assert faults(folder.check({ADAPTER: "Adapter adapter"}, objective="Evaluation", tuning=None)) == []


def test_the_head_and_labels_of_a_classifier_may_come_with_its_adapter(folder: Folder) -> None:
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    folder.put_model("model", model_files(config=bert))
    folder.put("train", LABELLED)
    config = {"config.json": json.dumps({"id2label": {"0": "no", "1": "yes"}}).encode()}
    folder.put_model("adapter", adapter_files(**MADE) | config)
    job = {"objective": "Evaluation", "tuning": None, "task": "SequenceClassification"}
    assert faults(folder.check({ADAPTER: "Adapter adapter"}, **job)) == []
    config = {"config.json": json.dumps({"id2label": {"0": "bad", "1": "good"}}).encode()}
    folder.put_model("adapter", adapter_files(**MADE) | config)
    result = folder.check({ADAPTER: "Adapter adapter"}, **job)
    assert "it knows bad, good" in faults(result)[0].message


def test_a_teacher_with_the_same_tokenizer_passes_with_digest_and_size(folder: Folder) -> None:
    files = model_files(config={"hidden_size": 16})
    # Written by another version: merges as text, and no defaults.
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]
    ]
    tokenizer["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    folder.put_model("teacher", files | {"tokenizer.json": json.dumps(tokenizer).encode()})
    result = folder.check({TEACHER: "Model teacher"}, objective="Distillation")
    assert faults(result) == []
    assert result.digests == {TEACHER: fetched_digest(folder, "teacher", Purpose.MODEL)}
    assert result.further_weight_bytes == {TEACHER: len(files["model.safetensors"])}


def test_a_teacher_with_another_tokenizer_is_refused(folder: Folder) -> None:
    other = backend()
    other.add_special_tokens(["<extra>"])
    folder.put_model("teacher", model_files() | {"tokenizer.json": other.to_str().encode()})
    result = folder.check({TEACHER: "Model teacher"}, objective="Distillation")
    assert told(result) == [("InvalidSpec", f"spec.{TEACHER}")]
    size = backend().get_vocab_size()
    words = f"its vocabulary has {size + 1} tokens, the student's {size}, and 1 of its tokens"
    assert words in faults(result)[0].message
    folder.put_model("teacher", model_files() | {"tokenizer.json": backend(adds_bos=True).to_str().encode()})
    result = folder.check({TEACHER: "Model teacher"}, objective="Distillation")
    assert "they have the same vocabulary and differ in post_processor" in faults(result)[0].message


def test_a_teacher_whose_head_would_be_random_is_refused(folder: Folder) -> None:
    folder.put_model("teacher", model_files(config={"architectures": ["LlamaModel"]}))
    result = folder.check({TEACHER: "Model teacher"}, objective="Distillation")
    assert told(result) == [("ModelUnsupported", f"spec.{TEACHER}")]
    assert "LlamaModel has no head for CausalLM" in faults(result)[0].message
    folder.put_model("teacher", model_files(config={"architectures": None}))
    result = folder.check({TEACHER: "Model teacher"}, objective="Distillation")
    assert told(result) == [("InvalidSpec", f"spec.{TEACHER}")]
    assert "of no named class: it has no trained head for CausalLM" in faults(result)[0].message
    folder.put_model("teacher", model_files(config={"architectures": ["LlamaModel"], "tie_word_embeddings": True}))
    assert faults(folder.check({TEACHER: "Model teacher"}, objective="Distillation")) == []


def test_a_teacher_of_classes_must_know_those_of_the_data(folder: Folder) -> None:
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    folder.put_model("model", model_files(config=bert))
    folder.put("train", LABELLED)
    job = {"objective": "Distillation", "task": "SequenceClassification"}
    for labels in (["yes", "no"], ["LABEL_0", "LABEL_1"]):
        folder.put_model("teacher", classifier(labels))
        assert faults(folder.check({TEACHER: "Model teacher"}, **job)) == []
    folder.put_model("teacher", classifier(["yes", "no", "perhaps"]))
    result = folder.check({TEACHER: "Model teacher"}, **job)
    assert told(result) == [("InvalidSpec", f"spec.{TEACHER}")]
    assert "The teacher's classes are no, perhaps, yes, but the data's labels are no, yes" in faults(result)[0].message
    folder.put_model("teacher", model_files(config=bert))
    result = folder.check({TEACHER: "Model teacher"}, **job)
    assert "no trained head for SequenceClassification" in faults(result)[0].message


def test_a_teacher_with_fewer_positions_than_the_run_needs_is_told(folder: Folder) -> None:
    folder.put_model("teacher", model_files(config={"max_position_embeddings": 32}))
    result = folder.check({TEACHER: "Model teacher"}, objective="Distillation", maxSequenceLength=64)
    assert told(result) == [("InvalidSpec", "spec.hyperparameters.maxSequenceLength")]


def test_a_reward_model_scores_with_one_trained_output(folder: Folder) -> None:
    folder.put_model("reward", classifier(["LABEL_0"], family="llama"))
    result = folder.check({REWARD: "Model reward"}, objective="GRPO")
    assert faults(result) == [] and result.digests.keys() == result.further_weight_bytes.keys() == {REWARD}
    folder.put_model("reward", classifier(["bad", "good"], family="llama"))
    result = folder.check({REWARD: "Model reward"}, objective="GRPO")
    assert told(result) == [("InvalidSpec", f"spec.{REWARD}")] and "has 2 labels" in faults(result)[0].message
    folder.put_model("reward", model_files())
    result = folder.check({REWARD: "Model reward"}, objective="GRPO")
    assert "LlamaForCausalLM: it has no trained head that scores a text" in faults(result)[0].message


def test_missing_further_models_are_all_told_each_with_its_field(folder: Folder) -> None:
    result = folder.check({ADAPTER: "Adapter none", TEACHER: "Model nothing"}, objective="Distillation")
    assert told(result) == [("ModelNotFound", f"spec.{ADAPTER}"), ("ModelNotFound", f"spec.{TEACHER}")]
    assert "The adapter at" in faults(result)[0].message and "The model at" in faults(result)[1].message


ARC = {"question": "2+2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}
HELLA = {"ctx_a": "A man", "ctx_b": "he", "activity_label": "Run", "endings": ["runs", "flies"], "label": "1"}
MMLU = {"question": "2+2?", "choices": ["1", "2", "3", "4"], "answer": 3}
TRUTHFUL = {
    "question": "Is it?",
    "mc1_targets": {"choices": ["no", "yes"], "labels": [1, 0]},
    "mc2_targets": {"choices": ["no", "yes"], "labels": [1, 0]},
}


@pytest.mark.parametrize(
    ("name", "good", "change", "words"),
    [
        ("ArcEasy", ARC, {"answerKey": "C"}, "answerKey 'C' is none of the labels"),
        ("ArcChallenge", ARC, {"choices": ["3", "4"]}, "choices must be {text: [...], label: [...]}"),
        ("HellaSwag", HELLA, {"label": "2"}, "label must be the number of one of endings, 0 to 1"),
        ("HellaSwag", HELLA, {"ctx_b": None}, "column 'ctx_b' is null, not text"),
        ("MMLU", MMLU, {"choices": ["1", "2"]}, "choices must be a list of 4 texts"),
        ("MMLU", MMLU, {"answer": "D"}, "answer must be the number of one of choices, 0 to 3, and is 'D'"),
        ("TruthfulQA", TRUTHFUL, {"mc2_targets": None}, "mc2_targets must be {choices: [...], labels: [...]}"),
        (
            "TruthfulQA",
            TRUTHFUL,
            {"mc1_targets": {"choices": ["no", "yes"], "labels": [0, 1]}},
            "the first choice of mc1_targets must be the right one",
        ),
    ],
)
def test_a_benchmark_has_the_columns_that_the_harness_reads(
    folder: Folder, name: str, good: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    field = "evaluation.benchmarks[0].source.uri"
    folder.put("bench", [good] * 3)
    assert faults(folder.check({field: f"Data bench {name}"})) == []
    folder.put("bench", [good, good | change])
    result = folder.check({field: f"Data bench {name}"})
    assert told(result) == [("DataInvalid", f"spec.{field}")]
    assert "rows.jsonl line 2" in faults(result)[0].message and words in faults(result)[0].message


def test_retention_text_has_a_shape_of_its_own(folder: Folder) -> None:
    folder.put("general", [{"text": "General text."}])
    assert faults(folder.check({"evaluation.retention.uri": "Data general"})) == []
    folder.put("general", [{"nothing": "here"}])
    result = folder.check({"evaluation.retention.uri": "Data general"})
    assert told(result) == [("DataInvalid", "spec.evaluation.retention.uri")]


def test_the_digest_covers_all_data_in_the_order_of_the_run_files_inputs(folder: Folder) -> None:
    from tests.train.sources.making import reference

    for name in ("held", "test"):
        folder.put(name, ASKED[:3])
    folder.put("general", [{"text": "General text."}])
    folder.put("bench", [ARC])
    further = {
        "dataset.test.source.uri": "Data test",
        "evaluation.retention.uri": "Data general",
        "evaluation.benchmarks[0].source.uri": "Data bench ArcEasy",
    }
    result = folder.check(further, validation="held")
    assert faults(result) == [] and result.data is not None and result.data.rows == 30
    reach, got = Reach(env={}, allow_file=True), []
    for name in ("train", "held", "test", "general", "bench"):
        uri = folder.uri(name)
        fetched = fetch(reference(uri), folder.root / "got" / name, purpose=Purpose.DATA, field="f", reach=reach)
        got.append((uri, fetched.files))
    assert result.data.digest == data_digest(got)
