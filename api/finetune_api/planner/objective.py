"""What is optimised: the settings of each objective, resolved. The defaults are those of the papers named here."""

from __future__ import annotations

from finetune_api.job import (
    BuiltInReward,
    DistillationSettings,
    DpoSettings,
    FineTuneJobSpec,
    GrpoSettings,
    KtoSettings,
    ObjectiveType,
    PpoSettings,
    PreferenceSettings,
    ReinforcementSettings,
)
from finetune_api.planner.ledger import Ledger
from finetune_api.planner.pretrain import is_noised, joins_text, pretrain
from finetune_api.planner.references import References
from finetune_api.runfile import (
    RunDistillation,
    RunObjective,
    RunPreference,
    RunReinforcement,
    RunReward,
)
from finetune_api.status import Preflight

PREFERENCES = (ObjectiveType.DPO, ObjectiveType.ORPO, ObjectiveType.KTO)
REINFORCEMENTS = (ObjectiveType.PPO, ObjectiveType.GRPO)
DEFAULT_NEW_TOKENS = 256
GENERATIONS = 8
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
    resolved = None
    if kind == ObjectiveType.PRETRAIN or is_noised(spec, data_format) or joins_text(spec):
        resolved = pretrain(spec, sequence_length, ledger)
    reinforcement = None
    if isinstance(given, ReinforcementSettings):
        reinforcement = _reinforcement(kind, given, references, found, ledger)
    return RunObjective(
        type=kind,
        pretrain=resolved,
        distillation=_distillation(distillation, references, found, ledger) if distillation else None,
        preference=_preference(kind, given, ledger) if kind in PREFERENCES else None,
        reinforcement=reinforcement,
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
    path = f"objective.{kind.lower()}"
    beta, why = _PREFERENCE_BETA[kind]
    own = given if isinstance(given, PreferenceSettings) else PreferenceSettings()
    resolved = RunPreference(beta=ledger.pick(f"{path}.beta", own.beta, beta, why))
    if kind == ObjectiveType.DPO:
        dpo = given if isinstance(given, DpoSettings) else DpoSettings()
        why = "the pairs are taken as they are"
        smoothing = ledger.pick(f"{path}.labelSmoothing", dpo.label_smoothing, 0.0, why)
        return resolved.model_copy(update={"label_smoothing": smoothing})
    if kind == ObjectiveType.KTO:
        kto = given if isinstance(given, KtoSettings) else KtoSettings()
        why = "both kinds weigh the same"
        return resolved.model_copy(
            update={
                "desirable_weight": ledger.pick(f"{path}.desirableWeight", kto.desirable_weight, 1.0, why),
                "undesirable_weight": ledger.pick(f"{path}.undesirableWeight", kto.undesirable_weight, 1.0, why),
            }
        )
    return resolved


def _reinforcement(
    kind: ObjectiveType, given: ReinforcementSettings, references: References, found: Preflight, ledger: Ledger
) -> RunReinforcement:
    path = f"objective.{kind.lower()}"
    beta, why = _REINFORCEMENT_BETA[kind]
    fresh = _ITERATIONS[kind] == 1
    resolved = RunReinforcement(
        rewards=_rewards(path, given, references, found, ledger),
        beta=ledger.pick(f"{path}.beta", given.beta, beta, why),
        generations=1,
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
            "every step sees fresh completions" if fresh else "completions are dear, and the clip bounds the drift",
        ),
    )
    if isinstance(given, GrpoSettings):
        generations = ledger.pick(f"{path}.generations", given.generations, GENERATIONS, "a group that fits one GPU")
        return resolved.model_copy(update={"generations": generations})
    ppo = given if isinstance(given, PpoSettings) else PpoSettings(rewards=given.rewards)
    why = "as in Ziegler et al. 2019"
    return resolved.model_copy(
        update={
            "discount": ledger.pick(f"{path}.discount", ppo.discount, 1.0, "the reward comes at the end"),
            "gae_lambda": ledger.pick(f"{path}.gaeLambda", ppo.gae_lambda, 0.95, why),
            "value_coefficient": ledger.pick(f"{path}.valueCoefficient", ppo.value_coefficient, 0.1, why),
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
