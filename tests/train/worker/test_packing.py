"""Packed records do not see one another: proven at start for each architecture and attention kernel."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from finetune_api.planner.optimization import NEVER_PACKED
from tests.train.worker.runs import Work, in_child, records, work_for

KERNELS = ("eager", "sdpa")
EXPECTED = {
    "llama": "Positions",
    "gpt2": "Positions",
    "gpt_neox": "Positions",
    "qwen2": "Positions",
    "mixtral": "Positions",
    "qwen2_moe": "Positions",
    "falcon": "FloatMask",
    "opt": "FloatMask",
    "bloom": None,
}


def _ways(families: list[str]) -> dict[str, dict[str, Any]]:
    """Of each family and kernel: the way that is chosen and why; and by the whole model, what a packed record shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune_trainer.worker.packing import prove_isolation
    from tests.train.models import tiny_model

    found: dict[str, dict[str, Any]] = {}
    for family in families:
        for kernel in KERNELS:
            folder = tiny_model(family, spread=0.2)
            proof = prove_isolation([folder], kernel, torch.float32, torch.device("cpu"))
            seen = None
            if proof.isolation is not None:
                config = AutoConfig.from_pretrained(folder)
                model = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation=kernel)
                seen = _influence(model.eval(), proof.isolation)
            way = proof.isolation.value if proof.isolation else None
            found[f"{family} {kernel}"] = {"way": way, "reason": proof.reason, "influence": seen}
    return found


