"""What is known of a model before its weights are downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from finetune_api.failures import FinetuneError
from finetune_api.job import ObjectiveType, Task
from finetune_api.status import ModelFacts
from finetune_trainer.sources import Purpose, Reach, fetch, open_source
from finetune_trainer.sources.inspect import Use, chat_template, inspect_model
from tests.train.sources.hub_server import HubServer, Repository
from tests.train.sources.making import INDEX, PARAMETERS, model_files, reference, write_files

REACH = Reach(env={}, allow_file=True)


def inspect(folder: Path) -> ModelFacts:
    place = open_source(reference(folder.as_uri()), purpose=Purpose.MODEL, field="model.uri", reach=REACH)
    return inspect_model(place)


@pytest.mark.parametrize("shards", [1, 2])
def test_parameters_and_shape_come_from_headers_and_config(tmp_path: Path, shards: int) -> None:
    files = model_files(shards=shards)
    facts = inspect(write_files(tmp_path / "m", files))
    weights = sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))
    assert (facts.parameters, facts.weight_bytes) == (PARAMETERS, weights)
    assert (facts.model_type, facts.architecture) == ("llama", "LlamaForCausalLM")
    assert (facts.hidden_size, facts.layers, facts.vocabulary_size, facts.max_positions) == (8, 2, 500, 64)
    assert facts.has_chat_template is False
    fetched = fetch(
        reference((tmp_path / "m").as_uri()), tmp_path / "got", purpose=Purpose.MODEL, field="model.uri", reach=REACH
    )
    assert facts.digest == fetched.digest


def test_weights_on_a_hub_are_counted_without_downloading_them(hub: HubServer) -> None:
    files = model_files()
    files["model.safetensors"] += b""
    hub.repositories["team/model"] = Repository(files)
    place = open_source(
        reference("hf://team/model"),
        purpose=Purpose.MODEL,
        field="model.uri",
        reach=Reach(env={"HF_ENDPOINT": hub.endpoint}),
    )
    assert inspect_model(place).parameters == PARAMETERS
    weights = [line for line in hub.requests if "model.safetensors" in line]
    assert weights and all(" 206 " in line for line in weights)


def test_a_chat_template_is_found_wherever_it_is_stored(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    stored = {
        "A": {"chat_template.jinja": b"A"},
        "B": {"chat_template.json": b'{"chat_template": "B"}'},
        "C": {"tokenizer_config.json": b'{"chat_template": "C"}'},
        "D": {"tokenizer_config.json": json.dumps({"chat_template": named}).encode()},
    }
    for expected, files in stored.items():
        folder = write_files(tmp_path / expected, model_files() | files)
        place = open_source(reference(folder.as_uri()), purpose=Purpose.MODEL, field="model.uri", reach=REACH)
        assert chat_template(place, field="model.uri") == expected
        assert inspect_model(place).has_chat_template


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b'{"model_type": "llama",\n "hidden_size": }'}, "config.json line 2 is not valid JSON"),
        ({"config.json": b"[]"}, "config.json is not a JSON object"),
        (
            {"config.json": b'{"model_type": "unheard-of"}'},
            "model type 'unheard-of' is not supported; supported for CausalLM are bloom",
        ),
        ({"config.json": b"{}"}, "has no model_type"),
        (
            {"config.json": b'{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}'},
            "LlamaForSequenceClassification has no head for CausalLM",
        ),
        ({"config.json": b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'}, "by gptq"),
        ({"config.json": b'{"model_type": "llama"}'}, "config.json has no hidden_size"),
        ({"model.safetensors": b"\xff" * 64}, "model.safetensors at .* has no safetensors header"),
        ({"model.safetensors": model_files()["model.safetensors"][:-10]}, r"it should have 8\d+ bytes and has 8\d+"),
        ({INDEX: b"{}"}, "is not a weight index"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_refused_with_the_reason(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(FinetuneError, match=message) as caught:
        inspect(write_files(tmp_path / "m", model_files() | files))
    assert (caught.value.failure_class, caught.value.field) == ("ModelUnsupported", "spec.model.uri")


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match=r"has no tokenizer \(tokenizer.json or tokenizer.model\)"):
        inspect(write_files(tmp_path / "m", model_files(tokenizer=False)))


def test_a_model_that_is_made_anew_needs_its_config_only(tmp_path: Path) -> None:
    files = model_files(config={"tie_word_embeddings": True})
    del files["model.safetensors"]
    folder = write_files(tmp_path / "m", files)
    place = open_source(reference(folder.as_uri()), purpose=Purpose.CONFIG, field="model.uri", reach=REACH)
    facts = inspect_model(place, Use(objective=ObjectiveType.PRETRAIN))
    # 500 tokens of width 8; two layers of four 8 × 8 matrices of attention and three of 8 × 16.
    assert (facts.parameters, facts.weight_bytes) == (500 * 8 + 2 * (4 * 64 + 3 * 128), 0)
    target = tmp_path / "got"
    fetched = fetch(reference(folder.as_uri()), target, purpose=Purpose.CONFIG, field="model.uri", reach=REACH)
    assert facts.digest == fetched.digest and {file.name for file in fetched.files} == set(files)


def test_a_model_whose_tokenizer_is_learnt_needs_none(tmp_path: Path) -> None:
    files = {"config.json": model_files()["config.json"]}
    folder = write_files(tmp_path / "m", files)
    place = open_source(reference(folder.as_uri()), purpose=Purpose.CONFIG, field="model.uri", reach=REACH)
    use = Use(objective=ObjectiveType.PRETRAIN, learns_tokenizer=True)
    assert inspect_model(place, use).vocabulary_size == 500
    with pytest.raises(FinetuneError, match="has no tokenizer"):
        inspect_model(place, Use(objective=ObjectiveType.PRETRAIN))


def test_a_byte_of_four_bit_weights_counts_as_two_parameters(tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.weight"
    tensors = {
        "embed.weight": np.zeros((500, 8), np.float16),
        layer: np.zeros((64, 1), np.uint8),
        f"{layer}.absmax": np.zeros(2, np.float32),
        f"{layer}.quant_state.bitsandbytes__nf4": np.zeros(80, np.uint8),
    }
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    files = model_files(config=quantised) | {"model.safetensors": save(tensors)}
    facts = inspect(write_files(tmp_path / "m", files))
    assert (facts.parameters, facts.quantization) == (500 * 8 + 128, "bitsandbytes")


def test_a_classifier_is_described_for_its_task(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 512}
    folder = write_files(tmp_path / "m", model_files(config=config))
    place = open_source(reference(folder.as_uri()), purpose=Purpose.MODEL, field="model.uri", reach=REACH)
    facts = inspect_model(place, Use(task=Task.SEQUENCE_CLASSIFICATION))
    assert (facts.model_type, facts.encoder, facts.max_positions) == ("bert", True, 512)
    with pytest.raises(FinetuneError, match=r"cannot be used with model\.task CausalLM") as caught:
        inspect_model(place, Use(task=Task.CAUSAL_LM))
    assert caught.value.field == "spec.model.task"
