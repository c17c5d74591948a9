"""An earlier adapter: taken up where it ended, measured as it is, refused where it does not fit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import merged
from tests.train.worker.runs import LORA, Work, in_child
from tests.train.worker.test_tuning import BY_NAME, prepared, refusal

EARLIER = {"model": {"adapter": {"uri": "s3://b/earlier", "access": {}}, "adapterDigest": "sha256:a"}}
STEADY = {"hyperparameters": {"learningRate": 5e-2, "schedule": "Constant"}}


def _earlier(root: Path, changes: dict[str, Any]) -> Work:
    work = prepared(root, merged(changes, STEADY))
    assert work.train() == [0], work.logged()
    return work


def _after(root: Path, earlier: Work, changes: dict[str, Any]) -> Work:
    work = prepared(root, merged(merged(changes, STEADY), EARLIER))
    shutil.copytree(earlier.root / "artifact/adapter", work.root / "inputs/adapter")
    return work


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A finished LoRA run."""
    return _earlier(tmp_path_factory.mktemp("earlier") / "w", {})


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "prompt", "prefix"])
def test_a_run_goes_on_where_the_earlier_adapter_ended(tmp_path: Path, lora: Work, name: str) -> None:
    changes = BY_NAME[name].changes if name in BY_NAME else {}
    earlier = lora if name == "lora" else _earlier(tmp_path / "earlier", changes)
    later = _after(tmp_path / "later", earlier, merged(changes, {"evaluation": {"everySteps": 1}}))
    weights = in_child(_same_weights, str(later.root))
    assert weights == (True, True), "the weights are the earlier ones, and they train"
    assert later.train() == [0], later.logged()
    assert later.read("artifact/report.json")["evaluation"]["base"]["loss"] == pytest.approx(
        earlier.read("artifact/report.json")["evaluation"]["base"]["loss"], rel=1e-5
    )


def _same_weights(root: str) -> tuple[bool, bool]:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from tests.train.worker.runs import build_engine_in

    model = build_engine_in(root).model
    stored = load_file(f"{root}/inputs/adapter/adapter_model.safetensors")
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    same = found.keys() == stored.keys() and all(found[name].equal(stored[name]) for name in stored)
    return same, any(p.requires_grad for p in model.parameters())


def test_an_evaluation_measures_the_adapter_as_it_is(tmp_path: Path, lora: Work) -> None:
    changes = {"objective": {"type": "Evaluation"}, "tuning": {"type": "Full", "lora": None}}
    changes["hyperparameters"] = {"totalSteps": 0, "learningRate": 0.0}
    work = _after(tmp_path / "w", lora, merged(changes, {}))
    trainable, loss, expected = in_child(_frozen, str(work.root))
    assert trainable == 0
    assert loss == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(lora.read("state/result.json")["evalLoss"], rel=1e-4)


