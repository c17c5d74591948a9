"""What can be known of a model without its weights: shape, parameters, tokenizer, chat template."""

from __future__ import annotations

import json
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_api.status import ModelFacts
from finetune_trainer.sources.architectures import architecture_of, check_architecture, model_shape
from finetune_trainer.sources.place import Place, SourceFile, model_digest, read_whole, suffix
from finetune_trainer.sources.select import CONFIG, SLOW_TOKENIZERS, TOKENIZER, model_files

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


def inspect_model(place: Place, *, field: str = "model.uri") -> ModelFacts:
    """The facts about a model from its config and the headers of its weights.

    Raises FinetuneError: what model_files raises, and ModelUnsupported for an unsupported architecture, a broken or
    truncated weight file, or a model without tokenizer files.
    """
    files = model_files(place, field=field)
    config = read_json(place, CONFIG, field=field)
    check_architecture(config, field=field)
    shape = model_shape(config, field=field)
    names = {file.name for file in files}
    if TOKENIZER not in names and not names & set(SLOW_TOKENIZERS):
        raise _unsupported(f"{place.uri} has no tokenizer ({TOKENIZER} or tokenizer.model)", field)
    weights = [file for file in files if suffix(file.name) == ".safetensors"]
    with ThreadPoolExecutor(max_workers=8) as pool:
        parameters = sum(pool.map(lambda file: count_parameters(place, file, field=field), weights))
    return ModelFacts(
        model_type=config["model_type"],
        architecture=architecture_of(config),
        parameters=parameters,
        weight_bytes=sum(file.size for file in weights),
        hidden_size=shape.hidden_size,
        layers=shape.layers,
        vocabulary_size=shape.vocabulary_size,
        max_positions=shape.max_positions,
        has_chat_template=chat_template(place, field=field) is not None,
        digest=model_digest(files),
    )


def count_parameters(place: Place, file: SourceFile, *, field: str) -> int:
    """The number of parameters in a safetensors file, from its header; raises ModelUnsupported if it is damaged."""
    data = place.read_start(file.name, min(file.size, _FIRST_READ))
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise _damaged(place, file, "it has no safetensors header", field)
    if len(data) < 8 + length:
        data = place.read_start(file.name, 8 + length)
    try:
        header = json.loads(data[8 : 8 + length])
        tensors = [value for key, value in header.items() if key != "__metadata__"]
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
        parameters = sum(math.prod(int(size) for size in tensor["shape"]) for tensor in tensors)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise _damaged(place, file, "its safetensors header cannot be read", field) from None
    if 8 + length + end != file.size:
        raise _damaged(place, file, f"it should have {8 + length + end} bytes and has {file.size}", field)
    return parameters


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
