"""Each way to tune: what trains, with PEFT's own losses and gradients, and what a user loads afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.runfile import RunFile
from tests.train.methods.case import Case, merged
from tests.train.methods.cases_tuning import CASES
from tests.train.worker.runs import LORA, Work, build_engine_in, in_child, made_model, records, run_document, work_for

BY_NAME = {case.name.removeprefix("tuning-"): case for case in CASES}
ADAPTERS = [name for name in BY_NAME if not name.startswith(("full", "qlora"))]


def prepared(
    root: Path, changes: dict[str, Any], model: dict[str, Any] | None = None, rows: list[dict[str, str]] | None = None
) -> Work:
    """A work directory with its run file written, for build_engine_in."""
    run = RunFile.from_json(merged(run_document(), changes))
    work = Work.make(root, run, made_model(**(model or {})), rows)
    (root / "run.json").write_text(json.dumps(run.to_json()))
    return work


def refusal(work: Work) -> tuple[str, str, str]:
    """(class, field, message) of the error that building the run's model ends with."""
    return in_child(_refusal, str(work.root))


def _refusal(root: str) -> tuple[str, str, str]:
    from finetune_api.failures import FinetuneError

    try:
        build_engine_in(root)
    except FinetuneError as error:
        return error.failure_class, error.field or "", str(error)
    return "", "", "was accepted"


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_the_loss_and_the_gradient_of_plain_peft(tmp_path: Path, name: str) -> None:
    work = BY_NAME[name].work(tmp_path / "w")
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    found, expected, difference, norm = in_child(_against_peft, str(work.root))
    assert found == pytest.approx(expected, rel=1e-6)
    assert norm > 1e-4
    assert difference / norm < 1e-5


def _against_peft(root: str) -> tuple[float, float, float, float]:
    """Our loss, PEFT's own, and the norm of the difference of both gradients beside that of one."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    engine = build_engine_in(root)
    objective, model = engine.objective, engine.model
    batch = objective.collate(list(engine._records)[:3])
    loss = objective.loss_sum(model, batch).total / objective.units(batch)
    loss.backward()
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    base = AutoModelForCausalLM.from_pretrained(f"{root}/inputs/model", dtype=torch.float32)
    plain = get_peft_model(base, model.peft_config["default"])
    theirs = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    expected = plain(**batch).loss
    expected.backward()
    difference = sum(float((ours[n].grad - theirs[n].grad).norm() ** 2) for n in ours) ** 0.5
    return float(loss), float(expected), difference, sum(float(p.grad.norm() ** 2) for p in theirs.values()) ** 0.5


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_published_adapter_does_as_well_as_the_report_says_when_loaded_plainly(tmp_path: Path, name: str) -> None:
    work = BY_NAME[name].work(tmp_path / "w", {"hyperparameters": {"learningRate": 5e-2}})
    assert work.train() == [0], work.logged()
    result = work.read("state/result.json")
    assert abs(result["evalLoss"] - result["baseEvalLoss"]) > 1e-2, "the adapter does something"
    assert in_child(plain_loss, str(work.root), "adapter") == pytest.approx(result["evalLoss"], rel=1e-4)
    assert str(work.root) not in (work.root / "artifact/adapter/adapter_config.json").read_text()


def plain_loss(root: str, artifact: str) -> float:
    """Held-out loss of the artifact as a user loads it: by the library's own loss over single records."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune_trainer.data import load_dataset

    folder = Path(root)
    tokenizer = AutoTokenizer.from_pretrained(folder / "artifact" / artifact)
    if artifact == "adapter":
        base = AutoModelForCausalLM.from_pretrained(folder / "inputs/model", dtype=torch.float32)
        if len(tokenizer) > base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(base, folder / "artifact/adapter").eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "artifact" / artifact, dtype=torch.float32).eval()
    run = RunFile.from_json(json.loads((folder / "run.json").read_text()))
    total, count = 0.0, 0
    for example in load_dataset(run, folder / "inputs", tokenizer).validation:
        ids, labels = (torch.from_numpy(a.astype("int64"))[None] for a in (example.input_ids, example.labels))
        labels[:, 0] = -100
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        kept = int((labels != -100).sum())
        total, count = total + float(loss) * kept, count + kept
    return total / count


