"""Models and data of examples/tiny: `python -m hack.tiny_examples [FOLDER]`, by default /tmp/finetune-tiny.

The models are random, two layers deep and of the same architectures as the real ones; nothing is downloaded.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from tests.train.models import tiny_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "tiny"
FOLDER = Path("/tmp/finetune-tiny")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-chat": {"family": "llama", "chat_template": True},
    "llama-chat-teacher": {"family": "llama", "chat_template": True, "width": 64, "seed": 1},
    "gpt2": {"family": "gpt2"},
    "gpt2-character": {"family": "gpt2", "layers": 2},
    "gpt-neox": {"family": "gpt_neox"},
    "bert": {"family": "bert"},
    "bloom": {"family": "bloom"},
    "t5": {"family": "t5"},
    "falcon": {"family": "falcon"},
    "mixtral-chat": {"family": "mixtral", "chat_template": True},
    "qwen2-moe-chat": {"family": "qwen2_moe", "chat_template": True},
    "switch-transformers": {"family": "switch_transformers"},
}
SENTIMENT = ("negative", "positive")


def make(folder: Path = FOLDER) -> Path:
    """Write every model and the data below folder; what is there already stays."""
    for name, options in MODELS.items():
        if not (folder / "models" / name).exists():
            shutil.copytree(tiny_model(**options, positions=256), folder / "models" / name)
    teacher = folder / "models/gpt2-sentiment-teacher"
    if not teacher.exists():
        _classifier(folder / "models/gpt2", teacher)
    shutil.copytree(EXAMPLES / "data", folder / "data", dirs_exist_ok=True)
    return folder


def _classifier(base: Path, target: Path) -> None:
    """A classifier with a head of its own, as an earlier job would have made it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, id2label=dict(enumerate(SENTIMENT)), label2id={n: k for k, n in enumerate(SENTIMENT)}
    )
    shutil.copytree(base, target)
    model.save_pretrained(target)


if __name__ == "__main__":
    print(make(*map(Path, sys.argv[1:2])))
