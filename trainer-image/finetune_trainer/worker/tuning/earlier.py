"""An earlier adapter: to go on from, or to be measured as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from finetune_api.failures import FinetuneError
from finetune_api.runfile import RunFile
from finetune_trainer.worker.tuning.expert_lora import adapt_quantised_experts, as_if_plain
from finetune_trainer.worker.tuning.prompts import is_finished_only, loose_weights

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# What the update is multiplied by is in no weight. PEFT's name → the field that says it.
_SETTINGS = {
    "r": "tuning.lora.rank",
    "lora_alpha": "tuning.lora.alpha",
    "use_rslora": "tuning.lora.variant",
    "use_dora": "tuning.lora.variant",
    "alpha_pattern": "model.adapter.uri",
    "rank_pattern": "model.adapter.uri",
    "num_virtual_tokens": "tuning.softPrompt.virtualTokens",
    "trainable_token_indices": "model.tokenizer.addSpecialTokens",
}
# PEFT's ways to start an adapter that take its first values out of the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def continue_from(model: PeftModel, folder: Path, run: RunFile) -> None:
    """Give the new adapter of model the weights of the one in folder.

    Raises InvalidSpec unless both are of the same kind and settings, UnsafeFile for pickles, ModelUnsupported for a
    file that is broken or incomplete.
    """
    stored = _config(folder)
    own = model.active_peft_config
    if stored.get("peft_type") != own.peft_type.value:
        raise _invalid(
            f"The earlier adapter is of type {stored.get('peft_type')}, and this run trains {run.tuning.type}. Choose "
            "the tuning that it was made with.",
            "tuning.type",
        )
    if is_finished_only(model):
        raise _invalid(
            f"A finished {run.tuning.type} adapter holds the prompt but not the network that made it, so it cannot be "
            "trained on. Start without it, or use PromptTuning.",
            "model.adapter",
        )
    for name, field in _SETTINGS.items():
        wanted, found = getattr(own, name, None), stored.get(name)
        if wanted != found and (wanted or found):
            raise _invalid(
                f"The earlier adapter has {name} {found}, and this run asks for {wanted}. Set {field} to what it was "
                "made with.",
                field,
            )
    tensors = _weights(folder)
    own_weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    _require_same(tensors, {**own_weights, **loose_weights(model)}, stored)
    set_peft_model_state_dict(model, tensors)


def load_frozen(model: PreTrainedModel, folder: Path) -> PeftModel:
    """model with the adapter in folder, neither of them trainable. Raises as continue_from does."""
    stored, tensors = _config(folder), _weights(folder)
    try:
        with as_if_plain(model):
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise _broken(f"The adapter does not fit the base model: {error}") from error
    adapt_quantised_experts(adapted)
    if not adapted.active_peft_config.is_prompt_learning:
        _require_same(tensors, get_peft_model_state_dict(adapted, save_embedding_layers=False), stored)
    return adapted


def _require_same(found: dict[str, Tensor], wanted: dict[str, Tensor], stored: dict[str, Any]) -> None:
    """Raises ModelUnsupported unless every weight is there, none is left over, and all have the right shape."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    other = sorted(name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape)
    for names, what in (
        (missing, "lacks"),
        (extra, "has, but this run does not know,"),
        (other, "has other shapes of"),
    ):
        if names:
            targets = stored.get("target_modules")
            made = f" It was made for {', '.join(map(str, targets))}." if isinstance(targets, list) else ""
            raise _broken(
                f"The earlier adapter {what} {len(names)} weights: {', '.join(names[:3])}.{made} Base model and tuning "
                "must be those that it was made with."
            )


def _config(folder: Path) -> dict[str, Any]:
    try:
        stored = json.loads((folder / CONFIG).read_text())
        PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(f"The adapter's {CONFIG} cannot be read: {error}") from error
    start = stored.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise _broken(
            f"The adapter was started by {start}, which changes the base model's own weights, and it does not hold that "
            "change. Save it with path_initial_model_for_weight_conversion, which makes a plain LoRA adapter of it"
        )
    return dict(stored)


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("adapter_model.*"))
        if pickles:
            raise FinetuneError(
                f"The adapter has pickle weights only ({pickles[0]}), which could run code. Convert them to {WEIGHTS}.",
                failure_class="UnsafeFile",
                field="spec.model.adapter.uri",
            )
        raise _broken(f"The adapter has no {WEIGHTS}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _broken(f"The adapter's {WEIGHTS} cannot be read: {error}") from error


def _invalid(message: str, field: str) -> FinetuneError:
    return FinetuneError(message, failure_class="InvalidSpec", field=f"spec.{field}")


def _broken(message: str) -> FinetuneError:
    return FinetuneError(message, failure_class="ModelUnsupported", field="spec.model.adapter.uri")
