"""output.publish: the artifact on a hub, beside the output; a hub that refuses loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_api.runfile import RunFile
from finetune_trainer.agent.hub_repository import publish_to_hub
from finetune_trainer.sources import Reach
from tests.train.sources.hub_server import HubServer, Repository

TOKEN = "hf_a-token-that-may-write"
REPOSITORY = "team-a/faq"
DEAD = "http://127.0.0.1:9"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(write_token=TOKEN) as server:
        yield server


@pytest.fixture
def publishing(make_run: Callable[..., RunFile]) -> Callable[..., RunFile]:
    def make(**publish: Any) -> RunFile:
        document = make_run().to_json()
        target = {"uri": f"hf://{REPOSITORY}", "access": {"profile": "p0"}}
        document["output"]["publish"] = {"target": target, **publish}
        return RunFile.from_json(document)

    return make


def environment(hub: HubServer, token: str = TOKEN) -> dict[str, str]:
    """Plain large-file uploads: the hub's other protocol needs a service of its own."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "FINETUNE_CRED_P0_HF_TOKEN": token}


def test_the_artifact_goes_to_a_private_repository_as_well(make_agent, publishing, hub, output) -> None:
    agent = make_agent(publishing(), does={"steps": 2}, environment=environment(hub))
    assert agent.execute() == 0, agent.out + agent.err
    repository = hub.repositories[REPOSITORY]
    assert repository.private is True
    assert json.loads(repository.files["adapter.json"]) == {"step": 2, "resumedFrom": None}
    assert set(repository.files) == {"adapter.json"}, "report and predictions show data: they stay in the output"
    assert (output / "adapter/adapter.json").is_file()
    assert agent.events("published to the hub")[0]["url"] == f"{hub.endpoint}/{REPOSITORY}"
    assert TOKEN not in agent.out + agent.err


def test_a_public_repository_is_made_only_when_asked_for(make_agent, publishing, hub) -> None:
    agent = make_agent(publishing(public=True), does={"steps": 2}, environment=environment(hub))
    assert agent.execute() == 0, agent.out + agent.err
    assert hub.repositories[REPOSITORY].private is False


def test_a_repository_that_is_public_already_gets_nothing_unasked(make_agent, publishing, hub, output) -> None:
    hub.repositories[REPOSITORY] = Repository({"README.md": b"mine"})
    agent = make_agent(publishing(), does={"steps": 2}, environment=environment(hub))
    assert agent.execute() == 64
    assert agent.message.field == "spec.output.publish.public"
    assert agent.message.artifact == "adapter"
    assert hub.repositories[REPOSITORY].files == {"README.md": b"mine"}
    assert (output / "ARTIFACT.json").is_file()


def test_a_refused_token_is_said_and_the_artifact_is_kept(make_agent, publishing, hub, output) -> None:
    agent = make_agent(publishing(), does={"steps": 2}, environment=environment(hub, "hf_reads-only"))
    assert agent.execute() == 69
    message = agent.message
    assert (message.outcome, message.field) == ("CredentialsRejected", "spec.output.publish.credentials")
    assert "The artifact is in output.uri all the same." in message.message
    assert "hf_reads-only" not in agent.out + agent.err + message.message
    assert (output / "adapter/adapter.json").is_file()


def test_the_next_attempt_publishes_what_a_silent_hub_did_not_take(make_agent, publishing, hub, output) -> None:
    run = publishing()
    silent = {**environment(hub), "HF_ENDPOINT": DEAD}
    first = make_agent(run, does={"steps": 2}, environment=silent)
    assert first.execute() == 86
    assert first.message.outcome == "StorageUnavailable"
    assert (output / "ARTIFACT.json").is_file()
    second = make_agent(run, attempt=1, does={"fail_rank": 0}, environment=environment(hub))
    assert second.execute() == 0, second.out + second.err
    assert second.events("workers started") == []
    assert json.loads(hub.repositories[REPOSITORY].files["adapter.json"])["step"] == 2


def test_a_published_file_with_another_hash_goes_to_no_hub(make_agent, publishing, hub, output) -> None:
    run = publishing()
    assert make_agent(run, does={"steps": 2}, environment={**environment(hub), "HF_ENDPOINT": DEAD}).execute() == 86
    weights = output / "adapter/adapter.json"
    weights.write_bytes(weights.read_bytes().replace(b'"step": 2', b'"step": 9'))
    second = make_agent(run, attempt=1, environment=environment(hub))
    assert second.execute() == 87
    assert "adapter.json was altered: its SHA-256 is not the one that was written" in second.message.message
    assert REPOSITORY not in hub.repositories


def test_large_files_and_repetition(publishing, hub, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/model.safetensors").write_bytes(b"w" * 100_000)
    (tmp_path / "a/README.md").write_text("---\nlibrary_name: peft\n---\nA card.\n")
    publish = publishing().output.publish
    assert publish is not None
    for _ in range(2):
        publish_to_hub(publish, tmp_path / "a", Reach(env=environment(hub)))
    assert hub.repositories[REPOSITORY].files["model.safetensors"] == b"w" * 100_000
    assert hub.repositories[REPOSITORY].files["README.md"].startswith(b"---")
