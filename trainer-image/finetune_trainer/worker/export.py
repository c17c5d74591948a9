"""The artifact: an adapter or a model that the stock libraries load plainly, with tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig

from finetune_api.job import Precision, TuningType
from finetune_api.runfile import RunFile
from finetune_api.uri import parse_uri
from finetune_trainer.agent.workdir import write_whole
from finetune_trainer.worker.loading import load_base, weight_type

# What makes up a tokenizer and a model's way of generating; copied as they are, so that users get what was trained with.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def gathered_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The weights to save, on the host; None when the model holds them itself. Every rank calls it.

    Under ZeRO-3 each rank holds a share only: parameters are gathered one at a time (of an adapter's model only what
    trains). Plain saving would write empty tensors.
    """
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return None
    from deepspeed import zero

    state: dict[str, Tensor] = {}
    adapter_only = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if adapter_only and not parameter.requires_grad:
            continue
        with zero.GatheredParameters([parameter]):
            state[name] = parameter.detach().cpu().clone()
    return state


def base_name(run: RunFile) -> str:
    """How the base is named in the adapter: owner/name on the hub, a path of a local run, else its URI.

    The stock libraries resolve the first two by themselves; for s3:// and pvc:// the user loads the base first.
    """
    uri = parse_uri(run.model.source.uri, field="model.uri")
    return {"hf": uri.container, "file": uri.path}.get(uri.scheme, str(uri))


def export_adapter(model: PeftModel, state: dict[str, Tensor] | None, folder: Path, run: RunFile, base: Path) -> None:
    """Write the adapter to folder: PeftModel.from_pretrained(base_model, folder) loads it."""
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_name(run)
    config["revision"] = run.model.source.revision
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_whole(folder / "README.md", _adapter_card(run))
    copy_companions(base, folder)


def export_model(model: Any, state: dict[str, Tensor] | None, folder: Path, run: RunFile, base: Path) -> None:
    """Write the whole model to folder: AutoModelForCausalLM.from_pretrained(folder) loads it.

    Its number format is the base's own, unless the run asked for FP32. The model is not for training after this.
    """
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    stored = config.dtype or torch.float32
    dtype = torch.float32 if run.hyperparameters.precision is Precision.FP32 else stored
    if state is None:
        model.to(dtype)
    else:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.config.use_cache = getattr(config, "use_cache", True)
    model.config.dtype = dtype
    model.save_pretrained(str(folder), state_dict=state)
    copy_companions(base, folder)


def export_merged(adapter: Path, folder: Path, run: RunFile, base: Path) -> None:
    """Write base and adapter as one model. A quantised base is dequantised first: merging into 4 bit drifts.

    Base and adapter are read from their files again, so that what is merged is what was published.
    """
    if run.hyperparameters.zero_stage == 3:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else the base would be sharded again
    model: Any = load_base(base, run, dtype=weight_type(run))
    if run.tuning.type is TuningType.QLORA:
        model = model.dequantize(weight_type(run))
    use_cache = getattr(model.config, "use_cache", True)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.config.use_cache = use_cache
    merged.save_pretrained(str(folder))
    copy_companions(base, folder)


def copy_companions(base: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings of the base as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _COMPANIONS:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def _adapter_card(run: RunFile) -> str:
    name = base_name(run)
    revision = f', revision="{run.model.source.revision}"' if run.model.source.revision else ""
    first = "" if "://" not in name else f"# the base model lies at {name}; fetch it first and give its folder\n"
    return f"""---
base_model: {json.dumps(name)}
library_name: peft
---
Adapter ({run.tuning.type}) of job {run.job.namespace}/{run.job.name}.

```python
{first}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{name if not first else "base-model"}"{revision if not first else ""})
model = PeftModel.from_pretrained(base, "adapter")
tokenizer = AutoTokenizer.from_pretrained("adapter")
```
"""