def _influence(model: Any, isolation: Any) -> tuple[float, float]:
    """(largest change of record 2's logits when record 1 changes, the same in one open sequence), in training mode."""
    import numpy as np
    import torch

    from finetune_trainer.data.kinds import EncodedPacked
    from finetune_trainer.worker.packing import model_inputs, packed_batch

    def logits(first: list[int]) -> Any:
        ids = np.array([*first, *range(20, 40)], np.int32)
        items = [
            EncodedPacked(ids, ids, np.array([0, len(first)], np.int32)),
            EncodedPacked(ids[:8], ids[:8], ids[:1] * 0),
        ]
        batch = packed_batch(items, isolation, torch.float32)
        with torch.no_grad():
            return model(**model_inputs(batch))["logits"][0, len(first) :]

    def open_logits(first: list[int]) -> Any:
        with torch.no_grad():
            ids = torch.tensor([[*first, *range(20, 40)]])
            return model(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"][0, len(first) :]

    one, other = list(range(100, 112)), list(range(200, 212))
    closed = (logits(one) - logits(other)).abs().max()
    return float(closed), float((open_logits(one) - open_logits(other)).abs().max())


@pytest.fixture(scope="module")
def ways() -> dict[str, dict[str, Any]]:
    return in_child(_ways, list(EXPECTED))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", list(EXPECTED))
def test_packing_isolation_is_proven_for_each_attention_kernel(
    ways: dict[str, dict[str, Any]], family: str, kernel: str
) -> None:
    found = ways[f"{family} {kernel}"]
    assert found["way"] == EXPECTED[family]
    if found["way"] is not None:
        closed, opened = found["influence"]
        assert opened > 1e-2, "the probe shows no influence even in an open sequence"
        assert closed <= 1e-6


def test_the_reason_for_not_packing_names_each_way_that_leaks(ways: dict[str, dict[str, Any]]) -> None:
    reason = ways["bloom eager"]["reason"]
    assert reason.startswith("records of one sequence would see one another in bloom (Positions: a record changes with")
    assert "FloatMask: refused" in reason


def _leaks_with_the_cache_on() -> tuple[float, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.train.models import tiny_model

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", spread=0.2)).eval()
    positions = torch.tensor([[*range(6), *range(10)]])

    def logits(first: int, cache: bool) -> Any:
        ids = torch.tensor([[*range(first, first + 6), *range(20, 30)]])
        with torch.no_grad():
            return model(input_ids=ids, position_ids=positions, use_cache=cache).logits[0, 6:]

    return tuple(float((logits(100, c) - logits(200, c)).abs().max()) for c in (False, True))


def test_the_cache_has_to_be_off_for_packed_records() -> None:
    without, with_cache = in_child(_leaks_with_the_cache_on)
    assert without <= 1e-6
    # Should the library mend this, model_inputs may leave the cache alone.
    assert with_cache > 1e-2


def _window_is_lost() -> tuple[str | None, str | None]:
    import torch
    from transformers import AutoConfig

    from finetune_trainer.data.packing import Isolation
    from finetune_trainer.worker.packing import leak_of, small_copy

    config = AutoConfig.for_model(
        "mistral",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=320,
        sliding_window=4096,
    )
    model = small_copy(config, "sdpa", torch.float32, torch.device("cpu"))
    return leak_of(model, Isolation.POSITIONS), leak_of(model, Isolation.FLOAT_MASK)


def test_a_float_mask_that_loses_the_sliding_window_is_not_taken() -> None:
    positions, float_mask = in_child(_window_is_lost)
    assert positions is None
    assert float_mask is not None and "a record differs" in float_mask


def _ways_in_16_bits() -> list[str | None]:
    import torch

    from finetune_trainer.worker.packing import prove_isolation
    from tests.train.models import tiny_model

    cpu = torch.device("cpu")
    return [
        prove_isolation([tiny_model(family)], "sdpa", dtype, cpu).isolation
        for family in ("llama", "opt")
        for dtype in (torch.bfloat16, torch.float16)
    ]


def test_rounding_to_16_bits_is_no_leak_and_hides_none() -> None:
    assert in_child(_ways_in_16_bits) == ["Positions", "Positions", "FloatMask", "FloatMask"]


def _packed_gradient(family: str) -> float:
    """Relative difference of the gradients of packed and of single records, as an objective collates both."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from finetune_trainer.data.kinds import EncodedExample
    from finetune_trainer.data.packing import Isolation, Packed
    from finetune_trainer.worker.loss import next_token_loss_sum
    from finetune_trainer.worker.packing import model_inputs, packed_batch
    from finetune_trainer.worker.padding import pad_sequences
    from tests.train.models import tiny_model

    random = np.random.default_rng(0)
    items = []
    for length in (5, 9, 14, 3, 7, 11):
        ids = random.integers(3, 300, length).astype(np.int32)
        labels = ids.copy()
        labels[: length // 2] = -100
        items.append(EncodedExample(ids, labels))
    way = Isolation.POSITIONS if family == "llama" else Isolation.FLOAT_MASK
    packed = Packed(items, [len(item.input_ids) for item in items], 20, 0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family, spread=0.2))
    gradients = []
    for batch in (packed_batch([packed[k] for k in range(len(packed))], way, torch.float32), pad_sequences(items)):
        model.zero_grad()
        next_token_loss_sum(model(**model_inputs(batch))["logits"], batch["labels"]).backward()
        gradients.append(torch.cat([p.grad.double().ravel() for p in model.parameters() if p.grad is not None]))
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_packed_records_give_the_gradient_of_single_ones(family: str) -> None:
    assert in_child(_packed_gradient, family) <= 1e-6


def _packed(work: Work, **hyperparameters: Any) -> Work:
    document = work.run.to_json()
    document["hyperparameters"] |= {"packing": True, **hyperparameters}
    return Work(work.root, type(work.run).from_json(document))


def test_soft_prompts_are_trained_without_packing_and_the_report_says_why(tmp_path: Path) -> None:
    soft = {"virtualTokens": 2, "init": "Random"}
    work = work_for(tmp_path / "w", rows=records(16), totalSteps=1, type="PromptTuning", lora=None)
    document = work.run.to_json()
    document["hyperparameters"]["packing"] = True
    document["tuning"]["softPrompt"] = soft
    work = Work(work.root, type(work.run).from_json(document))
    assert work.train() == [0], work.logged()
    assert work.read("artifact/report.json")["data"]["packing"] == (
        "off: PromptTuning puts its tokens before a sequence, not before each of its records, so each sequence is one "
        "record"
    )


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_epochs_are_those_of_the_sequences_that_there_are(tmp_path: Path, family: str) -> None:
    """The plan had one step; two epochs of the records, or of what they are packed into, take more."""
    model = {"family": family}
    work = _packed(work_for(tmp_path / "w", rows=records(24), model=model, totalSteps=1), epochs=2)
    assert work.train() == [0], work.logged()
    report = work.read("artifact/report.json")
    trained = report["data"]["trainRecords"]
    [sequences] = re.findall(rf"{trained} records in (\d+) sequences", report["data"]["packing"]) or [trained]
    assert (int(sequences) < trained) == (family == "llama")
    steps = math.ceil(int(sequences) / 4 * 2)
    assert (report["training"]["steps"], report["training"]["plannedSteps"]) == (steps, steps)
    assert work.read("state/progress.json")["totalSteps"] == steps > 1


def test_the_planner_knows_which_of_these_models_cannot_be_packed(ways: dict[str, dict[str, Any]]) -> None:
    assert {family for family in EXPECTED if ways[f"{family} sdpa"]["way"] is None} == NEVER_PACKED


def test_two_ranks_pack_alike_and_the_sample_is_printed_with_its_mask(tmp_path: Path) -> None:
    work = _packed(work_for(tmp_path / "w", rows=records(32), totalSteps=2, processesPerNode=2))
    alone = _packed(work_for(tmp_path / "a", rows=records(32), totalSteps=2, microBatchSize=4))
    assert work.train() == [0, 0], work.logged()
    assert alone.train() == [0], alone.logged()
    losses = [[line["loss"] for line in w.metrics() if "loss" in line] for w in (work, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "\\u27e6" in work.logged() and '"value": "Positions: ' in work.logged()


@pytest.mark.parametrize("setting", ["packing", "groupByLength"])
def test_a_resumed_run_goes_on_exactly_where_records_are_packed_or_grouped(tmp_path: Path, setting: str) -> None:
    def with_setting(work: Work) -> Work:
        document = work.run.to_json()
        document["hyperparameters"][setting] = True
        document["checkpoint"]["keepLast"] = 5
        return Work(work.root, type(work.run).from_json(document))

    rows = records(36)
    whole = with_setting(work_for(tmp_path / "whole", rows=rows, totalSteps=6, saveSteps=2, microBatchSize=1))
    assert whole.train() == [0], whole.logged()
    rest = whole.resumed_from(whole, 4, tmp_path / "rest")
    assert rest.train() == [0], rest.logged()
    assert [step for step, *_ in rest.losses("checkpoints/step-6")] == [1, 2, 3, 4, 5, 6]
    assert rest.losses("checkpoints/step-6") == whole.losses("checkpoints/step-6")
