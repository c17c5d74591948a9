"""The run file and the plan, once a pool and a batch are chosen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from finetune_api.failures import FinetuneError
from finetune_api.job import FineTuneJobSpec, Hyperparameters, ObjectiveType
from finetune_api.planner import settings
from finetune_api.planner.ledger import Ledger
from finetune_api.planner.objective import iterations, objective
from finetune_api.planner.optimization import Optimization
from finetune_api.planner.pretrain import joins_text
from finetune_api.planner.references import References, spec_digest
from finetune_api.planner.tuning import tuning
from finetune_api.pool import GPUPoolSpec
from finetune_api.runfile import RunFile, RunHyperparameters, RunJob, RunModel, RunResources
from finetune_api.status import DataFacts, MemoryEstimate, ModelFacts, Plan, Preflight, Setting

CPU = "cpu"
DEFAULT_GLOBAL_BATCH = 16


@dataclass(frozen=True)
class Pool:
    """A GPUPool by name."""

    name: str
    spec: GPUPoolSpec

    @property
    def on_cpu(self) -> bool:
        """Whether the pool has no GPUs."""
        return self.spec.accelerator == CPU


@dataclass(frozen=True)
class Planned:
    """A plan for status and the run file that the trainer reads."""

    plan: Plan
    run: RunFile


@dataclass(frozen=True)
class Given:
    """What a run is made from. preflight describes model and data."""

    spec: FineTuneJobSpec
    job: RunJob
    preflight: Preflight
    references: References
    trainer_image: str

    @property
    def model(self) -> ModelFacts:
        """What preflight says of the base model."""
        return described(self.preflight)[0]

    @property
    def data(self) -> DataFacts:
        """What preflight says of the dataset."""
        return described(self.preflight)[1]


def described(preflight: Preflight) -> tuple[ModelFacts, DataFacts]:
    """What preflight says of model and data; raises FinetuneError(Internal) where it says nothing."""
    if preflight.model is None or preflight.data is None:
        raise FinetuneError("preflight did not describe model and data")
    return preflight.model, preflight.data


@dataclass(frozen=True)
class Fit:
    """A gang and a batch that fit a pool, with the settings that they were tried with. sequence_length: tokens."""

    pool: Pool
    gpus: int
    nodes: int
    zero_stage: int
    micro_batch: int
    accumulation: int
    memory: MemoryEstimate
    optimization: Optimization
    sequence_length: int
    settings: tuple[Setting, ...]

    @property
    def global_batch(self) -> int:
        """Records per optimizer step."""
        return self.micro_batch * self.accumulation * self.gpus * self.nodes


def write(given: Given, fit: Fit, pool_reason: str) -> Planned:
    """The run that fits, as plan and run file. Raises FinetuneError(InvalidSpec) for settings that contradict data."""
    spec, references = given.spec, given.references
    ledger = Ledger(list(fit.settings))
    shares = settings.held_out_shares(spec, given.data.rows, ledger)
    has_validation = shares.validation is not None or references.validation is not None
    _require_validation(spec, has_validation)
    hyperparameters = _hyperparameters(given, fit, shares, ledger)
    run = RunFile(
        job=given.job,
        model=_model(given, fit, ledger),
        dataset=settings.dataset(spec, given.data, references, shares, ledger),
        objective=objective(spec, given.data.format, fit.sequence_length, references, given.preflight, ledger),
        tuning=tuning(spec, ledger),
        hyperparameters=hyperparameters,
        evaluation=settings.evaluation(spec, hyperparameters.total_steps, has_validation, references, ledger),
        checkpoint=settings.checkpoint(spec, ledger),
        guards=settings.guards(spec, hyperparameters.total_steps, ledger),
        output=settings.output(spec, references, ledger),
        resources=RunResources(
            pool=fit.pool.name, nodes=fit.nodes, processes_per_node=fit.gpus, accelerator=fit.pool.spec.accelerator
        ),
        settings=[setting.to_json() for setting in ledger.settings],
    )
    return Planned(_plan(given, fit, pool_reason, run, ledger), run)


def _plan(given: Given, fit: Fit, pool_reason: str, run: RunFile, ledger: Ledger) -> Plan:
    return Plan(
        spec_digest=spec_digest(given.spec),
        pool=fit.pool.name,
        pool_reason=pool_reason,
        nodes=fit.nodes,
        gpus_per_node=fit.gpus,
        micro_batch_size=fit.micro_batch,
        gradient_accumulation=fit.accumulation,
        zero_stage=fit.zero_stage,
        total_steps=run.hyperparameters.total_steps,
        settings=ledger.settings,
        memory=fit.memory,
        run_digest=run.digest(),
        trainer_image=given.trainer_image,
    )


def _model(given: Given, fit: Fit, ledger: Ledger) -> RunModel:
    spec, references = given.spec, given.references
    if spec.model.from_job is not None:
        ledger.state("model.uri", references.model.uri, f"from FineTuneJob {spec.model.from_job}")
    tokens = spec.model.tokenizer.add_special_tokens if spec.model.tokenizer else None
    return RunModel(
        source=references.model,
        task=ledger.pick("model.task", spec.model.task, spec.task, _task_reason(spec)),
        attention=fit.optimization.attention,
        digest=given.model.digest,
        adapter=references.adapter,
        adapter_digest=given.preflight.digest_of("model.adapter.uri") if references.adapter is not None else None,
        add_special_tokens=ledger.keep("model.tokenizer.addSpecialTokens", tokens),
    )


def _task_reason(spec: FineTuneJobSpec) -> str:
    if spec.objective_type == ObjectiveType.REWARD:
        return "a reward model is a head of one output over a whole text"
    return "the usual task of a language model"


def _hyperparameters(given: Given, fit: Fit, shares: settings.HeldOutShares, ledger: Ledger) -> RunHyperparameters:
    hp = given.spec.hyperparameters or Hyperparameters()
    path = "hyperparameters"
    ledger.pick(
        f"{path}.globalBatchSize", hp.global_batch_size, fit.global_batch, "a small batch that averages out noise"
    )
    ledger.pick(f"{path}.microBatchSize", hp.micro_batch_size, fit.micro_batch, "the largest that fits")
    epochs, total_steps = _length(given, fit, shares, ledger)
    ledger.pick(
        f"{path}.zeroStage",
        hp.zero_stage,
        fit.zero_stage,
        "the model fits without" if fit.zero_stage == 0 else "one GPU cannot hold the state",
    )
    chosen = {name: value for name, value in asdict(fit.optimization).items() if name != "attention"}
    return RunHyperparameters.model_validate(
        {
            **chosen,
            "total_steps": total_steps,
            "epochs": epochs,
            "micro_batch_size": fit.micro_batch,
            "gradient_accumulation": fit.accumulation,
            "max_sequence_length": fit.sequence_length,
            "zero_stage": fit.zero_stage,
        }
    )


def _length(given: Given, fit: Fit, shares: settings.HeldOutShares, ledger: Ledger) -> tuple[float | None, int]:
    """Epochs, where they decide, and optimizer steps."""
    hp = given.spec.hyperparameters or Hyperparameters()
    if given.spec.objective_type == ObjectiveType.EVALUATION:
        return None, 0
    if hp.max_steps is not None:
        return None, ledger.pick("hyperparameters.maxSteps", hp.max_steps, hp.max_steps, "")
    pretrains = given.spec.objective_type == ObjectiveType.PRETRAIN
    epochs = ledger.pick(
        "hyperparameters.epochs",
        hp.epochs,
        1.0 if pretrains else 3.0,
        "text is seen once" if pretrains else "three passes, as is usual for a small dataset",
    )
    rows = shares.train_rows(given.data.rows)
    if pretrains or fit.optimization.packing or joins_text(given.spec):  # a row is then a full block of tokens
        rows = math.ceil(shares.train_tokens(given.data.tokens) / fit.sequence_length)
    return epochs, max(1, math.ceil(rows / fit.global_batch * epochs)) * iterations(given.spec)


def _require_validation(spec: FineTuneJobSpec, has_validation: bool) -> None:
    """What chooses the best step needs records to evaluate on."""
    hp, checkpoint = spec.hyperparameters, spec.checkpoint
    needs = {
        "hyperparameters.earlyStopping": hp is not None and hp.early_stopping is not None,
        "checkpoint.keepBest": checkpoint is not None and bool(checkpoint.keep_best),
        "checkpoint.bestMetric": checkpoint is not None and checkpoint.best_metric is not None,
    }
    for field, asked in needs.items():
        if asked and not has_validation:
            raise FinetuneError(
                f"{field} compares evaluations and nothing is held out; set dataset.validation",
                failure_class="InvalidSpec",
                field=f"spec.{field}",
            )
