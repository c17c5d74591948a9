"""Which files of a place count: the ones a model or an adapter needs, and the ones that hold records."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from finetune_api.failures import FinetuneError
from finetune_api.runfile import Reference
from finetune_api.uri import parse_uri
from finetune_trainer.sources.place import Place, SourceFile, checked_name, read_whole, suffix

CONFIG = "config.json"
SINGLE_WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# An allow-list: what is not on it is never downloaded, whatever it is called.
TOKENIZER_FILES = frozenset(
    {
        TOKENIZER,
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
    }
)
SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib"})
RECORD_FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
MAX_INDEX_BYTES = 64 << 20
MAX_CARD_BYTES = 4 << 20
_SPLITS = ("train", "training", "test", "validation", "valid", "val", "dev", "eval")
_NOT_RECORDS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "readme.txt",
    "license.txt",
}


def weight_files(place: Place, *, field: str) -> tuple[SourceFile, ...]:
    """The safetensors files of a model: the shards that the index names, or model.safetensors.

    Raises FinetuneError: UnsafeFile where there are pickles only, ModelUnsupported where there are no weights,
    ModelNotFound that names a shard that is missing.
    """
    files = {file.name: file for file in place.files()}
    if INDEX in files:
        shards = _shards(place, field)
        missing = [name for name in shards if name not in files]
        if missing:
            raise FinetuneError(
                f"The model at {place.uri} is incomplete: {INDEX} names {', '.join(missing[:3])}"
                f"{' and more' if len(missing) > 3 else ''}, which is not there ({len(missing)} of {len(shards)} "
                "shards missing). Upload the missing shards.",
                failure_class="ModelNotFound",
                field=f"spec.{field}",
            )
        return tuple(files[name] for name in shards)
    if SINGLE_WEIGHTS in files:
        return (files[SINGLE_WEIGHTS],)
    pickles = sorted(name for name in files if suffix(name) in PICKLES)
    if pickles:
        raise FinetuneError(
            f"The model at {place.uri} has pickle weights only ({pickles[0]}), which can run code when they are "
            "loaded. Convert them to safetensors (save_pretrained does) or choose a revision that has them.",
            failure_class="UnsafeFile",
            field=f"spec.{field}",
        )
    raise FinetuneError(
        f"The model at {place.uri} has no weights: neither {SINGLE_WEIGHTS} nor {INDEX} is there. "
        "Upload the model as save_pretrained writes it.",
        failure_class="ModelUnsupported",
        field=f"spec.{field}",
    )


def model_files(place: Place, *, field: str) -> tuple[SourceFile, ...]:
    """All files that a run needs of a model, in the order of their names: config, weights, tokenizer.

    Raises as weight_files does, and ModelUnsupported without config.json.
    """
    index = [file for file in place.files() if file.name == INDEX]
    return tuple(sorted([*config_files(place, field=field), *index, *weight_files(place, field=field)]))


def config_files(place: Place, *, field: str) -> tuple[SourceFile, ...]:
    """What a model is made from when its weights do not count: config and tokenizer, in the order of their names.

    Raises FinetuneError(ModelUnsupported) without config.json.
    """
    found = [file for file in place.files() if file.name in {CONFIG, GENERATION} | TOKENIZER_FILES]
    if all(file.name != CONFIG for file in found):
        raise FinetuneError(
            f"{place.uri} holds no {CONFIG}, so it is not a model folder. Correct {field}, or upload the model as "
            "save_pretrained writes it.",
            failure_class="ModelUnsupported",
            field=f"spec.{field}",
        )
    return tuple(sorted(found))


def adapter_files(place: Place, *, field: str) -> tuple[SourceFile, ...]:
    """What a run needs of an adapter: its config and weights, and what was saved with it of tokenizer and model config.

    Raises FinetuneError: UnsafeFile where its weights are a pickle only, ModelUnsupported where a file is missing.
    """
    names = {file.name for file in place.files()}
    if ADAPTER_CONFIG not in names:
        whole = " It holds a whole model: name it in model.uri instead." if CONFIG in names else ""
        raise FinetuneError(
            f"{place.uri} holds no {ADAPTER_CONFIG}, so it is not an adapter's folder.{whole} Correct {field}.",
            failure_class="ModelUnsupported",
            field=f"spec.{field}",
        )
    if ADAPTER_WEIGHTS not in names:
        pickles = sorted(name for name in names if suffix(name) in PICKLES)
        if pickles:
            raise FinetuneError(
                f"The adapter at {place.uri} has its weights as a pickle only ({pickles[0]}), which can run code when "
                "it is loaded. Save it again with PEFT, which writes safetensors.",
                failure_class="UnsafeFile",
                field=f"spec.{field}",
            )
        raise FinetuneError(
            f"The adapter at {place.uri} has no weights: {ADAPTER_WEIGHTS} is not there. Upload the folder as PEFT's "
            "save_pretrained writes it.",
            failure_class="ModelUnsupported",
            field=f"spec.{field}",
        )
    wanted = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG} | TOKENIZER_FILES
    return tuple(sorted(file for file in place.files() if file.name in wanted))


def data_files(place: Place, reference: Reference, *, field: str) -> tuple[SourceFile, ...]:
    """The files with records: the file that the URI names, or all readable ones of the folder.

    For hf://datasets/… those of the wanted config and split (default `train`), as the data set's card names them, else
    by their names. Raises FinetuneError: UnsafeFile, DataInvalid for files of another kind, DataNotFound.
    """
    files = place.files()
    pickles = [file.name for file in files if suffix(file.name) in PICKLES]
    readable = [file for file in files if suffix(file.name) in RECORD_FILES and _plain(file.name)]
    if not readable:
        if pickles:
            raise FinetuneError(
                f"The data at {place.uri} is {pickles[0]}, which can run code when it is loaded. "
                "Save it as jsonl, json, csv, parquet or txt.",
                failure_class="UnsafeFile",
                field=f"spec.{field}",
            )
        raise FinetuneError(
            f"{place.uri} holds no {', '.join(RECORD_FILES)} file; it holds {_some(file.name for file in files)}. "
            "Save the data in one of these formats, with that ending.",
            failure_class="DataInvalid",
            field=f"spec.{field}",
        )
    uri = parse_uri(reference.uri, field=field)
    if not uri.dataset or (len(files) == 1 and uri.path):
        return tuple(readable)
    return _of_split(place, readable, reference, field)


def _of_split(place: Place, readable: Sequence[SourceFile], reference: Reference, field: str) -> tuple[SourceFile, ...]:
    split = reference.split or "train"
    patterns = _card_patterns(place, reference.config, split, field)
    if patterns is not None:
        chosen = [f for f in readable if any(fnmatch.fnmatchcase(f.name, p.removeprefix("./")) for p in patterns)]
    else:
        below = [f for f in readable if reference.config is None or reference.config in f.name.split("/")[:-1]]
        chosen = [f for f in below if _names(f.name, split)]
        if not chosen and reference.split is None and not any(_names(f.name, s) for f in below for s in _SPLITS):
            chosen = below
    if not chosen:
        config = f" of config {reference.config!r}" if reference.config else ""
        raise FinetuneError(
            f"{place.uri} has no file of split {split!r}{config}; it has {_some(f.name for f in readable)}. "
            "Set split and config of the source, or name the file in its uri.",
            failure_class="DataNotFound",
            field=f"spec.{field.removesuffix('uri')}split",
        )
    return tuple(chosen)


def _card_patterns(place: Place, config: str | None, split: str, field: str) -> list[str] | None:
    """The data_files patterns of the data set's card; None if the card has none."""
    if all(file.name != "README.md" for file in place.files()):
        return None
    text = read_whole(place, "README.md", MAX_CARD_BYTES, field=field).decode("utf-8", "replace")
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        card = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return None
    configs = card.get("configs") if isinstance(card, dict) else None
    if not isinstance(configs, list):
        return None
    named = [entry for entry in configs if isinstance(entry, dict) and "data_files" in entry]
    wanted = config or ("default" if any(e.get("config_name") == "default" for e in named) else None)
    for entry in named:
        if wanted is None or entry.get("config_name") == wanted:
            return _patterns(entry["data_files"], split)
    return None


