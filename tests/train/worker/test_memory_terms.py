"""What the planner says that passes keep is what autograd keeps, and what lies there at once, with the pinned libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from finetune_api.job import ComputeType, Optimizer, Precision, QuantizationType, TuningType
from finetune_api.planner.memory import Shape, layer_bytes, unpacked_bytes
from finetune_api.runfile import RunQuantization
from finetune_api.status import ModelFacts
from finetune_trainer.worker.experts import quantise_experts
from finetune_trainer.worker.tuning.expert_lora import adapt_quantised_experts, as_if_plain

WIDTH, INNER, VOCABULARY, EXPERTS, PER_TOKEN = 256, 704, 32, 4, 2
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["experts.down_proj", "experts.gate_up_proj"]
FOUR_BITS = RunQuantization(bits=4, type=QuantizationType.NF4, double_quant=True, compute_type=ComputeType.BF16)


def model_of(
    kind: str,
    layers: int,
    modules: list[str] | str | None,
    *,
    fused: list[str] | None = None,
    quantised: bool = False,
    checkpointing: bool = False,
) -> torch.nn.Module:
    """A Llama or Mixtral with adapters on a base in BF16 or 4 bits, or with FP32 weights that all train."""
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
    }
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN}
        model = MixtralForCausalLM(MixtralConfig(**sizes, **experts))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if modules is None:
        return model.train()
    model = model.to(torch.bfloat16)
    if quantised:
        quantise_experts(model, FOUR_BITS, None)
    # Dropout keeps its mask as bytes on a GPU and as FP32 numbers on a CPU, so it is off here.
    with as_if_plain(model):
        settings = LoraConfig(r=1, lora_dropout=0.0, target_modules=modules, target_parameters=fused)
        adapted = get_peft_model(model, settings)
    adapt_quantised_experts(adapted)
    adapted.enable_input_require_grads()
    return adapted.train()


def kept(model: torch.nn.Module, tokens: int) -> int:
    """Bytes that the graph of one forward pass under autocast holds beside the parameters."""
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


def kept_in_a_layer(kind: str, modules: list[str] | str | None, **more: Any) -> float:
    """Bytes for each token."""
    short, long = 64, 128
    by_depth = []
    for layers in (2, 4):
        model = model_of(kind, layers, modules, **more)
        by_depth.append(kept(model, long) - kept(model, short))
    return (by_depth[1] - by_depth[0]) / (2 * (long - short))


class Large(TorchDispatchMode):
    """peak: most bytes that tensors of at least that many bytes, beside the parameters, took at once."""

    def __init__(self, model: torch.nn.Module, least: int) -> None:
        super().__init__()
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._least = least
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self._least:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._own:
                    self._live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {at: entry for at, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def facts(kind: str, layers: int = 4) -> ModelFacts:
    parameters = sum(parameter.numel() for parameter in model_of(kind, layers, None).parameters())
    mixture = {"experts": EXPERTS, "experts_per_token": PER_TOKEN, "expert_size": INNER} if kind == "mixtral" else {}
    return ModelFacts(
        model_type=kind,
        parameters=parameters - VOCABULARY * WIDTH,
        weight_bytes=2 * parameters,
        hidden_size=WIDTH,
        layers=layers,
        vocabulary_size=VOCABULARY,
        digest="sha256:none",
        **mixture,
    )


def shape(tuning: TuningType, **changes: Any) -> Shape:
    given: dict[str, Any] = {
        "tuning": tuning,
        "precision": Precision.BF16,
        "optimizer": Optimizer.ADAMW,
        "micro_batch_size": 1,
        "sequence_length": 64,
        "gradient_checkpointing": False,
        "lora_rank": 1,
        "world_size": 1,
        "zero_stage": 0,
        "on_cpu": False,
    }
    return Shape(**{**given, **changes})


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
    masks = share * (6 * WIDTH + INNER) if tuning == TuningType.LORA else 0
    counted = layer_bytes(facts("llama"), shape(tuning, adapted_share=share)) - masks
    assert kept_in_a_layer("llama", modules) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    ("tuning", "modules", "fused"),
    [(TuningType.LORA, ATTENTION, None), (TuningType.LORA, ATTENTION, FUSED), (TuningType.FULL, None, None)],
    ids=["LoRA", "LoRA on experts", "Full"],
)
def test_a_layer_of_fused_experts_keeps_what_the_planner_counts(
    tuning: TuningType, modules: list[str] | None, fused: list[str] | None
) -> None:
    masks = 4 * WIDTH if tuning == TuningType.LORA else 0
    counted = layer_bytes(facts("mixtral"), shape(tuning, adapted_experts=fused is not None)) - masks
    assert kept_in_a_layer("mixtral", modules, fused=fused) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(("modules", "size"), [(None, 4), ("all-linear", 2)], ids=["Full", "LoRA"])
def test_a_checkpoint_keeps_a_block_input_in_the_number_format_of_the_weights(modules: str | None, size: int) -> None:
    assert kept_in_a_layer("llama", modules, checkpointing=True) == size * WIDTH


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("quantised", "fused"), [(True, None), (True, FUSED), (False, FUSED)], ids=["QLoRA", "QLoRA on experts", "LoRA"]
)
def test_whole_experts_lie_there_for_as_many_layers_as_the_planner_counts(
    quantised: bool, fused: list[str] | None, checkpointing: bool
) -> None:
    """To the byte; each of the two weights of a layer's experts is above the bound, and all else is below."""
    model = model_of("mixtral", 2, ATTENTION, fused=fused, quantised=quantised, checkpointing=checkpointing)
    watch = Large(model, 2 * EXPERTS * WIDTH * INNER)
    with watch:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=torch.randint(0, VOCABULARY, (1, 64)), use_cache=False).logits
        logits.float().sum().backward()
    given = shape(
        TuningType.QLORA if quantised else TuningType.LORA,
        quantization=QuantizationType.NF4 if quantised else None,
        gradient_checkpointing=checkpointing,
        adapted_experts=fused is not None,
    )
    assert watch.peak == pytest.approx(unpacked_bytes(facts("mixtral", 2), given))
