"""A stand-in for the Hugging Face hub on loopback: the few calls that an upload makes, and a record of them."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "x" * 34  # accepted by the stand-in


@dataclass
class Hub:
    """The state of the stand-in.

    Attributes:
        private: whether each repository is private.
        files: content of each file, by repository and branch.
        refuse: answers instead of the usual ones: the status by a pattern of "METHOD path".
        calls: every "METHOD path" that came.
    """

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)


@contextmanager
def hub() -> Iterator[Hub]:
    """A running stand-in."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            call = f"{self.command} {self.path}"
            state.calls.append(call)
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            for pattern, status in state.refuse.items():
                if re.search(pattern, call):
                    return self._send(status, {"error": f"no: {self.headers.get('Authorization')}"})
            if "/lfs/blob/" not in self.path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._send(401, {"error": f"Invalid token {self.headers.get('Authorization')}"})
            status, answer = answered(state, self.command, self.path, sent)
            return self._send(status, answer)

        def _send(self, status: int, answer: Any) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815 - names of http.server

        def log_message(self, *_: Any) -> None:
            """Stays silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answered(state: Hub, method: str, path: str, sent: bytes) -> tuple[int, Any]:
    """Status and JSON answer of one call."""
    if path == "/api/repos/create":
        asked = json.loads(sent)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        url = f"{state.address}/{name}"
        if name in state.private:
            return 409, {"error": "You already created this model repo", "url": url}
        state.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
        state.files[name, "main"] = {}
        return 200, {"url": url, "id": name}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if path.startswith("/lfs/blob/"):
        state.blobs[path.rpartition("/")[2]] = sent
        return 200, {}
    if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
        objects = [
            {**each, "actions": {"upload": {"href": f"{state.address}/lfs/blob/{each['oid']}"}}}
            for each in json.loads(sent)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}
    if (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)((/.*)?)", path.partition("?")[0])) is None:
        return 404, {"error": "no such page"}
    return of_repository(state, method, found[1], found[2], sent)


def of_repository(state: Hub, method: str, name: str, rest: str, sent: bytes) -> tuple[int, Any]:
    if name not in state.private:
        return 404, {"error": "Repository not found"}
    if rest.startswith("/branch/"):
        known = (name, rest.rpartition("/")[2]) in state.files
        state.files.setdefault((name, rest.rpartition("/")[2]), {})
        return (409, {"error": "Reference already exists"}) if known else (200, {})
    if rest.startswith("/preupload/"):
        files = [
            {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
            for each in json.loads(sent)["files"]
        ]
        return 200, {"files": [{**each, "shouldIgnore": False, "oid": None} for each in files]}
    if rest.startswith("/commit/"):
        branch = state.files[name, rest.rpartition("/")[2]]
        for line in map(json.loads, sent.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                branch[value["path"]] = state.blobs[value["oid"]]
        return 200, {"commitOid": "0" * 40, "commitUrl": f"{state.address}/{name}/commit/{'0' * 40}"}
    if method == "GET":
        return 200, {"id": name, "private": state.private[name], "sha": "0" * 40, "siblings": [], "tags": []}
    return 404, {"error": "no such page"}
