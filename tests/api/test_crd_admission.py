"""What the API server accepts and refuses by itself, before any operator runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.api import objects
from tests.api.rest import Api, Refused
from tests.cluster.kubectl import KubectlError
from tests.cluster.local import LocalCluster

TWELVE_LINES = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: faq-qlora}
spec:
  model: {uri: hf://tiiuae/falcon-7b, revision: main}
  dataset:
    sources: [{uri: s3://team-a/faq/train.jsonl}]
  tuning: {type: QLoRA}
  output: {uri: s3://team-a/models/faq}
  credentials: {secretName: team-a-s3}
"""

S3 = {"uri": "s3://b/p"}
SECRET = {"secretName": "a"}

# what is wrong, members of the spec, the field path that the refusal names, words in its message
BAD_SPECS: list[tuple[str, dict[str, Any], str, str]] = [
    ("no model", {"model": None}, "spec.model", "Required"),
    ("no dataset", {"dataset": None}, "spec.dataset", "Required"),
    ("no sources", {"dataset": {"sources": []}}, "spec.dataset.sources", "at least 1"),
    ("no tuning", {"tuning": None}, "spec.tuning", "is missing; choose tuning.type"),
    ("no output", {"output": None}, "spec.output", "Required"),
    ("rank as text", {"tuning": {"type": "LoRA", "lora": {"rank": "16"}}}, "spec.tuning.lora.rank", "integer"),
    ("rate as text", {"hyperparameters": {"learningRate": "2e-4"}}, "spec.hyperparameters.learningRate", "number"),
    ("suspend as text", {"suspend": "yes"}, "spec.suspend", "boolean"),
    ("rank zero", {"tuning": {"type": "LoRA", "lora": {"rank": 0}}}, "spec.tuning.lora.rank", "greater than"),
    ("rate zero", {"hyperparameters": {"learningRate": 0}}, "spec.hyperparameters.learningRate", "greater than 0"),
    ("rate above 1", {"hyperparameters": {"learningRate": 2}}, "spec.hyperparameters.learningRate", "less than"),
    ("unknown method", {"tuning": {"type": "qlora"}}, "spec.tuning.type", "Unsupported value"),
    ("unknown task", {"model": {**S3, "task": "Chat"}}, "spec.model.task", "Unsupported value"),
    ("model over http", {"model": {"uri": "https://example.com/m"}}, "spec.model.uri", "should match"),
    ("output to the hub", {"output": {"uri": "hf://a/b"}}, "spec.output.uri", "should match"),
    (
        "blank in a URI",
        {"dataset": {"sources": [{"uri": "s3://b/a file"}]}},
        "spec.dataset.sources[0].uri",
        "should match",
    ),
    ("17 sources", {"dataset": {"sources": [S3] * 17}}, "spec.dataset.sources", "at most 16"),
    (
        "fraction one",
        {"dataset": {"sources": [S3], "validation": {"fraction": 1}}},
        "spec.dataset.validation.fraction",
        "less than 1",
    ),
    # one of two
    ("model twice", {"model": {**S3, "fromJob": "other"}}, "spec.model", "exactly one of uri and fromJob"),
    ("model by no way", {"model": {"revision": "main"}}, "spec.model", "exactly one of uri and fromJob"),
    (
        "two credentials",
        {"credentials": {**SECRET, "serviceAccountName": "b"}},
        "spec.credentials",
        "exactly one of secretName and serviceAccountName",
    ),
    ("empty credentials", {"credentials": {}}, "spec.credentials", "exactly one of secretName and serviceAccountName"),
    (
        "two credentials on a source",
        {"dataset": {"sources": [{**S3, "credentials": {**SECRET, "serviceAccountName": "b"}}]}},
        "spec.dataset.sources[0].credentials",
        "exactly one of secretName and serviceAccountName",
    ),
    (
        "two validations",
        {"dataset": {"sources": [S3], "validation": {"fraction": 0.1, "source": S3}}},
        "spec.dataset.validation",
        "exactly one of fraction and source",
    ),
    (
        "epochs and maxSteps",
        {"hyperparameters": {"epochs": 1, "maxSteps": 10}},
        "spec.hyperparameters",
        "set epochs or maxSteps, not both",
    ),
    (
        "freeze and trainable",
        {"tuning": {"type": "Full", "full": {"freeze": ["a"], "trainable": ["b"]}}},
        "spec.tuning.full",
        "set freeze or trainable, not both",
    ),
    (
        "a bound without a bound",
        {"evaluation": {"require": [{"metric": "loss"}]}},
        "spec.evaluation.require[0]",
        "set min, max or both",
    ),
    (
        "six bits",
        {"tuning": {"type": "QLoRA", "quantization": {"bits": 6}}},
        "spec.tuning.quantization.bits",
        "bits is 4 or 8",
    ),
    # a member that does not belong to the type
    (
        "lora with Full",
        {"tuning": {"type": "Full", "lora": {"rank": 8}}},
        "spec.tuning.lora",
        "lora belongs to type LoRA or QLoRA only",
    ),
    (
        "quantization with LoRA",
        {"tuning": {"type": "LoRA", "quantization": {"bits": 4}}},
        "spec.tuning.quantization",
        "quantization belongs to type QLoRA or IA3 or PromptTuning",
    ),
    (
        "softPrompt with QLoRA",
        {"tuning": {"type": "QLoRA", "softPrompt": {"virtualTokens": 8}}},
        "spec.tuning.softPrompt",
        "softPrompt belongs to type PromptTuning or PTuning or PrefixTuning only",
    ),
    (
        "full with LoRA",
        {"tuning": {"type": "LoRA", "full": {"firstLayers": 2}}},
        "spec.tuning.full",
        "full belongs to type Full only",
    ),
    (
        "dpo with Supervised",
        {"objective": {"type": "Supervised", "dpo": {"beta": 0.1}}},
        "spec.objective.dpo",
        "dpo belongs to type DPO only",
    ),
    (
        "two members",
        {"objective": {"type": "DPO", "dpo": {"beta": 0.1}, "kto": {"beta": 0.1}}},
        "spec.objective.kto",
        "kto belongs to type KTO only",
    ),
    (
        "Distillation without a teacher",
        {"objective": {"type": "Distillation"}},
        "spec.objective",
        "type Distillation needs distillation.teacher",
    ),
    ("GRPO without rewards", {"objective": {"type": "GRPO"}}, "spec.objective", "type GRPO needs grpo.rewards"),
    (
        "a reward by two ways",
        {"objective": {"type": "GRPO", "grpo": {"rewards": [{"function": "Length", "model": S3}]}}},
        "spec.objective.grpo.rewards[0]",
        "exactly one of model and function",
    ),
    (
        "a pattern that nothing reads",
        {"objective": {"type": "PPO", "ppo": {"rewards": [{"function": "ExactMatch", "pattern": "a"}]}}},
        "spec.objective.ppo.rewards[0].pattern",
        "pattern belongs to function RegularExpression only",
    ),
    (
        "no pattern",
        {"objective": {"type": "GRPO", "grpo": {"rewards": [{"function": "RegularExpression"}]}}},
        "spec.objective.grpo.rewards[0]",
        "function RegularExpression needs pattern",
    ),
    (
        "eight bits of NF4",
        {"tuning": {"type": "QLoRA", "quantization": {"bits": 8, "type": "NF4"}}},
        "spec.tuning.quantization.type",
        "type Int8 has 8 bits",
    ),
    (
        "text that nothing reads",
        {"tuning": {"type": "PromptTuning", "softPrompt": {"init": "Random", "initText": "Classify:"}}},
        "spec.tuning.softPrompt.initText",
        "initText belongs to init Text only",
    ),
    (
        "steps back without going back",
        {"guards": {"lossSpike": "Off", "rollbackSteps": 50}},
        "spec.guards.rollbackSteps",
        "rollbackSteps belongs to lossSpike Rollback only",
    ),
    (
        "preset and patterns",
        {"tuning": {"type": "Full", "full": {"preset": "RouterAndExperts", "freeze": ["a"]}}},
        "spec.tuning.full",
        "set preset or freeze, not both",
    ),
    (
        "fromJob with a revision",
        {"model": {"fromJob": "other", "revision": "main"}},
        "spec.model",
        "set fromJob or revision, not both",
    ),
    (
        "published to a bucket",
        {"output": {**S3, "publish": {"uri": "s3://b/p"}}},
        "spec.output.publish.uri",
        "should match",
    ),
    # the validity table
    (
        "an evaluation that trains",
        {"objective": {"type": "Evaluation"}, "tuning": {"type": "LoRA"}},
        "spec.tuning",
        "an evaluation changes no parameter",
    ),
    (
        "DPO on a classifier",
        {"objective": {"type": "DPO"}, "model": {**S3, "task": "SequenceClassification"}},
        "spec.model.task",
        "choose CausalLM",
    ),
    (
        "an adapter on random weights",
        {"objective": {"type": "Pretrain"}, "tuning": {"type": "LoRA"}},
        "spec.tuning.type",
        "choose Full",
    ),
    (
        "a reward model of the next token",
        {"objective": {"type": "Reward"}, "model": {**S3, "task": "CausalLM"}},
        "spec.model.task",
        "one output over a whole text",
    ),
    (
        "quantised weights that are sharded",
        {"tuning": {"type": "QLoRA"}, "hyperparameters": {"zeroStage": 3}},
        "spec.hyperparameters.zeroStage",
        "cannot shard quantised weights",
    ),
]

