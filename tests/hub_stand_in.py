"""A stand-in for the Hugging Face hub on this machine, which keeps what is pushed to it."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

REPOSITORY = "me/small-vit"


@dataclass
class Hub:
    """What the stand-in holds: branches of one repository with their files, and large files by digest."""

    address: str = ""
    private: bool | None = None  # None: the repository is not there
    mine: bool = True
    invalid_card: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        """Status and JSON for a request, as https://huggingface.co answers."""
        if path == "/api/repos/create":
            new = json.loads(body)
            if not self.mine:
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            assert (new["organization"], new["name"]) == tuple(REPOSITORY.split("/"))
            self.private = new.get("visibility") == "private" or new.get("private") is True
            self.branches["main"] = {}
            return 200, {"url": f"{self.address}/{REPOSITORY}"}
        if path == "/api/validate-yaml":
            errors = [{"message": '"license" must be a string'}] if self.invalid_card else []
            return (400 if errors else 200), {"errors": errors, "warnings": []}
        if method == "PUT" and path.startswith("/large/"):
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if self.private is None:
            return 404, {"error": "Repository not found"}
        if not self.mine and method == "POST":
            return 403, {"error": "Forbidden: you need write access"}
        if path == f"/api/models/{REPOSITORY}":
            return 200, {"id": REPOSITORY, "private": self.private, "sha": "0" * 40, "siblings": []}
        if path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.address}/large/{one['oid']}"}}
            return 200, {"objects": objects, "transfer": "basic"}
        asked = re.fullmatch(rf"/api/models/{REPOSITORY}/(branch|preupload|commit)/(\w+)", path)
        if asked is None:
            return 404, {"error": "Not found"}
        what, branch = asked.groups()
        if what == "branch":
            self.branches[branch] = {}
            return 200, {}
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = {one["path"]: "lfs" if one["path"].endswith(".safetensors") else "regular" for one in files}
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.branches[branch][value["path"]] = content
        return 200, {"commitUrl": f"{self.address}/{REPOSITORY}/commit/{'a' * 40}", "commitOid": "a" * 40}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, as the hub of this process."""
    held = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else self._chunks()
            if self.command == "POST":  # large files go to storage, whose address is the permission
                held.tokens.add(self.headers.get("Authorization"))
            status, content = held.answer(self.command, self.path.partition("?")[0], body)
            answer = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _chunks(self) -> bytes:
            parts = []
            while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None: ...

        do_GET = do_POST = do_PUT = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", held.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield held
    server.shutdown()
    thread.join()
    server.server_close()
