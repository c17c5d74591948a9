"""What is measured of base and tuned model: metrics, answers, predictions, probes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import Case
from tests.train.methods.cases import CASES
from tests.train.worker.runs import Work, build_engine_in, in_child, made_model

WORDS = ("red", "blue", "green", "black", "white", "grey")
SAY = [{"prompt": f"say {word}: ", "completion": word} for word in WORDS] * 6
"""Six records that a model can learn by heart; the held-out ones are the same."""


def work_of(root: Path, changes: dict[str, Any], **options: Any) -> Work:
    """A run on SAY with its own held-out records, unless options name others."""
    given = {"model": {"spread": 0.2}, "rows": SAY, "folders": {"validation": SAY[:6]}, **options}
    own = {"dataset": {"validationFraction": None, "validation": {"uri": "s3://b/v.jsonl", "access": {}}}}
    return Case("evaluation", changes={**own, **changes}, **given).work(root)


def evaluation_of(work: Work) -> dict[str, Any]:
    return work.read("artifact/report.json")["evaluation"]


def lines_of(work: Work, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work.root / "artifact" / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A run that learns its six records, with metrics of text, probes, and a test set of two records."""
    work = work_of(
        tmp_path_factory.mktemp("learned") / "w",
        {
            "dataset": {
                "validationFraction": None,
                "validation": {"uri": "s3://b/v.jsonl", "access": {}},
                "test": {"uri": "s3://b/t.jsonl", "access": {}},
            },
            "hyperparameters": {"totalSteps": 60, "microBatchSize": 6, "gradientAccumulation": 1},
            "evaluation": {
                "everySteps": 30,
                "metrics": ["exactMatch", "rougeL"],
                "maxGenerated": 4,
                "probes": ["Mars", "say red: "],
                "require": [{"metric": "exactMatch", "min": 0.5}, {"metric": "loss", "max": 1.0}],
            },
        },
        model={"spread": 0.2, "width": 64},
        folders={"validation": SAY[:6], "test": SAY[:2]},
    )
    assert work.train() == [0], work.logged()
    return work


def test_the_metrics_of_the_end_are_those_of_the_test_set(learned: Work) -> None:
    found = evaluation_of(learned)
    assert (found["on"], found["records"]) == ("test", 2)
    last = learned.metrics()[-1]
    assert last["step"] == 60
    assert last["evalLoss"] != found["tuned"]["loss"], "the curve shows the validation set"
    result = learned.read("state/result.json")
    assert (result["baseEvalLoss"], result["evalLoss"]) == (found["base"]["loss"], found["tuned"]["loss"])


def test_generated_answers_are_scored_for_base_and_tuned_model(learned: Work) -> None:
    found = evaluation_of(learned)
    assert {"bleu", "rouge1", "rouge2", "rougeL", "exactMatch"} <= found["base"].keys() & found["tuned"].keys()
    assert found["base"]["exactMatch"] == 0.0
    lines = lines_of(learned, "predictions.jsonl")
    assert found["tuned"]["exactMatch"] == sum(line["tuned"] == line["reference"] for line in lines) / len(lines)
    assert found["tuned"]["exactMatch"] == 1.0
    assert found["tuned"]["rougeL"] == 1.0


def test_predictions_hold_prompt_reference_and_both_answers(learned: Work) -> None:
    lines = lines_of(learned, "predictions.jsonl")
    assert [line["reference"] for line in lines] == ["red", "blue"]
    assert all(line.keys() == {"prompt", "reference", "base", "tuned", "origin"} for line in lines)
    assert "say red" in lines[0]["prompt"]


def test_probes_are_answered_by_base_and_tuned_model(learned: Work) -> None:
    probes = learned.read("artifact/report.json")["probes"]
    assert [probe["prompt"] for probe in probes] == ["Mars", "say red: "]
    assert all(probe["base"] != probe["tuned"] for probe in probes)
    assert "## Probes" in (learned.root / "artifact/report.md").read_text()


def test_requirements_that_are_met_are_shown_and_end_nothing(learned: Work) -> None:
    found = evaluation_of(learned)
    assert [(item["metric"], item["met"]) for item in found["requirements"]] == [("exactMatch", True), ("loss", True)]
    assert found["unmet"] is None
    assert learned.read("state/result.json")["unmet"] is None


