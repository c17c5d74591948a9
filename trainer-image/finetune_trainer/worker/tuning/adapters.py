"""The adapters: PEFT's configuration for each tuning, and the adapter on its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel

from finetune_api.failures import FinetuneError
from finetune_api.job import LoraBias, LoraVariant, SoftPromptInit, Task, TuningType
from finetune_api.runfile import RunFile, RunLora, RunSoftPrompt
from finetune_trainer.worker.experts import EXPERTS, fused_parameters, sparse_blocks
from finetune_trainer.worker.heads import fresh_modules
from finetune_trainer.worker.tuning.expert_lora import adapt_quantised_experts, as_if_plain
from finetune_trainer.worker.tuning.names import linear_names
from finetune_trainer.worker.tuning.prompts import keep_length, refuse_last_token_pooling, train_fresh

ALL_LINEAR = "all-linear"
TASK_TYPES = {
    Task.CAUSAL_LM: "CAUSAL_LM",
    Task.SEQ2SEQ: "SEQ_2_SEQ_LM",
    Task.SEQUENCE_CLASSIFICATION: "SEQ_CLS",
    Task.TOKEN_CLASSIFICATION: "TOKEN_CLS",
}
"""PEFT's word for each task; MaskedLM has none. With the last two it saves the head beside the adapter."""
FIELDS = {
    TuningType.LORA: "tuning.lora.targetModules",
    TuningType.QLORA: "tuning.lora.targetModules",
    TuningType.IA3: "tuning.ia3.targetModules",
}
_CLASSIFIED = (Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION)
_OUTPUTS = ("classifier", "score")
_BIAS = {LoraBias.NONE: "none", LoraBias.ALL: "all", LoraBias.LORA_ONLY: "lora_only"}


def attach_adapter(model: PreTrainedModel, run: RunFile, tokens: Sequence[int], tokenizer: Path) -> PeftModel:
    """A new adapter on model, by the run's tuning.

    tokens: ids whose embeddings train and are saved with the adapter. tokenizer: its folder, for prompts that start
    from a text. Raises InvalidSpec for what this model cannot take.
    """
    kind = run.tuning.type
    try:
        config = _BUILDERS[kind](model, run, tokens, tokenizer)
        config.task_type = TASK_TYPES.get(run.model.task)
        with as_if_plain(model):
            adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise FinetuneError(
            f"{kind} cannot be put on this model: {error}. Its linear layers are {', '.join(linear_names(model))}.",
            failure_class="InvalidSpec",
            field=f"spec.{FIELDS.get(kind, 'tuning.type')}",
        ) from error
    adapt_quantised_experts(adapted)
    if config.is_prompt_learning:
        keep_length(adapted, run.model.task)
        train_fresh(adapted, fresh_modules(model))
    return adapted


def _lora(model: PreTrainedModel, run: RunFile, tokens: Sequence[int], tokenizer: Path) -> PeftConfig:
    lora = run.tuning.lora
    assert lora is not None
    targets = lora.target_modules
    _refuse_tied_head(model, [*targets, *(lora.modules_to_save or [])])
    fresh = fresh_modules(model)
    return LoraConfig(
        r=lora.rank,
        # A whole number is written as one: readers of adapter_config.json expect that.
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_all_linear(model, lora) if targets == [ALL_LINEAR] else targets,
        # What trains in full takes no update beside.
        exclude_modules=[*_OUTPUTS, *fresh] if run.model.task in _CLASSIFIED else None,
        target_parameters=_expert_targets(model, lora),
        trainable_token_indices=_token_indices(model, tokens),
        bias=_BIAS[lora.bias],
        modules_to_save=[*(lora.modules_to_save or []), *fresh] or None,
        use_dora=lora.variant is LoraVariant.DORA,
        use_rslora=lora.variant is LoraVariant.RS_LORA,
    )


def _all_linear(model: PreTrainedModel, lora: RunLora) -> str | list[str]:
    """PEFT's word, or the names where that word would take in fused experts, which only lora.experts asks for."""
    if lora.experts or not any(True for _ in fused_parameters(model)):
        return ALL_LINEAR
    head = model.get_output_embeddings()
    outputs = {name.rpartition(".")[2] for name, module in model.named_modules() if module is head}
    return [name for name in linear_names(model) if name not in outputs]


