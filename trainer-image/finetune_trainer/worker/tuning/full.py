"""Full tuning: all parameters train, or those that patterns, the first layers or a preset name."""

from __future__ import annotations

from transformers import PreTrainedModel

from finetune_api.failures import FinetuneError
from finetune_api.job import Preset
from finetune_api.runfile import RunFull
from finetune_trainer.worker.experts import sparse_blocks
from finetune_trainer.worker.tuning.names import layer_lists, matching


def choose_trainable(model: PreTrainedModel, full: RunFull | None) -> None:
    """Exactly the chosen parameters of model require a gradient.

    trainable, firstLayers and preset each say "only these", so that several of them together leave what is in all;
    freeze takes away from the rest. Raises InvalidSpec for a choice that names nothing.
    """
    if full is None:
        return
    # A tied weight has two names, and a pattern may use either.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    chosen = set(names)
    if full.trainable is not None:
        chosen &= matching(names, full.trainable, field="tuning.full.trainable")
    if full.first_layers is not None:
        chosen &= _of_first_layers(model, full.first_layers)
    if full.preset is Preset.ROUTER_AND_EXPERTS:
        chosen &= _of_experts(model)
    frozen = matching(names, full.freeze, field="tuning.full.freeze") if full.freeze is not None else set()
    if not chosen - frozen:
        raise FinetuneError(
            "tuning.full leaves no parameter to train: its settings exclude each other.",
            failure_class="InvalidSpec",
            field="spec.tuning.full",
        )
    aliases: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), set()).add(name)
    for parameter in model.parameters():
        own = aliases[id(parameter)]
        parameter.requires_grad_(bool(own & chosen) and not own & frozen)


def _of_first_layers(model: PreTrainedModel, count: int) -> set[str]:
    config = model.config.get_text_config()
    layers = [
        f"{name}.{number}."
        for name, stack in layer_lists(model, getattr(config, "num_hidden_layers", None))
        for number in range(len(stack))
    ]
    if count > len(layers):
        raise FinetuneError(
            f"firstLayers is {count}, but this model has {len(layers)} layers. Choose at most {len(layers)}.",
            failure_class="InvalidSpec",
            field="spec.tuning.full.firstLayers",
        )
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name for name in names if name.startswith(tuple(layers[:count]))}


def _of_experts(model: PreTrainedModel) -> set[str]:
    blocks = tuple(f"{name}." for name, _ in sparse_blocks(model))
    if not blocks:
        raise FinetuneError(
            "The preset RouterAndExperts needs a mixture of experts, and this model has no experts. Use trainable or "
            "firstLayers instead.",
            failure_class="InvalidSpec",
            field="spec.tuning.full.preset",
        )
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(blocks)}
