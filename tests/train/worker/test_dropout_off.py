"""Objectives that compare a policy with its own past turn every kind of dropout off, however a model spells it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.worker.objectives.policy import put_off_dropout

SMALL = {"num_hidden_layers": 4, "vocab_size": 64}
MODELS = {
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 64},
    "opt": {**SMALL, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "word_embed_proj_dim": 32}
    | {"layerdrop": 0.5, "dropout": 0.5},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 64, "attn_pdrop": 0.5, "resid_pdrop": 0.5},
}


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_model_in_training_mode_gives_the_same_logits_twice(family: str) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MODELS[family])).train()
    for module in model.modules():
        if hasattr(module, "attn_dropout_p"):  # MPT's config takes whole numbers only
            module.attn_dropout_p = 0.5
    ids = torch.arange(3, 19).reshape(1, 16)

    def logits() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    assert not torch.equal(logits(), logits()), "the probe has to see dropout"
    put_off_dropout(model)
    assert torch.equal(logits(), logits())
