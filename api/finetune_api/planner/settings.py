"""Data, evaluation, checkpoints and output: resolved settings, and why."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.failures import FinetuneError
from finetune_api.job import (
    Evaluation,
    FineTuneJobSpec,
    Generation,
    Guards,
    HeldOut,
    Hyperparameters,
    LossOn,
    LossSpikeGuard,
    ObjectiveType,
    OnExisting,
    Truncation,
)
from finetune_api.metrics import LOSS
from finetune_api.planner.ledger import Ledger
from finetune_api.planner.objective import REINFORCEMENTS, max_new_tokens
from finetune_api.planner.pretrain import joins_text
from finetune_api.planner.references import References
from finetune_api.runfile import (
    RunBenchmark,
    RunCheckpoint,
    RunDataset,
    RunEvaluation,
    RunGuards,
    RunOutput,
    RunPublish,
)
from finetune_api.status import DataFacts

LONGEST_DEFAULT_SEQUENCE = 2048
SMALLEST_SPLIT_ROWS = 20  # below this a held-out tenth says nothing
FEWEST_GUARDED_STEPS = 100  # below this there is no level yet that a loss could rise from
ROLLBACK_STEPS = (10, 100)  # PaLM went back about 100 steps (Chowdhery et al. 2022, section 5.1)


def sequence_length(spec: FineTuneJobSpec, data: DataFacts, max_positions: int | None, ledger: Ledger) -> int:
    """Longest sequence in tokens: the longest record, within the model's and our own bound."""
    hp = spec.hyperparameters or Hyperparameters()
    bound = min(LONGEST_DEFAULT_SEQUENCE, max_positions or LONGEST_DEFAULT_SEQUENCE)
    name = "hyperparameters.maxSequenceLength"
    pretrain = spec.objective.pretrain if spec.objective else None
    if pretrain is not None and pretrain.block_size is not None:
        return ledger.pick(name, hp.max_sequence_length, pretrain.block_size, "objective.pretrain.blockSize")
    if spec.objective_type == ObjectiveType.PRETRAIN:
        return ledger.pick(name, hp.max_sequence_length, bound, "text fills any length, the default bound is taken")
    generated = max_new_tokens(spec)
    longest = max(8, -(-(data.longest_tokens + generated) // 8) * 8)
    reason = f"the longest record has about {data.longest_tokens} tokens"
    if generated:
        reason += f" and {generated} are generated"
    if longest > bound:
        reason += f", the default bound is {bound}"
    return ledger.pick(name, hp.max_sequence_length, min(longest, bound), reason)


def dataset(
    spec: FineTuneJobSpec, data: DataFacts, references: References, fractions: HeldOutShares, ledger: Ledger
) -> RunDataset:
    """The data with every choice made."""
    given = spec.dataset
    path = "dataset"
    return RunDataset.model_validate(
        {
            "sources": references.sources,
            "format": data.format,
            "columns": given.columns,
            "prompt_template": given.prompt_template,
            "validation_fraction": fractions.validation,
            "validation": references.validation,
            "test_fraction": fractions.test,
            "test": references.test,
            "loss_on": _loss_on(spec, data, ledger),
            "truncation": ledger.pick(
                f"{path}.truncation",
                given.truncation,
                Truncation.TAIL,
                "the end of a record that is too long is cut and counted",
            ),
            "max_source_tokens": ledger.keep(f"{path}.maxSourceTokens", given.max_source_tokens),
            "max_target_tokens": ledger.keep(f"{path}.maxTargetTokens", given.max_target_tokens),
            "max_bad_share": ledger.pick(
                f"{path}.maxBadShare", given.max_bad_share, 0.0, "a broken record stops the run"
            ),
            "max_cut_share": ledger.pick(f"{path}.maxCutShare", given.max_cut_share, 1.0, "cut records are counted"),
            "balance_labels": ledger.pick(
                f"{path}.balanceLabels", given.balance_labels, False, "labels are as frequent as in the data"
            ),
            "digest": data.digest,
        }
    )


def _loss_on(spec: FineTuneJobSpec, data: DataFacts, ledger: Ledger) -> LossOn:
    """Completion where a record has one."""
    plain = data.format == "Text" or spec.objective_type == ObjectiveType.PRETRAIN
    return ledger.pick(
        "dataset.lossOn",
        spec.dataset.loss_on,
        LossOn.ALL if plain else LossOn.COMPLETION,
        "plain text has no completion" if plain else "the model learns to answer, not to ask",
    )


@dataclass(frozen=True)
class HeldOutShares:
    """The shares of the sources that are held out; None where records of their own are given, or none."""

    validation: float | None
    test: float | None

    def train_rows(self, rows: int) -> int:
        """How many of rows are left to train on, at least 1."""
        shares = [share for share in (self.validation, self.test) if share is not None]
        return max(1, rows - sum(held_out_rows(rows, share) for share in shares))

    def train_tokens(self, tokens: int) -> int:
        """How many of tokens are left to train on, at least 1."""
        return max(1, round(tokens * (1 - (self.validation or 0.0) - (self.test or 0.0))))


def held_out_shares(spec: FineTuneJobSpec, rows: int, ledger: Ledger) -> HeldOutShares:
    """What is held out of rows records. Raises FinetuneError(InvalidSpec) where nothing would be left to train on."""
    test = spec.dataset.test
    shares = HeldOutShares(
        _validation_fraction(spec, rows, ledger),
        ledger.keep("dataset.test.fraction", test.fraction if test is not None else None),
    )
    if (shares.validation or 0.0) + (shares.test or 0.0) >= 1.0:
        raise FinetuneError(
            "dataset.validation.fraction and dataset.test.fraction leave nothing to train on; their sum must be below 1",
            failure_class="InvalidSpec",
            field="spec.dataset.test.fraction",
        )
    return shares


def _validation_fraction(spec: FineTuneJobSpec, rows: int, ledger: Ledger) -> float | None:
    """The share held out; None where the job brings its own records or there are too few."""
    held_out: HeldOut | None = spec.dataset.validation
    if held_out is not None and held_out.source is not None:
        return None
    if spec.objective_type == ObjectiveType.EVALUATION:
        ledger.state("dataset.validation", None, "an evaluation measures on the sources themselves")
        return None
    is_text = spec.objective_type == ObjectiveType.PRETRAIN or joins_text(spec)  # a whole book may be one record
    if held_out is None and rows < SMALLEST_SPLIT_ROWS and not is_text:
        ledger.state("dataset.validation", None, f"{rows} records are too few to hold some out")
        return None
    return ledger.pick(
        "dataset.validation.fraction",
        held_out.fraction if held_out else None,
        0.1,
        "a tenth is held out to measure the result",
    )


def held_out_rows(rows: int, fraction: float) -> int:
    """How many of rows the trainer's split holds out: the rounded share, at least 1, and never all.

    Equal records stay on one side of the split, so a few more may be held out.
    """
    return min(max(round(rows * fraction), 1), rows - 1)


def evaluation(
    spec: FineTuneJobSpec, total_steps: int, has_validation: bool, references: References, ledger: Ledger
) -> RunEvaluation:
    """When and how to evaluate."""
    given = spec.evaluation or Evaluation()
    every = None
    if has_validation and total_steps:
        every = ledger.pick(
            "evaluation.everySteps", given.every_steps, max(1, total_steps // 5), "five times in the run"
        )
    return RunEvaluation(
        every_steps=every,
        generation=_generation(given.generation or Generation(), ledger),
        metrics=ledger.keep("evaluation.metrics", given.metrics) or [],
        require=ledger.keep("evaluation.require", given.require) or [],
        max_generated=ledger.pick(
            "evaluation.maxGenerated", given.max_generated, 64, "generation is slow; a sample shows the trend"
        ),
        probes=given.probes or [],
        retention=references.retention,
        benchmarks=[
            RunBenchmark(name=benchmark.name, source=reference, max_records=benchmark.max_records)
            for benchmark, reference in zip(given.benchmarks or [], references.benchmarks, strict=True)
        ],
    )


def _generation(given: Generation, ledger: Ledger) -> Generation:
    path = "evaluation.generation"
    return given.model_copy(
        update={
            "max_new_tokens": ledger.pick(f"{path}.maxNewTokens", given.max_new_tokens, 64, "enough to read an answer"),
            "do_sample": ledger.pick(f"{path}.doSample", given.do_sample, False, "greedy answers repeat"),
        }
    )


def checkpoint(spec: FineTuneJobSpec, ledger: Ledger) -> RunCheckpoint:
    """When to save."""
    given = spec.checkpoint
    every_steps = given.every_steps if given else None
    every_minutes = given.every_minutes if given else None
    if every_steps is None or every_minutes is not None:
        every_minutes = ledger.pick("checkpoint.everyMinutes", every_minutes, 10.0, "at most ten minutes are lost")
    ledger.keep("checkpoint.everySteps", every_steps)
    keep_last = ledger.pick("checkpoint.keepLast", given and given.keep_last, 2, "the newest and one before it")
    keep_best = _keep_best(spec, ledger)
    return RunCheckpoint(
        every_minutes=every_minutes,
        every_steps=every_steps,
        keep_last=keep_last,
        keep_best=keep_best,
        best_metric=_best_metric(spec, keep_best, ledger),
    )


def guards(spec: FineTuneJobSpec, total_steps: int, ledger: Ledger) -> RunGuards:
    """What happens when the training loss goes wrong."""
    given = spec.guards or Guards()
    if spec.objective_type == ObjectiveType.EVALUATION:
        return RunGuards()
    chosen, why = LossSpikeGuard.ROLLBACK, "a run that goes astray is set back, with a lower learning rate for a while"
    if given.rollback_steps is not None:
        why = "guards.rollbackSteps asks for it"
    elif spec.objective_type in REINFORCEMENTS:
        chosen, why = LossSpikeGuard.OFF, "the loss of a policy rises and falls while it learns"
    elif total_steps < FEWEST_GUARDED_STEPS:
        chosen, why = LossSpikeGuard.OFF, f"{total_steps} steps are too few to tell a spike from noise"
    answer = ledger.pick("guards.lossSpike", given.loss_spike, chosen, why)
    if answer == LossSpikeGuard.OFF:
        return RunGuards()
    fewest, most = ROLLBACK_STEPS
    back = ledger.pick(
        "guards.rollbackSteps",
        given.rollback_steps,
        min(max(total_steps // 20, fewest), most),
        "a twentieth of the run, at most 100: the weights from before the loss rose",
    )
    return RunGuards(loss_spike=answer, rollback_steps=back, lowered_steps=2 * back)


def _keep_best(spec: FineTuneJobSpec, ledger: Ledger) -> int:
    given, chosen, why = spec.checkpoint, 0, "the last one is the result"
    if spec.hyperparameters is not None and spec.hyperparameters.early_stopping is not None:
        chosen, why = 1, "early stopping returns to the best"
    elif given is not None and given.best_metric is not None:
        chosen, why = 1, "checkpoint.bestMetric asks for it"
    return ledger.pick("checkpoint.keepBest", given.keep_best if given is not None else None, chosen, why)


def _best_metric(spec: FineTuneJobSpec, keep_best: int, ledger: Ledger) -> str:
    given = spec.checkpoint.best_metric if spec.checkpoint is not None else None
    if keep_best == 0 and given is None:
        return LOSS
    return ledger.pick("checkpoint.bestMetric", given, LOSS, "of the held-out records; the usual choice")


def output(spec: FineTuneJobSpec, references: References, ledger: Ledger) -> RunOutput:
    """Where the artifact goes."""
    given = spec.output
    publish = None
    if given.publish is not None and references.publish is not None:
        public = ledger.pick("output.publish.public", given.publish.public, False, "private unless asked")
        publish = RunPublish(target=references.publish, public=public)
    return RunOutput(
        target=references.output,
        merge_adapter=ledger.pick("output.mergeAdapter", given.merge_adapter, False, "the adapter alone is small"),
        on_existing=ledger.pick("output.onExisting", given.on_existing, OnExisting.FAIL, "nothing is overwritten"),
        max_shard_size_gib=ledger.pick(
            "output.maxShardSizeGiB", given.max_shard_size_gib, 5.0, "files of a size that every store takes"
        ),
        publish=publish,
    )
