"""Real tokenizers, trained here on a few lines, and run files for the data tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune_api.runfile import RunFile

LINES = [
    "What is the capital of France? The capital of France is Paris.",
    "<human>: How do I return an order?\n<assistant>: Use the form in your account.",
    "User: Hello there. Assistant: Good morning, how can I help?",
    "system user assistant question answer instruction output",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)


def backend(*, adds_bos: bool = False, trim_offsets: bool = True) -> Tokenizer:
    """A byte-level BPE tokenizer of 500 tokens, whose merges cross the boundary of a blank and a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 20, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


def make_tokenizer(
    *, chat_template: str | None = None, adds_bos: bool = False, pad: str = "</s>", bos: str | None = "<s>"
) -> PreTrainedTokenizerFast:
    """A transformers tokenizer; the pad token is the EOS token unless another is given."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend(adds_bos=adds_bos),
        bos_token=bos,
        eos_token="</s>",
        pad_token=pad,
        chat_template=chat_template,
    )


def run_file(*, sources: int = 1, **changes: Any) -> RunFile:
    """A run file; keyword arguments go into its dataset, max_sequence_length and seed into its hyperparameters."""
    hyperparameters = {
        "totalSteps": 1,
        "learningRate": 1e-4,
        "schedule": "Constant",
        "warmupRatio": 0,
        "weightDecay": 0,
        "microBatchSize": 1,
        "gradientAccumulation": 1,
        "maxSequenceLength": changes.pop("max_sequence_length", 512),
        "precision": "FP32",
        "optimizer": "AdamW",
        "gradientCheckpointing": False,
        "maxGradNorm": 1,
        "zeroStage": 0,
        "seed": changes.pop("seed", 7),
    }
    weights = changes.pop("weights", [None] * sources)
    dataset = {
        "sources": [{"uri": f"s3://team/d{k}", "weight": weights[k], "access": {}} for k in range(sources)],
        "format": "PromptCompletion",
        "lossOn": "Completion",
        "truncation": "Error",
        "digest": "sha256:0",
    } | changes
    return RunFile.from_json(
        {
            "job": {"name": "job", "namespace": "team-a", "uid": "u-1"},
            "model": {
                "source": {"uri": "s3://team/m", "access": {}},
                "task": "CausalLM",
                "attention": "Sdpa",
                "digest": "d",
            },
            "dataset": dataset,
            "objective": {"type": "Supervised"},
            "tuning": {"type": "Full"},
            "hyperparameters": hyperparameters,
            "evaluation": {"generation": {}},
            "checkpoint": {"keepLast": 1},
            "output": {"target": {"uri": "s3://team/o", "access": {}}, "mergeAdapter": False, "onExisting": "Fail"},
            "resources": {"pool": "cpu", "nodes": 1, "processesPerNode": 1, "accelerator": "cpu"},
        }
    )


def write_rows(inputs: Path, rows: list[dict[str, Any]], source: int | str = 0, name: str = "train.jsonl") -> Path:
    """Writes rows as jsonl where load_dataset looks for a source (or for `validation`); returns inputs."""
    folder = inputs / "data" / str(source) if isinstance(source, int) else inputs / source
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return inputs
