"""Layers and patterns that a job names are looked up in the headers of the weight files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from finetune_api.job import Task
from finetune_api.runfile import Reference, StorageAccess
from finetune_trainer.preflight.names import check_names
from finetune_trainer.sources.architectures import TASKS
from finetune_trainer.sources.place import Purpose, Reach
from finetune_trainer.sources.places import open_source
from tests.train.models import FAMILIES, tiny_model
from tests.train.preflight.local import LABELLED, Folder, faults, told
from tests.train.sources.making import model_files

LLAMA = (
    "model.embed_tokens",
    "model.norm",
    *(f"model.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")),
)
MIXTRAL = ("lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.experts.3.w1")
_HEADS = {Task.SEQ2SEQ: "Seq2SeqLM"}
BERT = ("bert.embeddings.word_embeddings", "bert.encoder.layer.0.output.dense")


def put(folder: Folder, layers: tuple[str, ...], **config: Any) -> None:
    weights = save({f"{name}.weight": np.zeros((2, 2), np.float32) for name in layers})
    folder.put_model("model", model_files(config=config) | {"model.safetensors": weights})


@pytest.mark.parametrize(
    ("tuning", "field", "words"),
    [
        (
            {"lora": {"targetModules": ["query_key_value", "qproj"]}},
            "lora.targetModules",
            "called query_key_value or qproj. Close are: ",
        ),
        ({"lora": {"targetModules": ["q_prog"]}}, "lora.targetModules", "model.layers.*.self_attn.q_proj"),
        ({"tuning": "IA3", "ia3": {"targetModules": ["k_proj"]}}, "ia3.targetModules", "self_attn.q_proj"),
        (
            {"tuning": "Full", "full": {"freeze": ["*embed_tokens*", "*.self_atn.*"]}},
            "full.freeze",
            "'*.self_atn.*' matches no parameter of this model. Close are: model.layers.*.self_attn.q_proj.weight",
        ),
        ({"tuning": "Full", "full": {"trainable": ["model.layers.2.*"]}}, "full.trainable", "model.layers.2.*"),
        ({"tuning": "Full", "full": {"trainable": ["mlp"]}}, "full.trainable", "model.layers.*.mlp.up_proj.weight"),
    ],
)
def test_a_name_that_no_layer_has_is_told_with_the_closest(
    tmp_path: Path, tuning: dict[str, Any], field: str, words: str
) -> None:
    folder = Folder(tmp_path)
    put(folder, LLAMA)
    result = folder.check(**tuning)
    assert told(result) == [("InvalidSpec", f"spec.tuning.{field}")]
    assert words in faults(result)[0].message


@pytest.mark.parametrize(
    ("layers", "config", "tuning"),
    [
        (LLAMA, {}, {"lora": {"targetModules": ["all-linear"]}}),
        (LLAMA, {}, {"lora": {"targetModules": ["q_prog", "self_attn.q_proj"]}}),
        (LLAMA, {}, {"lora": {"targetModules": ["model.layers.1.mlp.up_proj"]}}),
        (LLAMA, {}, {"tuning": "Full", "full": {"freeze": ["*layernorm*", "model.layers.[01].mlp.*"]}}),
        # The head is the embedding again, and the file has it once.
        (LLAMA, {"tie_word_embeddings": True}, {"tuning": "Full", "full": {"trainable": ["lm_head*", "*.norm.*"]}}),
        # Published without the prefix that the library puts before it.
        (("h.0.attn.c_attn",), {"model_type": "gpt2"}, {"lora": {"targetModules": ["transformer.h.0.attn.c_attn"]}}),
        (("h.0.attn.c_attn",), {"model_type": "gpt2"}, {"tuning": "Full", "full": {"freeze": ["transformer.h.0.*"]}}),
        # Experts that the library holds in one weight, and a block with another name.
        (MIXTRAL, {"model_type": "mixtral"}, {"tuning": "Full", "full": {"freeze": ["*.mlp.experts.gate_up_proj"]}}),
        (MIXTRAL, {"model_type": "mixtral"}, {"tuning": "Full", "full": {"trainable": ["model.layers.0.mlp.gate.*"]}}),
        (MIXTRAL, {"model_type": "mixtral"}, {"lora": {"targetModules": ["absent"], "experts": True}}),
        # A head that training makes.
        (BERT, {"model_type": "bert"}, {"tuning": "Full", "full": {"trainable": ["classifier.*", "bert.pooler.*"]}}),
    ],
)
def test_a_name_that_the_library_gives_passes(
    tmp_path: Path, layers: tuple[str, ...], config: dict[str, Any], tuning: dict[str, Any]
) -> None:
    folder = Folder(tmp_path)
    put(folder, layers, **config, architectures=None)
    task = {}
    if layers is BERT:
        folder.put("train", LABELLED)
        task = {"task": "SequenceClassification"}
    result = folder.check(**tuning, **task)
    assert told(result) == []


@pytest.mark.parametrize("tied", [False, True])
def test_every_name_that_the_library_gives_a_model_passes(tmp_path: Path, tied: bool) -> None:
    import transformers

    folder = Folder(tmp_path)
    for family in FAMILIES:
        made = tiny_model(family, tied=tied)
        reference = Reference(uri=made.as_uri(), access=StorageAccess())
        reach = Reach(env={}, allow_file=True)
        place = open_source(reference, purpose=Purpose.MODEL, field="model.uri", reach=reach)
        for task in TASKS[family]:
            auto = getattr(transformers, f"AutoModelFor{_HEADS.get(task, task)}")
            model = auto.from_config(transformers.AutoConfig.from_pretrained(made))
            names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
            assert len(names) > 10
            for start in range(0, len(names), 64):
                file = folder.file(tuning="Full", full={"trainable": names[start : start + 64]})
                check_names(file, place, family)
