"""The API client: plain JSON objects over the asyncio half of the kubernetes package.

Every call has a time limit. Writes ask for strict field validation, so that a field that the server does not know is
an error and not a silent loss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio import client, config  # type: ignore[import-untyped,unused-ignore]

from finetune_api import naming

Body = dict[str, Any]
REQUEST_SECONDS = 10.0
PAGE = 500
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

# kind -> (API prefix, plural)
RESOURCES = {
    "FineTuneJob": ("apis/finetune.dev/v1alpha1", "finetunejobs"),
    "GPUPool": ("apis/finetune.dev/v1alpha1", "gpupools"),
    "Job": ("apis/batch/v1", "jobs"),
    "NetworkPolicy": ("apis/networking.k8s.io/v1", "networkpolicies"),
    "Lease": ("apis/coordination.k8s.io/v1", "leases"),
    "ConfigMap": ("api/v1", "configmaps"),
    "Service": ("api/v1", "services"),
    "Pod": ("api/v1", "pods"),
    "Node": ("api/v1", "nodes"),
    "Event": ("api/v1", "events"),
}


class ApiError(Exception):
    """The API server refused or did not answer; code 0 stands for no answer.

    ApiError
    ├── NotFound    404
    └── Conflict    409: somebody else was first
    """

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message


class NotFound(ApiError):
    """There is no such object."""


class Conflict(ApiError):
    """The object exists already, or changed since it was read."""


def in_cluster() -> bool:
    """Whether the pod's service account is to be used: it is there, and no KUBECONFIG says otherwise."""
    return _SERVICE_ACCOUNT.exists() and not os.environ.get("KUBECONFIG")


async def connect() -> client.ApiClient:
    """A client for the pod's service account, or else for the kubeconfig (KUBECONFIG or ~/.kube/config)."""
    configuration = client.Configuration()
    loader: Any = config  # the loaders have no type hints
    if in_cluster():
        loader.load_incluster_config(client_configuration=configuration)
    else:
        await loader.load_kube_config(client_configuration=configuration)
    api = client.ApiClient(configuration)
    api.user_agent = "finetune-operator"
    return api


class Kube:
    """Reads and writes API objects as plain JSON; raises ApiError and its subclasses."""

    def __init__(self, api: client.ApiClient, *, request_seconds: float = REQUEST_SECONDS) -> None:
        self._api = api
        self._timeout = aiohttp.ClientTimeout(total=request_seconds)

    async def get(self, kind: str, name: str, namespace: str | None = None) -> Body:
        """The object; NotFound where there is none."""
        return await self._call("GET", _path(kind, namespace, name))

    async def list(
        self, kind: str, namespace: str | None = None, *, labels: str | None = None, fields: str | None = None
    ) -> list[Body]:
        """All objects, read page by page."""
        found: list[Body] = []
        query: dict[str, Any] = {"limit": PAGE}
        if labels:
            query["labelSelector"] = labels
        if fields:
            query["fieldSelector"] = fields
        while True:
            page = await self._call("GET", _path(kind, namespace), query)
            found += page.get("items") or []
            following = page["metadata"].get("continue")
            if not following:
                return found
            query["continue"] = following

    async def create(self, body: Mapping[str, Any]) -> Body:
        """The object as created; Conflict where one of that name exists."""
        path = _path(body["kind"], body["metadata"].get("namespace"))
        query = {"fieldManager": naming.MANAGER_OPERATOR, "fieldValidation": "Strict"}
        return await self._call("POST", path, query, body)

    async def replace(self, body: Mapping[str, Any]) -> Body:
        """The object as written; Conflict where its resourceVersion is not the current one."""
        metadata = body["metadata"]
        path = _path(body["kind"], metadata.get("namespace"), metadata["name"])
        return await self._call("PUT", path, {"fieldManager": naming.MANAGER_OPERATOR}, body)

    async def merge(self, kind: str, name: str, namespace: str, patch: Mapping[str, Any]) -> Body:
        """The object after a JSON merge patch; Conflict where metadata.uid in the patch is another one."""
        query = {"fieldManager": naming.MANAGER_OPERATOR, "fieldValidation": "Strict"}
        return await self._call("PATCH", _path(kind, namespace, name), query, patch, "application/merge-patch+json")

    async def apply_status(self, body: Mapping[str, Any], manager: str = naming.MANAGER_OPERATOR) -> Body:
        """The object after server-side apply of its status; Conflict where its resourceVersion is not the current one."""
        metadata = body["metadata"]
        path = _path(body["kind"], metadata.get("namespace"), metadata["name"]) + "/status"
        query = {"fieldManager": manager, "fieldValidation": "Strict", "force": "true"}
        return await self._call("PATCH", path, query, body, "application/apply-patch+yaml")

    async def delete(self, kind: str, name: str, namespace: str, uid: str) -> None:
        """The object of that UID is gone or going; one of another UID stays."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        try:
            await self._call("DELETE", _path(kind, namespace, name), None, options)
        except (NotFound, Conflict):
            return

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Body:
        headers: dict[str, str] = {"Accept": "application/json", "Content-Type": content_type}
        # The client's own authentication step refreshes tokens and puts them into the headers.
        await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        headers["User-Agent"] = self._api.user_agent
        url = f"{self._api.configuration.host}/{path}" + (f"?{urlencode(query)}" if query else "")
        rest: Any = self._api.rest_client  # has no type hints
        try:
            response = await rest.request(method, url, headers=headers, body=body, _request_timeout=self._timeout)
            data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, "NoAnswer", f"{method} /{path}: {type(error).__name__}: {error}") from error
        if response.status >= 400:
            raise _error(response.status, data)
        answer: Body = json.loads(data)
        return answer


def _path(kind: str, namespace: str | None, name: str | None = None) -> str:
    prefix, plural = RESOURCES[kind]
    parts = [prefix, *(["namespaces", quote(namespace, safe="")] if namespace else []), plural]
    return "/".join([*parts, *([quote(name, safe="")] if name else [])])


def _error(code: int, data: bytes) -> ApiError:
    try:
        status = json.loads(data)
        reason, message = str(status.get("reason") or ""), str(status.get("message") or "")
    except (ValueError, AttributeError):
        reason, message = "", data[:200].decode(errors="replace")
    kind = {404: NotFound, 409: Conflict}.get(code, ApiError)
    return kind(code, reason, message)
