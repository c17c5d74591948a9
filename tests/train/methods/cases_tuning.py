"""Every way to tune, on a causal model and the same task."""

from __future__ import annotations

from typing import Any

from tests.train.methods.case import Case, Learning
from tests.train.worker.runs import LORA, NF4, records

MODEL = {"spread": 0.2}
INT8 = {"bits": 8, "type": "Int8", "doubleQuant": False, "computeType": "FP32"}


def _soft(**settings: Any) -> dict[str, Any]:
    return {"virtualTokens": 8, "init": "Random", "projection": False, **settings}


def _learns(tuned: float, **hyperparameters: Any) -> Learning:
    """The loss falls below tuned; the untuned model's is above 6."""
    steps = {"totalSteps": 120, "microBatchSize": 4, **hyperparameters}
    return Learning("loss", 6.0, tuned, higher=False, changes={"hyperparameters": steps})


def _case(name: str, tuning: dict[str, Any], learning: Learning, **hyperparameters: Any) -> Case:
    changes = {"tuning": {"lora": None, **tuning}, "hyperparameters": hyperparameters}
    return Case(f"tuning-{name}", MODEL, records(), changes, learning=learning)


CASES = (
    _case("dora", {"type": "LoRA", "lora": {**LORA, "variant": "DoRA"}}, _learns(2.0)),
    _case("rslora", {"type": "LoRA", "lora": {**LORA, "variant": "RsLoRA"}}, _learns(2.0)),
    _case("ia3", {"type": "IA3"}, _learns(4.8, learningRate=5e-2)),
    _case("qlora-fp4", {"type": "QLoRA", "lora": LORA, "quantization": {**NF4, "type": "FP4"}}, _learns(2.0)),
    _case("qlora-int8", {"type": "QLoRA", "lora": LORA, "quantization": INT8}, _learns(2.0)),
    _case("prompt", {"type": "PromptTuning", "softPrompt": _soft()}, _learns(4.8, learningRate=5e-2)),
    _case(
        "prompt-text",
        {"type": "PromptTuning", "softPrompt": _soft(init="Text", initText="say the colour that is asked for:")},
        _learns(4.8, learningRate=5e-2),
    ),
    _case("ptuning", {"type": "PTuning", "softPrompt": _soft()}, _learns(4.8)),
    _case("prefix", {"type": "PrefixTuning", "softPrompt": _soft()}, _learns(4.8, learningRate=5e-2)),
    _case(
        "prefix-projected",
        {"type": "PrefixTuning", "softPrompt": _soft(projection=True)},
        _learns(4.8),
    ),
    _case(
        "full-trainable",
        {"type": "Full", "full": {"trainable": ["*.mlp.*"], "freeze": ["model.layers.0.*"]}},
        _learns(2.0),
    ),
    _case("full-first-layers", {"type": "Full", "full": {"firstLayers": 1}}, _learns(2.0)),
)
