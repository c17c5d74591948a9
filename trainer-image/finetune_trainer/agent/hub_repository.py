"""The artifact as a repository on the hub, where output.publish asks for it. The output has it already."""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars

from finetune_api.failures import FinetuneError
from finetune_api.runfile import RunPublish
from finetune_api.uri import parse_uri
from finetune_trainer.sources import Reach
from finetune_trainer.sources.access import hub_token
from finetune_trainer.sources.hub import PUBLIC_HUB

_FIELD = "spec.output.publish"
_CREDENTIALS = f"{_FIELD}.credentials"
_LOST_NOTHING = "The artifact is in output.uri all the same."


def publish_to_hub(publish: RunPublish, folder: Path, reach: Reach) -> str:
    """The files of folder are the newest commit of the repository; returns its address.

    The repository is made where it does not exist, private unless the job says public. One that is public already gets
    nothing from a job that does not say so. Publishing the same files again changes nothing.
    Raises FinetuneError: CredentialsRejected, InvalidSpec, StorageUnavailable.
    """
    name = parse_uri(publish.target.uri, field="output.publish.uri").container
    endpoint = (reach.env.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
    token = hub_token(publish.target.access, reach.env)
    if token is None:
        raise FinetuneError(
            f"Publishing to {publish.target.uri} needs a token. Add HF_TOKEN to the secret. {_LOST_NOTHING}",
            failure_class="CredentialsRejected",
            field=_CREDENTIALS,
        )
    disable_progress_bars()
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(name, private=not publish.public, exist_ok=True)
        if not publish.public and not api.repo_info(name).private:
            raise FinetuneError(
                f"{publish.target.uri} is public, and the job does not ask for a public model. Set "
                f"output.publish.public: true, or name another repository. {_LOST_NOTHING}",
                failure_class="InvalidSpec",
                field=f"{_FIELD}.public",
            )
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Fine-tuned model")
    except HFValidationError as error:
        raise FinetuneError(
            f"{publish.target.uri} is no repository name: {error}. {_LOST_NOTHING}",
            failure_class="InvalidSpec",
            field=f"{_FIELD}.uri",
        ) from None
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _typed(error, publish.target.uri, endpoint) from None
    return f"{endpoint}/{name}"


def _typed(error: Exception, uri: str, endpoint: str) -> FinetuneError:
    """The error to raise. Never chained: a request holds the token."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status in (401, 403):
        return FinetuneError(
            f"The hub at {endpoint} does not let HF_TOKEN write to {uri} (HTTP {status}). Give the token write access. "
            f"{_LOST_NOTHING}",
            failure_class="CredentialsRejected",
            field=_CREDENTIALS,
        )
    said = f"HTTP {status}" if status else type(error).__name__
    return FinetuneError(
        f"{uri} could not be written at {endpoint}: {said}. The next attempt tries again. {_LOST_NOTHING}",
        failure_class="StorageUnavailable",
        field=f"{_FIELD}.uri",
    )
