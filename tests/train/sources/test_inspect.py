"""What is known of a model before its weights are downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.status import ModelFacts
from finetune_trainer.sources import Purpose, Reach, fetch, open_source
from finetune_trainer.sources.architectures import SUPPORTED, check_architecture, model_shape
from finetune_trainer.sources.inspect import chat_template, inspect_model
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
            "model type 'unheard-of' is not supported; supported are bloom",
        ),
        ({"config.json": b"{}"}, "has no model_type"),
        (
            {"config.json": b'{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}'},
            "LlamaForSequenceClassification is not a causal language model",
        ),
        ({"config.json": b'{"model_type": "llama", "quantization_config": {"bits": 4}}'}, "quantised already"),
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


def test_every_supported_model_type_is_a_causal_model_whose_shape_can_be_read() -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    for model_type in sorted(SUPPORTED):
        assert KNOWN[model_type].endswith(("ForCausalLM", "LMHeadModel")), model_type
        config = AutoConfig.for_model(model_type).to_dict()
        check_architecture(config)
        shape = model_shape(config)
        assert shape.hidden_size > 0 and shape.layers > 0 and shape.vocabulary_size > 0, model_type
