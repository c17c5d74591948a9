"""CEL rules of the CRDs: what the API server refuses by itself.

Rules that need a look at data, model or cluster are not here; preflight and the planner answer those.
"""

from __future__ import annotations

from finetune_api.cel import Rule, validity_rules
from finetune_api.job import FROZEN_FIELDS, ObjectiveType

NAME_PATTERN = "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"


def _exactly_one(a: str, b: str) -> Rule:
    return {"rule": f"has(self.{a}) != has(self.{b})", "message": f"set exactly one of {a} and {b}"}


def _at_most_one(a: str, b: str) -> Rule:
    return {"rule": f"!(has(self.{a}) && has(self.{b}))", "message": f"set {a} or {b}, not both"}


def _member(name: str, types: tuple[str, ...]) -> Rule:
    allowed = ", ".join(f"'{kind}'" for kind in types)
    return {
        "rule": f"!has(self.{name}) || self.type in [{allowed}]",
        "message": f"{name} belongs to type {' or '.join(types)} only",
        "fieldPath": f".{name}",
    }


def _frozen(field: str) -> Rule:
    return {
        "rule": (
            "!has(oldSelf.status) || !has(oldSelf.status.plan) || "
            f"(has(self.spec.{field}) == has(oldSelf.spec.{field}) && "
            f"(!has(self.spec.{field}) || self.spec.{field} == oldSelf.spec.{field}))"
        ),
        "message": (
            f"{field} is frozen because the run is planned; to run with other settings, clone the job: "
            "kubectl get ftj NAME -o yaml, change metadata.name and output.uri, and apply it"
        ),
        "reason": "FieldValueForbidden",
        "fieldPath": f".spec.{field}",
    }


def _belongs(field: str, name: str, word: str) -> Rule:
    """field may stand only where the sibling `name` is there and is word."""
    return {
        "rule": f"!has(self.{field}) || (has(self.{name}) && self.{name} == '{word}')",
        "message": f"{field} belongs to {name} {word} only",
        "fieldPath": f".{field}",
    }


def _needs(name: str, word: str, field: str) -> Rule:
    return {
        "rule": f"!has(self.{name}) || self.{name} != '{word}' || has(self.{field})",
        "message": f"{name} {word} needs {field}",
    }


_QUANTIZED_TUNINGS = ("QLoRA", "IA3", "PromptTuning", "PTuning", "PrefixTuning")
_OBJECTIVES_WITH_SETTINGS = (
    ObjectiveType.DISTILLATION,
    ObjectiveType.DPO,
    ObjectiveType.ORPO,
    ObjectiveType.KTO,
    ObjectiveType.PPO,
    ObjectiveType.GRPO,
)

_MODEL = (_exactly_one("uri", "fromJob"), _at_most_one("fromJob", "revision"))

# Keyed by the model's class name, which pydantic writes as the schema's title.
BY_MODEL: dict[str, tuple[Rule, ...]] = {
    "FineTuneJobSpec": tuple(validity_rules()),
    "Credentials": (_exactly_one("secretName", "serviceAccountName"),),
    "HeldOut": (_exactly_one("fraction", "source"),),
    "FurtherModel": _MODEL,
    "Model": (*_MODEL, _at_most_one("fromJob", "adapter")),
    "Hyperparameters": (_at_most_one("epochs", "maxSteps"),),
    "RewardFunction": (
        _exactly_one("model", "function"),
        _belongs("pattern", "function", "RegularExpression"),
        _belongs("targetLength", "function", "Length"),
        _needs("function", "RegularExpression", "pattern"),
    ),
    "FullTuning": (
        _at_most_one("freeze", "trainable"),
        _at_most_one("preset", "trainable"),
        _at_most_one("preset", "freeze"),
        _at_most_one("preset", "firstLayers"),
    ),
    "SoftPrompt": (_belongs("initText", "init", "Text"), _needs("init", "Text", "initText")),
    "PretrainSettings": (_belongs("vocabularySize", "tokenizer", "BytePair"),),
    "Quantization": (
        {
            "rule": "!has(self.bits) || self.bits == 4 || self.bits == 8",
            "message": "bits is 4 or 8",
            "fieldPath": ".bits",
        },
        {
            "rule": "!has(self.bits) || !has(self.type) || (self.bits == 8) == (self.type == 'Int8')",
            "message": "type Int8 has 8 bits, NF4 and FP4 have 4; set one of bits and type",
            "fieldPath": ".type",
        },
    ),
    "Guards": (
        {
            "rule": "!has(self.rollbackSteps) || !has(self.lossSpike) || self.lossSpike == 'Rollback'",
            "message": "rollbackSteps belongs to lossSpike Rollback only",
            "fieldPath": ".rollbackSteps",
        },
    ),
    "Requirement": ({"rule": "has(self.min) || has(self.max)", "message": "set min, max or both"},),
    "Tuning": (
        _member("lora", ("LoRA", "QLoRA")),
        _member("ia3", ("IA3",)),
        _member("quantization", _QUANTIZED_TUNINGS),
        _member("softPrompt", ("PromptTuning", "PTuning", "PrefixTuning")),
        _member("full", ("Full",)),
    ),
    "Objective": (
        _member("pretrain", ("Pretrain", "Supervised", "Evaluation")),
        *(_member(kind.lower(), (kind.value,)) for kind in _OBJECTIVES_WITH_SETTINGS),
        {
            "rule": "self.type != 'Distillation' || has(self.distillation)",
            "message": "type Distillation needs distillation.teacher",
        },
        {"rule": "self.type != 'GRPO' || has(self.grpo)", "message": "type GRPO needs grpo.rewards"},
        {"rule": "self.type != 'PPO' || has(self.ppo)", "message": "type PPO needs ppo.rewards"},
    ),
}

ROOT: dict[str, tuple[Rule, ...]] = {
    "FineTuneJob": (
        {
            "rule": f"self.metadata.name.matches('{NAME_PATTERN}')",
            "message": (
                "metadata.name must start with a lower-case letter, hold only lower-case letters, digits and '-', "
                "and be at most 47 characters long, because pods and Services are named after it"
            ),
        },
        *(_frozen(field) for field in FROZEN_FIELDS),
        {
            "rule": (
                "!has(oldSelf.spec.cancel) || !oldSelf.spec.cancel || (has(self.spec.cancel) && self.spec.cancel)"
            ),
            "message": "cancel cannot be taken back; clone the job to run it again",
            "fieldPath": ".spec.cancel",
        },
    ),
    "GPUPool": (
        {
            "rule": "self.metadata.name.matches('^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$')",
            "message": "metadata.name must be a short lower-case name, because pods are labelled with it",
        },
        {
            "rule": "self.spec.accelerator == 'cpu' || has(self.spec.resourceName)",
            "message": "a GPU pool needs resourceName, such as nvidia.com/gpu",
        },
    ),
}
