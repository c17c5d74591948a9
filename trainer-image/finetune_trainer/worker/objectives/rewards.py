"""How good a completion is: built-in functions and trained reward models, added up by their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from finetune_api.failures import FinetuneError
from finetune_api.job import BuiltInReward, TuningType
from finetune_api.runfile import RunFile, RunReward
from finetune_trainer.data.tokenizer import TextTokenizer
from finetune_trainer.worker.heads import REWARD_HEAD, fresh_modules
from finetune_trainer.worker.loading import PRECISIONS, load_base, load_tokenizer, padding_id
from finetune_trainer.worker.objectives.sampling import Drawn
from finetune_trainer.worker.padding import pad_arrays
from finetune_trainer.worker.teacher import unsharded

MATCH_SECONDS = 5.0
"""How long a pattern may look at one completion. An honest one takes microseconds, a catastrophic one for ever."""
MATCH_LETTERS = 65536
"""How much of a completion a pattern looks at."""
_TEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class Answer:
    """A completion to be judged. prompt: its tokens, int64. text: without special tokens. reference: or empty."""

    prompt: Tensor
    drawn: Drawn
    text: str
    reference: str


Term = Callable[[Sequence[Answer]], list[float]]


class Rewards:
    """The weighted sum of all terms that the run names."""

    def __init__(self, run: RunFile, engine: Any) -> None:
        """Loads reward models from WORK/inputs/rewards. Raises FinetuneError for a term that cannot be used."""
        assert run.objective.reinforcement is not None  # the planner fills it for these objectives
        self._terms = [
            (term.weight, _make(run, number, term, engine))
            for number, term in enumerate(run.objective.reinforcement.rewards)
        ]

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """The reward of each answer."""
        totals = [0.0] * len(answers)
        for weight, term in self._terms:
            for number, score in enumerate(term(answers)):
                totals[number] += weight * score
        return totals


def place(run: RunFile, number: int) -> str:
    """The spec path of a term of the reward."""
    return f"spec.objective.{run.objective.type.lower()}.rewards[{number}]"


def _make(run: RunFile, number: int, term: RunReward, engine: Any) -> Term:
    field = place(run, number)
    if term.model is not None:
        return RewardModel(run, engine, engine.supervision.work.inputs / "rewards" / str(number), field)
    if term.function is BuiltInReward.REGULAR_EXPRESSION:
        return Pattern(term.pattern or "", f"{field}.pattern")
    if term.function is BuiltInReward.LENGTH:
        assert term.target_length is not None  # the planner fills it for this function
        return Length(term.target_length)
    return ExactMatch(field)


@dataclass(frozen=True)
class ExactMatch:
    """1 if the completion is the record's own, but for white space around it; else 0. field: spec path of the term."""

    field: str

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Raises DataInvalid for a record without a completion."""
        if any(not answer.reference for answer in answers):
            raise FinetuneError(
                "The reward ExactMatch compares with each record's own completion, and there are records without one. "
                "Add the completion, or choose another reward.",
                failure_class="DataInvalid",
                field=self.field,
            )
        return [float(answer.text.strip() == answer.reference.strip()) for answer in answers]


@dataclass(frozen=True)
class Length:
    """1 at the wished number of tokens (the end token not counted), falling in a straight line to 0 at none and at
    twice as many."""

    target: int

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """max(0, 1 − |n − target| / target)."""
        counts = [len(answer.drawn.ids) - answer.drawn.ended for answer in answers]
        return [max(0.0, 1.0 - abs(count - self.target) / self.target) for count in counts]


class Pattern:
    """1 if the regular expression is found in the completion, else 0.

    The time of one search is bounded: a pattern that backtracks without end ends the run with a clear error. A score
    of 0 instead would depend on the machine's speed.
    """

    def __init__(self, pattern: str, field: str, seconds: float = MATCH_SECONDS) -> None:
        """Raises InvalidSpec for a pattern that is not one."""
        self._field = field
        self._seconds = seconds
        try:
            self._pattern = regex.compile(pattern)
        except regex.error as error:
            raise FinetuneError(
                f"The pattern {pattern!r} is not a regular expression: {error}.",
                failure_class="InvalidSpec",
                field=field,
            ) from None

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Raises InvalidSpec if a search takes too long."""
        return [self._score(answer.text[:MATCH_LETTERS]) for answer in answers]

    def _score(self, text: str) -> float:
        try:
            return float(self._pattern.search(text, timeout=self._seconds) is not None)
        except TimeoutError:
            raise FinetuneError(
                f"The pattern {self._pattern.pattern!r} took more than {self._seconds:g} s on a completion of "
                f"{len(text)} letters. Write it without repeats inside repeats, such as (a+)+.",
                failure_class="InvalidSpec",
                field=self._field,
            ) from None


class RewardModel:
    """The score of a trained reward model, frozen, in the number format of the run.

    It sees the tokens of prompt and completion as they are if its tokenizer is the policy's. Otherwise it sees their
    text without special tokens, encoded by its own tokenizer with its own BOS and end token.
    """

    def __init__(self, run: RunFile, engine: Any, folder: Path, field: str) -> None:
        """folder: a model with one output, as objective Reward publishes it. Raises FinetuneError with field."""
        plain = run.tuning.model_copy(update={"type": TuningType.FULL, "quantization": None})
        try:
            tokenizer = load_tokenizer(folder)
            with unsharded():
                self._model: Any = load_base(
                    folder,
                    run.model_copy(update={"tuning": plain}),
                    head=REWARD_HEAD,
                    pad_id=padding_id(tokenizer),
                    dtype=PRECISIONS[run.hyperparameters.precision],
                )
        except FinetuneError as error:
            raise FinetuneError(
                f"The reward model cannot be used. {error}", failure_class=error.failure_class, field=f"{field}.model"
            ) from error
        if fresh_modules(self._model):
            raise FinetuneError(
                "The reward model has no trained output for one score. Use a model that objective Reward made.",
                failure_class="ModelUnsupported",
                field=f"{field}.model",
            )
        self._model.requires_grad_(False).eval().to(engine.args.device)
        self._device = engine.args.device
        policy = engine.objective.tokenizer
        same = tokenizer.backend_tokenizer.to_str() == policy.backend_tokenizer.to_str()
        self._own = None if same else TextTokenizer.from_transformers(tokenizer)
        self._policy = policy

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The model's score of each whole text."""
        config = self._model.config.get_text_config()
        found: list[float] = []
        for start in range(0, len(answers), _TEXTS_AT_ONCE):
            rows = [self._ids(answer).numpy() for answer in answers[start : start + _TEXTS_AT_ONCE]]
            ids, mask = (tensor.to(self._device) for tensor in pad_arrays(rows, config.pad_token_id or 0))
            logits = self._model(input_ids=ids, attention_mask=mask)["logits"]
            found += logits.float()[:, 0].tolist()
        return found

    def _ids(self, answer: Answer) -> Tensor:
        if self._own is None:
            return torch.cat([answer.prompt, answer.drawn.ids])
        prompt = self._policy.decode(answer.prompt.tolist(), skip_special_tokens=True)
        ids, _ = self._own.encode(prompt + answer.text)
        if answer.drawn.ended:
            ids = [*ids, self._own.eos_id]
        if self._own.with_bos(ids) > 0 and self._own.bos_id is not None:
            ids = [self._own.bos_id, *ids]
        return torch.tensor(ids)
