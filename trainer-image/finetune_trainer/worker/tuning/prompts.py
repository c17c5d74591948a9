"""Soft prompts: what they do to lengths, to pooling, and to checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune_api.failures import FinetuneError
from finetune_api.job import Task
from finetune_api.planner.tuning import BEFORE_LAST_TOKEN
from finetune_api.runfile import RunFile

OWN_STATE = "trained.safetensors"
_WRAPPED = ".modules_to_save."


def keep_length(model: PeftModel, task: Task) -> None:
    """Logits have the length of the text again: those of the virtual tokens in front are cut off.

    PEFT puts virtual tokens before the text and gives logits for both. What predicts the first token of the text goes
    with them: no loss of ours counts that token.
    """
    if task in (Task.CAUSAL_LM, Task.TOKEN_CLASSIFICATION):
        model.register_forward_hook(_cut, with_kwargs=True)


def _cut(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    text = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    if output.logits.shape[1] > text.shape[1]:
        output.logits = output.logits[:, -text.shape[1] :]
    return output


@contextmanager
def without_prompt(model: PeftModel) -> Iterator[None]:
    """A context in which model computes without its prompt. PEFT's own asks every model for a way to generate."""
    names = [name for name in ("forward", "generate") if hasattr(model.base_model, name)]
    # accelerate puts autocast round forward on the instance itself: what stands there comes back.
    own = {name: vars(model)[name] for name in names if name in vars(model)}
    for name in names:
        setattr(model, name, getattr(model.base_model, name))
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)
        for name, wrapped in own.items():
            setattr(model, name, wrapped)


def refuse_last_token_pooling(model: PreTrainedModel, run: RunFile) -> None:
    """A decoder that classifies finds a text's last token by its ids, and soft prompts hand it embeddings instead."""
    if run.model.task is Task.SEQUENCE_CLASSIFICATION and hasattr(model, "score"):
        raise FinetuneError(BEFORE_LAST_TOKEN, failure_class="InvalidSpec", field="spec.tuning.type")


def train_fresh(model: PeftModel, modules: Sequence[str]) -> None:
    """Let the modules train that the base's files lacked: PEFT's soft prompts have no place for more than an output."""
    for name in modules:
        module = model.get_base_model().get_submodule(name)
        if not isinstance(module, ModulesToSaveWrapper):
            module.requires_grad_(True)


def loose_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains beside a soft prompt and its output, by the names under which PEFT loads it from an adapter's file."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return {}
    return {n: p for n, p in _trained(model).items() if not n.startswith("prompt_encoder.") and _WRAPPED not in n}


def is_finished_only(model: nn.Module) -> bool:
    """Whether the adapter's file holds the finished prompt but not the network behind it: PTuning, projected prefixes."""
    if not isinstance(model, PeftModel):
        return False
    config = model.active_peft_config
    return config.peft_type is PeftType.P_TUNING or bool(getattr(config, "prefix_projection", False))


def needs_own_state(model: nn.Module) -> bool:
    """Whether more trains than the library writes into a checkpoint."""
    return is_finished_only(model) or bool(loose_weights(model))


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """All that trains, for the checkpoint; without it a resumed run would go on from another prompt."""
    assert isinstance(model, PeftModel)
    return {name: tensor.detach().contiguous() for name, tensor in _trained(model).items()}


def load_own_state(model: nn.Module, folder: Path) -> None:
    """Take up what own_state gave; raises CheckpointInvalid if it does not fit."""
    assert isinstance(model, PeftModel)
    path, wanted = folder / OWN_STATE, _trained(model)
    stored = load_file(path) if path.is_file() else {}
    if {n: t.shape for n, t in stored.items()} != {n: p.shape for n, p in wanted.items()}:
        raise FinetuneError(
            f"The restored checkpoint cannot be used: its {OWN_STATE} does not fit the model.",
            failure_class="CheckpointInvalid",
        )
    for name, parameter in wanted.items():
        parameter.data.copy_(stored[name])


def _trained(model: PeftModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
