"""The S3 server keeps users apart, keeps conditional writes, and keeps its data through an outage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError

from tests.cluster.s3 import S3Error, S3Server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        for user in ("team-a", "team-b"):
            server.add_user(user)
            server.create_bucket(user, owner=user)
        yield server


def client(s3: S3Server, user: str | None = None) -> Any:
    return boto3.client("s3", config=Config(retries={"max_attempts": 1}), **s3.client_options(user))


def code(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])


def test_a_user_reaches_only_own_buckets(s3: S3Server) -> None:
    client(s3, "team-a").put_object(Bucket="team-a", Key="secret", Body=b"1")
    with pytest.raises(ClientError) as refused:
        client(s3, "team-b").get_object(Bucket="team-a", Key="secret")
    assert code(refused.value) == "AccessDenied"


def test_a_conditional_write_refuses_an_existing_key(s3: S3Server) -> None:
    team = client(s3, "team-a")
    team.put_object(Bucket="team-a", Key="once", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        team.put_object(Bucket="team-a", Key="once", Body=b"2", IfNoneMatch="*")
    assert code(refused.value) == "PreconditionFailed"
    assert (s3.data / "team-a" / "once").read_bytes() == b"1"


def test_an_outage_loses_neither_data_nor_users(s3: S3Server) -> None:
    team = client(s3, "team-b")
    team.put_object(Bucket="team-b", Key="kept", Body=b"x")
    s3.stop()
    with pytest.raises(EndpointConnectionError):
        client(s3, "team-b").list_buckets()
    s3.start()
    assert team.get_object(Bucket="team-b", Key="kept")["Body"].read() == b"x"


def test_a_user_made_twice_is_refused_without_showing_the_root_key(s3: S3Server) -> None:
    with pytest.raises(S3Error) as refused:
        s3.add_user("team-a")
    assert s3.secret_key not in str(refused.value)
