"""hf:// against a server with the hub's contract: tokens, revisions, splits and outages."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.failures import FinetuneError
from finetune_trainer.sources import Fetched, Purpose, Reach, fetch
from tests.cluster.processes import free_port
from tests.train.sources.hub_server import HubServer, Repository
from tests.train.sources.making import model_files, profile_env, reference

TOKEN = "hf_secret_token"
CARD = b"""---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: "main/part-*.jsonl"
  - split: test
    path: ["main/held.jsonl"]
- config_name: small
  data_files: "small/*.csv"
---
# A data set
"""


def model(
    hub: HubServer,
    tmp_path: Path,
    *,
    token: str | None = None,
    uri: str = "hf://team/model",
    revision: str | None = None,
    patient: bool = False,
) -> Fetched:
    env = {"HF_ENDPOINT": hub.endpoint} | profile_env("TEAM", {"HF_TOKEN": token} if token else {})
    return fetch(
        reference(uri, profile="team", revision=revision),
        tmp_path / "got",
        purpose=Purpose.MODEL,
        field="model.uri",
        reach=Reach(env=env, patient=patient),
    )


def data(hub: HubServer, tmp_path: Path, uri: str = "hf://datasets/team/data", **which: str) -> list[str]:
    fetched = fetch(
        reference(uri, **which),
        tmp_path / "got",
        purpose=Purpose.DATA,
        field="dataset.sources[0].uri",
        reach=Reach(env={"HF_ENDPOINT": hub.endpoint}, patient=False),
    )
    return [file.name for file in fetched.files]


def test_the_commit_behind_a_branch_is_recorded_and_can_be_asked_for(hub: HubServer, tmp_path: Path) -> None:
    repository = hub.repositories["team/model"] = Repository(model_files())
    assert model(hub, tmp_path).revision == repository.commit
    assert model(hub, tmp_path / "again", revision=repository.commit).revision == repository.commit
    assert not list((tmp_path / "got").glob(".*"))


def test_a_private_model_opens_with_its_token_only(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["team/model"] = Repository(model_files(), token=TOKEN)
    with pytest.raises(FinetuneError, match="has no such repository, or HF_TOKEN does not open it") as caught:
        model(hub, tmp_path)
    assert (caught.value.failure_class, caught.value.field) == ("ModelNotFound", "spec.model.uri")
    with pytest.raises(FinetuneError, match=r"the hub refused the token \(HTTP 401\)") as caught:
        model(hub, tmp_path, token="hf_other_token")
    assert (caught.value.failure_class, caught.value.field) == ("CredentialsRejected", "spec.credentials")
    assert "hf_other_token" not in str(caught.value)
    assert len(model(hub, tmp_path, token=TOKEN).files) == 4


def test_a_gated_model_asks_for_access(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["team/model"] = Repository(model_files(), gated=True)
    with pytest.raises(FinetuneError, match="Accept its terms on the hub") as caught:
        model(hub, tmp_path)
    assert caught.value.failure_class == "CredentialsRejected"


def test_a_missing_repository_and_a_missing_revision_are_told_apart(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["team/model"] = Repository(model_files())
    with pytest.raises(FinetuneError, match="has no such repository") as caught:
        model(hub, tmp_path, uri="hf://team/absent")
    assert (caught.value.failure_class, caught.value.field) == ("ModelNotFound", "spec.model.uri")
    with pytest.raises(FinetuneError, match="it has no revision 'v9'") as caught:
        model(hub, tmp_path, revision="v9")
    assert (caught.value.failure_class, caught.value.field) == ("ModelNotFound", "spec.model.revision")


def test_a_name_that_is_no_repository_is_told(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="is no repository name") as caught:
        model(hub, tmp_path, uri="hf://team/--bad--")
    assert caught.value.failure_class == "InvalidSpec"


def test_a_busy_hub_is_asked_again_and_a_dead_one_is_told(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["team/model"] = Repository(model_files())
    hub.fail_next = 1
    assert len(model(hub, tmp_path).files) == 4
    hub.fail_next = 1000
    with pytest.raises(FinetuneError, match="HTTP 503") as caught:
        model(hub, tmp_path / "again")
    assert caught.value.failure_class == "StorageUnavailable"


def test_a_hub_where_nothing_listens_is_told(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match=r"ConnectError. Check HF_ENDPOINT") as caught:
        fetch(
            reference("hf://team/model"),
            tmp_path / "got",
            purpose=Purpose.MODEL,
            field="model.uri",
            reach=Reach(env={"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}, patient=False),
        )
    assert caught.value.failure_class == "StorageUnavailable"


def test_a_data_sets_card_says_which_files_belong_to_config_and_split(hub: HubServer, tmp_path: Path) -> None:
    files = ("main/part-0.jsonl", "main/part-1.jsonl", "main/held.jsonl", "small/a.csv")
    hub.repositories["datasets/team/data"] = Repository({name: b"{}" for name in files} | {"README.md": CARD})
    assert data(hub, tmp_path / "1") == ["main/part-0.jsonl", "main/part-1.jsonl"]
    assert data(hub, tmp_path / "2", split="test") == ["main/held.jsonl"]
    assert data(hub, tmp_path / "3", config="small") == ["small/a.csv"]
    assert data(hub, tmp_path / "4", "hf://datasets/team/data/main/held.jsonl") == ["held.jsonl"]
    with pytest.raises(FinetuneError, match=r"no file of split 'dev'; it has main/held.jsonl") as caught:
        data(hub, tmp_path / "5", split="dev")
    assert (caught.value.failure_class, caught.value.field) == ("DataNotFound", "spec.dataset.sources[0].split")


def test_without_a_card_the_split_is_told_from_the_names(hub: HubServer, tmp_path: Path) -> None:
    files = ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "data/training_notes.txt")
    hub.repositories["datasets/team/data"] = Repository({name: b"x" for name in files})
    assert data(hub, tmp_path / "1") == ["data/train-00000-of-00001.parquet"]
    assert data(hub, tmp_path / "2", split="test") == ["data/test-00000-of-00001.parquet"]
    hub.repositories["datasets/team/data"] = Repository({"a.jsonl": b"{}", "b.jsonl": b"{}"})
    assert data(hub, tmp_path / "3") == ["a.jsonl", "b.jsonl"]
