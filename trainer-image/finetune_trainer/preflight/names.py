"""Whether the names that a job's tuning uses are names of its model, as far as the headers of the weight files tell.

The library's names are not quite the files': it adds or drops the prefix of the base model, fuses experts, makes heads,
and ties weights. A name is refused only where none of that could make it right; the trainer has the last word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from finetune_api.failures import FinetuneError
from finetune_api.runfile import PreflightFile
from finetune_trainer.sources.inspect import weight_names
from finetune_trainer.sources.names import closest, unmatched
from finetune_trainer.sources.place import Place

_ALL_LINEAR = ["all-linear"]
_PREFIXES = ("model.", "transformer.", "roberta.", "deberta.")
"""Of base models in larger ones; that of every other family is its model_type."""
_RENAMED = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    (".block_sparse_moe.", ".mlp."),
)
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")
# What a file may lack: heads that training makes, and weights that are tied to another one.
_UNSTORED = tuple(
    f"{module}.{part}"
    for module in (
        *("classifier", "classifier.dense", "classifier.out_proj", "pre_classifier", "score"),
        *("head.dense", "head.norm", "pooler", "pooler.dense"),
        *("decoder", "decoder.embed_tokens", "encoder.embed_tokens"),
        *("lm_head", "lm_head.decoder", "lm_head.dense", "lm_head.layer_norm"),
        *("cls.predictions", "cls.predictions.decoder"),
        *("cls.predictions.transform.LayerNorm", "cls.predictions.transform.dense"),
        *("generator_lm_head", "generator_predictions.LayerNorm", "generator_predictions.dense"),
        *("lm_predictions.lm_head", "lm_predictions.lm_head.LayerNorm", "lm_predictions.lm_head.dense"),
        *("predictions.LayerNorm", "predictions.decoder", "predictions.dense"),
        *("vocab_layer_norm", "vocab_projector", "vocab_transform"),
    )
    for part in ("weight", "bias")
)


def check_names(file: PreflightFile, place: Place, model_type: str) -> None:
    """Raises InvalidSpec for a layer or pattern of the tuning that no weight of the model at place has."""
    lora, ia3, full = file.lora, file.ia3, file.full
    # Experts that are one weight take an adapter beside the layers, which may then be none.
    layers = lora.target_modules if lora is not None and not lora.experts else None
    targets = {"lora": None if layers == _ALL_LINEAR else layers, "ia3": ia3.target_modules if ia3 else None}
    patterns = {"freeze": full.freeze if full else None, "trainable": full.trainable if full else None}
    if not any((*targets.values(), *patterns.values())):
        return
    stored = weight_names(place)
    names = set(_as_loaded((*stored, *_UNSTORED), model_type))
    for kind, modules in targets.items():
        if modules:
            _check_targets(modules, names, stored, f"tuning.{kind}.targetModules")
    for setting, wanted in patterns.items():
        for pattern in wanted or []:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise unmatched(pattern, stored, field=f"tuning.full.{setting}")


def _as_loaded(stored: Iterable[str], model_type: str) -> Iterator[str]:
    """All names under which the library may hold what the files call so."""
    for name in stored:
        newer = name
        for old, new in _RENAMED:
            newer = newer.replace(old, new)
        fused = _EXPERT.match(newer)
        own = [f"{fused[1]}.gate_up_proj", f"{fused[1]}.down_proj"] if fused else []
        for form in (name, newer, newer.partition(".")[2], *own):
            yield form
            yield from (f"{prefix}{form}" for prefix in (*_PREFIXES, f"{model_type}."))


def _check_targets(modules: list[str], names: set[str], stored: list[str], field: str) -> None:
    """PEFT takes a list of which any is the whole name of a layer or its end."""
    ends = tuple(f".{module}" for module in modules)
    if any(f".{name.rpartition('.')[0]}".endswith(ends) for name in names):
        return
    layers = sorted({name.rpartition(".")[0] for name in stored if name.endswith(".weight")})
    raise FinetuneError(
        f"No layer of this model is called {' or '.join(modules)[:400]}. Close are: {closest(modules[0], layers)}. "
        "Correct the names, or use all-linear.",
        failure_class="InvalidSpec",
        field=f"spec.{field}",
    )
