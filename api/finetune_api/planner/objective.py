"""What is optimised: the settings of each objective, resolved. The defaults are those of the papers named here."""

from __future__ import annotations

from finetune_api.job import (
    BuiltInReward,
    DistillationSettings,
    FineTuneJobSpec,
    ObjectiveType,
    PreferenceSettings,
    PretrainSettings,
    PretrainTokenizer,
    ReinforcementSettings,
    Task,
)
from finetune_api.planner.ledger import Ledger
from finetune_api.planner.references import References
from finetune_api.runfile import (
    RunDistillation,
    RunObjective,
    RunPreference,
    RunPretrain,
    RunReinforcement,
    RunReward,
)
from finetune_api.status import Preflight

PREFERENCES = (ObjectiveType.DPO, ObjectiveType.ORPO, ObjectiveType.KTO)
REINFORCEMENTS = (ObjectiveType.PPO, ObjectiveType.GRPO)
NOISED = (Task.MASKED_LM, Task.SEQ2SEQ)
DEFAULT_NEW_TOKENS = 256
_VOCABULARY = 32000
_ITERATIONS = {ObjectiveType.PPO: 4, ObjectiveType.GRPO: 1}

# beta and where it comes from.
_PREFERENCE_BETA = {
    ObjectiveType.DPO: (0.1, "as in the DPO paper (Rafailov et al. 2023)"),
    ObjectiveType.ORPO: (0.1, "the ORPO paper's weight of the odds ratio (Hong et al. 2024)"),
    ObjectiveType.KTO: (0.1, "as in the KTO paper (Ethayarajh et al. 2024)"),
}
_REINFORCEMENT_BETA = {
    ObjectiveType.PPO: (0.05, "a mild pull, as in Ziegler et al. 2019"),
    ObjectiveType.GRPO: (0.04, "as in the DeepSeekMath paper (Shao et al. 2024); some later recipes use 0"),
}


def settings_of(spec: FineTuneJobSpec) -> PreferenceSettings | ReinforcementSettings | None:
    """What the job says about its preference or reinforcement objective."""
    if spec.objective is None:
        return None
    found: PreferenceSettings | ReinforcementSettings | None = getattr(
        spec.objective, spec.objective_type.lower(), None
    )
    return found if isinstance(found, PreferenceSettings | ReinforcementSettings) else None


def max_new_tokens(spec: FineTuneJobSpec) -> int:
    """Tokens that a reinforcement objective generates for a prompt; 0 for every other objective."""
    given = settings_of(spec)
    if not isinstance(given, ReinforcementSettings):
        return 0
    return given.max_new_tokens or DEFAULT_NEW_TOKENS


def iterations(spec: FineTuneJobSpec) -> int:
    """Optimizer steps for each set of records: 1 but for reinforcement objectives."""
    given = settings_of(spec)
    if not isinstance(given, ReinforcementSettings):
        return 1
    return given.iterations or _ITERATIONS[spec.objective_type]


def is_noised(spec: FineTuneJobSpec, data_format: str) -> bool:
    """Whether tokens of plain text are hidden and predicted: masked models, and span corruption of Seq2Seq."""
    if spec.task not in NOISED:
        return False
    kind = spec.objective_type
    plain = data_format == "Text"
    return kind == ObjectiveType.PRETRAIN or (kind in (ObjectiveType.SUPERVISED, ObjectiveType.EVALUATION) and plain)


def objective(
    spec: FineTuneJobSpec,
    data_format: str,
    sequence_length: int,
    references: References,
    found: Preflight,
    ledger: Ledger,
) -> RunObjective:
    """The objective with the settings of its type only."""
    kind = spec.objective_type
    ledger.pick("objective.type", spec.objective and spec.objective.type, kind, "learn from the records as they are")
    given = settings_of(spec)
    distillation = spec.objective.distillation if spec.objective else None
    pretrain = None
    if kind == ObjectiveType.PRETRAIN or is_noised(spec, data_format):
        pretrain = _pretrain(spec, sequence_length, ledger)
    reinforcement = None
    if isinstance(given, ReinforcementSettings):
        reinforcement = _reinforcement(kind, given, references, found, ledger)
    return RunObjective(
        type=kind,
        pretrain=pretrain,
        distillation=_distillation(distillation, references, found, ledger) if distillation else None,
        preference=_preference(kind, given, ledger) if kind in PREFERENCES else None,
        reinforcement=reinforcement,
    )


def default_tokenizer(spec: FineTuneJobSpec) -> PretrainTokenizer:
    """The tokenizer of a Pretrain run."""
    given = (spec.objective and spec.objective.pretrain) or PretrainSettings()
    return given.tokenizer or PretrainTokenizer.MODEL


