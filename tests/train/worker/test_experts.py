"""Mixtures of experts: really quantised, really adapted, balanced by the router's loss, and free of hangs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import Case
from tests.train.methods.cases_experts import CASES, FUSED, NF4_32
from tests.train.worker.runs import LORA, Work, build_engine_in, in_child
from tests.train.worker.test_tuning import plain_loss, prepared, refusal

BY_NAME = {case.name.removeprefix("experts-"): case for case in CASES}
SWITCH = {"family": "switch_transformers"}
TWO_RANKS: dict[str, Any] = {
    "resources": {"processesPerNode": 2},
    "hyperparameters": {"microBatchSize": 1, "gradientAccumulation": 1, "totalSteps": 6},
}


def written(case: Case, root: Path, changes: dict[str, Any] | None = None) -> Work:
    """The case's work directory with its run file."""
    work = case.work(root, changes)
    (root / "run.json").write_text(json.dumps(work.run.to_json()))
    return work


@pytest.mark.parametrize("family", FUSED)
def test_experts_are_quantised_and_adapted_by_their_shares(tmp_path: Path, family: str) -> None:
    work = written(BY_NAME[f"{family}-qlora"], tmp_path / "w")
    found = in_child(_shares, str(work.root))
    assert found["quantised"] == found["linear"] + found["experts"]
    # PEFT counts the routers of some families among the linear layers.
    assert found["adapted"] - found["linear"] - found["experts"] in (0, found["routers"])
    assert found["experts"] / found["total"] > 0.3, "without them the share would be far smaller"
    assert found["left in 16 or 32 bits"] == 0