@pytest.mark.parametrize(
    ("evaluation", "field", "said"),
    [
        ({"metrics": ["accurracy"]}, "spec.evaluation.metrics[0]", "loss, perplexity, tokenAccuracy, bleu"),
        ({"require": [{"metric": "f1", "min": 1}]}, "spec.evaluation.require[0].metric", "no metric 'f1'"),
        ({"require": [{"metric": "loss"}]}, "spec.evaluation.require[0]", "needs min or max"),
    ],
)
def test_a_metric_that_the_task_lacks_is_refused_before_anything_is_loaded(
    tmp_path: Path, evaluation: dict[str, Any], field: str, said: str
) -> None:
    work = work_of(tmp_path / "w", {"evaluation": evaluation})
    (work.root / "inputs/model/model.safetensors").unlink()
    assert work.train() == [64], work.logged()
    error = work.read("state/error-0.json")
    assert error["field"] == field
    assert said in error["message"]


def test_a_requirement_without_held_out_records_is_refused(tmp_path: Path) -> None:
    work = work_of(
        tmp_path / "w",
        {"dataset": {"validationFraction": None}, "evaluation": {"require": [{"metric": "loss", "max": 1}]}},
        folders={},
    )
    assert work.train() == [64], work.logged()
    assert "Set dataset.validation" in work.read("state/error-0.json")["message"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "falcon", "t5"])
def test_answers_do_not_depend_on_what_else_is_in_the_batch(tmp_path: Path, family: str) -> None:
    assert in_child(_answers_alone_and_together, str(made_model(family=family, spread=0.2)))


def _answers_alone_and_together(folder: str) -> bool:
    """Whether prompts of unequal length are answered together as each of them alone."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from finetune_api.job import Generation
    from finetune_trainer.worker.evaluate.generation import Generator

    auto = AutoModelForSeq2SeqLM if "t5" in Path(folder, "config.json").read_text() else AutoModelForCausalLM
    engine = SimpleNamespace(
        model=auto.from_pretrained(folder),
        args=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(autocast=nullcontext),
        supervision=SimpleNamespace(zero_stage=0, heartbeat=SimpleNamespace(long_phase=nullcontext)),
        look_for_stop=lambda: None,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = Generator(Generation(max_new_tokens=12), tokenizer, seed=1)
    texts = ["a", "Question: what colour is the sky?", "hello world", "The capital of France is", "x y z", "Paris."]
    prompts = [np.asarray(tokenizer(text)["input_ids"], dtype=np.int32) for text in [*texts, *texts]]
    together = generator.answers(engine, prompts)
    assert len(set(together)) > 2, "the answers differ, so that a mix-up would show"
    return together == [generator.answers(engine, [prompt])[0] for prompt in prompts]


def test_predicted_classes_come_with_their_probabilities_and_agree_with_the_metrics(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "classification-full")
    work = case.work(tmp_path / "w", {"evaluation": {"metrics": ["accuracy"], "require": [{"metric": "f1", "min": 0}]}})
    assert work.train() == [0], work.logged()
    lines, found = lines_of(work, "predictions.jsonl"), evaluation_of(work)
    assert len(lines) == found["records"]
    for line in lines:
        for who in ("base", "tuned"):
            probabilities = line[f"{who}Probabilities"]
            assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
            assert line[who] == max(probabilities, key=probabilities.__getitem__)
    for who in ("base", "tuned"):
        right = sum(line[who] == line["label"] for line in lines)
        assert found[who]["accuracy"] == pytest.approx(right / len(lines))
    assert found["notes"]["f1"], "the report says which F1 it is"


def test_evaluation_gathers_no_logits(tmp_path: Path) -> None:
    work = work_of(tmp_path / "w", {}, model={"vocabulary": 20_000})
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    few, many = in_child(_peak_of_evaluation, str(work.root))
    logits = 20_000 * 4 * 2 * 10  # of one micro batch of two short records in fp32, at least
    assert few > logits
    assert many < few + logits / 2, "ten times the records hold no more memory at once"


def _peak_of_evaluation(root: str) -> tuple[int, int]:
    """Bytes of live tensors at the worst moment of an evaluation of 6 and of 60 records."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    from finetune_trainer.worker.evaluate.measuring import measure_items

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self.seen: set[int] = set()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor):
                    self.add(value.untyped_storage())
            return result

        def add(self, storage: Any) -> None:
            key = storage._cdata
            if key in self.seen:
                return
            self.seen.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, storage.nbytes())

        def drop(self, key: int, size: int) -> None:
            self.seen.discard(key)
            self.now -= size

    engine = build_engine_in(root)
    items = [engine.eval_dataset[k] for k in range(6)]
    peaks = []
    for times in (1, 10):
        with Live() as live:
            measure_items(engine, items * times)
        peaks.append(live.peak)
    return peaks[0], peaks[1]
