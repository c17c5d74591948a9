"""Every version of every FineTuneJob that the API server ever showed, from one watch."""

from __future__ import annotations

import json
import threading
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from urllib3.exceptions import HTTPError

from tests.api.rest import Api, Object, Refused


@dataclass(frozen=True)
class Version:
    """One event of the watch."""

    kind: str
    body: Object

    @property
    def uid(self) -> str:
        """Which object."""
        uid: str = self.body["metadata"]["uid"]
        return uid

    @property
    def namespace(self) -> str:
        """Where it is."""
        namespace: str = self.body["metadata"]["namespace"]
        return namespace

    def said(self) -> str:
        """What the object says, without versions and without the times at which things were said."""
        body = deepcopy(self.body)
        for name in ("resourceVersion", "managedFields"):
            body["metadata"].pop(name, None)
        return json.dumps(
            {"metadata": body["metadata"], "spec": body["spec"], "status": _timeless(body.get("status"))},
            sort_keys=True,
        )


class History:
    """Collects from the moment it is made."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._versions: list[Version] = []
        self._ended = threading.Event()
        self._since = api.resource_version("finetunejobs", None)
        self._thread = threading.Thread(target=self._collect, name="history", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Collects no more."""
        self._ended.set()

    def of(self, namespace: str) -> list[Version]:
        """All versions of the namespace's jobs in their order."""
        return [version for version in self._versions if version.namespace == namespace]

    def repetitions(self, namespace: str) -> list[str]:
        """Writes that said nothing new: what was said, once for each."""
        last: dict[str, str] = {}
        found = []
        for version in self.of(namespace):
            said = version.said()
            if version.kind == "MODIFIED" and last.get(version.uid) == said:
                found.append(said)
            last[version.uid] = said
        return found

    def touched_metadata(self, namespace: str) -> list[Object]:
        """Metadata with annotations or finalizers, which only an operator that misbehaves would write."""
        metas = [version.body["metadata"] for version in self.of(namespace)]
        return [
            meta
            for meta in metas
            if meta.get("finalizers") or any("kopf" in key for key in meta.get("annotations", {}))
        ]

    def _collect(self) -> None:
        while not self._ended.is_set():
            try:
                for event in self._api.watch("finetunejobs", None, self._since, 600):
                    if self._ended.is_set() or event["type"] == "ERROR":
                        break
                    self._since = event["object"]["metadata"]["resourceVersion"]
                    self._versions.append(Version(event["type"], event["object"]))
            except (Refused, HTTPError, OSError):
                if self._ended.wait(0.2):
                    return


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not key.endswith("Time")}
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    return value
