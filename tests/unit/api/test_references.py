"""Places and credentials: what a pod needs to reach what the job names, and nothing more."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.job import Storage
from finetune_api.planner import build_references, preflight_file
from tests.unit.api.values import JOB, OBJECTIVES, plan, spec

CHART = Storage(endpoint="http://s3.storage.svc:7070", region="eu-1", path_style=True)


def test_one_secret_for_model_and_data_is_one_profile_with_both_kinds_of_keys() -> None:
    found = build_references(spec())
    assert found.profiles == {"p0": "team-a-s3"}
    assert found.schemes == {"p0": {"hf", "s3"}}
    assert [r.access.profile for r in (found.model, found.sources[0], found.output)] == ["p0", "p0", "p0"]
    assert (found.service_account, found.claims, found.config_maps) == (None, {}, set())


def test_a_reference_with_a_secret_of_its_own_gets_a_profile_of_its_own() -> None:
    found = build_references(
        spec(
            model={"credentials": {"secretName": "hub-token"}},
            dataset={
                "sources": [
                    {"uri": "s3://other/a.jsonl", "credentials": {"secretName": "other-s3"}},
                    {"uri": "s3://team-a/b.jsonl"},
                ]
            },
        )
    )
    assert found.profiles == {"p0": "hub-token", "p1": "other-s3", "p2": "team-a-s3"}
    assert found.schemes == {"p0": {"hf"}, "p1": {"s3"}, "p2": {"s3"}}
    assert found.model.access.profile == "p0"
    assert [r.access.profile for r in found.sources] == ["p1", "p2"]
    assert found.output.access.profile == "p2"


def test_without_credentials_the_environment_s_own_identity_is_used() -> None:
    found = build_references(spec(credentials=None))
    assert found.profiles == {}
    assert found.output.access.profile is None


def test_a_claim_needs_no_credentials_and_is_written_only_for_the_output() -> None:
    found = build_references(
        spec(
            model={"uri": "pvc://models/falcon", "revision": None},
            dataset={"sources": [{"uri": "pvc://models/data.jsonl"}]},
            output={"uri": "pvc://results/faq"},
        )
    )
    assert found.claims == {"models": False, "results": True}
    assert found.profiles == {}
    same = build_references(spec(model={"uri": "pvc://all/falcon", "revision": None}, output={"uri": "pvc://all/out"}))
    assert same.claims == {"all": True}


def test_storage_is_taken_from_the_reference_then_the_job_then_the_chart() -> None:
    job = spec(
        storage={"endpoint": "https://s3.team-a.example.com", "caConfigMapName": "team-a-ca"},
        output={"storage": {"endpoint": "https://s3.out.example.com", "region": "us-9"}},
    )
    found = build_references(job, CHART)
    data, output = found.sources[0].access, found.output.access
    assert (data.endpoint, data.region, data.path_style) == ("https://s3.team-a.example.com", "eu-1", True)
    assert (output.endpoint, output.region, output.path_style) == ("https://s3.out.example.com", "us-9", True)
    assert data.ca_file == output.ca_file == "/etc/finetune-ca/team-a-ca/ca.crt"
    assert found.config_maps == {"team-a-ca"}
    assert found.model.access.endpoint is None, "an hf:// model does not go to the S3 server"


def test_a_false_of_the_job_wins_over_a_true_of_the_chart() -> None:
    assert build_references(spec(storage={"pathStyle": False}), CHART).output.access.path_style is False


def test_a_service_account_becomes_the_pods_own_and_needs_no_profile() -> None:
    found = build_references(spec(credentials={"secretName": None, "serviceAccountName": "trainer"}))
    assert (found.service_account, found.profiles) == ("trainer", {})


def test_two_service_accounts_cannot_be_one_pod() -> None:
    job = spec(
        credentials={"secretName": None, "serviceAccountName": "trainer"},
        output={"credentials": {"serviceAccountName": "writer"}},
    )
    with pytest.raises(FinetuneError, match=r"several service accounts \(trainer, writer\)") as caught:
        build_references(job)
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.credentials")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": {"uri": "file:///models/falcon", "revision": None}}, "spec.model.uri"),
        ({"dataset": {"sources": [{"uri": "file:///d.jsonl"}]}}, "spec.dataset.sources[0].uri"),
        (
            {"dataset": {"validation": {"source": {"uri": "file:///v.jsonl"}}}},
            "spec.dataset.validation.source.uri",
        ),
        ({"output": {"uri": "file:///out"}}, "spec.output.uri"),
    ],
)
def test_local_files_are_refused_in_a_cluster_and_taken_on_one_machine(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(FinetuneError, match="finetune run") as caught:
        build_references(spec(**changes))
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", field)
    assert build_references(spec(**changes), local=True).profiles == {}


def test_a_local_run_takes_its_keys_from_the_environment() -> None:
    found = build_references(spec(storage={"caConfigMapName": "team-a-ca"}), local=True)
    assert (found.profiles, found.config_maps) == ({}, set())
    assert found.output.access.profile is None and found.output.access.ca_file is None


ALL_PLACES = {
    "model": {"adapter": {"uri": "s3://team-a/adapter", "credentials": {"secretName": "adapters"}}},
    "dataset": {"test": {"source": {"uri": "s3://team-a/test.jsonl"}}},
    "objective": {
        "type": "GRPO",
        "grpo": {
            "rewards": [
                {"function": "ExactMatch"},
                {"model": {"uri": "s3://judges/one", "credentials": {"secretName": "judges"}}},
            ]
        },
    },
    "evaluation": {
        "retention": {"uri": "pvc://texts/general.jsonl"},
        "benchmarks": [{"name": "MMLU", "source": {"uri": "hf://datasets/owner/mmlu", "split": "test"}}],
    },
    "output": {"publish": {"uri": "hf://team-a/faq", "credentials": {"secretName": "hub"}}},
}


def test_every_further_place_is_a_reference_with_its_own_keys() -> None:
    found = build_references(spec(**ALL_PLACES))
    profile = {secret: profile for profile, secret in found.profiles.items()}
    assert profile.keys() == {"team-a-s3", "adapters", "judges", "hub"}
    assert found.adapter is not None and found.adapter.access.profile == profile["adapters"]
    assert found.rewards[0] is None
    assert found.rewards[1] is not None and found.rewards[1].access.profile == profile["judges"]
    assert found.test is not None and found.test.access.profile == profile["team-a-s3"]
    assert found.retention is not None and found.retention.uri == "pvc://texts/general.jsonl"
    assert found.claims == {"texts": False}
    assert [(b.uri, b.split) for b in found.benchmarks] == [("hf://datasets/owner/mmlu", "test")]
    assert found.publish is not None and found.publish.access.profile == profile["hub"]
    assert found.schemes[profile["hub"]] == {"hf"}


def test_preflight_and_the_agent_look_at_the_same_places_in_the_same_order() -> None:
    job = spec(**{**ALL_PLACES, "model": {}})  # an adapter does not go with GRPO
    file = preflight_file(job, JOB, build_references(job))
    seen = [("model.uri", file.model.uri)]
    seen += [(f"dataset.sources[{n}].uri", source.uri) for n, source in enumerate(file.sources)]
    seen += [(item.field, item.reference.uri) for item in file.further]
    fetched = [(item.field, item.reference.uri) for item in plan(job).run.inputs()]
    assert sorted(seen) == sorted(fetched)
    data = [item.field for item in file.further if item.kind == "Data"]
    assert data == [item.field for item in plan(job).run.inputs() if item.kind == "Data"][1:]


def test_a_further_model_is_pinned_to_the_digest_that_preflight_saw() -> None:
    run = plan(spec(**{**ALL_PLACES, "model": {}})).run
    assert run.objective.reinforcement is not None
    assert run.objective.reinforcement.rewards[1].model_digest == "sha256:objective.grpo.rewards[1].model.uri"
    taught = plan(spec(**OBJECTIVES["Distillation"])).run
    assert taught.objective.distillation is not None
    assert taught.objective.distillation.teacher_digest == "sha256:objective.distillation.teacher.uri"
    kinds = {item.folder: (item.kind, item.digest) for item in taught.inputs()}
    assert kinds["teacher"] == ("Model", "sha256:objective.distillation.teacher.uri")


def test_pretraining_fetches_no_weights() -> None:
    first = plan(spec(**OBJECTIVES["Pretrain"])).run.inputs()[0]
    assert (first.folder, first.kind) == ("model", "Config")


@pytest.mark.parametrize(
    ("adapter", "secret"),
    [("s3://b/adapter", "team-a-s3"), ("hf://owner/adapter", "hub")],
)
def test_an_adapter_without_keys_uses_the_model_s_where_it_lies_in_the_same_kind_of_storage(
    adapter: str, secret: str
) -> None:
    job = spec(model={"uri": "hf://owner/m", "credentials": {"secretName": "hub"}, "adapter": {"uri": adapter}})
    found = build_references(job)
    assert found.adapter is not None
    assert found.profiles[found.adapter.access.profile or ""] == secret


def test_no_secret_s_name_reaches_the_preflight_file() -> None:
    job = spec()
    text = str(preflight_file(job, JOB, build_references(job)).to_json())
    assert "team-a-s3" not in text
    assert "s3://team-a/faq/train.jsonl" in text
