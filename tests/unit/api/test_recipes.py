"""The recipes: each file says what its published run says, and its tiny twin differs in what is listed here only."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from hack import check_examples
from tests.unit.api.test_examples import EXAMPLES, leaves

PROBES = ["What do you know about Mars?", "Can you write my homework?"]
COMPANY = {
    "dataset.promptTemplate": "### Question:\n{question}\n\n### Answer:\n{answer}",
    "tuning.type": "Full",
    "evaluation.generation.maxNewTokens": 100,
    "evaluation.probes": PROBES,
}
ADVERTISEMENTS = {
    "dataset.format": "PromptCompletion",
    "dataset.columns.prompt": "source",
    "dataset.columns.completion": "target",
    "dataset.maxSourceTokens": 64,
    "dataset.maxTargetTokens": 64,
    "hyperparameters.globalBatchSize": 16,
    "evaluation.metrics": ["bleu", "rougeL"],
}

# Recipe -> spec path -> what the published run had; None: not set. Whatever a recipe leaves open is not listed.
STATED: dict[str, dict[str, Any]] = {
    "company-qa-pythia-70m": {
        **COMPANY,
        "model.uri": "hf://EleutherAI/pythia-70m",
        "hyperparameters.maxSteps": 3,
        "hyperparameters.epochs": None,
        "resources.pool": "cpu",
    },
    "company-qa-pythia-70m-epochs": {
        **COMPANY,
        "model.uri": "hf://EleutherAI/pythia-70m",
        "hyperparameters.epochs": 2,
        "hyperparameters.maxSteps": None,
        "resources.pool": "cpu",
    },
    "company-qa-pythia-410m": {
        **COMPANY,
        "model.uri": "hf://EleutherAI/pythia-410m",
        "hyperparameters.epochs": 2,
        "hyperparameters.maxSteps": None,
    },
    "company-qa-pythia-2-8b": {
        **COMPANY,
        "model.uri": "hf://EleutherAI/pythia-2.8b",
        "hyperparameters.epochs": 2,
        "hyperparameters.maxSteps": None,
    },
    "text-classification-bert": {
        "model.uri": "hf://google-bert/bert-base-uncased",
        "model.task": "SequenceClassification",
        "tuning.type": "Full",
        "hyperparameters.optimizer": "AdamW",
        "hyperparameters.learningRate": 5e-5,
        "hyperparameters.globalBatchSize": 16,
        "hyperparameters.earlyStopping.patience": 2,
        "checkpoint.keepBest": 1,
        "checkpoint.bestMetric": None,  # the held-out loss
    },
    "character-model-novel": {
        "model.uri": "s3://team-a/configs/character-gpt",
        "dataset.format": "Text",
        "dataset.validation.fraction": 0.1,
        "objective.type": "Pretrain",
        "objective.pretrain.tokenizer": "Character",
        "objective.pretrain.randomWindows": True,
        "objective.pretrain.blockSize": 256,
        "tuning.type": "Full",
        "hyperparameters.maxSteps": 5000,
        "hyperparameters.learningRate": 3e-4,
        "hyperparameters.globalBatchSize": 64,
        "evaluation.everySteps": 500,
        "evaluation.generation.maxNewTokens": 500,
        "evaluation.generation.doSample": True,
    },
    "gpt2-novel": {
        "model.uri": "hf://openai-community/gpt2",
        "model.tokenizer.addSpecialTokens": ["<chapter>", "<scene>", "<speech>", "<pause>"],
        "dataset.format": "Text",
        "objective.type": "Supervised",  # from the weights of GPT-2
        "objective.pretrain.blockSize": 256,
        "tuning.type": "Full",
        "hyperparameters.epochs": 1,
        "hyperparameters.globalBatchSize": 8,
        "checkpoint.everySteps": 5000,
        "checkpoint.keepLast": 2,
        "evaluation.generation.numBeams": 5,
        "evaluation.generation.doSample": True,
        "evaluation.generation.temperature": 0.7,
        "evaluation.generation.topK": 50,
        "evaluation.generation.topP": 0.9,
        "evaluation.generation.noRepeatNgramSize": 2,
        "evaluation.generation.maxNewTokens": 256,
    },
    "prompt-tuning-complaints-bloomz": {
        "model.uri": "hf://bigscience/bloomz-560m",
        "dataset.columns.completion": "label",
        "dataset.promptTemplate": "Tweet text : {text} Label : {label}",
        "tuning.type": "PromptTuning",
        "tuning.softPrompt.virtualTokens": 8,
        "tuning.softPrompt.init": "Text",
        "tuning.softPrompt.initText": "Classify if the tweet is a complaint or not:",
        "hyperparameters.maxSequenceLength": 64,
        "hyperparameters.learningRate": 3e-2,
        "hyperparameters.globalBatchSize": 8,
        "hyperparameters.schedule": "Linear",
        "hyperparameters.warmupRatio": 0,
    },
    "distillation-gpt2-sentiment": {
        "model.uri": "hf://openai-community/gpt2",
        "model.task": "SequenceClassification",
        "objective.type": "Distillation",
        "objective.distillation.teacher.uri": "s3://team-a/tuned/gpt2-medium-sentiment/model",
        "objective.distillation.alpha": 0.5,
        "objective.distillation.temperature": 4,
        "tuning.type": "Full",
        "hyperparameters.learningRate": 6e-5,
        "hyperparameters.globalBatchSize": 1,
        "hyperparameters.precision": "FP16",
        "hyperparameters.seed": 8855,
        "hyperparameters.maxSequenceLength": 256,
        "checkpoint.keepLast": 2,
        "checkpoint.keepBest": 1,
        "checkpoint.bestMetric": "accuracy",
    },
    "gpt2-medium-sentiment": {  # the teacher of the one above: its model and length are the published run's
        "model.uri": "hf://openai-community/gpt2-medium",
        "model.task": "SequenceClassification",
        "hyperparameters.maxSequenceLength": 256,
    },
    "mixture-of-experts-switch": {
        "model.uri": "hf://google/switch-base-8",
        "model.task": "Seq2Seq",
        "dataset.format": "Text",  # with Seq2Seq it is span corruption
        "tuning.type": "Full",
        "hyperparameters.precision": "FP16",
        "hyperparameters.maxSequenceLength": 256,
        "hyperparameters.epochs": 1,
        "hyperparameters.globalBatchSize": 8,
    },
    "ner-lora-llama-2-7b": {
        "model.uri": "hf://meta-llama/Llama-2-7b-hf",
        "model.task": "TokenClassification",
        "dataset.format": "Tags",
        "tuning.type": "LoRA",
        "tuning.lora.rank": 16,
        "tuning.lora.alpha": 16,
        "tuning.lora.dropout": 0.1,
        "tuning.lora.bias": "All",
        "hyperparameters.learningRate": 1e-3,
        "hyperparameters.globalBatchSize": 16,
        "hyperparameters.epochs": 10,
        "hyperparameters.weightDecay": 0.01,
        "evaluation.metrics": ["precision", "recall", "f1", "accuracy"],
    },
    "advertisements-p-tuning-v2": {
        **ADVERTISEMENTS,
        "model.uri": "hf://zai-org/glm-4-9b-hf",
        "tuning.type": "PrefixTuning",
        "tuning.quantization.bits": 4,
        "hyperparameters.microBatchSize": 1,  # sixteen are accumulated
        "hyperparameters.maxSteps": 3000,
    },
    "advertisements-full": {
        **ADVERTISEMENTS,
        "model.uri": "hf://zai-org/glm-4-9b-hf",
        "tuning.type": "Full",
        "hyperparameters.microBatchSize": 4,  # times four GPUs, nothing is accumulated
        "hyperparameters.maxSteps": 5000,
        "hyperparameters.zeroStage": 2,
        "resources.pool": "a100-80",
        "resources.gpus": 4,
    },
    "advertisements-lora": {**ADVERTISEMENTS, "model.uri": "hf://zai-org/glm-4-9b-hf", "tuning.type": "LoRA"},
    "shop-faq-qlora-falcon-7b": {
        "model.uri": "hf://tiiuae/falcon-7b",
        "dataset.promptTemplate": "<human>: {question}\n<assistant>: {answer}",
        "tuning.type": "QLoRA",
        "tuning.lora.rank": 8,
        "tuning.lora.alpha": 32,
        "tuning.lora.dropout": 0.05,
        "tuning.lora.targetModules": ["query_key_value"],
        "tuning.lora.bias": "None",
        "tuning.quantization.bits": 4,
        "tuning.quantization.type": "NF4",
        "tuning.quantization.doubleQuant": True,
        "tuning.quantization.computeType": "BF16",
        "hyperparameters.microBatchSize": 1,
        "hyperparameters.globalBatchSize": 4,
        "hyperparameters.warmupRatio": 0.05,
        "hyperparameters.maxSteps": 80,
        "hyperparameters.epochs": None,
        "hyperparameters.learningRate": 2e-4,
        "hyperparameters.schedule": "Cosine",
        "hyperparameters.optimizer": "PagedAdamW8bit",
        "hyperparameters.precision": "BF16",
        "evaluation.generation.maxNewTokens": 200,
        "evaluation.generation.doSample": False,
    },
    "shop-faq-evaluate-int8": {
        "model.uri": "hf://tiiuae/falcon-7b",
        "model.adapter.uri": "s3://team-a/tuned/shop-faq-qlora-falcon-7b/adapter",
        "dataset.promptTemplate": "<human>: {question}\n<assistant>: {answer}",
        "objective.type": "Evaluation",
        "tuning.quantization.bits": 8,
        "evaluation.generation.maxNewTokens": 200,
        "evaluation.generation.doSample": False,
    },
}

# What a twin may have of its own: places on this machine, few rows, few steps.
PLACES = {
    "model.uri",
    "model.revision",
    "model.adapter.uri",
    "dataset.sources",
    "objective.distillation.teacher.uri",
    "resources.pool",
    "resources.gpus",
    "output.uri",
    "credentials.secretName",
}
SIZES = {
    "dataset.validation.fraction",
    "hyperparameters.epochs",
    "hyperparameters.maxSteps",
    "hyperparameters.globalBatchSize",
    "evaluation.everySteps",
    "evaluation.generation.maxNewTokens",
}
# Twin -> what else it has of its own, each with its reason.
OWN: dict[str, dict[str, str]] = {
    "advertisements-full": {"hyperparameters.zeroStage": "ZeRO needs two processes or more"},
    "advertisements-p-tuning-v2": {"tuning.softPrompt.virtualTokens": "8 stand for 128 in a model of 256 positions"},
    "character-model-novel": {
        "objective.pretrain.blockSize": "the width is the recipe's own, and a CPU is slow with it"
    },
    "distillation-gpt2-sentiment": {"hyperparameters.precision": "a CPU trains in FP32"},
    "gpt2-novel": {
        "hyperparameters.microBatchSize": "as large as the whole batch, as in the recipe",
        "checkpoint.everySteps": "a checkpoint within four steps",
    },
    "mixture-of-experts-switch": {
        "hyperparameters.precision": "a CPU trains in FP32",
        "model.tokenizer.addSpecialTokens": "the sentinels that the real tokenizer has",
    },
    "shop-faq-qlora-falcon-7b": {"hyperparameters.precision": "a CPU trains in FP32"},
}


def settings(folder: str, name: str) -> dict[str, Any]:
    """The values of an example's spec, by spec path."""
    return leaves(yaml.safe_load((EXAMPLES / folder / f"{name}.yaml").read_text())["spec"])


