"""Mixtures of experts: adapted, quantised, and trained in part."""

from __future__ import annotations

from typing import Any

from tests.train.methods.case import Case, Learning
from tests.train.worker.runs import LORA, NF4, records

FUSED = ("mixtral", "qwen2_moe", "qwen3_moe")
NF4_32 = {**NF4, "computeType": "FP32"}
EXPERTS = {"lora": {**LORA, "experts": True}}
_LEARNS = Learning("loss", 6.0, 2.5, higher=False, changes={"hyperparameters": {"totalSteps": 60, "microBatchSize": 4}})


def _case(name: str, family: str, tuning: dict[str, Any], **hyperparameters: Any) -> Case:
    changes = {"tuning": tuning, "hyperparameters": hyperparameters}
    return Case(f"experts-{name}", {"family": family, "spread": 0.2, "width": 64}, records(), changes, learning=_LEARNS)


CASES = (
    *(_case(f"{family}-lora", family, EXPERTS) for family in FUSED),
    *(_case(f"{family}-qlora", family, {"type": "QLoRA", "quantization": NF4_32, **EXPERTS}) for family in FUSED),
    _case("router-and-experts", "mixtral", {"type": "Full", "lora": None, "full": {"preset": "RouterAndExperts"}}),
    _case("router-loss", "qwen3_moe", {"type": "Full", "lora": None}, routerLossWeight=0.1),
    Case(
        "experts-switch",
        {"family": "switch_transformers"},
        records(),
        {"model": {"task": "Seq2Seq"}},
    ),
)
