"""Preflight against a real S3 server: what a tenant is told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.runfile import PreflightFile
from finetune_api.status import Preflight
from finetune_trainer.data import load_dataset
from finetune_trainer.preflight import run_preflight
from finetune_trainer.sources import Purpose, Reach, data_digest, fetch
from finetune_trainer.store.claims import claim_output
from finetune_trainer.store.documents import Claim
from finetune_trainer.store.objects import S3Settings, open_store
from tests.cluster.processes import free_port
from tests.train.data.making import CHATML, make_tokenizer, run_file
from tests.train.preflight.conftest import JSONL, ROWS, Bucket
from tests.train.sources.hub_server import HubServer, Repository, account
from tests.train.sources.making import PARAMETERS, PICKLE, model_files, reference, write_files

MakeFile = Callable[..., PreflightFile]


def told(result: Preflight) -> list[tuple[str, str | None]]:
    """(class, field) of each finding that stands in the way."""
    return [(item.failure_class, item.field) for item in result.findings if item.failure_class != "Info"]


def message(result: Preflight) -> str:
    return result.findings[0].message


def test_a_good_job_passes_with_the_facts_that_the_planner_needs(
    make_file: MakeFile, bucket: Bucket, tmp_path: Path
) -> None:
    result = run_preflight(make_file(), bucket.env)
    assert result.ok and told(result) == [] and result.spec_digest == "sha256:spec"
    assert result.model is not None and result.data is not None
    assert (result.model.parameters, result.model.model_type) == (PARAMETERS, "llama")
    assert (result.data.rows, result.data.bad_rows, result.data.format) == (40, 0, "QuestionAnswer")
    assert result.data.format_reason == (
        "read as QuestionAnswer because the first record has the columns question and answer"
    )
    assert result.data.bytes == len(JSONL)
    # The tokens are those that the worker will train on.
    source = reference(bucket.uri("train.jsonl"), profile="team", endpoint=bucket.s3.endpoint)
    fetched = fetch(source, tmp_path / "data" / "0", purpose=Purpose.DATA, field="f", reach=Reach(env=bucket.env))
    encoded = load_dataset(run_file(format="QuestionAnswer"), tmp_path, make_tokenizer())
    lengths = sorted(len(example.input_ids) for example in encoded.train)
    assert result.data.tokens == sum(lengths) and result.data.longest_tokens == lengths[-1]
    assert result.data.p95_tokens == lengths[37]
    assert result.data.digest == data_digest([(fetched.uri, fetched.files)])


def test_the_data_digest_is_that_of_the_agent_also_for_a_folder(
    make_file: MakeFile, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put("folder/a.jsonl", JSONL)
    result = run_preflight(make_file(sources=[bucket.uri("folder/")]), bucket.env)
    source = reference(bucket.uri("folder/"), profile="team", endpoint=bucket.s3.endpoint)
    fetched = fetch(source, tmp_path / "got", purpose=Purpose.DATA, field="f", reach=Reach(env=bucket.env))
    assert result.data is not None
    assert result.data.digest == fetched.digest == data_digest([(source.uri, fetched.files)])


def test_the_probe_object_is_gone_and_nothing_else_was_written(make_file: MakeFile, bucket: Bucket) -> None:
    before = bucket.keys()
    assert run_preflight(make_file(), bucket.env).ok
    assert bucket.keys() == before
    assert any(".preflight-11111111-2222-" in line and "PUT" in line for line in bucket.s3.log.splitlines())


def test_all_faults_are_told_at_once_those_to_mend_first(make_file: MakeFile, bucket: Bucket) -> None:
    bucket.put("bad.jsonl", b'{"question": "q", "answer": "a"}\n{"question": \n')
    dead = {"uri": "s3://team-a/out", "access": {"profile": "team", "endpoint": f"http://127.0.0.1:{free_port()}"}}
    result = run_preflight(
        make_file(model=bucket.uri("no-model"), sources=[bucket.uri("bad.jsonl"), bucket.uri("absent")], output=dead),
        bucket.env,
    )
    assert not result.ok
    assert told(result) == [
        ("ModelNotFound", "spec.model.uri"),
        ("DataNotFound", "spec.dataset.sources[1].uri"),
        ("DataInvalid", "spec.dataset.sources[0].uri"),
        ("StorageUnavailable", "spec.storage"),
    ]
    assert "bad.jsonl line 2: not valid JSON" in result.findings[2].message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (JSONL + b'{"question": "x", "answer": "y"\n', "bad.jsonl line 41: not valid JSON at column"),
        (JSONL + b'{"question": "x"}\n', "bad.jsonl line 41: there is no column 'answer'; there are question"),
        (b"", r"dataset.sources[0].uri holds no record"),
        (
            b'{"source": "a", "target": "b"}\n',
            "The format of the data is not clear: the first record has the columns source",
        ),
    ],
)
def test_bad_data_is_told_with_line_and_cause(make_file: MakeFile, bucket: Bucket, data: bytes, expected: str) -> None:
    result = run_preflight(make_file(sources=[bucket.put("bad.jsonl", data)]), bucket.env)
    assert [name for name, _ in told(result)] == ["DataInvalid"] and expected in message(result)


def test_a_template_with_an_unknown_column_lists_the_columns(make_file: MakeFile, bucket: Bucket) -> None:
    result = run_preflight(make_file(promptTemplate="{question} {reply}"), bucket.env)
    assert told(result) == [("InvalidSpec", "spec.dataset.promptTemplate")]
    assert "names the column 'reply', but the data has question, answer" in message(result)


def test_a_faulty_validation_source_is_told_with_its_own_field(make_file: MakeFile, bucket: Bucket) -> None:
    access = {"profile": "team", "endpoint": bucket.s3.endpoint}
    validation = {"uri": bucket.put("held.jsonl", b'{"question": "only"}\n'), "access": access}
    result = run_preflight(make_file(validation=validation), bucket.env)
    assert told(result) == [("DataInvalid", "spec.dataset.validation.source.uri")]
    assert result.data is not None and (result.data.rows, result.data.bad_rows) == (40, 0)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret-key-0123", "the secret key is wrong"),
        ("AWS_ACCESS_KEY_ID", "nobody", "does not know this access key id"),
        ("AWS_ACCESS_KEY_ID", "", "hold no AWS_ACCESS_KEY_ID"),
    ],
)
def test_wrong_keys_are_told_for_each_place(
    make_file: MakeFile, bucket: Bucket, key: str, value: str, expected: str
) -> None:
    result = run_preflight(make_file(), bucket.env | {f"FINETUNE_CRED_TEAM_{key}": value})
    assert told(result) == [("CredentialsRejected", "spec.credentials")] * 3
    assert all(expected in item.message for item in result.findings)
    assert "wrong-secret-key" not in result.model_dump_json()


@pytest.mark.parametrize(
    ("output", "failure_class", "field"),
    [
        ("s3://no-such-bucket/out", "BucketNotFound", "spec.output.uri"),
        ("s3://foreign/out", "CredentialsRejected", "spec.credentials"),
        ("pvc://absent/out", "BucketNotFound", "spec.output.uri"),
        ("file:///tmp/out", "InvalidSpec", "spec.output.uri"),
    ],
)
def test_an_output_that_cannot_be_written_is_told(
    make_file: MakeFile, bucket: Bucket, output: str, failure_class: str, field: str
) -> None:
    result = run_preflight(make_file(output=output), bucket.env)
    assert told(result) == [(failure_class, field)]


def claim(bucket: Bucket, uid: str, model: str, data: str, name: str = "earlier") -> None:
    keys = bucket.s3.environment("team-a")
    settings = S3Settings(
        bucket.s3.endpoint, access_key_id=keys["AWS_ACCESS_KEY_ID"], secret_access_key=keys["AWS_SECRET_ACCESS_KEY"]
    )
    store, prefix = open_store(bucket.uri("out"), settings)
    claim_output(
        store,
        prefix,
        Claim(job_uid=uid, namespace="team-a", name=name, model_digest=model, data_digest=data, method_digest="m"),
        "Resume",
    )


def test_an_output_of_another_job_is_told_with_its_owner(make_file: MakeFile, bucket: Bucket) -> None:
    claim(bucket, "other-uid", "m", "d")
    result = run_preflight(make_file(), bucket.env)
    assert told(result) == [("OutputInUse", "spec.output.uri")]
    assert "belongs to the job team-a/earlier" in message(result) and "onExisting: Resume" in message(result)


def test_an_output_of_the_same_job_is_fine(make_file: MakeFile, bucket: Bucket) -> None:
    claim(bucket, "11111111-2222", "m", "d")
    assert run_preflight(make_file(), bucket.env).ok


def test_resume_takes_over_a_run_with_the_same_model_and_data_only(make_file: MakeFile, bucket: Bucket) -> None:
    facts = run_preflight(make_file(), bucket.env)
    assert facts.model is not None and facts.data is not None
    claim(bucket, "other-uid", facts.model.digest, facts.data.digest)
    assert run_preflight(make_file(onExisting="Resume"), bucket.env).ok
    result = run_preflight(make_file(onExisting="Resume", sources=[bucket.put("more.jsonl", JSONL)]), bucket.env)
    assert told(result) == [("OutputInUse", "spec.output.uri")] and "was made with another data," in message(result)


def test_the_owner_of_an_output_is_the_job_that_took_it_over_last(make_file: MakeFile, bucket: Bucket) -> None:
    for name in ("first", "second"):
        claim(bucket, f"{name}-uid", "m", "d", name=name)
    result = run_preflight(make_file(), bucket.env)
    assert told(result) == [("OutputInUse", "spec.output.uri")]
    assert "belongs to the job team-a/second" in message(result)


def test_pickle_weights_are_refused(make_file: MakeFile, bucket: Bucket) -> None:
    for name, data in model_files().items():
        if name != "model.safetensors":
            bucket.put(f"pickled/{name}", data)
    bucket.put("pickled/pytorch_model.bin", PICKLE)
    result = run_preflight(make_file(model=bucket.uri("pickled")), bucket.env)
    assert told(result) == [("UnsafeFile", "spec.model.uri")]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "unheard-of"}, "model type 'unheard-of' is not supported"),
        ({"num_hidden_layers": None}, "config.json has no num_hidden_layers"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_told(
    make_file: MakeFile, bucket: Bucket, config: dict[str, Any], expected: str
) -> None:
    for name, data in model_files(config=config).items():
        bucket.put(f"odd/{name}", data)
    result = run_preflight(make_file(model=bucket.uri("odd")), bucket.env)
    assert told(result) == [("ModelUnsupported", "spec.model.uri")] and expected in message(result)


def test_another_task_is_refused_with_its_field(make_file: MakeFile, bucket: Bucket) -> None:
    result = run_preflight(make_file(task="Seq2Seq"), bucket.env)
    assert told(result) == [("ModelUnsupported", "spec.model.task")] and "it fits CausalLM" in message(result)


def test_the_model_and_data_of_a_hub_are_checked(bucket: Bucket, make_file: MakeFile) -> None:
    with HubServer() as hub:
        hub.repositories["team/model"] = Repository(model_files(chat_template=CHATML), token="hf_secret_token")
        hub.repositories["datasets/team/faq"] = Repository({"train.jsonl": JSONL}, token="hf_secret_token")
        file = make_file(model="hf://team/model", sources=["hf://datasets/team/faq"])
        env = bucket.env | {"HF_ENDPOINT": hub.endpoint}
        result = run_preflight(file, env)
        assert told(result) == [
            ("ModelNotFound", "spec.model.uri"),
            ("DataNotFound", "spec.dataset.sources[0].uri"),
        ]
        result = run_preflight(file, env | {"FINETUNE_CRED_TEAM_HF_TOKEN": "hf_secret_token"})
    assert result.ok and result.findings == []
    assert result.model is not None and result.model.has_chat_template
    assert result.data is not None and result.data.rows == 40


def test_the_place_to_publish_is_asked_with_the_jobs_own_token(bucket: Bucket, make_file: MakeFile) -> None:
    publish = {"target": {"uri": "hf://team/faq", "access": {"profile": "team"}}}
    with HubServer() as hub:
        hub.accounts["hf_secret_token"] = account("team")
        env = bucket.env | {"HF_ENDPOINT": hub.endpoint}
        assert told(run_preflight(make_file(publish=publish), env)) == [
            ("CredentialsRejected", "spec.output.publish.credentials")
        ]
        env |= {"FINETUNE_CRED_TEAM_HF_TOKEN": "hf_secret_token"}
        assert run_preflight(make_file(publish=publish), env).ok
        hub.repositories["team/faq"] = Repository(model_files(), private=True)
        result = run_preflight(make_file(publish=publish), env)
    remark = next(item for item in result.findings if item.field == "spec.output.publish.uri")
    assert result.ok and "hf://team/faq exists; the artifact becomes its newest commit" in remark.message


def test_a_model_without_a_chat_template_is_remarked_and_passes(make_file: MakeFile, bucket: Bucket) -> None:
    result = run_preflight(make_file(), bucket.env)
    assert result.ok and [item.failure_class for item in result.findings] == ["Info"]
    assert "User: … Assistant: …" in message(result)
    assert run_preflight(make_file(promptTemplate="{question} {answer}"), bucket.env).findings == []


def test_conversations_that_the_chat_template_refuses_are_bad_rows(make_file: MakeFile, bucket: Bucket) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    for name, data in model_files(chat_template=template).items():
        bucket.put(f"strict/{name}", data)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": talk}, {"messages": [{"role": "system", "content": "s"}, *talk]}]
    source = bucket.put("talk.jsonl", "\n".join(json.dumps(row) for row in rows).encode())
    result = run_preflight(make_file(model=bucket.uri("strict"), sources=[source]), bucket.env)
    assert told(result) == [("DataInvalid", "spec.dataset.sources[0].uri")]
    assert "1 of 2 records" in message(
        result
    ) and "talk.jsonl line 2: the model's chat template refuses it: no system role" in message(result)


def test_without_tokenizer_json_tokens_are_estimated_and_it_says_so(make_file: MakeFile, bucket: Bucket) -> None:
    files = model_files(tokenizer=False) | {"tokenizer.model": b"sentencepiece"}
    for name, data in files.items():
        bucket.put(f"slow/{name}", data)
    result = run_preflight(make_file(model=bucket.uri("slow")), bucket.env)
    assert result.ok and result.data is not None
    expected = sum(round(len(row["question"] + row["answer"]) / 3.6) for row in ROWS)
    assert result.data.tokens == expected and "estimated" in message(result)


def test_local_files_pass_under_finetune_run_and_not_in_a_cluster(
    make_file: MakeFile, bucket: Bucket, tmp_path: Path
) -> None:
    write_files(tmp_path / "model", model_files())
    (tmp_path / "train.jsonl").write_bytes(JSONL)
    uris = {
        "model": (tmp_path / "model").as_uri(),
        "sources": [(tmp_path / "train.jsonl").as_uri()],
        "output": (tmp_path / "out").as_uri(),
    }
    result = run_preflight(make_file(local=True, **uris), {})
    assert result.ok and result.data is not None and result.data.rows == 40
    assert not (tmp_path / "out").exists()
    refused = told(run_preflight(make_file(**uris), {}))
    assert sorted(refused) == [
        ("InvalidSpec", "spec.dataset.sources[0].uri"),
        ("InvalidSpec", "spec.model.uri"),
        ("InvalidSpec", "spec.output.uri"),
    ]


def test_a_storage_that_accepts_and_never_answers_is_given_up(make_file: MakeFile, bucket: Bucket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(silent.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        access = {"profile": "team", "endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        result = run_preflight(
            make_file(output={"uri": "s3://team-a/x", "access": access}), bucket.env, stall_seconds=8
        )
    assert told(result) == [("StorageUnavailable", "spec.output.uri")]
    assert "s3://team-a/x did not answer for 8 s" in message(result)
    assert result.model is not None and result.data is not None and result.data.rows == 40
    for connection in connections:
        connection.close()


def test_a_tokenizer_that_cannot_be_read_is_told(make_file: MakeFile, bucket: Bucket) -> None:
    for name, data in (model_files() | {"tokenizer.json": b"{}"}).items():
        bucket.put(f"broken/{name}", data)
    result = run_preflight(make_file(model=bucket.uri("broken")), bucket.env)
    assert told(result) == [("ModelUnsupported", "spec.model.uri")] and "tokenizer.json cannot be read" in message(
        result
    )
