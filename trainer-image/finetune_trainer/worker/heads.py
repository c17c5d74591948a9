"""What stands on a base model for each task: kept where the files have it, made anew by name where they lack it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

_CLASSIFIERS = ("score.*", "classifier.*", "pre_classifier.*", "classification_head.*", "head.*")
_POOLERS = ("pooler.*", "*.pooler.*", "sequence_summary.*")
# Of the heads that language models and encoders are published with.
_LANGUAGE_HEADS = (
    "lm_head.*",
    "embed_out.*",
    "cls.*",
    "vocab_transform.*",
    "vocab_layer_norm.*",
    "vocab_projector.*",
    "lm_predictions.*",
    "mask_predictions.*",
    "generator_predictions.*",
    "generator_lm_head.*",
    "discriminator_predictions.*",
    "decoder.*",
    "qa_outputs.*",
)
_SPREAD = 0.02
_FRESH = "finetune_fresh_modules"


@dataclass(frozen=True)
class Head:
    """What stands on the base. auto: the library's class that builds it.

    new: patterns (fnmatch over whole weight names) of weights that the files need not have, because training makes
    them; every other missing weight is an error. dropped: patterns of weights that the files may have and the task has
    no use for. labels: how many outputs; None: one for each label of the data, where the task has labels.
    """

    auto: Any
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    labels: int | None = None

    @property
    def modules(self) -> list[str]:
        """Patterns (regular expressions) of the modules that a head may bring: they are never quantised."""
        names = {pattern.removesuffix(".*").rpartition(".")[2] for pattern in self.new}
        return [rf"(.*\.)?{name}" for name in sorted(names)]


CAUSAL_HEAD = Head(AutoModelForCausalLM)
MASKED_HEAD = Head(AutoModelForMaskedLM, dropped=(*_POOLERS, "cls.seq_relationship.*"))
SEQ2SEQ_HEAD = Head(AutoModelForSeq2SeqLM)
SEQUENCE_CLASSIFICATION_HEAD = Head(
    AutoModelForSequenceClassification,
    new=(*_CLASSIFIERS, *_POOLERS),
    dropped=(*_LANGUAGE_HEADS, *_CLASSIFIERS),
)
TOKEN_CLASSIFICATION_HEAD = Head(
    AutoModelForTokenClassification,
    new=_CLASSIFIERS,
    dropped=(*_LANGUAGE_HEADS, *_CLASSIFIERS, *_POOLERS),
)
REWARD_HEAD = Head(
    AutoModelForSequenceClassification, new=_CLASSIFIERS, dropped=(*_LANGUAGE_HEADS, *_CLASSIFIERS), labels=1
)


def fresh_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that the base's files lacked and this run made; the adapter has to train and save them."""
    return getattr(model, _FRESH, ())


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is that of the weight."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def name_labels(config: PretrainedConfig, head: Head, labels: Sequence[str]) -> bool:
    """Write the names of the outputs into config; returns whether the base's own head is for just these outputs.

    It is if the files hold a model of the same task whose names are equal, or as many and without names (LABEL_0, …).
    """
    names = tuple(labels) if head.labels is None else tuple(f"LABEL_{i}" for i in range(head.labels))
    own = tuple(str(config.id2label[i]) for i in sorted(config.id2label or {}))
    task = head.auto.__name__.removeprefix("AutoModel")
    same_task = any(str(name).endswith(task) for name in config.architectures or ())
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(own))
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = None
    if "SequenceClassification" in task:
        config.problem_type = "regression" if len(names) == 1 else "single_label_classification"
    return same_task and (own == names or (unnamed and len(own) == len(names)))


def make_fresh(model: Any, missing: Iterable[str], *, keep: bool, head: Head, seed: int) -> None:
    """Give the weights that the files lacked their start: the same on every rank and in every attempt.

    Matrices are drawn from N(0, initializer_range), as the architectures themselves do; norms are ones, biases zeros.
    keep False: outputs that the files have, but for other labels, are made anew too. missing: names of weights.
    """
    modules = {name.rpartition(".")[0] for name in missing}
    if not keep:
        modules |= {
            name
            for name, module in model.named_modules()
            if matches(f"{name}.weight", (*_CLASSIFIERS,) if head.new else ())
            and getattr(module, "out_features", None) == model.config.num_labels
        }
    spread = getattr(model.config.get_text_config(), "initializer_range", _SPREAD)
    for name in sorted(modules):
        module = model.get_submodule(name)
        for suffix, parameter in module.named_parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            start = _start(f"{name}.{suffix}", shape, spread, seed)
            with _whole(parameter), torch.no_grad():
                parameter.copy_(start)
    setattr(model, _FRESH, tuple(sorted(modules)))


def _start(name: str, shape: torch.Size, spread: float, seed: int) -> torch.Tensor:
    if len(shape) > 1:
        # By a generator on the host: a device's own draws other numbers.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator) * spread
    return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """A context in which a parameter that ZeRO-3 has sharded is whole; what rank 0 writes counts."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([parameter], modifier_rank=0)
