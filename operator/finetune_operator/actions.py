"""What `decide` may ask for. Each action is safe to repeat. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.status import FineTuneJobStatus

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Create:
    """The object exists afterwards. One that exists already and has the same controller is left as it is."""

    manifest: Manifest

    @property
    def kind(self) -> str:
        """Kind of the object."""
        return str(self.manifest["kind"])

    @property
    def name(self) -> str:
        """Name of the object."""
        return str(self.manifest["metadata"]["name"])


@dataclass(frozen=True)
class Release:
    """The Job may start pods: spec.suspend becomes false on the Job of that UID."""

    name: str
    uid: str


@dataclass(frozen=True)
class Delete:
    """The object of that UID goes, and what it owns after it; pods get their grace period."""

    kind: str
    name: str
    uid: str


Action = Create | Release | Delete


@dataclass(frozen=True)
class Event:
    """A line in `kubectl describe`: told once, when something changes. reason: the condition's reason."""

    type: str
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """What to do now. The actions come first, in order, then the status, then the events.

    look_again: seconds until the job has to be looked at although nothing changed.
    """

    status: FineTuneJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    look_again: float | None = None
