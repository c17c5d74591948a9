"""Each objective and task gets data that fits it, or an answer that says what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import LossOn, ObjectiveType, Task, Truncation
from finetune_trainer.data.encoders import REGISTRY, EncodingRules, make_encoder
from finetune_trainer.data.reader import ExampleReader
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.tokenizer import TextTokenizer
from finetune_trainer.preflight import records
from finetune_trainer.preflight.measure import Limits, Measure
from finetune_trainer.sources.inspect import TokenizerFiles
from tests.train.data.making import CHATML, make_tokenizer
from tests.train.preflight.local import ASKED, LABELLED, TAGGED, Folder, classifier, faults, remarks, told
from tests.train.sources.making import model_files

PAIRS = [{"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(30)]
JUDGED = [{"prompt": f"Q{n}", "completion": f"answer {n}", "label": bool(n % 2)} for n in range(30)]
TEXTS = [{"text": f"This is text number {n}. " * 3} for n in range(30)]
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 8,
    "num_layers": 2,
    "num_decoder_layers": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def with_mask(files: dict[str, bytes]) -> dict[str, bytes]:
    config = files["tokenizer_config.json"].replace(b"{", b'{"mask_token": "</s>", ', 1)
    return files | {"tokenizer_config.json": config}


@pytest.mark.parametrize(
    ("objective", "task", "config", "rows", "form"),
    [
        ("Supervised", "CausalLM", {}, ASKED, "PromptCompletion"),
        ("Supervised", "Seq2Seq", T5, ASKED, "PromptCompletion"),
        ("Supervised", "Seq2Seq", T5, TEXTS, "Text"),
        ("Supervised", "MaskedLM", BERT, TEXTS, "Text"),
        ("Supervised", "SequenceClassification", BERT, LABELLED, "Labels"),
        ("Supervised", "TokenClassification", BERT, TAGGED, "Tags"),
        ("Pretrain", "CausalLM", {}, TEXTS, "Text"),
        ("Reward", "SequenceClassification", {}, PAIRS, "Preference"),
        ("DPO", "CausalLM", {}, PAIRS, "Preference"),
        ("ORPO", "CausalLM", {}, PAIRS, "Preference"),
        ("KTO", "CausalLM", {}, JUDGED, "Preference"),
        ("PPO", "CausalLM", {}, ASKED, "PromptCompletion"),
        ("GRPO", "CausalLM", {}, [{"prompt": f"Q{n}"} for n in range(30)], "PromptCompletion"),
        ("Evaluation", "CausalLM", {}, ASKED, "PromptCompletion"),
    ],
)
def test_every_objective_takes_the_data_that_fits_it(
    folder: Folder, objective: str, task: str, config: dict[str, Any], rows: list[dict[str, Any]], form: str
) -> None:
    folder.put_model("model", with_mask(model_files(config=config)))
    folder.put("train", rows)
    result = folder.check(objective=objective, task=task)
    assert faults(result) == []
    assert result.data is not None and result.model is not None
    assert (result.data.rows, result.data.format) == (30, form)
    assert result.data.tokens >= 30 and result.data.longest_tokens > 1
    assert result.model.encoder == (task not in ("CausalLM",) and objective != "Reward")


@pytest.mark.parametrize(
    ("objective", "task", "rows", "words"),
    [
        ("DPO", "CausalLM", ASKED, "objective DPO needs Preference (chosen, rejected)"),
        ("Supervised", "SequenceClassification", TEXTS, "needs Labels (text, label)"),
        ("Pretrain", "CausalLM", ASKED, "(objective Pretrain or pretrain.blockSize) needs Text (text)"),
    ],
)
def test_data_that_does_not_fit_the_objective_is_told_with_what_it_needs(
    folder: Folder, objective: str, task: str, rows: list[dict[str, Any]], words: str
) -> None:
    folder.put("train", rows)
    result = folder.check(objective=objective, task=task)
    assert told(result) == [("DataInvalid", "spec.dataset.columns")] and words in faults(result)[0].message


def test_a_model_without_a_mask_token_cannot_be_a_masked_one(folder: Folder) -> None:
    folder.put_model("model", model_files(config=BERT))
    folder.put("train", TEXTS)
    result = folder.check(task="MaskedLM")
    assert told(result) == [("ModelUnsupported", "spec.model.task")] and "no mask token" in faults(result)[0].message


def test_pretraining_needs_neither_weights_nor_a_tokenizer_of_its_own(folder: Folder) -> None:
    (folder.root / "model" / "model.safetensors").unlink()
    (folder.root / "model" / "tokenizer.json").unlink()
    folder.put("train", TEXTS)
    result = folder.check(objective="Pretrain", tuning="Full", pretrainTokenizer="Character", randomWindows=True)
    assert faults(result) == [] and result.data is not None and result.model is not None
    assert result.data.tokens == sum(len(row["text"]) + 1 for row in TEXTS)
    assert result.model.weight_bytes == 0 and result.model.parameters > 0
    assert told(folder.check(objective="Pretrain", tuning="Full")) == [("ModelUnsupported", "spec.model.uri")]


def test_one_long_text_can_be_split_by_windows_only(folder: Folder) -> None:
    (folder.root / "train" / "rows.jsonl").unlink()
    (folder.root / "train" / "novel.txt").write_text("A line of a novel.\n" * 50)
    result = folder.check(objective="Pretrain", tuning="Full")
    assert told(result) == [("DataInvalid", "spec.dataset.sources[0].uri")]
    assert "set objective.pretrain.randomWindows: true" in faults(result)[0].message
    again = folder.check(objective="Pretrain", tuning="Full", randomWindows=True)
    assert faults(again) == [] and again.data is not None and again.data.rows == 1


def test_evaluating_a_classifier_needs_a_trained_head_that_knows_the_labels(folder: Folder) -> None:
    folder.put("train", LABELLED)
    job = {"objective": "Evaluation", "task": "SequenceClassification", "tuning": None}
    folder.put_model("model", model_files(config=BERT))
    result = folder.check(**job)
    assert told(result) == [("ModelUnsupported", "spec.model.uri")]
    assert "no trained head for SequenceClassification" in faults(result)[0].message
    folder.put_model("model", classifier(["no", "yes"]))
    assert faults(folder.check(**job)) == []
    folder.put_model("model", classifier(["negative", "positive"]))
    result = folder.check(**job)
    assert told(result) == [("DataInvalid", "spec.dataset.sources[0].uri")]
    assert "the label 'no', which the model does not know; it knows negative, positive" in faults(result)[0].message


def test_evaluation_needs_no_different_records(folder: Folder) -> None:
    folder.put("train", ASKED[:1] * 30)
    assert faults(folder.check(objective="Evaluation", tuning=None)) == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row | {"label": "no"} for row in LABELLED], "Every training record has the label 'no'"),
        ([{"text": "a", "label": ""}, *LABELLED], "rows.jsonl line 1"),
    ],
)
def test_labels_that_teach_nothing_are_refused(folder: Folder, rows: list[dict[str, Any]], words: str) -> None:
    folder.put_model("model", model_files(config=BERT))
    folder.put("train", rows)
    result = folder.check(task="SequenceClassification")
    assert told(result) == [("DataInvalid", "spec.dataset.sources[0].uri")] and words in faults(result)[0].message


def test_a_label_that_training_never_sees_is_told_with_its_record(folder: Folder) -> None:
    folder.put_model("model", model_files(config=BERT))
    folder.put("train", LABELLED)
    folder.put("held", [*LABELLED[:2], {"text": "x", "label": "perhaps"}])
    result = folder.check(task="SequenceClassification", validation="held")
    assert told(result) == [("DataInvalid", "spec.dataset.validation.source.uri")]
    assert "rows.jsonl line 3 has the label 'perhaps', which no training record has; training has no, yes" in (
        faults(result)[0].message
    )
    again = folder.check({"dataset.test.source.uri": "Data held"}, task="SequenceClassification")
    assert told(again) == [("DataInvalid", "spec.dataset.test.source.uri")]


def test_tags_are_checked_as_bio_and_by_type(folder: Folder) -> None:
    folder.put_model("model", model_files(config=BERT))
    folder.put("train", [*TAGGED, {"tokens": ["a", "b"], "tags": ["O", "I-PER"]}])
    result = folder.check(task="TokenClassification")
    assert told(result) == [("DataInvalid", "spec.dataset.sources[0].uri")]
    assert "rows.jsonl line 31" in faults(result)[0].message
    folder.put("train", TAGGED)
    folder.put("held", [{"tokens": ["x"], "tags": ["B-ORG"]}])
    result = folder.check(task="TokenClassification", validation="held")
    assert "the entity 'ORG', which no training record has" in faults(result)[0].message


def test_records_that_are_too_long_are_named_where_nothing_may_be_cut(folder: Folder) -> None:
    folder.put("train", [*ASKED, {"prompt": "word " * 200, "completion": " end"}])
    result = folder.check(truncation="Error", maxSequenceLength=64)
    assert told(result) == [("DataInvalid", "spec.dataset.sources[0].uri")]
    assert "rows.jsonl line 31:" in faults(result)[0].message
    assert "tokens, more than hyperparameters.maxSequenceLength 64" in faults(result)[0].message
    cut = folder.check(maxSequenceLength=64)
    assert faults(cut) == [] and "1 records are longer than hyperparameters.maxSequenceLength 64" in remarks(cut)
    assert told(folder.check(maxSequenceLength=64, maxCutShare=0.01)) == [("DataInvalid", "spec.dataset.maxCutShare")]


def test_the_default_bound_counts_where_no_length_is_set(folder: Folder) -> None:
    # The model of the tests has 64 positions.
    folder.put("train", [*ASKED, {"prompt": "word " * 200, "completion": " end"}])
    result = folder.check(truncation="Error")
    assert "more than hyperparameters.maxSequenceLength 64" in faults(result)[0].message


def test_completions_of_a_policy_need_room_beside_the_prompt(folder: Folder) -> None:
    folder.put("train", ASKED)
    result = folder.check(objective="GRPO", truncation="Error", maxSequenceLength=64, newTokens=60)
    assert told(result) == [("DataInvalid", "spec.dataset.sources[0].uri")]
    assert "more than hyperparameters.maxSequenceLength 4" in faults(result)[0].message


def test_sources_and_targets_have_limits_of_their_own(folder: Folder) -> None:
    folder.put_model("model", model_files(config=T5))
    folder.put("train", [*ASKED, {"prompt": "short", "completion": "word " * 60}])
    result = folder.check(task="Seq2Seq", truncation="Error", maxTargetTokens=20)
    assert "more than dataset.maxTargetTokens 20" in faults(result)[0].message
    assert faults(folder.check(task="Seq2Seq", truncation="Error", maxSourceTokens=50, maxTargetTokens=400)) == []


LONG = [
    {"prompt": f"Question {number}? " + "word " * (number % 4) * 5, "completion": " Answer" * (number % 3 * 6 + 1)}
    for number in range(30)
]
LIMITS = {"maxSourceTokens": 24, "maxTargetTokens": 16}


@pytest.mark.parametrize(("task", "config"), [("CausalLM", {}), ("Seq2Seq", T5)])
def test_the_facts_that_a_run_is_planned_by_are_those_of_the_records_as_they_are_cut(
    folder: Folder, task: str, config: dict[str, Any]
) -> None:
    folder.put("train", LONG)
    files = model_files(config=config)
    folder.put_model("model", files)
    settings = json.loads(files["tokenizer_config.json"])
    tokenizer = TextTokenizer.from_files(TokenizerFiles(files["tokenizer.json"], settings, settings["chat_template"]))
    rules = EncodingRules(LossOn.COMPLETION, Truncation.TAIL, 1 << 20, max_source=24, max_target=16)
    encoder = make_encoder(ObjectiveType.SUPERVISED, Task(task), tokenizer, rules)
    encoded = [encoder.encode(example) for example in _examples(LONG, ObjectiveType.SUPERVISED, Task(task))]
    longest = max(max(len(item.example.input_ids), len(item.example.labels)) for item in encoded)
    data = folder.check(task=task, maxSequenceLength=1000, **LIMITS).data
    assert data is not None
    assert (data.longest_tokens, data.tokens) == (longest, sum(item.kept for item in encoded))
    whole = folder.check(task=task, maxSequenceLength=1000).data
    assert whole is not None and whole.longest_tokens > 2 * longest


@pytest.mark.parametrize(("task", "config"), [("CausalLM", {}), ("Seq2Seq", T5)])
def test_what_the_limits_of_prompt_and_completion_may_not_cut_is_refused_before_a_gpu_is_taken(
    folder: Folder, task: str, config: dict[str, Any]
) -> None:
    folder.put_model("model", model_files(config=config))
    folder.put("train", [*ASKED, {"prompt": "word " * 30, "completion": " end"}])
    job = {"task": task, "maxSequenceLength": 1000, "maxSourceTokens": 40}
    result = folder.check(**job, truncation="Error")
    assert told(result) == [("DataInvalid", "spec.dataset.sources[0].uri")]
    assert "rows.jsonl line 31:" in faults(result)[0].message
    assert "more than dataset.maxSourceTokens 40. Raise dataset.maxSourceTokens" in faults(result)[0].message
    result = folder.check(**job, maxCutShare=0.01)
    assert told(result) == [("DataInvalid", "spec.dataset.maxCutShare")]
    assert "1 of 31 records are longer" in faults(result)[0].message
    assert "dataset.maxSourceTokens 40 or dataset.maxCutShare" in faults(result)[0].message
    cut = folder.check(**job, maxCutShare=0.05)
    assert faults(cut) == [] and "1 records are longer than" in remarks(cut)


def test_held_out_records_that_are_cut_count_among_the_others(folder: Folder) -> None:
    folder.put("held", [{"prompt": "word " * 30, "completion": " end"}] * 6)
    job = {"validation": "held", "maxSequenceLength": 1000, "maxSourceTokens": 40}
    result = folder.check(**job, maxCutShare=0.1)
    assert told(result) == [("DataInvalid", "spec.dataset.maxCutShare")]
    assert "6 of 36 records are longer" in faults(result)[0].message
    assert faults(folder.check(**job, maxCutShare=0.2)) == []


def test_an_estimate_of_the_tokens_counts_prompts_up_to_their_limit(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "EXACT_BYTES", 0)
    folder.put("train", [{"prompt": "x" * 360, "completion": "y" * 72} for _ in range(29)] + ASKED[:1])
    whole, cut = folder.check().data, folder.check(maxSourceTokens=30, maxTargetTokens=10).data
    assert whole is not None and cut is not None
    assert (whole.longest_tokens, cut.longest_tokens) == (120, 40)


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("error", [False, True])
def test_the_light_cut_is_that_of_the_encoders(template: str | None, error: bool) -> None:
    """Of templates and conversations: the same tokens are left, the same records count as cut, the same are refused."""
    chats = [
        [
            {"role": "user", "content": "word " * 12},
            {"role": "assistant", "content": "first " * 9},
            {"role": "user", "content": "more " * (number % 3 * 7 + 1)},
            {"role": "assistant", "content": "last " * (number % 4 * 5 + 1)},
        ]
        for number in range(12)
    ]
    tokenizer = TextTokenizer.from_transformers(make_tokenizer(chat_template=template))
    for task, rows in (
        (Task.CAUSAL_LM, LONG),
        (Task.CAUSAL_LM, [{"messages": chat} for chat in chats]),
        (Task.SEQ2SEQ, LONG),
    ):
        way = Truncation.ERROR if error else Truncation.TAIL
        rules = EncodingRules(LossOn.COMPLETION, way, 1 << 20, max_source=24, max_target=16)
        encoder = make_encoder(ObjectiveType.SUPERVISED, task, tokenizer, rules)
        examples = _examples(rows, ObjectiveType.SUPERVISED, task)
        measure = Measure(tokenizer, ObjectiveType.SUPERVISED, task, LossOn.COMPLETION, Limits(24, 16, error))
        light = list(measure.sizes(examples))
        exact = [encoder.encode(example) for example in examples]
        seen = [item if isinstance(item, BadRecord) else (item[1].tokens, item[1].cut) for item in light]
        assert seen == [item if isinstance(item, BadRecord) else (item.kept, item.cut) for item in exact], task
        assert sum(isinstance(item, BadRecord) or item.cut for item in exact) >= len(rows) // 3


def test_prompts_that_fill_the_whole_sequence_leave_nothing_to_learn(folder: Folder) -> None:
    folder.put("train", [{"prompt": "word " * 200 + str(n), "completion": " end"} for n in range(30)])
    result = folder.check(maxSequenceLength=64)
    assert told(result) == [("DataInvalid", "spec.hyperparameters.maxSequenceLength")]
    assert "30 of 30 records have nothing left to learn" in faults(result)[0].message


@pytest.mark.parametrize(
    ("rows", "settings", "field"),
    [
        (ASKED[:1] * 5, {"validationFraction": 0.2}, "spec.dataset.validation"),
        (ASKED[:1] * 30, {}, "spec.dataset.sources[0].uri"),
        (ASKED[:2] * 5, {"validationFraction": 0.2, "testFraction": 0.2}, "spec.dataset.validation"),
    ],
)
def test_a_split_that_leaves_nothing_is_told(
    folder: Folder, rows: list[dict[str, Any]], settings: dict[str, Any], field: str
) -> None:
    folder.put("train", rows)
    result = folder.check(**settings)
    assert told(result) == [("DataInvalid", field)] and "Holding records out needs" in faults(result)[0].message


def test_a_share_of_bad_rows_is_allowed_where_the_job_says_so(folder: Folder) -> None:
    folder.put("train", [*ASKED, {"prompt": "only"}])
    assert told(folder.check()) == [("DataInvalid", "spec.dataset.sources[0].uri")]
    result = folder.check(maxBadShare=0.05)
    assert faults(result) == [] and "1 records cannot be used and are left out" in remarks(result)
    assert result.data is not None and (result.data.rows, result.data.bad_rows) == (30, 1)


def _examples(rows: list[dict[str, Any]], objective: ObjectiveType, task: Task) -> list[Any]:
    reader = ExampleReader(None, None, None, objective=objective, task=task)
    return list(reader.read(Record("dataset.sources[0].uri", "rows.jsonl", n, row) for n, row in enumerate(rows, 1)))


def test_the_light_count_of_tokens_is_that_of_the_encoders(folder: Folder) -> None:
    data: dict[tuple[str, str], list[dict[str, Any]]] = {
        ("Supervised", "SequenceClassification"): LABELLED,
        ("Supervised", "TokenClassification"): TAGGED,
        ("Supervised", "Seq2Seq"): ASKED,
        ("Pretrain", "CausalLM"): TEXTS,
        ("Pretrain", "Seq2Seq"): TEXTS,
        ("Reward", "SequenceClassification"): PAIRS,
        ("DPO", "CausalLM"): PAIRS,
        ("ORPO", "CausalLM"): PAIRS,
        ("KTO", "CausalLM"): JUDGED,
        ("Distillation", "SequenceClassification"): LABELLED,
    }
    for objective, task in REGISTRY:
        rows = data.get((objective.value, task.value), TEXTS if task is Task.MASKED_LM else ASKED)
        for template in (None, CHATML):
            tokenizer = TextTokenizer.from_transformers(make_tokenizer(chat_template=template))
            labels = ("no", "yes") if task is Task.SEQUENCE_CLASSIFICATION else ("O", "B-PER", "B-LOC")
            rules = EncodingRules(LossOn.COMPLETION, Truncation.TAIL, 1 << 20, labels=labels)
            encoder = make_encoder(objective, task, tokenizer, rules)
            examples = _examples(rows, objective, task)
            measure = Measure(tokenizer, objective, task, LossOn.COMPLETION)
            sizes = [size.tokens for _, size in measure.sizes(examples)]
            exact = [encoder.encode(example).length for example in examples]
            assert sizes == exact, (objective, task, template)
    assert ObjectiveType.PPO in {objective for objective, _ in REGISTRY}
