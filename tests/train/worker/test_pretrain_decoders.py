"""GLM models of the stock library read text causally, so they are tuned as every causal model is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.worker.runs import in_child, made_model, work_for

GLM = ("glm", "glm4")


@pytest.mark.parametrize("family", GLM)
def test_a_glm_model_sees_nothing_of_what_follows_a_token(family: str) -> None:
    before, after = in_child(_change_of_logits, str(made_model(family=family, spread=0.2)))
    assert before == 0.0, "a prefix decoder would read the whole prompt both ways"
    assert after > 1e-3


def _change_of_logits(folder: str) -> tuple[float, float]:
    """Largest change of the logits before and from position 5 on, when the token there is another."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(10, 20)[None]
    changed = ids.clone()
    changed[0, 5] = 200
    with torch.no_grad():
        difference = (model(input_ids=ids).logits - model(input_ids=changed).logits).abs()[0]
    return float(difference[:5].max()), float(difference[5:].max())


@pytest.mark.parametrize("family", GLM)
def test_a_glm_model_learns_with_lora(tmp_path: Path, family: str) -> None:
    work = work_for(tmp_path / "w", model={"family": family, "spread": 0.2}, totalSteps=8)
    assert work.train() == [0], work.logged()
    losses = [line["loss"] for line in work.metrics() if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert work.read("artifact/report.json")["parameters"]["trainableShare"] < 0.5
