"""The further models of a run: an earlier adapter, a teacher, reward models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from finetune_api.failures import FinetuneError
from finetune_api.job import LoraVariant, Task, TuningType
from finetune_api.planner.tuning import DEFAULT_RANK, DEFAULT_VIRTUAL_TOKENS
from finetune_api.runfile import InputKind, PreflightFile, PreflightInput
from finetune_api.status import ModelFacts
from finetune_trainer.preflight.document import finding, remark
from finetune_trainer.preflight.labels import TEACHER
from finetune_trainer.preflight.outcome import Outcome
from finetune_trainer.sources.architectures import architecture_of, is_tied, labels_of
from finetune_trainer.sources.inspect import Use, count_parameters, inspect_model, read_json, read_tokenizer
from finetune_trainer.sources.place import Place, Purpose, Reach, model_digest, read_whole
from finetune_trainer.sources.places import open_source
from finetune_trainer.sources.select import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    SLOW_TOKENIZERS,
    adapter_files,
)

PEFT_TYPES: dict[str, tuple[TuningType, ...]] = {
    "LORA": (TuningType.LORA, TuningType.QLORA),
    "IA3": (TuningType.IA3,),
    "PROMPT_TUNING": (TuningType.PROMPT_TUNING,),
    "P_TUNING": (TuningType.P_TUNING,),
    "PREFIX_TUNING": (TuningType.PREFIX_TUNING,),
}
"""PEFT's word for a kind of adapter → the tunings that make it."""

_CLASSIFIERS = {
    Task.SEQUENCE_CLASSIFICATION: "ForSequenceClassification",
    Task.TOKEN_CLASSIFICATION: "ForTokenClassification",
}
_LANGUAGE_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
_MAX_TOKENIZER_BYTES = 128 << 20


def check_further(file: PreflightFile, reach: Reach, outcome: Outcome) -> None:
    """Checks each further model; adds its digest, and a finding for each that cannot be used."""
    for item in file.further:
        if item.kind is InputKind.DATA:
            continue
        try:
            if item.kind is InputKind.ADAPTER:
                _check_adapter(file, item, reach, outcome)
            elif item.field == TEACHER:
                _check_teacher(file, item, reach, outcome)
            else:
                _check_reward(file, item, reach, outcome)
        except FinetuneError as error:
            outcome.findings.append(finding(error))


def has_trained_head(config: Mapping[str, Any], task: Task) -> bool:
    """Whether a model's weights hold the head of a task, so that nothing in it would be random."""
    architecture = architecture_of(config) or ""
    if task in _CLASSIFIERS:
        return architecture.endswith(_CLASSIFIERS[task])
    return architecture.endswith(_LANGUAGE_HEADS) or (architecture.endswith("Model") and is_tied(config))


def _check_adapter(file: PreflightFile, item: PreflightInput, reach: Reach, outcome: Outcome) -> None:
    place = open_source(item.reference, purpose=Purpose.ADAPTER, field=item.field, reach=reach)
    files = adapter_files(place, field=item.field)
    config = read_json(place, ADAPTER_CONFIG, field=item.field)
    tunings = PEFT_TYPES.get(str(config.get("peft_type")))
    if tunings is None:
        raise _refused(
            f"The adapter at {place.uri} is of PEFT type {str(config.get('peft_type'))[:40]}, which cannot be used; "
            f"those that can are {', '.join(PEFT_TYPES)}.",
            item.field,
            failure_class="ModelUnsupported",
        )
    if file.tuning is not None:
        _check_same_tuning(file, config, tunings, place)
    weights = next(one for one in files if one.name == ADAPTER_WEIGHTS)
    if count_parameters(place, weights, field=item.field) == 0:
        raise _refused(f"The adapter at {place.uri} is empty. Save it again.", item.field)
    outcome.digests[item.field] = model_digest(files)
    if any(one.name == CONFIG for one in files):
        outcome.heads[item.field] = labels_of(read_json(place, CONFIG, field=item.field))
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and base and _last(base) != _last(file.model.uri):
        outcome.findings.append(
            remark(
                f"The adapter was made on {base[:200]}, and model.uri is {file.model.uri}: make sure that both are "
                "the same weights.",
                f"spec.{item.field}",
            )
        )


def _check_same_tuning(
    file: PreflightFile, config: Mapping[str, Any], tunings: tuple[TuningType, ...], place: Place
) -> None:
    """What is multiplied and how is in no weight: the settings have to be those that the adapter was made with."""
    if file.tuning not in tunings:
        raise _refused(
            f"The adapter at {place.uri} was made by {' or '.join(tunings)}, and tuning.type is {file.tuning}. Set "
            f"tuning.type: {tunings[0]}, or train a new adapter without model.adapter.",
            "tuning.type",
        )
    for name, spec_field, wanted in _wanted(file):
        found = config.get(name)
        if (found or wanted) and found != wanted:
            raise _refused(
                f"The adapter at {place.uri} has {name} {str(found)[:40]}, and this run would train with {wanted}. Set "
                f"{spec_field} to what it was made with.",
                spec_field,
            )


