"""The writing half of the small hub: create, pre-upload, large files, commit. Checked with the hub's own client."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.train.sources.hub_server import HubServer

LARGE_ENDINGS = (".safetensors", ".png")


def answer_write(hub: HubServer, request: BaseHTTPRequestHandler, path: str) -> tuple[int, dict[str, Any]]:
    """(status, answer) of a POST or PUT; the hub's repositories change as it says."""
    from tests.train.sources.hub_server import Repository

    data = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if match := re.fullmatch(r"/large/([0-9a-f]{64})", path):
        if hashlib.sha256(data).hexdigest() != match[1]:
            return 400, {"error": "wrong content"}
        hub.large[match[1]] = data
        return 200, {}
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if hub.write_token is None or given != hub.write_token:
        return 403, {"error": "You don't have the rights to write here"}
    if path == "/api/repos/create":
        wanted = json.loads(data)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{hub.endpoint}/{name}"}
        private = wanted.get("visibility") == "private"
        hub.repositories[name] = Repository({}, token=given if private else None, private=private)
        return 200, {"url": f"{hub.endpoint}/{name}", "name": name}
    if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
        return 200, {"transfer": "basic", "objects": [_upload(hub, item) for item in json.loads(data)["objects"]]}
    match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
    repository = hub.repositories.get(match[1]) if match else None
    if match is None or repository is None:
        return 404, {"error": "no such page"}
    if match[2] == "preupload":
        files = [file["path"] for file in json.loads(data)["files"]]
        return 200, {"files": [{"path": name, "uploadMode": _mode(name), "shouldIgnore": False} for name in files]}
    for line in map(json.loads, data.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            repository.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            repository.files[value["path"]] = hub.large[value["oid"]]
    url = f"{hub.endpoint}/{match[1]}/commit/{repository.commit}"
    return 200, {"commitUrl": url, "commitOid": repository.commit, "success": True}


def _mode(name: str) -> str:
    return "lfs" if name.endswith(LARGE_ENDINGS) else "regular"


def _upload(hub: HubServer, item: dict[str, Any]) -> dict[str, Any]:
    known = item["oid"] in hub.large
    actions = {} if known else {"actions": {"upload": {"href": f"{hub.endpoint}/large/{item['oid']}"}}}
    return {"oid": item["oid"], "size": item["size"], **actions}
