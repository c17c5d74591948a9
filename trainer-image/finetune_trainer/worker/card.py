"""The card of an artifact: README.md with a front matter that model hubs read, and how to load what lies beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from finetune_api.job import Task
from finetune_api.runfile import RunFile
from finetune_api.uri import parse_uri
from finetune_trainer.sources.places import local_path

AUTO_CLASSES = {
    Task.CAUSAL_LM: "AutoModelForCausalLM",
    Task.SEQ2SEQ: "AutoModelForSeq2SeqLM",
    Task.MASKED_LM: "AutoModelForMaskedLM",
    Task.SEQUENCE_CLASSIFICATION: "AutoModelForSequenceClassification",
    Task.TOKEN_CLASSIFICATION: "AutoModelForTokenClassification",
}
_PIPELINES = {
    Task.CAUSAL_LM: "text-generation",
    Task.SEQ2SEQ: "text2text-generation",
    Task.MASKED_LM: "fill-mask",
    Task.SEQUENCE_CLASSIFICATION: "text-classification",
    Task.TOKEN_CLASSIFICATION: "token-classification",
}


def model_id(run: RunFile, run_id: str) -> str:
    """A name that no other run has: <namespace>/<job>-<run_id>. The job's UID would not do: a local rerun has the same."""
    return f"{run.job.namespace}/{run.job.name}-{run_id}"


def base_name(run: RunFile) -> str:
    """How the base is named in the artifact: owner/name on the hub, a path of a local run, else its URI.

    The stock libraries resolve the first two by themselves; for s3:// and pvc:// the user loads the base first.
    """
    uri = parse_uri(run.model.source.uri, field="model.uri")
    return {"hf": uri.container, "file": str(local_path(uri))}.get(uri.scheme, str(uri))


def write_card(
    run: RunFile, model: str, artifact: str, metrics: Mapping[str, float], *, labels: int | None = None
) -> str:
    """Text of README.md. model: its ID. artifact: adapter, merged or model. metrics: of the tuned model.

    labels: how many classes.
    """
    front = {
        "base_model": base_name(run),
        "library_name": "peft" if artifact == "adapter" else "transformers",
        "pipeline_tag": _PIPELINES[run.model.task],
        "tags": ["finetune", run.objective.type.lower(), run.tuning.type.lower()],
    }
    # JSON is YAML, and quotes for itself whatever a name holds.
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    parts = [
        "---\n" + "\n".join(lines) + "\n---",
        f"# {model}",
        f"{_ARTICLES[artifact]} by {run.objective.type} and {run.tuning.type} of the job "
        f"{run.job.namespace}/{run.job.name}.",
        _table(_origin(run)),
        *(
            ["## Measured on held-out records", _table([(k, f"{v:.6g}") for k, v in metrics.items()])]
            if metrics
            else []
        ),
        "## Load it",
        f"```python\n{_loading(run, artifact, labels)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


_ARTICLES = {
    "adapter": "An adapter, trained",
    "merged": "A model with its adapter merged, trained",
    "model": "A model, trained",
}


def _origin(run: RunFile) -> list[tuple[str, str]]:
    revision = run.model.source.revision
    return [
        ("Base model", f"`{base_name(run)}`" + (f" at `{revision}`" if revision else "")),
        ("Base model digest", f"`{run.model.digest}`"),
        ("Data", ", ".join(f"`{source.uri}`" for source in run.dataset.sources)),
        ("Data digest", f"`{run.dataset.digest}`"),
        ("Run file digest", f"`{run.digest()}`"),
    ]


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| What | Value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _loading(run: RunFile, artifact: str, labels: int | None) -> str:
    auto = AUTO_CLASSES[run.model.task]
    if artifact != "adapter":
        return (
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f'model = {auto}.from_pretrained("{artifact}")\ntokenizer = AutoTokenizer.from_pretrained("{artifact}")'
        )
    name, revision = base_name(run), run.model.source.revision
    plain = "://" not in name
    options = [json.dumps(name if plain else "base-model")]
    options += [f"revision={json.dumps(revision)}"] if revision and plain else []
    options += [f"num_labels={labels}"] if labels else []
    lines = [] if plain else [f"# the base model lies at {name}; fetch it first and give its folder"]
    lines += [
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("adapter")',
        f"base = {auto}.from_pretrained({', '.join(options)})",
    ]
    if run.model.add_special_tokens:
        lines.append("base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().num_embeddings))")
    return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, "adapter")'])
