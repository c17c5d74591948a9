"""Which models can be tuned for which task, and their shape as config.json tells it. Shared by preflight and worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_api.job import ObjectiveType, Task, TuningType

_DECODER = frozenset({Task.CAUSAL_LM})
_RANKER = _DECODER | {Task.SEQUENCE_CLASSIFICATION}
_TAGGER = _RANKER | {Task.TOKEN_CLASSIFICATION}
_ENCODER = frozenset({Task.MASKED_LM, Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION})
_SEQ2SEQ = frozenset({Task.SEQ2SEQ})

TASKS: dict[str, frozenset[Task]] = {
    "albert": _ENCODER,
    "bert": _ENCODER,
    "bloom": _TAGGER,
    "camembert": _ENCODER,
    "codegen": _DECODER,
    "cohere": _DECODER,
    "deberta": _ENCODER,
    "deberta-v2": _ENCODER,
    "distilbert": _ENCODER,
    "electra": _ENCODER,
    "falcon": _TAGGER,
    "gemma": _TAGGER,
    "gemma2": _TAGGER,
    "gemma3_text": _RANKER,
    "glm": _TAGGER,
    "glm4": _TAGGER,
    "gpt2": _TAGGER,
    "gpt_bigcode": _TAGGER,
    "gpt_neo": _TAGGER,
    "gpt_neox": _TAGGER,
    "gptj": _RANKER,
    "granite": _DECODER,
    "llama": _TAGGER,
    "mistral": _TAGGER,
    "mixtral": _TAGGER,
    "modernbert": _ENCODER,
    "mpnet": _ENCODER,
    "mpt": _TAGGER,
    "mt5": _SEQ2SEQ,
    "olmo": _RANKER,
    "olmo2": _RANKER,
    "opt": _RANKER,
    "phi": _TAGGER,
    "phi3": _TAGGER,
    "qwen2": _TAGGER,
    "qwen2_moe": _TAGGER,
    "qwen3": _TAGGER,
    "qwen3_moe": _TAGGER,
    "roberta": _ENCODER,
    "smollm3": _TAGGER,
    "stablelm": _TAGGER,
    "starcoder2": _TAGGER,
    "switch_transformers": _SEQ2SEQ,
    "t5": _SEQ2SEQ,
    "xlm-roberta": _ENCODER,
}
"""transformers' model_type → the tasks for which the library itself has a head, without code of the repository."""

MIXTURES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "switch_transformers"})

# What the class of config.architectures ends with if its weights hold the head of a task. A classifier's head is made
# anew where there is none, so any class of the family will do.
_HEADS: dict[Task, tuple[str, ...]] = {
    Task.CAUSAL_LM: ("ForCausalLM", "LMHeadModel"),
    Task.SEQ2SEQ: ("ForConditionalGeneration", "WithLMHeadModel"),
    Task.MASKED_LM: ("ForMaskedLM", "WithLMHeadModel", "ForPreTraining"),
}
_REMOTE_ONLY = {
    "chatglm": "ChatGLM runs code of its repository, which is never loaded; choose a model of type glm or glm4, such as "
    "hf://zai-org/glm-4-9b-chat-hf",
    "RefinedWeb": "this revision runs code of its repository, which is never loaded; choose a revision of type falcon",
    "RefinedWebModel": "this revision runs code of its repository, which is never loaded; choose a revision of type "
    "falcon",
}
# Families whose head is the embedding again unless config.json says otherwise.
_TIED = frozenset(
    {
        "bloom",
        "cohere",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "mpt",
        "opt",
        "smollm3",
        "starcoder2",
        "switch_transformers",
        "t5",
    }
)
# Learned positions begin after the padding token's, so that many fewer are usable.
_POSITIONS_AFTER_PADDING = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})
# Positions are relative, and sequences may be longer than the ones that the model was made from.
_UNBOUNDED = frozenset({"mt5", "switch_transformers", "t5"})

# The same size has another name in some families.
_HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed", "dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_MAX_NAME = 80
_EXPERTS = ("num_local_experts", "num_experts")
# Of Mixtral the width of an expert is that of the feed-forward; Switch, which has neither name, has d_ff.
_EXPERT_SIZE = ("moe_intermediate_size", "intermediate_size")


@dataclass(frozen=True)
class ModelShape:
    """Sizes that the planner needs.

    layers: of encoder and decoder together. max_positions: longest sequence in tokens, None where the model has no
    limit. experts: of each layer of a mixture, with those that a token passes through, the inner width of one where
    they are held in one weight, and that of the shared one. encoder: whether it has one. quantization: how the weights
    are quantised already.
    """

    hidden_size: int
    layers: int
    vocabulary_size: int
    max_positions: int | None
    experts: int | None = None
    experts_per_token: int | None = None
    expert_size: int | None = None
    shared_expert_size: int | None = None
    encoder: bool = False
    quantization: str | None = None


