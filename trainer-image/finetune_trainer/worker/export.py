"""The artifact: an adapter or a model that the stock libraries load plainly, with tokenizer, chat template and card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from finetune_api.job import Precision, Task
from finetune_api.runfile import RunFile
from finetune_trainer.agent.workdir import WorkDir, write_whole
from finetune_trainer.worker.card import base_name
from finetune_trainer.worker.loading import load_tokenizer, weight_type
from finetune_trainer.worker.quantization import dequantise
from finetune_trainer.worker.tokenizers import changed_folder, end_ids
from finetune_trainer.worker.tuning.prompts import loose_weights
from finetune_trainer.worker.vocabulary import learns_tokenizer

# What makes up a tokenizer and a model's way of generating; copied as they are, so that users get what was trained with.
_TOKENIZER = (
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
)
_GENERATION = "generation_config.json"
_WEIGHTS = "adapter_model.safetensors"
LABELLED = (Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION)


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


def export_adapter(
    model: PeftModel, state: dict[str, Tensor] | None, folder: Path, run: RunFile, work: WorkDir
) -> None:
    """Write the adapter to folder: PeftModel.from_pretrained(base_model, folder) loads it.

    With labels, the model's config.json stands beside it: an adapter holds no names of classes.
    """
    if model.active_peft_config.is_prompt_learning and state is not None:
        _put_back(model, state)
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    loose = {name: parameter.detach().cpu() for name, parameter in loose_weights(model).items()}
    if loose:
        save_file({**load_file(folder / _WEIGHTS), **loose}, folder / _WEIGHTS, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_name(run)
    config["revision"] = run.model.source.revision
    if config.get("tokenizer_name_or_path"):
        config["tokenizer_name_or_path"] = base_name(run)
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if run.model.task in LABELLED:
        model.get_base_model().config.save_pretrained(folder)
    copy_companions(run, work, folder)


def export_model(model: Any, state: dict[str, Tensor] | None, folder: Path, run: RunFile, work: WorkDir) -> None:
    """Write the whole model to folder: the task's Auto class loads it with from_pretrained(folder).

    Its number format is the base's own, unless the run asked for FP32. The model is not for training after this.
    """
    config = AutoConfig.from_pretrained(work.inputs / "model", local_files_only=True, trust_remote_code=False)
    stored = config.dtype or torch.float32
    dtype = torch.float32 if run.hyperparameters.precision is Precision.FP32 else stored
    if state is None:
        model.to(dtype)
    else:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.config.use_cache = getattr(config, "use_cache", True)
    model.config.dtype = dtype
    model.save_pretrained(str(folder), state_dict=state, max_shard_size=_shard_bytes(run))
    copy_companions(run, work, folder)


def export_merged(adapter: Path, folder: Path, run: RunFile, work: WorkDir, load: Callable[[torch.dtype], Any]) -> None:
    """Write base and adapter as one model. A quantised base is dequantised first: merging into 4 bit drifts.

    Base and adapter are read from their files again, so that what is merged is what was published. load: the base for
    the run's task, in a number format.
    """
    if run.hyperparameters.zero_stage == 3:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else the base would be sharded again
    model = dequantise(load(weight_type(run)), weight_type(run))
    use_cache = getattr(model.config, "use_cache", True)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.config.use_cache = use_cache
    merged.save_pretrained(str(folder), max_shard_size=_shard_bytes(run))
    copy_companions(run, work, folder)


def _put_back(model: PeftModel, state: dict[str, Tensor]) -> None:
    """Make the prompt's own parameters whole: PEFT reads a finished prompt from them, and not from a state."""
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.data = state[name].to(parameter.device)


def _shard_bytes(run: RunFile) -> int:
    """Largest size of one weight file."""
    return int(run.output.max_shard_size_gib * 2**30)


def copy_companions(run: RunFile, work: WorkDir, folder: Path) -> None:
    """Copy the run's tokenizer, and chat template and generation settings of the base as they are.

    But a model that writes ends its texts with the tokens that it learnt, so generation settings that lack one get it.
    A tokenizer that the run changed or learnt stands for the base's. With a learnt one the base's generation settings
    are left out: their token ids are of another vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base, changed = work.inputs / "model", changed_folder(work)
    tokenizer = changed if changed.is_dir() else base
    for name in _TOKENIZER:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    if (base / _GENERATION).is_file() and not learns_tokenizer(run):
        shutil.copyfile(base / _GENERATION, folder / _GENERATION)
    if run.model.task is Task.CAUSAL_LM and (folder / _GENERATION).is_file():
        _let_stop(folder / _GENERATION, end_ids(load_tokenizer(tokenizer)))


def _let_stop(path: Path, ends: list[int]) -> None:
    """Every token that ends a learnt text ends generation too."""
    settings = json.loads(path.read_text())
    own = settings.get("eos_token_id")
    known = own if isinstance(own, list) else [] if own is None else [own]
    if not set(ends) <= set(known):
        together = list(dict.fromkeys([*known, *ends]))
        settings["eos_token_id"] = together if len(together) > 1 else together[0]
        write_whole(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