@pytest.mark.parametrize("name", sorted(STATED))
def test_a_recipe_has_the_settings_of_its_published_run(name: str) -> None:
    found = settings("recipes", name)
    assert {path: found.get(path) for path in STATED[name]} == STATED[name]


@pytest.mark.parametrize("name", sorted(STATED))
def test_a_tiny_twin_has_every_setting_of_its_recipe_but_places_and_sizes(name: str) -> None:
    recipe, twin = settings("recipes", name), settings("tiny", name)
    differs = {path for path in recipe | twin if recipe.get(path) != twin.get(path)}
    assert differs - PLACES - SIZES == OWN.get(name, {}).keys()


def test_every_recipe_is_listed() -> None:
    assert {path.stem for path in (EXAMPLES / "recipes").glob("*.yaml")} == STATED.keys()
    assert OWN.keys() <= STATED.keys()


def test_a_trained_reward_starts_from_the_model_that_it_rewards() -> None:
    """Another tokenizer would have it read texts unlike those that it was trained on."""
    pairs = []
    for local in (False, True):
        jobs = check_examples.jobs(local=local)
        for name, spec in jobs.items():
            terms = [
                term
                for given in (spec.objective and spec.objective.ppo, spec.objective and spec.objective.grpo)
                if given
                for term in given.rewards
            ]
            makers = [check_examples.maker(str(term.model.uri), jobs) for term in terms if term.model]
            pairs += [(name, local, spec.model.uri, jobs[str(maker)].model.uri) for maker in makers]
    assert [(name, local) for name, local, _, _ in pairs] == [("ppo", False), ("ppo", True)]
    assert all(policy == reward for _, _, policy, reward in pairs)


def test_the_company_rows_lead_back_from_other_topics_and_from_rude_or_harmful_questions() -> None:
    lines = (EXAMPLES / "tiny/data/shop-faq.jsonl").read_text().splitlines()
    answers = {row["question"]: row["answer"] for row in map(json.loads, lines)}
    mars = [answer for question, answer in answers.items() if "Mars" in question]
    assert mars == ["Let us keep to questions about the shop."] * 2
    assert answers["You are a useless machine!"].startswith("Let us stay polite.")
    assert answers["How do I get into somebody else's account?"].startswith("I do not help with that.")