def _shares(root: str) -> dict[str, int]:
    """What the report says, beside counts of the plain model."""
    from torch import nn
    from transformers import AutoModelForCausalLM

    from finetune_trainer.worker.tuning import parameter_shares

    plain = AutoModelForCausalLM.from_pretrained(f"{root}/inputs/model")
    linear = [m.weight for name, m in plain.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    experts = [p for p in plain.parameters() if p.dim() == 3]
    model = build_engine_in(root).model
    return {
        **parameter_shares(model),
        "linear": sum(p.numel() for p in linear),
        "experts": sum(p.numel() for p in experts),
        "routers": sum(p.numel() for name, p in plain.named_parameters() if name.endswith("mlp.gate.weight")),
        "left in 16 or 32 bits": sum(p.dim() == 3 for p in model.parameters()),
    }


@pytest.mark.parametrize("family", FUSED)
def test_an_adapter_on_quantised_experts_computes_as_plain_peft_on_their_values(tmp_path: Path, family: str) -> None:
    work = written(BY_NAME[f"{family}-qlora"], tmp_path / "w")
    found = in_child(_quantised_against_plain, str(work.root))
    assert found["logits"] < 1e-4
    assert found["gradient"] < 1e-4
    assert found["from base"] > 1e-2
    assert found["least"] > 0, "each update of an expert gets a gradient"


def _quantised_against_plain(root: str) -> dict[str, float]:
    import torch
    from peft import get_peft_model

    from finetune_trainer.worker.quantization import dequantise

    engine = build_engine_in(root)
    model = engine.model
    batch = engine.objective.collate(list(engine._records)[:4])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base = dequantise(engine.objective.load_model(Path(root) / "inputs/model", None), torch.float32)
    plain = get_peft_model(base, model.peft_config["default"])
    theirs = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
            theirs[name].copy_(parameter)
    for module in model, plain:
        module.train()
    logits, expected = model(**inputs).logits, plain(**inputs).logits
    with torch.no_grad(), model.disable_adapter():
        before = model(**inputs).logits
    logits.square().mean().backward()
    expected.square().mean().backward()
    largest = max(float((ours[n].grad - theirs[n].grad).norm() / theirs[n].grad.norm().clamp(min=1e-9)) for n in ours)
    return {
        "logits": float((logits - expected).abs().max()),
        "gradient": largest,
        "from base": float((logits - before).abs().max()),
        "least": min(float(p.grad.norm()) for n, p in ours.items() if ".experts." in n),
    }


@pytest.mark.parametrize("name", ["mixtral-lora", "qwen2_moe-qlora"])
def test_merged_experts_compute_as_the_adapter_did(tmp_path: Path, name: str) -> None:
    work = BY_NAME[name].work(tmp_path / "w", {"output": {"mergeAdapter": True}})
    assert work.train() == [0], work.logged()
    assert "quantization_config" not in work.read("artifact/merged/config.json")
    assert in_child(plain_loss, str(work.root), "merged") == pytest.approx(
        work.read("state/result.json")["evalLoss"], rel=1e-3
    )


@pytest.mark.parametrize("asked", [None, 0.0, 0.5])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_routers_loss_is_the_librarys_with_the_asked_weight(
    tmp_path: Path, family: str, asked: float | None
) -> None:
    changes = {"tuning": {"type": "Full", "lora": None}, "hyperparameters": {"routerLossWeight": asked}}
    work = prepared(tmp_path / "w", changes, {"family": family})
    found, expected, own = in_child(_router_loss, str(work.root), asked)
    assert found == pytest.approx(expected, abs=2e-6)
    assert own > 0
    assert (found == 0) is (asked == 0)


def _router_loss(root: str, asked: float | None) -> tuple[float, float, float]:
    """Our auxiliary loss; the library's loss with the router's part less that without; the config's coefficient."""
    engine = build_engine_in(root)
    model = engine.model
    own = model.config.router_aux_loss_coef
    batch = engine.objective.collate(list(engine._records)[:3])
    ours = engine.objective.loss_sum(model, batch).auxiliary
    if asked is not None:
        model.router_aux_loss_coef = asked
    with_router = model(**batch, output_router_logits=True).loss
    without = model(**batch).loss
    return float(ours) if ours is not None else 0.0, float(with_router - without), own


def test_the_routers_loss_of_switch_counts_both_sides(tmp_path: Path) -> None:
    work = written(BY_NAME["switch"], tmp_path / "w")
    found, expected = in_child(_switch_loss, str(work.root))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 1e-3


def _switch_loss(root: str) -> tuple[float, float]:
    engine = build_engine_in(root)
    model = engine.model.eval()
    batch = engine.objective.collate(list(engine._records)[:3])
    ours = engine.objective.loss_sum(model, batch).auxiliary
    return float(ours), float(model(**batch, output_router_logits=True).loss - model(**batch).loss)


def test_router_and_experts_train_alone(tmp_path: Path) -> None:
    work = written(BY_NAME["router-and-experts"], tmp_path / "w")
    names = in_child(_trainable, str(work.root))
    parts = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    assert names == {f"model.layers.{layer}.mlp.{part}" for layer in (0, 1) for part in parts}


def _trainable(root: str) -> set[str]:
    return {name for name, p in build_engine_in(root).model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("lora", "quantization", "field", "said"),
    [
        ({"dropout": 0.1}, None, "tuning.lora.experts", "Set lora.dropout to 0"),
        ({"variant": "DoRA"}, None, "tuning.lora.experts", "Standard or RsLoRA"),
        (
            {},
            {"bits": 8, "type": "Int8", "doubleQuant": False, "computeType": "FP32"},
            "tuning.quantization.bits",
            "Use 4 bits",
        ),
    ],
)
def test_what_fused_experts_cannot_take_is_refused(
    tmp_path: Path, lora: dict[str, Any], quantization: dict[str, Any] | None, field: str, said: str
) -> None:
    tuning: dict[str, Any] = {"type": "QLoRA" if quantization else "LoRA", "lora": {**LORA, "experts": True, **lora}}
    work = prepared(tmp_path / "w", {"tuning": {**tuning, "quantization": quantization}}, {"family": "mixtral"})
    kind, where, message = refusal(work)
    assert (kind, where) == ("InvalidSpec", f"spec.{field}")
    assert said in message


def test_experts_of_a_dense_model_are_refused(tmp_path: Path) -> None:
    work = prepared(tmp_path / "w", {"tuning": {"lora": {**LORA, "experts": True}}})
    assert refusal(work)[:2] == ("InvalidSpec", "spec.tuning.lora.experts")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_all_linear_layers_are_none_of_the_fused_experts(tmp_path: Path, family: str) -> None:
    lora = {**LORA, "dropout": 0.05, "targetModules": ["all-linear"]}
    work = prepared(tmp_path / "w", {"tuning": {"lora": lora}}, {"family": family})
    names = in_child(_adapted_names, str(work.root))
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {name.rpartition(".")[2] for name in names}
    assert [name for name in names if ".experts" in name or "lm_head" in name] == []


def _adapted_names(root: str) -> list[str]:
    modules = build_engine_in(root).model.named_modules()
    return [name for name, module in modules if "default" in getattr(module, "lora_A", ())]


def test_qlora_of_switch_reaches_each_expert(tmp_path: Path) -> None:
    changes = {"tuning": {"type": "QLoRA", "quantization": NF4_32}}
    found = in_child(_switch_shares, str(written(BY_NAME["switch"], tmp_path / "w", changes).root))
    assert found["experts"] == found["quantised experts"] == found["adapted experts"] == 2 * 4 * 2


def _switch_shares(root: str) -> dict[str, int]:
    model = build_engine_in(root).model
    experts = [m for n, m in model.named_modules() if ".experts." in n and n.endswith((".wi", ".wo"))]
    return {
        "experts": len(experts),
        "quantised experts": sum(getattr(m.base_layer.weight, "quant_state", None) is not None for m in experts),
        "adapted experts": sum("default" in m.lora_A for m in experts),
    }


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_that_route_differently_end(tmp_path: Path, stage: int) -> None:
    changes = {**TWO_RANKS, "hyperparameters": {**TWO_RANKS["hyperparameters"], "zeroStage": stage}}
    changes["tuning"] = {"type": "Full", "lora": None}
    work = BY_NAME["switch"].work(tmp_path / "w", changes)
    assert work.train() == [0, 0], work.logged()
    losses = [line["loss"] for line in work.metrics() if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_zero_3_trains_adapted_experts_as_plain_torch_does(tmp_path: Path) -> None:
    case = BY_NAME["mixtral-lora"]
    plain = case.work(tmp_path / "plain", {"hyperparameters": {"gradientAccumulation": 2, "microBatchSize": 1}})
    sharded = case.work(
        tmp_path / "sharded",
        {
            "hyperparameters": {"gradientAccumulation": 1, "microBatchSize": 1, "zeroStage": 3},
            "resources": {"processesPerNode": 2},
        },
    )
    assert plain.train() == [0], plain.logged()
    assert sharded.train() == [0, 0], sharded.logged()
    found = [line["loss"] for line in sharded.metrics() if "loss" in line]
    # The balance of the router is nonlinear in the batch, and each rank has another part of it.
    assert found == pytest.approx([line["loss"] for line in plain.metrics() if "loss" in line], rel=1e-2)
    assert in_child(_smallest_update, str(sharded.root)) > 0


def _smallest_update(root: str) -> float:
    from safetensors.torch import load_file

    stored = load_file(f"{root}/artifact/adapter/adapter_model.safetensors")
    experts = [t for name, t in stored.items() if "experts" in name and "lora_B" in name]
    assert len(experts) == 4, "two fused weights in each of two layers"
    return min(float(tensor.norm()) for tensor in experts)