# Every objective with what it needs at least.
GOOD_SPECS: dict[str, dict[str, Any]] = {
    "Supervised": {},
    "Evaluation": {"objective": {"type": "Evaluation"}, "tuning": None},
    "Evaluation in 8 bits": {
        "objective": {"type": "Evaluation"},
        "tuning": {"type": "QLoRA", "quantization": {"bits": 8}},
    },
    "Pretrain": {"objective": {"type": "Pretrain"}, "tuning": {"type": "Full"}},
    "Distillation": {"objective": {"type": "Distillation", "distillation": {"teacher": S3}}},
    "Reward": {"objective": {"type": "Reward"}},
    "DPO": {"objective": {"type": "DPO"}},
    "ORPO": {"objective": {"type": "ORPO", "orpo": {"beta": 0.1}}},
    "KTO": {"objective": {"type": "KTO", "kto": {"desirableWeight": 1.5}}},
    "PPO": {"objective": {"type": "PPO", "ppo": {"rewards": [{"model": {"fromJob": "judge"}}]}}},
    "GRPO": {"objective": {"type": "GRPO", "grpo": {"rewards": [{"function": "ExactMatch"}]}}},
    "IA3": {"tuning": {"type": "IA3", "quantization": {"type": "Int8"}}},
    "PromptTuning": {"tuning": {"type": "PromptTuning", "softPrompt": {"init": "Text", "initText": "Classify:"}}},
}

