"""What can be known of a model without its weights: shape, parameters, tokenizer, chat template."""

from __future__ import annotations

import json
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_api.job import ObjectiveType, Task, TuningType
from finetune_api.status import ModelFacts
from finetune_trainer.sources.architectures import architecture_of, check_architecture, model_shape
from finetune_trainer.sources.parameters import estimate_parameters
from finetune_trainer.sources.place import Place, SourceFile, model_digest, read_whole, suffix
from finetune_trainer.sources.select import CONFIG, SLOW_TOKENIZERS, TOKENIZER, config_files, model_files, weight_files

MAX_CONFIG_BYTES = 8 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 128 << 20
MAX_HEADER_BYTES = 25_000_000
"""Bound of a safetensors header, as huggingface_hub has it."""
_FIRST_READ = 128 << 10


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer as stored: tokenizer.json (None for a slow tokenizer only), its config and its chat template."""

    tokenizer_json: bytes | None
    config: dict[str, Any]
    chat_template: str | None


@dataclass(frozen=True)
class Use:
    """What a model is for. tuning: None for one that only computes, such as a teacher.

    learns_tokenizer: whether the run makes its own tokenizer, so that the model needs none.
    """

    task: Task = Task.CAUSAL_LM
    objective: ObjectiveType = ObjectiveType.SUPERVISED
    tuning: TuningType | None = TuningType.LORA
    learns_tokenizer: bool = False


def inspect_model(place: Place, use: Use | None = None, *, field: str = "model.uri") -> ModelFacts:
    """The facts about a model from its config and the headers of its weights; for Pretrain from its config alone.

    Raises FinetuneError: what model_files raises, and ModelUnsupported for an architecture that does not fit its use,
    a broken or truncated weight file, or a model without tokenizer files.
    """
    use = use or Use()
    fresh = use.objective is ObjectiveType.PRETRAIN
    files = (config_files if fresh else model_files)(place, field=field)
    config = read_json(place, CONFIG, field=field)
    check_architecture(config, task=use.task, objective=use.objective, tuning=use.tuning, field=field)
    shape = model_shape(config, field=field)
    names = {file.name for file in files}
    if not use.learns_tokenizer and TOKENIZER not in names and not names & set(SLOW_TOKENIZERS):
        raise _unsupported(f"{place.uri} has no tokenizer ({TOKENIZER} or tokenizer.model)", field)
    weights = [file for file in files if suffix(file.name) == ".safetensors"]
    return ModelFacts(
        model_type=config["model_type"],
        architecture=architecture_of(config),
        parameters=estimate_parameters(config) if fresh else _parameters(place, weights, field),
        weight_bytes=sum(file.size for file in weights),
        hidden_size=shape.hidden_size,
        layers=shape.layers,
        vocabulary_size=shape.vocabulary_size,
        max_positions=shape.max_positions,
        has_chat_template=chat_template(place, field=field) is not None,
        quantization=shape.quantization,
        experts=shape.experts,
        experts_per_token=shape.experts_per_token,
        expert_size=shape.expert_size,
        shared_expert_size=shape.shared_expert_size,
        encoder=shape.encoder,
        digest=model_digest(files),
    )


def _parameters(place: Place, weights: list[SourceFile], field: str) -> int:
    with ThreadPoolExecutor(max_workers=8) as pool:
        return sum(pool.map(lambda file: count_parameters(place, file, field=field), weights))


def count_parameters(place: Place, file: SourceFile, *, field: str) -> int:
    """The number of parameters in a safetensors file, from its header; raises ModelUnsupported if it is damaged.

    A byte of a weight that bitsandbytes holds in 4 bits counts as two; its constants count as none.
    """
    header, start = _header(place, file, field)
    try:
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
        parameters = sum(_size(name, tensor, tensors) for name, tensor in tensors.items())
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise _damaged(place, file, "its safetensors header cannot be read", field) from None
    if start + end != file.size:
        raise _damaged(place, file, f"it should have {start + end} bytes and has {file.size}", field)
    return parameters


def weight_names(place: Place, *, field: str = "model.uri") -> list[str]:
    """The names of a model's stored tensors, sorted, from the headers of its weights; raises as inspect_model does."""
    weights = weight_files(place, field=field)
    with ThreadPoolExecutor(max_workers=8) as pool:
        headers = pool.map(lambda file: _header(place, file, field)[0], weights)
        return sorted({name for header in headers for name in header} - {"__metadata__"})


def _header(place: Place, file: SourceFile, field: str) -> tuple[dict[str, Any], int]:
    """(header, where the data begins)."""
    data = place.read_start(file.name, min(file.size, _FIRST_READ))
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise _damaged(place, file, "it has no safetensors header", field)
    if len(data) < 8 + length:
        data = place.read_start(file.name, 8 + length)
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise _damaged(place, file, "its safetensors header cannot be read", field)
    return header, 8 + length


def _size(name: str, tensor: Any, tensors: dict[str, Any]) -> int:
    """The parameters that a stored tensor stands for."""
    weight, inner, _ = name.partition(".weight.")
    if name.endswith((".SCB", ".weight_format")) or (inner and f"{weight}.weight" in tensors):
        return 0
    elements = math.prod(int(size) for size in tensor["shape"])
    return 2 * elements if f"{name}.absmax" in tensors else elements


def read_tokenizer(place: Place, *, field: str = "model.uri") -> TokenizerFiles:
    """The tokenizer files of a model; raises FinetuneError(ModelUnsupported) if one is broken."""
    names = {file.name for file in place.files()}
    whole = read_whole(place, TOKENIZER, MAX_TOKENIZER_BYTES, field=field) if TOKENIZER in names else None
    config = read_json(place, "tokenizer_config.json", field=field) if "tokenizer_config.json" in names else {}
    return TokenizerFiles(whole, config, chat_template(place, field=field))


def chat_template(place: Place, *, field: str) -> str | None:
    """The model's chat template: of chat_template.jinja, chat_template.json or tokenizer_config.json, in that order."""
    names = {file.name for file in place.files()}
    if "chat_template.jinja" in names:
        return read_whole(place, "chat_template.jinja", MAX_TEMPLATE_BYTES, field=field).decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = read_json(place, name, field=field).get("chat_template") if name in names else None
        if isinstance(value, str):
            return value
        if isinstance(value, list):  # several templates with names; `default` is the one without tools
            named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            if isinstance(named.get("default"), str):
                return named["default"]
    return None


def read_json(place: Place, name: str, *, field: str) -> dict[str, Any]:
    """A small JSON object of a model; raises FinetuneError(ModelUnsupported) that names the line of a fault."""
    try:
        value = json.loads(read_whole(place, name, MAX_CONFIG_BYTES, field=field))
    except UnicodeDecodeError:
        raise _unsupported(f"{place.uri}: {name} is not UTF-8", field) from None
    except json.JSONDecodeError as error:
        raise _unsupported(f"{place.uri}: {name} line {error.lineno} is not valid JSON: {error.msg}", field) from None
    if not isinstance(value, dict):
        raise _unsupported(f"{place.uri}: {name} is not a JSON object", field)
    return value


def _damaged(place: Place, file: SourceFile, why: str, field: str) -> FinetuneError:
    return _unsupported(f"the weight file {file.name} at {place.uri} is damaged: {why}. Upload it again", field)


def _unsupported(why: str, field: str) -> FinetuneError:
    return FinetuneError(
        f"The base model cannot be used: {why}.", failure_class="ModelUnsupported", field=f"spec.{field}"
    )
