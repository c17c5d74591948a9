"""Secrets: which variables hold them, and how they stay out of workers, logs and messages."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

# AWS_* and FINETUNE_CRED_* hold more than secrets, but no worker needs any of it.
_PREFIXES = ("FINETUNE_CRED_", "AWS_")
_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HF_TOKEN_PATH")
# An access key id is a name, not a secret; it may well be a team's name that a message has to show.
_SECRET_ENDINGS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUB_TOKEN")
_SHORTEST = 8
MASK = "***"


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that a worker may see: no credentials of storage or hub."""
    return {name: value for name, value in environment.items() if not name.startswith(_PREFIXES) and name not in _NAMES}


class Redactor:
    """Replaces every secret value of the environment by `***`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = {value for name, value in environment.items() if name.endswith(_SECRET_ENDINGS)}
        # Longest first, so that a secret that contains another one leaves no rest.
        self._values = sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)

    def text(self, text: str) -> str:
        """text without secrets."""
        for value in self._values:
            text = text.replace(value, MASK)
        return text

    def event(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
        """A structlog processor: no value of the event holds a secret."""
        return {key: self.text(value) if isinstance(value, str) else value for key, value in event.items()}
