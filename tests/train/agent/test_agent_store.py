"""The agent and a real S3 server: credentials by profile, damage, outages, and a gang that is not whole."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from finetune_api.runfile import RunFile
from tests.cluster.s3 import S3Server
from tests.train.agent.runs import run_file
from tests.train.agent.test_agent_serving import metrics_of
from tests.train.agent.test_agent_success import steps_in


@pytest.fixture
def s3(inputs: Path) -> Iterator[S3Server]:
    with S3Server() as server:
        server.add_user("team-a")
        server.create_bucket("team-a", owner="team-a")
        client = boto3.client("s3", **server.client_options("team-a"))
        for path in sorted(inputs.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), "team-a", str(path.relative_to(inputs)))
        yield server


@pytest.fixture
def keys(s3: S3Server) -> dict[str, str]:
    """What the kubelet puts into a pod for the credentials profile p0."""
    return {
        "FINETUNE_CRED_P0_AWS_ACCESS_KEY_ID": "team-a",
        "FINETUNE_CRED_P0_AWS_SECRET_ACCESS_KEY": s3.users["team-a"],
    }


@pytest.fixture
def s3_run(s3: S3Server, keys: dict[str, str], tmp_path: Path) -> RunFile:
    return run_file(
        "s3://team-a/base",
        "s3://team-a/train.jsonl",
        "s3://team-a/models/faq",
        environment=keys,
        profile="p0",
        endpoint=s3.endpoint,
        scratch=tmp_path / "scratch",
    )


def test_inputs_checkpoints_and_artifact_go_through_s3(make_agent, s3, s3_run, keys) -> None:
    agent = make_agent(s3_run, environment=keys, does={"steps": 4, "step_seconds": 0.3})
    assert agent.execute() == 0, agent.out + agent.err
    assert (agent.work / "inputs" / "model" / "config.json").exists()
    assert (agent.work / "inputs" / "data" / "0" / "train.jsonl").exists()
    stored = s3.data / "team-a" / "models" / "faq"
    assert json.loads((stored / "adapter" / "adapter.json").read_text())["step"] == 4
    assert (stored / "checkpoints" / "fence-1" / "step-4" / "MANIFEST.json").exists()
    assert keys["FINETUNE_CRED_P0_AWS_SECRET_ACCESS_KEY"] not in agent.out + agent.err + agent.message_bytes.decode()


def test_wrong_keys_are_the_tenants_to_mend(make_agent, s3_run, keys) -> None:
    wrong = {**keys, "FINETUNE_CRED_P0_AWS_SECRET_ACCESS_KEY": "not-the-right-secret"}
    agent = make_agent(s3_run, environment=wrong)
    assert agent.execute() == 69
    assert agent.message.outcome == "CredentialsRejected"
    assert "not-the-right-secret" not in agent.out + agent.err + agent.message_bytes.decode()


def test_missing_keys_are_named(make_agent, s3_run) -> None:
    agent = make_agent(s3_run)
    assert agent.execute() == 69
    assert "AWS_ACCESS_KEY_ID" in agent.message.message


def test_a_missing_data_file_is_named(make_agent, s3, s3_run, keys) -> None:
    boto3.client("s3", **s3.client_options("team-a")).delete_object(Bucket="team-a", Key="train.jsonl")
    agent = make_agent(s3_run, environment=keys)
    assert agent.execute() == 66
    assert (agent.message.outcome, agent.message.field) == ("DataNotFound", "spec.dataset.sources[0].uri")


def test_training_outlives_an_outage_of_the_storage(make_agent, s3, s3_run, keys) -> None:
    agent = make_agent(s3_run, environment=keys, does={"steps": 60, "save_every": 5, "step_seconds": 0.1}).start()
    agent.wait_for_event("checkpoint stored")
    s3.stop()
    step = agent.read_json(agent.work / "state" / "progress.json")["step"]
    agent.wait_for_step(step + 10)
    s3.start()
    assert agent.finish() == 0, agent.out + agent.err
    assert agent.message.checkpoint_step == 60


def test_a_refusal_that_lasts_ends_the_run_while_little_is_lost(make_agent, s3, s3_run, keys) -> None:
    does = {"steps": 100_000, "save_every": 5, "step_seconds": 0.1}
    agent = make_agent(s3_run, environment=keys, does=does, arguments=("--storage-seconds", "1")).start()
    agent.wait_for_event("checkpoint stored")
    s3.admin("update-user", "--access", "team-a", "--secret", "rotated")
    assert agent.finish() == 69, agent.out + agent.err
    message = agent.message
    assert (message.outcome, message.field) == ("CredentialsRejected", "spec.credentials")
    assert message.checkpoint_step == agent.events("checkpoint stored")[-1]["step"]
    assert "SignatureDoesNotMatch: the secret key is wrong" in message.message
    assert "Training ended because the storage refused every upload for " in message.message
    assert message.message.endswith(f" s; the checkpoint of step {message.checkpoint_step} is stored.")


def test_a_refusal_that_ends_in_time_costs_nothing(make_agent, s3, s3_run, keys) -> None:
    """It begins in mid-run and lasts until the artifact is to be published."""
    agent = make_agent(s3_run, environment=keys, does={"steps": 30, "save_every": 5, "step_seconds": 0.1}).start()
    agent.wait_for_event("checkpoint stored")
    s3.admin("update-user", "--access", "team-a", "--secret", "rotated")
    agent.wait_for_event("checkpoint upload failed")
    agent.wait_for_event("publishing failed")
    s3.admin("update-user", "--access", "team-a", "--secret", s3.users["team-a"])
    assert agent.finish() == 0, agent.out + agent.err
    assert agent.message.checkpoint_step == 30
    stored = s3.data / "team-a" / "models" / "faq"
    assert json.loads((stored / "adapter" / "adapter.json").read_text())["step"] == 30


def test_resume_takes_the_newest_checkpoint_that_is_whole(make_agent, output) -> None:
    first = make_agent(does={"steps": 10_000, "save_every": 3, "step_seconds": 0.2}).start()
    first.wait_for(lambda: len(first.events("checkpoint stored")) >= 2)
    assert first.stop() == 100
    newest, before, *_ = steps_in(output)
    part = output / "checkpoints" / "fence-1" / f"step-{newest}" / "step.json"
    part.write_bytes(b"[" + part.read_bytes()[1:])
    second = make_agent(attempt=1, does={"steps": newest + 1})
    assert second.execute() == 0
    assert second.events("attempt begun")[0]["resumed_from_step"] == before
    assert second.events("checkpoint is damaged")[0]["step"] == newest


def test_a_checkpoint_is_skipped_when_a_newer_one_is_complete_before_its_upload(make_agent, output) -> None:
    """Steps are far quicker than uploads of this size, so some have to be left out, and the last one must not be."""
    agent = make_agent(does={"steps": 400, "save_every": 1, "step_seconds": 0.01, "save_bytes": 200_000}).start()
    agent.wait_for(lambda: agent.events("checkpoint skipped"))
    assert metrics_of(agent)["finetune_checkpoints_skipped_total"] >= 1
    assert agent.finish() == 0
    assert steps_in(output)[0] == 400
    stored = {event["step"] for event in agent.events("checkpoint stored")}
    skipped = {event["step"] for event in agent.events("checkpoint skipped")}
    assert not stored & skipped


def test_a_node_whose_gang_never_starts_says_so(make_agent, make_run) -> None:
    agent = make_agent(make_run(nodes=2), node=1, arguments=("--peer-seconds", "1", "--master-progress-port", "1"))
    assert agent.execute() == 85
    assert "node 0 (127.0.0.1:1) did not start attempt 0 within 1 s" in agent.message.message


def test_workers_die_with_their_agent(make_agent) -> None:
    agent = make_agent(does={"steps": 100_000}).start()
    agent.wait_for_step(1)
    agent.process.kill()
    agent.process.wait()
    progress = agent.work / "state" / "progress.json"
    deadline = time.monotonic() + 20
    while progress.read_bytes() != (time.sleep(0.5), progress.read_bytes())[1]:
        assert time.monotonic() < deadline, "the worker goes on without its agent"
