"""Small model folders as files in memory, and the storages that tests read them from."""

from __future__ import annotations

import json
import pickle
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from safetensors.numpy import save

from finetune_api.runfile import Reference
from tests.cluster.s3 import S3Server
from tests.train.data.making import backend

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 500,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
PARAMETERS = 500 * 8 + 8 * 16
INDEX = "model.safetensors.index.json"


class Boom:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.run, (["touch", "/tmp/finetune-pickle-ran"],)


PICKLE = pickle.dumps(Boom())


def model_files(
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    chat_template: str | None = None,
) -> dict[str, bytes]:
    """The files of a model with PARAMETERS parameters, by name; with shards > 1 an index and two weight files."""
    tensors = {"embed.weight": np.zeros((500, 8), np.float16), "mlp.weight": np.ones((8, 16), np.float16)}
    files = {"config.json": json.dumps(CONFIG | dict(config or {})).encode()}
    if shards == 1:
        files["model.safetensors"] = save(tensors)
    else:
        names = {key: f"model-0000{k}-of-00002.safetensors" for k, key in enumerate(tensors, 1)}
        files |= {names[key]: save({key: value}) for key, value in tensors.items()}
        files[INDEX] = json.dumps({"metadata": {}, "weight_map": names}).encode()
    if tokenizer:
        files["tokenizer.json"] = backend().to_str().encode()
        settings = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": chat_template}
        files["tokenizer_config.json"] = json.dumps(settings).encode()
    return files


def adapter_files(**config: Any) -> dict[str, bytes]:
    """The files of a LoRA adapter as PEFT saves them; keyword arguments change its config."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "team/model", "r": 2} | config
    names = ("lora_A.weight", "lora_B.weight")
    tensors = {f"base_model.model.model.layers.0.mlp.{name}": np.ones((2, 8), np.float32) for name in names}
    return {"adapter_config.json": json.dumps(settings).encode(), "adapter_model.safetensors": save(tensors)}


def reference(uri: str, *, profile: str | None = None, endpoint: str | None = None, **rest: Any) -> Reference:
    """A reference as the operator writes it."""
    return Reference.from_json({"uri": uri, "access": {"profile": profile, "endpoint": endpoint}, **rest})


def profile_env(profile: str, keys: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a pod finds keys as a credentials profile."""
    return {f"FINETUNE_CRED_{profile.upper()}_{name}": value for name, value in keys.items()}


def upload(s3: S3Server, bucket: str, prefix: str, files: Mapping[str, bytes]) -> str:
    """Puts files below bucket/prefix as root; returns the s3:// URI."""
    client = boto3.client("s3", **s3.client_options())
    for name, data in files.items():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)
    return f"s3://{bucket}/{prefix}"


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Writes files below folder; returns folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
