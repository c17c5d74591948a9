"""A small config of each supported model type, and what the library makes of it. Imported in a child process only."""

from __future__ import annotations

from typing import Any

from finetune_api.job import Task
from finetune_trainer.sources.architectures import TASKS

WIDTH, LAYERS, HEADS, VOCABULARY, POSITIONS = 64, 2, 4, 512, 40
_PLAIN = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
_GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
_T5 = {
    "d_model": WIDTH,
    "d_ff": 2 * WIDTH,
    "d_kv": 16,
    "num_layers": LAYERS,
    "num_decoder_layers": 3,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OWN: dict[str, dict[str, Any]] = {
    "albert": _PLAIN | {"embedding_size": 32},
    "bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    "codegen": _GPT | {"rotary_dim": 8},
    "distilbert": {
        "dim": WIDTH,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "hidden_dim": 2 * WIDTH,
        "max_position_embeddings": POSITIONS,
    },
    "electra": _PLAIN | {"embedding_size": 32},
    "falcon": {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "ffn_hidden_size": 2 * WIDTH,
    },
    "gemma": _GROUPED | {"head_dim": 16},
    "gemma2": _GROUPED | {"head_dim": 16},
    "gemma3_text": _GROUPED | {"head_dim": 16},
    "glm": _GROUPED | {"head_dim": 16},
    "glm4": _GROUPED | {"head_dim": 16},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": POSITIONS,
    },
    "gptj": _GPT | {"rotary_dim": 8},
    "mixtral": _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS},
    "mt5": _T5,
    "opt": _PLAIN | {"ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH},
    "qwen2_moe": _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3": _GROUPED | {"head_dim": 16},
    "qwen3_moe": _GROUPED | _EXPERTS | {"head_dim": 16},
    "switch_transformers": _T5
    | {"num_experts": 4, "expert_capacity": 64, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "t5": _T5,
}


def small_config(model_type: str) -> Any:
    """The library's config of a model with LAYERS layers (and three in a decoder beside an encoder)."""
    from transformers import AutoConfig

    tasks = TASKS[model_type]
    grouped = Task.CAUSAL_LM in tasks and model_type not in ("gpt_neox", "phi")
    own = _OWN.get(model_type, _GROUPED if grouped else _PLAIN)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return AutoConfig.for_model(model_type, **own, **ids, vocab_size=VOCABULARY)


def try_family(model_type: str) -> dict[str, Any]:
    """The config as saved, the parameters of its first head, and the shape of each task's logits for [2, 9] tokens."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    heads = {
        Task.CAUSAL_LM: AutoModelForCausalLM,
        Task.SEQ2SEQ: AutoModelForSeq2SeqLM,
        Task.MASKED_LM: AutoModelForMaskedLM,
        Task.SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
        Task.TOKEN_CLASSIFICATION: AutoModelForTokenClassification,
    }
    config = small_config(model_type)
    found: dict[str, Any] = {"config": config.to_diff_dict(), "whole": config.to_dict(), "logits": {}}
    ids = torch.arange(18).reshape(2, 9) + 3
    for task, auto in heads.items():
        if task not in TASKS[model_type]:
            continue
        config = small_config(model_type)
        config.num_labels = 3
        model = auto.from_config(config).eval()
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if task is Task.SEQ2SEQ:
            given["decoder_input_ids"] = ids
        with torch.no_grad():
            found["logits"][task.value] = list(model(**given).logits.shape)
        found.setdefault("parameters", sum(p.numel() for p in model.parameters()))
    return found


def try_all() -> dict[str, dict[str, Any]]:
    """try_family for each supported model type; {"error": …} where it does not work."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for model_type in sorted(TASKS):
        try:
            found[model_type] = try_family(model_type)
        except Exception as error:
            found[model_type] = {"error": f"{type(error).__name__}: {error}"}
    return found
