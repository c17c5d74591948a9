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
FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen2")
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
    seed: int = 0,
) -> Path:
    """A folder with a random model of family and its tokenizer; the weights depend on the arguments only.

    vocabulary: size of the embeddings, at least 320 (the tokenizer has 320 tokens at most). spread: standard deviation of
    the random weights; 0.2 gives the frozen head enough range for an adapter to learn.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = _root() / f"{family}-{chat_template}-{dtype}-{width}-{layers}-{vocabulary}-{tied}-{spread}-{seed}"
    write_tokenizer(folder, chat_template=chat_template)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family, width, layers, vocabulary, tied, spread))
    torch.random.set_rng_state(state)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, *, chat_template: bool = False) -> None:
    """Write a byte-level BPE tokenizer of at most 320 tokens that can spell any text; ids 0, 1, 2 are BOS, EOS, PAD."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=[BOS, EOS, PAD],
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
    if chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _config(family: str, width: int, layers: int, vocabulary: int, tied: bool, spread: float):
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

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
        "max_position_embeddings": 128,
    }
    if family == "gpt2":
        return GPT2Config(n_embd=width, n_layer=layers, n_head=2, n_positions=128, **shared)
    configs = {"llama": LlamaConfig, "gpt_neox": GPTNeoXConfig, "qwen2": Qwen2Config}
    grouped = {} if family == "gpt_neox" else {"num_key_value_heads": 1}
    return configs[family](**plain, **grouped, **shared)
