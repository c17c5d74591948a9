"""What a user gets from a run: a model that has learned, and a report that says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.worker.runs import FULL, QLORA, Work, in_child, work_for

LEARNING = {
    "LoRA": {"learningRate": 1e-2},
    "QLoRA": {**QLORA, "learningRate": 1e-2},
    "Full": {**FULL, "learningRate": 3e-3},
}


@pytest.mark.parametrize("method", LEARNING)
def test_each_method_learns_the_task(tmp_path: Path, method: str) -> None:
    changes: dict[str, Any] = {**LEARNING[method], "totalSteps": 40, "microBatchSize": 4, "warmupRatio": 0.1}
    work = work_for(tmp_path / "w", model={"width": 64, "spread": 0.2}, **changes)

    assert work.train() == [0], work.logged()

    losses = [line["loss"] for line in work.metrics() if "loss" in line]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(7.5, abs=0.2), "a random model with a wide head is surely wrong"
    assert losses[-1] < 1.0
    result = work.read("state/result.json")
    assert result["artifact"] == ("model" if method == "Full" else "adapter")
    assert result["step"] == 40
    assert result["evalLoss"] < 1.0
    assert result["baseEvalLoss"] > 7.0
    assert in_child(_plain_loss, str(work.root), method) == pytest.approx(result["evalLoss"], rel=0.02), (
        "loaded plainly, the artifact does as well as the report says"
    )


def _plain_loss(root: str, method: str) -> float:
    """Held-out loss of the artifact as a user loads it, by plain torch over single records."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from finetune_api.runfile import RunFile
    from finetune_trainer.data import load_dataset

    folder = Path(root)
    artifact = folder / "artifact" / ("model" if method == "Full" else "adapter")
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    if method == "Full":
        model = AutoModelForCausalLM.from_pretrained(artifact)
    else:
        options = (
            {}
            if method == "LoRA"
            else {
                "dtype": torch.bfloat16,
                "quantization_config": BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.bfloat16,
                ),
            }
        )
        base = AutoModelForCausalLM.from_pretrained(folder / "inputs/model", **options)
        model = PeftModel.from_pretrained(base, artifact).train()  # no dropout; see loading.py on evaluation mode
    run = RunFile.from_json(json.loads((folder / "run.json").read_text()))
    total, count = 0.0, 0
    for example in load_dataset(run, folder / "inputs", tokenizer).validation:
        ids = torch.from_numpy(example.input_ids.astype("int64"))[None]
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        for position in range(1, ids.shape[1]):
            if example.labels[position] != -100:
                total -= float(logs[position - 1, int(example.labels[position])])
                count += 1
    return total / count


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """One run started as the agent starts it, from a cold interpreter."""
    work = work_for(
        tmp_path_factory.mktemp("cold") / "w", model={"chat_template": True}, evaluateSteps=2, mergeAdapter=True
    )
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    command = [
        sys.executable,
        "-m",
        "finetune_trainer.worker",
        "--run-file",
        str(work.root / "run.json"),
        "--work",
        str(work.root),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (work.root / "worker-0.log").write_text(done.stdout)
    return work


def test_the_log_is_json_and_shows_settings_and_one_sample_once(finished: Work) -> None:
    lines = [json.loads(line) for line in finished.logged().splitlines()]
    events = [line["event"] for line in lines]
    assert events == ["setting", "sample", "loaded", "published"]
    assert lines[0]["field"] == "hyperparameters.learningRate"
    assert lines[0]["source"] == "spec"
    assert "⟦" in lines[1]["text"]


def test_the_report_holds_lineage_parameters_losses_and_answers(finished: Work) -> None:
    report = finished.read("artifact/report.json")
    assert report["lineage"]["baseModel"] == "hf://tiny/llama"
    assert report["lineage"]["baseModelRevision"] == "abc123"
    assert report["lineage"]["baseModelDigest"] == "sha256:m"
    assert report["lineage"]["datasetDigest"] == "sha256:d"
    assert report["lineage"]["runFileDigest"] == finished.run.digest()
    assert report["settings"] == finished.run.settings
    # rank 4 on q, k, v, o, gate, up, down of two layers: 4 x (in + out) each
    assert report["parameters"]["trainable"] == 2 * 4 * (64 + 48 + 48 + 64 + 96 + 96 + 96)
    assert report["parameters"]["trainableShare"] == pytest.approx(
        report["parameters"]["trainable"] / report["parameters"]["total"]
    )
    evaluation = report["evaluation"]
    base, tuned = evaluation["base"], evaluation["tuned"]
    assert base.keys() == tuned.keys() == {"loss", "perplexity", "tokenAccuracy"}
    change = (tuned["loss"] / base["loss"] - 1) * 100
    assert evaluation["changePercent"]["loss"] == pytest.approx(change)
    assert tuned["perplexity"] == pytest.approx(2.718281828 ** tuned["loss"], rel=1e-6)
    assert (evaluation["on"], evaluation["records"]) == ("validation", 5)
    result = finished.read("state/result.json")
    assert (result["baseEvalLoss"], result["evalLoss"]) == (base["loss"], tuned["loss"])
    assert len(report["answers"]) == 3
    assert {"prompt", "reference", "base", "tuned"} <= report["answers"][0].keys()
    training, parameters = report["training"], report["parameters"]
    assert (training["steps"], training["publishedStep"], training["stoppedEarly"]) == (4, 4, False)
    assert training["tokens"] > 0
    assert training["flops"] == (4 * parameters["total"] + 2 * parameters["trainable"]) * training["tokens"]
    folder = finished.root / "artifact"
    weights = [path for name in ("adapter", "merged") for path in (folder / name).rglob("*") if path.is_file()]
    assert report["artifactBytes"] == sum(path.stat().st_size for path in weights)


def test_the_readable_report_has_the_tables_and_the_curves(finished: Work) -> None:
    text = (finished.root / "artifact/report.md").read_text()
    assert "| Prompt | Reference | Base | Tuned |" in text
    assert "| loss | " in text
    assert "| hyperparameters.learningRate | 0.01 | spec |" in text
    assert "sha256:d" in text and "sha256:m" in text
    for name in ("loss", "learning-rate", "gradient-norm", "tokens-per-second"):
        assert f"({name}.png)" in text
        assert (finished.root / f"artifact/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_one_line_per_logged_step(finished: Work) -> None:
    lines = finished.metrics()
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "evalLoss" in line] == [0, 2, 4]
    assert lines[1].keys() == {"step", "epoch", "loss", "gradNorm", "learningRate", "tokensPerSecond"}


def test_the_artifact_loads_plainly_with_template_and_base_name(finished: Work) -> None:
    adapter = finished.root / "artifact/adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/llama"
    assert config["revision"] == "abc123"
    assert in_child(_template, str(adapter)).startswith("<s><|user|>\nhi")
    assert str(finished.root) not in (adapter / "README.md").read_text(), "no path of the pod leaks"
    assert (adapter / "generation_config.json").is_file()
    assert finished.read("artifact/merged/config.json")["use_cache"] is True


def _template(folder: str) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_progress_ends_at_publishing_and_fits_the_contract(finished: Work) -> None:
    from finetune_api.documents import ProgressDocument

    document = ProgressDocument.from_json({"attempt": 1, **finished.read("state/progress.json")})
    assert (document.stage, document.step, document.total_steps) == ("Publishing", 4, 4)
    assert document.eval_loss == pytest.approx(finished.read("state/result.json")["evalLoss"])
    assert document.tokens_per_second is not None and document.tokens_per_second > 0
    assert document.eta_seconds == 0


def test_a_checkpoint_holds_neither_pickled_arguments_nor_scripts(finished: Work) -> None:
    names = {path.name for path in (finished.root / "checkpoints/step-4").rglob("*")}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert not names & {"training_args.bin", "zero_to_fp32.py"}
    assert finished.read("checkpoints/step-4.ready")["step"] == 4
    assert finished.read("checkpoints/step-4.ready")["metrics"].keys() == {"loss", "evalLoss"}
