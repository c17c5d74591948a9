"""Models and data from every kind of place, and what a missing or unsafe one is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.runfile import Reference
from finetune_trainer.sources import Purpose, Reach, data_digest, fetch, model_digest, open_source
from tests.cluster.s3 import S3Server
from tests.train.sources.hub_server import HubServer, Repository
from tests.train.sources.making import (
    INDEX,
    PICKLE,
    adapter_files,
    model_files,
    profile_env,
    reference,
    upload,
    write_files,
)

Put = Callable[[str, Mapping[str, bytes]], tuple[Reference, Reach]]
DATA = {"train.jsonl": b'{"text": "a"}\n', "more/b.csv": b"text\nb\n", "README.md": b"# Data", "notes.docx": b"x"}


@pytest.fixture(params=["s3", "hf", "pvc", "file"])
def put(request: pytest.FixtureRequest, s3: S3Server, hub: HubServer, tmp_path: Path) -> Put:
    """Puts files somewhere; returns the reference to them and the reach of a pod."""

    def to_s3(name: str, files: Mapping[str, bytes]) -> tuple[Reference, Reach]:
        uri = upload(s3, "team-a", f"{tmp_path.name}/{name}", files)
        env = profile_env("TEAM", s3.environment("team-a"))
        return reference(uri, profile="team", endpoint=s3.endpoint), Reach(env=env)

    def to_hub(name: str, files: Mapping[str, bytes]) -> tuple[Reference, Reach]:
        kind = "datasets/" if name == "data" else ""
        hub.repositories[f"{kind}team/{name}"] = Repository(dict(files), token="hf_secret_token")
        env = profile_env("TEAM", {"HF_TOKEN": "hf_secret_token\n"}) | {"HF_ENDPOINT": hub.endpoint}
        return reference(f"hf://{kind}team/{name}", profile="team"), Reach(env=env)

    def to_claim(name: str, files: Mapping[str, bytes]) -> tuple[Reference, Reach]:
        write_files(tmp_path / "claims" / "shared" / name, files)
        return reference(f"pvc://shared/{name}"), Reach(env={}, claims=tmp_path / "claims")

    def to_folder(name: str, files: Mapping[str, bytes]) -> tuple[Reference, Reach]:
        write_files(tmp_path / "files" / name, files)
        return reference((tmp_path / "files" / name).as_uri()), Reach(env={}, allow_file=True)

    return {"s3": to_s3, "hf": to_hub, "pvc": to_claim, "file": to_folder}[request.param]


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_arrives_with_what_it_needs_and_nothing_that_runs_code(put: Put, tmp_path: Path, shards: int) -> None:
    files = model_files(shards=shards)
    planted = {"pytorch_model.bin": PICKLE, "training_args.pt": PICKLE, "modeling_x.py": b"import os", "x.pkl": PICKLE}
    source, reach = put("model", files | planted)
    beats: list[int] = []
    reach = Reach(env=reach.env, claims=reach.claims, allow_file=reach.allow_file, beat=lambda: beats.append(1))
    fetched = fetch(source, tmp_path / "got", purpose=Purpose.MODEL, field="model.uri", reach=reach)
    assert names(tmp_path / "got") == set(files)
    assert all((tmp_path / "got" / name).read_bytes() == data for name, data in files.items())
    assert {file.name: file.size for file in fetched.files} == {name: len(data) for name, data in files.items()}
    assert fetched.digest == model_digest(fetched.files) and beats


def test_a_folder_of_data_arrives_without_what_holds_no_records(put: Put, tmp_path: Path) -> None:
    source, reach = put("data", DATA)
    fetched = fetch(source, tmp_path / "got", purpose=Purpose.DATA, field="dataset.sources[0].uri", reach=reach)
    assert names(tmp_path / "got") == {"train.jsonl"} | ({"more/b.csv"} if not source.uri.startswith("hf") else set())
    assert (tmp_path / "got" / "train.jsonl").read_bytes() == DATA["train.jsonl"]
    assert fetched.digest == data_digest([(source.uri, fetched.files)])


def test_one_data_file_arrives_under_its_own_name(put: Put, tmp_path: Path) -> None:
    source, reach = put("data", DATA)
    source = source.model_copy(update={"uri": f"{source.uri}/more/b.csv"})
    fetched = fetch(source, tmp_path / "got", purpose=Purpose.DATA, field="dataset.sources[0].uri", reach=reach)
    assert [file.name for file in fetched.files] == ["b.csv"] and (tmp_path / "got/b.csv").read_bytes() == b"text\nb\n"


def test_the_digest_changes_with_the_content(put: Put, tmp_path: Path) -> None:
    digests = []
    for number, text in enumerate((b'{"text": "a"}\n', b'{"text": "b"}\n', b'{"text": "a"}\n')):
        source, reach = put("data", {"train.jsonl": text})
        target = tmp_path / f"got{number}"
        fetched = fetch(source, target, purpose=Purpose.DATA, field="dataset.sources[0].uri", reach=reach)
        digests.append(fetched.digest)
    assert digests[0] == digests[2] != digests[1]


def test_the_first_bytes_of_a_file_are_read_without_the_rest(put: Put) -> None:
    source, reach = put("model", {"config.json": b"0123456789" * 1000})
    place = open_source(source, purpose=Purpose.MODEL, field="model.uri", reach=reach)
    assert place.read_start("config.json", 4) == b"0123"
    assert place.read_start("config.json", 20_000) == b"0123456789" * 1000
    assert b"".join(place.stream("config.json")) == b"0123456789" * 1000


@pytest.mark.parametrize(
    ("purpose", "failure_class", "field"),
    [
        (Purpose.MODEL, "ModelNotFound", "model.uri"),
        (Purpose.ADAPTER, "ModelNotFound", "model.adapter.uri"),
        (Purpose.DATA, "DataNotFound", "dataset.sources[1].uri"),
    ],
)
def test_what_is_not_there_is_named_with_its_field(
    put: Put, tmp_path: Path, purpose: Purpose, failure_class: str, field: str
) -> None:
    source, reach = put("data" if purpose is Purpose.DATA else "model", {"a.jsonl": b"{}"})
    source = source.model_copy(update={"uri": f"{source.uri}/absent"})
    with pytest.raises(FinetuneError, match="absent was not found") as caught:
        fetch(source, tmp_path / "got", purpose=purpose, field=field, reach=reach)
    assert (caught.value.failure_class, caught.value.field) == (failure_class, f"spec.{field}")


@pytest.mark.parametrize(
    ("change", "failure_class", "message"),
    [
        (
            {"model.safetensors": None, "pytorch_model.bin": PICKLE},
            "UnsafeFile",
            "has pickle weights only .pytorch_model.bin",
        ),
        ({"model.safetensors": None}, "ModelUnsupported", "has no weights"),
        ({"config.json": None}, "ModelUnsupported", "holds no config.json"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(
    put: Put, tmp_path: Path, change: dict[str, bytes | None], failure_class: str, message: str
) -> None:
    files = {name: data for name, data in (model_files() | change).items() if data is not None}
    source, reach = put("model", files)
    with pytest.raises(FinetuneError, match=message) as caught:
        fetch(source, tmp_path / "got", purpose=Purpose.MODEL, field="model.uri", reach=reach)
    assert (caught.value.failure_class, caught.value.field) == (failure_class, "spec.model.uri")
    assert not (tmp_path / "got").exists()


def test_an_adapter_arrives_with_its_tokenizer_and_nothing_that_runs_code(put: Put, tmp_path: Path) -> None:
    files = adapter_files() | {"config.json": b"{}", "tokenizer.json": b"{}", "chat_template.jinja": b"x"}
    source, reach = put("adapter", files | {"adapter_model.bin": PICKLE, "README.md": b"# A", "optimizer.pt": PICKLE})
    fetched = fetch(source, tmp_path / "got", purpose=Purpose.ADAPTER, field="model.adapter.uri", reach=reach)
    assert names(tmp_path / "got") == set(files)
    assert fetched.digest == model_digest(fetched.files)


@pytest.mark.parametrize(
    ("change", "failure_class", "message"),
    [
        ({"adapter_model.safetensors": None, "adapter_model.bin": PICKLE}, "UnsafeFile", "as a pickle only .adapter_m"),
        ({"adapter_model.safetensors": None}, "ModelUnsupported", "adapter_model.safetensors is not there"),
        ({"adapter_config.json": None}, "ModelUnsupported", "holds no adapter_config.json"),
        ({"adapter_config.json": None, "config.json": b"{}"}, "ModelUnsupported", "name it in model.uri instead"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(
    put: Put, tmp_path: Path, change: dict[str, bytes | None], failure_class: str, message: str
) -> None:
    files = {name: data for name, data in (adapter_files() | change).items() if data is not None}
    source, reach = put("adapter", files)
    with pytest.raises(FinetuneError, match=message) as caught:
        fetch(source, tmp_path / "got", purpose=Purpose.ADAPTER, field="model.adapter.uri", reach=reach)
    assert (caught.value.failure_class, caught.value.field) == (failure_class, "spec.model.adapter.uri")


def test_a_shard_that_the_index_names_and_nobody_uploaded_is_named(put: Put, tmp_path: Path) -> None:
    files = model_files(shards=2)
    del files["model-00002-of-00002.safetensors"]
    source, reach = put("model", files)
    with pytest.raises(FinetuneError, match=r"names model-00002-of-00002.safetensors, which is not there .1 of 2") as e:
        fetch(source, tmp_path / "got", purpose=Purpose.MODEL, field="model.uri", reach=reach)
    assert e.value.failure_class == "ModelNotFound"


@pytest.mark.parametrize("shard", ["model.bin", "../../etc/x.safetensors"])
def test_an_index_that_names_an_unsafe_file_is_refused(put: Put, tmp_path: Path, shard: str) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    source, reach = put("model", model_files() | {INDEX: index, "model.bin": PICKLE})
    with pytest.raises(FinetuneError) as caught:
        fetch(source, tmp_path / "got", purpose=Purpose.MODEL, field="model.uri", reach=reach)
    assert caught.value.failure_class == "UnsafeFile"


def test_pickled_data_is_refused(put: Put, tmp_path: Path) -> None:
    source, reach = put("data", {"train.pkl": PICKLE})
    with pytest.raises(FinetuneError, match=r"train.pkl, which can run code") as caught:
        fetch(source, tmp_path / "got", purpose=Purpose.DATA, field="dataset.sources[0].uri", reach=reach)
    assert caught.value.failure_class == "UnsafeFile"


def test_data_of_another_kind_is_refused_with_what_is_there(put: Put, tmp_path: Path) -> None:
    source, reach = put("data", {"train.xlsx": b"x"})
    with pytest.raises(FinetuneError, match=r"it holds train.xlsx") as caught:
        fetch(source, tmp_path / "got", purpose=Purpose.DATA, field="dataset.sources[0].uri", reach=reach)
    assert caught.value.failure_class == "DataInvalid"


def test_a_local_file_is_refused_in_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="file:// works only with `finetune run`") as caught:
        open_source(
            reference(tmp_path.as_uri()), purpose=Purpose.DATA, field="dataset.sources[0].uri", reach=Reach(env={})
        )
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.dataset.sources[0].uri")


def test_a_claim_is_linked_and_not_copied_and_links_may_not_leave_it(tmp_path: Path) -> None:
    claim = write_files(tmp_path / "claims" / "shared", {"d/a.jsonl": b"{}"})
    reach = Reach(env={}, claims=tmp_path / "claims")
    fetch(reference("pvc://shared/d"), tmp_path / "got", purpose=Purpose.DATA, field="f", reach=reach)
    assert (tmp_path / "got/a.jsonl").resolve() == (claim / "d/a.jsonl").resolve()
    (tmp_path / "secret.jsonl").write_text("{}")
    (claim / "d" / "b.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(FinetuneError, match=r"b.jsonl is a link that leads out of the claim"):
        fetch(reference("pvc://shared/d"), tmp_path / "again", purpose=Purpose.DATA, field="f", reach=reach)


def test_a_claim_that_is_not_mounted_is_told(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="the claim 'absent' is not mounted") as caught:
        fetch(
            reference("pvc://absent/m"),
            tmp_path / "got",
            purpose=Purpose.MODEL,
            field="model.uri",
            reach=Reach(env={}, claims=tmp_path),
        )
    assert caught.value.failure_class == "ModelNotFound"