def _pretrain(spec: FineTuneJobSpec, sequence_length: int, ledger: Ledger) -> RunPretrain:
    given = (spec.objective and spec.objective.pretrain) or PretrainSettings()
    path = "objective.pretrain"
    fresh = spec.objective_type == ObjectiveType.PRETRAIN
    tokenizer, windows, vocabulary = default_tokenizer(spec), False, None
    if fresh:
        ledger.pick(f"{path}.tokenizer", given.tokenizer, tokenizer, "the base's own")
        character = tokenizer == PretrainTokenizer.CHARACTER
        windows = ledger.pick(
            f"{path}.randomWindows",
            given.random_windows,
            character,
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


def _distillation(
    given: DistillationSettings, references: References, found: Preflight, ledger: Ledger
) -> RunDistillation:
    path = "objective.distillation"
    assert references.teacher is not None, "a teacher has a reference"
    return RunDistillation(
        teacher=references.teacher,
        teacher_digest=found.digest_of(f"{path}.teacher.uri"),
        temperature=ledger.pick(f"{path}.temperature", given.temperature, 2.0, "as in DistilBERT (Sanh et al. 2019)"),
        alpha=ledger.pick(f"{path}.alpha", given.alpha, 0.5, "labels and teacher weigh the same"),
        quantize_teacher=ledger.pick(
            f"{path}.quantizeTeacher", given.quantize_teacher, False, "the teacher's logits stay exact"
        ),
    )


def _preference(kind: ObjectiveType, given: object, ledger: Ledger) -> RunPreference:
    own = given if isinstance(given, PreferenceSettings) else PreferenceSettings()
    path = f"objective.{kind.lower()}"
    beta, why = _PREFERENCE_BETA[kind]
    resolved = {"beta": ledger.pick(f"{path}.beta", own.beta, beta, why)}
    if kind == ObjectiveType.DPO:
        why = "the pairs are taken as they are"
        resolved["label_smoothing"] = ledger.pick(f"{path}.labelSmoothing", own.label_smoothing, 0.0, why)
    if kind == ObjectiveType.KTO:
        why = "both kinds weigh the same"
        resolved["desirable_weight"] = ledger.pick(f"{path}.desirableWeight", own.desirable_weight, 1.0, why)
        resolved["undesirable_weight"] = ledger.pick(f"{path}.undesirableWeight", own.undesirable_weight, 1.0, why)
    return RunPreference(**resolved)


def _reinforcement(
    kind: ObjectiveType, given: ReinforcementSettings, references: References, found: Preflight, ledger: Ledger
) -> RunReinforcement:
    path = f"objective.{kind.lower()}"
    grpo = kind == ObjectiveType.GRPO
    beta, why = _REINFORCEMENT_BETA[kind]
    resolved = RunReinforcement(
        rewards=_rewards(path, given, references, found, ledger),
        beta=ledger.pick(f"{path}.beta", given.beta, beta, why),
        generations=ledger.pick(f"{path}.generations", given.generations, 8, "a group that fits one GPU")
        if grpo
        else 1,
        max_new_tokens=ledger.pick(
            f"{path}.maxNewTokens", given.max_new_tokens, DEFAULT_NEW_TOKENS, "room for a short answer"
        ),
        temperature=ledger.pick(f"{path}.temperature", given.temperature, 1.0, "samples follow the policy itself"),
        clip_range=ledger.pick(
            f"{path}.clipRange", given.clip_range, 0.2, "as in the PPO paper (Schulman et al. 2017)"
        ),
        iterations=ledger.pick(
            f"{path}.iterations",
            given.iterations,
            _ITERATIONS[kind],
            "every step sees fresh completions" if grpo else "completions are dear, and the clip bounds the drift",
        ),
    )
    if grpo:
        return resolved
    return resolved.model_copy(
        update={
            "discount": ledger.pick(f"{path}.discount", given.discount, 1.0, "the reward comes at the end"),
            "gae_lambda": ledger.pick(f"{path}.gaeLambda", given.gae_lambda, 0.95, "as in Ziegler et al. 2019"),
            "value_coefficient": ledger.pick(
                f"{path}.valueCoefficient", given.value_coefficient, 0.1, "as in Ziegler et al. 2019"
            ),
        }
    )


def _rewards(
    path: str, given: ReinforcementSettings, references: References, found: Preflight, ledger: Ledger
) -> list[RunReward]:
    resolved = []
    for number, (term, reference) in enumerate(zip(given.rewards, references.rewards, strict=True)):
        place = f"{path}.rewards[{number}]"
        length = None
        if term.function == BuiltInReward.LENGTH:
            length = ledger.pick(f"{place}.targetLength", term.target_length, 64, "a short answer")
        resolved.append(
            RunReward(
                model=reference,
                model_digest=found.digest_of(f"{place}.model.uri") if reference is not None else None,
                function=ledger.keep(f"{place}.function", term.function),
                pattern=ledger.keep(f"{place}.pattern", term.pattern),
                target_length=length,
                weight=ledger.pick(f"{place}.weight", term.weight, 1.0, "the terms weigh the same"),
            )
        )
    return resolved