def _frozen(root: str) -> tuple[int, float, float]:
    """Parameters that train, our loss on the held-out records, and that of the adapter loaded plainly."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.train.worker.runs import build_engine_in

    engine = build_engine_in(root)
    batch = engine.objective.collate(list(engine._held_out))
    plain = AutoModelForCausalLM.from_pretrained(f"{root}/inputs/model", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, f"{root}/inputs/adapter").eval()
    with torch.no_grad():
        found = engine.objective.measure(engine.model.eval(), batch)["loss"]
        expected = tuned(**batch).loss
    trainable = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    return trainable, float(found[0] / found[1]), float(expected)


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"tuning": {"lora": {"rank": 8}}}, "tuning.lora.rank", "r 4, and this run asks for 8"),
        ({"tuning": {"lora": {"alpha": 32}}}, "tuning.lora.alpha", "lora_alpha 8"),
        ({"tuning": {"lora": {"variant": "RsLoRA"}}}, "tuning.lora.variant", "use_rslora False"),
        ({"tuning": {"type": "IA3", "lora": None}}, "tuning.type", "is of type LORA"),
        ({"tuning": {"type": "Full", "lora": None}}, "model.adapter", "Merge the adapter"),
        ({"model": {"addSpecialTokens": ["<|new|>"]}}, "model.tokenizer.addSpecialTokens", "trainable_token_indices"),
    ],
)
def test_other_settings_than_the_adapters_are_refused(
    tmp_path: Path, lora: Work, changes: dict[str, Any], field: str, said: str
) -> None:
    kind, where, message = refusal(_after(tmp_path / "w", lora, changes))
    assert (kind, where) == ("InvalidSpec", f"spec.{field}")
    assert said in message


def test_an_adapter_on_other_layers_is_refused(tmp_path: Path, lora: Work) -> None:
    work = _after(tmp_path / "w", lora, {"tuning": {"lora": {**LORA, "targetModules": ["q_proj"]}}})
    kind, field, message = refusal(work)
    assert (kind, field) == ("ModelUnsupported", "spec.model.adapter.uri")
    assert "but this run does not know" in message


def test_missing_or_unexpected_keys_of_an_adapter_fail(tmp_path: Path, lora: Work) -> None:
    for evaluates in (False, True):
        changes: dict[str, Any] = {}
        if evaluates:
            changes = {"objective": {"type": "Evaluation"}, "tuning": {"type": "Full", "lora": None}}
        work = _after(tmp_path / f"{evaluates}", lora, changes)
        in_child(_drop_one, str(work.root))
        kind, _, message = refusal(work)
        assert kind == "ModelUnsupported"
        assert "lacks 1 weights" in message


def _drop_one(root: str) -> None:
    from safetensors.torch import load_file, save_file

    path = f"{root}/inputs/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def test_a_finished_ptuning_adapter_cannot_go_on(tmp_path: Path) -> None:
    changes = BY_NAME["ptuning"].changes
    earlier = _earlier(tmp_path / "earlier", dict(changes))
    kind, field, message = refusal(_after(tmp_path / "w", earlier, dict(changes)))
    assert (kind, field) == ("InvalidSpec", "spec.model.adapter")
    assert "not the network that made it" in message


def test_a_pickled_adapter_is_refused_and_never_runs(tmp_path: Path, lora: Work) -> None:
    from tests.train.worker.runs import plant_pickle

    work = _after(tmp_path / "w", lora, {})
    folder = work.root / "inputs/adapter"
    (folder / "adapter_model.safetensors").unlink()
    in_child(plant_pickle, str(folder / "adapter_model.bin"), "weights", str(tmp_path / "was-run"))
    kind, field, message = refusal(work)
    assert (kind, field) == ("UnsafeFile", "spec.model.adapter.uri")
    assert "adapter_model.bin" in message
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"alpha_pattern": {"q_proj": 64}}, "InvalidSpec", "has alpha_pattern {'q_proj': 64}"),
        ({"rank_pattern": {"q_proj": 2}}, "InvalidSpec", "has rank_pattern {'q_proj': 2}"),
        ({"init_lora_weights": "pissa"}, "ModelUnsupported", "changes the base model's own weights"),
        ({"init_lora_weights": "olora"}, "ModelUnsupported", "path_initial_model_for_weight_conversion"),
    ],
)
def test_an_adapter_whose_update_means_something_else_is_refused(
    tmp_path: Path, lora: Work, changed: dict[str, Any], kind: str, said: str
) -> None:
    work = _after(tmp_path / "w", lora, {})
    config = work.root / "inputs/adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    found, field, message = refusal(work)
    assert (found, field) == (kind, "spec.model.adapter.uri")
    assert said in message


def test_a_broken_adapter_says_what_is_wrong_with_it(tmp_path: Path, lora: Work) -> None:
    work = _after(tmp_path / "w", lora, {})
    (work.root / "inputs/adapter/adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refusal(work)[2]
    (work.root / "inputs/adapter/adapter_config.json").write_text(
        (lora.root / "artifact/adapter/adapter_config.json").read_text()
    )
    (work.root / "inputs/adapter/adapter_model.safetensors").write_bytes(json.dumps({}).encode())
    assert "adapter_model.safetensors cannot be read" in refusal(work)[2]


def test_dpo_compares_with_the_earlier_adapter_and_not_with_the_bare_base(tmp_path: Path, lora: Work) -> None:
    """At the first step policy and reference are the same, so the loss is log 2; against the bare base it is not."""
    pairs = [{"prompt": f"say {w}: ", "chosen": w, "rejected": "nothing"} for w in ("red", "blue", "green", "grey") * 4]
    changes = {
        "dataset": {"format": "Preference"},
        "objective": {"type": "DPO", "preference": {"beta": 0.1}},
        "hyperparameters": {"maxSequenceLength": 96},
    }
    later = prepared(tmp_path / "later", merged(merged(changes, STEADY), EARLIER), rows=pairs)
    shutil.copytree(lora.root / "artifact/adapter", later.root / "inputs/adapter")
    assert later.train() == [0], later.logged()
    losses = [line["loss"] for line in later.metrics() if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses[1] != pytest.approx(math.log(2), rel=1e-3)
