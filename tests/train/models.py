"""Tiny base models and tokenizers, built from configs: real architectures, random weights, no download.

`tiny_model(...)` gives a folder like one from the hub: config.json, model.safetensors, tokenizer.json and
tokenizer_config.json. Each combination is made once per test process.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MASK = "<mask>"
ENCODERS = ("bert", "modernbert")
SEQ2SEQ = ("t5", "switch_transformers")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "switch_transformers")
FAMILIES = (
    "llama",
    "gpt2",
    "gpt_neox",
    "qwen2",
    "glm",
    "glm4",
    "falcon",
    "bloom",
    "opt",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "bert",
    "modernbert",
    "t5",
    "switch_transformers",
)
_CORPUS = [
    "The capital of France is Paris.",
    "The capital of Italy is Rome.",
    "What is the capital of Spain? Madrid.",
    "Question: what colour is the sky? Answer: blue.",
    "Question: how many legs has a spider? Answer: eight.",
    "hello world",
    "A tiny model learns a tiny task quickly.",
]


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="finetune-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def tiny_model(
    family: str = "llama",
    *,
    chat_template: bool = False,
    dtype: str = "float32",
    width: int = 32,
    layers: int = 2,
    vocabulary: int = 320,
    tied: bool = False,
    spread: float = 0.02,
    positions: int = 128,
    labels: tuple[str, ...] = (),
    tags: tuple[str, ...] = (),
    dropout: float = 0.1,
    seed: int = 0,
) -> Path:
    """A folder with a random model of family and its tokenizer; the weights depend on the arguments only.

    vocabulary: size of the embeddings, at least 320 (the tokenizer has 320 tokens at most). spread: standard deviation of
    the random weights; 0.2 gives the frozen head enough range for an adapter to learn. labels: names of classes; with
    them the model is saved with a head that classifies texts, with tags with one that tags words. dropout: of gpt2.
    """
    import torch

    made_of = (
        family,
        chat_template,
        dtype,
        width,
        layers,
        vocabulary,
        tied,
        spread,
        positions,
        *labels,
        *tags,
        dropout,
        seed,
    )
    folder = _root() / "-".join(map(str, made_of))
    write_tokenizer(folder, chat_template=chat_template, mask=family in ENCODERS)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = _config(family, width, layers, vocabulary, tied, spread, positions, dropout)
    if names := labels or tags:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    model = _auto(family, classifies=bool(labels), tags=bool(tags)).from_config(config)
    torch.random.set_rng_state(state)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, *, chat_template: bool = False, mask: bool = False) -> None:
    """Write a byte-level BPE tokenizer of at most 320 tokens that can spell any text; ids 0, 1, 2 are BOS, EOS, PAD.

    mask: with a mask token of id 3, for encoders.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=[BOS, EOS, PAD, *([MASK] if mask else [])],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 128,
    }
    if mask:
        config |= {"mask_token": MASK, "cls_token": BOS, "sep_token": EOS}
    if chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _config(
    family: str, width: int, layers: int, vocabulary: int, tied: bool, spread: float, positions: int, dropout: float
):
    """The family's config with the family's own names for width and depth."""
    from transformers import AutoConfig

    shared = {
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": tied,
        "initializer_range": spread,
    }
    plain = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": positions,
    }
    grouped = {**plain, "num_key_value_heads": 1}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": width, "shared_expert_intermediate_size": width}
    t5 = {
        "d_model": width,
        "d_ff": 2 * width,
        "d_kv": width // 2,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": 2,
        "decoder_start_token_id": 2,
        "dropout_rate": 0.0,
        "initializer_factor": spread / 0.02,
    }
    own = {
        "gpt2": {
            "n_embd": width,
            "n_layer": layers,
            "n_head": 2,
            "n_positions": positions,
            "embd_pdrop": dropout,
            "attn_pdrop": dropout,
            "resid_pdrop": dropout,
        },
        "llama": grouped,
        "qwen2": grouped,
        "glm": {**grouped, "head_dim": width // 2},
        "glm4": {**grouped, "head_dim": width // 2},
        "gpt_neox": plain,
        "falcon": {**plain, "alibi": False, "new_decoder_architecture": False, "multi_query": True},
        "bloom": {"hidden_size": width, "n_layer": layers, "n_head": 2},
        "opt": {**plain, "ffn_dim": 2 * width, "word_embed_proj_dim": width},
        "mixtral": {**grouped, "num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen2_moe": {**grouped, **experts, "num_experts": 4},
        "qwen3_moe": {**grouped, **experts, "num_experts": 4, "head_dim": width // 2},
        "bert": {**plain, "type_vocab_size": 2},
        "modernbert": {**plain, "cls_token_id": 0, "sep_token_id": 1},
        "t5": t5,
        "switch_transformers": {
            **t5,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
            "expert_capacity": 64,
        },
    }
    return AutoConfig.for_model(family, **own[family], **shared)


def _auto(family: str, *, classifies: bool, tags: bool):
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    if tags:
        return AutoModelForTokenClassification

    if classifies:
        return AutoModelForSequenceClassification
    if family in ENCODERS:
        return AutoModelForMaskedLM
    return AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM
