"""What the planner says that a layer keeps for the backward pass is what autograd keeps with the pinned libraries."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_api.job import Optimizer, Precision, TuningType
from finetune_api.planner.memory import Shape, layer_bytes
from finetune_api.status import ModelFacts

WIDTH, INNER, VOCABULARY = 256, 704, 32


def model_of(layers: int, modules: list[str] | str | None) -> torch.nn.Module:
    """A Llama with adapters on a base in BF16, or with FP32 weights that all train."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    if modules is None:
        return model
    # Dropout keeps its mask as bytes on a GPU and as FP32 numbers on a CPU, so it is off here.
    adapted = get_peft_model(model.to(torch.bfloat16), LoraConfig(r=1, lora_dropout=0.0, target_modules=modules))
    adapted.enable_input_require_grads()
    return adapted


def kept(layers: int, tokens: int, modules: list[str] | str | None) -> int:
    """Bytes that the graph of one forward pass under autocast holds beside the parameters."""
    model = model_of(layers, modules)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    inputs = torch.randint(0, VOCABULARY, (1, tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16), saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=inputs, use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize(
    ("tuning", "modules", "share"),
    [
        (TuningType.LORA, "all-linear", 1.0),
        (TuningType.LORA, ["q_proj", "v_proj"], 2 * WIDTH / (6 * WIDTH + INNER)),
        (TuningType.FULL, None, 1.0),
    ],
    ids=["LoRA on every layer", "LoRA on two", "Full"],
)
def test_a_layer_keeps_what_the_planner_counts(
    tuning: TuningType, modules: list[str] | str | None, share: float
) -> None:
    more = kept(4, 128, modules) - kept(4, 64, modules)
    less = kept(2, 128, modules) - kept(2, 64, modules)
    per_token = (more - less) / (2 * 64)
    parameters = sum(parameter.numel() for parameter in model_of(4, None).parameters()) - VOCABULARY * WIDTH
    facts = ModelFacts(
        model_type="llama",
        parameters=parameters,
        weight_bytes=2 * parameters,
        hidden_size=WIDTH,
        layers=4,
        vocabulary_size=VOCABULARY,
        digest="sha256:none",
    )
    shape = Shape(
        tuning=tuning,
        precision=Precision.BF16,
        optimizer=Optimizer.ADAMW,
        micro_batch_size=1,
        sequence_length=64,
        gradient_checkpointing=False,
        lora_rank=1,
        world_size=1,
        zero_stage=0,
        on_cpu=False,
        adapted_share=share,
    )
    masks = share * (6 * WIDTH + INNER) if tuning == TuningType.LORA else 0
    assert per_token == pytest.approx(layer_bytes(facts, shape) - masks, rel=0.03)
