"""docs/supported.md: what this release honours and what it refuses, from the validity table and the planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from finetune_api import crd
from finetune_api.job import FROZEN_FIELDS, FineTuneJobSpec, ObjectiveType, QuantizationType, Task, TuningType
from finetune_api.planner import unsupported
from finetune_api.planner.support import CHOICES, NOT_YET
from finetune_api.planner.tuning import BEFORE_LAST_TOKEN
from finetune_api.planner.unused import TRAINING_ONLY
from finetune_api.validity import RULES, ZERO_STAGES, Cell, Rule, refusing
from hack.markdown import HEADER, Schema, cell

_BASE = {
    "model": {"uri": "hf://owner/name"},
    "dataset": {"sources": [{"uri": "s3://bucket/data.jsonl"}]},
    "tuning": {"type": "QLoRA"},
    "output": {"uri": "s3://bucket/out"},
}
# Specs that hold one refused combination each, beside those of the validity table.
_COMBINATIONS: tuple[Schema, ...] = (
    {"model": {"uri": "s3://bucket/model", "revision": "main"}},
    {"model": {"uri": "s3://bucket/model", "adapter": {"uri": "s3://bucket/adapter"}}, "tuning": {"type": "Full"}},
    {
        "model": {"uri": "s3://bucket/model", "adapter": {"uri": "s3://bucket/adapter"}},
        "objective": {"type": "Reward"},
    },
    {"dataset": {"sources": [{"uri": "s3://bucket/data.jsonl", "split": "train"}]}},
    {
        "dataset": {
            "sources": [{"uri": "s3://bucket/data.jsonl"}],
            "validation": {"source": {"uri": "s3://bucket/validation.jsonl", "weight": 1}},
        }
    },
    {"dataset": {"sources": [{"uri": "s3://bucket/data.jsonl"}], "lossOn": "All"}, "objective": {"type": "KTO"}},
    {"dataset": {"sources": [{"uri": "s3://bucket/data.jsonl"}], "balanceLabels": True}},
    {"dataset": {"sources": [{"uri": "s3://bucket/data.jsonl"}], "maxSourceTokens": 64}, "objective": {"type": "DPO"}},
    {"dataset": {"sources": [{"uri": "s3://bucket/novel.txt"}], "format": "Text", "maxTargetTokens": 64}},
    {"model": {"uri": "hf://owner/name", "tokenizer": {"addSpecialTokens": ["<a>"]}}, "tuning": {"type": "IA3"}},
    *(
        {"model": {"uri": "hf://owner/name", "task": "Seq2Seq"}, "evaluation": evaluation}
        for evaluation in (
            {"retention": {"uri": "s3://bucket/general.jsonl"}},
            {"benchmarks": [{"name": "ArcEasy", "source": {"uri": "s3://bucket/arc.jsonl"}}]},
        )
    ),
    {"model": {"uri": "hf://owner/name", "task": "SequenceClassification"}, "evaluation": {"probes": ["Hello"]}},
    {"evaluation": {"maxGenerated": 8}},
    {"evaluation": {"generation": {"temperature": 0.7}}},
    {"tuning": {"type": "PTuning"}, "hyperparameters": {"packing": True}},
    {"objective": {"type": "DPO"}, "hyperparameters": {"packing": True}},
    {"hyperparameters": {"packing": True, "groupByLength": True}},
    {"objective": {"type": "KTO"}, "hyperparameters": {"globalBatchSize": 1}},
    {"objective": {"type": "DPO"}, "hyperparameters": {"neftuneAlpha": 5.0}},
    {"objective": {"type": "Reward"}, "hyperparameters": {"routerLossWeight": 0.001}},
    {"tuning": {"type": "PrefixTuning"}, "hyperparameters": {"gradientCheckpointing": True}},
    {"hyperparameters": {"masterWeights": "BF16"}},
    {"tuning": {"type": "Full"}, "hyperparameters": {"masterWeights": "BF16", "precision": "FP16"}},
    {"tuning": {"type": "Full"}, "hyperparameters": {"masterWeights": "BF16", "zeroStage": 2}},
    {"hyperparameters": {"zeroStage": 2}, "resources": {"nodes": 2}},
    {"hyperparameters": {"zeroStage": 2, "optimizer": "Lion"}},
    {"tuning": {"type": "Full"}, "output": {"uri": "s3://bucket/out", "mergeAdapter": True}},
)


def supported() -> str:
    """The page of what this release honours and what it refuses."""
    schema = crd.structural(FineTuneJobSpec)
    page = [
        "# What this release can and cannot do\n",
        "The whole spec is in the schema already, so that a file written today stays valid. What this release cannot "
        "do is refused: the job's state becomes `Invalid` and its conditions `Validated=False` and `Failed=True` say "
        "[UnsupportedField](failures.md#unsupportedfield) with the field. Mend the field in place and apply the file "
        "again. What only the records show, such as plain text where a field is about completions, is refused once "
        "preflight has read them. Nothing is ignored.\n",
        "## Methods\n",
        "Each objective with each tuning on each task. `yes` works and is tested; a number is the reason below the "
        "table. *Base in* lists the number formats that a frozen base can be quantised to, *ZeRO* the stages that can "
        "be set. The same table makes the API server's rules and the operator's answer. The model's own files can rule "
        "out more, which is said before a GPU is taken: PromptTuning and PTuning on SequenceClassification need an "
        "encoder.\n",
        "Every combination is run at tiny size on a CPU, in FP32 and BF16; with ZeRO in one of the two. "
        "FP16: GPU only, not run here.\n",
        *(line for objective in ObjectiveType for line in _methods(objective)),
        "## Combinations that are refused\n",
        *(f"- {cell(rule.message)}{_where(rule)}." for rule in RULES),
        f"- {cell(BEFORE_LAST_TOKEN)}.",
        *(f"- {cell(_message(changes))}." for changes in _COMBINATIONS),
        "\n## Fields of which some values work\n",
        "| Field | Works | Not yet |",
        "|---|---|---|",
        *(_choice_row(schema, path, allowed) for path, allowed in CHOICES.items()),
        "\n## Fields that must be left out\n",
        "| Field | What it will do |",
        "|---|---|",
        *(f"| `{path}` | {cell(_node(schema, path)['description'])} |" for path in NOT_YET),
        "\nWith objective Evaluation also: " + ", ".join(f"`{path}`" for path in TRAINING_ONLY) + ".",
        "\n## Fields that need another image\n",
        "The trainer image of this project has no package `liger-kernel`. So `hyperparameters.liger: true` changes nothing: "
        "the run goes on without it, and log and report say `off: the image has no package liger-kernel`. "
        "[methods.md](methods.md#liger-kernels) says how to build an image that has it.",
        "\n## Frozen once planned\n",
        "These members of the spec may be mended until `status.plan` is there, and not after: "
        + ", ".join(f"`{name}`" for name in FROZEN_FIELDS)
        + ". Always editable: "
        + ", ".join(f"`{name}`" for name in schema["properties"] if name not in FROZEN_FIELDS)
        + ".",
    ]
    return HEADER + "\n".join(page) + "\n"


def _methods(objective: ObjectiveType) -> Iterator[str]:
    """The table of one objective: a row for each tuning that works on some task."""
    reasons: list[str] = []
    yield f"### {objective}\n"
    yield f"| Tuning | {' | '.join(Task)} | Base in | ZeRO |"
    yield "|---|" + "---|" * (len(Task) + 2)
    left_out: dict[str, list[str]] = {}
    for tuning in (*TuningType, None):
        quantization = QuantizationType.NF4 if tuning == TuningType.QLORA else None
        plain = [Cell(objective, tuning, task, quantization) for task in Task]
        works = [one for one in plain if refusing(one) is None]
        if not works:
            if tuning is not None:
                left_out.setdefault(_reason(plain[0]), []).append(tuning)
            continue
        marks = ["yes" if one in works else _number_of(_reason(one), reasons) for one in plain]
        kinds = [kind for kind in QuantizationType if refusing(replace(works[0], quantization=kind)) is None]
        stages = [str(stage) for stage in ZERO_STAGES if refusing(replace(works[0], zero_stage=stage)) is None]
        yield f"| {tuning or 'none'} | {' | '.join(marks)} | {', '.join(kinds) or '–'} | {', '.join(stages)} |"
    yield ""
    for number, reason in enumerate(reasons, 1):
        yield f"{number}. {cell(reason)}."
    for reason, tunings in left_out.items():
        yield f"- Not with {', '.join(tunings)}: {cell(reason)}."
    yield ""


def _reason(one: Cell) -> str:
    rule = refusing(one)
    return rule.reason if rule is not None else ""


def _number_of(reason: str, reasons: list[str]) -> str:
    if reason not in reasons:
        reasons.append(reason)
    return f"[{reasons.index(reason) + 1}]"


def _where(rule: Rule) -> str:
    """The cells that a rule is against, in words."""
    named = (rule.objective, rule.tuning, rule.task, rule.quantization, rule.zero_stage, rule.precision)
    words = [" or ".join(str(value or "none") for value in values) for values in named if values]
    return f" ({' × '.join(words)}{' × a CPU pool' if rule.on_cpu else ''})"


def _node(schema: Schema, path: str) -> Schema:
    for part in path.split("."):
        schema = schema["properties"][part]
    return schema


def _choice_row(schema: Schema, path: str, allowed: tuple[Any, ...]) -> str:
    node = _node(schema, path)
    values = node.get("enum", [4, 8])  # quantization.bits is an integer that a rule bounds to 4 and 8
    works = ", ".join(f"`{value}`" for value in values if value in allowed)
    later = ", ".join(f"`{value}`" for value in values if value not in allowed)
    return f"| `{path}` | {works} | {later} |"


def _message(changes: Schema) -> str:
    found = unsupported(FineTuneJobSpec.from_json({**_BASE, **changes}))
    if len(found) != 1:
        raise ValueError(f"{changes} is refused for {len(found)} reasons; mend the table of combinations")
    return found[0].message
