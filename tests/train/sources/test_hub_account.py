"""Whether the hub will take an artifact: told before a GPU is taken, and without writing anything."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.runfile import RunPublish
from finetune_trainer.sources import Reach
from finetune_trainer.sources.hub_account import check_publish
from tests.cluster.processes import free_port
from tests.train.sources.hub_server import HubServer, Repository, account
from tests.train.sources.making import profile_env, reference

TOKEN = "hf_secret_token"


def ask(
    hub: HubServer, uri: str = "hf://team/faq", *, token: str | None = TOKEN, public: bool = False, endpoint: str = ""
) -> bool:
    keys = {"HF_TOKEN": token} if token else {}
    env = profile_env("TEAM", keys) | {"HF_ENDPOINT": endpoint or hub.endpoint}
    publish = RunPublish(target=reference(uri, profile="team"), public=public)
    return check_publish(publish, Reach(env=env, patient=False))


def scope(name: str, *permissions: str) -> dict[str, object]:
    return {"entity": {"_id": "1", "type": "org", "name": name}, "permissions": list(permissions)}


@pytest.mark.parametrize(
    "owner",
    [
        account("team"),
        account("ann", orgs={"other": "admin", "team": "write"}),
        account("ann", role="fineGrained", scoped=[scope("team", "repo.content.read", "repo.write")]),
        account("ann", role="fineGrained", scoped=[scope("team/faq", "repo.write")]),
    ],
)
def test_an_account_that_may_write_passes_and_nothing_is_written(hub: HubServer, owner: dict[str, Any]) -> None:
    hub.accounts[TOKEN] = owner
    assert ask(hub) is False
    hub.repositories["team/faq"] = Repository({"config.json": b"{}"}, private=True)
    assert ask(hub) is True
    assert {line.split()[0] for line in hub.requests} == {'"GET'}


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        (None, "refused HF_TOKEN .HTTP 401."),
        (account("team", role="read"), "HF_TOKEN of team may only read"),
        (account("ann", orgs={"other": "admin"}), "HF_TOKEN belongs to ann, other, which cannot publish to hf://team"),
        (account("ann", orgs={"team": "read"}), "ann may only read in team"),
        (
            account("team", role="fineGrained", scoped=[scope("team", "repo.content.read"), scope("x", "repo.write")]),
            "does not have the permission repo.write for team",
        ),
    ],
)
def test_an_account_that_may_not_write_is_told_why(hub: HubServer, owner: dict[str, Any] | None, words: str) -> None:
    if owner is not None:
        hub.accounts[TOKEN] = owner
    with pytest.raises(FinetuneError, match=words) as caught:
        ask(hub)
    assert caught.value.failure_class == "CredentialsRejected"
    assert caught.value.field == "spec.output.publish.credentials" and TOKEN not in str(caught.value)


def test_a_missing_token_is_told_without_asking_the_hub(hub: HubServer) -> None:
    with pytest.raises(FinetuneError, match=r"needs a token\. Add HF_TOKEN to the secret") as caught:
        ask(hub, token=None)
    assert caught.value.failure_class == "CredentialsRejected" and hub.requests == []


@pytest.mark.parametrize("uri", ["hf://team/bad--name", "hf://team/.hidden", "hf://team/x.git"])
def test_a_name_that_no_repository_can_have_is_told(hub: HubServer, uri: str) -> None:
    with pytest.raises(FinetuneError, match="which is no repository name") as caught:
        ask(hub, uri)
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.output.publish.uri")


def test_a_public_repository_gets_no_model_that_is_to_stay_private(hub: HubServer) -> None:
    hub.accounts[TOKEN] = account("team")
    hub.repositories["team/faq"] = Repository({"config.json": b"{}"})
    with pytest.raises(FinetuneError, match="is public, and the job does not ask for a public model") as caught:
        ask(hub)
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.output.publish.public")
    assert ask(hub, public=True) is True


def test_a_busy_hub_is_asked_again_and_a_dead_one_is_told(hub: HubServer) -> None:
    hub.accounts[TOKEN] = account("team")
    hub.fail_next = 1
    assert ask(hub) is False
    hub.fail_next = 1000
    with pytest.raises(FinetuneError, match="cannot be asked whether it takes the artifact: HTTP 503") as caught:
        ask(hub)
    assert caught.value.failure_class == "StorageUnavailable"
    with pytest.raises(FinetuneError, match="ConnectError"):
        ask(hub, endpoint=f"http://127.0.0.1:{free_port()}")
