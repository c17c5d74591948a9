"""Credentials: from a run file's profile names to the keys in the environment."""

from __future__ import annotations

from collections.abc import Mapping

from finetune_api.failures import FinetuneError
from finetune_api.naming import credential_env
from finetune_api.runfile import StorageAccess
from finetune_trainer.store.objects import S3Settings


def resolve_access(access: StorageAccess, env: Mapping[str, str]) -> S3Settings:
    """The S3 settings of access, with the keys of its profile.

    Without a profile the environment's own identity counts: AWS_* in env, else the SDK's chain. AWS_ENDPOINT_URL_S3,
    AWS_ENDPOINT_URL and AWS_REGION fill what access leaves open. Raises FinetuneError(CredentialsRejected) if the
    profile lacks a key.
    """
    return S3Settings(
        endpoint=access.endpoint or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or None,
        region=access.region or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or None,
        path_style=access.path_style,
        ca_file=access.ca_file,
        access_key_id=_key(access, env, "AWS_ACCESS_KEY_ID", required=True),
        secret_access_key=_key(access, env, "AWS_SECRET_ACCESS_KEY", required=True),
        session_token=_key(access, env, "AWS_SESSION_TOKEN", required=False),
    )


def hub_token(access: StorageAccess, env: Mapping[str, str]) -> str | None:
    """The hub token of the access's profile, or HF_TOKEN where there is no profile; None reads public repositories."""
    return _key(access, env, "HF_TOKEN", required=False)


def _key(access: StorageAccess, env: Mapping[str, str], name: str, *, required: bool) -> str | None:
    # A trailing newline is what `kubectl create secret --from-file` leaves behind.
    if access.profile is None:
        return env.get(name, "").strip() or None
    value = env.get(credential_env(access.profile, name), "").strip()
    if required and not value:
        raise FinetuneError(
            f"the credentials {access.profile!r} hold no {name}. Add the key {name} to the secret.",
            failure_class="CredentialsRejected",
            field="spec.credentials",
        )
    return value or None