@pytest.mark.parametrize("name", ["prompt", "ptuning", "prefix", "prefix-projected", "ia3"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    case: Case = BY_NAME[name]
    whole = case.work(tmp_path / "whole", {"checkpoint": {"everySteps": 2, "keepLast": 5}})
    assert whole.train() == [0], whole.logged()
    resumed = whole.resumed_from(whole, 2, tmp_path / "resumed")
    assert resumed.train() == [0], resumed.logged()
    assert resumed.losses("checkpoints/step-4") == whole.losses("checkpoints/step-4")
    assert resumed.read("state/result.json") == whole.read("state/result.json")


def test_a_prefix_fits_a_cache_of_fewer_heads(tmp_path: Path) -> None:
    case = BY_NAME["prefix"]
    changed = Case("falcon", {"family": "falcon", "spread": 0.2}, records(), case.changes)
    work = changed.work(tmp_path / "w", {"hyperparameters": {"learningRate": 5e-2}})
    assert work.train() == [0], work.logged()
    losses = [line["loss"] for line in work.metrics() if "loss" in line]
    assert losses[-1] < losses[0]


def test_prefix_tuning_and_gradient_checkpointing_exclude_each_other(tmp_path: Path) -> None:
    changes = merged(BY_NAME["prefix"].changes, {"hyperparameters": {"gradientCheckpointing": True}})
    kind, field, message = refusal(prepared(tmp_path / "w", changes))
    assert (kind, field) == ("InvalidSpec", "spec.hyperparameters.gradientCheckpointing")
    assert "Set gradientCheckpointing to false" in message


@pytest.mark.parametrize("name", ["prompt", "ptuning"])
def test_a_soft_prompt_learns_under_gradient_checkpointing(tmp_path: Path, name: str) -> None:
    plain = BY_NAME[name].work(tmp_path / "plain")
    saving = BY_NAME[name].work(tmp_path / "saving", {"hyperparameters": {"gradientCheckpointing": True}})
    assert plain.train() == [0], plain.logged()
    assert saving.train() == [0], saving.logged()
    found = [line["gradNorm"] for line in saving.metrics() if "loss" in line]
    assert found == pytest.approx([line["gradNorm"] for line in plain.metrics() if "loss" in line], rel=1e-5)
    assert min(found) > 1e-3


def test_virtual_tokens_have_to_fit_into_the_positions(tmp_path: Path) -> None:
    changes = merged(BY_NAME["prompt"].changes, {"hyperparameters": {"maxSequenceLength": 124}})
    kind, field, message = refusal(prepared(tmp_path / "w", changes))
    assert (kind, field) == ("InvalidSpec", "spec.hyperparameters.maxSequenceLength")
    assert "Set maxSequenceLength to at most 120" in message


def test_ia3_says_which_layers_there_are_where_it_knows_none(tmp_path: Path) -> None:
    changes = {"tuning": {"type": "IA3", "lora": None}}
    kind, field, message = refusal(prepared(tmp_path / "w", changes, {"family": "qwen3_moe"}))
    assert (kind, field) == ("InvalidSpec", "spec.tuning.ia3.targetModules")
    assert "q_proj" in message


FULL_CHOICES = [
    (
        {"trainable": ["*.mlp.*"]},
        {f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("gate", "up", "down")},
    ),
    (
        {"firstLayers": 1, "freeze": ["*layernorm*", "*.mlp.*"]},
        {f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkvo"},
    ),
    ({"trainable": ["lm_head.*", "model.norm.*"], "freeze": ["lm_head.weight"]}, {"model.norm.weight"}),
]


@pytest.mark.parametrize(("full", "expected"), FULL_CHOICES)
def test_full_trains_just_what_is_named(tmp_path: Path, full: dict[str, Any], expected: set[str]) -> None:
    changes = {"tuning": {"type": "Full", "lora": None, "full": full}}
    assert in_child(_trainable, str(prepared(tmp_path / "w", changes).root)) == expected


def _trainable(root: str) -> set[str]:
    engine = build_engine_in(root)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    engine.train()
    changed = {name for name, p in engine.model.named_parameters() if not p.detach().equal(before[name])}
    assert changed == {name for name, p in engine.model.named_parameters() if p.requires_grad}
    return changed


def test_a_tied_weight_is_frozen_by_either_of_its_names(tmp_path: Path) -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        changes = {"tuning": {"type": "Full", "lora": None, "full": {"freeze": [name]}}}
        work = prepared(tmp_path / name, changes, {"tied": True})
        assert "model.embed_tokens.weight" not in in_child(_trainable, str(work.root))


@pytest.mark.parametrize("field", ["freeze", "trainable"])
def test_a_pattern_that_matches_nothing_is_answered_with_close_names(tmp_path: Path, field: str) -> None:
    changes = {"tuning": {"type": "Full", "lora": None, "full": {field: ["model.layers.0.self_atn.*"]}}}
    kind, where, message = refusal(prepared(tmp_path / "w", changes))
    assert (kind, where) == ("InvalidSpec", f"spec.tuning.full.{field}")
    assert "model.layers.*.self_attn." in message


@pytest.mark.parametrize(
    ("full", "where", "said"),
    [
        ({"firstLayers": 3}, "firstLayers", "has 2 layers"),
        ({"preset": "RouterAndExperts"}, "preset", "has no experts"),
        ({"trainable": ["*.mlp.*"], "freeze": ["*"]}, "", "leaves no parameter"),
    ],
)
def test_a_choice_that_leaves_nothing_is_refused(tmp_path: Path, full: dict[str, Any], where: str, said: str) -> None:
    changes = {"tuning": {"type": "Full", "lora": None, "full": full}}
    kind, field, message = refusal(prepared(tmp_path / "w", changes))
    assert kind == "InvalidSpec"
    assert field == ("spec.tuning.full." + where).rstrip(".")
    assert said in message


def test_a_frozen_model_is_published_whole(tmp_path: Path) -> None:
    work = BY_NAME["full-first-layers"].work(tmp_path / "w")
    assert work.train() == [0], work.logged()
    parameters = work.read("artifact/report.json")["parameters"]
    # q and o 32x32, k and v 32x16, gate, up and down 32x64, two norms
    assert parameters["trainable"] == 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert in_child(plain_loss, str(work.root), "model") == pytest.approx(
        work.read("state/result.json")["evalLoss"], rel=1e-5
    )


@pytest.mark.parametrize("name", ["lora", "ia3", "prompt", "prefix"])
def test_adapters_keep_fp32_master_weights_on_a_bf16_base(tmp_path: Path, name: str) -> None:
    changes = merged(BY_NAME[name].changes if name in BY_NAME else {}, {"hyperparameters": {"precision": "BF16"}})
    assert in_child(_trained_types, str(prepared(tmp_path / "w", changes).root)) == {"torch.float32"}


def _trained_types(root: str) -> set[str]:
    return {str(p.dtype) for p in build_engine_in(root).model.parameters() if p.requires_grad}


def test_bf16_master_weights_swallow_small_updates_that_fp32_keeps(tmp_path: Path) -> None:
    shares = {}
    for masters in ("FP32", "BF16"):
        hyperparameters = {"precision": "BF16", "masterWeights": masters, "learningRate": 1e-6}
        changes = {"tuning": {"type": "Full", "lora": None}, "hyperparameters": hyperparameters}
        shares[masters] = in_child(_share_of_changed, str(prepared(tmp_path / masters, changes).root))
    assert shares["FP32"] > 0.9
    assert shares["BF16"] < 0.1


def _share_of_changed(root: str) -> float:
    engine = build_engine_in(root)
    weight = engine.model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    engine.train()
    return float((weight.detach() != before).float().mean())


def test_bf16_master_weights_need_a_bf16_run(tmp_path: Path) -> None:
    work = prepared(tmp_path / "w", {"hyperparameters": {"masterWeights": "BF16"}})
    assert refusal(work)[:2] == ("InvalidSpec", "spec.hyperparameters.masterWeights")


def test_an_unknown_target_module_is_answered_with_the_models_layers(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", lora={**LORA, "targetModules": ["query_key_value"]})
    assert work.train() == [64]
    error = work.read("state/error-0.json")
    assert error["field"] == "spec.tuning.lora.targetModules"
    assert "q_proj" in error["message"]