def _wanted(file: PreflightFile) -> list[tuple[str, str, Any]]:
    """(PEFT's name, spec path, value) of each setting that has to be the adapter's, as the planner resolves it."""
    if file.tuning in (TuningType.LORA, TuningType.QLORA):
        rank = (file.lora.rank if file.lora else None) or DEFAULT_RANK
        alpha = (file.lora.alpha if file.lora else None) or 2.0 * rank
        variant = (file.lora.variant if file.lora else None) or LoraVariant.STANDARD
        return [
            ("r", "tuning.lora.rank", rank),
            ("lora_alpha", "tuning.lora.alpha", alpha),
            ("use_rslora", "tuning.lora.variant", variant is LoraVariant.RS_LORA),
            ("use_dora", "tuning.lora.variant", variant is LoraVariant.DORA),
        ]
    if file.tuning is TuningType.IA3:
        return []
    tokens = (file.soft_prompt.virtual_tokens if file.soft_prompt else None) or DEFAULT_VIRTUAL_TOKENS
    return [("num_virtual_tokens", "tuning.softPrompt.virtualTokens", tokens)]


def _check_teacher(file: PreflightFile, item: PreflightInput, reach: Reach, outcome: Outcome) -> None:
    place, facts, config = _inspect(item, file.task, reach)
    if not has_trained_head(config, file.task):
        raise _refused(
            f"The teacher at {place.uri} is {facts.architecture or 'of no named class'}: it has no trained head for "
            f"{file.task.value}, so its head would be random and teach nothing. Fine-tune the teacher on the task first, "
            "and give that model's URI.",
            item.field,
        )
    _require_same_tokenizer(file, place, item.field, reach, "teacher")
    length = file.max_sequence_length
    if length is not None and facts.max_positions is not None and length > facts.max_positions:
        raise _refused(
            f"The teacher at {place.uri} has {facts.max_positions} positions, fewer than "
            f"hyperparameters.maxSequenceLength {length}. Lower it.",
            "hyperparameters.maxSequenceLength",
        )
    _note(item, facts, outcome)
    if file.task in _CLASSIFIERS:
        outcome.heads[item.field] = labels_of(config)


def _check_reward(file: PreflightFile, item: PreflightInput, reach: Reach, outcome: Outcome) -> None:
    place, facts, config = _inspect(item, Task.SEQUENCE_CLASSIFICATION, reach)
    if not has_trained_head(config, Task.SEQUENCE_CLASSIFICATION):
        raise _refused(
            f"The reward model at {place.uri} is {facts.architecture or 'of no named class'}: it has no trained head that "
            "scores a text, so its rewards would be random. Train one with objective.type: Reward.",
            item.field,
        )
    outputs = len(labels_of(config))
    if outputs != 1:
        raise _refused(
            f"The reward model at {place.uri} has {outputs} labels, and a reward is one number. Give a model with one "
            "output, such as objective.type: Reward trains.",
            item.field,
        )
    _note(item, facts, outcome)


def _inspect(item: PreflightInput, task: Task, reach: Reach) -> tuple[Place, ModelFacts, dict[str, Any]]:
    place = open_source(item.reference, purpose=Purpose.MODEL, field=item.field, reach=reach)
    facts = inspect_model(place, Use(task=task, tuning=None), field=item.field)
    return place, facts, read_json(place, CONFIG, field=item.field)


def _note(item: PreflightInput, facts: ModelFacts, outcome: Outcome) -> None:
    outcome.digests[item.field] = facts.digest
    outcome.weight_bytes[item.field] = facts.weight_bytes


def _require_same_tokenizer(file: PreflightFile, place: Place, field: str, reach: Reach, who: str) -> None:
    """Raises InvalidSpec unless the student's tokenizer gives the same ids as that of place for any text."""
    own = open_source(file.model, purpose=Purpose.MODEL, field="model.uri", reach=reach)
    ours, theirs = read_tokenizer(own).tokenizer_json, read_tokenizer(place, field=field).tokenizer_json
    if ours is None or theirs is None:
        if _slow(own, "model.uri") & _slow(place, field):
            return
        raise _differs(who, "at least one of them has no tokenizer.json to compare", field)
    backends = (_backend(ours, "model.uri"), _backend(theirs, field))
    here, there = (_canonical(backend) for backend in backends)
    if here == there:
        return
    vocabularies = [backend.get_vocab(with_added_tokens=True) for backend in backends]
    if vocabularies[0] != vocabularies[1]:
        different = sum(1 for token, number in vocabularies[1].items() if vocabularies[0].get(token) != number)
        raise _differs(
            who,
            f"its vocabulary has {len(vocabularies[1])} tokens, the student's {len(vocabularies[0])}, and {different} of "
            "its tokens have another number or are missing there",
            field,
        )
    parts = ", ".join(name for name in here if here[name] != there[name])
    raise _differs(who, f"they have the same vocabulary and differ in {parts}", field)


def _backend(text: bytes, field: str) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises Exception itself
        message = f"tokenizer.json cannot be read: {error}. Upload it again."
        raise _refused(message, field, failure_class="ModelUnsupported") from None


def _canonical(backend: Tokenizer) -> dict[str, Any]:
    """What of a tokenizer decides on ids, as the library itself writes it: merges and defaults have several forms."""
    document: dict[str, Any] = json.loads(backend.to_str())
    return {
        name: document.get(name) for name in ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")
    }


def _slow(place: Place, field: str) -> set[bytes]:
    names = {file.name for file in place.files()} & set(SLOW_TOKENIZERS)
    return {read_whole(place, name, _MAX_TOKENIZER_BYTES, field=field) for name in names}


def _differs(who: str, why: str, field: str) -> FinetuneError:
    return _refused(
        f"The {who}'s tokenizer is not the student's: {why}. Its distribution is over other tokens, so nothing could be "
        f"compared. Choose a {who} of the student's family.",
        field,
    )


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _refused(message: str, field: str, *, failure_class: str = "InvalidSpec") -> FinetuneError:
    return FinetuneError(message, failure_class=failure_class, field=f"spec.{field}")