def check_architecture(
    config: Mapping[str, Any],
    *,
    task: Task = Task.CAUSAL_LM,
    objective: ObjectiveType = ObjectiveType.SUPERVISED,
    tuning: TuningType | None = TuningType.LORA,
    field: str = "model.uri",
) -> None:
    """Returns if this release can use a model with this config so, else raises FinetuneError(ModelUnsupported).

    tuning: None for a model that only computes: one that is evaluated, a teacher, a reward model.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise _unsupported("config.json has no model_type", field)
    if model_type in _REMOTE_ONLY:
        raise _unsupported(_REMOTE_ONLY[model_type], field)
    _check_task(model_type, task, field)
    if objective is ObjectiveType.PRETRAIN:
        if quantization_of(config) is not None:
            raise _unsupported("its config says that the weights are quantised; Pretrain makes new ones", field)
        return
    architecture = architecture_of(config)
    heads = _HEADS.get(task)
    bare = architecture is not None and architecture.endswith("Model") and is_tied(config)
    if heads is not None and architecture is not None and not bare and not architecture.endswith(heads):
        raise _unsupported(f"{architecture} has no head for {task.value}; a fresh one would know nothing", field)
    _check_quantization(config, tuning, field)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding again, so that a model without a head lacks nothing."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") in _TIED))


def _check_task(model_type: str, task: Task, field: str) -> None:
    tasks = TASKS.get(model_type)
    if tasks is None:
        known = sorted(name for name, of in TASKS.items() if task in of)
        raise _unsupported(
            f"model type {model_type!r} is not supported; supported for {task.value} are {', '.join(known)}", field
        )
    if task not in tasks:
        raise FinetuneError(
            f"A model of type {model_type} cannot be used with model.task {task.value}; it fits "
            f"{' and '.join(sorted(tasks))}. Set model.task, or choose another model.",
            failure_class="ModelUnsupported",
            field=f"spec.{field.removesuffix('uri')}task",
        )


def _check_quantization(config: Mapping[str, Any], tuning: TuningType | None, field: str) -> None:
    method = quantization_of(config)
    if method is None:
        return
    if method != "bitsandbytes":
        raise _unsupported(
            f"its weights are quantised by {method}, whose kernels the trainer image does not have; choose the 16-bit "
            "model, and tuning.type: QLoRA to hold it in 4 bits",
            field,
        )
    if tuning is TuningType.FULL:
        raise _unsupported(
            "its weights are quantised already, so they cannot change; choose an adapter, or the 16-bit model", field
        )


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """How the stored weights are quantised: gptq, awq, bitsandbytes, …; None where they are not."""
    given = config.get("quantization_config")
    if not isinstance(given, Mapping) or not given:
        return None
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method or "an unknown method")[:_MAX_NAME]


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The first class name of config's architectures, cut to a length that no class of the library has."""
    names = config.get("architectures")
    return names[0][:_MAX_NAME] if isinstance(names, list) and names and isinstance(names[0], str) else None


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's labels in the order of their numbers; two without names where config gives none.

    transformers writes no id2label for two labels without names.
    """
    given = config.get("id2label")
    if not isinstance(given, Mapping):
        count = config.get("num_labels")
        return tuple(f"LABEL_{number}" for number in range(count if type(count) is int and 0 < count < 10**6 else 2))
    try:
        numbered = sorted((int(number), str(name)) for number, name in given.items())
    except ValueError:
        return ()
    return tuple(name for _, name in numbered)


def model_shape(config: Mapping[str, Any], *, field: str = "model.uri") -> ModelShape:
    """The sizes in config; raises FinetuneError(ModelUnsupported) that names the one that is missing."""
    model_type = config.get("model_type")
    tasks = TASKS.get(str(model_type), frozenset())
    mixture = model_type in MIXTURES
    width = _size(config, _HIDDEN, field)
    layers = _size(config, _LAYERS, field)
    if Task.SEQ2SEQ in tasks:
        layers += first_size(config, ("num_decoder_layers",)) or layers
    return ModelShape(
        hidden_size=width,
        layers=layers,
        vocabulary_size=_size(config, ("vocab_size",), field),
        max_positions=_positions(config, str(model_type)),
        experts=first_size(config, _EXPERTS) if mixture else None,
        experts_per_token=first_size(config, ("num_experts_per_tok",)) if mixture else None,
        expert_size=first_size(config, _EXPERT_SIZE) if mixture else None,
        shared_expert_size=first_size(config, ("shared_expert_intermediate_size",)) if mixture else None,
        encoder=Task.CAUSAL_LM not in tasks,
        quantization=quantization_of(config),
    )


def _positions(config: Mapping[str, Any], model_type: str) -> int | None:
    positions = first_size(config, _POSITIONS)
    if model_type in _UNBOUNDED or positions is None:
        return None
    if model_type not in _POSITIONS_AFTER_PADDING:
        return positions
    padding = config.get("pad_token_id")
    return positions - (padding if type(padding) is int else 1) - 1


def _size(config: Mapping[str, Any], names: tuple[str, ...], field: str) -> int:
    value = first_size(config, names)
    if value is None:
        raise _unsupported(f"config.json has no {names[0]}", field)
    return value


def first_size(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of the fields that is a whole number above 0."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _unsupported(why: str, field: str) -> FinetuneError:
    word = "base model" if field == "model.uri" else "model"
    return FinetuneError(f"The {word} cannot be used: {why}.", failure_class="ModelUnsupported", field=f"spec.{field}")
