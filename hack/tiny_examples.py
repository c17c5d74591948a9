"""Models and data of examples/tiny: `python -m hack.tiny_examples [FOLDER]`, by default /tmp/finetune-tiny.

The models are random, small and of the same architectures as the real ones; nothing is downloaded.
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
    "gpt2-medium": {"family": "gpt2", "width": 64, "seed": 1},
    "gpt-neox": {"family": "gpt_neox"},
    "bert": {"family": "bert"},
    "bloom": {"family": "bloom"},
    "t5": {"family": "t5"},
    "glm": {"family": "glm"},
    "falcon": {"family": "falcon"},
    "mixtral-chat": {"family": "mixtral", "chat_template": True},
    "qwen2-moe-chat": {"family": "qwen2_moe", "chat_template": True},
    "switch-transformers": {"family": "switch_transformers"},
}
CHARACTER = EXAMPLES.parent / "configs/character-gpt"


def make(folder: Path = FOLDER) -> Path:
    """Write every model and the data below folder; what is there already stays."""
    for name, options in MODELS.items():
        if not (folder / "models" / name).exists():
            shutil.copytree(tiny_model(**options, positions=256), folder / "models" / name)
    quantised = folder / "models/llama-chat-bnb-4bit"
    if not quantised.exists():
        _quantise(folder / "models/llama-chat", quantised)
    shutil.copytree(CHARACTER, folder / "models/character-gpt", dirs_exist_ok=True)
    shutil.copytree(EXAMPLES / "data", folder / "data", dirs_exist_ok=True)
    return folder


def _quantise(base: Path, target: Path) -> None:
    """The same model with files that hold its weights in 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    shutil.copytree(base, target)
    model.save_pretrained(target)


if __name__ == "__main__":
    print(make(*map(Path, sys.argv[1:2])))