GOOD_NAMES = ("a", "faq", "faq-qlora-2", "a" * 47)
BAD_NAMES = ("9lives", "faq.v2", "a" * 48, "faq-", "f--" + "a" * 45)


def test_the_definitions_are_structural_and_served(api: Api) -> None:
    for name in ("finetunejobs.finetune.dev", "gpupools.finetune.dev"):
        crd = api.get("customresourcedefinitions", None, name)
        conditions = {c["type"]: c["status"] for c in crd["status"]["conditions"]}
        assert conditions["Established"] == "True"
        assert conditions["NamesAccepted"] == "True"
        assert conditions.get("NonStructuralSchema", "False") == "False"


def test_a_job_of_twelve_lines_is_accepted_as_written(cluster: LocalCluster, api: Api, namespace: str) -> None:
    assert len(TWELVE_LINES.splitlines()) <= 12
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=TWELVE_LINES)
    stored = api.get("finetunejobs", namespace, "faq-qlora")
    assert stored["spec"] == yaml.safe_load(TWELVE_LINES)["spec"], "the schema added or dropped something"


def test_a_fresh_job_has_never_been_observed(api: Api, namespace: str) -> None:
    assert api.create("finetunejobs", objects.job("faq", namespace))["status"] == {"observedGeneration": -1}


@pytest.mark.parametrize(("spec", "field", "words"), [pytest.param(*row[1:], id=row[0]) for row in BAD_SPECS])
def test_a_wrong_spec_is_refused_with_its_field(api: Api, spec: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(Refused) as refusal:
        api.create("finetunejobs", objects.job("faq", "default", **spec))
    assert refusal.value.status == 422
    assert any(path == field and words in message for path, message in refusal.value.causes), refusal.value.causes


@pytest.mark.parametrize("name", GOOD_SPECS)
def test_every_method_is_accepted_with_the_least_that_it_needs(api: Api, namespace: str, name: str) -> None:
    api.create("finetunejobs", objects.job("faq", namespace, **GOOD_SPECS[name]))


@pytest.mark.parametrize("where", ["spec.modle", "spec.tuning.lora.rnak", "spec.dataset.sources[0].url"])
def test_kubectl_refuses_an_unknown_field(cluster: LocalCluster, namespace: str, where: str) -> None:
    body = objects.job("faq", namespace)
    body["spec"]["tuning"]["lora"] = {}
    target: Any = body
    *path, name = where.replace("[0]", ".0").split(".")
    for step in path:
        target = target[int(step) if step.isdigit() else step]
    target[name] = "x"
    with pytest.raises(KubectlError, match=f'unknown field "{where}"'.replace("[", r"\[").replace("]", r"\]")):
        cluster.kubectl("apply", "-f", "-", input=json.dumps(body))


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_name_that_children_can_carry_is_accepted(api: Api, namespace: str, name: str) -> None:
    api.create("finetunejobs", objects.job(name, namespace))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_children_cannot_carry_is_refused(api: Api, namespace: str, name: str) -> None:
    with pytest.raises(Refused, match=r"metadata\.name"):
        api.create("finetunejobs", objects.job(name, namespace))


def test_a_pool_of_gpus_needs_the_name_of_its_resource(api: Api) -> None:
    body = objects.pool("nameless", "l4", 24, 0.7)
    del body["spec"]["resourceName"]
    with pytest.raises(Refused, match="a GPU pool needs resourceName"):
        api.create("gpupools", body)


def test_a_cpu_pool_needs_no_resource_name(api: Api) -> None:
    body = objects.pool("processors", "cpu", 4, 0.05)
    del body["spec"]["resourceName"]
    created = api.create("gpupools", body)
    api.delete("gpupools", None, "processors")
    assert created["status"] == {"observedGeneration": -1}
