"""A job file of any objective becomes a plan on this machine, with all that it needs in folders beside it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from finetune_api.documents import TerminationMessage
from finetune_api.failures import FinetuneError
from finetune_api.planner import Planned
from finetune_api.status import Preflight
from finetune_trainer.cli import preparing, show
from finetune_trainer.cli.jobfile import read_job_file
from tests.train.preflight.local import ASKED, LABELLED, Folder, classifier
from tests.train.preflight.test_further import ARC
from tests.train.sources.making import adapter_files, model_files

BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
PAIRS = [{"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(30)]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "data")


def write(folder: Folder, **spec: Any) -> Path:
    """A job file beside the data, all of whose places are relative to it. None leaves a field out."""
    given = {
        "model": {"uri": "file://./model"},
        "dataset": {"sources": [{"uri": "file://./train/rows.jsonl"}]},
        "tuning": {"type": "LoRA", "lora": {"rank": 2, "alpha": 4}},
        "output": {"uri": "file://../out"},
    } | spec
    document = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "job"},
        "spec": {name: value for name, value in given.items() if value is not None},
    }
    path = folder.root / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def plan(path: Path) -> tuple[Preflight, Planned]:
    local = preparing.localise(read_job_file(path), None, {})
    preflight = preparing.check(local, {})
    assert [item for item in preflight.findings if item.failure_class != "Info"] == []
    return preflight, preparing.plan(local, preflight)


def test_places_may_be_relative_to_the_folder_of_the_job_file(folder: Folder, monkeypatch, tmp_path: Path) -> None:
    named = Folder(tmp_path / "with blank")
    monkeypatch.chdir("/")
    for each in (folder, named):
        _, planned = plan(write(each))
        run = planned.run
        assert run.model.source.uri == (each.root / "model").as_uri()
        assert run.dataset.sources[0].uri == (each.root / "train" / "rows.jsonl").as_uri()
        assert run.output.target.uri == (each.root.parent / "out").as_uri()
    with pytest.raises(FinetuneError, match=r"it must be file:///absolute/path"):
        plan(write(folder, model={"uri": "file://model"}))


def test_the_same_job_file_in_another_folder_is_another_job(folder: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path / "other")
    jobs = [preparing.localise(read_job_file(write(each)), None, {}).job.uid for each in (folder, other)]
    again = preparing.localise(read_job_file(write(folder)), None, {}).job.uid
    assert jobs[0] != jobs[1] and jobs[0] == again


def test_a_plan_holds_every_further_input_with_its_digest(folder: Folder) -> None:
    for name in ("held", "test"):
        folder.put(name, ASKED[:4])
    folder.put("general", [{"text": "General text."}])
    folder.put("bench", [ARC])
    folder.put_model("teacher", model_files(config={"hidden_size": 16}))
    preflight, planned = plan(
        write(
            folder,
            dataset={
                "sources": [{"uri": "file://./train"}],
                "validation": {"source": {"uri": "file://./held"}},
                "test": {"source": {"uri": "file://./test"}},
            },
            objective={"type": "Distillation", "distillation": {"teacher": {"uri": "file://./teacher"}}},
            evaluation={
                "retention": {"uri": "file://./general"},
                "benchmarks": [{"name": "ArcEasy", "source": {"uri": "file://./bench"}}],
            },
        )
    )
    inputs = {item.folder: item for item in planned.run.inputs()}
    assert list(inputs) == ["model", "teacher", "data/0", "validation", "test", "retention", "benchmarks/0"]
    field = "objective.distillation.teacher.uri"
    assert inputs["teacher"].digest == preflight.digests[field] != inputs["model"].digest
    assert preflight.data is not None and planned.run.dataset.digest == preflight.data.digest


@pytest.mark.parametrize(
    ("spec", "rows", "config"),
    [
        ({"objective": {"type": "DPO"}}, PAIRS, {}),
        ({"objective": {"type": "ORPO"}}, PAIRS, {}),
        ({"objective": {"type": "KTO"}}, PAIRS, {}),
        ({"objective": {"type": "Reward"}}, PAIRS, {}),
        (
            {"objective": {"type": "GRPO", "grpo": {"rewards": [{"function": "ExactMatch"}], "maxNewTokens": 8}}},
            ASKED,
            {},
        ),
        (
            {
                "objective": {
                    "type": "PPO",
                    "ppo": {"rewards": [{"model": {"uri": "file://./reward"}}], "maxNewTokens": 8},
                }
            },
            ASKED,
            {},
        ),
        ({"objective": {"type": "Evaluation"}, "tuning": None}, ASKED, {}),
        ({"model": {"uri": "file://./model", "task": "SequenceClassification"}}, LABELLED, BERT),
        ({"model": {"uri": "file://./model", "adapter": {"uri": "file://./adapter"}}}, ASKED, {}),
    ],
)
def test_every_objective_is_planned_from_folders(
    folder: Folder, spec: dict[str, Any], rows: list[dict[str, Any]], config: dict[str, Any]
) -> None:
    folder.put("train", rows)
    folder.put_model("model", model_files(config=config))
    folder.put_model("adapter", adapter_files(r=2, lora_alpha=4))
    folder.put_model("reward", classifier(["LABEL_0"], family="llama"))
    _, planned = plan(write(folder, **spec))
    wanted = spec.get("objective", {"type": "Supervised"})["type"]
    assert planned.run.objective.type == wanted
    assert all(item.reference.uri.startswith("file:///") for item in planned.run.inputs())
    assert (planned.plan.total_steps == 0) == (wanted == "Evaluation")


def test_a_model_made_from_a_config_needs_no_weights_here_either(folder: Folder) -> None:
    (folder.root / "model" / "model.safetensors").unlink()
    (folder.root / "novel.txt").write_text("A line of a novel.\n" * 200)
    preflight, planned = plan(
        write(
            folder,
            dataset={"sources": [{"uri": "file://./novel.txt"}]},
            objective={"type": "Pretrain", "pretrain": {"tokenizer": "Character", "blockSize": 16}},
            tuning={"type": "Full"},
        )
    )
    assert planned.run.inputs()[0].kind == "Config" and preflight.model is not None
    text = io.StringIO()
    console = Console(file=text, width=200)
    show.show_preflight(console, preflight, folder.root / "job.yaml")
    show.show_plan(console, planned)
    assert "made from its config" in text.getvalue() and "Plan: Pretrain by Full of file://" in text.getvalue()


def test_offline_names_every_place_that_it_did_not_look_at(folder: Folder) -> None:
    path = write(
        folder,
        objective={"type": "Distillation", "distillation": {"teacher": {"uri": "hf://team/teacher"}}},
        output={"uri": "file://../out", "publish": {"uri": "hf://team/faq"}},
    )
    local = preparing.localise(read_job_file(path), None, {})
    preflight, skipped = preparing.check_offline(local, {}, folder.root / "scratch")
    assert preflight is None
    assert skipped[:2] == [
        "hf://team/teacher was not looked at",
        "hf://team/faq was not asked whether it takes the artifact",
    ]


def test_publishing_without_a_token_is_told_before_anything_runs(folder: Folder) -> None:
    path = write(folder, output={"uri": "file://../out", "publish": {"uri": "hf://team/faq"}})
    local = preparing.localise(read_job_file(path), None, {})
    result = preparing.check(local, {})
    assert [(item.failure_class, item.field) for item in result.findings if item.failure_class != "Info"] == [
        ("CredentialsRejected", "spec.output.publish.credentials")
    ]


@pytest.mark.parametrize(
    "spec",
    [
        {"evaluation": {"retention": {"uri": "file://./general", "credentials": {"secretName": "k"}}}},
        {"model": {"uri": "file://./model", "adapter": {"uri": "file://./a", "credentials": {"secretName": "k"}}}},
        {"output": {"uri": "file://../out", "publish": {"uri": "hf://a/b", "credentials": {"secretName": "k"}}}},
    ],
)
def test_credentials_anywhere_in_the_file_are_noted_as_the_clusters(folder: Folder, spec: dict[str, Any]) -> None:
    notes = preparing.localise(read_job_file(write(folder, **spec)), None, {}).notes
    assert [note for note in notes if note.startswith("credentials name objects of a cluster")] != []
    assert preparing.localise(read_job_file(write(folder)), None, {}).notes == ()


def shown(planned: Planned, **message: Any) -> str:
    text = io.StringIO()
    show.show_result(Console(file=text, width=120), planned.run, TerminationMessage(outcome="Succeeded", **message))
    return text.getvalue()


def test_an_evaluation_ends_with_its_report_alone(folder: Folder) -> None:
    _, planned = plan(write(folder, objective={"type": "Evaluation"}, tuning=None))
    text = shown(planned, artifact="report", base_eval_loss=2.5)
    assert "Loss: 2.5000" in text and "Artifact" not in text and "/out/report.md" in text


def test_perplexity_is_shown_only_where_the_loss_is_one_of_tokens(folder: Folder) -> None:
    _, tuned = plan(write(folder))
    losses = {"artifact": "adapter", "base_eval_loss": 3.5, "eval_loss": 2.5}
    assert "│ perplexity" in shown(tuned, **losses) and "-28.6%" in shown(tuned, **losses)
    folder.put("train", PAIRS)
    _, preferred = plan(write(folder, objective={"type": "DPO"}))
    assert "│ perplexity" not in shown(preferred, **losses) and "3.5000" in shown(preferred, **losses)


def test_the_command_runs_an_evaluation_with_its_adapter_and_benchmark(finetune, job, tmp_path: Path) -> None:
    files = adapter_files(base_model_name_or_path="model")
    for name, data in files.items():
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / name).write_bytes(data)
    (tmp_path / "arc.jsonl").write_text(json.dumps(ARC) + "\n")
    text = job().read_text().replace("  tuning: {type: LoRA}\n", "  objective: {type: Evaluation}\n")
    text = text.replace("  hyperparameters: {maxSteps: 4, learningRate: 0.01, globalBatchSize: 4}\n", "")
    text = text.replace("  checkpoint: {everySteps: 1000}\n", "")
    text = text.replace("/model}", "/model, adapter: {uri: file://./adapter}}")
    text += "  evaluation: {benchmarks: [{name: ArcEasy, source: {uri: file://./arc.jsonl}}]}\n"
    (tmp_path / "job.yaml").write_text(text)
    command = finetune("run", "-f", "job.yaml", "--work", "w", does={"steps": 1})
    assert command.execute() == 0, command.out + command.err
    assert "Plan: Evaluation of file://" in command.out
    inputs = tmp_path / "w" / "work" / "inputs"
    assert {path.name for path in (inputs / "adapter").iterdir()} == set(files)
    assert (inputs / "benchmarks" / "0" / "arc.jsonl").exists()
