"""Which parameters change: the settings of each tuning, resolved."""

from __future__ import annotations

from finetune_api.job import (
    ComputeType,
    FineTuneJobSpec,
    FullTuning,
    Ia3,
    Lora,
    LoraBias,
    LoraVariant,
    ObjectiveType,
    Quantization,
    QuantizationType,
    SoftPrompt,
    SoftPromptInit,
    TuningType,
)
from finetune_api.planner.ledger import Ledger
from finetune_api.runfile import RunFull, RunIa3, RunLora, RunQuantization, RunSoftPrompt, RunTuning

LOW_RANK = (TuningType.LORA, TuningType.QLORA)
SOFT_PROMPTS = (TuningType.PROMPT_TUNING, TuningType.P_TUNING, TuningType.PREFIX_TUNING)
FIXED_EMBEDDINGS = (TuningType.IA3, *SOFT_PROMPTS)
"""Tunings under which an added token would keep its random embedding."""
TOKEN_PROMPTS = (TuningType.PROMPT_TUNING, TuningType.P_TUNING)
BEFORE_LAST_TOKEN = (
    "tuning.type: PromptTuning and PTuning put embeddings before a text, and a decoder that classifies finds the text's "
    "last token by its ids; choose LoRA, IA3 or Full, or an encoder such as BERT as model.uri"
)
"""Why TOKEN_PROMPTS do not go with SequenceClassification on a decoder."""
WITHOUT_DROPOUT = (ObjectiveType.DPO, ObjectiveType.KTO, ObjectiveType.PPO, ObjectiveType.GRPO)
"""Objectives that compare two passes of the same text."""
DEFAULT_RANK = 16
DEFAULT_VIRTUAL_TOKENS = 20


def tuning(spec: FineTuneJobSpec, ledger: Ledger) -> RunTuning:
    """The tuning's settings. LoRA's defaults follow Hu et al. 2021 and Dettmers et al. 2023."""
    given = spec.tuning
    if given is None or spec.tuning_type is None:
        ledger.state("tuning.type", None, "an evaluation changes no parameter")
        return RunTuning(type=TuningType.FULL, quantization=quantization(spec, ledger))
    kind = given.type
    return RunTuning(
        type=kind,
        lora=_lora(given.lora or Lora(), spec.objective_type, ledger) if kind in LOW_RANK else None,
        ia3=_ia3(given.ia3 or Ia3(), ledger) if kind == TuningType.IA3 else None,
        soft_prompt=_soft_prompt(kind, given.soft_prompt or SoftPrompt(), ledger) if kind in SOFT_PROMPTS else None,
        full=_full(given.full, ledger) if given.full is not None else None,
        quantization=quantization(spec, ledger),
    )


def quantization_type(spec: FineTuneJobSpec) -> QuantizationType | None:
    """The number format in which the frozen base is held; None where it is not quantised."""
    if spec.tuning is None:
        return None
    given = spec.tuning.quantization
    if given is None and spec.tuning.type != TuningType.QLORA:
        return None
    given = given or Quantization()
    return given.type or (QuantizationType.INT8 if given.bits == 8 else QuantizationType.NF4)


def quantization(spec: FineTuneJobSpec, ledger: Ledger) -> RunQuantization | None:
    """How the frozen base is quantised: NF4 with double quantisation unless the job says otherwise."""
    kind = quantization_type(spec)
    if kind is None or spec.tuning is None:
        return None
    given = spec.tuning.quantization or Quantization()
    path, why = "tuning.quantization", "as in the QLoRA paper"
    eight = kind == QuantizationType.INT8
    return RunQuantization(
        bits=ledger.pick(f"{path}.bits", given.bits, 8 if eight else 4, "the width of the type" if eight else why),
        type=ledger.pick(f"{path}.type", given.type, kind, "LLM.int8, the 8-bit type" if eight else why),
        double_quant=ledger.pick(
            f"{path}.doubleQuant", given.double_quant, not eight, "8-bit weights have one scale" if eight else why
        ),
        compute_type=ledger.pick(f"{path}.computeType", given.compute_type, ComputeType.BF16, why),
    )


def _lora(given: Lora, objective: ObjectiveType, ledger: Ledger) -> RunLora:
    path = "tuning.lora"
    dropout, why = 0.05, "the QLoRA paper's choice"
    if objective in WITHOUT_DROPOUT:
        dropout, why = 0.0, "the ratio of two passes would measure the dropout's noise"
    elif given.experts:
        dropout, why = 0.0, "experts that are held in one weight cannot be adapted with dropout"
    rank = ledger.pick(f"{path}.rank", given.rank, DEFAULT_RANK, "a common rank for adapting to one task")
    return RunLora(
        rank=rank,
        alpha=ledger.pick(f"{path}.alpha", given.alpha, 2.0 * rank, "twice the rank"),
        dropout=ledger.pick(f"{path}.dropout", given.dropout, dropout, why),
        target_modules=ledger.pick(
            f"{path}.targetModules",
            given.target_modules,
            ["all-linear"],
            "every linear layer but the head, as in the QLoRA paper",
        ),
        bias=ledger.pick(f"{path}.bias", given.bias, LoraBias.NONE, "biases stay fixed"),
        modules_to_save=ledger.keep(f"{path}.modulesToSave", given.modules_to_save),
        variant=ledger.pick(f"{path}.variant", given.variant, LoraVariant.STANDARD, "the plain form"),
        experts=ledger.pick(f"{path}.experts", given.experts, False, "experts of a mixture stay as they are"),
    )


def _ia3(given: Ia3, ledger: Ledger) -> RunIa3:
    """PEFT knows the layers of each architecture (Liu et al. 2022 scale keys, values and the feed-forward)."""
    return RunIa3(
        target_modules=ledger.keep("tuning.ia3.targetModules", given.target_modules),
        feedforward_modules=ledger.keep("tuning.ia3.feedforwardModules", given.feedforward_modules),
    )


def _soft_prompt(kind: TuningType, given: SoftPrompt, ledger: Ledger) -> RunSoftPrompt:
    path = "tuning.softPrompt"
    virtual_tokens = ledger.pick(
        f"{path}.virtualTokens",
        given.virtual_tokens,
        DEFAULT_VIRTUAL_TOKENS,
        "more help little (Lester et al. 2021, section 3.2)",
    )
    text = given.init_text is not None
    init = ledger.pick(
        f"{path}.init",
        given.init,
        SoftPromptInit.TEXT if text else SoftPromptInit.RANDOM,
        "initText is given" if text else "no text to start from is given",
    )
    projection = False
    if kind == TuningType.PREFIX_TUNING:
        projection = ledger.pick(
            f"{path}.projection", given.projection, False, "P-tuning v2 learns the prefix itself (Liu et al. 2022)"
        )
    return RunSoftPrompt(
        virtual_tokens=virtual_tokens,
        init=init,
        init_text=ledger.keep(f"{path}.initText", given.init_text),
        projection=projection,
    )


def _full(given: FullTuning, ledger: Ledger) -> RunFull:
    path = "tuning.full"
    return RunFull(
        freeze=ledger.keep(f"{path}.freeze", given.freeze),
        trainable=ledger.keep(f"{path}.trainable", given.trainable),
        first_layers=ledger.keep(f"{path}.firstLayers", given.first_layers),
        preset=ledger.keep(f"{path}.preset", given.preset),
    )
