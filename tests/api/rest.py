"""A small REST client for tests: one kept-open connection per thread, plain dicts, the server's own words in errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

Object = dict[str, Any]

_PREFIXES = {
    "finetunejobs": "/apis/finetune.dev/v1alpha1",
    "gpupools": "/apis/finetune.dev/v1alpha1",
    "customresourcedefinitions": "/apis/apiextensions.k8s.io/v1",
    "jobs": "/apis/batch/v1",
    "leases": "/apis/coordination.k8s.io/v1",
}


class Refused(RuntimeError):
    """The API server said no. `status` is the HTTP code, `causes` the faults with their field paths."""

    def __init__(self, status: int, answer: Object) -> None:
        super().__init__(answer.get("message", ""))
        self.status = status
        causes = (answer.get("details") or {}).get("causes") or []
        self.causes = [(cause.get("field", ""), cause.get("message", "")) for cause in causes]

    @property
    def fields(self) -> list[str]:
        """The field paths that the server names."""
        return [field for field, _ in self.causes]


class NotFound(Refused):
    """There is no such object."""


class Api:
    """Plain requests as the user of a kubeconfig.

    >>> api.get("pods", "team-a", "pod-0")["status"]["phase"]
    """

    def __init__(self, kubeconfig: Path) -> None:
        settings = client.Configuration()
        config.load_kube_config(str(kubeconfig), client_configuration=settings)
        settings.connection_pool_maxsize = 16
        self._client = client.ApiClient(settings)
        self._host = settings.host

    def get(self, plural: str, namespace: str | None, name: str) -> Object:
        """The object; raises NotFound when there is none."""
        return self._call("GET", _path(plural, namespace, name))

    def find(self, plural: str, namespace: str | None, name: str) -> Object | None:
        """The object, or None."""
        try:
            return self.get(plural, namespace, name)
        except NotFound:
            return None

    def list(self, plural: str, namespace: str | None = None, labels: str = "") -> list[Object]:
        """All objects, of one namespace or of all."""
        query = {"labelSelector": labels} if labels else {}
        items: list[Object] = self._call("GET", _path(plural, namespace), query=query)["items"]
        return items

    def resource_version(self, plural: str, namespace: str | None) -> str:
        """Where a watch has to begin to see what happens from now on."""
        version: str = self._call("GET", _path(plural, namespace))["metadata"]["resourceVersion"]
        return version

    def create(self, plural: str, body: Mapping[str, Any], *, strict: bool = True) -> Object:
        """The created object. `strict` refuses unknown fields, as kubectl does."""
        namespace = body["metadata"].get("namespace")
        query = {"fieldValidation": "Strict" if strict else "Warn"}
        return self._call("POST", _path(plural, namespace), body=body, query=query)

    def replace(self, plural: str, body: Mapping[str, Any]) -> Object:
        """The object after a PUT of the whole."""
        meta = body["metadata"]
        return self._call("PUT", _path(plural, meta.get("namespace"), meta["name"]), body=body)

    def patch(self, plural: str, namespace: str | None, name: str, body: Any, *, status: bool = False) -> Object:
        """The object after a JSON merge patch."""
        path = _path(plural, namespace, name, status=status)
        return self._call("PATCH", path, body=body, content="application/merge-patch+json")

    def apply(
        self, plural: str, body: Mapping[str, Any], *, manager: str, force: bool = True, status: bool = False
    ) -> Object:
        """The object after a server-side apply."""
        meta = body["metadata"]
        query = {"fieldManager": manager, "force": str(force).lower(), "fieldValidation": "Strict"}
        path = _path(plural, meta.get("namespace"), meta["name"], status=status)
        return self._call("PATCH", path, body=body, content="application/apply-patch+yaml", query=query)

    def delete(self, plural: str, namespace: str | None, name: str, propagation: str = "Background") -> None:
        """Asks for deletion; raises NotFound when there is nothing."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        self._call("DELETE", _path(plural, namespace, name), body=body)

    def delete_all(self, plural: str, namespace: str) -> None:
        """All objects of a namespace go without grace; their children follow by garbage collection."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background", "gracePeriodSeconds": 0}
        self._call("DELETE", _path(plural, namespace), body=body)

    def evict(self, namespace: str, pod: str) -> None:
        """Asks for the pod's eviction, as a drain does: the pod gets the condition DisruptionTarget."""
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}}
        self._call("POST", _path("pods", namespace, pod) + "/eviction", body=body)

    def watch(self, plural: str, namespace: str | None, resource_version: str, seconds: int) -> Iterator[Object]:
        """Events {type, object} from resource_version on; ends after so many seconds."""
        query = {"watch": "1", "resourceVersion": resource_version, "timeoutSeconds": str(seconds)}
        response = self._send("GET", _path(plural, namespace), query=query, timeout=seconds + 10)
        rest = b""
        for chunk in response.response.stream(65536, decode_content=True):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (json.loads(line) for line in lines if line)

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        content: str = "application/json",
        query: Mapping[str, str] | None = None,
    ) -> Object:
        response = self._send(method, path, body=body, content=content, query=query)
        answer: Object = json.loads(response.read())
        if response.status >= 300:
            raise (NotFound if response.status == 404 else Refused)(response.status, answer)
        return answer

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        content: str = "application/json",
        query: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> Any:
        url = self._host + path + ("?" + urlencode(query) if query else "")
        headers = {"Content-Type": content, "Accept": "application/json"}
        try:
            return self._client.call_api(method, url, header_params=headers, body=body, _request_timeout=timeout)
        except ApiException as error:
            raise Refused(error.status or 0, {"message": str(error)}) from error


def _path(plural: str, namespace: str | None, name: str | None = None, *, status: bool = False) -> str:
    path = _PREFIXES.get(plural, "/api/v1")
    if namespace:
        path += f"/namespaces/{namespace}"
    path += f"/{plural}"
    if name:
        path += f"/{name}"
    return path + "/status" if status else path
