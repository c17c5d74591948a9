"""Text without labels: settings of Pretrain, and of hidden tokens (masked models, span corruption), resolved."""

from __future__ import annotations

from finetune_api.job import FineTuneJobSpec, ObjectiveType, PretrainSettings, PretrainTokenizer, Task
from finetune_api.planner.ledger import Ledger
from finetune_api.runfile import RunPretrain

NOISED = (Task.MASKED_LM, Task.SEQ2SEQ)
_VOCABULARY = 32000
SMALLEST_VOCABULARY = {Task.CAUSAL_LM: 256 + 3, Task.MASKED_LM: 256 + 5, Task.SEQ2SEQ: 256 + 103}
"""What a BytePair tokenizer needs: every byte, and the task's special tokens (of Seq2Seq 100 are sentinels)."""


def _given(spec: FineTuneJobSpec) -> PretrainSettings:
    return (spec.objective.pretrain if spec.objective is not None else None) or PretrainSettings()


def is_noised(spec: FineTuneJobSpec, data_format: str) -> bool:
    """Whether tokens of plain text are hidden and predicted: masked models, and span corruption of Seq2Seq."""
    if spec.task not in NOISED:
        return False
    kind = spec.objective_type
    plain = data_format == "Text"
    return kind == ObjectiveType.PRETRAIN or (kind in (ObjectiveType.SUPERVISED, ObjectiveType.EVALUATION) and plain)


def joins_text(spec: FineTuneJobSpec) -> bool:
    """Whether a supervised causal model goes on with running text: blockSize asks for the records in blocks."""
    causal = spec.objective_type == ObjectiveType.SUPERVISED and spec.task == Task.CAUSAL_LM
    return causal and _given(spec).block_size is not None


def default_tokenizer(spec: FineTuneJobSpec) -> PretrainTokenizer:
    """The tokenizer of a Pretrain run: the model's own where nothing is said."""
    return _given(spec).tokenizer or PretrainTokenizer.MODEL


def draws_windows(spec: FineTuneJobSpec) -> bool:
    """Whether a Pretrain run draws windows from random places: where it is not said, with characters as tokens."""
    if spec.objective_type != ObjectiveType.PRETRAIN:
        return False
    given = _given(spec).random_windows
    return default_tokenizer(spec) == PretrainTokenizer.CHARACTER if given is None else given


def pretrain(spec: FineTuneJobSpec, sequence_length: int, ledger: Ledger) -> RunPretrain:
    """The settings of a run that learns from text as it stands; sequence_length in tokens."""
    given = _given(spec)
    path = "objective.pretrain"
    fresh = spec.objective_type == ObjectiveType.PRETRAIN
    tokenizer, windows, vocabulary = default_tokenizer(spec), False, None
    if fresh:
        ledger.pick(f"{path}.tokenizer", given.tokenizer, tokenizer, "the base's own")
        character = tokenizer == PretrainTokenizer.CHARACTER
        windows = ledger.pick(
            f"{path}.randomWindows",
            given.random_windows,
            draws_windows(spec),
            "one running text has no documents to keep apart" if character else "whole documents are packed",
        )
    if fresh and tokenizer == PretrainTokenizer.BYTE_PAIR:
        vocabulary = ledger.pick(f"{path}.vocabularySize", given.vocabulary_size, _VOCABULARY, "as in Llama 2")
    noised = spec.task in NOISED
    share = given.mask_probability or 0.15
    span = given.mean_span_length or 3.0
    if noised:
        paper = "as in the BERT paper" if spec.task == Task.MASKED_LM else "as in the T5 paper"
        ledger.pick(f"{path}.maskProbability", given.mask_probability, share, paper)
    if spec.task == Task.SEQ2SEQ:
        ledger.pick(f"{path}.meanSpanLength", given.mean_span_length, span, "as in the T5 paper")
    return RunPretrain(
        tokenizer=tokenizer,
        vocabulary_size=vocabulary,
        random_windows=windows,
        block_size=ledger.pick(f"{path}.blockSize", given.block_size, sequence_length, "maxSequenceLength"),
        mask_probability=share,
        mean_span_length=span,
    )
