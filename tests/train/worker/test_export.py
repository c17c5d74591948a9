"""The artifact computes what the tuned model computed: merged, reloaded, for each family of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.worker.runs import LORA, QLORA, Work, build_engine_in, in_child, run_file, work_for


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("qwen2", {"lora": {**LORA, "targetModules": ["q_proj", "v_proj"], "variant": "RsLoRA"}}),
        ("llama", {"lora": {**LORA, "variant": "DoRA"}}),
        (
            "llama",
            {
                **QLORA,
                "quantization": {"bits": 4, "type": "NF4", "doubleQuant": True, "computeType": "FP32"},
                "precision": "FP32",
            },
        ),
    ],
    ids=["llama", "gpt2", "gpt_neox", "qwen2-rslora", "llama-dora", "llama-qlora"],
)
def test_merged_logits_equal_adapter_logits(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    work = work_for(tmp_path / "w", model={"family": family, "spread": 0.1, "width": 64}, mergeAdapter=True, **changes)
    assert work.train() == [0], work.logged()

    difference, from_base = in_child(_differences, str(work.root), "quantization" in changes)
    assert difference < 1e-4
    assert from_base > 1e-2, "the adapter changes the logits, so that equality says something"
    assert "quantization_config" not in work.read("artifact/merged/config.json")


def _differences(root: str, quantised: bool) -> tuple[float, float]:
    """Largest difference of logits, merged from adapter and base from adapter; a quantised base is dequantised."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = Path(root)
    options = (
        {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
        }
        if quantised
        else {}
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "inputs/model", dtype=torch.float32, **options)
    if quantised:
        base = base.dequantize(torch.float32)
    ids = torch.arange(40)[None] + 5
    with torch.no_grad():
        before = base(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, folder / "artifact/adapter")(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "artifact/merged")(input_ids=ids).logits
    return float((merged - tuned).abs().max()), float((before - tuned).abs().max())


def test_qlora_reports_what_is_held_in_four_bits(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", model={"width": 64}, **QLORA)
    assert work.train() == [0], work.logged()
    parameters = work.read("artifact/report.json")["parameters"]
    # q and o 64x64, k and v 64x32, gate, up and down 64x128, in two blocks
    assert parameters["quantised"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert parameters["total"] == parameters["quantised"] + 2 * 320 * 64 + 5 * 64 + parameters["trainable"]


def test_the_adapter_learns_under_gradient_checkpointing(tmp_path: Path) -> None:
    plain = work_for(tmp_path / "plain")
    saving = work_for(tmp_path / "saving", gradientCheckpointing=True)
    assert plain.train() == [0], plain.logged()
    assert saving.train() == [0], saving.logged()
    found = [line["gradNorm"] for line in saving.metrics() if "loss" in line]
    assert found == pytest.approx([line["gradNorm"] for line in plain.metrics() if "loss" in line], rel=1e-5)
    assert min(found) > 0.01


@pytest.mark.parametrize("precision", ["BF16", "FP16"])
def test_sixteen_bit_runs_come_close_to_fp32(tmp_path: Path, precision: str) -> None:
    exact = work_for(tmp_path / "fp32", mergeAdapter=False)
    rounded = work_for(tmp_path / "rounded", precision=precision)
    assert exact.train() == [0], exact.logged()
    assert rounded.train() == [0], rounded.logged()
    found, expected = (w.read("state/result.json")["evalLoss"] for w in (rounded, exact))
    assert found == pytest.approx(expected, rel=1e-3)
    assert found != expected


def test_full_tuning_in_bf16_keeps_updates_that_bf16_weights_would_swallow(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", type="Full", lora=None, precision="BF16", learningRate=1e-6)
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    changed, changed_in_bf16 = in_child(_share_of_changed_weights, str(work.root))
    assert changed > 0.9
    assert changed_in_bf16 < 0.1


def _share_of_changed_weights(root: str) -> tuple[float, float]:
    """Of the weights of one layer after training: the share that changed, and the share that did so beyond rounding."""
    import torch

    engine = build_engine_in(root)
    weight = engine.model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    before = weight.detach().clone()
    engine.train()
    after = weight.detach()
    rounded = before.bfloat16() != after.bfloat16()
    return float((after != before).float().mean()), float(rounded.float().mean())


def test_a_bf16_base_is_published_in_bf16(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", model={"dtype": "bfloat16"}, type="Full", lora=None, precision="BF16")
    assert work.train() == [0], work.logged()
    assert in_child(_stored_types, str(work.root / "artifact/model")) == {"torch.bfloat16"}
    config = work.read("artifact/model/config.json")
    assert (config["dtype"], config["use_cache"]) == ("bfloat16", True)


def _stored_types(folder: str) -> set[str]:
    from safetensors.torch import load_file

    return {str(tensor.dtype) for tensor in load_file(f"{folder}/model.safetensors").values()}


def test_the_base_is_named_so_that_users_find_it() -> None:
    assert in_child(_names) == ["tiny/llama", "s3://bucket/models/llama", "/models/llama"]


def _names() -> list[str]:
    from finetune_trainer.worker.export import base_name

    found = []
    for uri in ("hf://tiny/llama", "s3://bucket/models/llama", "file:///models/llama"):
        document = run_file().to_json()
        document["model"]["source"]["uri"] = uri
        found.append(base_name(type(run_file()).from_json(document)))
    return found


def test_a_run_without_held_out_records_reports_that(tmp_path: Path) -> None:
    work: Work = work_for(tmp_path / "w", validationFraction=None)
    assert work.train() == [0], work.logged()
    result = work.read("state/result.json")
    assert (result["artifact"], result["baseEvalLoss"], result["evalLoss"], result["step"]) == ("adapter", None, None, 4)
    assert "No records were held out" in (work.root / "artifact/report.md").read_text()
