"""Keys, buckets and endpoints of a real S3 server: what goes wrong and how it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.runfile import StorageAccess
from finetune_trainer.sources import Purpose, Reach, fetch, hub_token, resolve_access
from tests.cluster.processes import free_port
from tests.cluster.s3 import S3Server
from tests.train.sources.making import profile_env, reference, upload


def get(uri: str, tmp_path: Path, env: dict[str, str], endpoint: str | None = None) -> FinetuneError:
    with pytest.raises(FinetuneError) as caught:
        fetch(
            reference(uri, profile="team", endpoint=endpoint),
            tmp_path / "got",
            purpose=Purpose.DATA,
            field="dataset.sources[0].uri",
            reach=Reach(env=env, patient=False),
        )
    assert env.get("FINETUNE_CRED_TEAM_AWS_SECRET_ACCESS_KEY", "no key") not in str(caught.value)
    return caught.value


def test_a_wrong_secret_key_is_told_without_showing_it(s3: S3Server, tmp_path: Path) -> None:
    upload(s3, "team-a", "wrong", {"a.jsonl": b"{}"})
    keys = s3.environment("team-a") | {"AWS_SECRET_ACCESS_KEY": "not-the-key-0123456789"}
    error = get("s3://team-a/wrong", tmp_path, profile_env("TEAM", keys), s3.endpoint)
    assert (error.failure_class, error.field) == ("CredentialsRejected", "spec.credentials")
    assert "secret key is wrong" in str(error) and "not-the-key" not in str(error)


def test_an_unknown_access_key_is_told(s3: S3Server, tmp_path: Path) -> None:
    keys = s3.environment("team-a") | {"AWS_ACCESS_KEY_ID": "nobody"}
    error = get("s3://team-a/wrong", tmp_path, profile_env("TEAM", keys), s3.endpoint)
    assert error.failure_class == "CredentialsRejected" and "does not know this access key id" in str(error)


def test_a_foreign_bucket_is_refused(s3: S3Server, tmp_path: Path) -> None:
    error = get("s3://foreign/x", tmp_path, profile_env("TEAM", s3.environment("team-a")), s3.endpoint)
    assert error.failure_class == "CredentialsRejected" and "'foreign'" in str(error)


def test_a_missing_bucket_is_told_with_the_field(s3: S3Server, tmp_path: Path) -> None:
    error = get("s3://no-such-bucket/x", tmp_path, profile_env("TEAM", s3.environment("team-a")), s3.endpoint)
    assert (error.failure_class, error.field) == ("BucketNotFound", "spec.dataset.sources[0].uri")


def test_a_missing_file_in_a_good_bucket_is_told(s3: S3Server, tmp_path: Path) -> None:
    error = get("s3://team-a/no/train.jsonl", tmp_path, profile_env("TEAM", s3.environment("team-a")), s3.endpoint)
    assert error.failure_class == "DataNotFound" and "s3://team-a/no/train.jsonl was not found" in str(error)


def test_an_endpoint_where_nothing_listens_is_told(tmp_path: Path) -> None:
    env = profile_env("TEAM", {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "key-of-nobody"})
    error = get("s3://team-a/x", tmp_path, env, f"http://127.0.0.1:{free_port()}")
    assert (error.failure_class, error.field) == ("StorageUnavailable", "spec.storage")


def test_a_profile_without_a_key_names_the_key(tmp_path: Path) -> None:
    error = get("s3://team-a/x", tmp_path, profile_env("TEAM", {"HF_TOKEN": "t"}))
    assert error.failure_class == "CredentialsRejected"
    assert (
        str(error) == "the credentials 'team' hold no AWS_ACCESS_KEY_ID. Add the key AWS_ACCESS_KEY_ID to the secret."
    )


def test_a_key_that_names_a_file_wins_over_a_folder_of_a_longer_name(s3: S3Server, tmp_path: Path) -> None:
    upload(s3, "team-a", "names", {"faq": b"{}", "faq-old/a.jsonl": b"{}", "set/a.jsonl": b"{}", "set2/b.jsonl": b"{}"})
    env = profile_env("TEAM", s3.environment("team-a"))
    fetched = fetch(
        reference("s3://team-a/names/set/", profile="team", endpoint=s3.endpoint),
        tmp_path / "got",
        purpose=Purpose.DATA,
        field="f",
        reach=Reach(env=env),
    )
    assert [file.name for file in fetched.files] == ["a.jsonl"]
    error = get("s3://team-a/names/faq", tmp_path, env, s3.endpoint)
    assert error.failure_class == "DataInvalid" and "it holds faq." in str(error)


def test_settings_come_from_the_profile_and_fall_back_to_the_environment() -> None:
    env = profile_env("TEAM_A", {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key\n", "HF_TOKEN": "hf"})
    env |= {
        "AWS_ENDPOINT_URL": "http://s3:9000",
        "AWS_REGION": "eu-1",
        "AWS_ACCESS_KEY_ID": "ambient",
        "AWS_SECRET_ACCESS_KEY": "ambient-key",
    }
    named = resolve_access(StorageAccess(profile="team-a", path_style=True), env)
    assert (named.access_key_id, named.secret_access_key, named.session_token) == ("id", "key", None)
    assert (named.endpoint, named.region, named.path_style) == ("http://s3:9000", "eu-1", True)
    ambient = resolve_access(StorageAccess(endpoint="http://other"), env)
    assert (ambient.access_key_id, ambient.endpoint) == ("ambient", "http://other")
    assert resolve_access(StorageAccess(), {}).access_key_id is None
    assert hub_token(StorageAccess(profile="team-a"), env) == "hf" and hub_token(StorageAccess(), env) is None
