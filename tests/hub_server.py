"""A stand-in for the Hugging Face Hub: the few HTTP endpoints that reslab's calls of huggingface_hub use."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_abcdefghijklmnop"


class Hub:
    """Repositories in memory: all commits of each, as file contents by path.

    Attributes:
        url: Address of the server.
        requests: Method and path of every request.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.url = ""

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        history = self.commits.setdefault(repo, {})
        before = history[next(reversed(history))] if history else {}
        sha = hashlib.sha1(repr((len(history), sorted(files))).encode()).hexdigest()
        history[sha] = {**before, **files}
        return sha

    def resolve(self, repo: str, revision: str) -> str | None:
        history = self.commits.get(repo, {})
        if revision == "main":
            return next(reversed(history), None)
        return next((sha for sha in history if sha == revision), None)

    def environ(self, home: Path, logged_in: bool = True) -> dict[str, str]:
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**variables, "HF_TOKEN": TOKEN if logged_in else "", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._path()
        if path[:2] == ["api", "whoami-v2"]:
            valid = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._send({"type": "user", "name": "me"} if valid else {"error": "Invalid token"}, 200 if valid else 401)
        elif path[:2] == ["api", "models"]:
            self._info("/".join(path[2:4]), path[5] if path[4:5] == ["revision"] else "main")
        else:
            self._file("/".join(path[:2]), path[3], "/".join(path[4:]))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        repo = "/".join(path[2:4])
        if path == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif path == ["api", "validate-yaml"]:
            self._send({"errors": [], "warnings": []})
        elif path[4] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self._send({"files": files})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            sha = self.hub.commit(repo, {value["path"]: base64.b64decode(value["content"]) for value in values})
            self._send({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def _create(self, wish: dict[str, Any]) -> None:
        repo = f"{wish.get('organization') or 'me'}/{wish['name']}"
        exists = repo in self.hub.private
        self.hub.private.setdefault(repo, wish.get("private") is True or wish.get("visibility") == "private")
        self._send({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}, 409 if exists else 200)

    def _info(self, repo: str, revision: str) -> None:
        if repo not in self.hub.private and repo not in self.hub.commits:
            self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif (sha := self.hub.resolve(repo, revision)) is None and self.hub.commits.get(repo):
            self._send({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            names = self.hub.commits[repo][sha] if sha else {}
            siblings = [{"rfilename": name} for name in names]
            private = self.hub.private.get(repo, False)
            self._send({"id": repo, "modelId": repo, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def _file(self, repo: str, revision: str, name: str) -> None:
        sha = self.hub.resolve(repo, revision)
        content = self.hub.commits[repo][sha].get(name) if sha else None
        if content is None:
            self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha or ""})
        else:
            etag = hashlib.sha256(content).hexdigest()
            self._send(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha or ""})

    def _path(self) -> list[str]:
        self.hub.requests.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
