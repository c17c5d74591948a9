"""Added tokens: their embeddings train, are saved, survive a merge, and come with the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import merged
from tests.train.worker.runs import LORA, NF4, Work, in_child
from tests.train.worker.test_tuning import plain_loss, prepared, refusal

TOKENS = ["<|colour|>", "<|end|>"]
ROWS = [
    {"prompt": f"<|colour|> {word} {i}: ", "completion": f"{word}<|end|>"} for i in range(6) for word in ("red", "blue")
]
FULL: dict[str, Any] = {"type": "Full", "lora": None}
QLORA: dict[str, Any] = {"type": "QLoRA", "quantization": {**NF4, "computeType": "FP32"}}


def _work(root: Path, tuning: dict[str, Any], tied: bool, merge: bool = False) -> Work:
    changes = {
        "model": {"addSpecialTokens": TOKENS},
        "tuning": tuning,
        "hyperparameters": {"totalSteps": 8},
        "output": {"mergeAdapter": merge},
    }
    work = prepared(root, changes, {"tied": tied, "spread": 0.1, "width": 64})
    (root / "inputs/data/0/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return work


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
def test_merged_logits_equal_adapter_logits_with_resized_embeddings(tmp_path: Path, tied: bool, kind: str) -> None:
    work = _work(tmp_path / "w", QLORA if kind == "QLoRA" else {}, tied, merge=True)
    assert work.train() == [0], work.logged()
    found = in_child(_compare, str(work.root), kind == "QLoRA")
    assert found["difference"] < 1e-4
    assert found["from base"] > 1e-2
    assert found["rows"] == found["tokens"]
    assert found["tied"] is tied
    assert found["moved"] > 1e-3, "the new rows have left the mean where they began"
    assert found["apart"] > 1e-3, "and differ from each other"


def _compare(root: str, quantised: bool) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = Path(root)
    tokenizer = AutoTokenizer.from_pretrained(folder / "artifact/adapter")
    assert [len(tokenizer.encode(token, add_special_tokens=False)) for token in TOKENS] == [1, 1]
    options: dict[str, Any] = {}
    if quantised:
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **settings)}
    base = AutoModelForCausalLM.from_pretrained(folder / "inputs/model", dtype=torch.float32, **options)
    if quantised:
        base = base.dequantize(torch.float32)
    base.resize_token_embeddings(len(tokenizer))
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(TOKENS) + list(range(5, 40))])
    merged_model = AutoModelForCausalLM.from_pretrained(folder / "artifact/merged")
    with torch.no_grad():
        before = base(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, folder / "artifact/adapter")(input_ids=ids).logits
        after = merged_model(input_ids=ids).logits
    rows = merged_model.get_input_embeddings().weight.detach()
    return {
        "difference": float((after - tuned).abs().max()),
        "from base": float((before - tuned).abs().max()),
        "rows": rows.shape[0],
        "tokens": len(tokenizer),
        "tied": merged_model.get_output_embeddings().weight is merged_model.get_input_embeddings().weight,
        "moved": float((rows[-2:] - rows[:-2].mean(0)).abs().max()),
        "apart": float((rows[-2] - rows[-1]).abs().max()),
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_whole_model_keeps_its_new_rows(tmp_path: Path, tied: bool) -> None:
    work = _work(tmp_path / "w", FULL, tied)
    assert work.train() == [0], work.logged()
    assert work.read("artifact/model/config.json")["vocab_size"] == in_child(_size, str(work.root))
    assert in_child(plain_loss, str(work.root), "model") == pytest.approx(
        work.read("state/result.json")["evalLoss"], rel=1e-5
    )


def _size(root: str) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(f"{root}/artifact/model"))


def test_an_adapter_with_new_tokens_does_as_well_as_the_report_says(tmp_path: Path) -> None:
    work = _work(tmp_path / "w", {}, False)
    assert work.train() == [0], work.logged()
    assert in_child(plain_loss, str(work.root), "adapter") == pytest.approx(
        work.read("state/result.json")["evalLoss"], rel=1e-4
    )
    assert "base.resize_token_embeddings" in (work.root / "artifact/adapter/README.md").read_text()


def test_new_rows_are_the_mean_of_the_old_in_every_process(tmp_path: Path) -> None:
    work = _work(tmp_path / "w", {}, False)
    assert in_child(_distance_from_mean, str(work.root)) < 1e-6


def _distance_from_mean(root: str) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune_trainer.worker.tokenizers import resize_embeddings

    tokenizer = AutoTokenizer.from_pretrained(f"{root}/inputs/model")
    model = AutoModelForCausalLM.from_pretrained(f"{root}/inputs/model")
    rows = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<|{i}|>" for i in range(rows - len(tokenizer) + 2)], special_tokens=True)
    resize_embeddings(model, tokenizer)
    found = 0.0
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape[0] == len(tokenizer) == rows + 2
        found = max(found, float((layer.weight[rows:] - layer.weight[:rows].mean(0)).abs().max()))
    return found


def test_tokens_added_to_a_tuning_that_keeps_the_embeddings_are_refused(tmp_path: Path) -> None:
    changes = merged({"model": {"addSpecialTokens": TOKENS}}, {"tuning": {"type": "IA3", "lora": None}})
    kind, field, message = refusal(prepared(tmp_path / "w", changes))
    assert (kind, field) == ("InvalidSpec", "spec.model.tokenizer.addSpecialTokens")
    assert "Use Full, LoRA or QLoRA" in message


def test_another_rank_of_lora_does_not_change_which_rows_train(tmp_path: Path) -> None:
    work = _work(tmp_path / "w", {"lora": {**LORA, "targetModules": ["q_proj"]}}, False)
    assert work.train() == [0], work.logged()
    stored = in_child(_stored, str(work.root))
    rows = {name: shape for name, shape in stored.items() if "token" in name}
    assert set(rows.values()) == {(2, 64)}
    assert len(rows) == 2, "input and output embeddings"


def _stored(root: str) -> dict[str, tuple[int, ...]]:
    from safetensors.torch import load_file

    return {name: tuple(t.shape) for name, t in load_file(f"{root}/artifact/adapter/adapter_model.safetensors").items()}
