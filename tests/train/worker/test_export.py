"""The artifact computes what the tuned model computed: merged, reloaded, for each family of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.runfile import RunFile
from tests.train.methods.case import Case, merged
from tests.train.worker.runs import (
    FULL,
    LORA,
    QLORA,
    Work,
    build_engine_in,
    in_child,
    made_model,
    records,
    run_document,
    run_file,
    work_for,
)
from tests.train.worker.test_tuning import BY_NAME


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
        found = AutoModelForCausalLM.from_pretrained(folder / "artifact/merged")(input_ids=ids).logits
    return float((found - tuned).abs().max()), float((before - tuned).abs().max())


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
    assert (result["artifact"], result["baseEvalLoss"], result["evalLoss"], result["step"]) == (
        "adapter",
        None,
        None,
        4,
    )
    assert "No records were held out" in (work.root / "artifact/report.md").read_text()


def test_a_large_model_is_written_in_shards_that_load_plainly(tmp_path: Path) -> None:
    document = merged(run_document(), {"tuning": {"type": "Full", "lora": None}, "output": {"maxShardSizeGiB": 1e-4}})
    work = Work.make(tmp_path / "w", RunFile.from_json(document), made_model())
    assert work.train() == [0], work.logged()
    folder = work.root / "artifact/model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(set(index["weight_map"].values())) == shards
    assert in_child(_counts, str(folder)) == work.read("artifact/report.json")["parameters"]["total"]


def _counts(folder: str) -> int:
    from transformers import AutoModelForCausalLM

    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


@pytest.mark.parametrize(("artifact", "changes"), [("adapter", {"mergeAdapter": True}), ("model", FULL)])
def test_the_card_says_where_the_artifact_comes_from_and_how_to_load_it(
    tmp_path: Path, artifact: str, changes: dict[str, Any]
) -> None:
    work = work_for(tmp_path / "w", **changes)
    assert work.train() == [0], work.logged()
    text = (work.root / "artifact" / artifact / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "tiny/llama"
    assert front["pipeline_tag"] == "text-generation"
    assert front["library_name"] == ("peft" if artifact == "adapter" else "transformers")
    assert f"# {work.read('artifact/report.json')['modelId']}\n" in text
    loss = work.read("state/result.json")["evalLoss"]
    for said in ("`s3://b/train.jsonl`", "`sha256:d`", "`sha256:m`", work.run.digest(), f"| loss | {loss:.6g} |"):
        assert said in text
    assert str(work.root) not in text
    if artifact == "adapter":
        merged_card = (work.root / "artifact/merged/README.md").read_text()
        assert 'AutoModelForCausalLM.from_pretrained("merged")' in merged_card
        assert 'PeftModel.from_pretrained(base, "adapter")' in text


def test_a_soft_prompt_cannot_be_merged(tmp_path: Path) -> None:
    work = BY_NAME["prompt"].work(tmp_path / "w", {"output": {"mergeAdapter": True}})
    assert work.train() == [64]
    error = work.read("state/error-0.json")
    assert error["field"] == "spec.output.mergeAdapter"
    assert "nothing to merge" in error["message"]
    assert not (work.root / "artifact").exists() or not list((work.root / "artifact").glob("**/*.safetensors"))


def test_ia3_merges_into_the_base(tmp_path: Path) -> None:
    changes = {"output": {"mergeAdapter": True}, "hyperparameters": {"learningRate": 5e-2}}
    for family in ("llama", "gpt2"):
        case = Case("ia3", {"family": family, "spread": 0.1, "width": 64}, records(), BY_NAME["ia3"].changes)
        work = case.work(tmp_path / family, changes)
        assert work.train() == [0], work.logged()
        difference, from_base = in_child(_differences, str(work.root), False)
        assert difference < 1e-4
        assert from_base > 1e-2


CLASSES = [
    {"text": f"say {word} {i}", "label": "warm" if word == "red" else "cold"}
    for i in range(8)
    for word in ("red", "blue")
]


@pytest.mark.parametrize("name", ["ia3", "prompt", "ptuning", "prefix"])
def test_a_classifier_head_and_a_fresh_pooler_are_saved_with_the_adapter(tmp_path: Path, name: str) -> None:
    changes = {
        "model": {"task": "SequenceClassification"},
        "dataset": {"format": "Labels"},
        "tuning": BY_NAME[name].changes["tuning"],
        "hyperparameters": {"learningRate": 5e-2},
        "checkpoint": {"everySteps": 2},
    }
    case = Case("classifier", {"family": "bert"}, CLASSES, changes)
    work = case.work(tmp_path / "w")
    assert work.train() == [0], work.logged()
    found = in_child(_plain_classes, str(work.root))
    lines = (work.root / "artifact/predictions.jsonl").read_text().splitlines()
    reported = [line["tunedProbabilities"] for line in map(json.loads, lines)]
    assert len(reported) == len(found) > 0
    for ours, theirs in zip(reported, found, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    resumed = work.resumed_from(work, 2, tmp_path / "resumed")
    assert resumed.train() == [0], resumed.logged()
    assert resumed.losses("checkpoints/step-4") == work.losses("checkpoints/step-4")


def _plain_classes(root: str) -> list[dict[str, float]]:
    """Probabilities of the held-out records by the adapter on the plain base, in the order of the report."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from finetune_trainer.data import load_dataset

    folder = Path(root)
    config = AutoConfig.from_pretrained(folder / "artifact/adapter")
    torch.manual_seed(99)  # whatever the adapter does not bring is drawn anew
    base = AutoModelForSequenceClassification.from_pretrained(folder / "inputs/model", config=config)
    model = PeftModel.from_pretrained(base, folder / "artifact/adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "artifact/adapter")
    run = RunFile.from_json(json.loads((folder / "run.json").read_text()))
    found = []
    for example in load_dataset(run, folder / "inputs", tokenizer).validation:
        ids = torch.from_numpy(example.input_ids.astype("int64"))[None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        found.append({config.id2label[i]: float(p) for i, p in enumerate(logits.softmax(-1))})
    return found