def _patterns(data_files: Any, split: str) -> list[str]:
    if isinstance(data_files, str):
        return [data_files] if split == "train" else []
    if not isinstance(data_files, list):
        return []
    found: list[str] = []
    for entry in data_files:
        if isinstance(entry, str) and split == "train":
            found.append(entry)
        elif isinstance(entry, dict) and entry.get("split") == split:
            path = entry.get("path")
            found += [path] if isinstance(path, str) else [p for p in path or [] if isinstance(p, str)]
    return found


def _shards(place: Place, field: str) -> list[str]:
    try:
        index = json.loads(read_whole(place, INDEX, MAX_INDEX_BYTES, field=field))
        names = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        names = []
    if not names or not all(isinstance(name, str) for name in names):
        raise FinetuneError(
            f"{place.uri}: {INDEX} is not a weight index (no weight_map). Upload the file again.",
            failure_class="ModelUnsupported",
            field=f"spec.{field}",
        )
    for name in names:
        checked_name(name, place.uri, field)
        if suffix(name) != ".safetensors":
            raise FinetuneError(
                f"{place.uri}: {INDEX} names {name[:80]!r}, which is not a safetensors file. Convert the weights.",
                failure_class="UnsafeFile",
                field=f"spec.{field}",
            )
    return names


def _plain(name: str) -> bool:
    last = name.rsplit("/", 1)[-1]
    return not last.startswith((".", "_")) and last.lower() not in _NOT_RECORDS


def _names(name: str, split: str) -> bool:
    return re.search(rf"(^|[/._-]){re.escape(split)}([/._-]|$)", name) is not None


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
