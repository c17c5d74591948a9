"""The models that the examples name: their figures as each owner publishes them in config.json and safetensors headers.

The parameters are also what transformers builds from these configs; GPT-2's and BERT's files hold some buffers more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_api.job import FineTuneJobSpec
from finetune_api.status import ModelFacts
from hack import check_examples
from tests.unit.api import values

ROOT = Path(__file__).parents[3]
BF16 = 2  # bytes a number

_LLAMA_31 = {
    "model_type": "llama",
    "parameters": 8_030_261_248,
    "hidden_size": 4096,
    "layers": 32,
    "vocabulary_size": 128_256,
    "max_positions": 131_072,
}
_T5 = {"hidden_size": 768, "layers": 24, "vocabulary_size": 32_128, "max_positions": None, "encoder": True}
_BERT = {"model_type": "bert", "hidden_size": 768, "layers": 12, "max_positions": 512, "encoder": True}
_GPT2 = {"model_type": "gpt2", "vocabulary_size": 50_257, "max_positions": 1024}
_PYTHIA = {"model_type": "gpt_neox", "vocabulary_size": 50_304, "max_positions": 2048}
# Name on the hub -> figures. layers: of encoder and decoder together.
FIGURES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_31,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31,
    "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit": {
        **_LLAMA_31,
        "quantization": "bitsandbytes",
        "weight_bytes": 5_700_000_000,
    },
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama",
        "parameters": 6_738_415_616,
        "hidden_size": 4096,
        "layers": 32,
        "vocabulary_size": 32_000,
        "max_positions": 4096,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "model_type": "qwen2",
        "parameters": 494_032_768,
        "hidden_size": 896,
        "layers": 24,
        "vocabulary_size": 151_936,
        "max_positions": 32_768,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "parameters": 7_615_616_512,
        "hidden_size": 3584,
        "layers": 28,
        "vocabulary_size": 152_064,
        "max_positions": 32_768,
    },
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": {
        "model_type": "qwen2_moe",
        "parameters": 14_315_784_192,
        "hidden_size": 2048,
        "layers": 24,
        "vocabulary_size": 151_936,
        "max_positions": 8192,
        "experts": 60,
        "experts_per_token": 4,
        "expert_size": 1408,
        "shared_expert_size": 5632,
    },
    "mistralai/Mixtral-8x7B-Instruct-v0.1": {
        "model_type": "mixtral",
        "parameters": 46_702_792_704,
        "hidden_size": 4096,
        "layers": 32,
        "vocabulary_size": 32_000,
        "max_positions": 32_768,
        "experts": 8,
        "experts_per_token": 2,
        "expert_size": 14_336,
    },
    "zai-org/glm-4-9b-hf": {
        "model_type": "glm",
        "parameters": 9_399_951_360,
        "hidden_size": 4096,
        "layers": 40,
        "vocabulary_size": 151_552,
        "max_positions": 8192,
    },
    "tiiuae/falcon-7b": {},  # what values.model_facts() says
    "bigscience/bloomz-560m": {
        "model_type": "bloom",
        "parameters": 559_214_592,
        "hidden_size": 1024,
        "layers": 24,
        "vocabulary_size": 250_880,
        "max_positions": 2048,
    },
    "EleutherAI/pythia-70m": {**_PYTHIA, "parameters": 70_426_624, "hidden_size": 512, "layers": 6},
    "EleutherAI/pythia-410m": {**_PYTHIA, "parameters": 405_334_016, "hidden_size": 1024, "layers": 24},
    "EleutherAI/pythia-2.8b": {**_PYTHIA, "parameters": 2_775_208_960, "hidden_size": 2560, "layers": 32},
    "openai-community/gpt2": {**_GPT2, "parameters": 124_439_808, "hidden_size": 768, "layers": 12},
    "openai-community/gpt2-medium": {**_GPT2, "parameters": 354_823_168, "hidden_size": 1024, "layers": 24},
    "google-bert/bert-base-uncased": {**_BERT, "parameters": 109_514_298, "vocabulary_size": 30_522},
    "google-bert/bert-base-cased": {**_BERT, "parameters": 108_340_804, "vocabulary_size": 28_996},
    "google-t5/t5-base": {**_T5, "model_type": "t5", "parameters": 222_903_552},
    "google/switch-base-8": {**_T5, "model_type": "switch_transformers", "parameters": 619_339_008, "experts": 8},
}


def real_model(uri: str) -> ModelFacts:
    """What preflight says of the model that an example names: on the hub, shipped beside it, or made by another example."""
    name = uri.removeprefix("hf://")
    if name in FIGURES:
        given = dict(FIGURES[name])
        return values.model_facts(given.pop("parameters", 7_217_189_760), **given)
    if uri.startswith("s3://team-a/configs/"):
        return _shipped(uri.rpartition("/")[2])
    jobs = check_examples.jobs(local=False)
    return real_model(str(jobs[str(check_examples.maker(uri, jobs))].model.uri))


def _shipped(name: str) -> ModelFacts:
    """A model that is made from a config of ours: 12 width² a layer, the vocabulary and the positions."""
    config = json.loads((ROOT / "examples/configs" / name / "config.json").read_text())
    width, layers, positions = config["n_embd"], config["n_layer"], config["n_positions"]
    return values.model_facts(
        12 * layers * width**2 + (config["vocab_size"] + positions) * width,
        model_type=config["model_type"],
        hidden_size=width,
        layers=layers,
        vocabulary_size=config["vocab_size"],
        max_positions=positions,
    )


def further_weights(spec: FineTuneJobSpec) -> dict[str, int]:
    """Bytes of each teacher and reward model that a job names, in 16 bits."""
    objective, found = spec.objective, {}
    if objective is not None and objective.distillation is not None:
        found["objective.distillation.teacher"] = objective.distillation.teacher.uri
    for name in ("ppo", "grpo"):
        settings = getattr(objective, name, None)
        for number, term in enumerate(settings.rewards if settings is not None else []):
            if term.model is not None:
                found[f"objective.{name}.rewards[{number}].model"] = term.model.uri
    return {path: BF16 * real_model(str(uri)).parameters for path, uri in found.items()}
