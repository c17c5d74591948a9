"""The test's hub keeps the hub's contract, as the hub's own client sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.train.sources.hub_server import HubServer, Repository, account


def test_the_client_lists_and_downloads_a_repository(hub: HubServer, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "sub/large.bin": b"x" * 10_000}
    hub.repositories["team/model"] = Repository(files)
    api = HfApi(endpoint=hub.endpoint)
    info = api.model_info("team/model", files_metadata=True)
    assert info.sha == hub.repositories["team/model"].commit
    assert {s.rfilename: s.size for s in info.siblings or []} == {"config.json": 2, "sub/large.bin": 10_000}
    assert [item.path for item in api.list_repo_tree("team/model", recursive=True)] == ["config.json", "sub/large.bin"]
    folder = Path(snapshot_download("team/model", endpoint=hub.endpoint, local_dir=tmp_path / "got"))
    assert (folder / "sub/large.bin").read_bytes() == files["sub/large.bin"]


def test_the_client_sees_the_hubs_refusals(hub: HubServer) -> None:
    hub.repositories |= {"team/open": Repository({"a": b"1"}), "team/gated": Repository({"a": b"1"}, gated=True)}
    api = HfApi(endpoint=hub.endpoint)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("team/absent")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("team/open", revision="v9")
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("team/gated", "a", local_dir="/tmp/never")


def test_the_client_learns_whose_token_it_has(hub: HubServer) -> None:
    hub.accounts["hf_token"] = account("ann", orgs={"team": "write"}, role="read")
    found = HfApi(endpoint=hub.endpoint).whoami("hf_token")
    assert (found["name"], [org["name"] for org in found["orgs"]]) == ("ann", ["team"])
    assert found["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.endpoint).whoami("hf_other")
