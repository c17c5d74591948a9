"""Quantised bases: at load or as they come, with each adapter, and back to 16 bits for a merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import merged
from tests.train.methods.cases_tuning import INT8
from tests.train.worker.runs import NF4, Work, in_child
from tests.train.worker.test_tuning import BY_NAME, plain_loss, prepared, refusal

NF4_32 = {**NF4, "computeType": "FP32"}
MODEL = {"width": 64, "spread": 0.1}
LINEAR = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


def _run(root: Path, changes: dict[str, Any]) -> Work:
    return prepared(root, changes, MODEL)


def _quantise_files(root: str, bits: int) -> None:
    """Make the work directory's base one that comes quantised by bitsandbytes."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    folder = f"{root}/inputs/model"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
    )
    model.save_pretrained(folder)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["ia3", "prompt", "prefix"])
def test_other_adapters_learn_on_a_quantised_base(tmp_path: Path, name: str, bits: int) -> None:
    quantization = INT8 if bits == 8 else NF4_32
    changes = {"tuning": {"quantization": quantization}, "hyperparameters": {"learningRate": 5e-2, "totalSteps": 8}}
    work = _run(tmp_path / "w", merged(BY_NAME[name].changes, changes))
    assert work.train() == [0], work.logged()
    assert work.read("artifact/report.json")["parameters"]["quantised"] == LINEAR
    result = work.read("state/result.json")
    assert abs(result["evalLoss"] - result["baseEvalLoss"]) > 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_learns_on_a_base_that_comes_quantised_and_is_merged_in_16_bits_or_more(
    tmp_path: Path, bits: int
) -> None:
    work = _run(tmp_path / "w", {"output": {"mergeAdapter": True}, "hyperparameters": {"totalSteps": 8}})
    in_child(_quantise_files, str(work.root), bits)
    assert work.train() == [0], work.logged()
    assert work.read("artifact/report.json")["parameters"]["quantised"] == LINEAR
    result = work.read("state/result.json")
    assert result["evalLoss"] < result["baseEvalLoss"]
    assert "quantization_config" not in work.read("artifact/merged/config.json")
    assert in_child(plain_loss, str(work.root), "merged") == pytest.approx(result["evalLoss"], rel=2e-3)


def test_merging_an_int8_base_gives_the_adapters_losses(tmp_path: Path) -> None:
    tuning = {"type": "QLoRA", "quantization": INT8}
    work = _run(tmp_path / "w", {"tuning": tuning, "output": {"mergeAdapter": True}})
    assert work.train() == [0], work.logged()
    assert in_child(plain_loss, str(work.root), "merged") == pytest.approx(
        work.read("state/result.json")["evalLoss"], rel=2e-3
    )


def test_merging_into_4_bits_would_drift_and_into_16_bits_does_not(tmp_path: Path) -> None:
    tuning = {"type": "QLoRA", "quantization": NF4_32}
    hyperparameters = {"totalSteps": 20, "learningRate": 1e-2}
    work = _run(
        tmp_path / "w", {"tuning": tuning, "output": {"mergeAdapter": True}, "hyperparameters": hyperparameters}
    )
    assert work.train() == [0], work.logged()
    ours, into_four_bits, from_base = in_child(_drift, str(work.root))
    assert ours < 1e-4 < into_four_bits
    assert from_base > 10 * ours


def _drift(root: str) -> tuple[float, float, float]:
    """Largest differences of logits from the adapter's on the dequantised base: our merge, one into 4 bits, the base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)

    def base() -> Any:
        path = f"{root}/inputs/model"
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=settings)

    ids = torch.arange(40)[None] + 5
    with torch.no_grad():
        plain = base().dequantize(torch.float32)
        before = plain(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(plain, f"{root}/artifact/adapter")(input_ids=ids).logits
        ours = AutoModelForCausalLM.from_pretrained(f"{root}/artifact/merged")(input_ids=ids).logits
        inside = PeftModel.from_pretrained(base(), f"{root}/artifact/adapter").merge_and_unload()
        drifted = inside.dequantize(torch.float32)(input_ids=ids).logits
    return tuple(float((found - tuned).abs().max()) for found in (ours, drifted, before))  # type: ignore[return-value]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_base_that_needs_kernels_we_have_not_is_refused_with_the_reason(tmp_path: Path, method: str) -> None:
    work = _run(tmp_path / "w", {})
    path = work.root / "inputs/model/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    path.write_text(json.dumps(config))
    kind, field, message = refusal(work)
    assert (kind, field) == ("ModelUnsupported", "spec.model.uri")
    assert "gptqmodel and a GPU" in message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tuning": {"type": "QLoRA", "quantization": NF4_32}}, "tuning.quantization"),
        ({"tuning": {"type": "Full", "lora": None}}, "tuning.type"),
    ],
)
def test_a_quantised_base_is_neither_quantised_again_nor_trained_whole(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    work = _run(tmp_path / "w", changes)
    in_child(_quantise_files, str(work.root), 4)
    assert refusal(work)[:2] == ("InvalidSpec", f"spec.{field}")


def test_eight_bits_of_a_four_bit_format_are_refused(tmp_path: Path) -> None:
    work = _run(tmp_path / "w", {"tuning": {"type": "QLoRA", "quantization": {**NF4_32, "bits": 8}}})
    assert refusal(work)[:2] == ("InvalidSpec", "spec.tuning.quantization")


@pytest.mark.parametrize("quantization", [NF4, INT8])
def test_zero_3_and_a_quantised_base_are_refused_before_anything_is_loaded(
    tmp_path: Path, quantization: dict[str, Any]
) -> None:
    tuning = {"type": "QLoRA", "quantization": quantization}
    work = _run(tmp_path / "w", {"tuning": tuning, "hyperparameters": {"zeroStage": 3}})
    assert work.train() == [64]
    assert work.read("state/error-0.json")["field"] == "spec.hyperparameters.zeroStage"


@pytest.mark.parametrize("quantization", [NF4_32, INT8], ids=["NF4", "Int8"])
def test_zero_2_trains_on_a_quantised_base_as_plain_torch_does(tmp_path: Path, quantization: dict[str, Any]) -> None:
    tuning = {"type": "QLoRA", "quantization": quantization}
    plain = _run(tmp_path / "plain", {"tuning": tuning})
    sharded = _run(tmp_path / "sharded", {"tuning": tuning, "hyperparameters": {"zeroStage": 2}})
    assert plain.train() == [0], plain.logged()
    assert sharded.train() == [0], sharded.logged()
    expected = [line["loss"] for line in plain.metrics() if "loss" in line]
    assert [line["loss"] for line in sharded.metrics() if "loss" in line] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["prompt", "ptuning", "prefix"])
def test_zero_3_saves_a_whole_prompt(tmp_path: Path, name: str) -> None:
    work = BY_NAME[name].work(tmp_path / "w", {"hyperparameters": {"zeroStage": 3, "learningRate": 5e-2}})
    assert work.train() == [0], work.logged()
    result = work.read("state/result.json")
    assert abs(result["evalLoss"] - result["baseEvalLoss"]) > 1e-3
    assert in_child(plain_loss, str(work.root), "adapter") == pytest.approx(result["evalLoss"], rel=1e-4)