def _expert_targets(model: PreTrainedModel, lora: RunLora) -> list[str] | None:
    """The fused weights of the experts by the end of their names; None where linear layers hold them."""
    if not lora.experts:
        return None
    if not sparse_blocks(model):
        raise FinetuneError(
            "lora.experts needs a mixture of experts, and this model has no experts. Leave it out.",
            failure_class="InvalidSpec",
            field="spec.tuning.lora.experts",
        )
    names = sorted({f"{EXPERTS}.{name}" for _, name, _ in fused_parameters(model)})
    if names and (lora.dropout > 0 or lora.variant is LoraVariant.DORA):
        raise FinetuneError(
            "Experts that are held in one weight cannot be adapted with dropout or by DoRA. Set lora.dropout to 0 and "
            "variant to Standard or RsLoRA, or leave out lora.experts.",
            failure_class="InvalidSpec",
            field="spec.tuning.lora.experts",
        )
    return names or None


def _token_indices(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """The rows of the embeddings that train, and those of an output layer that is not tied to them."""
    if not tokens:
        return None
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    separate = head is not None and head.weight is not inputs.weight
    layers = [inputs, head] if separate else [inputs]
    names = [next(name for name, m in model.named_modules() if m is layer) for layer in layers]
    return {name.rpartition(".")[2]: list(tokens) for name in names}


def _refuse_tied_head(model: PreTrainedModel, names: list[str]) -> None:
    """A merged adapter on a tied head would change the input embeddings too."""
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not inputs.weight:
        return
    tied = {name.rpartition(".")[2] for name, module in model.named_modules() if module is head or module is inputs}
    asked = sorted(name for name in names if name.rpartition(".")[2] in tied)
    if asked:
        raise FinetuneError(
            f"{', '.join(asked)} shares its weights with the embeddings in this model; an adapter on it cannot be "
            "merged. Leave it out, or use all-linear.",
            failure_class="InvalidSpec",
            field="spec.tuning.lora.targetModules",
        )


def _ia3(model: PreTrainedModel, run: RunFile, tokens: Sequence[int], tokenizer: Path) -> PeftConfig:
    ia3 = run.tuning.ia3
    return IA3Config(
        target_modules=ia3.target_modules if ia3 else None,
        feedforward_modules=ia3.feedforward_modules if ia3 else None,
        modules_to_save=[*fresh_modules(model)] or None,
    )


def _soft(run: RunFile) -> RunSoftPrompt:
    assert run.tuning.soft_prompt is not None
    if run.model.task is Task.MASKED_LM:
        raise FinetuneError(
            f"{run.tuning.type} does not work with task MaskedLM; use LoRA or Full.",
            failure_class="InvalidSpec",
            field="spec.tuning.type",
        )
    return run.tuning.soft_prompt


def _prompt_tuning(model: PreTrainedModel, run: RunFile, tokens: Sequence[int], tokenizer: Path) -> PeftConfig:
    soft = _soft(run)
    refuse_last_token_pooling(model, run)
    if soft.init is not SoftPromptInit.TEXT:
        return PromptTuningConfig(num_virtual_tokens=soft.virtual_tokens)
    return PromptTuningConfig(
        num_virtual_tokens=soft.virtual_tokens,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=soft.init_text,
        tokenizer_name_or_path=str(tokenizer),
        tokenizer_kwargs={"local_files_only": True, "trust_remote_code": False},
    )


def _p_tuning(model: PreTrainedModel, run: RunFile, tokens: Sequence[int], tokenizer: Path) -> PeftConfig:
    refuse_last_token_pooling(model, run)
    return PromptEncoderConfig(num_virtual_tokens=_soft(run).virtual_tokens)


def _prefix_tuning(model: PreTrainedModel, run: RunFile, tokens: Sequence[int], tokenizer: Path) -> PeftConfig:
    soft = _soft(run)
    return PrefixTuningConfig(
        num_virtual_tokens=soft.virtual_tokens, prefix_projection=soft.projection, **_falcon_heads(model)
    )


def _falcon_heads(model: PreTrainedModel) -> dict[str, int]:
    """Falcon says in words of its own how many heads its cache has; PEFT would take one for each query head."""
    config = model.config
    if config.model_type != "falcon":
        return {}
    if config.new_decoder_architecture:
        heads = config.num_kv_heads
    else:
        heads = 1 if config.multi_query else config.num_attention_heads
    return {"num_attention_heads": heads, "token_dim": heads * (config.hidden_size // config.num_attention_heads)}


_BUILDERS: Mapping[TuningType, Callable[[PreTrainedModel, RunFile, Sequence[int], Path], PeftConfig]] = {
    TuningType.LORA: _lora,
    TuningType.QLORA: _lora,
    TuningType.IA3: _ia3,
    TuningType.PROMPT_TUNING: _prompt_tuning,
    TuningType.P_TUNING: _p_tuning,
    TuningType.PREFIX_TUNING: _prefix_tuning,
}
