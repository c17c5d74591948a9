"""Bad input gets a clear answer within a minute, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import RECORDS, Tenant, lines


def broken_json(tenant: Tenant) -> dict[str, Any]:
    text = lines(RECORDS[:6]) + '{"question": "What?", "answer": \n' + lines(RECORDS[6:])
    return {"dataset": {"sources": [{"uri": tenant.put("data/broken.jsonl", text)}]}}


def missing_column(tenant: Tenant) -> dict[str, Any]:
    uri = tenant.put("data/column.jsonl", lines([{"question": "What?", "reply": "That."}] * 5))
    return {"dataset": {"sources": [{"uri": uri}], "format": "QuestionAnswer"}}


def empty_data(tenant: Tenant) -> dict[str, Any]:
    return {"dataset": {"sources": [{"uri": tenant.put("data/empty.jsonl", "")}]}}


def missing_file(tenant: Tenant) -> dict[str, Any]:
    return {"dataset": {"sources": [{"uri": f"s3://{tenant.namespace}/data/absent.jsonl"}]}}


def missing_bucket(tenant: Tenant) -> dict[str, Any]:
    return {"output": {"uri": "s3://no-such-bucket-here/out"}}


def missing_secret(tenant: Tenant) -> dict[str, Any]:
    return {"credentials": {"secretName": "no-such-secret"}}


def wrong_key(tenant: Tenant) -> dict[str, Any]:
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "wrong"},
        "stringData": {"AWS_ACCESS_KEY_ID": tenant.namespace, "AWS_SECRET_ACCESS_KEY": "not-the-right-one"},
    }
    tenant.stand.cluster.kubectl.apply(secret, namespace=tenant.namespace)
    return {"credentials": {"secretName": "wrong"}}


def unknown_model_type(tenant: Tenant) -> dict[str, Any]:
    for key in tenant.keys("models/tiny/"):
        tenant.s3.copy_object(
            Bucket=tenant.namespace, Key=key.replace("tiny", "odd"), CopySource={"Bucket": tenant.namespace, "Key": key}
        )
    tenant.put("models/odd/config.json", '{"model_type": "oddity", "architectures": ["OddityForCausalLM"]}')
    return {"model": {"uri": f"s3://{tenant.namespace}/models/odd"}}


@pytest.mark.parametrize(
    ("change", "failure", "field", "said"),
    [
        (broken_json, "DataInvalid", "spec.dataset.sources[0]", "7"),
        (missing_column, "DataInvalid", "spec.dataset", "answer"),
        (empty_data, "DataInvalid", "spec.dataset.sources[0]", "holds no record"),
        (missing_file, "DataNotFound", "spec.dataset.sources[0].uri", "absent.jsonl"),
        (missing_bucket, "BucketNotFound", "spec.output.uri", "no-such-bucket-here"),
        (missing_secret, "ReferenceNotFound", "spec.credentials", "no-such-secret"),
        (wrong_key, "CredentialsRejected", "spec.", "key"),
        (unknown_model_type, "ModelUnsupported", "spec.model", "oddity"),
    ],
)
def test_a_wrong_input_fails_within_a_minute_and_names_cause_and_field(
    tenant: Tenant, change: Any, failure: str, field: str, said: str
) -> None:
    tenant.apply(tenant.job("bad", **change(tenant)))
    status = tenant.failed("bad")
    assert status["failure"]["class"] == failure, status["failure"]
    assert status["failure"].get("field", "").startswith(field), status["failure"]
    assert said in status["failure"]["message"]
    assert not tenant.jobs("bad"), "no attempt may start"


def test_a_mended_field_is_taken_and_preflight_runs_again(tenant: Tenant) -> None:
    tenant.apply(tenant.job("mended", **missing_file(tenant)))
    tenant.failed("mended")
    tenant.apply(tenant.job("mended"))
    status = tenant.succeeded("mended")
    assert status["observedGeneration"] == 2


def test_an_output_that_another_job_owns_is_refused_and_left_alone(tenant: Tenant) -> None:
    tenant.apply(tenant.job("first"))
    tenant.succeeded("first")
    before = sorted(tenant.keys("out/first/"))
    tenant.apply(tenant.job("second", output={"uri": f"s3://{tenant.namespace}/out/first"}))
    status = tenant.failed("second")
    assert status["failure"]["class"] == "OutputInUse"
    assert f"{tenant.namespace}/first" in status["failure"]["message"]
    assert sorted(tenant.keys("out/first/")) == before
