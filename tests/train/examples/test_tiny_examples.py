"""Every example at tiny size runs on a CPU, from its file to an artifact with a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hack.tiny_examples import EXAMPLES
from tests.train.examples.running import NAMES, Examples
from tests.train.worker.runs import in_child


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    root = tmp_path_factory.mktemp("tiny")
    in_child(_make, str(root))
    return Examples(root)


def _make(root: str) -> None:
    from hack.tiny_examples import make

    make(Path(root))


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_example_ends_with_its_artifact_and_a_report(name: str, examples: Examples) -> None:
    work = examples.run(name)
    report = work.read("artifact/report.json")
    result = work.read("state/result.json")
    assert report["objective"]["type"] == work.run.objective.type
    assert result["step"] == work.run.hyperparameters.total_steps
    assert (work.root / "artifact" / "report.md").stat().st_size > 500
    if result["artifact"] != "report":
        weights = list((work.root / "artifact" / result["artifact"]).glob("*.safetensors"))
        assert weights
    if work.run.hyperparameters.total_steps:
        lines = (work.root / "artifact/metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]
        assert steps == list(range(1, work.run.hyperparameters.total_steps + 1))


def test_the_character_model_is_made_from_the_config_that_is_shipped(examples: Examples) -> None:
    config = examples.run("character-model-novel").read("artifact/model/config.json")
    assert [config[name] for name in ("n_embd", "n_head", "n_layer", "attn_pdrop")] == [384, 6, 6, 0.2]


def test_the_novel_is_gone_on_with_from_the_weights_of_the_base(examples: Examples) -> None:
    work = examples.run("gpt2-novel")
    assert work.read("artifact/report.json")["data"]["trainRecords"] == 1, "one text, not its lines"
    folders = (examples.root / "models/gpt2", work.root / "artifact/model")
    added, largest = in_child(_compared, *map(str, folders))
    assert added == 4
    assert 0 < largest < 1e-3, "four small steps away"


def _compared(base: str, tuned: str) -> tuple[int, float]:
    from transformers import AutoModelForCausalLM

    first, last = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tuned))
    rows = [model.get_input_embeddings().weight.shape[0] for model in (first, last)]
    pairs = zip(first.transformer.h.parameters(), last.transformer.h.parameters(), strict=True)
    return rows[1] - rows[0], max(float((before - after).abs().max()) for before, after in pairs)


def test_the_biomedical_entities_have_the_eleven_labels_of_the_recipe(examples: Examples) -> None:
    labels = examples.run("ner-lora-llama-2-7b").read("artifact/adapter/config.json")["id2label"].values()
    assert len(labels) == 11
    assert {label[:2] for label in labels} == {"O", "B-", "I-"}


def test_the_mixture_of_data_draws_from_both_files(examples: Examples) -> None:
    drawn = examples.run("mixture-of-data").read("artifact/report.json")["data"]["recordsBySource"]
    counts = {uri.rpartition("/")[2]: number for uri, number in drawn.items()}
    assert counts == {"chat.jsonl": 14, "general-chat.jsonl": 4}


def test_the_adapter_on_a_quantised_base_leaves_it_quantised(examples: Examples) -> None:
    work = examples.run("quantised-base")
    assert work.run.tuning.quantization is None
    parameters = work.read("artifact/report.json")["parameters"]
    assert parameters["quantised"] == parameters["adapted"] > 0


def test_every_example_for_a_gpu_pool_has_a_tiny_twin() -> None:
    real = {path.stem for folder in ("methods", "recipes") for path in (EXAMPLES.parent / folder).glob("*.yaml")}
    assert real == set(NAMES)
