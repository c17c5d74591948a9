"""Whether the hub will take an artifact: asked before a GPU is, and without writing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx2
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id

from finetune_api.failures import FinetuneError
from finetune_api.runfile import RunPublish
from finetune_api.uri import parse_uri
from finetune_trainer.sources.access import hub_token
from finetune_trainer.sources.hub import IMPATIENT_SECONDS, PATIENT_SECONDS, PUBLIC_HUB
from finetune_trainer.sources.place import Reach

FIELD = "spec.output.publish"
_WRITE = "repo.write"
_TRIES = 2


def check_publish(publish: RunPublish, reach: Reach) -> bool:
    """Whether the repository exists already. Raises FinetuneError if the artifact could not be published there.

    InvalidSpec: no repository name, or a public repository where the job does not ask for one. CredentialsRejected: no
    token, one that the hub does not know, or one that may not write to the owner's repositories. StorageUnavailable.
    """
    uri = publish.target.uri
    name = parse_uri(uri, field="output.publish.uri").container
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FinetuneError(
            f"output.publish.uri is {uri}, which is no repository name: {error}",
            failure_class="InvalidSpec",
            field=f"{FIELD}.uri",
        ) from None
    token = hub_token(publish.target.access, reach.env)
    if token is None:
        raise _rejected(f"Publishing to {uri} needs a token. Add HF_TOKEN to the secret of the credentials.")
    hub = _Hub((reach.env.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/"), token, reach)
    status, account = hub.ask("/api/whoami-v2")
    if status in (401, 403):
        raise _rejected(f"The hub at {hub.endpoint} refused HF_TOKEN (HTTP {status}). Put a valid one into the secret.")
    if status != 200:
        raise hub.unavailable(f"HTTP {status}")
    _check_may_write(account, name, uri)
    status, repository = hub.ask(f"/api/models/{name}")
    if status == 200 and repository.get("private") is False and not publish.public:
        raise FinetuneError(
            f"{uri} is public, and the job does not ask for a public model. Set output.publish.public: true, or name "
            "another repository.",
            failure_class="InvalidSpec",
            field=f"{FIELD}.public",
        )
    return status == 200


class _Hub:
    def __init__(self, endpoint: str, token: str, reach: Reach) -> None:
        self.endpoint = endpoint
        self._headers = build_hf_headers(token=token)
        self._reach = reach

    def ask(self, path: str) -> tuple[int, Mapping[str, Any]]:
        """(HTTP status, the JSON object that came with it, empty if there was none). Raises StorageUnavailable."""
        seconds = PATIENT_SECONDS if self._reach.patient else IMPATIENT_SECONDS
        for number in range(1, _TRIES + 1):
            try:
                answer = get_session().get(self.endpoint + path, headers=self._headers, timeout=seconds)
            except httpx2.HTTPError as error:
                if number == _TRIES:
                    raise self.unavailable(type(error).__name__) from None
                continue
            self._reach.beat()
            if answer.status_code < 500 or number == _TRIES:
                break
        try:
            document = answer.json()
        except ValueError:
            document = None
        return answer.status_code, document if isinstance(document, dict) else {}

    def unavailable(self, why: str) -> FinetuneError:
        """The hub gives no answer. Never chained: a request holds the token."""
        return FinetuneError(
            f"The hub at {self.endpoint} cannot be asked whether it takes the artifact: {why}. Check HF_ENDPOINT, and that "
            "it can be reached from the cluster.",
            failure_class="StorageUnavailable",
            field=f"{FIELD}.uri",
        )


def _check_may_write(account: Mapping[str, Any], name: str, uri: str) -> None:
    """Raises CredentialsRejected if the token's account or kind rules out that it may write to the repository."""
    user, owner = str(account.get("name", "")), name.split("/")[0]
    access = account.get("auth", {}).get("accessToken", {}) if isinstance(account.get("auth"), dict) else {}
    role = access.get("role")
    if role == "read":
        raise _rejected(f"HF_TOKEN of {user} may only read, so it cannot publish to {uri}. Use a token that may write.")
    if role == "fineGrained":
        if not _granted(access.get("fineGrained"), owner, name):
            raise _rejected(
                f"HF_TOKEN of {user} does not have the permission {_WRITE} for {owner}, so it cannot publish to {uri}. Add "
                "it to the token."
            )
        return
    groups = {str(group.get("name")): group for group in account.get("orgs", []) if isinstance(group, dict)}
    if owner.lower() == user.lower():
        return
    group = next((group for own, group in groups.items() if own.lower() == owner.lower()), None)
    if group is None:
        belongs = ", ".join([user, *groups])
        raise _rejected(f"HF_TOKEN belongs to {belongs}, which cannot publish to {uri}. Correct output.publish.uri.")
    if group.get("roleInOrg") == "read":
        raise _rejected(f"{user} may only read in {owner}, so it cannot publish to {uri}. Ask an admin of {owner}.")


def _granted(grants: Any, owner: str, name: str) -> bool:
    """Whether a fine-grained token may write; True where the hub's answer has a form that is not known."""
    scoped = grants.get("scoped") if isinstance(grants, dict) else None
    if not isinstance(scoped, list):
        return True
    for scope in scoped:
        entity = str(scope.get("entity", {}).get("name", "")).lower()
        if entity in (owner.lower(), name.lower()) and _WRITE in scope.get("permissions", []):
            return True
    return False


def _rejected(message: str) -> FinetuneError:
    return FinetuneError(message, failure_class="CredentialsRejected", field=f"{FIELD}.credentials")
